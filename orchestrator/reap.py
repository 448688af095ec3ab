"""Finds and removes what killed nodes and killed launchers left: jobs, processes, records, sandboxes.

What it is
    `look` lists, `remove` acts. Jobs are found by the label that they carry (the token in a job's comment),
    processes by the variables in their environment, sandboxes by the owner's record in their directory
    (`python -m runtime_server --sweep`). `verdict` decides about a job, and is pure.

How to use it
    found = look(runs_dir, None); remove(found)

What it does not do
    Nothing is ever found by the name of a process. What may be alive, or what nobody can see, is kept, with
    the reason said. It sees the processes and sandboxes of this node only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator import runs
from orchestrator.contract import (
    MISSED_BEATS,
    CompleteFlag,
    Env,
    Manifest,
    Outcome,
    Role,
    RunDirectory,
    wait_for,
)
from orchestrator.errors import OrchestrateError
from orchestrator.identity import Process
from orchestrator.processes import end_all, labels
from orchestrator.schedulers import (
    OVER,
    QUEUED,
    JobInfo,
    JobState,
    OwnJob,
    Scheduler,
    SchedulerError,
    open_scheduler,
)
from orchestrator.schedulers.local import LocalScheduler
from orchestrator.why_facts import watch

LAUNCHING_S = 600.0
"""A launcher on another host that has not submitted the second job after so long is dead."""
_SWEEP_S, _END_S, _GRACE_S = 120.0, 60.0, 10.0
_PACKAGES = Path(__file__).absolute().parents[1]


@dataclass(frozen=True)
class Leftover:
    """Something that was left. kind: job, process, record (of the local scheduler), sandboxes."""

    kind: str
    what: str
    why: str
    run_dir: str = ""
    job_id: str = ""
    role: str = ""
    scheduler: str = ""
    pids: tuple[int, ...] = ()

    @property
    def key(self) -> tuple[str, str, str]:
        """The same in two looks, though processes of a job have ended between them."""
        return self.kind, self.job_id or self.what, self.run_dir


@dataclass
class Found:
    """What was seen: `leftovers` would be removed, `kept` will not, each with its reason; `unseen` is
    where nobody could look."""

    leftovers: list[Leftover] = field(default_factory=list)
    kept: list[Leftover] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Sight:
    """What is known about the run of one live job."""

    own: OwnJob
    directory: bool | None = True
    """Whether the run directory is there; None when that cannot be told from here."""
    mode: str = "run"
    complete: str = ""
    """The outcome in the run's complete flag, "" when it has none."""
    peer_over: str = ""
    """Why the other job will never come (again); "" while it may."""
    still_s: float = 0.0
    """How long the job's heartbeat was watched without a change."""
    beat_s: float = 10.0


def verdict(sight: Sight) -> tuple[bool, str]:
    """Whether a live job is a leftover, and why (not)."""
    state = sight.own.info.state
    over = f"its run is over ({sight.complete})" if sight.complete else sight.peer_over
    if state == JobState.UNKNOWN:
        return False, sight.own.info.reason or "its scheduler cannot see whether it lives"
    if sight.directory is not True:
        gone = (
            "its run directory is gone" if sight.directory is False else "its run directory is not seen here"
        )
        return state in QUEUED and sight.directory is False, gone
    if not over or sight.mode == "runtime-only":
        return False, "its run goes on"
    if state in QUEUED:
        return True, over
    if sight.still_s >= MISSED_BEATS * sight.beat_s:
        return True, f"{over}, and for {sight.still_s:.0f} s it gave no sign of life"
    return False, f"{over}, but it is alive: it winds up by itself"


# --- looking -----------------------------------------------------------------------------------------


def look(runs_dir: Path, only: RunDirectory | None, watch_s: float | None = None) -> Found:
    """Everything that was left, of one run or of all runs of this user. Changes nothing.

    Watches heartbeats where a running job belongs to a run that is over; `watch_s` bounds it.
    """
    found = Found()
    for scheduler in _schedulers(runs_dir, only, found):
        _jobs(scheduler, only, watch_s, found)
        if isinstance(scheduler, LocalScheduler):
            found.leftovers += _records(scheduler, only)
    found.leftovers += _processes([only] if only else runs.list_runs(runs_dir), found)
    _sandboxes(found)
    return found


def _schedulers(runs_dir: Path, only: RunDirectory | None, found: Found) -> Iterator[Scheduler]:
    everyone = [only] if only else runs.list_runs(runs_dir)
    kinds = {m.scheduler for run in everyone if (m := run.read(run.manifest, Manifest)) is not None}
    folder = only.root.parent if only else runs_dir
    for kind in sorted(kinds | (set() if only else {"local"})):
        try:
            yield open_scheduler(kind, folder)
        except SchedulerError as error:
            found.unseen.append(f"jobs of the {kind} scheduler: {error}")


