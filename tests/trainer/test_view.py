"""Trajectories in a terminal: what is shown, what is chosen, and that no output can drive the terminal."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.contract import Manifest, RunDirectory
from trainer.episode import Episode, Failure, Status, Used
from trainer.view import main, write_rollouts
from trainer.view_text import BAR, bar, chosen, excerpt


def episode(task: str, reward: float, number: int = 0, status: Status = Status.OK) -> Episode:
    made = Episode.start(task, number // 2, [1] * 40)
    made.number, made.prompt = number, "Fix the bug."
    turn = made.sampled([2] * 10, [-0.1] * 10, "cat a.py<end>", "stop", [(0, 3)])
    turn.used = [Used("bash", exit_code=1, seconds=0.25), Used("", problem="not valid JSON\nWrite it so")]
    made.observed([3] * 20, "\x1b]0;owned\x07\x1b[31mred\ttab\r\n")
    made.sampled([2] * 5, [-0.1] * 5, "submit", "length", [(0, 4)])
    made.timings = {"create_s": 0.5, "generate_s": 1.25, "total_s": 2.0}
    return made.finish(reward, status, "the hidden test failed", Failure.TURNS if reward < 1 else None)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    made = RunDirectory.create(tmp_path / "runs")
    made.publish(made.manifest, Manifest(run_id=made.run_id, scheduler="local"))
    episodes = [episode("a", 1.0), episode("b", 0.0, 1), episode("c", 0.5, 2, Status.TRUNCATED)]
    write_rollouts(made.rollouts, 3, episodes)
    write_rollouts(made.rollouts, 5, [*episodes, episode("d", 0, 3, Status.INFRA)])
    write_rollouts(made.rollouts, 4, episodes[:1], "validation")
    return made


def show(run: RunDirectory, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert main([str(run.root), *options]) == 0
    return capsys.readouterr().out


def test_the_newest_step_turn_by_turn(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    text = show(run, capsys)
    head = text.splitlines()[0]
    assert "step 5   4 episodes (2 ok, 1 truncated, 1 infra)" in head and "mean reward 0.500" in head
    assert "● a   reward 1   ok   group 0   weights 3 to 4" in text
    assert "create 0.50 s   generate 1.25 s   total 2.00 s" in text
    assert "│ Fix the bug." in text and "turn 1  10 tokens" in text and "cut off" in text
    assert "↳ bash  exit 1  0.25 s" in text and "not valid JSON" in text and "Write it so" not in text
    assert "judge │ the hidden test failed" in text and "█ sampled, trained on" in text
    assert "c   reward 0.5   truncated (turns)" in text
    assert "\x1b" not in text and "owned" not in text and "red tab" in text


def test_a_step_a_task_a_validation_or_everything(
    run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "step 3   3 episodes" in show(run, capsys, "--step", "3")
    assert "1 episodes (1 ok)" in show(run, capsys, "--task", "b")
    assert "validation 4   1 episodes" in show(run, capsys, "--validation")
    assert show(run, capsys, "--all").count("judge │") == 4 and show(run, capsys).count("judge │") == 3
    lines = json.loads(show(run, capsys, "--json", "--task", "a"))
    assert lines[0]["mask"] == "p40 a10 o20 a5" and lines[0]["turns"][0]["used"][0]["tool"] == "bash"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--step", "9"), "no step 9 in"),
        (("--task", "x"), "no task 'x' in step 5; there are a, b, c, d"),
    ],
)
def test_what_is_not_there_is_said(
    run: RunDirectory, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], says: str
) -> None:
    assert main([str(run.root), *options]) == 1
    assert says in capsys.readouterr().err


def test_no_trajectories_yet_and_those_that_are_elsewhere(
    run: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run.config.write_text(f"trainer: {{rollout_dir: {tmp_path / 'elsewhere'}}}\n")
    assert main([str(run.root)]) == 1 and "written after each step" in capsys.readouterr().err
    write_rollouts(tmp_path / "elsewhere", 0, [episode("a", 1.0)])
    assert "step 0   1 episodes" in show(run, capsys)


def test_by_the_run_s_name(run: RunDirectory) -> None:
    command = [sys.executable, "-m", "orchestrator", "rollouts", run.run_id]
    command += ["--runs-dir", str(run.root.parent)]
    found = subprocess.run([*command, "--step=3"], capture_output=True, text=True, timeout=60)
    assert found.returncode == 0 and "step 3   3 episodes" in found.stdout
    missing = subprocess.run([*command, "--step=7", "--json"], capture_output=True, text=True, timeout=60)
    assert missing.returncode == 1 and "there are 3, 5" in missing.stderr


def test_looking_at_trajectories_loads_no_torch(run: RunDirectory) -> None:
    code = f"import sys, trainer.view as v; v.main([{str(run.root)!r}]); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60).returncode == 0


def test_a_strip_shows_every_part() -> None:
    text = bar("p1000 a1 o10000 a2").plain
    assert text.startswith("░") and text.count("█") == 2 and BAR <= len(text.split("  ")[0]) <= BAR + 4


def test_long_texts_keep_head_and_tail() -> None:
    lines = list(excerpt("\n".join(map(str, range(100)))))
    assert lines[0] == "0" and lines[-1] == "99" and "… 76 lines …" in lines
    assert "… 840 more" in next(iter(excerpt("x" * 1000))) and list(excerpt(" \n")) == []


def test_one_episode_is_not_shown_twice() -> None:
    only = {"status": "ok", "reward": 1.0}
    assert chosen([only]) == [only] and chosen([]) == []
