"""OpenHands V0 inside a sandbox: actions, files, what is done once. `tests/clients` has the real client."""

from __future__ import annotations

import io
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from dialectkit import V0, Control

pytestmark = pytest.mark.container

EXTRAS = {
    "run": {"command", "metadata", "hidden"},
    "error": {"error_id"},
    "read": {"path", "impl_source"},
    "write": {"path"},
    "edit": {"path", "prev_exist", "old_content", "new_content", "impl_source", "diff"},
    "run_ipython": {"code"},
}
METADATA = {
    "exit_code", "pid", "username", "hostname", "working_dir", "py_interpreter_path", "prefix", "suffix",
}  # fmt: skip


@pytest.fixture
def quick(control: Control) -> V0:  # type: ignore[misc]
    """One that calls a command silent after a second."""
    with control.v0(environment={"NO_CHANGE_TIMEOUT_SECONDS": "1"}) as client:
        yield client


# --- run -----------------------------------------------------------------------------------------------


def test_a_command_and_all_that_is_told_of_it(v0: V0) -> None:
    made = v0.run("cd /usr && echo out && echo err >&2 && false")
    assert made["observation"] == "run" and made["content"] == "out\nerr" and made["success"] is False
    assert set(made["extras"]) == EXTRAS["run"] and set(made["extras"]["metadata"]) == METADATA
    told = made["extras"]["metadata"]
    assert (told["exit_code"], told["working_dir"], told["username"], told["pid"]) == (1, "/usr", "root", -1)
    assert told["suffix"] == "\n[The command completed with exit code 1.]" and told["prefix"] == ""
    assert v0.run("cd /workspace")["extras"]["metadata"]["working_dir"] == "/workspace"


def test_the_shell_stays(v0: V0) -> None:
    v0.run("export A=1; f() { echo f$A; }; alias ll='echo aliased'; sleep 60 &")
    made = v0.run("f; ll; jobs | wc -l; kill %1")
    assert made["content"].split("\n")[:3] == ["f1", "aliased", "1"]
    assert v0.code(v0.run("(exit 7)")) == 7
    assert v0.run("echo $?")["content"] == "7"
    assert v0.run("sleep 0 &")["extras"]["metadata"]["pid"] > 0


@pytest.mark.parametrize(
    ("command", "content"),
    [
        ("printf 'a\\r\\nb'", "a\nb"),
        ("printf '10%%\\r100%%\\n'", "100%"),
        ("printf '\\033[31mred\\033[0m'", "red"),
        ("printf '\\xff'", "\ufffd"),
        ("nope", "bash: nope: command not found"),
        ("cat <<EOF\na\nEOF", "a"),
        ("for i in 1 2; do\n  echo $i\ndone", "1\n2"),
        ("git --version | cut -c1-3", "git"),
    ],
)
def test_output_is_what_a_terminal_shows(v0: V0, command: str, content: str) -> None:
    assert v0.run(command)["content"] == content


def test_wrong_syntax_is_a_result(v0: V0) -> None:
    made = v0.run("echo (")
    assert v0.code(made) != 0 and "syntax error" in made["content"] and "/proc/self" not in made["content"]


def test_several_commands_are_refused_and_listed(v0: V0) -> None:
    made = v0.run("echo a > /tmp/several\necho b")
    assert made["observation"] == "error" and set(made["extras"]) == EXTRAS["error"]
    assert made["content"].endswith("Provided commands:\n(1) echo a > /tmp/several\n(2) echo b")
    assert v0.code(v0.run("test -e /tmp/several")) == 1


def test_nothing_runs(v0: V0) -> None:
    for args, said in (("", "retrieve logs from"), ("text", "interact with")):
        made = v0.run(args, is_input=bool(args))
        assert made["content"] == f"ERROR: No previous running command to {said}."
        assert made["extras"]["command"] == ""


