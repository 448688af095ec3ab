"""The client's calls about more than one sandbox: snapshots, forks, pauses, what is wanted next, what fits.

How to use it
    `runtime_server.client.Client` has all of these methods.

What it does not do
    It makes no single sandbox and runs nothing in one: `client.py` does.
"""

from __future__ import annotations

import builtins
from collections.abc import Mapping

from runtime_server import wire
from runtime_server.client_calls import CALL_S, Calls, once, parse
from runtime_server.errors import SandboxError
from runtime_server.wire import Code
from runtime_server.wire_lifecycle import (
    Capacity,
    Fork,
    Forked,
    Prefetch,
    Prefetched,
    Snapshot,
    SnapshotList,
    TakeSnapshot,
)

FORK_S = 900.0


class LifecycleCalls(Calls):
    """See the module's docstring."""

    async def snapshot(
        self, sandbox: str, ttl_s: float | None = None, labels: Mapping[str, str] | None = None
    ) -> Snapshot:
        """The sandbox's files as they are now; it lives on. `CreateSandbox(snapshot=…)` begins with them."""
        body = TakeSnapshot(ttl_s=ttl_s, labels=dict(labels or {}))
        path = f"/v1/sandboxes/{sandbox}/snapshot"
        got = await self._send("POST", path, body=body, headers=once(), timeout_s=FORK_S, again=True)
        return parse(got, Snapshot)

    async def snapshots(self) -> builtins.list[Snapshot]:
        return (await self._get("/v1/snapshots", SnapshotList)).snapshots

    async def get_snapshot(self, snapshot: str) -> Snapshot:
        return await self._get(f"/v1/snapshots/{snapshot}", Snapshot)

    async def delete_snapshot(self, snapshot: str) -> None:
        """Deleting what is not there (any more) is no error."""
        try:
            await self._send("DELETE", f"/v1/snapshots/{snapshot}", again=True)
        except SandboxError as error:
            if error.code != Code.SNAPSHOT_NOT_FOUND:
                raise

    async def fork(self, sandbox: str, count: int = 1, request: Fork | None = None) -> Forked:
        """So many sandboxes that begin with this one's files: all or none. Processes are not forked."""
        body = (request or Fork()).model_copy(update={"count": count})
        path = f"/v1/sandboxes/{sandbox}/fork"
        got = await self._send("POST", path, body=body, headers=once(), timeout_s=FORK_S, again=True)
        return parse(got, Forked)

    async def pause(self, sandbox: str) -> wire.Sandbox:
        """Its processes stand still; commands are refused with the code `paused`; its time counts on."""
        return parse(await self._send("POST", f"/v1/sandboxes/{sandbox}/pause", again=True), wire.Sandbox)

    async def resume(self, sandbox: str) -> wire.Sandbox:
        return parse(await self._send("POST", f"/v1/sandboxes/{sandbox}/resume", again=True), wire.Sandbox)

    async def prefetch(self, images: Mapping[str, int]) -> Prefetched:
        """What the next batch needs: how many sandboxes of each image. In place of what was said before."""
        body = Prefetch(images=dict(images))
        got = await self._send("POST", "/v1/prefetch", body=body, timeout_s=CALL_S, again=True)
        return parse(got, Prefetched)

    async def capacity(self) -> Capacity:
        return await self._get("/v1/capacity", Capacity)
