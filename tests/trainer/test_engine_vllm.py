"""vLLM itself, on the tiny model: one engine for most tests, a second one to watch it die."""

from __future__ import annotations

import asyncio
import copy
import os
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from rollout_kit import disturb, tiny

from orchestrator.schema import Config
from trainer.engines import Sampling, open_engine
from trainer.engines.reference import logprobs
from trainer.errors import EngineDied, EngineError

if TYPE_CHECKING:
    from trainer.engines.vllm_engine import VllmEngine

pytestmark = pytest.mark.vllm
PROMPT = list(b"$ cat hint.txt\nIt is seven.\n$ ")


def configuration() -> Config:
    config = Config()
    config.model.dtype = "float32"
    config.rollout.max_prompt_length, config.rollout.max_response_length = 64, 448
    config.rollout.kv_cache_bytes = 64 << 20
    return config


def opened(model: torch.nn.Module, directory: Path) -> VllmEngine:
    model.save_pretrained(directory)  # type: ignore[operator]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # vLLM's own, at import and start
        return open_engine("vllm", model, directory, configuration())  # type: ignore[return-value]


@pytest.fixture(scope="module")
def strangers() -> list[str]:
    """Child processes that earlier modules left to this process; asked for before an engine opens."""
    return children()


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, strangers: list[str]) -> Iterator[VllmEngine]:
    made = opened(tiny(), tmp_path_factory.mktemp("model"))
    yield made
    asyncio.run(made.close())


def model_of(engine: VllmEngine) -> torch.nn.Module:
    return engine._model


def gap(model: torch.nn.Module, prompt: list[int], sample: Any, temperature: float = 1.0) -> torch.Tensor:
    """|engine - module| per sampled token."""
    return (logprobs(model, prompt, sample.ids, temperature) - torch.tensor(sample.logprobs)).abs()


def children() -> list[str]:
    """Child processes of this one."""
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()


async def change(engine: VllmEngine, version: int) -> None:
    disturb(model_of(engine))
    await engine.load(version)


async def test_new_weights_are_sampled_from_the_tied_head_too(engine: VllmEngine) -> None:
    assert await engine.probe(PROMPT) < 1e-4
    disturb(model_of(engine))
    assert await engine.probe(PROMPT) > 0.05, "the probe must see stale weights"
    await engine.load(1)
    assert engine.version == 1
    assert await engine.probe(PROMPT) < 1e-4


async def test_key_values_of_old_weights_are_dropped(engine: VllmEngine) -> None:
    """A prompt of several blocks, cached under the old weights, is computed anew under the new ones."""
    prompt = PROMPT * 5
    await engine.generate(prompt, Sampling(4, seed=0))
    await change(engine, 2)
    sample = await engine.generate(prompt, Sampling(8, seed=0, ignore_eos=True))
    assert gap(model_of(engine), prompt, sample).max() < 1e-4


async def test_an_update_in_flight_splits_a_request_in_two(engine: VllmEngine) -> None:
    """The tokens before it are the old policy's, those after it the new one's, and none is a mixture."""
    long = asyncio.create_task(engine.generate(PROMPT, Sampling(300, seed=3, ignore_eos=True)))
    await engine.generate(PROMPT, Sampling(20, seed=4, ignore_eos=True))
    before = tiny()
    before.load_state_dict(model_of(engine).state_dict())
    await change(engine, 3)
    assert not long.done()
    sample = await long
    old, new = gap(before, PROMPT, sample) < 1e-4, gap(model_of(engine), PROMPT, sample) < 1e-4
    split = int(old.int().cumprod(0).sum())
    assert 20 <= split < 300 and bool(new[split:].all())


async def test_a_request_tells_which_weights_sampled_its_tokens(engine: VllmEngine) -> None:
    """Weights that come while it is sampled: its later tokens are the new ones', in spans that say so."""
    await change(engine, 40)
    old = copy.deepcopy(model_of(engine))
    started = asyncio.create_task(engine.generate(PROMPT, Sampling(400, seed=1, ignore_eos=True)))
    await engine.generate(PROMPT, Sampling(20, seed=2, ignore_eos=True))  # by now the other one has begun
    await change(engine, 41)
    sample = await started
    (start, first), (cut, second) = sample.spans
    assert (start, first, second) == (0, 40, 41) and 0 < cut < 400
    assert gap(old, PROMPT, sample)[:cut].max() < 1e-4
    assert gap(model_of(engine), PROMPT, sample)[cut:].max() < 1e-4
    whole = await engine.generate(PROMPT, Sampling(5, ignore_eos=True))
    assert whole.spans == ((0, 41),)


