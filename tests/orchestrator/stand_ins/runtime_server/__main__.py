"""Stands in the place of the sandbox server in tests of whole runs: publishes address, key and flag as the
real one, answers `/health`, and has no sandboxes.

`python -m runtime_server --run-dir R` where this package is found first on PYTHONPATH, or as a program.
Arguments, in any order: `never-ready` (listens, says nothing), `die-before` (exit 3 at once).
`--server NAME`: one of several, registers itself instead and answers to the run's key; a name in
SERVERS_DIE_AT_ONCE (`2,3`) exits with 3.
It has a helper in a session of its own, as a container monitor would be. TERM ends it, and the job's end
the helper. SERVER_DIES names a file: once it is there, the server dies of SIGKILL; each server where it is
empty, only the first (which takes it away) where it says `once`.
"""

from __future__ import annotations

import http.server
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from orchestrator.contract import Env, ReadyFlag, RunDirectory, ServerRecord

if "--sweep" in sys.argv:
    sys.exit(0)
run, nonce = RunDirectory(os.environ[Env.RUN_DIR]), os.environ[Env.NONCE]
attempt, key = int(os.environ[Env.ATTEMPT]), secrets.token_hex(8)
name = sys.argv[sys.argv.index("--server") + 1] if "--server" in sys.argv else ""
if name:
    key, nonce = run.read_text(run.runtime_api_key), secrets.token_hex(8)


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        who = {"run_id": run.run_id, "nonce": nonce, "attempt": attempt, "version": "0"}
        known = self.headers.get("X-API-Key") == key
        body = json.dumps({"status": "ok", **(who if known else {})}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def die_when_told() -> None:
    trigger = Path(os.environ["SERVER_DIES"])
    while not trigger.exists():
        time.sleep(0.05)
    if trigger.read_text() == "once":
        trigger.unlink()
    os.kill(os.getpid(), signal.SIGKILL)


def publish(host: str, port: int) -> None:
    url = f"http://{host}:{port}"
    if name:
        who = {"run_id": run.run_id, "attempt": attempt, "job_id": "", "nonce": nonce}
        record = ServerRecord(name=name, host=socket.gethostname(), pid=os.getpid(), url=url, places=4, **who)
        run.publish(run.server(name), record)
        return
    run.publish(run.runtime_api_key, key, 0o600)
    run.publish(run.runtime_url, url)
    flag = ReadyFlag(
        run_id=run.run_id, attempt=attempt, job_id="", nonce=nonce, host=host, pid=os.getpid(), url=url
    )
    run.publish(run.ready_flag, flag)


if "die-before" in sys.argv or name in os.environ.get("SERVERS_DIE_AT_ONCE", "-").split(","):
    sys.exit(3)
if "SERVER_DIES" in os.environ:
    threading.Thread(target=die_when_told, daemon=True).start()
subprocess.run(["setsid", "--fork", "sleep", "1000"], check=True)
# Other hosts of a cluster must reach it; a machine's own name need not lead anywhere.
listen, host = ("0.0.0.0", socket.gethostname()) if "SLURM_JOB_ID" in os.environ else ("127.0.0.1",) * 2
server = http.server.ThreadingHTTPServer((listen, 0), Handler)
signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
if "never-ready" not in sys.argv:
    publish(host, server.server_address[1])
server.serve_forever(poll_interval=0.05)
