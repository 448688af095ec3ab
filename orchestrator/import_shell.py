"""Reads shell-style KEY="value" files and turns them into our configuration.

What it is
    `parse` understands the assignments of a shell file without running it: quotes, comments, `export`, and
    `${VAR}` or `${VAR:-default}` of the same file. `convert` maps the names that launch scripts commonly use
    to our keys, and says what it could not map. `as_yaml` writes the file, each value with its origin.

What it does not do
    It runs nothing: a value that needs a shell (`$(…)`, arrays) is reported, not guessed. A value whose name
    sounds like a secret is never written; it belongs into the env file.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import yaml

from orchestrator import config_keys
from orchestrator.config import Entry, find_key, from_assignments, resolve
from orchestrator.errors import ConfigError

_LINE = re.compile(r"\s*(?:export\s+|declare\s+(?:-\w+\s+)*|readonly\s+)?([A-Za-z_]\w*)=(.*)", re.DOTALL)
_PART = re.compile(
    r"""'(?P<single>[^']*)'|"(?P<double>(?:\\.|[^"\\])*)"|(?P<bare>(?:\\.|[^\s'"\\;#]|(?<=\S)\#)+)"""
)
_VARIABLE = re.compile(r"\$(?:\{(\w+)(?::?-([^}]*))?\}|(\w+))")
_SECRET = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|API_?KEY|PRIVATE_KEY")
_VARIABLES = re.compile(r"(?:HF|WANDB|NCCL|OMP|CUDA|TORCH|VLLM|TRANSFORMERS|RAY|UCX|MLFLOW|TOKENIZERS)_\w+")


@dataclass(frozen=True)
class Assignment:
    """One `NAME=value`. `problem` says why the value is not known."""

    name: str
    value: str
    line: int
    problem: str = ""
    uses: tuple[str, ...] = ()
    """Names of the same file that its value is made of."""


@dataclass
class Imported:
    """What became of a file: values by our keys with their origin, and what was not taken."""

    values: dict[str, tuple[str, Assignment]] = field(default_factory=dict)
    unmapped: list[tuple[Assignment, str]] = field(default_factory=list)
    """Each with what could be meant, or why it was left out."""
    wrong: list[str] = field(default_factory=list)


# --- shell text → assignments ------------------------------------------------------------------------


def parse(text: str) -> list[Assignment]:
    """Every assignment, the last of each name; `+=` and anything that is no assignment is left out."""
    found: dict[str, Assignment] = {}
    for number, line in _lines(text):
        while (match := _LINE.match(line)) is not None:
            name, rest = match[1], match[2]
            value, problem, end = _value(rest, {a.name: a.value for a in found.values()})
            found.pop(name, None)  # a later one is later in order, too
            uses = tuple(m[1] or m[3] for m in _VARIABLE.finditer(rest[:end]))
            found[name] = Assignment(name, value, number, problem, uses)
            line = rest[end:].lstrip()[1:] if rest[end:].lstrip().startswith(";") else ""
    return list(found.values())


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Logical lines with the number of their first: a backslash or an open quote continues a line."""
    pending, start = "", 0
    for number, line in enumerate(text.splitlines(), 1):
        start = start or number
        pending += line
        if pending.lstrip().startswith("#"):
            pending, start = "", 0
        elif pending.endswith("\\") and not pending.endswith("\\\\"):
            pending = pending[:-1]
        elif _open_quote(pending):
            pending += "\n"
        else:
            yield start, pending
            pending, start = "", 0
    if pending:
        yield start, pending


def _open_quote(line: str) -> bool:
    rest = re.sub(r"""\\.|'[^']*'|"(?:\\.|[^"\\])*"|(?:^|\s)\#.*""", "", line)
    return "'" in rest or '"' in rest


def _value(rest: str, known: dict[str, str]) -> tuple[str, str, int]:
    """(value, problem, length) of what stands behind the equals sign."""
    if rest[:1] == "(":
        return "", "a shell array", len(rest)
    value, at, unknown = "", 0, list[str]()
    while at < len(rest) and (part := _PART.match(rest, at)) is not None:
        at = part.end()
        if part["single"] is not None:
            value += part["single"]
            continue
        text = part["double"] if part["double"] is not None else part["bare"]
        if re.search(r"(?<!\\)(?:\$\(|`)", text):
            return "", "its value needs a shell to run", len(rest)
        value += _expanded(text, known, unknown)
    if unknown:
        return value, f"it uses {', '.join(unknown)}, which this file does not set", at
    return value, "", at


