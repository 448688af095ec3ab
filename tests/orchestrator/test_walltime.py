"""When a trainer is asked for its last checkpoint: early enough for the saves that were measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
from jobkit import Pair
from memory_scheduler import MemoryScheduler

from orchestrator.contract import Outcome, Role, Saving
from orchestrator.schedulers import JobInfo, JobState, SchedulerError
from orchestrator.walltime import Walltime, needed

Make = Callable[..., Pair]


@dataclass
class Telling(MemoryScheduler):
    """A scheduler that says how long its one job has left; None: it does not know; an error: it is away."""

    left: list[int | SchedulerError | None] = field(default_factory=list)

    def query(self, job_ids: object, *, fresh: bool = False) -> dict[str, JobInfo]:
        self.queries += 1
        answer = self.left.pop(0) if len(self.left) > 1 else self.left[0]
        if isinstance(answer, SchedulerError):
            raise answer
        return {"1": replace(JobInfo("1", JobState.RUNNING), time_left_s=answer)}


def test_what_saves_need() -> None:
    assert needed(Saving(), 25, 14400) == 0, "nothing was measured yet"
    assert needed(Saving(save_s=120, busy_s=40), 25, 14400) == 2 * 120 + 40 + 25 + 5
    assert needed(Saving(save_s=120), 25, 300) == 150, "half of the time is for training"
    assert needed(Saving(save_s=1), 25, 0) == 32, "a limit that nobody knows is no bound"


def test_a_lead_is_only_ever_raised() -> None:
    clock = Walltime(Telling(left=[1000]), "1", 90)
    assert not clock.raise_lead(0) and not clock.raise_lead(90) and clock.lead_s == 90
    assert clock.raise_lead(300) and not clock.raise_lead(200) and clock.lead_s == 300


def test_a_raised_lead_is_asked_about_at_once() -> None:
    scheduler = Telling(left=[400, 400])
    clock = Walltime(scheduler, "1", 90)
    assert clock.probe() is None and clock.probe() is None and scheduler.queries == 1
    clock.raise_lead(350)
    assert clock.probe() is None and scheduler.queries == 2
    clock.raise_lead(500)
    assert clock.probe() == "400 s are left of the walltime" and clock.left_s == 400


@pytest.mark.parametrize("answer", [None, SchedulerError("the controller is away")])
def test_where_the_scheduler_says_nothing_our_own_clock_does(answer: SchedulerError | None) -> None:
    """But only of a lead that the scheduler's own warning does not have."""
    clock = Walltime(Telling(left=[answer]), "1", 90, limit_s=100)
    if answer is None:
        assert clock.probe() is None
    else:
        with pytest.raises(SchedulerError):
            clock.probe()
    clock.raise_lead(99)
    assert clock.probe() is None
    clock.raise_lead(101)
    assert clock.probe() == "100 s are left of the walltime"


SLOW_TO_SAVE = """
checkpoints = run / "training" / "checkpoints"
if (checkpoints / "step-1").exists():
    sys.exit(0)
def save(*_):
    time.sleep(2)
    (checkpoints / "step-1").mkdir(parents=True)
    sys.exit(85)
signal.signal(signal.SIGUSR1, save)
(run / "training" / "saving.json").write_text('{"save_s": 2.0, "busy_s": 0.5}')
up()
time.sleep(1000)
"""


@pytest.mark.slow
def test_a_save_that_is_longer_than_the_signals_lead_gets_its_time(make: Make) -> None:
    """The scheduler would warn half a second before the end: too late for a save of two."""
    pair: Pair = make(SLOW_TO_SAVE)
    pair.launch(time_limit_s=12, signal="USR1@1")
    pair.all_over(30)
    result = pair.result()
    assert result is not None and result.outcome == Outcome.SUCCESS, pair.logs()
    ended = [event.data["outcome"] for event in pair.run.timeline() if event.what == "training.ended"]
    assert ended == [Outcome.REQUEUED, Outcome.SUCCESS]
    assert pair.events_of("training.lead_raised")[0]["lead_s"] == 6.0, "half of the time limit"
    assert "saves took up to 2.0 s" in pair.logs()
    (near,) = pair.events_of("training.walltime_near")
    assert "left of the walltime" in near["reason"] and pair.record(pair.ids[Role.TRAINING]).restarts == 1
