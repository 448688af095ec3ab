"""Image names, build contexts that nobody builds, aliases that outlive the server."""

from __future__ import annotations

import base64
import io
import tarfile
from pathlib import Path

import pytest

from runtime_server.dialects.images import (
    Aliases,
    Base,
    NotBuildable,
    base_of,
    dockerfile_of,
    full_name,
)


def context(files: dict[str, bytes]) -> io.BytesIO:
    """As the client makes it: base64 text of a gzip tar."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return io.BytesIO(base64.b64encode(packed.getvalue()))


@pytest.mark.parametrize(
    ("short", "full"),
    [
        ("python:3.12", "docker.io/library/python:3.12"),
        ("xingyaoww/sweb.eval:1", "docker.io/xingyaoww/sweb.eval:1"),
        ("docker.io/a/b", "docker.io/a/b"),
        ("localhost/orchestrate/sandbox:latest", "localhost/orchestrate/sandbox:latest"),
        ("registry:5000/x", "registry:5000/x"),
        ("docker://quay.io/a/b:c", "quay.io/a/b:c"),
    ],
)
def test_short_names_are_written_out(short: str, full: str) -> None:
    assert full_name(short) == full


def test_only_the_dockerfile_is_read() -> None:
    files = {"./code/x.py": b"x" * 300_000, "./Dockerfile": b"FROM python:3.12\nRUN make\n", "./z": b""}
    assert dockerfile_of(context(files)) == "FROM python:3.12\nRUN make\n"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"no base64 !", "no base64 text"),
        (base64.b64encode(b"no gzip"), "no base64 text"),
        (context({"./other": b"x"}).getvalue(), "no Dockerfile"),
        (context({"./Dockerfile": b"x" * 2_000_000}).getvalue(), "larger than"),
        (context({"./a": bytes(range(256)) * 9}).getvalue()[:200], "too early|no base64"),
        (b"", "too early|no base64"),
    ],
)
def test_a_context_that_makes_no_sense_is_refused_with_a_reason(data: bytes, said: str) -> None:
    with pytest.raises(NotBuildable, match=said):
        dockerfile_of(io.BytesIO(data))


def test_a_context_that_unpacks_without_end_is_refused() -> None:
    bomb = context({f"./{n}": b"\0" * (1 << 20) for n in range(9)})
    with pytest.raises(NotBuildable, match="larger than 8 MiB"):
        dockerfile_of(bomb, 8 << 20)


@pytest.mark.parametrize(
    ("dockerfile", "base"),
    [
        ("FROM a/b:1\nRUN x", Base("a/b:1")),
        ("# c\nfrom --platform=linux/amd64 a AS base\nFROM b", Base("a")),
        ('ARG TAG="3.12"\nARG X\nFROM python:${TAG}\n', Base("python:3.12")),
        (
            "FROM a\nRUN server\n# Install extra dependencies if specified (as openhands user)\n\n"
            "USER openhands\n"
            "RUN pip install x && \\\n    pip install y\n\n# Set up\nUSER root\nRUN z",
            Base("a", "pip install x && \\\n    pip install y"),
        ),
        ("FROM a\n# Install extra dependencies if specified\nRUN pip install x ", Base("a", "pip install x")),
        ("FROM a\n# Install extra dependencies if specified\n", Base("a")),
        (
            "FROM a\n# Install extra dependencies if specified (as x)\n\n\n# Set up\nUSER root\nRUN z",
            Base("a"),
        ),
    ],
)
def test_the_first_image_and_the_users_own_line_are_found(dockerfile: str, base: Base) -> None:
    assert base_of(dockerfile) == base


@pytest.mark.parametrize("dockerfile", ["RUN x", "FROM ${UNKNOWN}", ""])
def test_a_dockerfile_without_an_image_is_refused(dockerfile: str) -> None:
    with pytest.raises(NotBuildable):
        base_of(dockerfile)


def test_aliases_stand_for_aliases_and_survive(tmp_path: Path) -> None:
    path = tmp_path / "aliases.jsonl"
    first = Aliases(path)
    first.add(["r/lock", "r/hash"], Base("python:3.12", "one"))
    first.add(["r/next"], Base("r/lock", "two"))
    with path.open("a") as file:
        file.write('{"name": "cut')
    again = Aliases(path)
    assert "r/next" in again and again.resolve("r/next") == ("python:3.12", ["one", "two"])
    assert again.resolve("other") == ("other", [])
    again.add(["loop"], Base("loop"))
    assert again.resolve("loop")[0] == "loop"