async def test_greedy_takes_the_likeliest_token_each_time(engine: VllmEngine) -> None:
    sample = await engine.generate(PROMPT, Sampling(8, greedy=True, ignore_eos=True))
    again = await engine.generate(PROMPT, Sampling(8, greedy=True, ignore_eos=True, seed=5))
    ids = torch.tensor([PROMPT + sample.ids])
    with torch.no_grad():
        logits = model_of(engine)(input_ids=ids).logits[0, len(PROMPT) - 1 : -1]
    assert sample.ids == again.ids == logits.argmax(-1).tolist()


async def test_a_seed_repeats_whoever_else_is_in_the_batch(engine: VllmEngine) -> None:
    alone = await engine.generate(PROMPT, Sampling(12, seed=5))
    crowd = await asyncio.gather(*[engine.generate(PROMPT, Sampling(12, seed=n)) for n in range(12)])
    assert crowd[5] == alone and len({tuple(sample.ids) for sample in crowd}) > 6


async def test_temperature_is_on_both_sides(engine: VllmEngine) -> None:
    sample = await engine.generate(PROMPT, Sampling(16, 0.7, seed=1, ignore_eos=True))
    assert gap(model_of(engine), PROMPT, sample, 0.7).max() < 1e-4
    assert gap(model_of(engine), PROMPT, sample, 1.0).max() > 1e-2


async def test_stop_tokens_are_kept(engine: VllmEngine) -> None:
    free = await engine.generate(PROMPT, Sampling(12, seed=6, ignore_eos=True))
    stop = free.ids[5]
    cut = await engine.generate(PROMPT, Sampling(12, stop_token_ids=(stop,), seed=6, ignore_eos=True))
    assert (free.finish_reason, cut.finish_reason) == ("length", "stop")
    assert cut.ids == free.ids[: free.ids.index(stop) + 1]


async def test_too_long_a_prompt_fails_alone(engine: VllmEngine) -> None:
    fine = asyncio.create_task(engine.generate(PROMPT, Sampling(4)))
    with pytest.raises(EngineError, match="refused a prompt of 600 tokens"):
        await engine.generate([1] * 600, Sampling(4))
    assert (await fine).ids


async def test_a_cancelled_request_frees_its_slot(engine: VllmEngine) -> None:
    long = asyncio.create_task(engine.generate(PROMPT, Sampling(400, ignore_eos=True)))
    await engine.generate(PROMPT, Sampling(4, ignore_eos=True))
    long.cancel()
    await asyncio.gather(long, return_exceptions=True)
    thread = engine._alive()
    left = await asyncio.wrap_future(thread.call(lambda: thread.llm.get_num_unfinished_requests()))
    assert long.cancelled() and left == 0


def test_what_this_engine_cannot_do_is_refused(engine: VllmEngine, tmp_path: Path) -> None:
    config = configuration()
    with pytest.raises(EngineError, match="has a vLLM engine already"):
        open_engine("vllm", tiny(), tmp_path, config)
    config.rollout.tensor_parallel_size = 2
    with pytest.raises(EngineError, match="set it to 1"):
        open_engine("vllm", tiny(), tmp_path, config)


async def test_an_engine_that_dies_tells_everybody_and_closes_cleanly(
    engine: VllmEngine, tmp_path: Path, strangers: list[str]
) -> None:
    """A broken update is mended by a second one; when that breaks too, nobody is left waiting."""
    from trainer.engines import vllm_weights as weights

    await engine.close()
    model, broken = tiny(3), 0
    second = opened(model, tmp_path)

    def source() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal broken
        named = weights.named_tensors(model)
        yield next(named)
        if broken > 0:
            broken -= 1
            raise OSError("link down")
        yield from named

    weights.publish(second.source, source)
    broken = 1
    await second.load(1)
    assert await second.probe(PROMPT) < 1e-4
    waiting = [asyncio.create_task(second.generate(PROMPT, Sampling(400, ignore_eos=True))) for _ in range(3)]
    await second.generate(PROMPT, Sampling(4, ignore_eos=True))
    broken = 2
    with pytest.raises(EngineDied, match="link down"):
        await second.load(2)
    said = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(error) for error in said] == [EngineDied] * 3
    with pytest.raises(EngineDied):
        await second.generate(PROMPT, Sampling(1))
    await second.close()
    await second.close()
    assert "vllm-step" not in [thread.name for thread in threading.enumerate()]
    assert not set(children()) - set(strangers)
