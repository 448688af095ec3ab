"""The private Podman API service of one server: its own socket, storage and configuration.

What it is
    `Service.start` writes containers.conf and storage.conf into the server's own `State` and runs
    `podman system service` on them; `stop` ends it. The user's Podman is neither read nor changed.

What was measured and therefore set (bench/sandbox.py repeats it)
    - State on a tmpfs, layers on disk, overlay mounted `volatile`: no fsync at mount, use and unmount.
    - The service has a mount namespace of its own (an ordinary user's a user namespace too): no mount of a
      sandbox ever shows on the host or can leak, whatever is killed. In it the unified half of hybrid
      cgroups is hidden, because crun refuses hybrid mode; crun then costs two thirds of what runc does.
    - conmon runs without an exit command: each would start a whole Podman (30 ms of CPU) only to unmount
      what the server removes in any case.
    - Locks in files of our own: the default is one shared-memory segment for all Podmans of a user.

What it does not do
    It knows nothing of containers; `podman.py` speaks to the socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import stat
import subprocess
import time
from pathlib import Path

from orchestrator.contract import Env
from runtime_server.engines import EngineError, graph, namespace, processes
from runtime_server.engines.state import State

START_S = 30.0
STOP_S = 5.0
RUNTIMES = ("crun", "runc")
PASSED_ON = ("PATH", "HOME", "LANG", "TMPDIR", "SSL_CERT_FILE", "SSL_CERT_DIR", "REGISTRIES_CONFIG_PATH")
PROXIES = ("http_proxy", "https_proxy", "no_proxy")
_CONMON_PATHS = ("/usr/bin/conmon", "/usr/libexec/podman/conmon", "/usr/local/bin/conmon")

# Leaves out --exit-command and its arguments, which come as pairs of an option and a value.
_CONMON = """#!/bin/sh
n=$#
while [ "$n" -gt 0 ]; do
    option=$1
    shift
    n=$((n - 1))
    case $option in
    --exit-command | --exit-command-arg | --exit-delay)
        shift
        n=$((n - 1))
        ;;
    *) set -- "$@" "$option" ;;
    esac
done
exec {conmon} "$@"
"""


def find_programs() -> list[str]:
    """The OCI runtimes that are installed. EngineError when something that must be there is not."""
    if shutil.which("podman") is None:
        raise EngineError(
            "podman is not installed on this node. Debian: apt-get install podman crun; "
            "elsewhere ask an administrator, or load the module that has it (runtime.setup_commands)."
        )
    runtimes = [name for name in RUNTIMES if shutil.which(name)]
    if not runtimes:
        raise EngineError("no OCI runtime is installed: install crun or runc (Debian: apt-get install crun)")
    return runtimes


class Service:
    """One `podman system service`."""

    def __init__(self, state: State, image_store: Path | None, runtime: str) -> None:
        self.state, self.image_store, self.runtime = state, image_store, runtime
        self._process: subprocess.Popen[bytes] | None = None
        self._storage: dict[str, str] = {}

    @property
    def pid(self) -> int:
        """Of the running service; 0 when there is none."""
        return self._process.pid if self._process is not None else 0

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    async def start(self) -> None:
        """Write the settings, start the service, wait until it answers. Raises EngineError."""
        self._configure()
        await asyncio.to_thread(graph.tidy, self.state.graphroot, self.state.runroot)
        self.state.socket.unlink(missing_ok=True)
        self._spawn()
        deadline = time.monotonic() + START_S
        while not self._answers():
            if not self.alive or time.monotonic() > deadline:
                await self.stop()
                raise EngineError(f"Podman's API service did not start: {self.last_words()}")
            await asyncio.sleep(0.01)

    def _spawn(self) -> None:
        with self.state.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.command(),
                env=self.environment(),
                cwd=self.state.root,  # conmon leaves a file named `oom` where it was started
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # a Ctrl-C in the terminal is for the server alone
            )

    async def stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        if not await processes.wait_gone(process.pid, STOP_S):
            process.kill()
        await asyncio.to_thread(process.wait)

    def last_words(self) -> str:
        with contextlib.suppress(OSError):
            lines = self.state.log.read_text(errors="replace").strip().splitlines()
            return "\n".join(line for line in lines if "CNI config" not in line)[-800:] or "it said nothing"
        return "it left no log"

    def command(self) -> list[str]:
        podman = ["podman", "--runtime-flag", f"root={self.state.oci}"]
        service = ["system", "service", "--time=0", f"unix://{self.state.socket}"]
        return [*namespace.entry().prefix, *podman, *service]

    def environment(self) -> dict[str, str]:
        """Little of the server's own: settings, proxies for pulling, the run's mark for orphan hunters."""
        names = {*PASSED_ON, *PROXIES, *(p.upper() for p in PROXIES), Env.NONCE.value}
        kept = {name: value for name, value in os.environ.items() if name in names}
        own = {"CONTAINERS_CONF": str(self.state.containers_conf), "XDG_RUNTIME_DIR": str(self.state.xdg)}
        return kept | own | self._storage

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(1)
            probe.connect(str(self.state.socket))
            return True
        return False

    def _configure(self) -> None:
        self._storage = namespace.configure_storage(
            self.state.config, self.state.graphroot, self.state.runroot, self.image_store
        )
        self.state.containers_conf.write_text(containers_conf(self.state, self.runtime, self._lean_conmon()))

    def _lean_conmon(self) -> Path | None:
        """Our conmon without exit command; None where scripts cannot be run from the storage."""
        real = shutil.which("conmon") or next((p for p in _CONMON_PATHS if Path(p).exists()), None)
        if real is None:
            return None
        self.state.conmon.write_text(_CONMON.format(conmon=real))
        self.state.conmon.chmod(stat.S_IRWXU)
        try:
            done = subprocess.run(
                [str(self.state.conmon), "--version"], capture_output=True, timeout=10, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return self.state.conmon if done.returncode == 0 else None


def containers_conf(state: State, runtime: str, conmon: Path | None) -> str:
    """Podman's settings: nothing of the host's environment, no logs, no events, everything in `state`."""
    lean = f'conmon_path = ["{conmon}"]\n' if conmon else ""
    return (
        '[containers]\nlog_driver = "none"\nhttp_proxy = false\nenv_host = false\ntz = ""\n'
        f'[network]\nnetwork_config_dir = "{state.network}"\n'
        f'[engine]\nruntime = "{runtime}"\ncgroup_manager = "cgroupfs"\nevents_logger = "none"\n'
        f'lock_type = "file"\nstatic_dir = "{state.static}"\ntmp_dir = "{state.tmp}"\n'
        f'volume_path = "{state.volumes}"\nexit_command_delay = 1\n{lean}'
    )
