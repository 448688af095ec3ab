"""What Slurm's commands say, as data: pure functions of their text.

What it is
    Parsers of `squeue -o`, `scontrol show job -o`, `sacct -P` and of sbatch's answers, and the table of
    state words. Text formats only: they have stayed as they are for ten years, while the JSON changes
    its shape with nearly every release.

What it does not do
    It runs nothing. What it does not understand is never read as the end of a job.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from enum import Enum

from orchestrator.frozen import dataclass
from orchestrator.schedulers import QUEUED as WAITING
from orchestrator.schedulers import JobInfo, JobState, OwnJob

QUEUED = frozenset({"PENDING", "REQUEUED", "REQUEUE_FED", "EXPEDITING"})
HELD = frozenset({"REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"})
LIVE = frozenset(
    {
        *("CONFIGURING", "RUNNING", "SUSPENDED", "STOPPED", "COMPLETING", "SIGNALING"),
        *("STAGE_OUT", "RESIZING", "POWER_UP_NODE", "UPDATE_DB"),
    }
)
OVER = frozenset(
    {
        *("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"),
        *("BOOT_FAIL", "DEADLINE", "REVOKED", "LAUNCH_FAILED", "RECONFIG_FAIL"),
    }
)
HOLDS = frozenset({"JobHeldUser", "JobHeldAdmin", "JobHoldMaxRequeue"})
"""Reasons of a pending job that only somebody's release ends."""

ENDS = frozenset(
    {
        *("nonzeroexitcode", "raisedsignal", "timelimit", "outofmemory", "systemfailure", "nodedown"),
        *("joblaunchfailure", "launchfailedrequeuedheld", "badconstraints", "partitiondown", "deadline"),
        *("inactivelimit", "burstbufferoperation", "dependencyneversatisfied"),
    }
)
"""Reasons that are about an end. Any other one of a job that does not wait is from when it did: a job that
is cancelled after a requeue says BeginTime for good."""

SQUEUE = "%i|%T|%N|%L|%E|%r"
"""Free text last: a reason may hold anything."""
SQUEUE_TOKENS = "%i|%T|%k"
SQUEUE_OWN = f"{SQUEUE}|%k|%Z"
SACCT = "JobID,State,ExitCode,NodeList"


def state_of(word: str, reason: str = "") -> JobState:
    """State of a job by Slurm's word. A word that is not known is live: nothing is given up for it."""
    word = word_of(word)
    if word in OVER:
        return JobState.ENDED
    if word in HELD or (word in QUEUED and reason in HOLDS):
        return JobState.HELD
    return JobState.PENDING if word in QUEUED else JobState.RUNNING


def word_of(text: str) -> str:
    """`CANCELLED` of `CANCELLED by 1000` and of `CANCELLED+`."""
    found = re.match(r"[A-Z_]+", text.strip().upper())
    return found[0] if found else text.strip()


def exit_code(text: str) -> int | None:
    """Exit code as a shell would see it, of Slurm's `code:signal`; 0:15 is 143."""
    found = re.fullmatch(r"(\d+):(\d+)", text.strip())
    if found is None:
        return None
    code, number = int(found[1]), int(found[2])
    return 128 + number if number and not code else code


