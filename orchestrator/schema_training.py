"""The part of `config.yaml` that the trainer reads: model, data, rollout, algorithm, trainer.

What it is
    Typed sections, strict like the rest of `orchestrator.schema`; a docstring per key feeds the
    reference page.

What it does not do
    No reading of files, no torch.
"""

from typing import Annotated, Literal

from orchestrator.quantities import Seconds
from orchestrator.schema_algorithm import Algorithm as Algorithm  # a section like those below
from orchestrator.schema_algorithm import NotNegative, Positive
from orchestrator.schema_rollout import Rollout as Rollout  # likewise
from orchestrator.typed import Limits, Section, made


class Model(Section):
    path: str = "builtin:tiny"
    """A Hugging Face directory or name, or `builtin:tiny`: a byte-level model made on the spot."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Number type of the policy's weights."""
    warmstart_steps: Annotated[int, Limits(ge=0)] = 0
    """Supervised steps on the task family's own transcripts before PPO (for `builtin:tiny`)."""
    lora_rank: Annotated[int, Limits(ge=0)] = 0
    """Train low-rank adapters of this rank instead of all weights; 0 trains all. The reference is then the
    policy without its adapters. Needs peft."""
    lora_alpha: Positive = 32
    """Scale of the adapters: their product is multiplied by alpha ÷ rank."""
    lora_targets: str = "all-linear"
    """Layers with adapters: names separated by commas (`q_proj,v_proj`), or all linear ones."""


class Data(Section):
    train: str = "builtin:lucky-seven"
    """Parquet file of training tasks, or `builtin:NAME`."""
    validation: str = ""
    """Parquet file of validation tasks; empty validates on nothing."""
    shuffle: bool = True
    """Draw a new order of the tasks each epoch, from the seed."""
    reward_functions: list[str] = made(factory=list)
    """Python functions, `module:function`, that tasks may be judged by, outside of the sandbox. The first
    judges rows that name none (verl's `reward_model`, SkyRL's `reward_spec`)."""


class Trainer(Section):
    total_epochs: Positive = 1
    """Passes over the training data."""
    total_steps: Positive | None = None
    """Stop after so many steps; null runs all epochs."""
    ppo_epochs: Positive = 1
    """Passes of the optimiser over one batch of rollouts."""
    minibatches: Positive = 1
    """Optimiser steps per pass."""
    micro_batch_tokens: Positive = 16384
    """Padded tokens per forward pass."""
    policy_lr: Annotated[float, Limits(gt=0)] = 1e-6
    """Learning rate of the policy."""
    critic_lr: Annotated[float, Limits(gt=0)] = 1e-5
    """Learning rate of the critic."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How both learning rates go on after `lr_warmup_steps`: as they are, or down to `lr_min_ratio` of
    themselves at the last step."""
    lr_warmup_steps: Annotated[int, Limits(ge=0)] = 0
    """First steps in which both learning rates rise in equal parts from nothing."""
    lr_min_ratio: Annotated[float, Limits(ge=0, le=1)] = 0.0
    """What `linear` and `cosine` leave of the learning rates."""
    weight_decay: NotNegative = 0.0
    """AdamW weight decay."""
    adam_eps: Annotated[float, Limits(gt=0)] = 1e-8
    """AdamW epsilon."""
    max_grad_norm: Annotated[float, Limits(gt=0)] = 1.0
    """Global gradient norm is clipped to this."""
    critic_warmup_steps: Annotated[int, Limits(ge=0)] = 0
    """First steps in which only the critic learns."""
    packing: bool = False
    """Sequences one behind the other instead of padded to equal length, a prompt that several of them begin
    with only once; `micro_batch_tokens` then counts real tokens."""
    activation_checkpointing: bool = False
    """Compute each layer again in the backward pass instead of keeping what is inside it: a third more
    computation, a fraction of the memory."""
    reshard: bool = True
    """With several processes: let go of a gathered layer after the forward pass and gather it again for the
    backward one. false saves that gathering and costs the memory of all layers."""
    ranks_timeout: Seconds = 3600
    """How long a process waits for the others before it gives up: longer than any one's share of the episodes
    may take more than another's."""
    sequence_parallel_size: Positive = 1
    """GPUs that share one sequence when training (SP size). Only 1: see docs/how-to/many-gpus.md for long
    sequences."""
    checkpoint_dir: str = ""
    """Where checkpoints go; empty means `training/checkpoints` of the run."""
    rollout_dir: str = ""
    """Where trajectories are written; empty means `training/rollouts` of the run."""
    autoresume_after: Seconds | None = None
    """Write a checkpoint and ask to be requeued so long after the trainer started, for sites whose
    scheduler sends no signal before the walltime; null waits for the signal."""
    save_every: Positive = 20
    """Steps between checkpoints."""
    keep_checkpoints: Positive = 2
    """Checkpoints kept, the newest ones."""
    keep_best: bool = True
    """Keep the checkpoint with the best validation besides, named by `best`."""
    async_save: bool = True
    """Write regular checkpoints while training goes on, from a copy in main memory."""
    resume: Literal["auto", "never"] = "auto"
    """`auto` goes on from the newest complete checkpoint."""
    mismatch_limit: Annotated[float, Limits(gt=0)] = 0.1
    """The run stops when the probe after a weight sync differs by more, in nats."""
    loggers: list[Literal["wandb", "trackio"]] = made(factory=list)
    """Where metrics go besides `metrics.jsonl` and TensorBoard, which always get them."""
    threads: Annotated[int, Limits(ge=0)] = 0
    """CPU threads of torch and of the engine; 0 means the CPUs of the job."""


class Evaluation(Section):
    """Set by `orchestrate eval`."""

    k: Annotated[str, Limits(pattern=r"^([1-9]\d*(,[1-9]\d*)*)?$")] = ""
    """Train nothing, and estimate pass@k for each of these, like `1,4,8`, on the tasks of `data.validation`
    with `rollout.validation_rollouts` samples of each; empty trains."""
    checkpoint: str = ""
    """Folder of the checkpoint whose policy is evaluated; empty means the model of `model.path` itself."""

    @property
    def wanted(self) -> bool:
        """Whether this run evaluates, instead of training."""
        return bool(self.k)

    @property
    def ks(self) -> list[int]:
        """The numbers of `k`, each once, rising."""
        return sorted({int(number) for number in self.k.split(",") if number})
