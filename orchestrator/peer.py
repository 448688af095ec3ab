"""What one job of a run knows about the other: is it ready, does it live, is it over for good.

What it is
    `RuntimeWatch` is the training job's eye on the runtime, `TrainingWatch` the runtime job's eye on the
    training. Each `probe()` looks at three witnesses: the other job's own record and heartbeat, the
    server's `/health`, and the scheduler. It returns None while the other may still live, or the reason
    why it is over. A scheduler that does not answer proves nothing. `ServerWatch` is the runtime job's eye on
    its own server. `Watcher` probes from a thread.

What it does not do
    It starts and stops nothing, and writes no record of a job. No proxy, no redirect: the key goes to the
    server of this run and nowhere else.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self
from urllib.parse import urlsplit

from orchestrator.command import reaping
from orchestrator.contract import (
    MISSED_BEATS,
    CompleteFlag,
    JobStatus,
    Outcome,
    Pulse,
    ReadyFlag,
    Role,
    RunDirectory,
    ServerRecord,
    Settings,
)
from orchestrator.schedulers import OVER, QUEUED, JobInfo, JobState, Scheduler, SchedulerError

API_KEY_HEADER = "X-API-Key"
HEALTH_TIMEOUT_S = 3.0
QUESTIONS = 3  # so many must stay unanswered: a job that was suspended for a while is no verdict


# --- the server --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Health:
    """An answer of `/health`, or why there was none. `problem` is "" when the server is fine."""

    problem: str = ""
    run_id: str = ""
    nonce: str = ""
    refused: bool = False  # the key is wrong: waiting will not help
    silent: bool = False  # nobody answered at all


def ask_health(url: str, key: str, timeout_s: float = HEALTH_TIMEOUT_S) -> Health:
    """`GET url/health` with the key. Never raises for what a server or network can do."""
    try:
        parts = urlsplit(url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.hostname or "", parts.port, timeout=timeout_s)
    except ValueError as error:
        return Health(f"{url!r} is no address: {error}")
    try:
        connection.request("GET", parts.path.rstrip("/") + "/health", headers={API_KEY_HEADER: key})
        answer = connection.getresponse()
        return _judge(url, answer.status, answer.read(65536))
    except (OSError, http.client.HTTPException, ValueError) as error:
        return Health(f"{url} does not answer ({error or type(error).__name__})", silent=True)
    finally:
        connection.close()


def _judge(url: str, code: int, body: bytes) -> Health:
    if code in (401, 403):
        return Health(f"{url} refused the API key", refused=True)
    if code != 200:
        return Health(f"{url}/health answered {code}")
    try:
        data = json.loads(body)
        status, run_id, nonce = (str(data.get(name, "")) for name in ("status", "run_id", "nonce"))
    except (ValueError, AttributeError):
        return Health(f"{url}/health is not the health of a sandbox server")
    if not nonce:  # without a valid key only the status is said
        return Health(f"{url} refused the API key", refused=True)
    return Health("" if status == "ok" else f"{url} is {status}", run_id, nonce)


def runtime_health(run: RunDirectory, mode: str, timeout_s: float = HEALTH_TIMEOUT_S) -> Health:
    """The health of this run's present server: the files say where, `/health` says whether it is the one."""
    url, key = run.read_text(run.runtime_url), run.read_text(run.runtime_api_key)
    if mode == "runtime-url":
        return ask_health(url, key, timeout_s) if url else Health("the run has no runtime_url.txt")
    flag = run.read(run.ready_flag, ReadyFlag)
    if flag is None or flag.run_id != run.run_id:
        return Health("the runtime has not said that it is ready")
    if flag.attempt < run.latest_attempt(Role.RUNTIME):
        return Health("the runtime is starting again")
    health = _ask_as(run, flag.url, flag.nonce, key, timeout_s)
    others = [r for r in run.read_servers() if r.nonce != flag.nonce and r.attempt >= flag.attempt]
    if not health.problem or not others:
        return health
    with ThreadPoolExecutor(min(len(others), 16)) as pool:  # of a fleet any one that answers is enough
        answers = pool.map(lambda r: _ask_as(run, r.url, r.nonce, key, timeout_s), others)
    return next((answer for answer in answers if not answer.problem), health)


def server_health(run: RunDirectory, record: ServerRecord, timeout_s: float = HEALTH_TIMEOUT_S) -> Health:
    """The health of one server of a fleet: its record says where, `/health` says whether it is the one."""
    return _ask_as(run, record.url, record.nonce, run.read_text(run.runtime_api_key), timeout_s)


def _ask_as(run: RunDirectory, url: str, nonce: str, key: str, timeout_s: float) -> Health:
    health = ask_health(url, key, timeout_s)
    if not health.problem and (health.run_id, health.nonce) != (run.run_id, nonce):
        return Health(f"another server answers at {url}")
    return health