def test_a_silent_command_runs_on_and_is_waited_for(quick: V0) -> None:
    made = quick.run("echo begun; sleep 2.2; echo more; sleep 30")
    told = made["extras"]["metadata"]
    assert made["content"] == "begun" and told["exit_code"] == -1 and told["prefix"] == ""
    assert told["suffix"].startswith("\n[The command has no new output after 1 seconds. You may wait longer")
    assert told.keys().isdisjoint({"working_dir", "hostname"})
    again = quick.run("")
    assert again["extras"]["metadata"]["prefix"] == "[Below is the output of the previous command.]\n"
    seen = again["content"] + quick.run("")["content"]
    assert "more" in seen and "begun" not in seen
    refused = quick.run("ls")
    assert 'Your command "ls" is NOT executed.' in refused["extras"]["metadata"]["suffix"]
    ended = quick.run("C-c", is_input=True)
    assert quick.code(ended) == 130
    assert ended["extras"]["metadata"]["suffix"].endswith("exit code 130. CTRL+C was sent.]")
    assert quick.run("echo usable")["content"] == "usable"


def test_a_command_that_ended_while_nobody_looked(quick: V0) -> None:
    quick.run("sleep 1.5; echo late")
    deadline = time.monotonic() + 10
    while "late" not in (made := quick.run(""))["content"]:
        assert time.monotonic() < deadline
    assert quick.code(made) == 0


def test_a_hard_timeout_leaves_the_command(v0: V0) -> None:
    begun = time.monotonic()
    made = v0.run("echo x; sleep 30", timeout=1.0, blocking=True)
    assert time.monotonic() - begun < 3
    assert made["extras"]["metadata"]["suffix"].startswith(
        "\n[The command timed out after 1.0 seconds. You may"
    )
    assert v0.code(v0.run("C-c", is_input=True)) == 130


def test_programs_are_typed_to(quick: V0) -> None:
    quick.run("python3 -q")
    made = quick.run("print(6 * 7)", is_input=True)
    assert "42" in made["content"]
    ended = quick.run("C-d", is_input=True)
    assert quick.code(ended) == 0


def test_a_shell_that_ends_is_replaced(quick: V0) -> None:
    assert quick.code(quick.run("exit 3")) == 3
    assert quick.run("echo there")["content"] == "there"


def test_a_static_command_stands_alone(v0: V0) -> None:
    v0.run("cd /workspace; export MINE=1")
    made = v0.run("pwd; echo ${MINE:-none}; cd /usr; exit 4", is_static=True, hidden=True, cwd="/tmp")
    assert made["content"] == "/tmp\nnone" and v0.code(made) == 4 and made["extras"]["hidden"] is True
    assert v0.run("pwd")["content"] == "/workspace"


def test_much_output_is_cut_at_the_front(v0: V0) -> None:
    made = v0.run("seq 1 400000")
    assert made["content"].endswith("\n399999\n400000") and len(made["content"]) <= 1 << 20
    assert made["extras"]["metadata"]["prefix"].startswith(
        "[Previous command outputs are truncated. Showing the last"
    )


def test_no_error_answers_a_hidden_action(v0: V0) -> None:
    for args in ({"command": "a\nb"}, {"command": "true", "cwd": "/no/such", "is_static": True}):
        made = v0.run(**args, hidden=True)  # type: ignore[arg-type]
        assert made["observation"] == "run" and v0.code(made) != 0


def test_what_is_not_known_or_not_valid_is_an_observation(v0: V0) -> None:
    for kind, args in (("browse", {"url": "x"}), ("dance", {}), ("read", {}), ("run", {"command": [1]})):
        made = v0.act(kind, args)
        assert made["observation"] == "error" and set(made["extras"]) == EXTRAS["error"]
    for body in ({}, {"action": {}}, []):
        assert v0.http.post("/execute_action", json=body).status_code == 422


# --- once ----------------------------------------------------------------------------------------------


def test_an_action_that_comes_again_is_done_once(v0: V0) -> None:
    v0.run("rm -f /tmp/count")
    body = {"command": "echo x >> /tmp/count; sleep 0.5; cat /tmp/count"}
    mark = {"id": 4711, "timestamp": "2025-11-21T10:00:00"}
    with ThreadPoolExecutor(3) as pool:
        replies = [*pool.map(lambda _: v0.send("run", body, **mark).json(), range(3))]
    assert all(reply["content"] == "x" for reply in replies)
    assert v0.send("run", body, **mark).json()["content"] == "x"
    assert v0.send("run", body, id=4712, timestamp="later").json()["content"] == "x\nx"


