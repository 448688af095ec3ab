"""Paths, links, archives: up into a sandbox and down from it. Nothing is ever read or written on the host."""

from __future__ import annotations

import asyncio
import io
import stat
import tarfile
import tempfile
import zipfile
from pathlib import Path

import httpx
import pytest

from runtime_server.errors import SandboxError
from runtime_server.wire import CreateSandbox

from .kit import Field, attempt

pytestmark = [pytest.mark.escape, pytest.mark.container]

INSIDE = "files are opened by the agent, inside the sandbox"


def _tar(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for member, data in members:
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return out.getvalue()


def _member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.mode = kind, link, 0o777
    return member


async def _up(field: Field, data: bytes, path: str = "/up") -> httpx.Response:
    async with field.http() as http:
        return await http.put(f"/v1/sandboxes/{field.bad.id}/archive", params={"path": path}, content=data)


async def _down(field: Field, path: str) -> bytes:
    async with field.http() as http:
        return (await http.get(f"/v1/sandboxes/{field.bad.id}/archive", params={"path": path})).content


def _marker() -> Path:
    """A file of the host that a sandbox must neither read nor change."""
    with tempfile.NamedTemporaryFile("w", prefix="orc-host-", suffix=".txt", delete=False) as file:
        file.write("of the host")
    return Path(file.name)


@attempt("paths of the host", "GET and PUT of ../../.., absolute paths, links to them", INSIDE)
async def test_paths(field: Field) -> str:
    marker = _marker()
    try:
        await field.says(f"ln -s {marker} /tmp/link; ln -s / /tmp/root; ln -s /proc/1/root/etc /tmp/agent")
        for path in (
            str(marker),
            f"../../../../..{marker}",
            "/tmp/link",
            f"/tmp/root{marker}",
            f"/proc/1/root{marker}",
        ):
            with pytest.raises(SandboxError):
                await field.bad.read_file(path)
        for path in (str(marker), f"../../../../..{marker}", "/tmp/link", "/tmp/agent/passwd"):
            try:
                await field.bad.write_file(path, b"owned")
            except SandboxError:
                continue
        assert marker.read_text() == "of the host"
    finally:
        marker.unlink()
    return "the sandbox's own files, or none"


@attempt(
    "tar slip up",
    "a tar with .., absolute names, links out, and files written through links",
    "refused by the agent",
)
async def test_tar_slip_up(field: Field) -> str:
    evil = {
        "..": [(_member("../escaped"), b"x")],
        "absolute": [(_member("/escaped"), b"x")],
        "link out": [(_member("a", tarfile.SYMTYPE, "../../.."), b"")],
        "absolute link": [(_member("a", tarfile.SYMTYPE, "/etc"), b"")],
        "through a link": [(_member("a", tarfile.SYMTYPE, "/"), b""), (_member("a/escaped"), b"x")],
        "hard link": [(_member("a", tarfile.LNKTYPE, "/etc/passwd"), b"")],
        "dots inside": [(_member("a/../../escaped"), b"x")],
    }
    answers = {}
    for number, (name, members) in enumerate(evil.items()):
        answers[name] = (await _up(field, _tar(*members), f"/up{number}")).status_code
    assert all(400 <= code < 500 for code in answers.values()), answers
    assert await field.says("ls /escaped /up*/../escaped 2>&1 | grep -c -v 'No such'") == "0"
    return f"{len(answers)} archives, all {' '.join(str(code) for code in sorted(set(answers.values())))}"


@attempt(
    "tar slip through what is there",
    "a link prepared in the sandbox, then an archive written over it",
    "never through a link",
)
async def test_tar_through(field: Field) -> str:
    await field.says("mkdir -p /up /etc/kept; ln -s /etc/kept /up/a; ln -s /etc/passwd /up/f")
    before = await field.says("md5sum /etc/passwd")
    await _up(field, _tar((_member("a/escaped"), b"x")))
    await _up(field, _tar((_member("f"), b"owned")))
    assert await field.says("ls /etc/kept") == "" and await field.says("md5sum /etc/passwd") == before
    return "the links were not followed"


@attempt(
    "devices in an archive", "FIFO, character and block device, socket, up and down", "left out, or refused"
)
async def test_devices(field: Field) -> str:
    kinds = (tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE)
    codes = [
        (await _up(field, _tar((_member("x", kind), b"")), f"/d{n}")).status_code
        for n, kind in enumerate(kinds)
    ]
    assert all(400 <= code < 500 for code in codes), codes
    await field.says(
        "mkdir /dev-tree; mkfifo /dev-tree/fifo; echo x >/dev-tree/file; ln -s /etc/passwd /dev-tree/out"
    )
    with tarfile.open(fileobj=io.BytesIO(await asyncio.wait_for(_down(field, "/dev-tree"), 30))) as tar:
        kinds_down = {member.name.lstrip("./"): member.type for member in tar if member.name.strip("./")}
    assert (
        set(kinds_down.values()) <= {tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE}
        and "fifo" not in kinds_down
    )
    assert "out" not in kinds_down, kinds_down
    return f"up: {codes[0]}; down: left out"


@attempt(
    "archive bomb",
    "a member that claims 1 TiB, 200,000 members, names of 4 KiB",
    "limits of bytes and members",
)
async def test_bomb(field: Field) -> str:
    huge = _member("big")
    huge.size = 1 << 40
    claims = await _up(field, huge.tobuf(tarfile.GNU_FORMAT) + b"\0" * 4096)
    one = _member("n")
    many = b"".join(_renamed(one, number) for number in range(200_000))
    crowd = await _up(field, many + b"\0" * 1024, "/many")
    names = await _up(field, _tar(*((_member("d/" * 3000 + "x"), b"") for _ in range(3))), "/deep")
    codes = [claims.status_code, crowd.status_code, names.status_code]
    assert 400 <= codes[0] < 500 and codes[1] != 500 and codes[2] != 500, codes
    await field.others_answer()
    return f"{codes}; {await field.lives()}"


def _renamed(member: tarfile.TarInfo, number: int) -> bytes:
    member.name = f"n{number}"
    return member.tobuf(tarfile.USTAR_FORMAT)


@attempt(
    "zip slip",
    "a zip with .., absolute names and links, through SWE-ReX's upload",
    "unpacked inside, names checked",
)
async def test_zip_slip(field: Field) -> str:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        file.writestr("../../../../escaped", "x")
        file.writestr("/escaped", "x")
        link = zipfile.ZipInfo("a")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        file.writestr(link, "/etc")
        file.writestr("a/escaped", "x")
    async with field.http() as http:
        made = (
            await http.post(
                "/v1/sandboxes", json=CreateSandbox(session_key=True).model_dump(exclude_none=True)
            )
        ).json()
        headers = {"X-API-Key": made["session_key"]}
        code = (
            await http.post(
                f"/sandbox/{made['id']}/swerex/upload",
                files={"file": ("a.zip", out.getvalue())},
                data={"target_path": "/unzipped/a", "unzip": "true"},
                headers=headers,
            )
        ).status_code
        look = {"command": "ls /escaped /etc/escaped /unzipped/../escaped 2>/dev/null | wc -l"}
        said = (
            (await http.post(f"/v1/sandboxes/{made['id']}/exec", json=look)).json()["stdout"]["data"].strip()
        )
        await http.delete(f"/v1/sandboxes/{made['id']}")
    assert not Path("/escaped").exists() and said == "0", (code, said)
    return f"{code}; nothing beside the target"


@attempt(
    "reading what never ends",
    "FIFO, /dev/zero, /dev/tty, /proc/kmsg, a directory, a file that grows",
    "regular files only, to their size",
)
async def test_endless(field: Field) -> str:
    await field.says(
        "mkfifo /tmp/fifo; (while :; do head -c 1000000 /dev/zero; done >/tmp/grows) >/dev/null 2>&1 & echo"
    )
    codes = []
    for path in ("/tmp/fifo", "/dev/zero", "/dev/tty", "/proc/kmsg", "/tmp", "/dev/shm", "/proc/1/mem"):
        with pytest.raises(SandboxError) as refused:
            await asyncio.wait_for(field.bad.read_file(path), 30)
        codes.append(str(refused.value.code))
    grows: bytes | SandboxError
    try:
        grows = await asyncio.wait_for(field.bad.read_file("/tmp/grows"), 60)
    except SandboxError as error:
        grows = error
    await field.bad.kill()
    await field.says("rm -f /tmp/grows")
    assert isinstance(grows, SandboxError) or len(grows) <= 256 << 20
    return f"{' '.join(sorted(set(codes)))}; the growing file: {'refused' if isinstance(grows, SandboxError) else 'as it was'}"


@attempt(
    "names that mislead",
    "terminal codes in file names, labels, arguments, environment; what logs and answers say",
    "JSON escapes them; logs hold no data of a sandbox",
)
async def test_terminal_codes(field: Field) -> str:
    evil = "\x1b]0;owned\x07\x1b[2J\x1b[31m\r\nX-Injected: 1"
    async with field.http() as http:
        made = await http.post("/v1/sandboxes", json={"labels": {evil: evil}, "env": {"A": evil}})
        identity = made.json()["id"]
        listed = await http.get("/v1/sandboxes")
        one = await http.get(f"/v1/sandboxes/{identity}/files", params={"path": f"/{evil}"})
        ran = await http.post(
            f"/v1/sandboxes/{identity}/exec", json={"command": ["echo", evil], "cwd": f"/{evil}"}
        )
        metrics = await http.get("/metrics")
        await http.delete(f"/v1/sandboxes/{identity}")
    for response in (made, listed, one, ran, metrics):
        assert b"\x1b" not in response.content and "x-injected" not in response.headers, response.content[
            :300
        ]
    return "escaped in every answer"
