"""why, doctor, reap, resume and drill on a real Slurm, typed by an ordinary user on the login host."""

from __future__ import annotations

import json
from typing import Any

import pytest
from cluster import Cluster
from slurmkit import Launches

from orchestrator.contract import Result
from orchestrator.schedulers.site import read_site

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


@pytest.fixture
def launches(cluster: Cluster) -> Launches:
    return Launches(cluster)


def answer(launches: Launches, *argv: object, timeout: float = 90) -> dict[str, Any]:
    done = launches.orchestrate(*argv, "--json", timeout=timeout)
    assert done.stdout.startswith("{"), done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_why_explains_a_queue_that_never_moves_and_a_failure(launches: Launches) -> None:
    stuck = launches.start("runtime.nodes=99")
    first = answer(launches, "why", stuck.root)["findings"][0]
    assert first["about"] == "runtime" and "too many nodes" in first["text"], first
    assert first["command"].startswith("sinfo -p test ")
    launches.orchestrate("cancel", stuck.root)
    failed = launches.start(TRAINER_DOES="fail")
    launches.ended(failed)
    findings = answer(launches, "why", failed.root)["findings"]
    assert findings[0]["severity"] == "problem" and "exited with code 7" in json.dumps(findings)


def test_doctor_looks_at_the_site_and_by_probes_at_its_nodes(launches: Launches) -> None:
    groups = answer(
        launches,
        *("doctor", "-c", "dev", "--probe", "--timeout", "60", f"run.runs_dir={launches.runs_dir}"),
        timeout=120,
    )["groups"]
    site = {check["name"]: check for check in groups["site"]}
    assert site["controller"]["level"] == "ok" and "gpu_test" in site["training partition"]["text"], site
    between = {check["name"]: check["level"] for check in groups["between them"]}
    assert between == dict.fromkeys(("port", "clocks", "new file", "replaced file", "removed file"), "ok")
    hosts = [name for name in groups if "node (" in name]
    assert len(hosts) == 2 and "(cpu" in hosts[0] and "(gpu" in hosts[1]
    assert not (launches.runs_dir / ".doctor").exists()
    assert "doctor" not in launches.cluster.run(["squeue", "-h", "-o", "%j"], check=True).stdout


def test_reap_finds_the_held_job_of_a_dead_launch_and_resume_goes_on(launches: Launches) -> None:
    run = launches.start("runtime.nodes=99")
    (job,) = [j for j in launches.status(run)["jobs"] if j["role"] == "runtime"]
    launches.cluster.run(["scancel", job["job_id"]], check=True)  # while pending: no trap runs anywhere
    found = answer(launches, "reap", run.root)
    (left,) = [item for item in found["leftovers"] if item["kind"] == "job"]
    assert left["role"] == "training" and "runtime job" in left["why"]
    removed = answer(launches, "reap", run.root, "--yes")["removed"]
    assert [item["problem"] for item in removed if item["kind"] == "job"] == [""]
    result = run.read(run.result, Result)
    assert result is not None and result.outcome == "cancelled"
    refused = launches.orchestrate("resume", run.root)
    assert refused.returncode == 2 and "--from-scratch" in refused.stderr
    smaller = ("runtime.nodes=1",)
    done = launches.orchestrate("resume", run.root, "--from-scratch", *smaller)
    assert done.returncode == 0, done.stdout + done.stderr
    assert launches.ended(run)["state"] == "success", launches.logs(run)
    launches.nothing_left(run)


def test_a_drill_kills_the_runtime_job_through_the_scheduler(launches: Launches) -> None:
    run = launches.start(TRAINER_DOES="hang")
    launches.cluster.wait(lambda: (run.training / "up").exists(), 60, launches.logs(run))
    elsewhere = launches.orchestrate("drill", run.root, "--kill", "server", "--yes")
    assert elsewhere.returncode == 2 and "--kill runtime" in elsewhere.stderr, elsewhere.stderr
    would = answer(launches, "drill", run.root, "--kill", "runtime")
    assert would["job_id"] and would["acted"] is False
    launches.orchestrate("cancel", run.root)
    launches.nothing_left(run)


def test_the_site_is_read_from_the_real_commands(cluster: Cluster) -> None:
    from slurmkit import Over

    site = read_site(Over(cluster))
    assert not site.problem and {"test", "gpu_test"} <= site.partitions.keys()
    assert sum(site.partitions["gpu_test"].gpus.values()) >= 1 and site.partitions["test"].working >= 1
