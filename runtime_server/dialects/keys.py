"""Session keys: one for each sandbox, 256 bits, kept only as their SHA-256.

What it is
    A key opens its own sandbox and nothing else; the server's key opens none. Keys are made from a secret
    that lives as long as the server, so that a client that comes back is told its key again although only
    the digest is kept.

What it does not do
    No key is ever logged, given to a sandbox, or sent on.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from orchestrator.contract import publish_bytes

SESSION_HEADER = "X-Session-API-Key"


def digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


KEY_MIN = 16
NAMES = ("SANDBOX_API_KEY", "ALLHANDS_API_KEY", "OPENHANDS_API_KEY")
"""Under which clients look for the server's own key, so a server that stands alone takes it from there."""


def given(environ: Mapping[str, str] = os.environ) -> str:
    """The server's key as its user has set it, "" for none."""
    return next((environ[name].strip() for name in NAMES if environ.get(name, "").strip()), "")


def _secret(kept: Path | None) -> bytes:
    if kept is not None and kept.exists() and len(found := kept.read_bytes()) == 32:
        return found
    made = secrets.token_bytes(32)
    if kept is not None:
        publish_bytes(kept, made, 0o600)
    return made


class Keys:
    """Makes keys and knows whom they open. A runtime that is forgotten has none."""

    def __init__(self, kept: Path | None = None) -> None:
        """`kept`: a private file, in which a later server finds what keys are made from."""
        self._secret = _secret(kept)
        self._digests: dict[str, bytes] = {}
        self._owners: dict[bytes, str] = {}

    def make(self, runtime: str) -> str:
        """The key of a runtime; the same one each time."""
        key = hmac.new(self._secret, runtime.encode(), hashlib.sha256).hexdigest()
        if runtime not in self._digests:
            self.keep(runtime, digest(key))
        return key

    def keep(self, runtime: str, known: bytes) -> None:
        self._digests[runtime] = known
        self._owners[known] = runtime

    def forget(self, runtime: str) -> None:
        if (known := self._digests.pop(runtime, None)) is not None:
            self._owners.pop(known, None)

    def opens(self, runtime: str, key: str | None) -> bool:
        """In constant time; False for a runtime that has no key (any more)."""
        known = self._digests.get(runtime, b"\0" * 32)
        return hmac.compare_digest(digest(key or ""), known) and runtime in self._digests

    def owner(self, key: str | None) -> str:
        """The runtime that a key opens, "" for none. Found by digest: nothing of the key shows in time."""
        found = self._owners.get(digest(key or ""), "")
        return found if found and self.opens(found, key) else ""
