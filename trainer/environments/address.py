"""Where the run's sandbox server is, and the key to it.

What it is
    `find_server` reads the environment variables first (a server that was given on the command line),
    then the run directory, where the runtime job publishes address and key. It is cheap and is asked
    before every sandbox, because a server that was requeued comes back at another address. A run with
    several servers is one address for all of them: its directory.

What it does not do
    It does not ask the server anything, and it never prints the key.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.contract import Env, ReadyFlag, RunDirectory
from trainer.errors import Lost, Refused


@dataclass(frozen=True)
class Address:
    """A server and its key, or the directory of a run with several servers, whose addresses and key are read
    from there again and again. The key is left out of the representation."""

    url: str
    key: str = field(repr=False)
    fleet: Path | None = None


def find_server(run: RunDirectory | None, environ: Mapping[str, str] | None = None) -> Address:
    """The server to use now. Raises Lost when none is published (yet), Refused when nobody could know."""
    given = os.environ if environ is None else environ
    key = _given_key(given)
    if url := given.get(Env.RUNTIME_URL, ""):
        if not (key := key or (run.read_text(run.runtime_api_key) if run else "")):
            raise Refused(f"{Env.RUNTIME_URL} is set but no key: set {Env.RUNTIME_API_KEY_FILE} too")
        return Address(url, key)
    if run is None:
        raise Refused(f"no runtime server is known: set {Env.RUNTIME_URL}, or give a run directory")
    return _published(run, key)


def _published(run: RunDirectory, key: str) -> Address:
    """What the run directory says. A server publishes address, key and flag in this order, so the flag
    is read first: when it names another address, a new server is just about to publish itself."""
    flag = run.read(run.ready_flag, ReadyFlag)
    url, key = run.read_text(run.runtime_url), key or run.read_text(run.runtime_api_key)
    if flag is None or not key or flag.url != url:
        raise Lost("no runtime server is ready: it is starting, or coming back at another address")
    if any(record.attempt >= flag.attempt for record in run.read_servers()):
        return Address(f"the servers of {run.run_id}", "", run.root)
    return Address(url, key)


def _given_key(environ: Mapping[str, str]) -> str:
    if key := environ.get(Env.RUNTIME_API_KEY, ""):
        return key
    path = environ.get(Env.RUNTIME_API_KEY_FILE, "")
    return Path(path).read_text().strip() if path else ""
