"""The command line as people use it: what it prints, what it refuses, and what it exits with."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from memory_scheduler import MemoryScheduler
from rich.console import Console

from orchestrator import cli_launched, follow, runs, view
from orchestrator.cli_commands import cli
from orchestrator.contract import JobStatus, ReadyFlag, RunDirectory
from orchestrator.contract import Result as RunResult
from orchestrator.launch import Launched, Request, launch
from orchestrator.schedulers import JobState

DOCS = Path(__file__).resolve().parents[2] / "docs" / "reference" / "cli.md"
KEY = "the-right-key"

Make = Callable[..., Request]


def orchestrate(*arguments: str | Path, env: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(cli, [str(a) for a in arguments], env=env, prog_name="orchestrate")


def printed() -> Console:
    return Console(file=io.StringIO(), width=100, highlight=False, soft_wrap=True)


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.fixture
def launched(request_of: Make, memory: MemoryScheduler) -> Launched:
    return launch(request_of(), memory)


# --- launch ------------------------------------------------------------------------------------------


def test_a_dry_run_prints_the_plan_and_submits_nothing(runs_dir: Path) -> None:
    done = orchestrate("launch", "-c", "production", "--dry-run", f"run.runs_dir={runs_dir}")
    assert done.exit_code == 0, done.output
    for expected in ("1 effective", "#SBATCH --gres=gpu:1", "#SBATCH --signal=B:USR1@300", "held until"):
        assert expected in done.output
    assert "\x1b" not in done.output and not runs_dir.exists()


def test_a_dry_run_as_json() -> None:
    plan = json.loads(orchestrate("launch", "-c", "dev", "--dry-run", "--json").stdout)
    assert plan["gpus"] == 2 and [job["role"] for job in plan["jobs"]] == ["training", "runtime"]


def test_a_dry_run_shows_no_secret(tmp_path: Path) -> None:
    (tmp_path / "my.env").write_text("TOKEN=s3cret\n")
    arguments = (f"environment.env_file={tmp_path}/my.env", "environment.variables.API_KEY=s3cret")
    for extra in ([], ["--json"]):
        done = orchestrate("launch", "-c", "local", "--dry-run", *extra, *arguments)
        assert done.exit_code == 0 and "s3cret" not in done.output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["-c", "nope"], "there is no configuration 'nope'; give one of the names"),
        (["-c", "local", "training.gpu_per_node=1"], "did you mean training.gpus_per_node"),
        (["-c", "local", "training.cpus=many"], "training.cpus takes a whole number, at least 1; got `many`"),
        (["-c", "local", "training.nodes=2"], "the local scheduler is one machine: set training.nodes=1"),
        (["-c", "local", "data.train=/no/such.parquet"], "data.train: there is no /no/such.parquet"),
        (["-c", "local", "--runtime-only", "--runtime-url", "http://x"], "give one of them"),
        (["-c", "local", "--runtime-api-key-file", "x"], "goes with --runtime-url"),
        (["-c", "local", "--follow", "--dry-run"], "leave out --dry-run"),
        ([], "Missing option '--config'"),
    ],
)
def test_bad_input_exits_2_and_says_what_to_do(arguments: list[str], says: str, tmp_path: Path) -> None:
    done = orchestrate("launch", *arguments, f"run.runs_dir={tmp_path}/runs")
    assert done.exit_code == 2 and says in done.stderr.replace("\n", " "), done.output
    assert not (tmp_path / "runs").exists() and done.stdout == ""


def test_without_slurm_a_launch_says_where_to_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    done = orchestrate("launch", "-c", "dev", f"run.runs_dir={tmp_path}/runs")
    assert done.exit_code == 2 and "login node of the cluster, or use scheduler.kind=local" in done.stderr
    assert not (tmp_path / "runs").exists()


# --- a server that already runs ----------------------------------------------------------------------


class Runtime(BaseHTTPRequestHandler):
    """Answers /health as a runtime server does: everything only to the right key."""

    answer: dict[str, Any] = {"status": "ok", "run_id": "r1", "attempt": 3, "nonce": "n1"}  # noqa: RUF012
    strict = False

    def do_GET(self) -> None:
        knows = self.headers.get("X-API-Key") == KEY
        body = self.answer if knows else {"status": "ok"}
        self.send_response(401 if self.strict and not knows else 200 if self.path == "/health" else 404)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


@pytest.fixture
def server() -> Iterator[Callable[..., str]]:
    """`server()`: the address of a running server; keywords change its class."""
    servers: list[HTTPServer] = []

    def start(**changes: Any) -> str:
        made = HTTPServer(("127.0.0.1", 0), type("Changed", (Runtime,), changes))
        servers.append(made)
        threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return f"http://127.0.0.1:{made.server_port}"

    yield start
    for each in servers:
        each.shutdown()
        each.server_close()


def attach(url: str, runs_dir: Path, key: str | None = KEY, **env: str) -> Result:
    key_env = {} if key is None else {"ORCHESTRATE_RUNTIME_API_KEY": key}
    arguments = ("launch", "-c", "local", "--runtime-url", url, f"run.runs_dir={runs_dir}")
    return orchestrate(*arguments, env={**key_env, **env})


def test_what_is_wrong_with_a_server_is_said_first(server: Callable[..., str], runs_dir: Path) -> None:
    good = server()
    cases = [
        (attach(good, runs_dir, key="wrong"), "does not accept the key"),
        (attach(server(strict=True), runs_dir, key="wrong"), "does not accept the key"),
        (
            attach(good, runs_dir, key=None),
            "no key of the runtime server was given; use --runtime-api-key-file",
        ),
        (attach("http://127.0.0.1:9", runs_dir), "no runtime server answers at http://127.0.0.1:9"),
        (attach("node7:80", runs_dir), "is no address of a server; write http://HOST:PORT"),
        (attach("http://u:p@h", runs_dir), "must hold no key or password"),
        (attach(good + "/v2", runs_dir), "answered 404"),
        (attach(server(answer={"status": "draining"}), runs_dir), "is draining; start another"),
        (attach(server(answer=[1]), runs_dir), "not as a runtime server does"),
    ]
    for done, says in cases:
        assert done.exit_code == 2 and says in done.stderr, (says, done.output)
        assert KEY not in done.output and "wrong" not in done.output
    assert not runs_dir.exists()


def test_a_key_file_that_is_missing_or_empty(server: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    for name, says in (("empty", "is empty; use --runtime-api-key-file"), ("none", "cannot be read")):
        done = orchestrate(
            *("launch", "-c", "local", "--runtime-url", server()),
            *("--runtime-api-key-file", tmp_path / name),
        )
        assert done.exit_code == 2 and says in done.stderr


def test_a_server_that_answers_is_accepted(server: Callable[..., str]) -> None:
    from orchestrator.attach import check_runtime

    found = check_runtime(server() + "/", KEY)
    assert (found.run_id, found.attempt, found.nonce) == ("r1", 3, "n1")


# --- reading -----------------------------------------------------------------------------------------


def test_reading_commands_speak_json(launched: Launched, runs_dir: Path) -> None:
    launched.run.metrics.write_text('{"step": 0, "success_rate": 0.5}\n')
    for command in ("status", "list", "cancel"):
        done = orchestrate(command, "--runs-dir", runs_dir, "--json")
        data = json.loads(done.stdout)
        look = data[0] if command == "list" else data
        assert look["run_id"] == launched.run.run_id and look["success_rates"] == [0.5]


def test_status_by_the_end_of_an_id(launched: Launched, runs_dir: Path) -> None:
    name = launched.run.run_id[-6:]
    done = orchestrate("status", name, "--runs-dir", runs_dir)
    assert done.exit_code == 0 and launched.run.run_id in done.output
    assert orchestrate("status", launched.run.root).exit_code == 0
    assert orchestrate("status", "zzz", "--runs-dir", runs_dir).exit_code == 2


def test_a_run_of_another_scheduler_is_unknown_not_failed(
    launched: Launched, runs_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    manifest = launched.run.manifest
    manifest.write_text(manifest.read_text().replace('"scheduler": "local"', '"scheduler": "slurm"'))
    assert json.loads(orchestrate("status", "--runs-dir", runs_dir, "--json").stdout)["state"] == "unknown"
    done = orchestrate("cancel", "--runs-dir", runs_dir)
    assert done.exit_code == 1 and "not on the PATH of this machine" in done.stderr


def test_an_empty_list_says_how_to_begin(runs_dir: Path) -> None:
    done = orchestrate("list", "--runs-dir", runs_dir)
    assert done.exit_code == 0 and "orchestrate launch --config local" in done.output


def test_logs_carry_the_name_of_their_job(launched: Launched, runs_dir: Path) -> None:
    run = launched.run
    run.out("runtime", "102").write_text("one\ntwo\nthree")
    run.err("training", "101").write_text("\x1b]0;owned\x07\x1b[2J\x1b[31mred\x1b[0m\x08x\n")
    done = orchestrate("logs", "--runs-dir", runs_dir, "-n", "2")
    assert done.output.splitlines() == ["runtime  │ two", "runtime  │ three", "training │ redx"]
    done = orchestrate("logs", "--runs-dir", runs_dir, "--role", "training", "--json")
    assert json.loads(done.stdout)["role"] == "training"


def test_logs_before_the_start(launched: Launched, runs_dir: Path) -> None:
    assert "its jobs have not started" in orchestrate("logs", "--runs-dir", runs_dir).stderr


# --- following ---------------------------------------------------------------------------------------


class Cluster:
    """Plays a run, one scene per question to the scheduler."""

    def __init__(self, run: RunDirectory, memory: MemoryScheduler, outcome: str = "success") -> None:
        self.run, self.memory, self.outcome = run, memory, outcome
        memory.script = self.play
        self.scene = 0

    def play(self, _: int) -> None:
        self.scene += 1
        scene = getattr(self, f"scene_{self.scene}", None)
        if scene is not None:
            scene()

    def scene_2(self) -> None:
        self.memory.set("runtime", JobState.RUNNING)
        flag = ReadyFlag(
            run_id=self.run.run_id, attempt=1, job_id="102", nonce="n", host="h", pid=1, url="http://h:1"
        )
        self.run.publish(self.run.ready_flag, flag)

    def scene_3(self) -> None:
        self.memory.set("training", JobState.RUNNING)
        rows = [
            {"step": i, "success_rate": i / 10, "reward_mean": 0.5, "tokens_per_s": 1234.5} for i in range(9)
        ]
        self.run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def scene_4(self) -> None:
        code = 0 if self.outcome == "success" else 70
        self.run.err("training", "101").write_text("Traceback: the end\n")
        result = RunResult(
            run_id=self.run.run_id,
            attempt=1,
            job_id="101",
            outcome=self.outcome,
            reason="over",
            exit_code=code,
        )
        self.run.publish(self.run.result, result)
        self.memory.set("training", JobState.ENDED, code)
        self.memory.set("runtime", JobState.ENDED, 0)


def test_following_tells_each_thing_once(launched: Launched, memory: MemoryScheduler) -> None:
    Cluster(launched.run, memory)
    console = printed()
    look = follow.follow(launched.run, memory, console, every_s=0.001)
    follow.ending(launched.run, look, console)
    text = text_of(console)
    assert text.count("runtime ready at http://h:1") == 1
    assert text.count("step   3/50   success  20%   reward 0.500   1,234 tok/s") == 1
    assert "success rate by step" in text and "ended     success" in text
    assert runs.exit_code_of(look) == 0


def test_a_failed_run_shows_the_end_of_its_log(launched: Launched, memory: MemoryScheduler) -> None:
    Cluster(launched.run, memory, "failed")
    console = printed()
    look = follow.follow(launched.run, memory, console, every_s=0.001)
    follow.ending(launched.run, look, console)
    assert "│ Traceback: the end" in text_of(console) and runs.exit_code_of(look) == 70


def test_ctrl_c_ends_a_local_run_and_waits(launched: Launched, memory: MemoryScheduler) -> None:
    def interrupt() -> None:
        memory.script = lambda _: None
        raise KeyboardInterrupt

    memory.script = lambda _: interrupt()
    console = printed()
    assert cli_launched._watch(launched.run, memory, console) == 130
    assert "cancelled; every job of the run is over" in text_of(console)
    assert runs.view(launched.run, memory).state == "cancelled"


def test_ctrl_c_only_stops_watching_a_cluster(launched: Launched, memory: MemoryScheduler) -> None:
    memory.name = "slurm"
    memory.script = lambda _: (_ for _ in ()).throw(KeyboardInterrupt)
    console = printed()
    assert cli_launched._watch(launched.run, memory, console) == 130
    assert "goes on" in text_of(console) and memory.jobs["101"].state == JobState.HELD


def test_a_stranded_training_job_is_cancelled(launched: Launched, memory: MemoryScheduler) -> None:
    memory.set("runtime", JobState.ENDED, 70)
    look = follow.follow(launched.run, memory, printed(), every_s=0.001, stranded_s=0.01)
    assert look.state == "cancelled" and memory.jobs["101"].state == JobState.ENDED


# --- looks -------------------------------------------------------------------------------------------


def test_a_sparkline_is_as_wide_as_asked() -> None:
    assert view.sparkline([0, 0.5, 1]) == "▁▅█"
    assert len(view.sparkline([i / 100 for i in range(100)], 30)) == 30


def test_a_reason_cannot_drive_the_terminal(launched: Launched, memory: MemoryScheduler) -> None:
    status = JobStatus(
        run_id="r", role="runtime", attempt=1, job_id="1", nonce="n", host="h", pid=1, phase="ended",
        outcome="failed", reason="\x1b]52;c;b3duZWQ=\x07bad",
    )  # fmt: skip
    launched.run.publish(launched.run.status("runtime"), status)
    console = printed()
    console.print(view.status(runs.view(launched.run, memory), None))
    assert "bad" in text_of(console) and "\x1b" not in text_of(console)


def test_showing_a_configuration_masks_secrets() -> None:
    arguments = ("environment.variables.WANDB_API_KEY=s3cret", "environment.variables.MODE=plain")
    done = orchestrate("config", "show", "-c", "local", "--set", *arguments)
    assert "s3cret" not in done.output and "plain" in done.output and "local.yaml:" in done.output
    data = json.loads(orchestrate("config", "show", "--json", *arguments).stdout)
    assert data["environment.variables.WANDB_API_KEY"] == {"value": "***", "origin": "command line"}


def test_keys_can_be_searched() -> None:
    assert "training.gpus_per_node" in orchestrate("config", "keys", "gpus").output
    assert json.loads(orchestrate("config", "keys", "seed", "--json").stdout)[0]["key"] == "run.seed"
    done = orchestrate("config", "keys", "gpu_per_nodes")
    assert done.exit_code == 2 and "training.gpus_per_node" in done.output


# --- the reference page ------------------------------------------------------------------------------


def _commands(group: click.Group, prefix: str = "") -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from _commands(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", command


def test_the_reference_page_names_every_command_and_option() -> None:
    page = DOCS.read_text()
    for name, command in _commands(cli):
        assert f"orchestrate {name}" in page
        options = [o for p in command.params if isinstance(p, click.Option) for o in p.opts if o[:2] == "--"]
        assert [o for o in options if o not in page] == []
