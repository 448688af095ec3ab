"""What a learner tells about a step: numbers for its row of metrics, over all ranks.

What it is
    `before_update` describes the policy that sampled, `moved` how far an update takes it from there.

A row
    kl, entropy           nats per action token: k3 to the reference, and of the sampling policy
    mismatch*             engine against trainer on the same tokens: mean and max of |Δ| in nats, k3, and the
                          share of tokens whose weight lies outside [0.9, 1.1]
    weight/*              correction weights: mean, share that the cap cut, share that the mask dropped
    advantage/*           of action tokens, whitened if they are
    length/*              tokens of a row after its prompt, and of them sampled
    groups/*              prompts, rows without another of their prompt, share of prompts with equal rewards
    value_mean, return_mean, explained_variance                       only with a critic
    clipped*              shares of tokens: outside of the clip range on whichever side; and those whose
                          gradient a clip took away: low, high, dual
    ratio_*, step_kl      π/π_old during the update; nats per token from the policy that sampled

What it does not do
    It decides nothing; alarms are in `trainer.metrics`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trainer import ppo
from trainer.batch import Batch
from trainer.ranks import Ranks
from trainer.stats import Numbers, Tally, masked_stats, mismatch_stats

if TYPE_CHECKING:
    from orchestrator.schema_algorithm import Algorithm
    from trainer.learner import Learner

FIRST = "first_"
"""Before the names of numbers that only the first passes of an update can tell."""


def correction_of(algorithm: Algorithm) -> ppo.Correction:
    """The correction that a configuration asks for."""
    wanted = algorithm
    return ppo.Correction(
        wanted.importance_cap,
        wanted.importance_weight,
        wanted.importance_mask,
        wanted.importance_low,
        wanted.importance_high,
    )


# --- before the update -------------------------------------------------------------------------------


def before_update(learner: Learner, batch: Batch, entropies: Tensor) -> Numbers:
    """Of the policy that sampled: against the engine, the reference, and the critic's view."""
    ranks, mask = learner.ranks, batch.mask
    found = {"kl": 0.0, "action_tokens": float(ranks.sum(mask.double().sum()))}
    if learner.reference is not None:
        found["kl"] = masked_stats(ppo.kl_k3(batch.old, batch.reference), mask, ranks)["mean"]
    if not learner.bypass:
        found["entropy"] = masked_stats(entropies, mask, ranks)["mean"]
        found |= mismatch_row(mismatch_stats(batch.old, batch.rollout, mask, ranks))
        found |= weights(batch, correction_of(learner.algorithm), ranks)
    if learner.critic is not None:
        found |= critic_view(batch, ranks)
    return found | advantages(batch, ranks) | lengths(batch, ranks)


def mismatch_row(found: Numbers) -> Numbers:
    """`mismatch_stats` under the names of a row."""
    return {"mismatch": found["mean"]} | {
        f"mismatch_{name}": found[name] for name in ("max", "k3", "outside")
    }


def weights(batch: Batch, wanted: ppo.Correction, ranks: Ranks) -> Numbers:
    """What the correction for the engine does to the batch."""
    cap = wanted.cap if wanted.cap is not None else torch.inf
    raw = ppo.levelled(batch.old, batch.rollout, batch.mask, wanted.weight)
    shares = {"mean": batch.weight, "capped": raw > cap, "masked": batch.weight == 0}
    return {f"weight/{n}": masked_stats(x.float(), batch.mask, ranks)["mean"] for n, x in shares.items()}


def critic_view(batch: Batch, ranks: Ranks) -> Numbers:
    """Values and returns, and which share of the returns' variance the critic explains."""
    residual = masked_stats(batch.returns - batch.values, batch.mask, ranks)["std"] ** 2
    returns = masked_stats(batch.returns, batch.mask, ranks)
    spread = returns["std"] ** 2
    return {
        "value_mean": masked_stats(batch.values, batch.mask, ranks)["mean"],
        "return_mean": returns["mean"],
        "explained_variance": 1.0 - residual / spread if spread > 0 else 0.0,
    }


def advantages(batch: Batch, ranks: Ranks) -> Numbers:
    found = masked_stats(batch.advantages, batch.mask, ranks)
    return {f"advantage/{name}": x for name, x in found.items()}


def lengths(batch: Batch, ranks: Ranks) -> Numbers:
    """Tokens after the prompt and sampled ones, of the rows that are trained on."""
    acting, found = batch.acting.float(), Numbers()
    for name, x in (("response", batch.responses.float()), ("actions", batch.mask.sum(1))):
        stats = masked_stats(x, acting, ranks)
        found |= {f"length/{name}_{kind}": stats[kind] for kind in ("mean", "max")}
    return found


# --- during the update -------------------------------------------------------------------------------


def moved(tally: Tally, logprobs: Tensor, part: Batch, totals: Tensor, algorithm: Algorithm) -> None:
    """How far the policy has moved from the one that sampled."""
    rho, low, high = ppo.ratio(logprobs, part.old), algorithm.clip_low, algorithm.clip_high
    shares = {
        "clipped": ((rho < 1 - low) | (rho > 1 + high)).float(),
        **ppo.clipped_tokens(rho, part.advantages, low, high, algorithm.dual_clip),
        "step_kl": ppo.kl_k3(part.old, logprobs),
        "ratio_mean": rho,
    }
    tally.add(
        {name: ppo.token_mean(x, part.mask, totals[0]) for name, x in shares.items()},
        {"ratio_error": (rho - 1).abs().max(), "ratio_max": ppo.peak(rho, part.mask)},
        {"ratio_min": -ppo.peak(-rho, part.mask)},
    )


def at_first(tally: Tally, logprobs: Tensor, entropy: Tensor, part: Batch, totals: Tensor) -> None:
    """Mismatch and entropy of passes that come before any step, where nothing was computed before them."""
    sums = ppo.mismatch_sums(logprobs, part.rollout, part.mask)
    largest = ppo.mismatch_peak(logprobs, part.rollout, part.mask)["max"]
    means = {f"mismatch_{name}": x / totals[0].to(x) for name, x in sums.items()}
    means["mismatch"] = means.pop("mismatch_mean")
    means["entropy"] = ppo.token_mean(entropy, part.mask, totals[0])
    tally.add({f"{FIRST}{n}": x for n, x in means.items()}, {f"{FIRST}mismatch_max": largest})


def pop_first(found: Numbers) -> Numbers:
    """Take out what `at_first` put in, under its plain names."""
    names = [name for name in found if name.startswith(FIRST)]
    return {name.removeprefix(FIRST): found.pop(name) for name in names}
