"""The sandbox server as a process.

How to run it
    python -m runtime_server --run-dir R                        the runtime of a run, by its config.yaml
    python -m runtime_server --run-dir R --server NAME          one more server of a run, beside others
    python -m runtime_server [--image I] [--host H] [--port P]  alone; prints url, key file and a curl line
    python -m runtime_server --sweep [--dry-run]                remove (list) what killed servers left here

    SIGTERM or SIGINT: refuse new work, give running commands `runtime.drain_timeout`, remove everything, exit
    with 0. A second signal cuts the commands short.

Exit codes
    0 stopped as told; 64 wrong usage or configuration, or the port is taken; 66 the image or the run is
    missing; 69 this node cannot run sandboxes (no podman, no runtime that works); 70 it failed later.

What it does not do
    It does not watch the training: the runtime job around it does.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from orchestrator.contract import ContractError, Exit
from orchestrator.schema import Runtime
from runtime_server.claims import comes_back, remains
from runtime_server.engines.state import sweep

log = logging.getLogger("runtime_server")
ENGINES = ("podman", "apptainer", "process")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    defaults = Runtime()
    parser = argparse.ArgumentParser(
        prog="python -m runtime_server", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--run-dir", type=Path, help="serve this run, by its config.yaml")
    parser.add_argument("--server", default="", help="with --run-dir: one of several, by this name")
    parser.add_argument("--image", help=f"image of sandboxes (default {defaults.sandbox.image})")
    parser.add_argument("--host", help="address to bind (default 127.0.0.1; of a run: runtime.host)")
    parser.add_argument("--port", type=int, help="port to bind (default 0: a free one)")
    parser.add_argument(
        "--state-dir", help="where to keep state; one that was killed there is taken over by the next"
    )
    parser.add_argument("--engine", choices=ENGINES, help="what makes the sandboxes (default podman)")
    parser.add_argument("--verbose", action="store_true", help="log every request")
    parser.add_argument("--sweep", action="store_true", help="remove what killed servers left, then exit")
    parser.add_argument("--dry-run", action="store_true", help="with --sweep: list it, remove nothing")
    options = parser.parse_args(argv)
    if options.dry_run and not options.sweep:
        parser.error("--dry-run goes with --sweep")
    if options.server and not (
        options.run_dir and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}", options.server)
    ):
        parser.error("--server takes a name of letters, digits, - and _, and goes with --run-dir")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    level = logging.INFO if options.verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    log.setLevel(logging.INFO)
    try:
        if options.sweep:
            found = remains() if options.dry_run else sweep(spare=comes_back)
            print("\n".join(str(path) for path in found) or "nothing to remove")
            return Exit.OK
        from runtime_server import serving  # a second of imports, which sweeping has no use for

        return serving.main(options)
    except (ContractError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return Exit.SOFTWARE


if __name__ == "__main__":
    sys.exit(main())