def _expanded(text: str, known: dict[str, str], unknown: list[str]) -> str:
    def replace(match: re.Match[str]) -> str:
        name, default = match[1] or match[3], match[2]
        if known.get(name):
            return known[name]
        if default is not None:
            return _expanded(default, known, unknown)
        if name == "HOME":
            return "~"
        if name in known:
            return ""
        unknown.append(name)
        return match[0]

    kept = text.replace(r"\$", "\0")
    return re.sub(r"\\(.)", r"\1", _VARIABLE.sub(replace, kept)).replace("\0", "$")


# --- assignments → our keys --------------------------------------------------------------------------


def _same(text: str) -> str:
    return text


def _minutes(text: str) -> str:
    """A bare number is minutes to Slurm, and seconds here."""
    return f"{text}m" if text.isdigit() else text


def _truth(text: str) -> str:
    return "true" if text.lower() in ("1", "true", "yes", "on", "y") else "false"


def _gigabytes(text: str) -> str:
    return f"{text}G" if text.isdigit() else text.upper().removesuffix("B")


def _memory(text: str) -> str:
    return text.upper().removesuffix("B") if not text.isdigit() else text


def _list(text: str) -> str:
    return yaml.safe_dump([text], default_flow_style=True, width=10_000).strip()


def _conda(text: str) -> str:
    return _list(f"source activate {text}")


Target = tuple[tuple[str, ...], Callable[[str], str]]


def _to(*keys: str, by: Callable[[str], str] = _same) -> Target:
    return keys, by


