"""The part of `config.yaml` about rollouts: how the policy acts, how long, and how many times.

What it does not do
    No reading of files, no torch.
"""

from typing import Annotated, Literal

from orchestrator.quantities import Seconds
from orchestrator.schema_algorithm import Fraction, Positive
from orchestrator.typed import Limits, Section, made


class Rollout(Section):
    engine: Literal["vllm", "torch"] = "vllm"
    """`vllm` samples fast; `torch` is exact, deterministic and slow."""
    prompts_per_step: Positive = 16
    """Tasks per step (the training batch size, in prompts)."""
    rollouts_per_prompt: Positive = 4
    """Trajectories sampled for each task."""
    max_prompt_length: Positive = 2048
    """Longest prompt, in tokens."""
    max_response_length: Positive = 4096
    """Longest episode after the prompt, in tokens, observations included."""
    format: Literal["shell", "chat"] = "shell"
    """How a dialogue is written: a bare shell session for small models that know no chat template, or the
    model's own chat template with tools."""
    tools: list[str] = made(factory=lambda: ["bash", "read", "edit", "submit"])
    """Tools of the chat format: bash, read, edit, submit. A task may ask for fewer; none at all makes the
    first answer the last."""
    tool_calls: Literal["json", "fenced"] = "json"
    """How a policy calls tools: `<tool_call>{"name": …, "arguments": …}</tool_call>` as Qwen and Hermes do,
    or one fenced block of bash in an answer."""
    bash: Literal["session", "command"] = "session"
    """The bash tool's commands run in one shell that keeps directory and variables, or each in its own."""
    system_prompt: str = ""
    """Put before a task's own system message (chat format)."""
    dialogue_template: str = ""
    """File with a Jinja chat template that takes the place of the model's own."""
    max_turns: Positive = 8
    """Turns of one episode."""
    max_tokens_per_turn: Positive = 512
    """Tokens sampled in one turn."""
    max_observation_bytes: Positive = 8192
    """Bytes of a command's output that the policy sees."""
    temperature: Annotated[float, Limits(gt=0)] = 1.0
    """Sampling temperature; the trainer applies the same to its log-probabilities."""
    tensor_parallel_size: Positive = 1
    """GPUs that share one copy of the model when generating (TP size)."""
    gpu_memory_utilization: Fraction = 0.5
    """Share of GPU memory that vLLM takes."""
    kv_cache_bytes: Positive | None = None
    """Size of the key-value cache; needed on CPUs, where a share of memory means the whole machine's."""
    max_parallel_episodes: Positive = 64
    """Episodes in flight at once."""
    turn_timeout: Seconds = 120
    """Time limit of one turn's commands, all together."""
    command_timeout: Seconds | None = None
    """Time limit of one command; null leaves it the whole turn's."""
    generation_timeout: Seconds = 600
    """Time limit of sampling one turn; an engine that is slower loses the episode, and is not its fault."""
    episode_timeout: Seconds = 1800
    """Time limit of one episode."""
    step_timeout: Seconds | None = None
    """Time limit of a step's rollouts; episodes that are not done by then are cancelled and masked. null
    waits for as long as the episodes' own limits allow."""
    oversample: Annotated[float, Limits(ge=1)] = 1.0
    """Start so many times the episodes that a step needs, so that none of them holds it up: once enough are
    done, those that are late are cancelled. 1.25 starts a quarter more."""
    straggler_grace: Seconds = 2
    """How long, once enough episodes are done, the step still waits for the ones it would rather have: those
    that it would play without `oversample`. Where none is later than that, the step repeats exactly."""
    resample: Annotated[int, Limits(ge=0)] = 0
    """Rounds in which groups that teach nothing (all of one reward) are replaced by groups of new tasks; 0
    keeps them."""
    asynchronous: bool = False
    """Play the next step's episodes while this one's update is made. They start one update behind, and take
    over new weights in flight; `algorithm` has what corrects for it. false repeats exactly."""
    update_in_flight: Literal["keep", "pause"] = "keep"
    """New weights while turns are being sampled (asynchronous): `keep` goes on with them from the next token,
    `pause` lets the turns end first."""
    max_staleness: Positive = 1
    """Episodes with a token sampled more updates ago than this are masked (asynchronous)."""
    validate_every: Positive | None = None
    """Steps between validations; null validates where a checkpoint is due."""
    validation_greedy: bool = False
    """Validate with the likeliest token each time, instead of sampling as in training."""
    validation_rollouts: Positive = 1
    """Trajectories for each validation task."""
    retries: Annotated[int, Limits(ge=0)] = 2
    """Fresh sandboxes tried when infrastructure loses one; after that the episode is masked."""