def test_an_action_without_an_id_is_joined_while_it_runs_or_when_its_answer_was_lost(v0: V0) -> None:
    v0.run("rm -f /tmp/lost")
    body = {"command": "echo x >> /tmp/lost; sleep 0.5; cat /tmp/lost"}
    envelope = {"action": {"action": "run", "args": body, "timeout": 30}}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{v0.url}/execute_action", headers=v0.http.headers, json=envelope, timeout=0.2)
    assert v0.send("run", body).json()["content"] == "x"
    assert v0.send("run", body).json()["content"] == "x\nx"  # that answer was had: a new command


# --- files ---------------------------------------------------------------------------------------------


def test_read_and_write_are_the_real_servers(v0: V0) -> None:
    made = v0.act("write", {"path": "/workspace/d/a.txt", "content": "a\n"})
    assert (made["observation"], made["extras"]) == ("write", {"path": "/workspace/d/a.txt"})
    assert v0.run("cat d/a.txt | od -c | head -1; stat -c %a d/a.txt")["content"].endswith("664")
    made = v0.act("read", {"path": "d/a.txt"})
    assert made["content"] == "a\n\n" and made["extras"]["path"] == "/workspace/d/a.txt"
    v0.act("write", {"path": "d/a.txt", "content": "B", "start": 1, "end": 2})
    assert v0.act("read", {"path": "d/a.txt"})["content"] == "a\nB\n"
    assert v0.act("read", {"path": "d/a.txt", "start": 0, "end": 1})["content"] == "a\n"


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/none", "File not found: /none. Your current working directory is /workspace."),
        ("/tmp", "Path is a directory: /tmp. You can only read files"),
        ("/bin/ls", "ERROR_BINARY_FILE"),
    ],
)
def test_files_that_cannot_be_read(v0: V0, path: str, said: str) -> None:
    v0.run("cd /workspace")
    made = v0.act("read", {"path": path})
    assert made["observation"] == "error" and made["content"] == said


def test_the_editor(v0: V0) -> None:
    path = "/workspace/e.py"
    make = {"path": path, "command": "create", "file_text": "def f():\n    return 1\n"}
    made = v0.act("edit", make)
    assert (
        made["content"] == f"File created successfully at: {path}" and set(made["extras"]) == EXTRAS["edit"]
    )
    assert "already exists" in v0.act("edit", make)["content"]
    change = {"path": path, "command": "str_replace", "old_str": "return 1", "new_str": "return 2"}
    made = v0.act("edit", change)
    assert made["content"].startswith(
        f"The file {path} has been edited. Here's the result of running `cat -n`"
    )
    assert (
        made["extras"]["old_content"] == "return 1"
        and "-    return 1\n+    return 2" in made["extras"]["diff"]
    )
    assert v0.act("edit", change)["content"].startswith("ERROR:\nNo replacement was performed, old_str")
    made = v0.act("edit", {"path": path, "command": "insert", "insert_line": "0", "new_str": "# top"})
    assert "     1\t# top" in made["content"]
    made = v0.act("edit", {"path": path, "command": "view", "view_range": [1, 9]})
    seen = v0.act("read", {"path": path, "impl_source": "oh_aci", "view_range": [2, 2]})
    assert seen["content"] == f"Here's the result of running `cat -n` on {path}:\n     2\tdef f():\n"
    made = v0.act("edit", {"path": path, "command": "undo_edit"})
    assert made["content"].startswith(f"Last edit to {path} undone successfully.")
    listed = v0.act("read", {"path": "/workspace", "impl_source": "oh_aci"})["content"]
    assert (
        listed.startswith("Here's the files and directories up to 2 levels deep in /workspace")
        and path in listed
    )
    for args in ({"path": "e.py", "command": "view"}, {"path": "/none", "command": "view"}):
        assert v0.act("edit", args)["content"].startswith("ERROR:\nInvalid `path` parameter")