_EPISODES = ("runtime.max_parallel_sandboxes", "rollout.max_parallel_episodes")
TARGETS: dict[str, Target] = {
    "GPU_PARTITION TRAINING_PARTITION TRAIN_PARTITION": _to("training.partition"),
    "CPU_PARTITION RUNTIME_PARTITION": _to("runtime.partition"),
    "PARTITION": _to("runtime.partition", "training.partition"),
    "ACCOUNT SLURM_ACCOUNT PROJECT_ACCOUNT": _to("scheduler.account"),
    "QOS SLURM_QOS": _to("scheduler.qos"),
    "RESERVATION": _to("scheduler.reservation"),
    "CPUS_FOR_RUNTIME RUNTIME_CPUS CPU_CPUS CPUS_RUNTIME": _to("runtime.cpus"),
    "MEM_FOR_RUNTIME RUNTIME_MEM RUNTIME_MEMORY CPU_MEM MEMORY_FOR_RUNTIME": _to(
        "runtime.memory", by=_memory
    ),
    "RUNTIME_MEM_GB MEM_FOR_RUNTIME_GB": _to("runtime.memory", by=_gigabytes),
    "CPUS_FOR_TRAINING TRAINING_CPUS TRAIN_CPUS GPU_CPUS CPUS_PER_TASK": _to("training.cpus"),
    "MEM_FOR_TRAINING TRAINING_MEM TRAINING_MEMORY GPU_MEM MEM MEMORY": _to("training.memory", by=_memory),
    "TRAINING_MEM_GB MEM_GB MEM_FOR_TRAINING_GB": _to("training.memory", by=_gigabytes),
    "TIME_LIMIT WALLTIME TIME": _to("runtime.time_limit", "training.time_limit", by=_minutes),
    "TRAINING_TIME_LIMIT TRAIN_TIME GPU_TIME_LIMIT TRAINING_TIME": _to("training.time_limit", by=_minutes),
    "RUNTIME_TIME_LIMIT RUNTIME_TIME CPU_TIME_LIMIT": _to("runtime.time_limit", by=_minutes),
    "NUM_NODES NNODES NODES TRAINING_NODES": _to("training.nodes"),
    "RUNTIME_NODES CPU_NODES": _to("runtime.nodes"),
    "GPUS_PER_NODE NUM_GPUS N_GPUS_PER_NODE NGPUS GPUS": _to("training.gpus_per_node"),
    "GPU_TYPE": _to("training.gpu_type"),
    "MAX_PARALLEL_AGENTS NUM_PARALLEL_AGENTS MAX_WORKERS": _to(*_EPISODES),
    "MAX_PARALLEL_SANDBOXES MAX_CONTAINERS": _to("runtime.max_parallel_sandboxes"),
    "RUNTIME_READY_TIMEOUT READY_TIMEOUT": _to("runtime.ready_timeout"),
    "RUNTIME_PORT SERVER_PORT": _to("runtime.port"),
    "RUNTIME_HOST": _to("runtime.host"),
    "SANDBOX_IMAGE RUNTIME_IMAGE CONTAINER_IMAGE": _to("runtime.sandbox.image"),
    "TP_SIZE TENSOR_PARALLEL_SIZE ROLLOUT_TP": _to("rollout.tensor_parallel_size"),
    "SP_SIZE SEQUENCE_PARALLEL_SIZE ULYSSES_SIZE": _to("trainer.sequence_parallel_size"),
    "GPU_MEMORY_UTILIZATION GPU_MEM_UTIL": _to("rollout.gpu_memory_utilization"),
    "ROLLOUT_ENGINE": _to("rollout.engine"),
    "TRAIN_DATA TRAIN_FILE TRAIN_FILES": _to("data.train"),
    "VAL_DATA VAL_FILE VAL_FILES VALIDATION_DATA TEST_DATA": _to("data.validation"),
    "MODEL_PATH MODEL MODEL_NAME BASE_MODEL": _to("model.path"),
    "DTYPE MODEL_DTYPE": _to("model.dtype"),
    "BATCH_SIZE TRAIN_BATCH_SIZE": _to("rollout.prompts_per_step"),
    "ROLLOUT_N N_ROLLOUTS NUM_TRAJ NUM_ROLLOUTS": _to("rollout.rollouts_per_prompt"),
    "MAX_PROMPT_LENGTH": _to("rollout.max_prompt_length"),
    "MAX_RESPONSE_LENGTH": _to("rollout.max_response_length"),
    "MAX_TURNS MAX_ITERATIONS MAX_STEPS_PER_EPISODE": _to("rollout.max_turns"),
    "TEMPERATURE ROLLOUT_TEMPERATURE": _to("rollout.temperature"),
    "EPOCHS TOTAL_EPOCHS NUM_EPOCHS": _to("trainer.total_epochs"),
    "TOTAL_STEPS MAX_STEPS TOTAL_TRAINING_STEPS": _to("trainer.total_steps"),
    "PPO_EPOCHS": _to("trainer.ppo_epochs"),
    "LEARNING_RATE LR ACTOR_LR POLICY_LR": _to("trainer.policy_lr"),
    "CRITIC_LR": _to("trainer.critic_lr"),
    "KL_COEF KL_LOSS_COEF": _to("algorithm.kl_coef"),
    "ENTROPY_COEF ENTROPY_COEFF": _to("algorithm.entropy_coef"),
    "SAVE_FREQ SAVE_EVERY CHECKPOINT_FREQ": _to("trainer.save_every"),
    "CHECKPOINT_DIR CKPT_DIR CKPTS_DIR": _to("trainer.checkpoint_dir"),
    "ROLLOUT_DIR": _to("trainer.rollout_dir"),
    "RUNS_DIR": _to("run.runs_dir"),
    "EXPERIMENT_NAME RUN_NAME JOB_NAME": _to("run.name"),
    "SEED RANDOM_SEED": _to("run.seed"),
    "ENV_FILE DOTENV": _to("environment.env_file"),
    "DEBUG VERBOSE": _to("environment.debug", by=_truth),
    "FI_PROVIDER NETWORK_PROVIDER": _to("environment.network_provider"),
    "CONDA_ENV": _to("runtime.setup_commands", "training.setup_commands", by=_conda),
    "SETUP_COMMAND": _to("runtime.setup_commands", "training.setup_commands", by=_list),
    "PYTHON PYTHON_BIN": _to("runtime.python", "training.python"),
}
"""Names by what they mean here. Slurm takes a bare number of minutes as a time limit."""

_BY_NAME = {name: target for names, target in TARGETS.items() for name in names.split()}


