"""How the command line has the trainer do what only it can: with this interpreter, as a command.

What it does not do
    No import: the trainer is another package, which not every login node has.
"""

from __future__ import annotations

import subprocess
import sys


def run(module: str, *arguments: str) -> int:
    """The exit code of `python -m trainer.MODULE ARGUMENTS`; what it prints goes where ours goes."""
    return subprocess.run([sys.executable, "-m", f"trainer.{module}", *arguments], check=False).returncode