# --- the two watches ---------------------------------------------------------------------------------


class Peer:
    """The other job as its record, its heartbeat and the scheduler show it."""

    def __init__(
        self, run: RunDirectory, role: Role, settings: Settings, scheduler: Scheduler | None
    ) -> None:
        self.run, self.role, self.settings, self.scheduler = run, role, settings, scheduler
        self.pulse = Pulse(run.heartbeat(role))
        default = 1.0 if scheduler is not None and scheduler.name == "local" else 15.0
        self.query_every = settings.query_every or default
        self._asked = 0.0
        self._info: JobInfo | None = None

    @property
    def job_id(self) -> str:
        """From the journals as they are now: the launcher may still be submitting, a successor be new."""
        manifest = self.run.read_manifest()
        return manifest.job_id(self.role) if manifest else ""

    def status(self) -> JobStatus | None:
        """The record of its latest attempt; None when that attempt, or a successor, has yet to write one."""
        status = self.run.read(self.run.status(self.role), JobStatus)
        if status is None or status.attempt < self.run.latest_attempt(self.role):
            return None
        return None if status.job_id.partition("_")[0] in self._earlier_ids() else status

    def _earlier_ids(self) -> set[str]:
        """Ids of the role's jobs that have a successor."""
        manifest = self.run.read_manifest()
        mine = [s["job_id"] for s in manifest.submissions if s["role"] == self.role] if manifest else []
        return {job_id for job_id in mine if job_id and job_id != self.job_id}

    def ended(self) -> str:
        """Why it is over by its own word; "" while it is not, or when it is only being requeued."""
        status = self.status()
        if status is None or status.phase != "ended" or status.outcome == Outcome.REQUEUED:
            return ""
        if status.outcome == Outcome.CANCELLED and self._lives():
            return ""  # it got TERM and could not know why; the scheduler will live it again, or end it
        return f"{status.outcome}: {status.reason}"

    def _lives(self) -> bool:
        """Whether the scheduler leaves a doubt about its end."""
        info = self.info()
        return info is not None and info.state not in OVER

    def returning(self) -> bool:
        """Whether it is known to be coming back: it said so, waits in the queue, or starts again.

        Or nobody on its node lives and the scheduler has not noticed: a dead node is called running for
        minutes (Slurm's SlurmdTimeout), then its job is requeued, or over.
        """
        if not self.run.latest_attempt(self.role):
            return False
        status = self.status()
        if status is None or status.phase == "starting" or status.outcome == Outcome.REQUEUED:
            return True
        info = self.info()
        if info is None or info.state in OVER:
            return False
        waits = info.state in QUEUED
        return waits or self.pulse.still_for() >= MISSED_BEATS * self.settings.heartbeat_every

    def info(self) -> JobInfo | None:
        """The scheduler's word, at most `query_every` seconds old; None without a scheduler or a job id."""
        job_id = self.job_id
        if self.scheduler is None or not job_id:
            return None
        now = time.monotonic()
        if self._info is None or self._info.job_id != job_id or now - self._asked >= self.query_every:
            self._asked = now
            with contextlib.suppress(SchedulerError), reaping:
                self._info = self.scheduler.query([job_id]).get(job_id)
        return self._info

    def dead(self) -> str:
        """Why the scheduler and the heartbeat, both, show it dead; "" while either leaves a doubt."""
        info, still = self.info(), self.pulse.still_for()
        if info is None or info.state not in OVER:
            return ""
        known = info.state == JobState.ENDED and not self.run.latest_attempt(self.role)
        beats = 0.0 if known else MISSED_BEATS if info.state == JobState.ENDED else 9.0
        if still < beats * self.settings.heartbeat_every:
            return ""
        why = info.reason or info.raw.lower() or "no longer known to the scheduler"
        return f"its job {info.job_id} is over ({why})"


