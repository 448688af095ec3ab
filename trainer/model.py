"""The models: policy, critic and reference, and what PPO asks of them.

What it is
    `load_policy` and `make_critic` make them; `score` and `value` give log-probabilities, entropies and
    values per action token. Weights are always kept in float32, so that small updates are not rounded
    away; with `model.dtype: bfloat16` the matrix products run in bfloat16 (autocast).

How to use it
    policy = load_policy(directory, device)
    critic = make_critic(policy)
    logprobs, entropy = score(policy, batch.ids, batch.mask, temperature=1.0)
    values = value(critic, batch.ids, batch.mask)

What it does not do
    No sampling (`trainer.engines`), no update (`trainer.learner`). It never runs code that comes with a
    model, and reads weights from safetensors only: both other ways would execute what was downloaded.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trainer import lora, packing, smollm2
from trainer.errors import ModelError
from trainer.head import LOGITS_AT_ONCE, token_scores

if TYPE_CHECKING:
    from trainer.agent import Tokenizer

BUILTIN = "builtin:"
BYTES = 256
EOS, PAD, VOCABULARY = 256, 257, 320  # padded: a multiple of 64 suits matrix kernels

T = TypeVar("T")


# --- the built-in model ------------------------------------------------------------------------------


class ByteTokenizer:
    """The identity on bytes: UTF-8 in, UTF-8 out. Ids above 255 stand for no text."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < BYTES).decode(errors="replace")


def tiny_policy(seed: int) -> nn.Module:
    """A byte-level Qwen3 of 252,512 weights, float32, random from `seed` and nothing else."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=32,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = Qwen3ForCausalLM(config)
    return model.eval()


# --- models of any origin ----------------------------------------------------------------------------


def find_model(name: str) -> Path:
    """The directory of a Hugging Face model: `name` itself, or its download. Raises ModelError."""
    if Path(name).is_dir():
        return Path(name)
    if name == smollm2.NAME:
        return smollm2.ensure()
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model.path={name!r} is no directory and cannot be downloaded: {error}. "
            "Name a directory with config.json and safetensors, or builtin:tiny"
        ) from error


def load_policy(directory: Path, device: torch.device | str = "cpu") -> nn.Module:
    """A causal language model from a directory, float32, without dropout. Raises ModelError."""
    from transformers import AutoModelForCausalLM

    try:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{directory} holds no model that can be loaded: {error}") from error
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0  # with dropout no ratio would be exactly 1
    model = model.to(device).eval()
    _check_head(model)
    return model


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer that lies beside a model. Raises ModelError."""
    from transformers import AutoTokenizer

    try:
        return _TextTokenizer(AutoTokenizer.from_pretrained(directory, trust_remote_code=False))
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{directory} holds no tokenizer that can be loaded: {error}") from error


