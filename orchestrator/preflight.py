"""Would the cluster take these jobs? Asked without submitting anything.

What it is
    `checks(plan)` gives each planned job to `sbatch --test-only`, script and all, and says what it
    answers. It is what a dry run shows beside the plan.

What it does not do
    It writes nothing, and it promises no start: the date in sbatch's answer is an estimate that has been
    wrong by millennia, and is left out. A cluster that does not answer proves nothing.
"""

from __future__ import annotations

import re
from dataclasses import replace

from orchestrator.plan import Plan
from orchestrator.schedulers.slurm import SlurmScheduler
from orchestrator.schedulers.slurm_commands import Commands, LocalCommands, installed
from orchestrator.schedulers.slurm_text import Check

_TIMEOUT_S = 10.0


def checks(plan: Plan, commands: Commands | None = None) -> dict[str, Check]:
    """An answer for each job of the plan, by role; {} where there is no cluster to ask."""
    if plan.scheduler != "slurm" or (commands is None and not installed()):
        return {}
    scheduler = SlurmScheduler(commands or LocalCommands(), timeout_s=_TIMEOUT_S)
    found: dict[str, Check] = {}
    for job in plan.jobs:
        check = scheduler.test_only(job.args, job.script, job.env)
        found[job.role] = replace(check, message=_message(check))
        if check.accepted is None:  # it would not answer for the next one either
            break
    return found


def _message(check: Check) -> str:
    """In words; what is known of where it would run, without when."""
    if check.accepted is None:
        return f"the cluster was not asked: {check.message}"
    if not check.accepted:
        return f"the cluster refuses it: {check.message}"
    where = re.search(r"using (.*)", check.message)
    return f"the cluster accepts it ({where[1]})" if where else "the cluster accepts it"
