"""Clients that do not behave: what they send, how much of it, and how slowly."""

from __future__ import annotations

import asyncio
import contextlib
from urllib.parse import urlsplit

import httpx
import pytest

from .kit import ANSWER_S, Field, attempt

pytestmark = [pytest.mark.escape, pytest.mark.container]


async def _raw(field: Field, data: bytes, more: bytes = b"", times: int = 0) -> bytes:
    """What the server says to these bytes; b"" when it only hangs up."""
    url = urlsplit(field.world.server.url)
    reader, writer = await asyncio.open_connection(url.hostname, url.port)
    try:
        with contextlib.suppress(ConnectionError):
            writer.write(data)
            await writer.drain()
            for _ in range(times):
                writer.write(more)
                await writer.drain()
        with contextlib.suppress(ConnectionError):
            return await asyncio.wait_for(reader.read(1 << 16), ANSWER_S)
        return b""
    finally:
        writer.close()


def _head(field: Field, *lines: str, request: str = "GET /v1/sandboxes HTTP/1.1") -> bytes:
    return "\r\n".join([request, "Host: x", f"X-API-Key: {field.world.server.key}", *lines]).encode()


def _status(said: bytes) -> str:
    return said.split(b" ", 2)[1].decode() if said.startswith(b"HTTP/1.1 ") else "hung up"


@attempt(
    "oversize headers",
    "one header of 1 MiB, 20,000 headers, a request line of 1 MiB, headers without end",
    "a bound of 64 KiB: 431, and the end",
)
async def test_headers(field: Field) -> str:
    big = "x" * (1 << 20)
    said = [
        _status(await _raw(field, _head(field, f"A: {big}", "", ""))),
        _status(await _raw(field, _head(field, *(f"A{n}: {n}" for n in range(20_000)), "", ""))),
        _status(await _raw(field, _head(field, "", "", request=f"GET /{big} HTTP/1.1"))),
        _status(await _raw(field, _head(field) + b"\r\nA: ", b"x" * 65536, 1600)),
    ]
    assert all(one in ("431", "400", "414", "hung up") for one in said), said
    return " ".join(said)


@attempt(
    "10,000 bytes of headers",
    "the same with a right key, and without one",
    "allowed: 64 KiB are; 401 without the key",
)
async def test_ten_thousand(field: Field) -> str:
    lines = [f"A{n}: {'x' * 90}" for n in range(100)]
    with_key = _status(await _raw(field, _head(field, *lines, "", "")))
    without = "\r\n".join(["GET /v1/sandboxes HTTP/1.1", "Host: x", *lines, "", ""]).encode()
    said = [with_key, _status(await _raw(field, without))]
    assert said == ["200", "401"], said
    return " ".join(said)


@attempt(
    "a body of 1 GB",
    "announced, and in chunks; with the key and without; JSON, file, upload",
    "413 before it is read; counted while it comes",
)
async def test_body(field: Field) -> str:
    announced = f"Content-Length: {1 << 30}"
    create = "POST /v1/sandboxes HTTP/1.1"
    without = b"POST /v1/sandboxes HTTP/1.1\r\nHost: x\r\nContent-Length: 1073741824\r\n\r\n"
    chunk = b"100000\r\n" + b" " * (1 << 20) + b"\r\n"
    chunked = _head(
        field, "Transfer-Encoding: chunked", "Content-Type: application/json", "", "", request=create
    )
    put = f"PUT /v1/sandboxes/{field.bad.id}/files?path=/big HTTP/1.1"
    said = [
        _status(await _raw(field, _head(field, announced, "", "", request=create))),
        _status(await _raw(field, without)),
        _status(await _raw(field, chunked, chunk, 100)),
        _status(await _raw(field, _head(field, announced, "", "", request=put))),
        _status(await _raw(field, _head(field, announced, "", "", request="POST /start HTTP/1.1"))),
    ]
    assert all(one in ("413", "401", "hung up") for one in said) and said[1] == "401", said
    return " ".join(said)


@attempt(
    "slow bodies and headers",
    "200 connections that send a byte now and then, and one that sends none",
    "they hold nothing; headers have a time limit",
)
async def test_slow(field: Field) -> str:
    url = urlsplit(field.world.server.url)
    body = _head(
        field,
        "Content-Length: 1000",
        "Content-Type: application/json",
        "",
        "",
        request="POST /v1/sandboxes HTTP/1.1",
    )
    held = [await asyncio.open_connection(url.hostname, url.port) for _ in range(200)]
    try:
        for number, (_, writer) in enumerate(held):
            writer.write(body if number % 2 else b"GET / HTTP/1.1\r\nA")
            await writer.drain()
        for _ in range(5):
            await field.others_answer()
            for _, writer in held:
                writer.write(b" ")
    finally:
        for _, writer in held:
            writer.close()
    return "the others are answered"


