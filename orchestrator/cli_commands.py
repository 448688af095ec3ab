"""The command line: `orchestrate launch | status | list | logs | cancel | why | …`.

What it is
    Declarations only. Each command imports what it needs when it runs, so `--help` and completion take
    a fraction of a second on a login node: nothing but click is imported up here.

How to use it
    orchestrate --help; orchestrate launch --config local --follow

Exit codes
    0 success; 1 it failed; 2 bad input; 130 Ctrl-C; `--follow` exits with what the run ended with.

What it does not do
    No logic: see cli_launch, cli_runs, cli_why and the other cli_ modules beside it. It is not the entry:
    `orchestrator.cli` is, and reads a plain launch without this.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from orchestrator.errors import LaunchError, OrchestrateError

F = TypeVar("F", bound=Callable[..., Any])

BAD_INPUT = 2
FAILED = 1


class Cli(click.Group):
    """A group that prints our errors as one calm line each, and lists commands in the order of use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            if isinstance(ctx.obj, BaseException):  # what `orchestrator.cli` came upon
                raise ctx.obj
            return super().invoke(ctx)
        except OrchestrateError as error:
            for line in str(error).splitlines():
                click.echo(f"{click.style('error:', fg='red')} {line}", err=True)
            ctx.exit(_exit_code(error))


def _exit_code(error: OrchestrateError) -> int:
    """2 for what the caller can mend by typing something else, 1 for what went wrong on the way."""
    from orchestrator.contract import PeerGone, WaitTimeout
    from orchestrator.schedulers import SchedulerError

    return FAILED if isinstance(error, LaunchError | SchedulerError | WaitTimeout | PeerGone) else BAD_INPUT


