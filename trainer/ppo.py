"""The arithmetic of PPO and its relatives, under one name: everything of the pure modules.

What it is
    advantages    rewards at their tokens, GAE, reward-to-go, group comparisons, whitening
    losses        clipped surrogate, critic's loss, KL, entropy, aggregation
    corrections   weights and masks for what the engine and the trainer disagree about
    stats         numbers for the log

    docs/reference/algorithm.md has every formula with its source, its key and its test.

How to use it
    rewards = ppo.place_rewards(outcomes, mask)
    advantages = ppo.gae(rewards, values, mask, gamma=1.0, lam=1.0)
    returns = (advantages + values) * mask
    advantages = ppo.whiten(advantages, mask, ppo.moments(advantages, mask))
    loss = ppo.token_mean(ppo.policy_loss(logprobs, old, advantages, 0.2, 0.28, 3.0), mask, count)

What it does not do
    No models and no devices (`trainer.model`, `trainer.learner`).
"""

from __future__ import annotations

from trainer.advantages import (
    ESTIMATORS,
    Estimator,
    GroupReport,
    dr_grpo,
    everywhere,
    gae,
    group_sizes,
    group_stats,
    grpo,
    length_penalty,
    moments,
    place_rewards,
    reward_to_go,
    rloo,
    spread,
    whiten,
)
from trainer.corrections import (
    Correction,
    band,
    correction,
    importance_weight,
    levelled,
    row_ratio,
)
from trainer.losses import (
    AGGREGATIONS,
    KL,
    aggregate,
    clipped_tokens,
    entropy,
    kl_k1,
    kl_k2,
    kl_k3,
    kl_k3_plus,
    policy_loss,
    ratio,
    token_mean,
    totals_of,
    value_loss,
)
from trainer.stats import Tally, masked_stats, mismatch_peak, mismatch_stats, mismatch_sums, peak

__all__ = [
    "AGGREGATIONS",
    "ESTIMATORS",
    "KL",
    "Correction",
    "Estimator",
    "GroupReport",
    "Tally",
    "aggregate",
    "band",
    "clipped_tokens",
    "correction",
    "dr_grpo",
    "entropy",
    "everywhere",
    "gae",
    "group_sizes",
    "group_stats",
    "grpo",
    "importance_weight",
    "kl_k1",
    "kl_k2",
    "kl_k3",
    "kl_k3_plus",
    "length_penalty",
    "levelled",
    "masked_stats",
    "mismatch_peak",
    "mismatch_stats",
    "mismatch_sums",
    "moments",
    "peak",
    "place_rewards",
    "policy_loss",
    "ratio",
    "reward_to_go",
    "rloo",
    "row_ratio",
    "spread",
    "token_mean",
    "totals_of",
    "value_loss",
    "whiten",
]
