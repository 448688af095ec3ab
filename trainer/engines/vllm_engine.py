"""The fast rollout engine: vLLM in this process, in-flight batching, weights straight from the trainer.

What it is
    `VllmEngine` builds vLLM's engine over a saved copy of the policy, keeps it in step with the live
    module (`load`), and proves it (`probe`). Log-probabilities are those of the distribution that was
    sampled from, temperature included.

How to use it
    engine = VllmEngine.over(policy, directory, config)      # directory: policy.save_pretrained(directory)
    await engine.load(step); assert await engine.probe(prompt) < 1e-4

What it does not do
    No tensor parallelism: that takes vLLM's own processes, where the tensors are not live. No text.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import nn

from trainer.engines import Sample, Sampling
from trainer.engines.reference import PROBE_TOKENS, difference
from trainer.errors import EngineDied, EngineError

# Read by vLLM when it is imported: one process (the tensors must be live), no pinning of threads, quiet.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
# vLLM's CPU worker takes its number of threads from here and cannot be told later.
os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))

from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.llm_engine import LLMEngine

from trainer.engines import vllm_weights as weights
from trainer.engines.vllm_thread import EngineThread

if TYPE_CHECKING:
    from orchestrator.schema import Config

CPU_KV_CACHE_BYTES = 256 << 20
_names = itertools.count()


class VllmEngine:
    """See the module's docstring; implements `trainer.engines.Engine`. One at a time in a process."""

    _open: ClassVar[bool] = False

    def __init__(self, model: nn.Module, arguments: dict[str, Any], temperature: float = 1.0) -> None:
        """Build the engine (seconds); `arguments` are vLLM's EngineArgs. Raises EngineError."""
        if VllmEngine._open:
            raise EngineError(
                "this process has a vLLM engine already, and vLLM's groups are global; close it"
            )
        self.version = 0
        self.timings: dict[str, float] = {}
        self._model, self._temperature = model, temperature
        self._exact = arguments.get("dtype") == "float32"
        self.source = f"policy-{next(_names)}"
        weights.publish(self.source, lambda: weights.named_tensors(model))
        start = time.perf_counter()
        try:
            llm = LLMEngine.from_engine_args(EngineArgs(**arguments))
        except (ValueError, RuntimeError, OSError) as error:
            weights.withdraw(self.source)
            raise EngineError(f"vLLM cannot be started with this configuration: {error}") from error
        self.timings["init_s"] = time.perf_counter() - start
        self._thread: EngineThread | None = EngineThread(llm)
        VllmEngine._open = True

    @classmethod
    def over(cls, model: nn.Module, directory: Path, config: Config) -> Self:
        """The engine that a run's configuration asks for."""
        return cls(model, engine_arguments(directory, config), config.rollout.temperature)

    async def generate(self, ids: list[int], sampling: Sampling) -> Sample:
        """Continue `ids` in the running batch. Raises EngineError when they do not fit, EngineDied."""
        name, future = self._alive().request(ids, _params(sampling))
        try:
            output = await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            self._alive().abort(name)
            raise
        return _sample(output.outputs[0])

    async def load(self, version: int) -> None:
        """Take over the module's present weights between two steps; requests may be running.

        Raises EngineDied when that failed twice: the engine's weights are then incomplete.
        """
        start = time.perf_counter()
        await asyncio.wrap_future(self._alive().call(lambda: self._sync(version)))
        self.version = version
        self.timings["sync_s"] = time.perf_counter() - start

    async def probe(self, prompt: list[int]) -> float:
        """Difference in nats between engine and module on 16 fresh tokens (`reference.difference`)."""
        sampling = Sampling(PROBE_TOKENS, self._temperature, seed=self.version, ignore_eos=True)
        sample = await self.generate(prompt, sampling)
        return difference(self._model, prompt, sample.ids, sample.logprobs, self._temperature, self._exact)

    async def close(self) -> None:
        """Stop the thread, shut vLLM down, forget the source. May be called twice."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        await asyncio.to_thread(thread.close)
        weights.withdraw(self.source)
        thread.llm.engine_core.shutdown()
        with contextlib.suppress(AttributeError):
            del thread.llm
        gc.collect()
        VllmEngine._open = False

    def _alive(self) -> EngineThread:
        if self._thread is None:
            raise EngineDied("the vLLM engine is closed; open another one")
        return self._thread

    # --- in the engine's thread ---

    def _sync(self, version: int) -> None:
        """One update. A broken one leaves layers without weights, which a whole second one mends."""
        llm = self._alive().llm
        try:
            self._update(llm)
        except Exception:  # vLLM passes on whatever its worker raised; a whole second one may mend it
            try:
                self._update(llm)
            except Exception as error:  # as broad: sampling from half-loaded weights would be silent
                raise EngineDied(f"the weights could not be brought into vLLM: {error!r}") from error
        llm.set_weight_version(str(version))
        if not llm.reset_prefix_cache(reset_running_requests=True):
            raise EngineDied("vLLM kept key-values of the old weights; sampling from them would be wrong")

    def _update(self, llm: Any) -> None:
        llm.collective_rpc("start_weight_update")
        llm.collective_rpc("update_weights", kwargs={"update_info": {"source": self.source}})
        llm.collective_rpc("finish_weight_update")


def engine_arguments(directory: Path, config: Config) -> dict[str, Any]:
    """vLLM's EngineArgs for a run. Raises EngineError on what this engine cannot do."""
    rollout = config.rollout
    if rollout.tensor_parallel_size > 1:
        raise EngineError(
            f"rollout.tensor_parallel_size is {rollout.tensor_parallel_size}, but the in-process engine "
            "serves one device; set it to 1"
        )
    arguments: dict[str, Any] = {
        "model": str(directory),
        "dtype": config.model.dtype,
        "seed": config.run.seed,
        "max_model_len": rollout.max_prompt_length + rollout.max_response_length,
        "max_num_seqs": min(rollout.max_parallel_episodes, 256),
        "skip_tokenizer_init": True,  # ids in, ids out
        "logprobs_mode": "processed_logprobs",  # of the distribution that is sampled from
        "generation_config": "vllm",  # a model's own top-p or top-k would truncate the distribution
        "enable_prefix_caching": True,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        "weight_transfer_config": {"backend": weights.BACKEND},
    }
    arguments |= _rank_arguments(config.run.seed)
    return arguments | _device_arguments(rollout.kv_cache_bytes, rollout.gpu_memory_utilization)


