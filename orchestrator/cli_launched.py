"""What `orchestrate launch` says and does once the jobs are submitted.

What it is
    What was launched, what to type next, the watching with --follow, the wait for a server alone, and
    what Ctrl-C means in each.

What it does not do
    It launches nothing (`orchestrator.launch`) and reads no options (`orchestrator.cli_launch`).
"""

from __future__ import annotations

import contextlib
import json
import shlex
import signal
from collections.abc import Iterator
from types import FrameType

import click
from rich.console import Console
from rich.text import Text

from orchestrator import attach, runs, view
from orchestrator.cli_launch import Options
from orchestrator.contract import Evaluation, ReadyFlag, RunDirectory, wait_for
from orchestrator.errors import ConfigError, RuntimeUnusable
from orchestrator.launch import Launched
from orchestrator.runs import RunView
from orchestrator.schedulers import Scheduler

INTERRUPTED = 130


def after(options: Options, launched: Launched, scheduler: Scheduler) -> int:
    """Say what was launched and what to type next, follow it where that was asked for. Returns what to
    exit with."""
    quiet = options.as_json and options.follow
    console = view.console(stderr=quiet)
    if quiet or not options.as_json:  # with it: one JSON object, once the server is ready, or at the end
        console.print(view.launched(launched.plan, launched.jobs, launched.left_out))
    if options.runtime_only:
        return _serve(options, launched, scheduler, console)
    if options.follow:
        code = _watch(launched.run, scheduler, console)
        if quiet:
            from orchestrator.cli_runs import status

            status(str(launched.run.root), None, as_json=True)
        return code
    if not options.as_json:
        name = view.short_id(launched.plan.run_id)
        console.print(view.next_steps(_commands(options, launched, "status", "logs -f", "cancel")))
        detached = "the jobs go on without this terminal"
        console.print(view.row("", Text(f"{detached} ({name} is enough to name the run)", "dim")))
    return 0


def _commands(options: Options, launched: Launched, *commands: str) -> list[str]:
    """What to type next; the directory of the runs is only named when `status` would not find it."""
    from orchestrator.cli_runs import runs_directory

    run = launched.run
    with contextlib.suppress(ConfigError):
        if runs_directory(None) == run.root.parent:
            return [f"orchestrate {command} {view.short_id(run.run_id)}" for command in commands]
    return [f"orchestrate {command} {shlex.quote(view.short_path(run.root))}" for command in commands]


# --- watching ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def _terminated_is_interrupted() -> Iterator[None]:
    """While we look after a local run, TERM means what Ctrl-C means."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _watch(run: RunDirectory, scheduler: Scheduler, console: Console) -> int:
    """Follow to the end; Ctrl-C ends a run of this machine, and only stops watching any other."""
    from orchestrator import follow as watching

    console.print()
    try:
        with _terminated_is_interrupted():
            look = watching.follow(run, scheduler, console)
    except KeyboardInterrupt:
        return _interrupted(run, scheduler, console)
    watching.ending(run, look, console)
    console.print(view.next_steps(_afterwards(run)))
    return runs.exit_code_of(look)


def _afterwards(run: RunDirectory) -> list[str]:
    where = shlex.quote(view.short_path(run.root))
    commands = [f"orchestrate status {where}", f"orchestrate logs {where}"]
    if run.read(run.evaluation, Evaluation):
        commands.append(f"orchestrate rollouts {where} --validation")
    if run.tensorboard.is_dir():
        commands.append(f"tensorboard --logdir {shlex.quote(view.short_path(run.tensorboard))}")
    return commands


def _interrupted(run: RunDirectory, scheduler: Scheduler, console: Console) -> int:
    if scheduler.name != "local":
        console.print(f"\n  stopped watching; {run.run_id} goes on (orchestrate cancel {run.run_id} ends it)")
        return INTERRUPTED
    console.print(f"\n  interrupted: ending {run.run_id} …")
    try:
        runs.cancel(run, scheduler)
    except KeyboardInterrupt:
        console.print("  not waiting; the jobs were told to end. See: orchestrate status")
        return INTERRUPTED
    console.print("  cancelled; every job of the run is over and its directory says so:")
    console.print(view.row("directory", view.short_path(run.root)))
    return INTERRUPTED


# --- a server alone ----------------------------------------------------------------------------------


def _serve(options: Options, launched: Launched, scheduler: Scheduler, console: Console) -> int:
    """Wait until the server is up, say how to reach it; with --follow keep it until Ctrl-C."""
    from orchestrator import follow as watching

    try:
        with _terminated_is_interrupted():
            flag = _wait_ready(launched, scheduler)
            _say_ready(options, launched, flag, console)
            if options.follow:
                console.print(view.row("", Text("Ctrl-C ends the server", "dim")))
                return runs.exit_code_of(watching.follow(launched.run, scheduler, console))
    except KeyboardInterrupt:
        if options.follow:
            return _interrupted(launched.run, scheduler, console)
        name = launched.run.run_id
        console.print(f"\n  stopped waiting; {name} goes on (orchestrate cancel {name} ends it)")
        return INTERRUPTED
    return 0


def _wait_ready(launched: Launched, scheduler: Scheduler) -> ReadyFlag:
    """The ready flag of a server that answers its own health check with the same nonce."""
    run = launched.run
    # in a queue nobody can say how long it takes; a local job has only itself to wait for
    timeout = launched.plan.settings.ready_timeout if scheduler.name == "local" else float("inf")
    return wait_for(
        lambda: _ready(run),
        f"the runtime server of {run.run_id}",
        timeout,
        lambda: _dead(runs.view(run, scheduler)),
    )


def _ready(run: RunDirectory) -> ReadyFlag | None:
    flag = run.read(run.ready_flag, ReadyFlag)
    if flag is None:
        return None
    try:
        found = attach.check_runtime(flag.url, run.read_text(run.runtime_api_key))
    except RuntimeUnusable:
        return None
    return flag if found.nonce == flag.nonce else None


def _dead(look: RunView) -> str | None:
    if not look.is_over:
        return None
    return f"its job is over ({look.state}: {look.reason}); `orchestrate logs {look.run_id}` says more"


def _say_ready(options: Options, launched: Launched, flag: ReadyFlag, console: Console) -> None:
    run = launched.run
    if options.as_json:
        key = str(run.runtime_api_key)
        click.echo(json.dumps({"run_id": run.run_id, "url": flag.url, "api_key_file": key}))
        return
    key_file = shlex.quote(view.short_path(run.runtime_api_key))
    console.print(view.row("ready", Text(flag.url, "green")))
    console.print(view.row("key", f"in {key_file} (0600)"))
    # printf is the shell's own and curl reads the header from its input: the key is in no argument list
    curl = f"printf 'X-API-Key: %s' \"$(cat {key_file})\" | curl -sH @- {flag.url}/v1/capabilities"
    console.print(view.row("try", Text(curl, "bold")))
    train = f"orchestrate launch -c NAME --runtime-url {flag.url} --runtime-api-key-file {key_file}"
    console.print(view.next_steps([train, *_commands(options, launched, "cancel")]))
