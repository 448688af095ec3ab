"""The plan: pure, complete, and strict about numbers that contradict each other."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path

import pytest

from orchestrator.config import load
from orchestrator.errors import PlanError
from orchestrator.plan import Context, Plan, environment_file, make_plan

RUN = Path("/runs/20261121_101500_abc123")
CONTEXT = Context(run_dir=RUN, code=RUN / "code", python="/venv/bin/python", environ={"PATH": "/bin"})


LARGE = (
    *("training.nodes=2", "training.gpus_per_node=8", "training.cpus=64", "training.memory=512G"),
    *(
        "rollout.tensor_parallel_size=2",
        "training.time_limit=1-12:00:00",
        "runtime.time_limit=2-00:00:00",
        "runtime.cpus=64",
    ),
    *("runtime.memory=512G", "runtime.max_parallel_sandboxes=256", "rollout.max_parallel_episodes=256"),
)
"""Two nodes of eight GPUs, where several numbers differ from each other and from 1."""


def plan(*assignments: str, config: str = "large", mode: str = "run") -> Plan:
    if config == "large":
        return plan(*LARGE, *assignments, config="production", mode=mode)
    context = Context(CONTEXT.run_dir, CONTEXT.code, CONTEXT.python, mode=mode, environ=CONTEXT.environ)
    return make_plan(load(config, assignments).config, context)


def headers(script: str) -> list[str]:
    """As sbatch reads them: quotes as in a shell."""
    lines = [line for line in script.splitlines() if line.startswith("#SBATCH ")]
    return [word for line in lines for word in shlex.split(line)[1:]]


def test_the_training_job_goes_first_and_is_held() -> None:
    training, runtime = plan().jobs
    assert (training.role, training.held, training.after) == ("training", True, None)
    assert (runtime.role, runtime.held, runtime.after) == ("runtime", False, None)


def test_with_a_plain_dependency_the_runtime_job_goes_first() -> None:
    runtime, training = plan("scheduler.start_policy=after").jobs
    assert runtime.role == "runtime"
    assert (training.held, training.after) == (False, "runtime")


@pytest.mark.parametrize(("mode", "role"), [("runtime-only", "runtime"), ("runtime-url", "training")])
def test_one_job_alone_waits_for_nobody(mode: str, role: str) -> None:
    (job,) = plan(mode=mode).jobs
    assert (job.role, job.held, job.after) == (role, False, None)


def test_the_script_for_slurm_says_everything() -> None:
    job = plan(
        "training.partition=gpu",
        "training.gpu_type=a100",
        "scheduler.account=lab",
        "scheduler.extra_args=[--exclusive]",
    ).job("training")
    lines = headers(job.script)
    assert lines == job.args
    for expected in (
        "--job-name=production-training",
        "--nodes=2",
        "--ntasks-per-node=1",
        "--cpus-per-task=64",
        "--mem=524288M",
        "--time=1-12:00:00",
        "--partition=gpu",
        "--gres=gpu:a100:8",
        "--account=lab",
        "--signal=B:USR1@300",
        "--requeue",
        "--open-mode=append",
        f"--output={RUN}/training_%j.out",
        "--export=ALL",
        "--exclusive",
    ):
        assert expected in lines
    assert job.script.startswith("#!/bin/bash\n#SBATCH ")
    assert job.script.splitlines()[-1] == f"exec bash {RUN}/code/jobs/training.sh {RUN}"


def test_the_header_survives_an_odd_directory() -> None:
    run = Path("/runs/it's 100% #1/x")
    job = make_plan(load("dev").config, Context(run, run / "code", "python")).job("runtime")
    assert headers(job.script) == job.args
    assert "--output=/runs/it's 100%% #1/x/runtime_%j.out" in job.args and f"--chdir={run}" in job.args


def test_a_directory_that_would_break_the_header_is_refused() -> None:
    run = Path("/runs/x\nrm -rf y")
    with pytest.raises(PlanError, match="no control character, also not in paths"):
        make_plan(load("dev").config, Context(run, run / "code", "python"))


def test_licences_and_the_like_are_passed_on() -> None:
    extra = ["--licenses=matlab:1", "--nice", "--nodelist=n1", "-x", "--mem-bind=local"]
    assert plan(f"scheduler.extra_args={json.dumps(extra)}").job("runtime").args[-5:] == extra


def test_how_a_job_is_submitted_by_hand() -> None:
    held, later = plan().job("training"), plan("scheduler.start_policy=after").job("training")
    assert f"# By hand: sbatch --hold {RUN}/training.sbatch" in held.script
    assert f"# By hand: sbatch --dependency=after:RUNTIME_JOB_ID {RUN}/training.sbatch" in later.script


def test_the_logs_of_an_array_are_named_by_task() -> None:
    made = plan("scheduler.on_timeout=array")
    assert f"--output={RUN}/training_%A_%a.out" in made.job("training").args
    assert f"--output={RUN}/runtime_%j.out" in made.job("runtime").args


def test_the_runtime_job_asks_for_no_gpu() -> None:
    job = plan("training.gpu_type=a100").job("runtime")
    assert not any("gpu" in line or "gres" in line for line in headers(job.script))


def test_a_token_finds_the_job_again() -> None:
    tokens = {job.token for job in plan().jobs}
    assert tokens == {f"{RUN.name}.training", f"{RUN.name}.runtime"}
    assert any("token=" in line for line in headers(plan().jobs[0].script))


@pytest.mark.parametrize(
    ("policy", "expected"), [("requeue", "--requeue"), ("stop", "--no-requeue"), ("array", "--array=1-11%1")]
)
def test_what_happens_at_the_walltime(policy: str, expected: str) -> None:
    assert expected in plan(f"scheduler.on_timeout={policy}").job("training").args


def test_a_local_script_reads_as_prose() -> None:
    job = plan(config="local").job("training")
    assert "#SBATCH" not in job.script and job.args == []
    assert "2 CPUs, 10240 MiB, 0 GPUs, at most 00:30:00" in job.script


def test_scripts_are_bash_even_in_an_odd_directory() -> None:
    run = Path("/runs/it's $(here)/x")
    made = make_plan(load("local").config, Context(run, run / "code", "python"))
    for job in made.jobs:
        subprocess.run(["bash", "-n"], input=job.script, text=True, check=True, timeout=20)
        assert shlex.split(job.script.splitlines()[-1])[2:] == [f"{run}/code/jobs/{job.role}.sh", str(run)]


def test_several_gpus_and_nodes_are_no_reason_to_warn() -> None:
    assert plan(config="dev").gpus == 2
    assert not plan("training.nodes=2", "training.gpus_per_node=8", config="dev").warnings


def test_several_servers() -> None:
    planned = plan("runtime.nodes=3", "runtime.ready_nodes=2", config="dev")
    assert (planned.settings.runtime_nodes, planned.settings.runtime_ready_nodes) == (3, 2)
    assert "--no-kill" in planned.job("runtime").args and "--no-kill" not in planned.job("training").args
    assert "--no-kill" not in plan(config="dev").job("runtime").args
    assert not plan(config="dev").warnings


def test_effective_gpus() -> None:
    made = plan()
    assert (made.gpus, made.copies, made.episodes_per_step) == (16, 8, 512)
    assert (plan(config="local").gpus, plan(config="local").copies) == (0, 1)
    assert plan(mode="runtime-only").gpus == 0


def test_the_jobs_get_their_settings() -> None:
    settings = plan("runtime.ready_timeout=7m", "runtime.drain_timeout=40").settings
    assert (settings.ready_timeout, settings.stop_timeout, settings.max_restarts) == (420, 45, 10)
    assert plan("trainer.checkpoint_dir=/big/x").settings.checkpoint_dir == "/big/x"


def test_a_plan_is_the_same_twice_and_json() -> None:
    assert plan() == plan()
    json.dumps(plan().as_dict())


# --- contradictions ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("assignments", "says"),
    [
        (["rollout.tensor_parallel_size=3"], "set it to 1 or 2 or 4 or 8"),
        (
            ["training.gpus_per_node=0", "rollout.kv_cache_bytes=null"],
            "set rollout.kv_cache_bytes=1073741824",
        ),
        (["trainer.sequence_parallel_size=3"], "does not divide the 16 GPUs of the training job"),
        (["rollout.max_tokens_per_turn=99999"], "set rollout.max_tokens_per_turn=24576 or less"),
        (["trainer.micro_batch_tokens=1000"], "set trainer.micro_batch_tokens=32768 or more"),
        (["trainer.minibatches=1000"], "set trainer.minibatches=512 or less"),
        (
            ["rollout.prompts_per_step=4", "rollout.rollouts_per_prompt=1"],
            "leave some of 16 training replicas without work: set rollout.rollouts_per_prompt=4 or more",
        ),
        (["rollout.turn_timeout=2h"], "set rollout.turn_timeout=3600 or less"),
        (["runtime.time_limit=200", "runtime.ready_timeout=60"], "scheduler.signal=USR1@50"),
        (["runtime.ready_timeout=3-00:00:00"], "set runtime.ready_timeout lower"),
        (["runtime.sandbox.memory=1T"], "set runtime.sandbox.memory="),
        (["runtime.sandbox.cpus=65"], "set runtime.sandbox.cpus=64 or less"),
        (["scheduler.kind=local"], "training.nodes=2, but the local scheduler is one machine"),
        (["runtime.ready_nodes=9"], "runtime.ready_nodes=9 is more than the runtime job has"),
        (["scheduler.kind=local", "runtime.nodes=2", "runtime.port=80"], "cannot share port 80"),
        (
            ["scheduler.kind=local", "training.nodes=1", "scheduler.on_timeout=array"],
            "set scheduler.on_timeout=",
        ),
        (["training.gpus_per_node=0", "training.gpu_type=a100"], "set training.gpus_per_node=1"),
        (["scheduler.extra_args=[--mem=4G]"], "set runtime.memory and training.memory instead"),
        (
            ["scheduler.extra_args=[--job=x]"],
            "--job=x contradicts what the launcher says itself; set run.name",
        ),
        (["scheduler.extra_args=[-t5]"], "set runtime.time_limit and training.time_limit instead"),
        (["scheduler.extra_args=[--signal=B:USR2@5]"], "set scheduler.signal instead"),
        (["scheduler.extra_args=[--wrap=x]"], "leave it out: the launcher needs it as it is"),
        (["scheduler.extra_args=[-L, 'a:1']"], "'a:1' is no option of sbatch: write each one as a whole"),
        (["scheduler.extra_args=['--nice=5\\nrm -rf x']"], "write each one as a whole"),
    ],
)
def test_contradictions_are_refused_and_the_fix_is_named(assignments: list[str], says: str) -> None:
    with pytest.raises(PlanError) as caught:
        plan(*assignments)
    assert any(says in problem for problem in caught.value.problems), caught.value.problems


def test_all_contradictions_at_once() -> None:
    with pytest.raises(PlanError) as caught:
        plan("rollout.tensor_parallel_size=3", "trainer.minibatches=1000")
    assert len(caught.value.problems) >= 2


@pytest.mark.parametrize("config", ["local", "dev", "production"])
def test_the_configurations_of_the_project_give_no_warning(config: str) -> None:
    assert plan(config=config).warnings == []


@pytest.mark.parametrize(
    ("assignment", "says"),
    [
        ("rollout.max_parallel_episodes=999", "999 episodes at once share 256 sandboxes"),
        ("runtime.max_parallel_sandboxes=9999", "of their node"),
        ("runtime.time_limit=1h", "before the training job's 1-12:00:00"),
        ("runtime.drain_timeout=90", "KillWait"),
    ],
)
def test_worries_are_told(assignment: str, says: str) -> None:
    assert any(says in warning for warning in plan(assignment).warnings)


# --- the environment of the jobs ---------------------------------------------------------------------


def sourced(text: str, as_name: str, variable: str, tmp_path: Path) -> str:
    """What a stub of this name sees in a variable after it sourced env.sh."""
    (tmp_path / "env.sh").write_text(text)
    stub = tmp_path / as_name
    stub.write_text(f'. {tmp_path}/env.sh\nprintf %s "${variable}"')
    done = subprocess.run(["bash", str(stub)], capture_output=True, text=True, check=True, timeout=20, env={})
    return done.stdout


def test_env_file_survives_any_value(tmp_path: Path) -> None:
    odd = "a'b\"c $(touch /tmp/x) `id` \\ \n é"
    text = environment_file(load("local").config, CONTEXT, {"SECRET": odd})
    assert sourced(text, "runtime.sh", "SECRET", tmp_path) == odd


def test_each_job_has_its_own_interpreter_and_set_up(tmp_path: Path) -> None:
    config = load(
        "local", ["training.python=/opt/python", "training.setup_commands=[export MODULE=cuda]"]
    ).config
    text = environment_file(config, CONTEXT, {})
    assert sourced(text, "training.sh", "ORCHESTRATE_PYTHON", tmp_path) == "/opt/python"
    assert sourced(text, "runtime.sh", "ORCHESTRATE_PYTHON", tmp_path) == "/venv/bin/python"
    assert sourced(text, "training.sh", "MODULE", tmp_path) == "cuda"
    assert sourced(text, "runtime.sh", "MODULE", tmp_path) == ""


def test_the_snapshot_goes_before_the_own_path(tmp_path: Path) -> None:
    config = load(
        "local", ["environment.variables.PYTHONPATH=/mine", "environment.network_provider=tcp"]
    ).config
    text = environment_file(config, CONTEXT, {"A": "file"})
    assert sourced(text, "runtime.sh", "PYTHONPATH", tmp_path) == f"{RUN}/code:/mine"
    assert sourced(text, "runtime.sh", "FI_PROVIDER", tmp_path) == "tcp"


def test_set_up_commands_find_the_functions_of_a_login_shell(tmp_path: Path) -> None:
    """`module` and `conda activate` are functions; env.sh is read by a shell that has none."""
    for path, text in {
        "modules/init/bash": "module() { export LOADED=$2; }",
        "conda/etc/profile.d/conda.sh": "conda() { export ACTIVE=$2; }",
        "bin/conda": f"#!/bin/sh\necho {tmp_path}/conda",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    (tmp_path / "bin/conda").chmod(0o755)
    config = load("local", ['training.setup_commands=["module load cuda/12", "conda activate rl"]']).config
    stub = tmp_path / "training.sh"
    stub.write_text(
        "set -u\n" + environment_file(config, CONTEXT, {}) + '\necho "$LOADED $ACTIVE $ORCHESTRATE_PYTHON"'
    )
    shell = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "MODULESHOME": str(tmp_path / "modules")}
    done = subprocess.run(["bash", stub], env=shell, capture_output=True, text=True, timeout=20, check=True)
    assert done.stdout.split()[:2] == ["cuda/12", "rl"] and not done.stderr


@pytest.mark.parametrize(
    ("assignments", "words"),
    [
        (
            ["training.nodes=2", "training.launcher=none"],
            "set training.launcher=torchrun, or training.nodes=1",
        ),
        (["training.gpus_per_node=2", "training.launcher=none"], "or training.gpus_per_node=1"),
        (["training.gpus_per_node=8", "training.cpus=4"], "set training.cpus=8 or more"),
    ],
)
def test_nodes_tasks_and_gpus_that_do_not_fit(assignments: list[str], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        plan(*assignments, config="dev")


def test_what_is_per_gpu_is_shown_with_its_total() -> None:
    planned = plan("training.nodes=2", "training.gpus_per_node=8")
    assert planned.totals[0] == "2 nodes × 8 = 16 training processes (torchrun)"
    assert planned.settings.launcher == "torchrun" and planned.settings.processes == 8
    assert plan("training.gpus_per_node=1", config="dev").totals == []
