"""A small runtime server for tests: publishes address, key and flag as the real one, answers `/health`.

Arguments, in any order: `never-ready` (listens, says nothing), `die-before` (exit 3 at once), `no-helper`.
It has a helper in a session of its own, as a container monitor would be. TERM ends it and the helper.
"""

from __future__ import annotations

import http.server
import json
import os
import secrets
import signal
import subprocess
import sys
import threading

from orchestrator.contract import Env, ReadyFlag, RunDirectory

run, nonce = RunDirectory(os.environ[Env.RUN_DIR]), os.environ[Env.NONCE]
attempt, key = int(os.environ[Env.ATTEMPT]), secrets.token_hex(8)


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


if "die-before" in sys.argv:
    sys.exit(3)
if "no-helper" not in sys.argv:
    subprocess.run(["setsid", "--fork", "sleep", "1000"], check=True)
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
if "never-ready" not in sys.argv:
    url = f"http://127.0.0.1:{server.server_address[1]}"
    run.publish(run.runtime_api_key, key, 0o600)
    run.publish(run.runtime_url, url)
    flag = ReadyFlag(
        run_id=run.run_id, attempt=attempt, job_id="", nonce=nonce, host="localhost", pid=os.getpid(), url=url
    )
    run.publish(run.ready_flag, flag)
server.serve_forever(poll_interval=0.05)
