"""The server in a Slurm job of an ordinary user, on a node that has never seen the image."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from runtime_server import archives
from runtime_server.images import DEFAULT_IMAGE, default_store, ensure
from tests.cluster.cluster import Cluster

pytestmark = [pytest.mark.cluster, pytest.mark.container]
CHECKOUT = Path(__file__).resolve().parents[2]

# Starts a server, makes a sandbox by the line that it prints, ends it, and shows what it left.
_JOB = """
export PYTHONPATH={checkout} PYTHONDONTWRITEBYTECODE=1
cd "$(mktemp -d)" && {python} -m runtime_server.images ensure --from {archive} || exit
mkfifo said
{python} -m runtime_server >said & server=$!
while read -r word rest; do [ "$word" = try: ] && break; done <said
sh -c "$rest"; echo
kill "$server"; wait "$server"; echo "ended with $?"
find /dev/shm /var/tmp -mindepth 1 -maxdepth 1 -user "$(id -u)" -newer said
"""


def test_a_job_serves_sandboxes(cluster: Cluster) -> None:
    ensure(default_store())
    archive, job = cluster.shared / "sandbox.tar", cluster.shared / "serve.sh"
    archives.save(default_store(), DEFAULT_IMAGE, archive)
    paths = {"checkout": CHECKOUT, "python": Path(sys.executable), "archive": archive}
    job.write_text(_JOB.format(**{name: shlex.quote(str(path)) for name, path in paths.items()}))
    job.chmod(0o644)
    done = cluster.run(["srun", "-p", "test", "timeout", "90", "bash", str(job)], timeout=110)
    assert done.returncode == 0, done.stderr
    assert "loading" in done.stdout and '"state":"running"' in done.stdout
    assert done.stdout.splitlines()[-1] == "ended with 0"
