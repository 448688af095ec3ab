"""`orchestrate eval`: what is asked for wrongly is said before anything is done, and what is launched."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from memory_scheduler import MemoryScheduler
from rich.console import Console

from orchestrator import checkpoints, cli_eval, evaluations, resume, view
from orchestrator.checkpoints import NoCheckpoint, choose, keep_policy
from orchestrator.cli_commands import cli
from orchestrator.config import load
from orchestrator.contract import CompleteFlag, Evaluation, Outcome, Role, RunDirectory
from orchestrator.follow import Follower
from orchestrator.launch import Request, launch
from orchestrator.resume import CannotResume
from orchestrator.runs import view as look_at
from orchestrator.schedulers import JobState

Make = Callable[..., Request]
DATA = "builtin:lucky-seven"


def orchestrate(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(a) for a in arguments], prog_name="orchestrate")


def add_checkpoint(folder: Path, step: int, whole: bool = True) -> Path:
    """A checkpoint as the trainer writes it, as far as anybody but the trainer looks."""
    checkpoint = folder / f"step-{step:06d}"
    (checkpoint / "policy").mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (checkpoint / "policy" / name).write_text(f"{name} of {step}")
    size = (checkpoint / "policy" / "config.json").stat().st_size
    sizes = {"policy/config.json": size if whole else size + 1}
    (checkpoint / "state.json").write_text(json.dumps({"sizes": sizes}))
    return checkpoint


@pytest.fixture
def run(request_of: Make, memory: MemoryScheduler) -> RunDirectory:
    """A run that has two checkpoints, the earlier one the best, and settings of its own."""
    run = launch(request_of("rollout.max_turns=5", "trainer.loggers=[]", "trainer.resume=never"), memory).run
    for step in (2, 4):
        add_checkpoint(run.checkpoints, step)
    (run.checkpoints / "best").write_text("step-000002\n")
    (run.checkpoints / "latest").write_text("step-000004\n")
    return run


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def asked(policy: object, **changes: Any) -> cli_eval.Asked:
    usual = cli_eval.Asked(
        policy=str(policy),
        data=DATA,
        samples=4,
        ks="1,4",
        checkpoint=None,
        config_name=None,
        runs_dir=None,
        dry_run=True,
        follow=None,
        as_json=False,
        assignments=(),
    )
    return replace(usual, **changes)


# --- what is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--samples", "4", "--k", "1,8"], "pass@8 cannot be estimated from 4 sample(s)"),
        (["--k", "0,1"], "--k 0,1: write whole numbers from 1 on"),
        (["--k", "four"], "--k four: write whole numbers"),
        (["--checkpoint", "3"], "there are step-000002, step-000004; say best, latest or a step"),
        (["--config", "local"], "which brings its own configuration: leave out --config"),
        (["training.gpu_per_node=1"], "did you mean training.gpus_per_node"),
        (["--samples", "2", "rollout.validation_greedy=true"], "makes all 2 samples of a task the same"),
        (["--dry-run", "--follow"], "leave out --dry-run"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_done(
    run: RunDirectory, words: list[str], says: str
) -> None:
    before = sorted(run.root.parent.iterdir())
    done = orchestrate("eval", run.root, "--data", DATA, *words)
    assert done.exit_code == 2 and says in done.output, done.output
    assert sorted(run.root.parent.iterdir()) == before


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("/no/such.parquet", "--data: there is no /no/such.parquet"),
        ("builtin:nothing", "no built-in task family 'nothing'"),
        (__file__, "cannot be read as parquet"),
    ],
)
def test_tasks_that_cannot_be_read_are_refused(run: RunDirectory, data: str, says: str) -> None:
    done = orchestrate("eval", run.root, "--data", data)
    assert done.exit_code == 2 and says in done.output, done.output


def test_a_run_without_checkpoints_and_what_is_no_run_are_refused(run: RunDirectory) -> None:
    done = orchestrate("eval", "no-such-run", "--runs-dir", run.root.parent, "--data", DATA)
    assert done.exit_code == 2 and "begins or ends with 'no-such-run'" in done.output
    assert "to evaluate a model, name with --config" in done.output
    shutil.rmtree(run.checkpoints)
    done = orchestrate("eval", run.root, "--data", DATA)
    assert done.exit_code == 2 and "holds none" in done.output


def test_a_model_that_is_none_is_refused(tmp_path: Path, model: Path) -> None:
    words = ("--data", DATA, "--config", "local", f"run.runs_dir={tmp_path}/runs")
    (tmp_path / "empty").mkdir()
    for policy, more, says in (
        (tmp_path / "empty", (), "holds no config.json"),
        (tmp_path / "absent", (), "there is no"),
        (model, ("--checkpoint", "best"), "a model has none"),
    ):
        done = orchestrate("eval", policy, *words, *more)
        assert done.exit_code == 2 and says in done.output, done.output
    assert not (tmp_path / "runs").exists()


# --- what is launched --------------------------------------------------------------------------------


def test_a_dry_run_shows_what_is_evaluated_and_submits_nothing(run: RunDirectory) -> None:
    words = ("eval", run.root, "--data", DATA, "--samples", "8", "--k", "1,4,8", "--dry-run")
    done = orchestrate(*words)
    assert done.exit_code == 0, done.output
    assert f"pass@1, pass@4, pass@8 of {run.checkpoints}/step-000002, 8 samples a task" in done.output
    assert "episodes\n" not in done.output and len(list(run.root.parent.glob("2*"))) == 1
    plan = json.loads(orchestrate(*words, "--json").stdout)
    assert plan["evaluation"].startswith("pass@1") and len(plan["jobs"]) == 2


def test_it_is_the_configuration_of_the_run_with_the_evaluation_over_it(run: RunDirectory) -> None:
    found = cli_eval.of_run(asked(run.root, assignments=("rollout.temperature=0.6", "run.name=mine")))
    config = found.config
    assert config.rollout.max_turns == 5 and config.rollout.temperature == 0.6 and config.run.name == "mine"
    assert (config.evaluation.ks, config.rollout.validation_rollouts) == ([1, 4], 4)
    assert config.data.validation == DATA and config.evaluation.checkpoint.endswith("step-000002")
    assert found.origin("evaluation.k") == "orchestrate eval"
    assert "local.yaml" in found.origin("rollout.max_parallel_episodes")
    latest = cli_eval.of_run(asked(run.root, checkpoint="latest")).config.evaluation.checkpoint
    assert latest.endswith("step-000004")


def test_it_writes_nothing_into_the_run_that_it_evaluates(request_of: Make, memory: MemoryScheduler) -> None:
    folders = ("trainer.checkpoint_dir={}/c", "trainer.rollout_dir={}/r")
    root = Path(request_of().config.run.runs_dir).parent
    run = launch(request_of(*(text.format(root) for text in folders), "model.lora_rank=4"), memory).run
    add_checkpoint(root / "c", 7)
    config = cli_eval.of_run(asked(run.root)).config
    assert config.evaluation.checkpoint == f"{root}/c/step-000007"
    assert config.trainer.checkpoint_dir == config.trainer.rollout_dir == "" and not config.model.lora_rank


def test_a_model_comes_with_a_named_configuration(model: Path) -> None:
    found = cli_eval.of_model(asked(model, config_name="local"))
    assert found.config.model.path == str(model) and found.config.evaluation.checkpoint == ""
    assert found.config.rollout.max_turns == 2 and found.name == "eval-local"
    named = cli_eval.of_model(asked("Qwen/Qwen3-0.6B", config_name="local"))
    assert named.config.model.path == "Qwen/Qwen3-0.6B"


def test_the_policy_is_kept_for_a_job_that_starts_later(run: RunDirectory, memory: MemoryScheduler) -> None:
    request = Request(cli_eval.of_run(asked(run.root)))
    evaluating = launch(request, memory).run
    shutil.rmtree(run.checkpoints)
    assert (evaluating.evaluated / "model.safetensors").read_text() == "model.safetensors of 2"
    assert load_frozen(evaluating).evaluation.k == "1,4"


def load_frozen(run: RunDirectory) -> Any:
    return load(str(run.config)).config


def test_a_checkpoint_that_went_meanwhile_leaves_no_run(run: RunDirectory, memory: MemoryScheduler) -> None:
    request = Request(cli_eval.of_run(asked(run.root)))
    shutil.rmtree(run.checkpoints)
    before = sorted(run.root.parent.iterdir())
    with pytest.raises(NoCheckpoint, match="holds no policy"):
        launch(request, memory)
    assert sorted(run.root.parent.iterdir()) == before


def test_weights_are_linked_not_copied(tmp_path: Path) -> None:
    checkpoint = add_checkpoint(tmp_path, 1)
    keep_policy(checkpoint, tmp_path / "kept")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "kept" / name).samefile(checkpoint / "policy" / name)


def test_a_checkpoint_that_is_not_whole_is_none(tmp_path: Path) -> None:
    add_checkpoint(tmp_path, 1)
    add_checkpoint(tmp_path, 2, whole=False)
    assert (
        choose(tmp_path, "best", "a run") == choose(tmp_path, "newest", "a run") == tmp_path / "step-000001"
    )
    with pytest.raises(NoCheckpoint, match="no checkpoint '2' of a run: there are step-000001;"):
        choose(tmp_path, "2", "a run")


# --- how it looks ------------------------------------------------------------------------------------


def record(run: RunDirectory, **changes: Any) -> Evaluation:
    usual: dict[str, Any] = {"run_id": run.run_id, "attempt": 1, "tasks": 3, "samples": 4, "data": DATA}
    found = Evaluation(**usual | {"checkpoint": f"{run.checkpoints}/step-000002"} | changes)
    run.publish(run.evaluation, found)
    return found


def judge(run: RunDirectory, attempt: int, count: int) -> None:
    run.judged.mkdir(exist_ok=True)
    path = run.judged_by(attempt, 0)
    lines = path.read_text().splitlines() if path.exists() else ['{"about": {}}']
    path.write_text("\n".join([*lines, *(["{}"] * count)]) + "\n")


PASS = {
    "1": {"value": 0.625, "stderr": 0.03, "tasks": 3.0},
    "4": {"value": 1.0, "stderr": None, "tasks": 1.0},
    "8": {"value": None, "stderr": None, "tasks": 0.0},
}


def test_the_table_says_what_was_found_and_what_was_not(run: RunDirectory) -> None:
    found = record(run, complete=True, judged=10, lost=2, pass_at=PASS)
    text = view.lines(evaluations.rows(found)).plain
    assert f"step-000002 of {run.run_id}" in text and "3 tasks × 4 samples, temperature 1" in text
    assert "pass@1     62.5 % ± 3.0 " in text and "pass@4    100.0 % " in text
    assert "over 1 tasks that have 4 judged samples" in text and "no task has 8 judged samples" in text
    assert "2 of 12 episodes, to infrastructure" in text


def test_a_run_that_evaluates_shows_how_far_it_is_and_then_the_numbers(run: RunDirectory) -> None:
    record(run)
    judge(run, 1, 5)
    assert "judged 5 of 12 episodes (42%)" in orchestrate("status", run.root).output
    record(run, complete=True, judged=12, pass_at={"1": PASS["1"]})
    assert "62.5 % ± 3.0" in orchestrate("status", run.root).output
    shown = json.loads(orchestrate("status", run.root, "--json").stdout)
    assert shown["evaluation"]["pass_at"]["1"]["value"] == 0.625


def test_a_training_shows_nothing_of_that(run: RunDirectory) -> None:
    assert "evaluates" not in orchestrate("status", run.root).output
    assert "evaluation" not in json.loads(orchestrate("status", run.root, "--json").stdout)


def test_following_says_each_tenth(run: RunDirectory, memory: MemoryScheduler) -> None:
    console = Console(file=io.StringIO(), width=100)
    follower = Follower(run, console)
    record(run, tasks=25)
    for more in (0, 1, 4, 5, 40, 0):
        judge(run, 1, more)
        follower.show(look_at(run, memory))
    assert isinstance(console.file, io.StringIO)
    said = [line for line in console.file.getvalue().splitlines() if "judged" in line]
    assert [line.split("judged ")[1].split(" of")[0] for line in said] == ["0", "10", "50"]


def test_counting_reads_what_is_new_and_knows_all_lives(run: RunDirectory) -> None:
    progress = evaluations.Progress(run)
    assert progress.count() == 0
    judge(run, 1, 3)
    assert progress.count() == 3
    judge(run, 1, 2)
    judge(run, 2, 4)
    assert progress.count() == 9 == checkpoints.judged(run)


# --- another life ------------------------------------------------------------------------------------


def test_an_evaluation_is_resumed_from_what_is_judged(run: RunDirectory, memory: MemoryScheduler) -> None:
    evaluating = launch(Request(cli_eval.of_run(asked(run.root))), memory).run
    for role in (Role.RUNTIME, Role.TRAINING):
        memory.set(role, JobState.ENDED)
    flag = CompleteFlag(run_id=evaluating.run_id, attempt=1, nonce="n", outcome=Outcome.TIMEOUT)
    evaluating.publish(evaluating.complete_flag, flag)
    with pytest.raises(CannotResume, match="no checkpoint"):
        resume.prepare(evaluating, memory)
    judge(evaluating, 1, 70)
    shutil.rmtree(run.checkpoints)  # what it evaluates lies in its own directory
    prepared = resume.prepare(evaluating, memory)
    assert prepared.checkpoint == "judged-70" and prepared.plan.evaluation
    with pytest.raises(CannotResume, match="validation_rollouts may not change"):
        resume.prepare(evaluating, memory, ["rollout.validation_rollouts=8"])
