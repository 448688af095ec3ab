"""Image names, and builds that need no building.

What it is
    `full_name` writes a short image name out as a container engine reads it. `base_of` finds, in the
    build context that an OpenHands client posts, the image its Dockerfile starts from; nothing else of
    that image is needed here, for the server it would install is this one. `Aliases` remembers which tag
    stands for which image, also after a restart.

What it does not do
    Nothing is built or extracted: of the archive only `./Dockerfile` is read, up to a bound.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import logging
import re
import tarfile
import threading
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

log = logging.getLogger("runtime_server")

DOCKERFILE_MAX = 1 << 20
UNPACKED_MAX = 2 << 30  # bytes read of a build context before it counts as a bomb
PREFIX = "runtime.local/oh"
_EXTRA = "# Install extra dependencies if specified"
_STEPS_MAX = 32  # aliases of aliases


class NotBuildable(Exception):
    """The build context cannot be understood; the message says why and what to do."""


def full_name(image: str) -> str:
    """`python:3.12` is `docker.io/library/python:3.12`; a name with a registry stays."""
    name = image.strip().removeprefix("docker://")
    first, slash, _ = name.partition("/")
    if slash and ("." in first or ":" in first or first == "localhost"):
        return name
    return f"docker.io/{name}" if slash else f"docker.io/library/{name}"


@dataclass(frozen=True)
class Base:
    """What a tag stands for: an image, and the command its build would have run last."""

    image: str
    setup: str = ""


# --- reading a build context --------------------------------------------------------------------------


class _Decoded(io.RawIOBase):
    """Base64 text as the bytes it stands for, without holding all of it."""

    def __init__(self, text: IO[bytes]) -> None:
        self._text, self._rest, self._ready = text, b"", b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # io wants any buffer
        while not self._ready:
            chunk = self._text.read(1 << 16)
            whole = self._rest + b"".join(chunk.split())
            cut = len(whole) - len(whole) % 4 if chunk else len(whole)
            self._ready, self._rest = base64.b64decode(whole[:cut], validate=True), whole[cut:]
            if not chunk:
                break
        part = self._ready[: len(buffer)]
        self._ready = self._ready[len(part) :]
        buffer[: len(part)] = part
        return len(part)


class _Inflated(io.RawIOBase):
    """The inside of a gzip stream, up to a bound."""

    def __init__(self, packed: io.RawIOBase, limit: int) -> None:
        self._packed, self._left, self._limit = packed, limit, limit
        self._inflate, self._fed = zlib.decompressobj(wbits=31), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # io wants any buffer
        while not self._inflate.eof:
            fed = self._fed or self._packed.read(1 << 16) or b""
            data = self._inflate.decompress(fed, len(buffer))
            self._fed = self._inflate.unconsumed_tail
            if data:
                self._left -= len(data)
                if self._left < 0:
                    raise NotBuildable(f"the build context is larger than {self._limit >> 20} MiB")
                buffer[: len(data)] = data
                return len(data)
            if not fed:
                raise NotBuildable("the build context ends too early")
        return 0


def dockerfile_of(context: IO[bytes], limit: int = UNPACKED_MAX) -> str:
    """The text of `./Dockerfile` in a base64 gzip tar. Raises NotBuildable."""
    try:
        stream = io.BufferedReader(_Inflated(_Decoded(context), limit), 1 << 16)
        with tarfile.open(fileobj=stream, mode="r|") as archive:
            for member in archive:
                if member.name.removeprefix("./") == "Dockerfile" and member.isreg():
                    if member.size > DOCKERFILE_MAX or (inside := archive.extractfile(member)) is None:
                        raise NotBuildable(f"the Dockerfile is larger than {DOCKERFILE_MAX} bytes")
                    return inside.read().decode(errors="replace")
    except (tarfile.TarError, zlib.error, binascii.Error, EOFError, OSError) as error:
        raise NotBuildable(f"the build context is no base64 text of a gzip tar: {error}") from None
    raise NotBuildable("the build context holds no Dockerfile at its top")


def base_of(dockerfile: str) -> Base:
    """The image of the first FROM, and the line that installs the user's extra dependencies, if any.

    What else the Dockerfile does makes an OpenHands server, which is not needed. Raises NotBuildable.
    """
    found = re.search(r"^\s*FROM\s+(?:--\S+\s+)*(\S+)", dockerfile, re.MULTILINE | re.IGNORECASE)
    if not found:
        raise NotBuildable("the Dockerfile has no FROM line: start it with one")
    image = _with_arguments(found[1], dockerfile[: found.start()])
    if "$" in image:
        raise NotBuildable(f"the image {image!r} of the FROM line is not known: give its ARG a default")
    return Base(image, _extra(dockerfile))


def _with_arguments(image: str, before: str) -> str:
    defaults = dict(re.findall(r"^\s*ARG\s+(\w+)=\"?([^\s\"]+)", before, re.MULTILINE | re.IGNORECASE))
    return re.sub(r"\$\{?(\w+)\}?", lambda m: defaults.get(m[1], m[0]), image)


def _extra(dockerfile: str) -> str:
    """The RUN after the comment that OpenHands' template puts before `runtime_extra_deps`."""
    _, mark, after = dockerfile.partition(_EXTRA)
    found = re.match(r"[^\n]*\n\s*(?:USER\s+\S+\s+)?RUN\s+((?:[^\n]*\\\n)*[^\n]*)", after) if mark else None
    return found[1].strip() if found else ""


# --- what stands for what ------------------------------------------------------------------------------


class Aliases:
    """Tags that stand for images. One JSON line each in `path`, appended; the newest line counts."""

    def __init__(self, path: Path | None = None) -> None:
        self.path, self._known = path, dict[str, Base]()
        self._writing = threading.Lock()
        if path is not None:
            self._load(path)

    def _load(self, path: Path) -> None:
        try:
            lines = path.read_text().splitlines()
        except OSError:
            return
        for line in lines:
            try:
                data = json.loads(line)
                self._known[str(data["name"])] = Base(str(data["image"]), str(data.get("setup", "")))
            except (ValueError, KeyError, TypeError):  # a line cut short by a crash
                continue

    def add(self, names: Iterable[str], base: Base) -> None:
        """Durable before it returns, where there is a file that can be written."""
        lines = []
        for name in names:
            self._known[name] = base
            lines.append(json.dumps({"name": name, **asdict(base)}) + "\n")
        if self.path is None:
            return
        try:
            with self._writing, self.path.open("a") as file:
                file.write("".join(lines))
        except OSError as error:
            log.warning("image aliases live only as long as this server: %s", error)

    def __contains__(self, name: str) -> bool:
        return name in self._known

    def resolve(self, name: str) -> tuple[str, list[str]]:
        """The image in the end, and the set-up commands on the way to it, the innermost first."""
        setup: list[str] = []
        for _ in range(_STEPS_MAX):
            if (base := self._known.get(name)) is None:
                break
            setup[:0] = [base.setup] if base.setup else []
            name = base.image
        return name, setup
