"""What `test_checkpoint.py` kills: `python saver.py FOLDER [background]`.

For each step number on standard input it forks a child that saves the following steps for ever, saying
its pid first and then every step that is finished. It forks because importing torch takes seconds, and
from a process of its own because a fork of the test's would inherit the locks that its threads hold.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from training_kit import small_learner

from orchestrator.schema import Config
from trainer.checkpoint import Checkpoints, capture
from trainer.learner import Learner


def save_for_ever(store: Checkpoints, learner: Learner, step: int, wait: bool) -> None:
    def say(path: Path, _seconds: float) -> None:
        print(int(path.name.rpartition("-")[2]), flush=True)

    print(os.getpid(), flush=True)
    for following in range(step + 1, step + 1000):
        progress = capture(following, {"epoch": 1, "position": 2, "size": 4, "seed": 0}, Config())
        store.save(learner, progress, wait=wait, say=say)


if __name__ == "__main__":
    store = Checkpoints(Path(sys.argv[1]), keep=2)
    learner = small_learner()
    for line in sys.stdin:
        if (child := os.fork()) == 0:
            try:
                save_for_ever(store, learner, int(line), "background" not in sys.argv)
            finally:
                os._exit(1)
        print("killed by", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
