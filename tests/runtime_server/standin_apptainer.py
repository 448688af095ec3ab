"""Stands in for `apptainer` where none can be installed: checks its command line, then does what it says.

What it is
    `exec` with exactly the options that the engine uses (another one is an error, as it would be there), on
    an image that is a directory: namespaces, an overlay, binds and a chroot by `unshare` and `mount`, which
    needs root. `pull` copies nothing: it makes the file that was asked for.

What it does not do
    It proves nothing about Apptainer itself: neither its isolation nor what a site's configuration allows.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

FLAGS = {
    "--containall",
    "--no-home",
    "--no-init",
    "--no-eval",
    "--no-umask",
    "--net",
    "--network=none",
    "--no-privs",
}
WITH_VALUE = {"--overlay", "--bind", "--pwd"}
NEEDED = {"--containall", "--no-home", "--no-init", "--overlay"}
ENTER = """
set -e
image=$1 overlay=$2 agent=$3 io=$4; shift 4
mkdir -p "$overlay/upper" "$overlay/work" "$overlay/root"
mount -t overlay overlay -o "lowerdir=$image,upperdir=$overlay/upper,workdir=$overlay/work" "$overlay/root"
cd "$overlay/root"
mkdir -p .orchestrate/io proc dev; touch .orchestrate/agent dev/null
mount --bind "$agent" .orchestrate/agent; mount -o remount,bind,ro .orchestrate/agent
mount --bind "$io" .orchestrate/io; mount -o remount,bind,ro .orchestrate/io
mount --bind /dev/null dev/null; mount -t proc proc proc
exec chroot . "$@"
"""


def parse(words: list[str]) -> tuple[dict[str, list[str]], list[str]]:
    given: dict[str, list[str]] = {}
    while words and words[0].startswith("--"):
        name = words.pop(0)
        if name in WITH_VALUE:
            given.setdefault(name, []).append(words.pop(0))
        elif name in FLAGS:
            given.setdefault(name, [])
        else:
            sys.exit(f'Error for command "exec": unknown flag: {name}')
    return given, words


def run(words: list[str]) -> None:
    given, (image, *argv) = parse(words)
    if lacking := NEEDED - set(given):
        sys.exit(f"an agent cannot be PID 1 of a contained container without {' '.join(sorted(lacking))}")
    binds = {spec.split(":")[1]: spec.split(":") for spec in given["--bind"]}
    assert all(spec[2] == "ro" for spec in binds.values()), binds
    sources = [binds["/.orchestrate/agent"][0], binds["/.orchestrate/io"][0]]
    inside = {name[13:]: value for name, value in os.environ.items() if name.startswith("APPTAINERENV_")}
    net = ["--net"] if "--net" in given else []
    unshare = ["unshare", "--pid", "--mount", "--ipc", *net, "--fork", "--kill-child"]
    command = [*unshare, "sh", "-c", ENTER, "sh", image, *given["--overlay"], *sources, *argv]
    os.execvpe("unshare", command, {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", **inside})  # noqa: S606 - to become it is what this is for


def main() -> None:
    words = [word for word in sys.argv[1:] if word != "--quiet"]
    if words[0] == "exec":
        run(words[1:])
    elif words[:2] == ["pull", "--force"] and len(words) == 4:
        if "missing" in words[3]:
            sys.exit("FATAL: manifest unknown")
        Path(words[2]).write_text(words[3])
    else:
        sys.exit(f"unknown command {words}")


if __name__ == "__main__":
    main()