def seconds(text: str) -> int | None:
    """Seconds of `[days-][[hours:]minutes:]seconds`; None for UNLIMITED, INVALID, NOT_SET."""
    found = re.fullmatch(r"(?:(\d+)-)?(?:(?:(\d+):)?(\d+):)?(\d+)", text.strip())
    if found is None:
        return None
    days, hours, minutes, rest = (int(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + rest


# --- squeue ------------------------------------------------------------------------------------------


def rows(text: str) -> list[JobInfo]:
    """Jobs and array tasks of `squeue -h -r -o SQUEUE`. Lines of another shape are left out."""
    cells = (line.split("|", 5) for line in text.splitlines())
    return [_row(*cell) for cell in cells if len(cell) == 6 and cell[0].strip()]


def _row(job_id: str, word: str, nodes: str, left: str, dependency: str, reason: str) -> JobInfo:
    reason, dependency = _none(reason), _none(dependency)
    state = state_of(word, reason)
    return JobInfo(
        job_id=job_id.strip(),
        state=state,
        reason=reason if state in WAITING or _is_end(reason) else "",
        host=nodes.strip(),
        raw=word_of(word),
        dependency=dependency,
        time_left_s=seconds(left) if state == JobState.RUNNING else None,
    )


def _is_end(reason: str) -> bool:
    """Whatever is added to the word: RaisedSignal:9(Killed), NodeDown, (node01)."""
    return re.split(r"[^A-Za-z]", reason, maxsplit=1)[0].lower() in ENDS


def _none(text: str) -> str:
    text = text.strip()
    return "" if text in ("None", "(null)", "(None)", "N/A") else text


def base(job_id: str) -> str:
    """The array's id of a task's: 58 of 58_3 and of 58_[3-4%1]; 58 of 58."""
    return job_id.partition("_")[0]


def pick(job_id: str, found: Iterable[JobInfo]) -> JobInfo | None:
    """The answer about one id among rows: the job itself, or what its array's tasks come to."""
    mine = [row for row in found if row.job_id == job_id]
    tasks = [row for row in found if base(row.job_id) == job_id and row.job_id != job_id]
    # a row with the bare id of an array stands for what was cancelled of it: the tasks say more
    return array(job_id, tasks) if tasks else (mine[0] if mine else None)


def array(job_id: str, tasks: Sequence[JobInfo]) -> JobInfo:
    """An auto-resume array as one job: it is live as long as one task is; then the last segment speaks."""
    speaks = next((t for s in _LIVELY for t in tasks if t.state == s), None) or _last(tasks)
    return JobInfo(
        job_id=job_id,
        state=speaks.state,
        reason=speaks.reason,
        exit_code=speaks.exit_code,
        host=speaks.host,
        raw=speaks.raw,
        dependency=speaks.dependency,
        time_left_s=speaks.time_left_s,
        task=speaks.job_id,
    )


_LIVELY = (JobState.RUNNING, JobState.PENDING, JobState.HELD)


def _last(tasks: Sequence[JobInfo]) -> JobInfo:
    """The task that tells how an array ended: one that succeeded, else the last that was not cancelled."""
    ranks = {"COMPLETED": 2, "CANCELLED": 0}
    return max(tasks, key=lambda task: (ranks.get(task.raw, 1), _number(task.job_id)))


def _number(job_id: str) -> int:
    number = job_id.partition("_")[2]
    return int(number) if number.isdigit() else 0


def with_token(text: str, token: str) -> list[str]:
    """Ids of the jobs whose comment carries the token, those that live first; an array is named once."""
    found: dict[str, int] = {}
    for line in text.splitlines():
        cells = line.split("|", 2)
        if len(cells) == 3 and label(cells[2]).get("token") == token:
            job_id, over = base(cells[0].strip()), word_of(cells[1]) in OVER
            found[job_id] = min(found.get(job_id, 1), int(over))
    return sorted(found, key=lambda job_id: (found[job_id], int(job_id) if job_id.isdigit() else 0))


def own(text: str) -> list[OwnJob]:
    """Jobs that carry our label, of `squeue -h -r -o SQUEUE_OWN`."""
    cells = (line.split("|", 7) for line in text.splitlines())
    found = ((_row(*cell[:6]), label(cell[6]), cell[7]) for cell in cells if len(cell) == 8)
    return [
        OwnJob(info, about["run"], about["role"], about["token"], run_dir.strip())
        for info, about, run_dir in found
        if about.keys() >= {"run", "role", "token"}
    ]


def label(comment: str) -> dict[str, str]:
    """`run=…;role=…;token=…` as a dictionary."""
    pairs = (part.partition("=") for part in comment.strip().split(";"))
    return {name: value for name, sign, value in pairs if sign}


# --- scontrol and sacct ------------------------------------------------------------------------------


def fields(text: str) -> dict[str, str]:
    """`Name=value` pairs of the first record of `scontrol -o show job`."""
    line = text.strip().partition("\n")[0]
    return dict(re.findall(r"(?:^|(?<= ))([A-Za-z][\w:/]*)=(.*?)(?= [A-Za-z][\w:/]*=|$)", line))


def accounted(text: str, job_id: str) -> JobInfo | None:
    """The end of a job by `sacct -n -X -P -D -o SACCT`, of its latest life; None while it has none."""
    cells = [line.split("|") for line in text.splitlines() if line.count("|") >= 3]
    found = [
        JobInfo(row[0], state_of(row[1]), "", exit_code(row[2]), host=row[3].strip(), raw=word_of(row[1]))
        for row in cells
        if base(row[0]) == base(job_id)
    ]
    latest = {row.job_id: row for row in found}  # -D gives every life, the last one last
    info = pick(job_id, list(latest.values()))
    return info if info is not None and info.state == JobState.ENDED else None


# --- what an error means -----------------------------------------------------------------------------


class Trouble(Enum):
    """What a failed command says about the controller."""

    UNREACHABLE = "nothing was asked"
    AMBIGUOUS = "the question may have arrived, the answer did not"
    REFUSED = "the controller, or the command itself, said no"


_UNREACHABLE = (
    "unable to contact slurm controller",
    "connection refused",
    "backup controller in standby",
    "could not establish a configuration source",
    "unable to establish configuration source",
    "unable to resolve",
    "temporarily unable to accept",
)
_AMBIGUOUS = (
    "socket timed out",
    "zero bytes were transmitted or received",
    "transport endpoint is not connected",
    "connection reset",
    "connection timed out",
    "broken pipe",
    "unexpected message received",
    "message receive failure",
    "message send failure",
    "insane message length",
    "communication",
    "gave no answer within",
)


def trouble(rc: int, err: str) -> Trouble:
    """Why a command failed. rc 255 is ssh's, 124 a timeout's, and a signal may have come at any moment."""
    text = err.lower()
    if any(words in text for words in _AMBIGUOUS):
        return Trouble.AMBIGUOUS
    if any(words in text for words in _UNREACHABLE):
        return Trouble.UNREACHABLE
    return Trouble.AMBIGUOUS if rc < 0 or (rc >= 124 and rc != 127) else Trouble.REFUSED


def submitted(text: str) -> str:
    """The id in the answer of `sbatch --parsable`: `id[;cluster]`; "" when there is none."""
    ids = [m[1] for line in text.splitlines() if (m := re.fullmatch(r"(\d+)(?:;\S+)?", line.strip()))]
    return ids[-1] if ids else ""


@dataclass(frozen=True)
class Check:
    """What `sbatch --test-only` says of one job. accepted is None when it could not be asked."""

    accepted: bool | None
    message: str