def test_uploads_downloads_and_lists(v0: V0) -> None:
    got = v0.http.post(
        "/upload_file", params={"destination": "/workspace/up"}, files={"file": ("t.bin", b"\0\xff" * 9)}
    )
    assert got.json() == {"filename": "t.bin", "destination": "/workspace/up", "recursive": False}
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("sub/b.txt", "b")
        archive.writestr(".hidden", "h")
    params = {"destination": "/workspace/up", "recursive": "true"}
    got = v0.http.post("/upload_file", params=params, files={"file": ("all.zip", packed.getvalue())})
    assert got.status_code == 200, got.text
    assert v0.http.post("/list_files", json={"path": "up"}).json() == ["sub/", ".hidden", "t.bin"]
    assert v0.http.post("/list_files", json={"path": "/none"}).json() == []
    got = v0.http.get("/download_files", params={"path": "/workspace/up"})
    with zipfile.ZipFile(io.BytesIO(got.content)) as archive:
        assert sorted(archive.namelist()) == [".hidden", "sub/b.txt", "t.bin"]
        assert archive.read("t.bin") == b"\0\xff" * 9
    got = v0.http.get("/download_files", params={"path": "/workspace/up/t.bin"})
    with zipfile.ZipFile(io.BytesIO(got.content)) as archive:
        assert archive.namelist() == ["t.bin"]
    for path, code in (("relative", 400), ("/none", 404)):
        assert v0.http.get("/download_files", params={"path": path}).status_code == code
    assert (
        v0.http.post("/upload_file", params={"destination": "x"}, files={"file": ("t", b"")}).status_code
        == 400
    )


def test_an_archive_leads_nowhere_else(v0: V0) -> None:
    for name in ("../out", "/etc/out", "a/../../out"):
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as archive:
            archive.writestr(name, "x")
        params = {"destination": "/workspace/z", "recursive": "true"}
        got = v0.http.post("/upload_file", params=params, files={"file": ("a.zip", packed.getvalue())})
        assert got.status_code == 400 and "leads out" in got.json()["detail"]


# --- the rest ------------------------------------------------------------------------------------------


def test_python_keeps_its_state(v0: V0) -> None:
    v0.run("cd /workspace")
    assert v0.act("run_ipython", {"code": "import os; x = 41", "include_extra": False})["content"] == (
        "[Code executed successfully with no output]"
    )
    made = v0.act("run_ipython", {"code": "print('a'); os.system('echo b'); x + 1"})
    lines = made["content"].split("\n")
    assert lines[:2] == ["a", "b"] and "42" in lines
    assert lines[-2] == "[Jupyter current working directory: /workspace]" and "python3" in lines[-1]
    assert set(made["extras"]) == EXTRAS["run_ipython"]
    made = v0.act("run_ipython", {"code": "1 / 0"})
    assert "ZeroDivisionError" in made["content"]
    late = v0.act("run_ipython", {"code": "while True: pass"}, timeout=1.0)
    assert late["content"].startswith("[Execution timed out (1.0 seconds).]")
    assert "42" in v0.act("run_ipython", {"code": "x + 1"})["content"]


def test_without_the_plugin_there_is_no_python(control: Control) -> None:
    with control.v0(command=["python", "-m", "openhands.runtime.action_execution_server", "1"]) as client:
        made = client.act("run_ipython", {"code": "1"})
        assert made["observation"] == "error"


def test_what_is_asked_beside_actions(v0: V0) -> None:
    assert v0.http.get("/alive").json() == {"status": "ok"}
    assert v0.http.get("/server_info").json()["uptime"] > 0
    assert v0.http.get("/vscode/connection_token").json() == {"token": None}
    assert v0.http.post("/update_mcp_server", json=[{"name": "x"}]).json()["router_error_log"]
    assert v0.http.post("/update_mcp_server", json=[]).json()["router_error_log"] == ""
