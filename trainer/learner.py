"""What one step of PPO does to the models: `prepare` looks, `update` moves.

What it is
    `Learner` holds policy, critic, reference and the two optimisers. `prepare` fills a batch with what is
    known before the update (old log-probabilities, values, advantages, correction weights); `update` makes
    `ppo_epochs` passes over its minibatches, one optimiser step each. An estimator that needs no critic has
    none: `critic` is None then, and nothing of it is computed or logged.

How to use it
    learner = Learner.of(config, policy, critic, reference, ranks)
    division = divide(batch.lengths, config.trainer.minibatches, config.trainer.micro_batch_tokens)
    row |= learner.prepare(batch, division) | learner.pace(step, steps)
    row |= learner.update(batch, division, train_policy=True)

What it does not do
    No rollouts, no files, no decision to stop; `trainer.train` is the loop around it. It shards no model:
    with several ranks gradients must come out of the backward pass averaged over them (FSDP, DDP).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trainer import optim, ppo
from trainer.batch import Batch, MiniBatch
from trainer.model import Critic, score, value
from trainer.ranks import ALONE, Ranks
from trainer.stats import Numbers, Tally
from trainer.step_numbers import at_first, before_update, correction_of, moved, pop_first

if TYPE_CHECKING:
    from orchestrator.schema import Config
    from orchestrator.schema_algorithm import Algorithm
    from orchestrator.schema_training import Trainer


def needs_critic(algorithm: Algorithm) -> bool:
    """Whether the estimator learns values."""
    return ppo.ESTIMATORS[algorithm.estimator].critic


def needs_reference(algorithm: Algorithm) -> bool:
    """Whether the KL to where training started is in the loss or in the reward."""
    return algorithm.kl_coef > 0 or algorithm.kl_reward_coef > 0


@dataclass
class Learner:
    """Models, optimisers and the part of the configuration that they need."""

    policy: nn.Module
    critic: Critic | None
    reference: nn.Module | None
    policy_optimizer: Optimizer
    critic_optimizer: Optimizer | None
    algorithm: Algorithm
    trainer: Trainer
    temperature: float = 1.0
    half: bool = False
    longest: int = 4096
    """Tokens that a response may have (`rollout.max_response_length`)."""
    ranks: Ranks = ALONE
    check: Callable[[], None] = lambda: None
    """Called before each forward pass; raises to leave an update that is no longer wanted."""

    @classmethod
    def of(
        cls,
        config: Config,
        policy: nn.Module,
        critic: Critic | None,
        reference: nn.Module | None,
        ranks: Ranks = ALONE,
    ) -> Self:
        """With fresh optimisers, as a run's configuration asks for; a critic that is not needed is let go."""
        wanted = config.trainer
        shared = {"weight_decay": wanted.weight_decay, "eps": wanted.adam_eps}
        critic = critic if needs_critic(config.algorithm) else None
        return cls(
            policy,
            critic,
            reference,
            optim.adamw(policy.parameters(), wanted.policy_lr, **shared),
            optim.adamw(critic.parameters(), wanted.critic_lr, **shared) if critic else None,
            config.algorithm,
            wanted,
            config.rollout.temperature,
            config.model.dtype == "bfloat16",
            config.rollout.max_response_length,
            ranks,
        )

    @property
    def device(self) -> torch.device:
        return next(self.policy.parameters()).device

    @property
    def bypass(self) -> bool:
        """The engine's log-probabilities stand for the trainer's own from before the update."""
        return self.algorithm.old_logprobs == "rollout"

    # --- before the update ---

    @torch.no_grad()
    def prepare(self, batch: Batch, division: list[MiniBatch]) -> Numbers:
        """Fill in all that is known before the update. Returns what to log."""
        estimator, groups = ppo.ESTIMATORS[self.algorithm.estimator], self._groups(batch)
        if estimator.per_row is not None:
            batch.drop(groups.alone)  # nothing to compare them with
        entropies = torch.zeros_like(batch.mask)
        for rows in (rows for minibatch in division for rows in minibatch):
            self.check()
            self._look(batch, rows, entropies)
        if self.bypass:
            batch.old = batch.rollout * batch.mask
        batch.weight = self._weight(batch)
        self._advantages(batch, estimator)
        return groups.numbers | before_update(self, batch, entropies)

    def _groups(self, batch: Batch) -> ppo.GroupReport:
        return ppo.GroupReport.of(batch.outcomes, batch.groups, batch.acting, self.ranks)

    def _look(self, batch: Batch, rows: list[int], entropies: Tensor) -> None:
        """One forward pass of each model that has something to say before the update."""
        part = batch.take(rows, self.device)
        if not self.bypass:
            logprobs, entropy = self._score(self.policy, part, with_entropy=True)
            batch.put("old", rows, logprobs)
            if rows:
                entropies[torch.as_tensor(rows), : entropy.shape[1]] = entropy.cpu()
        if self.critic is not None:
            batch.put("values", rows, value(self.critic, part.ids, part.mask, self.half))
        if self.reference is not None:
            batch.put("reference", rows, self._score(self.reference, part)[0])

    def _weight(self, batch: Batch) -> Tensor:
        if self.bypass:
            return torch.ones_like(batch.old)
        return ppo.correction(batch.old, batch.rollout, batch.mask, correction_of(self.algorithm))

    def _advantages(self, batch: Batch, estimator: ppo.Estimator) -> None:
        wanted, mask = self.algorithm, batch.mask
        given = (self._rewards(batch), batch.values, mask, batch.groups)
        advantages = estimator(*given, wanted.gamma, wanted.lam, self.ranks)
        batch.returns = (advantages + batch.values) * mask
        whitens = estimator.whiten if wanted.whiten_advantages is None else wanted.whiten_advantages
        if whitens:
            advantages = ppo.whiten(advantages, mask, self.ranks.sum(ppo.moments(advantages, mask)))
        batch.advantages = advantages

    def _rewards(self, batch: Batch) -> Tensor:
        """[rows, tokens] outcomes, less what length and distance from the reference cost."""
        wanted, outcomes = self.algorithm, batch.outcomes
        if wanted.truncated == "penalty":
            penalty = ppo.length_penalty(batch.responses, self.longest, wanted.overlong_cache)
            outcomes = outcomes + wanted.overlong_penalty * penalty
        rewards = ppo.place_rewards(outcomes, batch.mask)
        if self.reference is not None and wanted.kl_reward_coef > 0:
            kl = ppo.KL[wanted.kl_reward_estimator](batch.old, batch.reference)
            rewards = rewards - wanted.kl_reward_coef * kl * batch.mask
        return rewards

    # --- the update ---

    def pace(self, step: int, steps: int) -> Numbers:
        """Set the learning rates of step `step` of `steps`. Returns what to log."""
        wanted = self.trainer
        plan = (wanted.lr_schedule, wanted.lr_warmup_steps, wanted.lr_min_ratio)
        share = optim.share_of_rate(step, steps, *plan)
        found: Numbers = {}
        rates = {"critic": (self.critic_optimizer, wanted.critic_lr)}
        rates["policy"] = (self.policy_optimizer, wanted.policy_lr)
        for name, (optimizer, full) in rates.items():
            if optimizer is not None:
                optim.set_rate(optimizer, found.setdefault(f"lr/{name}", share * full))
        return found

    def update(self, batch: Batch, division: list[MiniBatch], train_policy: bool) -> Numbers:
        """All optimiser steps of one PPO step. Returns means over them, and over action tokens.

        With `train_policy` false only the critic learns: no policy loss, no entropy bonus, no KL, no step.
        So it is for the rest of the batch once the policy has moved by `algorithm.target_kl`. A step
        whose gradient is not finite is skipped on every rank and counted in `nonfinite`. Without a critic
        there is nothing but the policy to train, and `train_policy` is not looked at.
        """
        logged: dict[str, list[float]] = defaultdict(list)
        train_policy = train_policy or self.critic is None
        first: Numbers = {}
        for minibatch in division * self.trainer.ppo_epochs:
            totals = self.ranks.sum(batch.totals(minibatch))
            if not totals[0]:
                continue  # nothing to learn from: Adam would still move, by its momentum
            found = self._minibatch(batch, minibatch, totals, train_policy, first=not logged)
            first = first or self._at_first(found)
            for name, x in found.items():
                logged[name].append(x)
            train_policy = train_policy and not found["stopped"]
        nonfinite = sum(logged.pop("skipped", []))
        means = {name: sum(values) / len(values) for name, values in logged.items()}
        steps = float(len(logged["stopped"]))
        return {"loss_policy": 0.0, **means, **first, "nonfinite": nonfinite, "optimizer_steps": steps}

    def _at_first(self, found: Numbers) -> Numbers:
        """Of the first minibatch, before the policy has moved: its ratios, which are 1 unless `old` is the
        engine's; then these passes are the first to tell mismatch and entropy."""
        if self.bypass:
            return pop_first(found)
        return {"first_ratio_error": found.get("ratio_error", 0.0)}

    def _minibatch(
        self, batch: Batch, minibatch: MiniBatch, totals: Tensor, train_policy: bool, first: bool
    ) -> Numbers:
        """One optimiser step of the critic and, if wanted, of the policy."""
        tally = Tally()
        for rows in minibatch:
            self.check()
            part = batch.take(rows, self.device)
            if self.critic is not None:
                self._critic_pass(self.critic, part, totals, tally)
            if train_policy:
                self._policy_pass(part, totals, tally, first and self.bypass)
        found = tally.close(self.ranks)
        target = self.algorithm.target_kl
        stopped = train_policy and target is not None and found["step_kl"] > target
        return {**found, **self._move(train_policy and not stopped), "stopped": float(stopped)}

    def _critic_pass(self, critic: Critic, part: Batch, totals: Tensor, tally: Tally) -> None:
        """Always a mean over tokens: the critic's targets have nothing to do with how rows are weighed."""
        values = value(critic, part.ids, part.mask, self.half)
        per_token = ppo.value_loss(values, part.values, part.returns, self.algorithm.value_clip)
        loss = ppo.aggregate(per_token, part.mask, "token-mean", totals)
        self._backward(loss)
        tally.add({"loss_value": loss})

    def _policy_pass(self, part: Batch, totals: Tensor, tally: Tally, first: bool = False) -> None:
        """Clipped surrogate, weighted for the engine's mismatch, KL to the reference, entropy bonus."""
        wanted, mask = self.algorithm, part.mask
        logprobs, entropy = self._score(self.policy, part, with_entropy=wanted.entropy_coef > 0 or first)
        bounds = (wanted.clip_low, wanted.clip_high, wanted.dual_clip)
        surrogate = ppo.policy_loss(logprobs, part.old, part.advantages, *bounds)
        constant = wanted.aggregation_constant or float(self.longest)
        mean = partial(ppo.aggregate, mask=mask, how=wanted.aggregation, totals=totals, constant=constant)
        loss_policy = mean(surrogate * part.weight)
        loss = loss_policy - wanted.entropy_coef * mean(entropy)
        if self.reference is not None and wanted.kl_coef > 0:
            loss = loss + wanted.kl_coef * mean(ppo.KL[wanted.kl_estimator](logprobs, part.reference))
        self._backward(loss)
        tally.add({"loss_policy": loss_policy})
        moved(tally, logprobs.detach(), part, totals, wanted)
        if first:
            at_first(tally, logprobs.detach(), entropy.detach(), part, totals)

    def _backward(self, loss: Tensor) -> None:
        """Losses are shares of a sum over ranks, gradients are averaged over them: hence the factor."""
        torch.autograd.backward(loss * self.ranks.size)

    def _move(self, train_policy: bool) -> Numbers:
        """Step the optimisers; gradients that are not finite, on any rank, move nothing."""
        found = {"skipped": 0.0}
        for name, optimizer in (("critic", self.critic_optimizer), ("policy", self.policy_optimizer)):
            if optimizer is None:
                continue
            if name == "policy" and not train_policy:
                optimizer.zero_grad(set_to_none=True)  # what a stopped pass left must not be in the next step
                continue
            squares = self.ranks.max(optim.squared_norm(optimizer))  # NaN where any rank has one
            norm, stepped = optim.step(optimizer, squares, self.trainer.max_grad_norm)
            found |= {f"grad_norm_{name}": norm, "skipped": found["skipped"] + float(not stepped)}
        return found

    def _score(self, model: nn.Module, part: Batch, with_entropy: bool = False) -> tuple[Tensor, Tensor]:
        return score(model, part.ids, part.mask, self.temperature, self.half, with_entropy)