def _jobs(scheduler: Scheduler, only: RunDirectory | None, watch_s: float | None, found: Found) -> None:
    try:
        mine = scheduler.mine()
        wanted = [own for own in mine if only is None or own.run_id == only.run_id]
        manifests = [_manifest(own) for own in wanted]
        ids = {job_id for m in manifests if m for role in Role if (job_id := m.job_id(role))}
        infos = scheduler.query(sorted(ids - {own.info.job_id for own in mine}))
    except SchedulerError as error:
        found.unseen.append(f"jobs of the {scheduler.name} scheduler: {error}")
        return
    sights = [_sight(own, m, mine, infos) for own, m in zip(wanted, manifests, strict=True)]
    for sight in _watched(sights, watch_s):
        own = sight.own
        remove, why = verdict(sight)
        what = f"{own.role} job {own.info.job_id} ({own.info.state})"
        place = (own.run_dir, own.info.job_id, own.role, scheduler.name)
        (found.leftovers if remove else found.kept).append(Leftover("job", what, why, *place))


def _manifest(own: OwnJob) -> Manifest | None:
    run = RunDirectory(own.run_dir)
    return run.read(run.manifest, Manifest) if own.run_dir else None


def _sight(
    own: OwnJob, manifest: Manifest | None, mine: Sequence[OwnJob], infos: dict[str, JobInfo]
) -> Sight:
    run = RunDirectory(own.run_dir)
    if manifest is None:
        visible = bool(own.run_dir) and run.root.parent.is_dir() and not run.root.exists()
        return Sight(own=own, directory=False if visible else None)
    flag = run.read(run.complete_flag, CompleteFlag)
    return Sight(
        own=own,
        mode=manifest.mode,
        complete=flag.outcome if flag else "",
        peer_over=_peer_over(own, manifest, mine, infos),
        beat_s=manifest.job_settings().heartbeat_every,
    )


def _watched(sights: list[Sight], watch_s: float | None) -> list[Sight]:
    """With how long the heartbeats stood still of jobs that run although their run is over. All are watched
    at once: one after the other, each that lives would take a beat and each that is dead several."""
    seen = {
        sight.own.info.job_id: sight
        for sight in sights
        if sight.own.info.state == JobState.RUNNING and (sight.complete or sight.peer_over)
    }
    longest = max((MISSED_BEATS * sight.beat_s for sight in seen.values()), default=0.0)
    paths = {i: RunDirectory(sight.own.run_dir).heartbeat(sight.own.role) for i, sight in seen.items()}
    still = watch(paths, longest if watch_s is None else watch_s)
    return [dataclasses.replace(s, still_s=still.get(s.own.info.job_id, 0.0)) for s in sights]


def _peer_over(own: OwnJob, manifest: Manifest, mine: Sequence[OwnJob], infos: dict[str, JobInfo]) -> str:
    """Why the other job of the run will not come; "" when it lives, or may."""
    peer = Role.TRAINING if own.role == Role.RUNTIME else Role.RUNTIME
    if manifest.mode != "run" or any(j.run_id == own.run_id and j.role == peer for j in mine):
        return ""
    entries = [entry for entry in manifest.submissions if entry["role"] == peer]
    job_id = manifest.job_id(peer)
    if not job_id and (not entries or entries[-1]["state"] in ("intent", "failed")):
        return f"its {peer} job was never submitted" if _launcher_is_dead(manifest) else ""
    info = infos.get(job_id)
    if info is None or info.state not in OVER:
        return ""
    reason = info.reason or info.raw.lower()
    return f"its {peer} job {job_id} is over{f' ({reason})' if reason else ''}"


def _launcher_is_dead(manifest: Manifest) -> bool:
    """Seen dead from its own host; elsewhere it is given ten minutes."""
    with contextlib.suppress(TypeError):  # a manifest of an earlier version names no process
        if (alive := Process(**manifest.launcher).alive()) is not None:
            return not alive
    return time.time() - manifest.created_at > LAUNCHING_S


def _records(scheduler: LocalScheduler, only: RunDirectory | None) -> list[Leftover]:
    return [
        Leftover(
            *("record", f"{own.role} job {own.info.job_id} (local)", own.info.reason, own.run_dir),
            *(own.info.job_id, own.role, scheduler.name),
        )
        for own in scheduler.stale()
        if only is None or own.run_id == only.run_id
    ]


def _processes(everyone: Iterable[RunDirectory], found: Found) -> list[Leftover]:
    """Processes of this node that carry the label of a job that is over, by its scheduler's word."""
    known = {str(run.root): run for run in everyone}
    left: list[Leftover] = []
    for (root, job_id), pids in sorted(_by_job().items()):
        if root not in known:
            continue
        over, why = _job_over(known[root], job_id)
        what = f"{len(pids)} processes of job {job_id}"
        item = Leftover("process", what, why, root, job_id, pids=tuple(sorted(pids)))
        if over:
            left.append(item)
        elif over is None:
            found.kept.append(item)
    return left


