"""Other projects' sandbox protocols, answered for any image: nothing of theirs is installed in it.

What it is
    OpenHands `RemoteRuntime` (V0), its SkyRL fork, OpenHands' `APIRemoteWorkspace` (V1) and SWE-ReX's
    `RemoteRuntime`, unmodified, work against this server. Which one a sandbox speaks is found out from
    the request that starts it.

    `front.py`      the door: keys, bodies, which part answers a path
    `start.py`      what `/start` asks for, and in which dialect        (pure)
    `records.py`    the record that every dialect reads                 (pure)
    `images.py`     image names, builds that need no building           (pure, and one file of aliases)
    `keys.py`       session keys
    `runtimes.py`   runtimes: started, found again, paused, stopped
    `control.py`    the control API: `/start`, `/stop`, `/sessions`, `/runtime`, `/build` …
    `v0*.py`        OpenHands V0 and SkyRL, inside the sandbox
    `v1*.py`        OpenHands V1, inside the sandbox
    `swerex*.py`    SWE-ReX, inside the sandbox

How to use it
    app.add_middleware(Front, runtimes=Runtimes(sandboxes), key=key)      # app.py does it

What it does not do
    It runs none of their servers, builds no image, and forwards nothing to a port of a sandbox. Agent loops
    inside the sandbox (`/api/conversations`) are refused.
"""