@attempt(
    "two lengths",
    "Content-Length with Transfer-Encoding, twice, negative, beyond 64 bits",
    "400: no request is understood in two ways",
)
async def test_smuggling(field: Field) -> str:
    post = "POST /v1/sandboxes HTTP/1.1"
    tail = b"0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"
    said = []
    for lines in (
        ("Content-Length: 5", "Transfer-Encoding: chunked"), ("Content-Length: 5", "Content-Length: 50"),
        ("Content-Length: -1",), ("Content-Length: 99999999999999999999999",), ("Transfer-Encoding: xchunked",),
    ):  # fmt: skip
        answer = await _raw(field, _head(field, *lines, "", "", request=post) + tail)
        assert answer.count(b"HTTP/1.1 ") <= 1, answer
        said.append(_status(answer))
    assert all(one in ("400", "413", "422", "501", "hung up") for one in said), said
    return " ".join(said)


@attempt(
    "paths of URLs",
    "/v1/../, %2e%2e, //, ;, NUL, %00, %2f, backslashes, a whole URL, to reach what needs a key",
    "routes are matched as they are; the key is asked first",
)
async def test_url_paths(field: Field) -> str:
    identity = field.bad.id
    paths = (
        "/health/../v1/sandboxes", "/health/%2e%2e/v1/sandboxes", "//v1/sandboxes", "/v1//sandboxes", "/health;/v1/sandboxes",
        "/health%00/v1/sandboxes", "/%2fv1/sandboxes", "/health\\..\\v1/sandboxes", "/health?/v1/sandboxes", "/HEALTH/../v1/sandboxes",
        "http://x/v1/sandboxes", f"/sandbox/../v1/sandboxes/{identity}", f"/sandbox/{identity}/../../v1/sandboxes",
        f"/sandbox/{identity}/swerex/..%2f..%2f..%2fv1/sandboxes", "/sandbox/%2e%2e/v1/sandboxes",
        "/api/../v1/sandboxes", "/alive/../v1/sandboxes", "/docs", "/openapi.json/../v1/sandboxes", "/.git/config", "/%5c%5cx",
    )  # fmt: skip
    said = set()
    for path in paths:
        answer = await _raw(field, f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        assert b'"created_at"' not in answer and b'"sandboxes"' not in answer, path
        said.add(_status(answer))
    assert said <= {"400", "401", "403", "404", "405", "200", "hung up"}, said
    return f"no list of sandboxes was given: {' '.join(sorted(said))}"


@attempt(
    "who asks",
    "X-Forwarded-For, X-Forwarded-Host, Forwarded, Host of another machine, Origin, method overrides",
    "no proxy is believed, none has rights",
)
async def test_forwarded(field: Field) -> str:
    headers = {
        "X-Forwarded-For": "127.0.0.1", "X-Real-IP": "127.0.0.1", "Forwarded": "for=127.0.0.1", "Origin": "http://evil",
        "X-HTTP-Method-Override": "DELETE", "X-Original-URL": "/health", "X-Rewrite-URL": "/health",
    }  # fmt: skip
    async with httpx.AsyncClient(base_url=field.world.server.url, headers=headers) as http:
        codes = {
            (await http.get("/v1/sandboxes")).status_code,
            (await http.post("/v1/sandboxes", json={})).status_code,
        }
        answer = await http.options("/v1/sandboxes")
        assert "access-control-allow-origin" not in answer.headers
    assert codes == {401}, codes
    assert (await field.client.get(field.bad.id)).state == "running"
    return "401; no CORS"


@attempt(
    "JSON that hurts",
    "100,000 brackets, numbers of 1 MB, NaN, lone surrogates, duplicate keys, wrong types",
    "400, never 500",
)
async def test_json(field: Field) -> str:
    bodies = (
        b"[" * 100_000, b'{"a":' * 50_000, b'{"ttl_s": ' + b"9" * 100_000 + b"}", b'{"ttl_s": NaN}', b'{"ttl_s": 1e999}',
        b'{"image": "\\ud800"}', b'{"env": {"A": "\\u0000"}}', b'{"env": {"A=B": "x", "": "y"}}', b'{"workdir": "/\\u0000"}',
        b"\xff\xfe", b"null", b"[]", b'{"limits": {"pids": -1}}', b'{"limits": {"memory_mb": 1e30}}',
        b'{"labels": {"a": null}}', b'{"mounts": ["/:/host"], "privileged": true}', b'{"network": {"mode": "host"}}',
    )  # fmt: skip
    codes = {}
    async with field.http() as http:
        for body in bodies:
            answer = await http.post(
                "/v1/sandboxes", content=body, headers={"Content-Type": "application/json"}
            )
            codes[body[:40]] = answer.status_code
    wrong = {body: code for body, code in codes.items() if not 400 <= code < 500}
    assert not wrong, wrong
    return " ".join(sorted({str(code) for code in codes.values()}))
