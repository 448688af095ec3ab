"""Known sentences of the logs of a job that failed, and what each means.

What it is
    `read_log(lines)` finds the signs in the last lines of a log: Python's, CUDA's, Slurm's, the kernel's.

What it does not do
    It reads no file. A sign is evidence, never a verdict: it is shown with the line that it was seen in.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

_LOGS = "orchestrate logs {run} --role {role}"


@dataclass(frozen=True)
class Sign:
    """One known sentence that was seen. `while_running`: it matters although the job still runs."""

    text: str
    command: str
    line: str
    while_running: bool = False


@dataclass(frozen=True)
class _Known:
    pattern: str
    text: str
    command: str = _LOGS
    while_running: bool = False


_KNOWN = (
    _Known(
        r"CUDA out of memory|CUDA error: out of memory|OutOfMemoryError.*(?:CUDA|GPU)|HIP out of memory",
        "the GPU's memory was used up: lower rollout.gpu_memory_utilization or trainer.micro_batch_tokens",
        "orchestrate resume {run} rollout.gpu_memory_utilization=0.4",
    ),
    _Known(
        r"oom[-_ ]kill|Out Of Memory|Out of memory: Killed|MemoryError|Cannot allocate memory",
        "the node's memory (or the job's share of it) was used up: raise the job's memory",
    ),
    _Known(
        r"No space left on device|ENOSPC",
        "a disk was full (the shared one, the node's own, or /dev/shm)",
        "df -h",
        while_running=True,
    ),
    _Known(r"Disk quota exceeded|EDQUOT", "your quota is used up", "quota -s", while_running=True),
    _Known(r"Read-only file system", "a filesystem was read-only", "mount", while_running=True),
    _Known(r"Stale file handle|ESTALE", "the shared filesystem lost a file under the job (stale handle)"),
    _Known(
        r"DUE TO TIME LIMIT",
        "Slurm ended it at its time limit",
        "orchestrate resume {run} {role}.time_limit=4h",
    ),
    _Known(r"DUE TO PREEMPTION", "Slurm preempted it", "orchestrate resume {run}"),
    _Known(r"DUE TO NODE FAILURE|NODE_FAIL", "its node failed", "orchestrate resume {run}"),
    _Known(
        r"ModuleNotFoundError|ImportError: ",
        "a Python package is missing there: the job's interpreter or its setup_commands are wrong",
        "orchestrate config keys {role}.python",
    ),
    _Known(
        r"GLIBC(?:XX)?_[0-9.]+' not found|cannot open shared object file",
        "a shared library is missing or too old on that node: see {role}.setup_commands",
    ),
    _Known(r"Address already in use|EADDRINUSE", "a port was taken: leave runtime.port at 0"),
    _Known(
        r"401 Client Error|403 Client Error|gated repo|GatedRepoError|RepositoryNotFoundError",
        "the model could not be fetched: no permission (HF_TOKEN belongs into environment.env_file)",
    ),
    _Known(
        r"Max retries exceeded|Name or service not known|Temporary failure in name resolution"
        r"|LocalEntryNotFoundError|Network is unreachable",
        "that node reaches no network: fetch models and data beforehand, and set HF_HUB_OFFLINE=1",
    ),
    _Known(
        r"NCCL (?:error|WARN)|ncclSystemError|ncclUnhandledCudaError|Watchdog caught collective",
        "NCCL failed",
    ),
    _Known(
        r"CUDA driver version is insufficient|no CUDA-capable device|No CUDA GPUs are available"
        r"|CUDA unknown error",
        "the job saw no usable GPU: check training.gpus_per_node, the partition and the driver",
    ),
    _Known(
        r"newuidmap|subuid|subgid|cannot clone: Operation not permitted|user namespaces are not enabled",
        "rootless Podman does not work on that node",
        "orchestrate doctor --probe",
    ),
    _Known(
        r"podman: (?:command )?not found|No such file or directory: 'podman'",
        "Podman is not on that node",
        "orchestrate doctor --probe",
    ),
    _Known(r"Permission denied|EACCES", "something could not be read or written there"),
    _Known(r"Segmentation fault|SIGSEGV", "native code crashed"),
    _Known(r"Bus error", "native code crashed: /dev/shm or a disk was full, often"),
)
_LAST = re.compile(
    r"^(?:[A-Za-z_][\w.]*(?:Error|Exception|Interrupt|Exit)|error|fatal|Error)\b.*", re.IGNORECASE
)


def read_log(lines: Iterable[str]) -> Iterator[Sign]:
    """The signs in these lines, each kind once, with the last line that shows it; else the last error."""
    text = [line.strip() for line in lines if line.strip()]
    found = False
    for known in _KNOWN:
        seen = [line for line in text if re.search(known.pattern, line)]
        if seen:
            found = True
            yield Sign(known.text, known.command, seen[-1], known.while_running)
    last = [line for line in text if _LAST.match(line)]
    if last and not found:
        yield Sign("its log ends with an error", _LOGS, last[-1])