def _options(*options: Callable[[F], F]) -> Callable[[F], F]:
    def add(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return add


_json = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
_runs_dir = click.option(
    "--runs-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where the runs are; default: run.runs_dir of your configuration.",
)
_run = click.argument("run", required=False)
_reading = _options(_run, _runs_dir, _json)


@click.group(cls=Cli, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="orchestrate-rl", prog_name="orchestrate")
def cli() -> None:
    """Train language-model agents by reinforcement learning, as two cooperating jobs.

    RUN is a run's id, a beginning or end of it that only one run has, or its directory; without RUN
    the latest one is meant.
    """


@cli.command()
@click.option("--config", "-c", "config_name", required=True, metavar="NAME|PATH", help="What to run.")
@click.option("--dry-run", is_flag=True, help="Print the plan and the job scripts; submit nothing.")
@click.option("--follow", "-f", is_flag=True, help="Watch until the run ends; Ctrl-C ends a local run.")
@click.option("--runtime-only", is_flag=True, help="Start only a sandbox server and say how to reach it.")
@click.option("--runtime-url", metavar="URL", help="Train against a sandbox server that already runs.")
@click.option(
    "--runtime-api-key-file",
    type=click.Path(path_type=Path),
    help="File with that server's key; else ORCHESTRATE_RUNTIME_API_KEY.",
)
@_json
@click.argument("assignments", nargs=-1, metavar="[KEY=VALUE]...")
def launch(**options: Any) -> None:
    """Launch a run.

    KEY=VALUE changes the configuration, like training.nodes=2 or rollout.temperature=0.8.
    """
    _check_modes(options)
    from orchestrator.cli import launch as start

    raise SystemExit(start(options))


def _check_modes(options: dict[str, Any]) -> None:
    """Combinations that make no sense are refused before anything is loaded."""
    if options["runtime_only"] and options["runtime_url"]:
        raise click.UsageError("--runtime-only starts a server, --runtime-url uses one: give one of them")
    if options["runtime_api_key_file"] and not options["runtime_url"]:
        raise click.UsageError("--runtime-api-key-file goes with --runtime-url")
    if options["follow"] and (options["dry_run"] or options["as_json"]):
        raise click.UsageError("--follow watches a run on the terminal: leave out --dry-run and --json")


@cli.command()
@_reading
def status(run: str | None, runs_dir: Path | None, as_json: bool) -> None:
    """Show how a run stands: its jobs, its latest step, its success rate, how it ended."""
    from orchestrator import cli_runs

    cli_runs.status(run, runs_dir, as_json)


@cli.command("list")
@_runs_dir
@click.option("--limit", "-n", default=20, show_default=True, help="The newest so many; 0 for all.")
@_json
def list_(runs_dir: Path | None, limit: int, as_json: bool) -> None:
    """List runs, the newest last."""
    from orchestrator import cli_runs

    cli_runs.list_runs(runs_dir, limit, as_json)


@cli.command()
@_run
@click.option("--follow", "-f", is_flag=True, help="Go on printing until the run ends.")
@click.option("--role", type=click.Choice(["runtime", "training"]), help="Only this job's logs.")
@click.option("--lines", "-n", default=200, show_default=True, help="The last so many of each; 0 for all.")
@click.option("--merge", is_flag=True, help="One timeline of all logs and events.")
@_runs_dir
@_json
def logs(**options: Any) -> None:
    """Print the logs of a run's jobs."""
    from orchestrator import cli_logs

    cli_logs.logs(**options)


@cli.command()
@_run
@click.option("--step", type=click.IntRange(min=0), help="Which step; default: the newest.")
@click.option("--task", default="", metavar="ID", help="Only this task's episodes, all of them in full.")
@click.option("--validation", is_flag=True, help="Of a validation, instead of a step.")
@click.option("--all", "everything", is_flag=True, help="Every episode in full, not only a few.")
@_runs_dir
@_json
def rollouts(run: str | None, runs_dir: Path | None, **options: Any) -> None:
    """Show what the policy did, turn by turn, what it saw, and what it was worth."""
    from orchestrator import cli_rollouts

    raise SystemExit(cli_rollouts.main(run, runs_dir, **options))


@cli.command()
@_run
@click.option("--out", "-o", required=True, type=click.Path(path_type=Path), help="A new directory.")
@click.option("--checkpoint", default="best", show_default=True, metavar="best|latest|STEP")
@click.option("--dtype", default="float32", show_default=True, metavar="float32|bfloat16|float16")
@_runs_dir
def export(run: str | None, out: Path, checkpoint: str, dtype: str, runs_dir: Path | None) -> None:
    """Write a run's policy as a Hugging Face directory, which vLLM and transformers load."""
    from orchestrator import cli_export

    raise SystemExit(cli_export.main(run, out, checkpoint, dtype, runs_dir))


@cli.command("eval")
@click.argument("policy", metavar="RUN|MODEL")
@click.argument("assignments", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--data", required=True, metavar="FILE|builtin:NAME", help="The tasks.")
@click.option(
    "--samples", "-n", type=click.IntRange(min=1), default=1, show_default=True, help="Of each task."
)
@click.option("--k", "ks", metavar="K,K,…", help="Which pass@k; default: 1 and SAMPLES.")
@click.option("--checkpoint", metavar="best|latest|STEP", help="Of the run; default: best.")
@click.option("--config", "-c", "config_name", metavar="NAME|PATH", help="With MODEL: what else it needs.")
@click.option("--dry-run", is_flag=True, help="Print the plan and the job scripts; submit nothing.")
@click.option("--follow/--no-follow", "-f", default=None, help="Watch until it ends; default: on a terminal.")
@_runs_dir
@_json
def eval_(**options: Any) -> None:
    """Sample tasks in real sandboxes with a run's policy, or a model, and say pass@k.

    It is launched like a run, with the run's own configuration; KEY=VALUE changes it, like
    rollout.temperature=0.6 or training.time_limit=1h.
    """
    _check_ks(options["ks"])
    if options["follow"] and options["dry_run"]:
        raise click.UsageError("--follow watches a run: leave out --dry-run")
    from orchestrator import cli_eval

    raise SystemExit(cli_eval.main(cli_eval.Asked(**options)))


def _check_ks(text: str | None) -> None:
    import re

    if text is not None and not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise click.UsageError(f"--k {text}: write whole numbers from 1 on with commas between, like 1,4,8")


@cli.command()
@_run
@click.option("--timeout", default=90.0, show_default=True, help="Seconds to wait until every job is over.")
@_runs_dir
@_json
def cancel(run: str | None, timeout: float, runs_dir: Path | None, as_json: bool) -> None:
    """End a run: both jobs, in one call, and wait until they are over."""
    from orchestrator import cli_runs

    cli_runs.cancel(run, timeout, runs_dir, as_json)


@cli.command()
@_run
@click.option(
    "--wait",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="Watch the heartbeats of running jobs for so long; default: one and a half beats, at most.",
)
@_runs_dir
@_json
def why(run: str | None, wait: float | None, runs_dir: Path | None, as_json: bool) -> None:
    """Say why a run is pending, stuck or failed, and what to type next."""
    from orchestrator import cli_why

    raise SystemExit(cli_why.main(run, wait, runs_dir, as_json))


@cli.command()
@click.argument("arguments", nargs=-1, metavar="[RUN] [KEY=VALUE]...")
@click.option("--dry-run", is_flag=True, help="Print what would be submitted; change nothing.")
@click.option("--from-scratch", is_flag=True, help="Start over where there is no checkpoint to go on from.")
@_runs_dir
@_json
def resume(
    arguments: tuple[str, ...], dry_run: bool, from_scratch: bool, runs_dir: Path | None, as_json: bool
) -> None:
    """Go on with a run that is over, from its newest checkpoint, in the same directory.

    KEY=VALUE changes resources and lengths, like training.time_limit=8h or trainer.total_steps=200.
    """
    from orchestrator import cli_resume

    cli_resume.main(arguments, dry_run, from_scratch, runs_dir, as_json)


@cli.command()
@_run
@click.option("--yes", is_flag=True, help="Remove what was found; without it nothing is changed.")
@click.option(
    "--wait", type=click.FloatRange(min=0), metavar="SECONDS", help="Watch heartbeats for at most so long."
)
@_runs_dir
@_json
def reap(run: str | None, yes: bool, wait: float | None, runs_dir: Path | None, as_json: bool) -> None:
    """Show, and with --yes remove, what killed nodes left: jobs, processes, sandboxes.

    Without RUN: of all runs. What may be alive is kept.
    """
    from orchestrator import cli_reap

    raise SystemExit(cli_reap.main(run, yes, wait, runs_dir, as_json))


@cli.command()
@click.option("--config", "-c", "config_name", metavar="NAME|PATH", help="What will be run; default: base.")
@click.option("--probe", is_flag=True, help="Look at compute nodes too, with a tiny job in each partition.")
@click.option("--timeout", default=300.0, show_default=True, help="Seconds that the probe jobs may take.")
@_json
@click.argument("assignments", nargs=-1, metavar="[KEY=VALUE]...")
def doctor(
    config_name: str | None, probe: bool, timeout: float, as_json: bool, assignments: tuple[str, ...]
) -> None:
    """Check this machine, the cluster and its nodes before a run needs them."""
    from orchestrator import cli_doctor

    raise SystemExit(cli_doctor.main(config_name, probe, timeout, as_json, assignments))


@cli.command()
@_run
@click.option("--kill", "part", required=True, metavar="PART", help="server, sandbox, trainer, runtime, …")
@click.option("--yes", is_flag=True, help="Do it; without it, only say what would be killed.")
@click.option("--timeout", default=300.0, show_default=True, help="Seconds to wait for the recovery.")
@_runs_dir
@_json
def drill(
    run: str | None, part: str, yes: bool, timeout: float, runs_dir: Path | None, as_json: bool
) -> None:
    """Kill a part of a running run on purpose, and report whether and how fast it recovered."""
    from orchestrator import cli_drill

    raise SystemExit(cli_drill.main(run, part, yes, timeout, runs_dir, as_json))


@cli.group()
def config() -> None:
    """Show configurations and the keys they may have."""


@config.command("show")
@click.option("--config", "-c", "config_name", metavar="NAME|PATH", help="Default: base.")
@click.option("--set", "only_set", is_flag=True, help="Leave out what is only a default.")
@_json
@click.argument("assignments", nargs=-1, metavar="[KEY=VALUE]...")
def config_show(config_name: str | None, only_set: bool, as_json: bool, assignments: tuple[str, ...]) -> None:
    """Print every value of a configuration and where it comes from."""
    from orchestrator import cli_config

    cli_config.show(config_name, only_set, as_json, assignments)


@config.command("keys")
@click.argument("pattern", required=False)
@click.option("--markdown", is_flag=True, help="Print docs/reference/config.md.")
@_json
def config_keys(pattern: str | None, markdown: bool, as_json: bool) -> None:
    """List the keys of the configuration; PATTERN is a part of their names."""
    from orchestrator import cli_config

    cli_config.keys(pattern, markdown, as_json)


@config.command("import")
@click.argument("source", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--output", "-o", type=click.Path(path_type=Path, dir_okay=False), help="Write to this file.")
@click.option("--force", is_flag=True, help="Replace a file that exists.")
@_json
def config_import(source: Path, output: Path | None, force: bool, as_json: bool) -> None:
    """Turn a shell-style KEY="value" file into our YAML. The file is not executed."""
    from orchestrator import cli_import

    raise SystemExit(cli_import.main(source, output, force, as_json))


@cli.group()
def data() -> None:
    """Look at task files before a run trains on them."""


@data.command("check")
@click.argument("file", metavar="FILE|builtin:NAME")
@click.option("--tokenizer", metavar="MODEL", help="Count prompts in tokens of this model.")
@click.option("--function", "functions", multiple=True, help="As in data.reward_functions; may be repeated.")
@_json
def data_check(file: str, tokenizer: str | None, functions: tuple[str, ...], as_json: bool) -> None:
    """Check every row of a task file, show the first task and which images it needs."""
    from orchestrator import cli_data

    raise SystemExit(cli_data.check(file, tokenizer, functions, as_json))
