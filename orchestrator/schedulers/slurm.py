"""The Slurm scheduler: the only caller of sbatch, squeue, scontrol, scancel and sacct.

What it is
    `SlurmScheduler(commands)` asks in plain text, batched, with bounded patience. A controller that does
    not answer makes a state UNKNOWN; GONE is only what an answering controller does not know. A lost
    answer to a submission is looked up by the token in the job's comment and never submitted again.

How to use it
    scheduler = SlurmScheduler.here(); job_id = scheduler.submit(spec)
    scheduler.query([job_id])[job_id].state

What it does not do
    It starts no process itself (`slurm_commands` does) and parses nothing (`slurm_text` does). No record
    and no run directory.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from orchestrator.frozen import replace
from orchestrator.schedulers import (
    JobInfo,
    JobSpec,
    JobState,
    OwnJob,
    RequeueRefused,
    SchedulerError,
    SubmissionUnknown,
)
from orchestrator.schedulers import slurm_text as text
from orchestrator.schedulers.slurm_cache import Cache
from orchestrator.schedulers.slurm_commands import Answer, Commands, LocalCommands, installed, job_details
from orchestrator.schedulers.slurm_text import Check, Trouble

_JOB_ID = re.compile(r"\d+(_\d+)?")
_ASK_ALONE = 4


class SlurmScheduler:
    """Implements `orchestrator.schedulers.Scheduler`.

    patience_s: how long a request is tried again while the controller cannot be reached, and how long a
    lost answer is looked for. timeout_s: the longest wait for one command.
    """

    name = "slurm"

    def __init__(self, commands: Commands, *, patience_s: float = 30.0, timeout_s: float = 30.0) -> None:
        self.commands, self.patience_s, self.timeout_s = commands, patience_s, timeout_s
        self.cache = Cache()
        self._accounting: bool | None = None

    @classmethod
    def here(cls) -> SlurmScheduler:
        """With the commands of this machine. Raises SchedulerError when it has none."""
        if not installed():
            raise SchedulerError(
                "Slurm's commands (squeue, sbatch, …) are not on the PATH of this machine: run this on a "
                "login node of the cluster, or use scheduler.kind=local to run the same jobs here"
            )
        return cls(LocalCommands())

    # --- submission ---

    def submit(self, spec: JobSpec) -> str:
        """Submit and return the job id: exactly one job comes of it, or none.

        Raises SchedulerError when there is none, SubmissionUnknown when nobody can tell.
        """
        argv = ["sbatch", "--parsable", *spec.args, *_start(spec), str(spec.script)]
        for pause in self._pauses():
            answer = self._run(argv, env=spec.env)  # only ever again when the controller was not reached
            if answer.rc == 0 and (job_id := text.submitted(answer.out)):
                self.cache.expire()
                return job_id
            kind = text.trouble(answer.rc, answer.err) if answer.rc else Trouble.AMBIGUOUS
            if kind == Trouble.REFUSED:
                raise SchedulerError(_refusal(spec, answer))
            if kind == Trouble.AMBIGUOUS:
                return self._look_for(spec, answer)
            time.sleep(pause)
        raise SchedulerError(
            f"the controller of the cluster was not reached for {self.patience_s:g} s, and nothing was "
            f"submitted: {answer.said}"
        )

    def _look_for(self, spec: JobSpec, answer: Answer) -> str:
        """The id of a job whose answer was lost: several looks, for a busy controller acts late."""
        for pause in self._pauses():
            try:
                if job_id := self._find(spec.token):
                    return job_id
            except SchedulerError as error:
                answer = replace(answer, err=str(error))
            time.sleep(pause)
        raise SubmissionUnknown(
            f"the answer of sbatch was lost and no job with its token has appeared: {answer.said}\n"
            f"it may still appear: `squeue --me -o '%i %T %k'` shows the token {spec.token}"
        )

    def test_only(self, spec_args: Sequence[str], script: str, env: Mapping[str, str]) -> Check:
        """Whether the controller would take a job, without submitting it. The script is given as text.

        The message may hold a date; it is an estimate that was seen to be wrong by millennia.
        """
        argv = ["sbatch", "--test-only", *spec_args]
        answer = self.commands.run(argv, input=script, timeout=self.timeout_s, env=env)
        if answer.rc == 0:
            return Check(True, answer.said)
        refused = text.trouble(answer.rc, answer.err) == Trouble.REFUSED
        return Check(False if refused else None, answer.said)

    def find(self, token: str) -> str | None:
        """The job of this token; of an array its base id. Where there is accounting, purged jobs too."""
        return self._find(token) or self._find_accounted(token)

    def _find(self, token: str) -> str | None:
        answer = self._ask(["squeue", "-h", "--me", "-t", "all", "-o", text.SQUEUE_TOKENS])
        return next(iter(text.with_token(answer.out, token)), None)

    def _find_accounted(self, token: str) -> str | None:
        answer = self._sacct("-S", "now-14days", "-o", "JobID,State,Comment%1024")
        return next(iter(text.with_token(answer.out, token)), None) if answer else None

    # --- questions ---

    def query(self, job_ids: Sequence[str], *, fresh: bool = False) -> dict[str, JobInfo]:
        ids = list(dict.fromkeys(job_ids))
        known = {} if fresh else self.cache.of(ids)
        asked = [job_id for job_id in ids if job_id not in known]
        if asked:
            known |= self.cache.put(self._query(asked))
        return {job_id: known[job_id] for job_id in ids}

    def _query(self, ids: list[str]) -> dict[str, JobInfo]:
        """What the controller says now; the list first, then what is missing from it one by one."""
        found = {i: JobInfo(i, JobState.GONE, "no such job id") for i in ids if not _JOB_ID.fullmatch(i)}
        asked = [job_id for job_id in ids if job_id not in found]
        if len(asked) > 1:
            found |= self._listed(asked)
        missing = [job_id for job_id in asked if job_id not in found]
        return found | {job_id: self._one(job_id) for job_id in missing}

    def _listed(self, ids: list[str]) -> dict[str, JobInfo]:
        """Those of the list that the controller knows; UNKNOWN for all when it does not answer.

        Our own jobs first: a controller with a long queue need not send all of it. Few that are missing
        are asked for one by one, which has a definite answer; many with the whole queue.
        """
        found: dict[str, JobInfo] = {}
        for whose in (["--me"], []):
            asked = [job_id for job_id in ids if job_id not in found]
            if not asked or (not whose and len(asked) <= _ASK_ALONE):
                break
            answer = self._squeue([*whose, "-j", ",".join(asked)])
            if answer.rc and not _unknown_id(answer):
                return {job_id: _unanswered(job_id, answer) for job_id in ids}
            rows = text.rows(answer.out)
            picked = {job_id: text.pick(job_id, rows) for job_id in asked}
            found |= {job_id: self._ended(info) for job_id, info in picked.items() if info}
            if not whose:
                found |= self._purged([job_id for job_id in asked if job_id not in found])
        return found

    def _one(self, job_id: str) -> JobInfo:
        answer = self._squeue(["-j", job_id])
        if answer.rc and not _unknown_id(answer):
            return _unanswered(job_id, answer)
        info = text.pick(job_id, text.rows(answer.out))
        return self._ended(info) if info else self._purged([job_id])[job_id]

    def _squeue(self, which: Sequence[str]) -> Answer:
        argv = ["squeue", "-h", "-r", "-t", "all", "-o", text.SQUEUE, *which]
        return self.commands.run(argv, timeout=self.timeout_s)

    def _ended(self, info: JobInfo) -> JobInfo:
        """With its exit code, which squeue does not tell."""
        if info.state != JobState.ENDED:
            return info
        said = job_details(self.commands, info.task or info.job_id, self.timeout_s)
        return replace(info, exit_code=text.exit_code(said.get("ExitCode", "")))

    def _purged(self, ids: Sequence[str]) -> dict[str, JobInfo]:
        """Jobs that the controller no longer knows; accounting, where there is any, knows their ends."""
        answer = self._sacct("-D", "-j", ",".join(ids), "-o", text.SACCT) if ids else None
        ends = {job_id: text.accounted(answer.out, job_id) if answer else None for job_id in ids}
        gone = "Slurm no longer knows the job"
        return {job_id: end or JobInfo(job_id, JobState.GONE, gone) for job_id, end in ends.items()}

    def _sacct(self, *arguments: str) -> Answer | None:
        """None when there is no accounting, or it does not answer: nothing depends on it."""
        if self._accounting is False:
            return None
        answer = self.commands.run(["sacct", "-n", "-X", "-P", *arguments], timeout=self.timeout_s)
        if "accounting storage is disabled" in answer.err.lower() or answer.rc == 127:
            self._accounting = False
        return answer if answer.rc == 0 else None

    def mine(self) -> list[OwnJob]:
        return text.own(self._ask(["squeue", "-h", "-r", "--me", "-o", text.SQUEUE_OWN]).out)

    # --- requests ---

    def release(self, job_id: str) -> None:
        """An error of `scontrol release` is a question: it also comes for a job that runs or is over."""
        answer = self._request(["scontrol", "release", _checked(job_id)])
        if answer.rc == 0:
            return
        info = self._query([job_id])[job_id]
        if info.state == JobState.UNKNOWN or (info.state == JobState.HELD and info.reason != "JobHeldAdmin"):
            raise SchedulerError(f"job {job_id} was not released: {answer.said}")
        if info.state == JobState.HELD:
            raise SchedulerError(
                f"job {job_id} is held by an administrator ({info.reason}): only they can release it; ask "
                f"them, or end the run with `orchestrate cancel`"
            )

    def cancel(self, job_ids: Sequence[str]) -> None:
        """One call for all. Jobs that are over or unknown are no error; ask `query` for the rest."""
        if not (ids := [_checked(job_id) for job_id in dict.fromkeys(job_ids)]):
            return
        answer = self._request(["scancel", *ids])
        problems = [line for line in answer.err.splitlines() if line.strip() and not _is_over(line)]
        if problems and (answer.rc or "denied" in answer.err):
            raise SchedulerError(f"scancel of {', '.join(ids)}: {replace(answer, err=problems[-1]).said}")

    def signal(self, job_id: str, name: str) -> None:
        short = name.removeprefix("SIG")
        if not re.fullmatch(r"[A-Z][A-Z0-9]*", short):
            raise SchedulerError(f"there is no signal {name}; use a name like USR1 or TERM")
        answer = self._request(["scancel", "--batch", f"--signal={short}", _checked(job_id)])
        # for a task of an array, 22.05 delivers the signal, says nothing, and exits with 229
        if answer.err.strip() or (answer.rc and "_" not in job_id):
            raise SchedulerError(f"job {job_id} did not get {short}: {answer.said}")

    def requeue(self, job_id: str) -> None:
        """Of an array the task that runs: its bare id would mean the whole array."""
        info = self._query([_checked(job_id)])[job_id]
        answer = self._request(["scontrol", "requeue", info.task or job_id])
        if answer.rc == 0 or "pending" in answer.err.lower():
            return
        if "disabled" in answer.err.lower():
            raise RequeueRefused(
                f"job {job_id} cannot be requeued ({answer.said}): it was submitted with --no-requeue, or "
                f"the site forbids it; scheduler.on_timeout=array needs no such right"
            )
        raise SchedulerError(f"job {job_id} was not requeued: {answer.said}")

    # --- the patience of all this ---

    def _run(self, argv: Sequence[str], env: Mapping[str, str] | None = None) -> Answer:
        return self.commands.run(argv, timeout=self.timeout_s, env=env)

    def _ask(self, argv: Sequence[str]) -> Answer:
        """The answer to a question. Raises SchedulerError when there is none."""
        answer = self._run(argv)
        if answer.rc:
            raise SchedulerError(f"{argv[0]} has no answer: {answer.said}")
        return answer

    def _request(self, argv: Sequence[str]) -> Answer:
        """A request that may be made twice: again while the controller cannot be reached."""
        self.cache.expire()
        for pause in self._pauses():
            answer = self._run(argv)
            if answer.rc == 0 or text.trouble(answer.rc, answer.err) == Trouble.REFUSED:
                break
            time.sleep(pause)
        self.cache.expire()
        return answer

    def _pauses(self, clock: Callable[[], float] = time.monotonic) -> Iterator[float]:
        """Growing pauses with jitter, until the patience is used up; always at least one."""
        end, pause = clock() + self.patience_s, 0.25
        while True:
            left = end - clock()
            yield max(0.0, min(left, pause * (0.5 + os.urandom(1)[0] / 255)))  # jitter
            if clock() >= end:
                return
            pause = min(pause * 2, 8.0)


def _start(spec: JobSpec) -> list[str]:
    hold = ["--hold"] if spec.held else []
    return [*hold, f"--dependency=after:{spec.after}"] if spec.after else hold


def _checked(job_id: str) -> str:
    """A job id and nothing else: what is cancelled must not be an option or a list."""
    if not _JOB_ID.fullmatch(job_id):
        raise SchedulerError(f"{job_id!r} is no job id of Slurm; one looks like 123 or 123_4")
    return job_id


def _unknown_id(answer: Answer) -> bool:
    return "invalid job id" in answer.err.lower()


def _is_over(line: str) -> bool:
    words = ("invalid job id", "already completing", "already finished")
    return any(word in line.lower() for word in words)


def _unanswered(job_id: str, answer: Answer) -> JobInfo:
    return JobInfo(job_id, JobState.UNKNOWN, f"Slurm does not answer: {answer.said}")


def _refusal(spec: JobSpec, answer: Answer) -> str:
    return f"{answer.said} (sbatch refused {spec.script.name})"
