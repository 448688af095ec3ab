"""One thread that owns a vLLM engine: coroutines post to it, it steps the engine and answers them.

What it is
    vLLM's in-process engine is a synchronous object that must be stepped. `EngineThread` is its only
    user: requests posted while a batch is running join it at the next step, and calls (weight
    updates) run between two steps. What the engine dies of reaches every waiter.

What it does not do
    It knows no model, no weights and no asyncio loop: it answers with `concurrent.futures`.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

from trainer.errors import EngineDied, EngineError


def _answer() -> Future[Any]:
    future: Future[Any] = Future()
    # From now on it cannot be cancelled from outside, so the thread may always set it: no race.
    future.set_running_or_notify_cancel()
    return future


@dataclass
class _Post:
    """One letter to the thread. `job` runs there; what it returns answers `future`, unless `later`."""

    job: Callable[[], Any]
    future: Future[Any] = field(default_factory=_answer)
    later: bool = False


class EngineThread:
    """Steps `llm` (a `vllm.v1.engine.llm_engine.LLMEngine`) until closed or dead."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm
        self.death: BaseException | None = None
        self._post: SimpleQueue[_Post | None] = SimpleQueue()
        self._gate = threading.Lock()  # orders posting against dying: nothing is posted to a dead thread
        self._running: dict[str, Future[Any]] = {}  # touched by the thread only
        self._numbers = itertools.count()
        self._thread = threading.Thread(target=self._live, name="vllm-step", daemon=True)
        self._thread.start()

    def call(self, function: Callable[[], Any]) -> Future[Any]:
        """Run `function` between two steps."""
        return self._send(_Post(function)).future

    def request(self, ids: list[int], params: Any) -> tuple[str, Future[Any]]:
        """Start a request; the future gets vLLM's finished RequestOutput."""
        name = f"r{next(self._numbers)}"
        post = _Post(lambda: self._admit(name, ids, params, post.future), later=True)
        return name, self._send(post).future

    def abort(self, name: str) -> None:
        """Free the slot of a request that nobody waits for any more. Never raises."""
        with self._gate:
            if self.death is None:
                self._post.put(_Post(lambda: self._drop(name)))

    def close(self, timeout_s: float = 60.0) -> None:
        """Stop stepping and fail whoever still waits. Safe to call twice."""
        self._post.put(None)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise EngineError(f"the vLLM thread did not stop within {timeout_s:g} s; a step hangs")

    # --- posting, in any thread ---

    def _send(self, post: _Post) -> _Post:
        with self._gate:
            if self.death is not None:
                raise EngineDied(f"the vLLM engine is gone: {self.death!r}") from self.death
            self._post.put(post)
        return post

    # --- the thread ---

    def _live(self) -> None:
        cause: BaseException = EngineDied("the engine was closed")
        try:
            self._serve()
        except BaseException as error:  # whatever it is, a dead engine must not look like a slow one
            cause = error
        finally:
            self._die(cause)

    def _serve(self) -> None:
        while True:
            while not self._post.empty() or not self.llm.has_unfinished_requests():
                post = self._post.get()
                if post is None:
                    return
                self._do(post)
            for output in self.llm.step():
                if output.finished and (future := self._running.pop(output.request_id, None)):
                    future.set_result(output)

    def _do(self, post: _Post) -> None:
        try:
            value = post.job()
        except EngineDied as error:
            post.future.set_exception(error)
            raise
        except Exception as error:  # one caller's mistake (a prompt too long) is that caller's only
            post.future.set_exception(error)
        else:
            if not post.later:
                post.future.set_result(value)

    def _admit(self, name: str, ids: list[int], params: Any, future: Future[Any]) -> None:
        try:
            self.llm.add_request(name, {"prompt_token_ids": ids}, params)
        except Exception as error:  # vLLM has several kinds for a request that does not fit
            raise EngineError(f"vLLM refused a prompt of {len(ids)} tokens: {error}") from error
        self._running[name] = future

    def _drop(self, name: str) -> None:
        if self._running.pop(name, None) is not None:
            self.llm.abort_request([name])

    def _die(self, cause: BaseException) -> None:
        with self._gate:
            self.death = cause
        waiting = list(self._running.values())
        while not self._post.empty():
            if (post := self._post.get()) is not None:
                waiting.append(post.future)
        for future in waiting:
            error = EngineDied(f"the vLLM engine is gone: {cause!r}")
            error.__cause__ = cause
            future.set_exception(error)
        self._running.clear()
