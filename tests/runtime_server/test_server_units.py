"""The parts that need no container: paths, owners, the body of a create, addresses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from runtime_server.__main__ import arguments
from runtime_server.engines import EngineError, Recipe, processes
from runtime_server.engines.filesystems import filesystem
from runtime_server.engines.ownership import Owner
from runtime_server.engines.probe import cgroup_version, ulimits
from runtime_server.engines.spec import Node, create_body
from runtime_server.engines.state import State, leftovers, sweep
from runtime_server.publish import address
from runtime_server.serving import curl_line, settings


def test_state_is_private_and_goes_as_a_whole(tmp_path: Path) -> None:
    state = State.create(_short(tmp_path))
    assert state.root.stat().st_mode & 0o077 == 0 and len(str(state.runroot)) < 50
    assert sweep(str(state.root.parent)) == []  # its owner lives
    state.remove()
    assert not state.root.exists()


def _short(tmp_path: Path) -> str:
    link = Path(f"/tmp/t{os.getpid()}")
    link.unlink(missing_ok=True)
    link.symlink_to(tmp_path)
    return str(link)


@pytest.mark.parametrize("change", ["pid", "started", "boot"])
def test_sweep_removes_only_what_is_proven_dead(tmp_path: Path, change: str) -> None:
    state = State.create(_short(tmp_path))
    owner = asdict(Owner.me(""))
    owner |= {change: {"pid": 1 << 23, "started": owner["started"] + 1, "boot": "other boot"}[change]}
    (state.root / "owner.json").write_text(json.dumps(owner))
    foreign = state.root.parent / f"orc-{os.getuid()}-broken"
    foreign.mkdir()
    assert [p.name for p in sweep(str(state.root.parent))] == [state.token]
    assert foreign.exists() and not state.root.exists()


@pytest.mark.skipif(os.getuid() != 0, reason="mounts something")
def test_what_could_not_be_removed_is_found_again(tmp_path: Path) -> None:
    """The record of the owner goes last: without it nobody would ever sweep the rest."""
    state = State.create(_short(tmp_path))
    (state.root / "owner.json").write_text(json.dumps(asdict(Owner.me("")) | {"boot": "another"}))
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", state.xdg], check=True)
    try:
        sweep(str(state.root.parent))
        assert state.xdg.exists() and not state.io.exists()
    finally:
        subprocess.run(["umount", state.xdg], check=True)
    assert [p.name for p in sweep(str(state.root.parent))] == [state.token]
    assert not state.root.exists()


def test_the_directory_of_a_probe_that_was_killed_is_swept() -> None:
    code = (
        "from runtime_server.engines.namespace import _scratch\n"
        "with _scratch() as env: print(env['CONTAINERS_CONF'], flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as probe:
        assert probe.stdout is not None
        folder = Path(probe.stdout.readline().strip()).parent
        assert folder.is_dir() and folder not in leftovers()
        probe.kill()
    assert folder in leftovers()
    sweep()
    assert not folder.exists()


def test_sweeping_imports_neither_framework_nor_engines() -> None:
    """Each runtime job sweeps twice; loading the server for it took two thirds of a CPU second each time."""
    code = (
        "import sys\nfrom runtime_server.__main__ import main\n"
        "assert main(['--sweep']) == 0\nprint(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60
    )
    heavy = {"fastapi", "starlette", "uvicorn", "uvloop", "podman", "requests", "httpx", "pydantic", "yaml"}
    assert heavy & {name.partition(".")[0] for name in done.stderr.split()} == set()


def test_a_long_state_directory_is_refused() -> None:
    with pytest.raises(EngineError, match="state_dir"):
        State(Path("/" + "x" * 60), Path("/tmp")).check()


def test_filesystem_types() -> None:
    assert filesystem(Path("/proc")) == "proc"
    assert filesystem(Path("/no/such/thing")) == filesystem(Path("/"))


RECIPE = Recipe(name="s-1", image="sha", io=Path("/io"), env={"A": "1"}, workdir="/w", cpus=0.5, memory_mb=64)
NODE = Node(Path("/agent"), {"nofile": 10, "nproc": 20, "core": 0}, cgroup="c", seccomp="x")


def test_every_sandbox_is_locked_in() -> None:
    body = create_body(RECIPE, NODE)
    assert body["netns"] == {"nsmode": "none"} and body["cap_drop"] == ["all"]
    assert set(body["cap_add"]) == {"CHOWN", "DAC_OVERRIDE", "FOWNER", "SETUID", "SETGID", "KILL"}
    assert body["no_new_privileges"] is True and "privileged" not in body
    assert [m["destination"] for m in body["mounts"]] == ["/.orchestrate/agent", "/.orchestrate/io"]
    assert all("ro" in m["options"] for m in body["mounts"])
    assert {r["type"] for r in body["r_limits"]} == {"nofile", "nproc", "core"}
    memory = body["resource_limits"]["memory"]
    assert memory["limit"] == memory["swap"] == 64 << 20
    assert body["resource_limits"]["cpu"] == {"quota": 50_000, "period": 100_000}


def test_limits_are_left_out_where_they_cannot_be() -> None:
    node = Node(Path("/agent"), {}, limits=False)
    body = create_body(RECIPE, node)
    assert not {"resource_limits", "cgroup_parent", "annotations", "oom_score_adj"} & set(body)


def test_ulimits_are_never_above_our_own() -> None:
    found = ulimits(os.getpid())
    assert found["core"] == 0 and 0 < found["nofile"] <= 65536 and found["nproc"] > 0


def test_cgroup_versions(tmp_path: Path) -> None:
    assert cgroup_version(tmp_path) == "v1"
    (tmp_path / "unified").mkdir()
    (tmp_path / "unified" / "cgroup.controllers").touch()
    assert cgroup_version(tmp_path) == "hybrid"
    (tmp_path / "cgroup.controllers").touch()
    assert cgroup_version(tmp_path) == "v2"


def test_processes_know_themselves() -> None:
    assert processes.started(os.getpid()) > 0 and processes.started(2**22 + 1) == 0
    assert processes.naming("pytest") == []  # only Podman's own programs count


@pytest.mark.parametrize(
    ("host", "advertised", "url"),
    [
        ("127.0.0.1", "", "http://127.0.0.1:80"),
        ("0.0.0.0", "node7", "http://node7:80"),
        ("::1", "", "http://[::1]:80"),
    ],
)
def test_addresses(host: str, advertised: str, url: str) -> None:
    assert address(host, 80, advertised) == url


def test_options_go_over_the_defaults() -> None:
    told = settings(arguments(["--image", "x", "--port", "5", "--host", "127.0.0.2"]))
    assert (told.config.sandbox.image, told.config.port, told.config.host) == ("x", 5, "127.0.0.2")
    assert settings(arguments([])).config.host == "127.0.0.1"


def test_the_curl_line_reads_the_key_from_a_file() -> None:
    assert "-H @/k/header.txt" in curl_line("http://h:1", Path("/k/header.txt"))
