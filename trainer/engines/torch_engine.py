"""The exact rollout engine: plain torch, one request at a time, the same answer in any order.

What it is
    Samples from the live module itself, or from a copy of its own, with a key-value cache. Each request
    has its own generator and its own forward passes, so its tokens depend on its ids, its seed and the
    weights and on nothing else: not on what else is running, and not on the order of arrival.

How to use it
    engine = TorchEngine(model, temperature=1.0); sample = await engine.generate(ids, Sampling(28, seed=1))

What it does not do
    No batching (that is what vLLM is for). Without a copy, `load` only notes the version, and the caller must
    not train while a request is running. With one (`copied`), `load` may come in the middle of a request: the
    tokens after it are sampled by the new weights, from key-values that are computed anew.
"""

from __future__ import annotations

import asyncio
import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from trainer.engines import Sample, Sampling
from trainer.engines.reference import PROBE_TOKENS, difference
from trainer.errors import EngineDied, EngineError

if TYPE_CHECKING:
    from orchestrator.schema import Config


class TorchEngine:
    """See the module's docstring; implements `trainer.engines.Engine`."""

    def __init__(
        self,
        model: nn.Module,
        temperature: float = 1.0,
        max_length: int = 1 << 20,
        seed: int = 0,
        copied: bool = False,
    ) -> None:
        self.version = 0
        self._live, self._temperature, self._max_length = model, temperature, max_length
        self._model = copy.deepcopy(model).requires_grad_(False) if copied else model
        self._between_tokens = threading.Lock()
        self._random = torch.Generator().manual_seed(seed)
        self._eos = _eos_ids(model)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="torch-engine")
        self._closed = False

    @classmethod
    def over(cls, model: nn.Module, config: Config) -> Self:
        """The engine that a run's configuration asks for."""
        rollout = config.rollout
        longest = rollout.max_prompt_length + rollout.max_response_length
        return cls(model, rollout.temperature, longest, config.run.seed, rollout.asynchronous)

    async def generate(self, ids: list[int], sampling: Sampling) -> Sample:
        """Continue `ids`; the event loop stays free meanwhile. Raises EngineError, EngineDied."""
        if self._closed:
            raise EngineDied("the torch engine is closed; open another one")
        room = self._max_length - len(ids)
        if room < 1 or not ids:
            raise EngineError(f"a prompt of {len(ids)} tokens; allowed are 1 to {self._max_length - 1}")
        stop = threading.Event()
        work = self._thread.submit(self._sample, list(ids), sampling, min(room, sampling.max_tokens), stop)
        try:
            return await asyncio.wrap_future(work)
        except asyncio.CancelledError:
            stop.set()
            raise

    async def load(self, version: int) -> None:
        """Note the version; with a copy, bring the live weights to it, between two tokens."""
        await asyncio.to_thread(self._load, version)

    def _load(self, version: int) -> None:
        with self._between_tokens, torch.no_grad():
            if self._model is not self._live:
                for mine, theirs in zip(self._model.parameters(), self._live.parameters(), strict=True):
                    mine.copy_(theirs)
            self.version = version

    async def probe(self, prompt: list[int]) -> float:
        """Largest difference in nats between cached sampling and one plain forward pass."""
        sampling = Sampling(PROBE_TOKENS, self._temperature, seed=0, ignore_eos=True)
        sample = await self.generate(prompt, sampling)
        return difference(self._live, prompt, sample.ids, sample.logprobs, self._temperature)

    async def close(self) -> None:
        """Let the running request end, then release the thread."""
        self._closed = True
        await asyncio.to_thread(self._thread.shutdown, wait=True, cancel_futures=True)

    def _sample(self, ids: list[int], sampling: Sampling, most: int, cancelled: threading.Event) -> Sample:
        random = self._random if sampling.seed is None else torch.Generator().manual_seed(sampling.seed)
        stops = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else self._eos)
        out, logprobs, cache, feed = list[int](), list[float](), None, ids
        spans: list[tuple[int, int]] = []
        while len(out) < most and not cancelled.is_set():
            with self._between_tokens:
                if not spans or spans[-1][1] != self.version:  # old weights' key-values would be wrong
                    spans.append((len(out), self.version))
                    cache, feed = None, ids + out
                logits, cache = self._forward(feed, cache)
            token, logprob = _draw(logits / sampling.temperature, random, sampling.greedy)
            out.append(token)
            logprobs.append(logprob)
            feed = [token]
            if token in stops:
                return Sample(out, logprobs, "stop", tuple(spans))
        return Sample(out, logprobs, "length", tuple(spans))

    @torch.no_grad()
    def _forward(self, ids: list[int], cache: Any) -> tuple[Tensor, Any]:
        """Logits [vocabulary] after the last id, float32 on the CPU, and the grown cache."""
        device = next(self._model.parameters()).device
        out = self._model(
            input_ids=torch.tensor([ids], device=device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits[0, -1].float().cpu(), out.past_key_values


def _draw(logits: Tensor, random: torch.Generator, greedy: bool = False) -> tuple[int, float]:
    """One token of the full distribution, or its likeliest, and its log-probability."""
    scores = logits.log_softmax(-1)
    token = int(scores.argmax()) if greedy else int(torch.multinomial(scores.exp(), 1, generator=random))
    return token, float(scores[token])


def _eos_ids(model: nn.Module) -> set[int]:
    """Every end-of-sequence id that the model's configuration names (one, a list, or none)."""
    eos = getattr(getattr(model, "config", None), "eos_token_id", None)
    return set() if eos is None else {eos} if isinstance(eos, int) else set(eos)