def _by_job() -> dict[tuple[str, str], list[int]]:
    """{(run directory, job id): pids} of the live processes of this node that carry both labels."""
    found: dict[tuple[str, str], list[int]] = {}
    jobs = labels(Env.JOB_ID)
    for pid, root in labels(Env.RUN_DIR).items():
        if job_id := jobs.get(pid):
            found.setdefault((root, job_id), []).append(pid)
    return found


def _job_over(run: RunDirectory, job_id: str) -> tuple[bool | None, str]:
    """True when the scheduler says that the job is over, False when it lives, None when nobody knows."""
    try:
        scheduler = open_scheduler(runs.manifest_of(run).scheduler, run.root.parent)
        info = scheduler.query([job_id])[job_id]
    except OrchestrateError as error:
        return None, str(error)
    if info.state == JobState.UNKNOWN:
        return None, info.reason or "its scheduler does not answer"
    return info.state in OVER, f"their job is over ({info.reason or info.raw.lower() or info.state})"


def _sandboxes(found: Found) -> None:
    """What `--sweep` would remove: directories whose owner's record proves that the owner is dead."""
    lines, problem = _sweep("--dry-run")
    if problem:
        found.unseen.append(f"sandboxes of this node: {problem}")
    found.leftovers += [
        Leftover("sandboxes", line, "its server is dead") for line in lines if line.startswith("/")
    ]


def _sweep(*options: str) -> tuple[list[str], str]:
    """Lines that the server's own program printed, and what went wrong."""
    command = [sys.executable, "-P", "-m", "runtime_server", "--sweep", *options]
    environment = {**os.environ, "PYTHONPATH": str(_PACKAGES)}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_SWEEP_S, env=environment, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return [], str(error)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return [], last
    return done.stdout.splitlines(), ""


# --- removing ----------------------------------------------------------------------------------------


def remove(runs_dir: Path, only: RunDirectory | None, found: Found) -> list[tuple[Leftover, str]]:
    """Look once more, and remove what is a leftover in both looks. Each with "" or what went wrong."""
    again = {item.key for item in look(runs_dir, only).leftovers}
    wanted = [item for item in found.leftovers if item.key in again]
    done: list[tuple[Leftover, str]] = []
    for item in wanted:
        if item.kind != "sandboxes":
            done.append((item, _attempt(lambda item=item: _ACTIONS[item.kind](item, runs_dir))))  # type: ignore[misc]
    if any(item.kind == "sandboxes" for item in wanted):
        lines, problem = _sweep()
        swept = [item for item in wanted if item.kind == "sandboxes"]
        done += [(item, "" if item.what in lines else problem or "it stays") for item in swept]
    return done


def _attempt(action: Callable[[], None]) -> str:
    try:
        action()
    except (OrchestrateError, OSError) as error:
        return str(error)
    return ""


def _cancel(item: Leftover, runs_dir: Path) -> None:
    """Cancel a job, wait until it is over, and say so in the run's own timeline."""
    scheduler = _scheduler_of(item, runs_dir)
    scheduler.cancel([item.job_id])
    wait_for(
        lambda: scheduler.query([item.job_id])[item.job_id].state in OVER or None,
        f"the end of job {item.job_id}",
        _END_S,
    )
    run = RunDirectory(item.run_dir)
    if not run.manifest.is_file():
        return
    _note(run, item)
    if item.role == Role.TRAINING and any(state in item.what for state in QUEUED):
        run.end_unstarted(item.job_id, Outcome.CANCELLED, f"the job was reaped: {item.why}", 128 + 15)


def _end_processes(item: Leftover, runs_dir: Path) -> None:
    run = RunDirectory(item.run_dir)

    def left() -> list[int]:
        return _by_job().get((item.run_dir, item.job_id), [])

    if not end_all(left, _GRACE_S):
        raise OrchestrateError(f"processes that cannot be killed: {left()}")
    _note(run, item)


def _bury(item: Leftover, runs_dir: Path) -> None:
    scheduler = _scheduler_of(item, runs_dir)
    assert isinstance(scheduler, LocalScheduler)
    scheduler.bury(item.job_id)


_ACTIONS: dict[str, Callable[[Leftover, Path], None]] = {
    "job": _cancel,
    "process": _end_processes,
    "record": _bury,
}


def _scheduler_of(item: Leftover, runs_dir: Path) -> Scheduler:
    folder = Path(item.run_dir).parent if item.run_dir and item.scheduler == "local" else runs_dir
    return open_scheduler(item.scheduler, folder if (folder / ".local").is_dir() else runs_dir)


def _note(run: RunDirectory, item: Leftover) -> None:
    with contextlib.suppress(OSError):
        run.events_of_caller("reap").add("reaped", kind=item.kind, of=item.what, why=item.why)
