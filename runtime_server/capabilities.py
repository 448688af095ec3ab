"""What a server says about itself: its engine, what is enforced here, limits, what can be asked of it.

What it does not do
    It finds nothing out: the engine did, when it started.
"""

from __future__ import annotations

from orchestrator.schema import Runtime
from runtime_server import wire
from runtime_server.engines import Engine

FEATURES = ("exec", "files", "idempotent-create", "queue", "groups", "renew", "pause", "prefetch")


async def capabilities(config: Runtime, engine: Engine, version: str) -> wire.Capabilities:
    facts, limits = engine.facts, config.sandbox
    return wire.Capabilities(
        version=version,
        engine=facts.engine,
        oci_runtime=facts.oci_runtime,
        storage_driver=facts.storage_driver,
        cgroup_version=facts.cgroup_version,
        rootless=facts.rootless,
        enforced=dict(facts.enforced),
        max_sandboxes=config.max_parallel_sandboxes,
        default_image=limits.image,
        images=await engine.images(),
        limits={
            "cpus": limits.cpus,
            "memory_mb": limits.memory,
            "pids": limits.pids,
            "shm_mb": limits.shm,
            "disk_mb": limits.disk,
            "ttl_s": limits.ttl,
            "command_timeout_s": limits.command_timeout,
            "max_output": limits.max_output,
        },
        features=[
            *FEATURES,
            *(("snapshot", "fork", "warm") if facts.dresses else ()),
            *(("egress-allowlist",) if facts.enforced.get("network_isolation") else ()),
        ],
        notes=[*facts.notes],
    )
