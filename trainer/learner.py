"""What one step of PPO does to the models: `prepare` looks, `update` moves.

What it is
    `Learner` holds policy, critic, reference and the two optimisers. `prepare` fills a batch with what is
    known before the update (old log-probabilities, values, advantages, returns); `update` makes
    `ppo_epochs` passes over its minibatches, one optimiser step each.

How to use it
    learner = Learner.of(config, policy, critic, reference)
    division = divide(batch.lengths, config.trainer.minibatches, config.trainer.micro_batch_tokens)
    row |= learner.prepare(batch, division)
    row |= learner.update(batch, division, train_policy=True)

What it does not do
    No rollouts, no files, no decision to stop; `trainer.train` is the loop around it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trainer import optim, ppo
from trainer.batch import Batch, MiniBatch
from trainer.model import Critic, score, value

if TYPE_CHECKING:
    from orchestrator.schema import Config
    from orchestrator.schema_training import Algorithm, Trainer

Numbers = dict[str, float]


@dataclass
class Learner:
    """Models, optimisers and the part of the configuration that they need."""

    policy: nn.Module
    critic: Critic
    reference: nn.Module | None
    policy_optimizer: Optimizer
    critic_optimizer: Optimizer
    algorithm: Algorithm
    trainer: Trainer
    temperature: float = 1.0
    half: bool = False
    check: Callable[[], None] = lambda: None
    """Called before each forward pass; raises to leave an update that is no longer wanted."""

    @classmethod
    def of(cls, config: Config, policy: nn.Module, critic: Critic, reference: nn.Module | None) -> Self:
        """With fresh optimisers, as a run's configuration asks for."""
        wanted = config.trainer
        shared = {"weight_decay": wanted.weight_decay, "eps": wanted.adam_eps}
        return cls(
            policy,
            critic,
            reference,
            optim.adamw(policy.parameters(), wanted.policy_lr, **shared),
            optim.adamw(critic.parameters(), wanted.critic_lr, **shared),
            config.algorithm,
            wanted,
            config.rollout.temperature,
            config.model.dtype == "bfloat16",
        )

    @property
    def device(self) -> torch.device:
        return next(self.policy.parameters()).device

    # --- before the update ---

    @torch.no_grad()
    def prepare(self, batch: Batch, division: list[MiniBatch]) -> Numbers:
        """Fill in `old`, `values`, `reference`, `advantages` and `returns`. Returns what to log."""
        entropies = torch.zeros_like(batch.mask)
        for rows in (rows for minibatch in division for rows in minibatch):
            self.check()
            part = batch.take(rows, self.device)
            logprobs, entropy = self._score(self.policy, part, with_entropy=True)
            batch.put("old", rows, logprobs)
            batch.put("values", rows, value(self.critic, part.ids, part.mask, self.half))
            if self.reference is not None:
                batch.put("reference", rows, self._score(self.reference, part)[0])
            entropies[torch.as_tensor(rows), : entropy.shape[1]] = entropy.cpu()
        self._advantages(batch)
        return self._before(batch, entropies)

    def _advantages(self, batch: Batch) -> None:
        wanted = self.algorithm
        rewards = ppo.place_rewards(batch.outcomes, batch.mask)
        estimate = ppo.ESTIMATORS[wanted.estimator]
        advantages = estimate(rewards, batch.values, batch.mask, wanted.gamma, wanted.lam)
        batch.returns = (advantages + batch.values) * batch.mask
        if wanted.whiten_advantages is not False:
            advantages = ppo.whiten(advantages, batch.mask, ppo.moments(advantages, batch.mask))
        batch.advantages = advantages

    def _before(self, batch: Batch, entropies: Tensor) -> Numbers:
        """Statistics of the policy that sampled: against the engine, the reference, and the critic's view."""
        mask, count = batch.mask, float(batch.mask.sum())
        mismatch = ppo.mismatch_stats(batch.old, batch.rollout, mask)
        residual = ppo.masked_stats(batch.returns - batch.values, mask)["std"] ** 2
        spread = ppo.masked_stats(batch.returns, mask)["std"] ** 2
        kl = ppo.token_mean(ppo.kl_k3(batch.old, batch.reference), mask, count) if self.reference else 0.0
        return {
            "kl": float(kl),
            "entropy": float(ppo.token_mean(entropies, mask, count)),
            "mismatch": mismatch["mean"],
            "mismatch_max": mismatch["max"],
            "mismatch_k3": mismatch["k3"],
            "mismatch_outside": mismatch["outside"],
            "value_mean": ppo.masked_stats(batch.values, mask)["mean"],
            "return_mean": ppo.masked_stats(batch.returns, mask)["mean"],
            "explained_variance": 1.0 - residual / spread if spread > 0 else 0.0,
            "action_tokens": count,
        }

    # --- the update ---

    def update(self, batch: Batch, division: list[MiniBatch], train_policy: bool) -> Numbers:
        """All optimiser steps of one PPO step. Returns means over them, and over action tokens.

        With `train_policy` false only the critic learns: no policy loss, no entropy bonus, no KL, no step.
        So it is for the rest of the batch once the policy has moved by `algorithm.target_kl`. A step
        whose gradient is not finite is skipped and counted in `nonfinite`.
        """
        logged: dict[str, list[float]] = defaultdict(list)
        for epoch in range(self.trainer.ppo_epochs):
            for number, minibatch in enumerate(division):
                found = self._minibatch(batch, minibatch, train_policy)
                if epoch == number == 0:
                    logged["first_ratio_error"].append(found.get("ratio_error", 0.0))
                for name, number_found in found.items():
                    logged[name].append(number_found)
                train_policy = train_policy and not found["stopped"]
        nonfinite = sum(logged.pop("skipped"))
        means = {name: sum(values) / len(values) for name, values in logged.items()}
        return {"loss_policy": 0.0, **means} | {
            "nonfinite": nonfinite,
            "optimizer_steps": float(len(logged["loss_value"])),
        }

    def _minibatch(self, batch: Batch, minibatch: MiniBatch, train_policy: bool) -> Numbers:
        """One optimiser step of the critic and, if wanted, of the policy."""
        count, sums = batch.actions(minibatch), defaultdict[str, float](float)
        for rows in minibatch:
            self.check()
            part = batch.take(rows, self.device)
            found = self._critic_pass(part, count)
            if train_policy:
                found |= self._policy_pass(part, count)
            for name, number in found.items():
                sums[name] = max(sums[name], number) if name == "ratio_error" else sums[name] + number
        target = self.algorithm.target_kl
        stopped = train_policy and target is not None and sums["step_kl"] > target
        return {**sums, **self._move(train_policy and not stopped), "stopped": float(stopped)}

    def _critic_pass(self, part: Batch, count: float) -> Numbers:
        values = value(self.critic, part.ids, part.mask, self.half)
        per_token = ppo.value_loss(values, part.values, part.returns, self.algorithm.value_clip)
        loss = ppo.token_mean(per_token, part.mask, count)
        torch.autograd.backward(loss)
        return {"loss_value": float(loss.detach())}

    def _policy_pass(self, part: Batch, count: float) -> Numbers:
        """Clipped surrogate, weighted for the engine's mismatch, KL to the reference, entropy bonus."""
        wanted, mask = self.algorithm, part.mask
        logprobs, entropy = self._score(self.policy, part, with_entropy=wanted.entropy_coef > 0)
        bounds = (wanted.clip_low, wanted.clip_high, wanted.dual_clip)
        surrogate = ppo.policy_loss(logprobs, part.old, part.advantages, *bounds)
        weight = ppo.importance_weight(part.old, part.rollout, wanted.importance_cap)
        loss_policy = ppo.token_mean(surrogate * weight, mask, count)
        loss = loss_policy - wanted.entropy_coef * ppo.token_mean(entropy, mask, count)
        if self.reference is not None:
            kl = ppo.KL[wanted.kl_estimator](logprobs, part.reference)
            loss = loss + wanted.kl_coef * ppo.token_mean(kl, mask, count)
        torch.autograd.backward(loss)
        return {"loss_policy": float(loss_policy.detach())} | self._moved(logprobs.detach(), part, count)

    def _moved(self, logprobs: Tensor, part: Batch, count: float) -> Numbers:
        """How far the policy has moved from the one that sampled."""
        rho = ppo.ratio(logprobs, part.old)
        clipped = ((rho < 1 - self.algorithm.clip_low) | (rho > 1 + self.algorithm.clip_high)).float()
        return {
            "clipped": float(ppo.token_mean(clipped, part.mask, count)),
            "step_kl": float(ppo.token_mean(ppo.kl_k3(part.old, logprobs), part.mask, count)),
            "ratio_error": float((rho - 1).abs().max()),
        }

    def _move(self, train_policy: bool) -> Numbers:
        """Step the optimisers; gradients that are not finite move nothing."""
        limit = self.trainer.max_grad_norm
        norm, moved = optim.step(self.critic_optimizer, optim.squared_norm(self.critic_optimizer), limit)
        found = {"grad_norm_critic": norm, "skipped": float(not moved)}
        if train_policy:
            norm, moved = optim.step(self.policy_optimizer, optim.squared_norm(self.policy_optimizer), limit)
            found |= {"grad_norm_policy": norm, "skipped": found["skipped"] + float(not moved)}
        else:  # what a stopped pass has left must not be in the next step
            self.policy_optimizer.zero_grad(set_to_none=True)
        return found

    def _score(self, model: nn.Module, part: Batch, with_entropy: bool = False) -> tuple[Tensor, Tensor]:
        return score(model, part.ids, part.mask, self.temperature, self.half, with_entropy)