def convert(assignments: list[Assignment]) -> Imported:
    """Map what can be mapped, and check each value against the schema."""
    found = Imported()
    helpers = {name for each in assignments for name in each.uses}
    for each in assignments:
        if each.problem:
            found.unmapped.append((each, each.problem))
        elif any(_SECRET.search(name.upper()) for name in each.uses):
            found.unmapped.append((each, "a secret is in it: use environment.env_file"))
        elif (target := _target(each.name)) is None:
            used = each.name in helpers
            found.unmapped.append((each, "only other values use it" if used else suggestion(each.name)))
        elif each.value:  # an empty value means "the default" in such files
            keys, by = target
            for key in keys:
                _take(key, by(each.value), each, found)
    return found


def _target(name: str) -> Target | None:
    """Where a name goes; a variable of a well-known program goes to the jobs as it is, a secret nowhere."""
    if (target := _BY_NAME.get(name.upper())) is not None:
        return target
    if _SECRET.search(name.upper()) or not _VARIABLES.fullmatch(name):
        return None
    return _to(f"environment.variables.{name}")


def _take(key: str, value: str, each: Assignment, found: Imported) -> None:
    try:
        resolve(*entries_of([f"{key}={value}"]))
    except ConfigError as error:
        found.wrong.append(f"line {each.line}: {each.name}: {error}".replace("command line: ", ""))
        return
    if key in found.values:
        found.unmapped.append((each, f"{key} is already set by {found.values[key][1].name}"))
        return
    found.values[key] = (value, each)


def entries_of(assignments: list[str]) -> tuple[list[Entry], list[str]]:
    items = list(from_assignments(assignments))
    return [i for i in items if isinstance(i, Entry)], [i for i in items if isinstance(i, str)]


def suggestion(name: str) -> str:
    """What an unknown name could mean: a known one that is spelled alike, or a key of ours."""
    if _SECRET.search(name.upper()):
        return "sounds like a secret: put it into a .env file and name that in environment.env_file"
    words = name.lower()
    alike = difflib.get_close_matches(name.upper(), _BY_NAME, 2, 0.75)
    keys = [key for other in alike for key in _BY_NAME[other][0]]
    last = {key.rpartition(".")[2]: key for key in list(config_keys.keys())}
    keys += [last[near] for near in difflib.get_close_matches(words, last, 2, 0.6)]
    keys += [k for k in config_keys.nearest(words) if k not in keys][:1]
    named = list(dict.fromkeys(keys))[:3]
    return f"perhaps {' or '.join(named)}" if named else "no key of ours is like it"


# --- our keys → YAML ---------------------------------------------------------------------------------


def as_yaml(found: Imported, source: str) -> str:
    """The file, in the order of the schema, each value with the name and line that it came from."""
    rows = [f"# Imported from {source}. Check it with: orchestrate launch --config FILE --dry-run"]
    order = list(config_keys.keys())
    open_sections: list[str] = []
    for key in sorted(found.values, key=lambda key: _place(key, order)):
        value, each = found.values[key]
        *sections, name = _parts(key)
        shared = 0
        while shared < min(len(sections), len(open_sections)) and sections[shared] == open_sections[shared]:
            shared += 1
        for depth in range(shared, len(sections)):
            rows += [""] if depth == 0 else []
            rows.append(f"{'  ' * depth}{sections[depth]}:")
        open_sections = sections
        text = f"{'  ' * len(sections)}{name}: {_written(key, value)}"
        rows.append(f"{text:<44}  # {each.name}, line {each.line}")
    return "\n".join([*rows, ""])


def _parts(key: str) -> list[str]:
    known = find_key(key)
    if known is not None and known.name != key:  # a name in an open mapping may hold anything
        return [*known.name.split("."), key[len(known.name) + 1 :]]
    return key.split(".")


def _place(key: str, order: list[str]) -> tuple[int, str]:
    known = find_key(key)
    return (order.index(known.name) if known is not None else len(order)), key


def _written(key: str, value: str) -> str:
    known = find_key(key)
    assert known is not None  # every target is a key; a test holds that
    if known.is_list:
        return value
    plain = not (known.is_text or known.is_mapping) or (value.isdigit() and isinstance(known.default, int))
    quoted: str = yaml.safe_dump(value, width=10_000, allow_unicode=True).removesuffix("...\n").strip()
    return value if plain else quoted
