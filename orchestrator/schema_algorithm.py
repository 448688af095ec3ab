"""The section `algorithm` of `config.yaml`: how rewards become a gradient.

What it is
    One typed section, a docstring per key. docs/reference/algorithm.md has the formula behind each.

What it does not do
    It checks single values; which of them contradict each other is in `orchestrator.plan_algorithm`.
"""

from typing import Annotated, Literal

from orchestrator.typed import Limits, Section

Fraction = Annotated[float, Limits(gt=0, le=1)]
NotNegative = Annotated[float, Limits(ge=0)]
Above = Annotated[float, Limits(gt=0)]
Positive = Annotated[int, Limits(ge=1)]


class Algorithm(Section):
    estimator: Literal["gae", "grpo", "dr-grpo", "rloo", "reinforce++", "reinforce++-baseline"] = "gae"
    """Advantage estimator. `gae` learns a critic; `reinforce++` needs neither critic nor groups; the others
    compare the rollouts of one prompt, so `rollout.rollouts_per_prompt` must be 2 or more."""
    gamma: Fraction = 1.0
    """Discount per action token (gae and reinforce++)."""
    lam: Fraction = 1.0
    """GAE λ."""
    whiten_advantages: bool | None = None
    """Centre and scale advantages over all action tokens of the global batch; null does so for gae,
    reinforce++ and reinforce++-baseline."""
    clip_low: Fraction = 0.2
    """Lower clip of the probability ratio: 1 - clip_low."""
    clip_high: Above = 0.28
    """Upper clip of the probability ratio: 1 + clip_high."""
    dual_clip: Annotated[float, Limits(gt=1)] | None = 3.0
    """Bound of the loss for negative advantages; null switches it off."""
    value_clip: Above = 0.2
    """Clip of the value update."""
    aggregation: Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "constant"] = "token-mean"
    """How losses per token become one: a mean over all action tokens; a mean over rows of their mean or of
    their sum; or the latter divided by `aggregation_constant`."""
    aggregation_constant: Above | None = None
    """What `aggregation: constant` divides a row's sum by; null is `rollout.max_response_length`."""
    target_kl: Above | None = None
    """The policy stops learning from a batch once it is this far (KL, nats per token) from the one that
    sampled it; the critic goes on. null never stops."""
    kl_coef: NotNegative = 0.0
    """Weight of the KL to the reference in the loss; 0 needs no reference model."""
    kl_estimator: Literal["k1", "k2", "k3", "k3+"] = "k3+"
    """Estimator of the KL in the loss; k3+ has the value of k3 and the gradient of k2."""
    kl_reward_coef: NotNegative = 0.0
    """Weight of the KL to the reference as a penalty on each action token's reward, instead of `kl_coef`."""
    kl_reward_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Estimator of the KL in the reward; only k1 has the right gradient there."""
    entropy_coef: NotNegative = 0.0
    """Weight of the entropy bonus."""
    old_logprobs: Literal["trainer", "rollout"] = "trainer"
    """Log-probabilities that the ratio is taken to. `trainer` computes them before the update (decoupled: the
    engine's difference is corrected by a weight); `rollout` takes the engine's and saves a forward pass."""
    importance_cap: Above | None = 2.0
    """Cap of the correction weight between engine and trainer log-probabilities; null switches it off."""
    importance_weight: Literal["token", "product", "geometric"] = "token"
    """The correction weight is of each token, or of the whole row: the product or the geometric mean of its
    tokens' weights."""
    importance_mask: Literal["none", "token", "product", "geometric"] = "none"
    """Drop from the loss what engine and trainer disagree about: single tokens (IcePop), or rows by the
    product or the geometric mean of their weights, outside of `importance_low` to `importance_high`."""
    importance_low: Above = 0.5
    """Least weight that `importance_mask` keeps."""
    importance_high: Above = 2.0
    """Largest weight that `importance_mask` keeps."""
    truncated: Literal["score", "mask", "penalty"] = "score"
    """Episodes that ran out of turns or tokens: score them as they ended; mask them; or score all, less a
    penalty that grows over the last `overlong_cache` tokens of `rollout.max_response_length`."""
    overlong_cache: Positive = 256
    """Tokens over which the penalty of `truncated: penalty` grows from 0 to `overlong_penalty`."""
    overlong_penalty: Above = 1.0
    """Penalty of an episode as long as `rollout.max_response_length`, or longer."""
