"""The control API of the foreign dialects, on a real server."""

from __future__ import annotations

import asyncio
import base64
import io
import tarfile
import time

import httpx
import pytest
from dialectkit import IMAGE, V1_COMMAND, Control, v0_command
from serverkit import KEY, Server, run_server

from orchestrator.schema import Runtime

pytestmark = pytest.mark.container


@pytest.mark.parametrize(
    ("command", "ready", "by_path"),
    [(v0_command(), "ready", True), (v0_command("88888888"), "running", True), (V1_COMMAND, "ready", False)],
    ids=["v0", "skyrl", "v1"],
)
def test_start_answers_once_it_is_ready_and_in_the_clients_words(
    control: Control, command: object, ready: str, by_path: bool
) -> None:
    made = control.start(command)
    identity = made["runtime_id"]
    assert made["pod_status"] == ready and made["status"] == "running" and len(made["session_api_key"]) == 64
    assert made["url"] == control.url + (f"/sandbox/{identity}" if by_path else "")
    for path in (f"/runtime/{identity}", f"/sessions/{made['session_id']}"):
        assert control.get(path) == made
    assert control.get("/list")["total"] >= 1
    assert control.get("/sessions/batch", ids=[made["session_id"], "none"]) == [made]
    again = control.start(command, session_id=made["session_id"])
    assert again == made
    control.stop(identity)
    over = control.get(f"/runtime/{identity}")
    assert (over["pod_status"], over["status"]) == ("failed", "stopped") and "session_api_key" not in over
    fresh = control.start(command, session_id=made["session_id"])
    assert fresh["runtime_id"] != identity
    control.stop(fresh["runtime_id"])


def test_stop_is_a_success_whatever_there_is_to_stop(control: Control) -> None:
    for body in ({"runtime_id": None}, {"runtime_id": "r-none"}, {}, {"runtime_id": "../x"}):
        assert control.post("/stop", body).status_code == 200


def test_what_is_not_known_is_404_and_what_makes_no_sense_422(control: Control) -> None:
    for path in ("/runtime/r-none", "/sessions/none"):
        got = control.http.get(path)
        assert got.status_code == 404 and "detail" in got.json()
    for body in ({"image": IMAGE, "session_id": None}, {"session_id": "x"}, [], "text"):
        got = control.post("/start", body)
        assert got.status_code == 422 and isinstance(got.json()["detail"], str), got.text
    for method, path in (
        ("GET", "/start"),
        ("POST", "/sessions/a/b"),
        ("GET", "/start/"),
        ("POST", "/resume"),
    ):
        got = control.http.request(method, path, json={"runtime_id": "r-none"})
        assert got.status_code in (404, 405) and "detail" in got.json()


@pytest.mark.parametrize("headers", [{}, {"X-API-Key": "wrong"}, {"X-Session-API-Key": "wrong"}])
def test_without_the_servers_key_nothing_is_told(server: Server, headers: dict[str, str]) -> None:
    for method, path in (
        ("POST", "/start"),
        ("GET", "/list"),
        ("POST", "/stop"),
        ("GET", "/runtime/r"),
        ("POST", "/build"),
    ):
        got = httpx.request(method, server.url + path, headers=headers)
        assert got.status_code == 401 and "key" in got.json()["detail"]
    assert httpx.get(server.url + "/health").status_code == 200


def test_the_servers_key_opens_no_sandbox_and_gets_into_none(control: Control, server: Server) -> None:
    with control.v0(environment={"STOLEN": server.key, "KEPT": "value"}) as one, control.v0() as other:
        seen = one.run("env; cat /proc/1/environ /proc/self/environ | tr '\\0' '\\n'")["content"]
        assert server.key not in seen and one.key not in seen and "KEPT=value" in seen
        for key in (server.key, other.key, "", "x" * 64, one.key.upper()):
            headers = {"X-Session-API-Key": key, "X-API-Key": key}
            for path in ("/execute_action", "/list_files", "/upload_file?destination=/"):
                assert httpx.post(one.url + path, headers=headers, json={}).status_code == 403
            got = httpx.post(f"{one.url}/swerex/execute", headers=headers, json={"command": "true"})
            assert got.status_code == 401 and "detail" in got.json()
        assert httpx.get(f"{one.url}/alive").status_code == 200
        headers = {"X-API-Key": server.key}
        assert (
            httpx.post(server.url + "/api/bash/start_bash_command", headers=headers, json={}).status_code
            == 401
        )
        for name in ("X-API-Key", "X-Session-API-Key"):  # and a session key opens nothing of the server
            assert httpx.get(server.url + "/v1/sandboxes", headers={name: one.key}).status_code == 401
            assert httpx.get(server.url + "/list", headers={name: one.key}).status_code == 401
    assert (
        httpx.post(one.url + "/list_files", headers={"X-Session-API-Key": one.key}, json={}).status_code
        == 403
    )


def test_a_paused_runtime_refuses_its_key_but_does_not_forget_it(control: Control) -> None:
    with control.v0() as client:
        body = {"runtime_id": client.record["runtime_id"]}
        client.run("cd /tmp; export A=1")
        assert control.post("/pause", body).status_code == 200
        assert control.get(f"/sessions/{client.record['session_id']}")["status"] == "paused"
        assert client.send("run", {"command": "true"}).status_code == 503
        resumed = control.post("/resume", body).json()
        assert resumed["session_api_key"] == client.key and resumed["pod_status"] == "ready"
        assert client.run("pwd; echo $A")["content"] == "/tmp\n1"


