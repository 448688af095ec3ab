"""A server's life in its process: settings, listener, start, announcement, drain, end.

What it is
    What `python -m runtime_server` does when it serves. It is a module of its own because it imports the
    web framework and the engines, and `--sweep`, which each runtime job runs twice, needs neither.

How to use it
    from runtime_server.__main__ import arguments; exit(serving.main(arguments(["--port", "8080"])))

What it does not do
    It reads no command line, and it removes nothing that another server left (`runtime_server.__main__`).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import logging
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import uvicorn
import uvloop
import yaml

from orchestrator.contract import Env, Exit, Heartbeat, Role, RunDirectory, publish_bytes
from orchestrator.schema import Config, Runtime
from orchestrator.typed import Invalid
from runtime_server.agent.build import BuildError
from runtime_server.app import Identity, create_app, default_sandboxes, store_of
from runtime_server.claims import claim_of
from runtime_server.dialects.keys import KEY_MIN, NAMES, given
from runtime_server.engines import EngineError
from runtime_server.engines.ownership import scratch
from runtime_server.engines.service import find_programs
from runtime_server.errors import SandboxError
from runtime_server.image_store import ImageError
from runtime_server.images import provide
from runtime_server.listening import Bounded
from runtime_server.publish import Publication, address, check, identity_of, new_key, shared_key
from runtime_server.sandboxes import Sandboxes
from runtime_server.wire import API_KEY_HEADER

log = logging.getLogger("runtime_server")


def main(options: argparse.Namespace) -> int:
    """Serve until told to stop; returns what to exit with. Raises ContractError, OSError."""
    raise_open_files()
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(serve(settings(options)))
    except Refused as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code


class Refused(Exception):
    """The server cannot start; the message says what to do, the code is the process's exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Settings:
    """What one process serves. `run` is None for a server that stands alone."""

    config: Runtime
    run: RunDirectory | None
    verbose: bool = False
    server: str = ""
    """Its name among several servers of the run; "" for the only one."""


class Uvicorn(uvicorn.Server):
    """uvicorn without its own signal handlers: a drain must answer 503, not hang up."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def settings(options: argparse.Namespace) -> Settings:
    """Raises Refused for a configuration that cannot be."""
    run = RunDirectory(options.run_dir) if options.run_dir else None
    whole = _config_of(run) if run else Config(runtime=Runtime(host="127.0.0.1"))
    names = ("host", "port", "state_dir", "engine")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    sandbox = whole.runtime.sandbox.model_dump() | ({"image": options.image} if options.image else {})
    try:
        config = Runtime.model_validate(whole.runtime.model_dump() | given | {"sandbox": sandbox})
    except Invalid as error:
        raise Refused(f"wrong option: {error}", Exit.USAGE) from None
    return Settings(config, run, options.verbose or whole.environment.debug, options.server)


def _config_of(run: RunDirectory) -> Config:
    try:
        return Config.model_validate(yaml.safe_load(run.config.read_text()) or {})
    except OSError as error:
        raise Refused(f"{run.root} holds no run: {error}", Exit.NO_INPUT) from None
    except (ValueError, yaml.YAMLError) as error:  # Invalid is a ValueError
        raise Refused(f"{run.config} is wrong: {error}", Exit.USAGE) from None


def listen(host: str, port: int) -> socket.socket:
    """A bound and listening socket, before anything slow starts. Raises Refused when the port is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
        bound.listen(2048)
    except OSError as error:
        bound.close()
        raise Refused(
            f"cannot listen on {host} port {port}: {error.strerror}. Is another server running there? "
            "Choose another with --port or runtime.port; 0 takes a free one.",
            Exit.USAGE,
        ) from None
    return bound


async def serve(told: Settings) -> int:
    """From nothing to nothing: bind, start, announce, serve, drain, remove. Raises Refused."""
    stop = _Stop()
    key = await asyncio.to_thread(_key_of, told)
    with listen(told.config.host, told.config.port) as bound, contextlib.ExitStack() as stack:
        sandboxes = await _started(told, stop)
        if sandboxes is None:
            return Exit.OK
        try:
            who = (
                identity_of(told.run, told.server)
                if told.run
                else Identity(nonce=key[:8] + os.urandom(8).hex())
            )
            app = create_app(told.config, key=key, identity=who, sandboxes=sandboxes)
            server = Uvicorn(_uvicorn(app, told.verbose))
            serving = asyncio.create_task(server.serve([bound]))
            url = address(told.config.host, bound.getsockname()[1], told.config.advertise_host)
            await _announce(told, url, key, who, stack)
            spare_pauses()
            await stop.wait(serving)
            await _drain(sandboxes, told.config.drain_timeout, stop)
            await sandboxes.stop()  # before the listener closes: commands cut short get an answer
            server.should_exit = True
            await serving
        finally:
            await sandboxes.stop()
    return Exit.OK


def _key_of(told: Settings) -> str:
    """That of the run's servers; of one that stands alone what the environment says, else a new one."""
    if told.run:
        return shared_key(told.run) if told.server else new_key()
    key = given() or new_key()
    if len(key) < KEY_MIN:
        names = " or ".join(NAMES)
        raise Refused(
            f"the key in {names} is shorter than {KEY_MIN} characters: take a longer one", Exit.USAGE
        )
    return key


