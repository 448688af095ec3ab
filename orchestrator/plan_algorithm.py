"""Settings of the algorithm that contradict each other, each with the fix named.

What it is
    Pure functions of a `Config`. Launching and the trainer's own check both refuse `contradictions`; a
    setting that would do nothing is one, for whoever wrote it believes that it does something. `worries`
    are printed.

What it does not do
    It checks no single value (`orchestrator.schema_algorithm` does).
"""

from __future__ import annotations

from collections.abc import Iterator

from orchestrator.schema import Config

WITH_CRITIC = frozenset({"gae"})
WITH_TIME = frozenset({"gae", "reinforce++"})
"""Estimators that look at single tokens; the others compare whole rows of one prompt."""


def contradictions(config: Config) -> list[str]:
    """One line each, with the assignment that mends it."""
    parts = (_groups, _critic, _discounts, _kl, _aggregation, _importance, _band, _lengths, _rates)
    return [line for part in parts for line in part(config)]


def _groups(config: Config) -> Iterator[str]:
    estimator, each = config.algorithm.estimator, config.rollout.rollouts_per_prompt
    if estimator not in WITH_TIME and each < 2:
        yield (
            f"algorithm.estimator={estimator} compares the rollouts of one prompt, and {each} alone has "
            f"nothing to be compared with: set rollout.rollouts_per_prompt=4, or algorithm.estimator=gae or "
            f"reinforce++"
        )


def _critic(config: Config) -> Iterator[str]:
    estimator, steps = config.algorithm.estimator, config.trainer.critic_warmup_steps
    if steps and estimator not in WITH_CRITIC:
        yield (
            f"trainer.critic_warmup_steps={steps}, but algorithm.estimator={estimator} has no critic: "
            f"set trainer.critic_warmup_steps=0, or algorithm.estimator=gae"
        )


def _discounts(config: Config) -> Iterator[str]:
    wanted = config.algorithm
    if wanted.lam != 1 and wanted.estimator not in WITH_CRITIC:
        yield f"algorithm.lam={wanted.lam:g} does nothing for {wanted.estimator}: set algorithm.lam=1"
    if wanted.gamma != 1 and wanted.estimator not in WITH_TIME:
        yield f"algorithm.gamma={wanted.gamma:g} does nothing for {wanted.estimator}: set algorithm.gamma=1"


def _kl(config: Config) -> Iterator[str]:
    wanted = config.algorithm
    if wanted.kl_coef and wanted.kl_reward_coef:
        yield (
            f"the KL to the reference is in the loss (algorithm.kl_coef={wanted.kl_coef:g}) and in the "
            f"reward (algorithm.kl_reward_coef={wanted.kl_reward_coef:g}) at once: set one of the two to 0"
        )


def _aggregation(config: Config) -> Iterator[str]:
    wanted = config.algorithm
    if wanted.aggregation_constant is not None and wanted.aggregation != "constant":
        yield (
            f"algorithm.aggregation_constant={wanted.aggregation_constant:g} does nothing with "
            f"algorithm.aggregation={wanted.aggregation}: set algorithm.aggregation=constant, or "
            f"algorithm.aggregation_constant=null"
        )


def _importance(config: Config) -> Iterator[str]:
    wanted = config.algorithm
    corrects = wanted.importance_weight != "token" or wanted.importance_mask != "none"
    if wanted.old_logprobs == "rollout" and corrects:
        yield (
            "algorithm.old_logprobs=rollout takes the engine's log-probabilities for the trainer's, so there "
            "is nothing left to correct: set algorithm.importance_weight=token and "
            "algorithm.importance_mask=none, or algorithm.old_logprobs=trainer"
        )
    if wanted.importance_cap is None and wanted.importance_weight != "token":
        yield (
            f"algorithm.importance_weight={wanted.importance_weight} without algorithm.importance_cap weighs "
            f"nothing: set algorithm.importance_cap=2, or algorithm.importance_weight=token"
        )


def _band(config: Config) -> Iterator[str]:
    wanted = config.algorithm
    low, high = wanted.importance_low, wanted.importance_high
    if wanted.importance_mask != "none" and not low <= 1 <= high:
        yield (
            f"algorithm.importance_low={low:g} to algorithm.importance_high={high:g} drops what engine and "
            f"trainer agree about (weight 1): set them below and above 1, like 0.5 and 2"
        )


def _lengths(config: Config) -> Iterator[str]:
    wanted, longest = config.algorithm, config.rollout.max_response_length
    if wanted.truncated == "penalty" and wanted.overlong_cache >= longest:
        yield (
            f"algorithm.overlong_cache={wanted.overlong_cache} punishes every length of an episode of at "
            f"most {longest} tokens: set it to {max(1, longest // 4)} or less, or "
            f"rollout.max_response_length higher"
        )


def _rates(config: Config) -> Iterator[str]:
    wanted = config.trainer
    if wanted.lr_min_ratio and wanted.lr_schedule == "constant":
        yield (
            f"trainer.lr_min_ratio={wanted.lr_min_ratio:g}, but constant learning rates never fall: set "
            f"trainer.lr_schedule=linear or cosine, or trainer.lr_min_ratio=0"
        )


def worries(config: Config) -> Iterator[str]:
    """What will work, but probably not as meant."""
    wanted = config.algorithm
    if wanted.kl_coef and wanted.kl_estimator == "k1":
        yield (
            "algorithm.kl_estimator=k1 in the loss pulls nowhere: its gradient is 0 on average. "
            "Set algorithm.kl_estimator=k3+, or put it into the reward: algorithm.kl_reward_coef"
        )
    if wanted.kl_reward_coef and wanted.kl_reward_estimator != "k1":
        yield (
            f"algorithm.kl_reward_estimator={wanted.kl_reward_estimator} in the reward is not the gradient "
            f"of the KL: set algorithm.kl_reward_estimator=k1"
        )