class _TextTokenizer:
    """A Hugging Face tokenizer as ours: what looks like a special token in text stays text."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def encode(self, text: str) -> list[int]:
        return list(self._inner.encode(text, add_special_tokens=False, split_special_tokens=True))

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._inner.decode(list(ids), clean_up_tokenization_spaces=False))


class Critic(nn.Module):
    """A copy of the policy's trunk with a linear head to one number, which starts at zero."""

    def __init__(self, trunk: nn.Module, width: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = nn.Linear(width, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def read(self, states: Tensor) -> Tensor:
        """[n, width] → [n]."""
        found: Tensor = self.head(states)[:, 0]
        return found


def make_critic(policy: nn.Module) -> Critic:
    """V ≡ 0 at first, so that the first advantages are plain rewards-to-go."""
    trunk = copy.deepcopy(trunk_of(policy))
    return Critic(trunk, head_of(policy).weight.shape[1]).to(next(policy.parameters()).device).eval()


def freeze(model: nn.Module) -> nn.Module:
    """Without gradients from now on: a reference."""
    return model.requires_grad_(False).eval()


# --- what PPO asks -----------------------------------------------------------------------------------


def score(
    policy: nn.Module,
    ids: Tensor,
    mask: Tensor,
    temperature: float,
    half: bool = False,
    with_entropy: bool = False,
    logits_at_once: int = LOGITS_AT_ONCE,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies (nats) of action tokens under the policy at `temperature`.

    ids, mask [rows, tokens] → two tensors [rows, tokens], 0 where masked. The logits after token t-1
    score token t. Entropy is 0 everywhere unless asked for. `half` computes in bfloat16;
    `logits_at_once` bounds the elements of logits that exist at a time.
    """
    if isinstance(policy, lora.AdapterOff):
        with policy.applied() as base:
            return score(base, ids, mask, temperature, half, with_entropy, logits_at_once)

    def work() -> tuple[Tensor, Tensor]:
        with _precision(ids, half):
            states = states_before(trunk_of(policy), ids, mask)
        head, chosen = head_of(policy), ids[mask > 0]
        return token_scores(
            states, head.weight, head.bias, chosen, temperature, with_entropy, half, logits_at_once
        )

    logprobs, entropy = through(policy, work)
    return _spread(logprobs, mask), _spread(entropy, mask)


def value(critic: Critic, ids: Tensor, mask: Tensor, half: bool = False) -> Tensor:
    """What the critic expects before each action token: [rows, tokens], 0 where masked."""

    def work() -> Tensor:
        with _precision(ids, half):
            states = states_before(critic.trunk, ids, mask)
        return critic.read(states.float())

    return _spread(through(critic, work), mask)


def states_before(trunk: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Hidden states right before each action token, [actions, width].

    No attention mask: attention is causal and padding is on the right, so no real token sees any.
    """
    hidden: Tensor
    if packing.installed(trunk):
        packed = packing.pack(ids, mask)
        hidden = trunk(**packed.arguments(), use_cache=False).last_hidden_state
        return hidden[0, packed.before]
    hidden = trunk(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    return hidden[mask[:, 1:] > 0]


def through(model: nn.Module, work: Callable[[], T]) -> T:
    """Run `work`, which computes with parts of `model`. A sharded model (`trainer.distributed`) has a method
    for it, that gathers weights before and lets go of them after, as around its forward pass."""
    gathered: Any = getattr(model, "gathered", None)
    found: T = work() if gathered is None else gathered(work)
    return found


def _spread(actions: Tensor, mask: Tensor) -> Tensor:
    """[actions] back to [rows, tokens]; zeros elsewhere."""
    return torch.zeros_like(mask, dtype=actions.dtype).masked_scatter(mask > 0, actions)


def _precision(ids: Tensor, half: bool) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast(ids.device.type, torch.bfloat16) if half else contextlib.nullcontext()


def trunk_of(model: Any) -> nn.Module:
    """Everything but the output layer: ids → hidden states."""
    trunk: nn.Module = model.base_model
    return trunk


def head_of(model: Any) -> nn.Linear:
    """The output layer: hidden states → logits."""
    head: nn.Linear = model.get_output_embeddings()
    return head


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The repeated layers, in order: what is sharded, and computed again, one by one."""
    lists = [list(part) for part in model.modules() if isinstance(part, nn.ModuleList)]
    return max(lists, key=lambda parts: sum(p.numel() for m in parts for p in m.parameters()), default=[])


def recompute_blocks(model: nn.Module) -> nn.Module:
    """Keep of each layer only its input for the backward pass, which runs the layer again: a third more
    computation for a fraction of the memory. Changes no number."""
    for block in blocks_of(model):
        # In place of `forward`, inside whatever hooks a sharded model puts around the layer.
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return model


@torch.no_grad()
def _check_head(model: nn.Module) -> None:
    """Trunk and head called apart must give the model's own logits: some models scale or cap them."""
    ids = torch.arange(8, device=next(model.parameters()).device)[None] % head_of(model).weight.shape[0]
    whole = model(input_ids=ids, use_cache=False).logits
    apart = head_of(model)(trunk_of(model)(input_ids=ids, use_cache=False).last_hidden_state)
    if not torch.allclose(whole, apart, atol=1e-4, rtol=1e-4):
        raise ModelError(
            f"{type(model).__name__} changes its logits after the output layer (scaling, soft-capping); "
            "this trainer computes them from the output layer alone. Choose another model family"
        )
