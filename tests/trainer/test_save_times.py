"""How long checkpoints take is measured, kept over lives, and never lost to a smaller number."""

from __future__ import annotations

from pathlib import Path

from training_kit import new_run, small_config, trained

from orchestrator.contract import RunDirectory, Saving, read_json_lines
from trainer.saving import SaveTimes


def saving_of(run: RunDirectory) -> Saving:
    found = run.read(run.saving, Saving)
    assert found is not None
    return found


async def test_a_training_says_what_its_saves_and_updates_take(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    await trained(run, small_config(tmp_path, total_steps=2, save_every=1))
    found, rows = saving_of(run), read_json_lines(run.metrics)
    seconds = [event.data["seconds"] for event in run.timeline() if event.what == "training.checkpoint"]
    assert len(seconds) == 2 and abs(found.save_s - max(seconds)) < 0.001
    assert found.busy_s == max(row["time/total"] - row["time/rollout"] for row in rows) > 0


def test_the_longest_of_all_lives_counts(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    first = SaveTimes(run)
    first.worked(3.0)
    first.saved(8.0)
    first.saved(2.0)
    assert saving_of(run) == Saving(save_s=8.0, busy_s=3.0)
    second = SaveTimes(run)
    second.worked(4.0)
    second.saved(1.0)
    assert saving_of(run) == Saving(save_s=8.0, busy_s=4.0)


def test_what_cannot_be_written_down_stops_nothing(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    times = SaveTimes(run)
    run.training.rename(tmp_path / "away")
    times.saved(1.0)
    assert times.longest.save_s == 1.0 and not run.saving.exists()
