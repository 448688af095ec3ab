"""Task families that are made, not downloaded: `builtin:NAME` in `data.train` and `data.validation`.

What it is
    `FAMILIES`: a name, and a function that makes the tasks; the same ones on every machine.
        lucky-seven                one digit, learned by acting: the demo
        shell, shell-validation    one shell command each, from templates; held-out templates
        repositories, repositories-validation
                                   small Python repositories with a bug; held-out kinds of bugs

How to use it
    tasks = FAMILIES["lucky-seven"]()
    python -m trainer.tasks write lucky-seven OUT.parquet

What it does not do
    It reads no file and runs nothing.
"""

from __future__ import annotations

from collections.abc import Callable

from trainer.families import repositories, shell
from trainer.tasks import Task, lucky_seven

FAMILIES: dict[str, Callable[[], list[Task]]] = {
    "lucky-seven": lucky_seven,
    "repositories": repositories.training,
    "repositories-validation": repositories.validation,
    "shell": shell.training,
    "shell-validation": shell.validation,
}
