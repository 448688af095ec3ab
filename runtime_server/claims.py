"""Who may take over the sandboxes of a killed server: the same server of the same job on the same node.

What it is
    `claim_of` names that; `comes_back` tells the sweep whose leftovers it must not touch: those of a job that
    starts its server again. They hold a minute without a server, then the sandboxes end by themselves.

What it does not do
    It takes nothing over (`adoption.py`), and removes nothing (`engines/state.py`).
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

from orchestrator.contract import ContractError, Env, Exit, JobStatus, Role, RunDirectory
from runtime_server.engines.state import inhabited, leftovers


def claim_of(run: RunDirectory, server: str = "") -> str:
    """By the job that is around us, if there is one."""
    return "\n".join((str(run.root.resolve()), os.environ.get(Env.JOB_ID, ""), socket.gethostname(), server))


def comes_back(claim: str) -> bool:
    """Whether somebody may still come for it. Our own job knows; of others it is not known."""
    if not claim:
        return False
    folder, _, rest = claim.partition("\n")
    job = rest.partition("\n")[0]
    if not job or job != os.environ.get(Env.JOB_ID) or not _is_ours(folder):
        return True
    try:
        status = RunDirectory(Path(folder)).read(RunDirectory(Path(folder)).status(Role.RUNTIME), JobStatus)
    except (ContractError, OSError):
        return True
    over = status is not None and status.phase == "ended" and status.exit_code != Exit.AGAIN
    return not (over and status is not None and status.nonce == os.environ.get(Env.NONCE, status.nonce))


def _is_ours(folder: str) -> bool:
    named = os.environ.get(Env.RUN_DIR, "")
    return bool(named) and str(Path(named).resolve()) == folder


def remains() -> list[Path]:
    """What a sweep would remove."""
    return [path for path, claim in leftovers().items() if not comes_back(claim) or not inhabited(path)]
