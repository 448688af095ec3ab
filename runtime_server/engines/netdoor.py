"""Opens a listening socket in the network namespace of a sandbox, and hands it over.

How to run it
    nsenter -t PID -n python runtime_server/engines/netdoor.py PORT     the socket goes out through stdin

What it is
    A socket belongs to the network namespace that it was made in, whoever holds it. So the server listens
    inside of a sandbox that has no network, and nothing of ours runs in there that could be killed.

What it does not do
    It imports nothing of the project, accepts nothing, and ends at once.
"""

from __future__ import annotations

import socket
import sys


def main() -> int:
    with socket.socket(fileno=0) as asker, socket.socket(socket.AF_INET, socket.SOCK_STREAM) as door:
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            door.bind(("127.0.0.1", int(sys.argv[1])))
            door.listen(64)
        except OSError as error:
            print(f"netdoor: {error}", file=sys.stderr)
            return 1
        socket.send_fds(asker, [b"x"], [door.fileno()])
        asker.detach()
    return 0


if __name__ == "__main__":
    sys.exit(main())
