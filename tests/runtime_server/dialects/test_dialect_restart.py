"""A server that is killed, and the next one: runtimes, keys and shells of foreign clients go on."""

from __future__ import annotations

import signal
import tempfile
from pathlib import Path

import httpx
import pytest
from dialectkit import V0, Control
from serverkit import Server

pytestmark = [pytest.mark.container, pytest.mark.slow]
KEY = "a-key-of-my-own-0123456789"


def test_a_runtime_outlives_its_server() -> None:
    with tempfile.TemporaryDirectory(prefix="d-", dir="/tmp") as state:
        first = Server.start("--state-dir", state, env={"ALLHANDS_API_KEY": KEY})
        assert first.key == KEY  # a server that stands alone takes the key that clients have already
        control = Control(first.url, KEY)
        made = control.start(environment={"NO_CHANGE_TIMEOUT_SECONDS": "1"})
        with V0(made["url"], made["session_api_key"], made) as client:
            client.run("cd /usr && export KEPT=yes")
            client.run("echo begun; sleep 3; echo over")
        control.http.close()
        assert first.stop(signal.SIGKILL) != 0
        second = Server.start("--state-dir", state, env={"ALLHANDS_API_KEY": KEY})
        try:
            control = Control(second.url, KEY)
            again = control.get(f"/sessions/{made['session_id']}")
            control.http.close()
            for name in ("runtime_id", "session_api_key", "pod_status", "status"):
                assert again[name] == made[name]
            with V0(again["url"], again["session_api_key"], again) as client:
                seen = ""
                while "exit code 0" not in (polled := client.run(""))["extras"]["metadata"]["suffix"]:
                    seen += polled["content"]
                assert "over" in seen + polled["content"]
                assert client.run("pwd; echo $KEPT")["content"] == "/usr\nyes"
            wrong = httpx.post(f"{again['url']}/list_files", headers={"X-Session-API-Key": KEY}, json={})
            assert wrong.status_code == 403
            assert not any(made["session_api_key"] in _text(path) for path in Path(state).rglob("*journal*"))
        finally:
            assert second.stop() == 0


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.is_file() else ""
