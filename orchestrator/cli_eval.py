"""What `orchestrate eval` does: it turns a run or a model into an evaluation, which is launched like any run.

What it is
    The configuration of an evaluation is that of the run whose policy it is (or of --config, for a model)
    with a few keys set: the tasks, the samples of each, which pass@k, and which checkpoint. Everything after
    that is the launch (`orchestrator.cli_launch`): plan, dry run, submission, following.

How to use it
    orchestrate eval RUN --data held-out.parquet --samples 8 --k 1,4,8
    orchestrate eval ./exported --config dev --data held-out.parquet

What it does not do
    It samples nothing and judges nothing: the trainer does, in the training job.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from orchestrator import checkpoints, cli_runs, runs
from orchestrator.cli_commands import BAD_INPUT
from orchestrator.cli_launch import Options, start
from orchestrator.config import Entry, Resolved, from_assignments, load, resolve
from orchestrator.contract import NotARun, RunDirectory
from orchestrator.errors import ConfigError, OrchestrateError, RunNotFound
from orchestrator.frozen import dataclass
from orchestrator.launch import Request
from orchestrator.resume import frozen, split

WHERE = "orchestrate eval"
_CHECK_TIMEOUT_S = 600
_TRAINS_NOTHING: dict[str, Any] = {
    "run.name": "eval",
    "evaluation.checkpoint": "",
    # The run's own checkpoints and trajectories are not this one's to write.
    "trainer.checkpoint_dir": "",
    "trainer.rollout_dir": "",
    "trainer.resume": "auto",
    "trainer.total_steps": None,
    "trainer.loggers": [],
    # The policy is whole: adapters are merged into it, and nothing is updated beside its rollouts.
    "model.lora_rank": 0,
    "rollout.asynchronous": False,
}


@dataclass(frozen=True)
class Asked:
    """The options of `orchestrate eval` as click gives them. `policy` is a run or a model."""

    policy: str
    data: str
    samples: int
    ks: str | None
    checkpoint: str | None
    config_name: str | None
    runs_dir: Path | None
    dry_run: bool
    follow: bool | None
    as_json: bool
    assignments: tuple[str, ...]

    @property
    def follows(self) -> bool:
        """On a terminal, unless it is asked for otherwise: whoever evaluates waits for a number."""
        quiet = self.dry_run or self.as_json or not sys.stdout.isatty()
        return not quiet if self.follow is None else self.follow


def main(asked: Asked) -> int:
    """What to exit with. Raises OrchestrateError for what is asked for wrongly, before anything is done."""
    resolved = of_model(asked) if asked.config_name else of_run(asked)
    request = Request(resolved, command=sys.argv[1:])
    check_data(request)
    options = Options(
        config_name=resolved.name,
        dry_run=asked.dry_run,
        follow=asked.follows,
        runtime_only=False,
        runtime_url=None,
        runtime_api_key_file=None,
        as_json=asked.as_json,
        assignments=asked.assignments,
    )
    return start(options, request)


# --- the configuration -------------------------------------------------------------------------------


def of_run(asked: Asked) -> Resolved:
    """A run's policy, under its own configuration. Raises RunNotFound, NoCheckpoint, ConfigError."""
    run = _run(asked)
    checkpoint = checkpoints.choose(checkpoints.folder_of(run), asked.checkpoint or "best", run.run_id)
    entries, problems = frozen(run)
    name = Path(runs.manifest_of(run).config_name).stem
    return _resolved(asked, entries, problems, {"evaluation.checkpoint": str(checkpoint)}, name)


def of_model(asked: Asked) -> Resolved:
    """A model, under a named configuration. Raises ConfigError."""
    if found := _found(asked):
        raise ConfigError(
            [
                f"{asked.policy} is the run {found.run_id}, which brings its own configuration: leave out "
                "--config, or give a model's directory or name"
            ]
        )
    if asked.checkpoint is not None:
        raise ConfigError(["--checkpoint chooses among those of a run; a model has none: leave it out"])
    model, folder = asked.policy, Path(asked.policy).expanduser()
    if folder.is_dir():
        model = str(folder.absolute())
        if not (folder / "config.json").is_file():
            raise ConfigError([f"{asked.policy} holds no config.json: name a Hugging Face model directory"])
    elif model.startswith((".", "~", "/")):
        raise ConfigError([f"there is no {asked.policy}: name a model's directory, or its Hugging Face name"])
    loaded = load(asked.config_name)
    entries = list(loaded.entries.values())
    return _resolved(asked, entries, [], {"model.path": model}, Path(loaded.name).stem)


def _run(asked: Asked) -> RunDirectory:
    try:
        return runs.find_run(_runs_dir(asked), asked.policy)
    except (RunNotFound, NotARun) as error:
        raise RunNotFound(
            f"{error}\nto evaluate a model, name with --config what else it needs: sandboxes, format, lengths"
        ) from error


def _found(asked: Asked) -> RunDirectory | None:
    try:
        return runs.find_run(_runs_dir(asked), asked.policy)
    except OrchestrateError:
        return None


def _runs_dir(asked: Asked) -> Path:
    return cli_runs.runs_directory(asked.runs_dir)


def _resolved(
    asked: Asked, entries: list[Entry], problems: list[str], policy: dict[str, str], name: str
) -> Resolved:
    """The configuration with this evaluation's keys; what was typed wins over all but those."""
    given, wrong = split(from_assignments(asked.assignments))
    asks = {
        "data.validation": asked.data,
        "rollout.validation_rollouts": asked.samples,
        "evaluation.k": asked.ks or ",".join(map(str, dict.fromkeys((1, asked.samples)))),
        **policy,
    }
    usual = [Entry(key, value, "eval", WHERE) for key, value in _TRAINS_NOTHING.items()]
    mine = [Entry(key, value, "eval", WHERE) for key, value in asks.items()]
    return resolve([*entries, *usual, *given, *mine], [*problems, *wrong], f"eval-{name}")


# --- the tasks ---------------------------------------------------------------------------------------


def check_data(request: Request) -> None:
    """Have the trainer read the whole task file, where this machine has what that takes: a mistake in it is
    said now, and not after an hour in the queue. Raises ConfigError."""
    data = request.config.data
    source = data.validation
    if not source.startswith("builtin:") and not Path(source).is_file():
        raise ConfigError([f"--data: there is no {source}; give a parquet file of tasks, or builtin:NAME"])
    if find_spec("pyarrow") is None:
        return
    functions = [word for function in data.reward_functions for word in ("--function", function)]
    command = [sys.executable, "-m", "trainer.check", source, "--json", *functions]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_CHECK_TIMEOUT_S)
    if done.returncode == BAD_INPUT:
        raise ConfigError(_problems(done.stdout or done.stderr))


def _problems(text: str) -> list[str]:
    """What `trainer.check` says is wrong, a few of them."""
    try:
        said = json.loads(text)
    except ValueError:  # not a word about the tasks: it did not get so far
        return [f"--data: the check of the tasks failed: {text.strip()[-500:]}"]
    errors = [said["error"]] if "error" in said else said["errors"]
    more = [f"and {len(errors) - 5} more: `orchestrate data check` shows them"] if len(errors) > 5 else []
    return [f"--data: {error}" for error in errors[:5]] + more
