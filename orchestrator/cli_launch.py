"""What `orchestrate launch` does and says.

What it does not do
    The launch itself is `orchestrator.launch`, and what is said and done once the jobs are submitted
    `orchestrator.cli_launched`: a launch for a script, with --json, loads nothing that prints.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.config import load
from orchestrator.errors import ConfigError
from orchestrator.frozen import asdict, dataclass
from orchestrator.launch import Request, launch, preview
from orchestrator.plan import Plan
from orchestrator.schedulers import Scheduler, SchedulerError, open_scheduler
from orchestrator.snapshot import Asked

if TYPE_CHECKING:
    from orchestrator.attach import Attached


@dataclass(frozen=True)
class Options:
    """The options of `orchestrate launch` as click gives them."""

    config_name: str
    dry_run: bool
    follow: bool
    runtime_only: bool
    runtime_url: str | None
    runtime_api_key_file: Path | None
    as_json: bool
    assignments: tuple[str, ...]

    @property
    def mode(self) -> str:
        return "runtime-only" if self.runtime_only else "runtime-url" if self.runtime_url else "run"


def main(options: Options, asked: Asked | None = None) -> int:
    """Returns what to exit with. `asked`: git about the checkout, while all this was imported."""
    resolved = load(options.config_name, options.assignments)
    return start(options, Request(resolved, options.mode, command=sys.argv[1:]), asked)


def start(options: Options, request: Request, asked: Asked | None = None) -> int:
    """Launch it, or print the plan; returns what to exit with."""
    planned = preview(request)
    if options.dry_run:
        return _dry_run(planned, options.as_json)
    scheduler = _scheduler(planned.scheduler, request.runs_dir)
    runtime = _check_runtime(options) if options.runtime_url else None
    request = Request(request.resolved, request.mode, runtime, request.command)
    launched = launch(request, scheduler, asked)
    if options.as_json and not options.runtime_only and not options.follow:
        about = {"run_id": launched.plan.run_id, "path": launched.plan.run_dir, "jobs": launched.jobs}
        print(json.dumps(about), flush=True)  # a closed pipe is noticed here
        return 0
    from orchestrator import cli_launched  # not before the jobs are submitted

    return cli_launched.after(options, launched, scheduler)


def _dry_run(planned: Plan, as_json: bool) -> int:
    """Print the plan, and what the cluster says of it; 1 when it refuses a job."""
    from orchestrator import preflight, view

    checks = preflight.checks(planned)
    if as_json:
        answers = {role: asdict(check) for role, check in checks.items()}
        print(json.dumps(planned.as_dict() | {"checks": answers}, indent=1), flush=True)
    else:
        view.console().print(view.plan(planned, checks))
    return int(any(check.accepted is False for check in checks.values()))


def _scheduler(kind: str, runs_dir: Path) -> Scheduler:
    """A scheduler that this version does not have is a wrong value of the caller's."""
    try:
        return open_scheduler(kind, runs_dir)
    except SchedulerError as error:
        raise ConfigError([str(error)]) from error


def _check_runtime(options: Options) -> Attached:
    from orchestrator import attach

    assert options.runtime_url is not None
    return attach.check_runtime(options.runtime_url, attach.read_key(options.runtime_api_key_file))