class RuntimeWatch:
    """The training job's eye on the runtime."""

    def __init__(self, peer: Peer, mode: str, revive: Callable[[str], bool] = lambda why: False) -> None:
        self.peer, self.mode, self.revive = peer, mode, revive
        self.last = Health("the runtime was not asked yet")
        # within the grace there is time for three questions: one lost packet must not end a run
        self.timeout_s = min(HEALTH_TIMEOUT_S, peer.settings.peer_grace / 3)
        self._lost_since: float | None = None

    def ready(self) -> bool | None:
        """True once the server answers as the one of this run; for `wait_for`."""
        self.last = runtime_health(self.peer.run, self.mode, self.timeout_s)
        return None if self.last.problem else True

    def gone(self) -> str | None:
        """Why the runtime will not (or no longer) serve this run; None while it may."""
        if self.mode == "runtime-url":
            return self.last.problem if self.last.refused else None
        if why := self.peer.ended():
            return f"the runtime ended ({why})"
        if why := self.last.problem and self.peer.dead():
            return f"the runtime is gone: {why}"
        return None

    def lost(self) -> str | None:
        """Why it is gone, when it cannot be brought back either."""
        why = self.gone()
        return None if why is not None and self.revive(why) else why

    def probe(self) -> str | None:
        asked = time.monotonic()
        if self.ready():
            self._lost_since = None
        elif self._lost_since is None:
            self._lost_since = asked
        why = self.gone()
        if why is None and self._lost_since is None:
            return None
        lost = time.monotonic() - (self._lost_since or asked)
        grace, more = self.peer.settings.peer_grace, self.peer.settings.failover_timeout
        if lost < grace + more and why is not None:
            return None if self.revive(why) else why
        if why is None and lost >= grace and (lost >= grace + more or not self.peer.returning()):
            return f"no runtime for {lost:.0f} s: {self.last.problem}"
        return why


class TrainingWatch:
    """The runtime job's eye on the training; it also releases the training job once we are ready."""

    def __init__(self, peer: Peer, say: Callable[..., None]) -> None:
        self.peer, self.say = peer, say
        self.ready = threading.Event()
        self.released = peer.settings.start_policy != "release-on-ready"
        self._unsubmitted_since = time.monotonic()

    def probe(self) -> str | None:
        if self.ready.is_set() and not self.released:
            self._release()
        if self.peer.run.read(self.peer.run.complete_flag, CompleteFlag) is not None:
            return None  # the main loop sees it too, and it says more than we could
        if self.peer.scheduler is not None and not self.peer.job_id:
            waited = time.monotonic() - self._unsubmitted_since
            limit = self.peer.settings.ready_timeout
            return f"no training job was submitted within {limit:g} s" if waited >= limit else None
        why = self.peer.dead()
        if not why or self.peer.run.read(self.peer.run.complete_flag, CompleteFlag) is not None:
            return None
        return f"the training left no result: {why}"

    def _release(self) -> None:
        """Release the held job. An error is a question, not an answer: only a job still held is retried."""
        job_id = self.peer.job_id
        if self.peer.scheduler is None or not job_id:
            return
        problem = ""
        with reaping:
            try:
                self.peer.scheduler.release(job_id)
            except SchedulerError as error:
                problem = str(error)
            info = self.peer.scheduler.query([job_id]).get(job_id)
        if info is None or info.state in (JobState.HELD, JobState.UNKNOWN):
            return
        self.released = True
        self.say("released", job_id=job_id, state=info.state, problem=problem)


class ServerWatch:
    """The runtime job's eye on its own server: one that lives and does not answer must not stay.

    Stopped, deadlocked, or caught in a filesystem that hangs, it never ends by itself. It gets half of the
    grace that the training gives it; the other half is for starting the next one.
    """

    def __init__(self, peer_grace: float) -> None:
        self.patience = peer_grace / 2
        self.timeout_s = min(HEALTH_TIMEOUT_S, self.patience / QUESTIONS)
        self.url = self.key = ""
        self._unanswered: list[float] = []

    def serves(self, url: str, key: str) -> None:
        """It is ready; from now on it is asked."""
        self.key, self.url = key, url

    def probe(self) -> str | None:
        asked = time.monotonic()
        if not self.url or not ask_health(self.url, self.key, self.timeout_s).silent:
            self._unanswered = []
            return None
        self._unanswered.append(asked)
        silent = time.monotonic() - self._unanswered[0]
        if silent < self.patience or len(self._unanswered) < QUESTIONS:
            return None
        return f"the server lives but did not answer for {silent:.0f} s"


class Watcher:
    """Probes from a thread, so that a hanging server or scheduler never delays a signal."""

    def __init__(self, probe: Callable[[], str | None], every_s: float, wake: Callable[[], None]) -> None:
        self.probe, self.every_s, self.wake = probe, every_s, wake
        self.reason: str | None = None
        self.trouble = ""
        self._stop = threading.Event()
        self._hurry = threading.Event()
        self._thread = threading.Thread(target=self._run, name="peer watch", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._hurry.set()
        self._thread.join(timeout=1)

    def hurry(self) -> None:
        """Probe now."""
        self._hurry.set()

    def _run(self) -> None:
        while not self._stop.is_set() and self.reason is None:
            try:
                self.reason = self.probe()
            except (OSError, SchedulerError) as error:  # a hiccup is no verdict; the next look decides
                self.trouble = str(error)
            if self.reason is not None:
                self.wake()
                return
            self._hurry.wait(self.every_s)
            self._hurry.clear()
