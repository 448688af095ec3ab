"""Looks at a runtime server that already runs, before a training job is sent to it.

How to use it
    found = check_runtime("http://node7:8123", key)     # raises RuntimeUnusable with what to do
    publish_runtime(run, found)                         # url, key (0600) and ready flag, in this order

What it does not do
    It starts no server and holds no connection. The key travels in a header, never in a URL or argv.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from orchestrator.contract import Env, ReadyFlag, RunDirectory
from orchestrator.errors import RuntimeUnusable

HEADER = "X-API-Key"


@dataclass(frozen=True)
class Attached:
    """A server that answered to the key."""

    url: str
    key: str
    run_id: str
    attempt: int
    nonce: str


def read_key(key_file: Path | None, environ: Mapping[str, str] | None = None) -> str:
    """The key from a file, else from ORCHESTRATE_RUNTIME_API_KEY (or a file named by …_KEY_FILE).

    Raises RuntimeUnusable when there is none.
    """
    environ = os.environ if environ is None else environ
    named = key_file or (Path(p) if (p := environ.get(Env.RUNTIME_API_KEY_FILE)) else None)
    if named is not None:
        try:
            key = named.expanduser().read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise RuntimeUnusable(f"the key file {named} cannot be read: {_why(error)}") from error
    else:
        key = environ.get(Env.RUNTIME_API_KEY, "").strip()
    if not key:
        where = f"{named} is empty" if named else "no key of the runtime server was given"
        raise RuntimeUnusable(f"{where}; use --runtime-api-key-file FILE, or set {Env.RUNTIME_API_KEY}")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise RuntimeUnusable("the key of the runtime server must be one line of printable ASCII")
    return key


def check_runtime(url: str, key: str, timeout_s: float = 10.0) -> Attached:
    """Ask the server who it is. Raises RuntimeUnusable, which says what is wrong with what."""
    url = _checked(url)
    health = _ask(url, key, timeout_s)
    if health.get("status") != "ok":
        raise RuntimeUnusable(f"{url} is {health.get('status', 'no runtime server')}; start another server")
    nonce = health.get("nonce")
    if not isinstance(nonce, str) or not nonce:
        # without the key a server says only that it is alive
        raise RuntimeUnusable(_wrong_key(url))
    return Attached(url, key, str(health.get("run_id", "")), int(health.get("attempt") or 0), nonce)


def publish_runtime(run: RunDirectory, found: Attached) -> None:
    """What a runtime job of this run would have published: the key, the URL, then the flag."""
    flag = ReadyFlag(
        run_id=found.run_id,
        attempt=found.attempt,
        job_id="",
        nonce=found.nonce,
        host=urlsplit(found.url).hostname or "",
        pid=0,
        url=found.url,
    )
    run.publish(run.runtime_api_key, found.key, 0o600)
    run.publish(run.runtime_url, found.url)
    run.publish(run.ready_flag, flag)


def _checked(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise RuntimeUnusable(f"{url!r} is no address of a server; write http://HOST:PORT")
    if parts.username or parts.password or parts.query:
        raise RuntimeUnusable("the URL must hold no key or password; use --runtime-api-key-file FILE")
    return url.rstrip("/")


def _ask(url: str, key: str, timeout_s: float) -> dict[str, Any]:
    import httpx

    try:
        # cluster nodes are not behind the proxy that a login shell may name
        answer = httpx.get(f"{url}/health", headers={HEADER: key}, timeout=timeout_s, trust_env=False)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise RuntimeUnusable(
            f"no runtime server answers at {url} ({_why(error)}); check that it runs, that this machine "
            f"can reach it, and that runtime.host lets others in"
        ) from error
    if answer.status_code in (401, 403):
        raise RuntimeUnusable(_wrong_key(url))
    try:
        found = answer.json()
    except ValueError:
        found = None
    if answer.status_code != 200 or not isinstance(found, dict):
        raise RuntimeUnusable(
            f"{url}/health answered {answer.status_code} and not as a runtime server does; is the port right?"
        )
    return found


def _wrong_key(url: str) -> str:
    return (
        f"{url} runs, but does not accept the key; the key of a server is in runtime_api_key.txt of its "
        f"run directory: use --runtime-api-key-file FILE"
    )


def _why(error: Exception) -> str:
    return str(error) or type(error).__name__