async def _started(told: Settings, stop: _Stop) -> Sandboxes | None:
    """None when a signal came first. Raises Refused."""
    config = told.config
    try:
        providing = asyncio.create_task(_unawaited(lambda: _provide(config)))
        await stop.wait(providing)
        if not providing.done():
            return None
        await providing
        claim = claim_of(told.run, told.server) if told.run else told.config.state_dir and "alone"
        sandboxes = await asyncio.to_thread(default_sandboxes, config, claim)
        starting = asyncio.create_task(sandboxes.start())
        await stop.wait(starting)
        if not starting.done():
            starting.cancel()
        await starting
        return sandboxes
    except asyncio.CancelledError:
        return None
    except (EngineError, BuildError) as error:
        raise Refused(str(error), Exit.PEER_GONE) from None
    except (ImageError, subprocess.TimeoutExpired) as error:
        raise Refused(str(error), Exit.NO_INPUT) from None
    except SandboxError as error:
        raise Refused(
            f"{error}. `python -m runtime_server.images ensure` makes the default image.", Exit.NO_INPUT
        ) from None


async def _unawaited(work: Callable[[], None]) -> None:
    """In a thread that the process does not wait for when it ends."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()

    def settle(error: BaseException | None) -> None:
        if not done.done():
            done.set_exception(error) if error else done.set_result(None)

    def run() -> None:
        told: BaseException | None = None
        try:
            work()
        except BaseException as error:  # whatever it is, it belongs to the one who waits
            told = error
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(settle, told)

    threading.Thread(target=run, daemon=True).start()
    await done


def _provide(config: Runtime) -> None:
    """Have the images here before anything starts; the first server on a node does it for all."""
    if config.engine != "podman":
        return
    find_programs()
    files = [Path(name).expanduser() for name in config.image_archives]
    provide(store_of(config), config.sandbox.image, files, log.info)


async def _announce(told: Settings, url: str, key: str, who: Identity, stack: contextlib.ExitStack) -> None:
    """Tell the run, or the person, where we are. Raises Refused."""
    if told.run is None:
        problem = await check(url, key, who)
        stack.enter_context(_key_file(url, key)) if not problem else None
    else:
        places = told.config.max_parallel_sandboxes
        publication = Publication(told.run, who, key, told.server, places)
        problem = await publication.announce(url)
        stack.callback(publication.withdraw)
        if told.server:
            stack.enter_context(Heartbeat(told.run.server_heartbeat(told.server)))
        elif not os.environ.get(Env.NONCE):  # no job around us that beats
            stack.enter_context(Heartbeat(told.run.heartbeat(Role.RUNTIME)))
    if problem:
        raise Refused(problem, Exit.SOFTWARE)
    log.info("ready at %s", url)


@contextlib.contextmanager
def _key_file(url: str, key: str) -> Iterator[None]:
    """The key of a server that stands alone: in a private file for as long as it runs, never in a log."""
    folder = scratch()
    try:
        path, header = folder / "api_key.txt", folder / "header.txt"
        publish_bytes(path, f"{key}\n".encode(), 0o600)
        publish_bytes(header, f"{API_KEY_HEADER}: {key}\n".encode(), 0o600)
        print(f"url:  {url}\nkey:  {path}\ntry:  {curl_line(url, header)}", flush=True)
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def curl_line(url: str, header: Path) -> str:
    """A line that makes a sandbox. curl reads the key from a file: it shows in no list of processes."""
    return f"curl -s -H @{header} -H 'Content-Type: application/json' -d '{{}}' {url}/v1/sandboxes"


async def _drain(sandboxes: Sandboxes, timeout_s: float, stop: _Stop) -> None:
    draining = asyncio.create_task(sandboxes.drain(timeout_s))
    await stop.wait(draining, again=True)
    draining.cancel()
    await asyncio.gather(draining, return_exceptions=True)


class _Stop:
    """SIGTERM and SIGINT, as something to wait for. The first asks to drain, the second not to wait."""

    def __init__(self) -> None:
        self._signals = (asyncio.Event(), asyncio.Event())
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal)

    def _on_signal(self) -> None:
        first, second = self._signals
        (second if first.is_set() else first).set()

    async def wait(self, work: asyncio.Task[None], again: bool = False) -> None:
        """Until the signal (with `again` the second one), or until `work` is over."""
        signalled = asyncio.create_task(self._signals[again].wait())
        await asyncio.wait({signalled, work}, return_when=asyncio.FIRST_COMPLETED)
        signalled.cancel()


def _uvicorn(app: object, verbose: bool) -> uvicorn.Config:
    return uvicorn.Config(
        app,  # type: ignore[arg-type]  # FastAPI's call is wider than uvicorn's protocol says
        loop="uvloop",
        http=Bounded,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=verbose,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        timeout_keep_alive=120,  # longer than the client's, so that the client hangs up first
        timeout_graceful_shutdown=5,
    )


def spare_pauses() -> None:
    """What exists once the server runs stays: 90,000 objects of routes and models. The collector takes 50 ms
    to look at them, in which no command is answered, and finds nothing. It need not look at them again, and
    at the others more rarely: hardly anything here is in a circle."""
    gc.freeze()
    gc.set_threshold(10_000, 20, 50)


def raise_open_files() -> None:
    """A socket for each sandbox and each client: the usual soft limit of 1024 is soon reached."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
