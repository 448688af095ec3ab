"""The exact engine: its tokens depend on ids, seed and weights, and on nothing else."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator

import pytest
import torch
from rollout_kit import disturb, tiny

from trainer.engines import Sampling, open_engine
from trainer.engines.reference import logprobs
from trainer.engines.torch_engine import TorchEngine
from trainer.errors import EngineDied, EngineError

PROMPT = list(b"$ cat hint.txt\n")


@pytest.fixture
async def engine() -> AsyncIterator[TorchEngine]:
    made = TorchEngine(tiny(), max_length=64)
    yield made
    await made.close()


async def test_order_of_arrival_does_not_matter(engine: TorchEngine) -> None:
    asked = [Sampling(6, seed=n) for n in range(5)]
    one = await asyncio.gather(*[engine.generate(PROMPT, s) for s in asked])
    two = await asyncio.gather(*[engine.generate(PROMPT, s) for s in reversed(asked)])
    assert one == two[::-1]
    assert len({tuple(sample.ids) for sample in one}) == 5


@pytest.mark.parametrize("temperature", [1.0, 0.7])
async def test_logprobs_are_those_of_a_plain_forward_pass(engine: TorchEngine, temperature: float) -> None:
    sample = await engine.generate(PROMPT, Sampling(12, temperature, seed=1, ignore_eos=True))
    plain = logprobs(tiny(), PROMPT, sample.ids, temperature)
    assert torch.allclose(plain, torch.tensor(sample.logprobs), atol=1e-5)


async def test_the_live_weights_are_sampled_from_and_the_probe_says_so(engine: TorchEngine) -> None:
    before = await engine.generate(PROMPT, Sampling(8, seed=1))
    disturb(engine._model)
    await engine.load(4)
    assert engine.version == 4 and await engine.probe(PROMPT) < 1e-4
    assert await engine.generate(PROMPT, Sampling(8, seed=1)) != before


async def test_stop_tokens_are_kept(engine: TorchEngine) -> None:
    free = await engine.generate(PROMPT, Sampling(8, seed=2))
    stop = free.ids[3]
    cut = await engine.generate(PROMPT, Sampling(8, stop_token_ids=(stop,), seed=2))
    assert cut.finish_reason == "stop" and cut.ids == free.ids[: free.ids.index(stop) + 1]


async def test_what_does_not_fit_is_refused_and_the_rest_is_cut(engine: TorchEngine) -> None:
    with pytest.raises(EngineError, match="allowed are 1 to 63"):
        await engine.generate([1] * 64, Sampling(1))
    assert len((await engine.generate([1] * 60, Sampling(20, ignore_eos=True))).ids) == 4
    with pytest.raises(EngineError, match="temperature"):
        Sampling(4, temperature=0)


async def test_a_cancelled_request_leaves_the_engine_usable(engine: TorchEngine) -> None:
    long = asyncio.create_task(engine.generate(PROMPT, Sampling(40, ignore_eos=True)))
    await asyncio.sleep(0)  # into the engine's thread
    long.cancel()
    with pytest.raises(asyncio.CancelledError):
        await long
    assert len((await engine.generate(PROMPT, Sampling(3, ignore_eos=True))).ids) == 3


async def test_closing_leaves_no_thread_and_refuses(engine: TorchEngine) -> None:
    await engine.generate(PROMPT, Sampling(1))
    await engine.close()
    await engine.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("torch-engine")]
    with pytest.raises(EngineDied):
        await engine.generate(PROMPT, Sampling(1))


def test_an_unknown_engine_is_refused(tmp_path: object) -> None:
    with pytest.raises(EngineError, match="vllm, torch"):
        open_engine("tgi", tiny(), None, None)  # type: ignore[arg-type]