def _rank_arguments(seed: int) -> dict[str, Any]:
    """Of one engine among those of several ranks: it must draw its own tokens, and take its own GPU."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return {}
    found: dict[str, Any] = {"seed": seed + int(os.environ.get("RANK", "0"))}
    if not current_platform.is_cpu():  # the ordinary executor would take the first GPU on every rank
        found["distributed_executor_backend"] = "external_launcher"
    return found


def _device_arguments(kv_cache_bytes: int | None, gpu_memory_utilization: float) -> dict[str, Any]:
    if current_platform.is_cpu():
        # The default block of 128 tokens would cache nothing of a short prompt, and a share of memory
        # would mean the whole machine's.
        size = kv_cache_bytes or CPU_KV_CACHE_BYTES
        return {"block_size": 32, "enforce_eager": True, "kv_cache_memory_bytes": size}
    if kv_cache_bytes:
        return {"kv_cache_memory_bytes": kv_cache_bytes}
    return {"gpu_memory_utilization": gpu_memory_utilization}


def _params(sampling: Sampling) -> Any:
    return SamplingParams(
        max_tokens=sampling.max_tokens,
        temperature=0.0 if sampling.greedy else sampling.temperature,
        stop_token_ids=list(sampling.stop_token_ids),
        seed=sampling.seed,
        ignore_eos=sampling.ignore_eos,
        logprobs=0,  # the sampled token's own
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _sample(output: Any) -> Sample:
    """A finished completion as ours. Raises EngineError when vLLM gave it up."""
    if output.finish_reason not in ("stop", "length"):
        raise EngineError(f"vLLM ended a request with {output.finish_reason!r}; expected stop or length")
    ids = list(output.token_ids)
    logprobs = [step[token].logprob for step, token in zip(output.logprobs, ids, strict=True)]
    spans = (
        (span.start, int(span.version)) for span in output.weight_versions or () if span.version.isdigit()
    )
    return Sample(ids, logprobs, output.finish_reason, tuple(spans))
