"""Stealing keys, and using those of others."""

from __future__ import annotations

import asyncio
import secrets

import httpx
import pytest

from runtime_server.wire import CreateSandbox

from .kit import Field, attempt

pytestmark = [pytest.mark.escape, pytest.mark.container]


@attempt(
    "the server's key", "environment, every /proc/*/environ and cmdline, all files and mounts, memory of the agent",
    "it never enters a sandbox",
)  # fmt: skip
async def test_key(field: Field) -> str:
    code = f"""
import subprocess
needle = bytes.fromhex({field.world.server.key[:20].encode().hex()!r})
found = []
for top, folders, files in os.walk('/'):
    folders[:] = [name for name in folders if os.path.join(top, name) not in ('/proc', '/sys', '/usr')]
    for name in files:
        path = os.path.join(top, name)
        if os.path.isfile(path) and not os.path.islink(path):
            with open(path, 'rb') as file:
                found += [path] * (needle in file.read(1 << 20))
for pid in os.listdir('/proc'):
    for name in ('environ', 'cmdline', 'mountinfo'):
        try:
            with open(f'/proc/{{pid}}/{{name}}', 'rb') as file:
                found += [pid] * (needle in file.read(1 << 20))
        except OSError:
            pass
print('found' if [f for f in found if f != str(os.getpid())] else 'nothing')
"""
    # the program itself holds the half of the key that it looks for, as hexadecimal digits
    said = await field.python(code, timeout_s=60)
    assert said == "nothing", said
    return "found nowhere"


@attempt(
    "core dumps", "crash the agent's children, look for cores of anybody", "the limit of core files is 0"
)
async def test_cores(field: Field) -> str:
    said = await field.says(
        "ulimit -c; ulimit -c unlimited || echo no; sh -c 'kill -SEGV $$'; ls / /tmp | grep -c core"
    )
    assert said.startswith("0 ") and said.endswith(" 0"), said
    return "none written"


async def _keyed(field: Field) -> tuple[str, str, str]:
    async with field.http() as http:
        body = CreateSandbox(session_key=True).model_dump(exclude_none=True)
        made = (await http.post("/v1/sandboxes", json=body)).json()
    return made["id"], made["session_key"], made["swerex_url"].replace("localhost", "127.0.0.1")


async def _runs(url: str, key: str) -> int:
    async with httpx.AsyncClient(timeout=30) as http:
        body = {"command": ["true"]}
        return (await http.post(f"{url}/execute", json=body, headers={"X-API-Key": key})).status_code


@attempt(
    "the key of another sandbox", "each session key at the other's address", "keys open one sandbox each"
)
async def test_other_key(field: Field) -> str:
    one, key, url = await _keyed(field)
    two, other, other_url = await _keyed(field)
    assert await _runs(url, key) == 200 and await _runs(other_url, other) == 200
    codes = await asyncio.gather(
        _runs(url, other), _runs(other_url, key), _runs(url, ""), _runs(url, key[:-1])
    )
    assert set(codes) <= {401, 403}, codes
    for identity in (one, two):
        await field.client.delete(identity)
    return " ".join(map(str, codes))


@attempt(
    "the server's key on a sandbox's routes", "X-API-Key of the server below /sandbox/", "it opens no sandbox"
)
async def test_master_key_inside(field: Field) -> str:
    identity, _, url = await _keyed(field)
    code = await _runs(url, field.world.server.key)
    await field.client.delete(identity)
    assert code in (401, 403), code
    return str(code)


@attempt(
    "a session key on the server's routes", "list, create, delete, metrics with it", "one key opens those"
)
async def test_session_key_outside(field: Field) -> str:
    identity, key, _ = await _keyed(field)
    async with field.http(key) as http:
        codes = [
            (await http.get("/v1/sandboxes")).status_code,
            (await http.post("/v1/sandboxes", json={})).status_code,
            (await http.delete(f"/v1/sandboxes/{identity}")).status_code,
            (await http.get("/metrics")).status_code,
            (await http.get("/v1/capabilities")).status_code,
            (await http.post("/start", json={"image": "x", "session_id": "y"})).status_code,
            (await http.get("/list")).status_code,
        ]
    await field.client.delete(identity)
    assert set(codes) <= {401, 403}, codes
    return " ".join(map(str, codes))


@attempt(
    "a key after the delete", "the session key of a sandbox that is gone", "it is forgotten with the sandbox"
)
async def test_key_after_delete(field: Field) -> str:
    identity, key, url = await _keyed(field)
    await field.client.delete(identity)
    code = await _runs(url, key)
    assert code in (401, 403, 404), code
    return str(code)


@attempt(
    "forged ids",
    "ids that were guessed, cut, other people's, paths, NUL, 10,000 letters",
    "404, whatever it is",
)
async def test_forged_ids(field: Field) -> str:
    real = field.bad.id
    forged = [
        "s-00000000",
        real[:-1],
        real.upper(),
        f"{real}%00",
        f"{real}%2f..",
        "..%2f..%2fetc",
        "x" * 10_000,
        "%ff",
    ]
    async with field.http() as http:
        codes = {(await http.get(f"/v1/sandboxes/{name}")).status_code for name in forged}
        codes |= {
            (await http.post(f"/v1/sandboxes/{name}/exec", json={"command": "id"})).status_code
            for name in forged
        }
    assert codes <= {400, 404, 405, 422}, codes
    return " ".join(map(str, sorted(codes)))


@attempt(
    "guessing keys",
    "no key, an empty one, wrong ones, odd bytes, twice, in the query",
    "401, in constant time",
)
async def test_wrong_keys(field: Field) -> str:
    good = field.world.server.key
    guesses = ["", "x", good[:-1], good + "x", good.swapcase(), secrets.token_hex(16), "é" * 8, "\x7f"]
    async with field.http() as http:
        codes = set()
        for guess in guesses:
            headers = {"X-API-Key": guess.encode("utf-8")}
            codes.add((await http.get("/v1/sandboxes", headers=headers)).status_code)  # type: ignore[arg-type]
        del http.headers["X-API-Key"]
        codes.add((await http.get("/v1/sandboxes", params={"X-API-Key": good, "key": good})).status_code)
        codes.add((await http.get("/v1/sandboxes", headers={"Cookie": f"X-API-Key={good}"})).status_code)
    assert codes <= {400, 401}, codes  # 400: a byte that no header may hold
    return "401"