def test_an_image_that_is_missing_fails_with_a_reason(control: Control) -> None:
    made = control.start(image="localhost/none:1")
    assert made["pod_status"] == "failed" and "not here" in made["pod_logs"] and made["status"] == "stopped"


def test_resources_and_policies_are_taken_and_mounts_are_not(control: Control) -> None:
    more = {"resource_factor": 0.5, "runtime_class": "sysbox-runc", "run_as_user": 10001, "enable_gpu": False}
    mounts = [{"host_path": "/etc", "container_path": "/host", "mode": "rw"}]
    with control.v0(**more, runtime_mounts=mounts) as client:
        assert client.code(client.run("test ! -e /host")) == 0


def _context(dockerfile: str) -> str:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        member = tarfile.TarInfo("./Dockerfile")
        member.size = len(dockerfile)
        archive.addfile(member, io.BytesIO(dockerfile.encode()))
    return base64.b64encode(packed.getvalue()).decode()


def _build(control: Control, dockerfile: str, name: str) -> dict[str, str]:
    files = [("context", ("context.tar.gz", _context(dockerfile))), ("target_image", (None, name))]
    made = control.http.post("/build", files=[*files, ("tags", (None, f"{name}-lock"))]).json()
    assert made["url"] == control.url
    found: dict[str, str] = control.get("/build_status", build_id=made["build_id"])
    return found


def test_a_build_builds_nothing_and_works_at_once(control: Control) -> None:
    name = f"{control.get('/registry_prefix')['registry_prefix']}/runtime:{time.time_ns():x}"
    assert control.get("/image_exists", image=name) == {"exists": False, "url": control.url}
    extra = "# Install extra dependencies if specified\nRUN echo extra > /extra"
    assert _build(control, f"FROM {IMAGE}\nRUN make server\n{extra}", name) == {
        "status": "SUCCESS",
        "image": name,
    }
    there = control.get("/image_exists", image=f"{name}-lock")
    assert there["exists"] and there["image"]["image_size_bytes"] >= 0 and there["image"]["upload_time"]
    with control.v0(image=name) as client:
        assert client.run("cat /extra")["content"] == "extra"


def test_a_build_that_cannot_be_says_why(control: Control) -> None:
    assert _build(control, "RUN x", "runtime.local/oh/x")["status"] == "FAILURE"
    assert control.get("/build_status", build_id="b-none")["status"] == "EXPIRED"
    name = f"runtime.local/oh/runtime:{time.time_ns():x}"
    _build(
        control, f"FROM {IMAGE}\n# Install extra dependencies if specified\nRUN echo why >&2; exit 3", name
    )
    made = control.start(image=name)
    assert made["pod_status"] == "failed" and "why" in made["pod_logs"]


def test_images_that_are_here_exist_and_others_do_not(control: Control) -> None:
    assert control.get("/image_exists", image=IMAGE)["exists"]
    assert not control.get("/image_exists", image="localhost/none:2")["exists"]


def test_a_full_server_answers_pending_and_the_client_waits(tmp_path_factory: pytest.TempPathFactory) -> None:
    with run_server(Runtime(host="127.0.0.1", max_parallel_sandboxes=1, start_hold=1)) as (url, boxes):
        control = Control(url, KEY)
        first = control.start()
        waiting = control.start()
        assert waiting["pod_status"] == "pending" and waiting["status"] == "running" and waiting["url"]
        assert waiting["queue"]["position"] == 1
        assert control.start(session_id=waiting["session_id"])["runtime_id"] == waiting["runtime_id"]
        control.stop(first["runtime_id"])
        assert control.get(f"/runtime/{waiting['runtime_id']}")["pod_status"] == "ready"  # held until it is
        box = next(box for box in boxes.live)
        asyncio.run_coroutine_threadsafe(boxes.engine.kill(box.container), boxes.loop).result(30)
        lost = httpx.post(
            f"{waiting['url']}/execute_action",
            headers={"X-Session-API-Key": waiting["session_api_key"]},
            json={"action": {"action": "run", "args": {"command": "true"}, "timeout": 10}},
            timeout=30,
        )
        assert lost.status_code == 502 and lost.json()["detail"].startswith("infra:died ")
        over = control.get(f"/runtime/{waiting['runtime_id']}")
        assert over["pod_status"] == "failed" and over["last_termination_reason"] == "died"
        queued = control.start()
        control.stop(queued["runtime_id"])
        control.http.close()


def test_a_queued_runtime_can_be_stopped(control: Control) -> None:
    with run_server(Runtime(host="127.0.0.1", max_parallel_sandboxes=1, start_hold=1)) as (url, boxes):
        alone = Control(url, KEY)
        first, second = alone.start(), alone.start()
        alone.stop(second["runtime_id"])
        assert boxes.places.waiting == 0
        assert alone.get(f"/runtime/{second['runtime_id']}")["pod_status"] == "failed"
        alone.stop(first["runtime_id"])
        assert not boxes.live
        alone.http.close()
