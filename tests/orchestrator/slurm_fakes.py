"""Slurm's commands as executables on PATH that replay recorded answers, also those of a bad day.

How to use it
    fakes = Fakes(tmp_path); fakes.answers("squeue", Reply(out="7|RUNNING|n1|1:00||None\\n"))
    with PATH set to fakes.bin: each call takes the next reply of its command, the last one stays.
    fakes.calls("sbatch") are the command lines so far, fakes.environment("sbatch") the last environment.

What it does not do
    It keeps no jobs: a test says what each call answers. A command without answers is "down": it fails as
    it does while the controller cannot be reached.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path

COMMANDS = ("sbatch", "squeue", "scontrol", "scancel", "sacct")

PROGRAM = """#!{python} -ISs
import json, os, sys, time
from pathlib import Path
name, root = os.path.basename(sys.argv[0]), Path({root!r})
given = sys.stdin.read() if "--test-only" in sys.argv else ""
with open(root / f"{{name}}.calls", "a") as log:
    log.write(json.dumps([sys.argv[1:], dict(os.environ), given]) + "\\n")
left = [json.loads(line) for line in (root / f"{{name}}.replies").read_text().splitlines()]
if len(left) > 1:
    (root / f"{{name}}.replies").write_text("".join(json.dumps(one) + "\\n" for one in left[1:]))
time.sleep(left[0]["delay"])
sys.stdout.write(left[0]["out"])
sys.stderr.write(left[0]["err"])
sys.stdout.flush()
if left[0]["rc"] < 0:
    os.kill(os.getpid(), -left[0]["rc"])
sys.exit(left[0]["rc"])
"""


@dataclass(frozen=True)
class Reply:
    """One answer of one command; a negative rc is a signal that ends it, delay is in seconds."""

    rc: int = 0
    out: str = ""
    err: str = ""
    delay: float = 0.0


DOWN = Reply(1, err="slurm_load_jobs error: Unable to contact slurm controller (connect failure)\n")
NO_SUCH_ID = Reply(1, err="slurm_load_jobs error: Invalid job id specified\n")
NO_ACCOUNTING = Reply(1, err="Slurm accounting storage is disabled\n")
LOST = "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation\n"

# What `scontrol -o show job` prints, of several releases.
RECORDS = [
    "JobId=7 JobName=a b UserId=me(1000) GroupId=me(1000) MCS_label=N/A Priority=1 Nice=0 "
    "Account=(null) QOS=normal JobState=FAILED Reason=NonZeroExitCode Dependency=(null) Requeue=1 "
    "Restarts=0 BatchFlag=1 Reboot=0 ExitCode=7:0 RunTime=00:00:01 TRES=cpu=1,node=1 "
    "Comment=run=r1;role=x;token=t Command=/a b/x.sh",
    "JobId=58 ArrayJobId=58 ArrayTaskId=2 JobName=x JobState=COMPLETED Reason=None ExitCode=0:0 "
    "NtasksPerN:B:S:C=0:0:*:1 ReqB:S:C:T=0:0:*:* TresPerNode=gres/gpu:1",
]


def row(job_id: str, word: str, reason: str = "None", nodes: str = "", left: str = "1:00:00") -> str:
    """One job as `squeue` prints it."""
    return f"{job_id}|{word}|{nodes}|{left}|(null)|{reason}\n"


class Fakes:
    """The commands of one test, in a folder of its own."""

    def __init__(self, root: Path) -> None:
        self.root, self.bin = root, root / "bin"
        self.bin.mkdir()
        for name in COMMANDS:
            path = self.bin / name
            path.write_text(PROGRAM.format(python=sys.executable, root=str(root)))
            path.chmod(0o755)
            self.answers(name, NO_ACCOUNTING if name == "sacct" else DOWN)

    def answers(self, name: str, *replies: Reply) -> None:
        """From now on: one reply after the other, then the last one for ever."""
        lines = [json.dumps(dataclasses.asdict(reply)) + "\n" for reply in replies]
        (self.root / f"{name}.replies").write_text("".join(lines))

    def calls(self, name: str) -> list[list[str]]:
        return [argv for argv, _, _ in self._log(name)]

    def environment(self, name: str) -> dict[str, str]:
        environment: dict[str, str] = self._log(name)[-1][1]
        return environment

    def given(self, name: str) -> str:
        """What the last call read from its standard input."""
        return str(self._log(name)[-1][2])

    def _log(self, name: str) -> list[tuple[list[str], dict[str, str], str]]:
        path = self.root / f"{name}.calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
