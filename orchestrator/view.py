"""How plans, runs and configurations look in a terminal.

What it is
    Functions from data to `rich.text.Text`; they print nothing and read nothing, so they work the same
    with and without colour. `console()` makes the one Console that the commands print with.

What it does not do
    No secrets come here: plans hold names of variables only, and `hidden` masks what a configuration
    gives to variables whose names sound like secrets.
"""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from orchestrator.plan import Plan, PlannedJob
from orchestrator.quantities import clock
from orchestrator.runs import JobView, RunView
from orchestrator.schedulers.slurm_text import Check

STYLES = {
    **dict.fromkeys(("success", "ok"), "green"),
    **dict.fromkeys(("failed", "timeout", "peer_gone", "stranded"), "bold red"),
    **dict.fromkeys(("cancelled", "unknown", "requeued", "gone"), "yellow"),
    **dict.fromkeys(("running", "ending"), "cyan"),
    **dict.fromkeys(("pending", "held", "waiting"), "blue"),
}
BARS = "▁▂▃▄▅▆▇█"
_SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASS|CREDENTIAL|AUTH", re.IGNORECASE)
_ESCAPES = re.compile(
    r"\x1b\[[0-9;]*m"  # a colour
    r"|\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|.)?"  # any other escape sequence
    r"|[\x00-\x08\x0b-\x1f\x7f\x80-\x9f]"  # control characters, but tab and newline
)


def console(stderr: bool = False) -> Console:
    """A console that never wraps or guesses: what is printed can be copied. Honours NO_COLOR."""
    return Console(stderr=stderr, highlight=False, soft_wrap=True, markup=False, emoji=False)


def clean(text: str, colour: bool = False) -> str:
    """The text without control characters: what a sandbox printed must not drive this terminal.

    Colours stay when asked for.
    """
    return _ESCAPES.sub(lambda m: m[0] if colour and m[0].endswith("m") and m[0][:2] == "\x1b[" else "", text)


def hidden(name: str, value: Any) -> Any:
    """The value, or stars when the key is a variable whose name sounds like a secret."""
    variable = name.removeprefix("environment.variables.")
    return "***" if variable != name and _SECRET_NAME.search(variable) else value


def styled(word: str) -> Text:
    return Text(word, STYLES.get(word, ""))


def row(label: str, *parts: str | Text) -> Text:
    """`  label      part part`, the label dim and aligned; a long one keeps its distance."""
    return Text.assemble(
        "  ", (f"{label:<9} ", "dim"), *(Text(p) if isinstance(p, str) else p for p in parts)
    )


def lines(rows: Iterable[Text]) -> Text:
    return Text("\n").join(rows)


def size(mebibytes: int) -> str:
    return f"{mebibytes // 1024}G" if mebibytes % 1024 == 0 else f"{mebibytes}M"


def short_path(path: str | Path) -> str:
    """Relative to here when it is below, as one would type it."""
    path = Path(path)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def short_id(run_id: str) -> str:
    """The end of a run's id that is enough to name it."""
    return run_id.rpartition("_")[2]


# --- plans -------------------------------------------------------------------------------------------


def resources(job: PlannedJob) -> str:
    asked = job.resources
    nodes = f"{asked.nodes} nodes × " if asked.nodes > 1 else ""
    gpus = f" · {asked.gpus} GPU{'s' * (asked.gpus > 1)}" if asked.gpus else ""
    where = f" · {asked.partition}" if asked.partition else ""
    return f"{nodes}{asked.cpus} CPUs · {size(asked.memory)}{gpus} · {clock(asked.time_limit)}{where}"


def start(job: PlannedJob) -> str:
    if job.held:
        return "held until the runtime is ready"
    return f"starts after the {job.after} job" if job.after else "starts at once"


def plan(planned: Plan, checks: Mapping[str, Check] | None = None) -> Text:
    """A plan, for a dry run: jobs, what the cluster says of each, numbers, warnings, then the scripts as
    they would be submitted."""
    rows = [row("plan", f"{planned.mode} on {planned.scheduler}", ("; nothing was submitted"))]
    for job in planned.jobs:
        rows.append(row(job.role, f"{resources(job)}   ", Text(start(job), "dim")))
        if checks and job.role in checks:
            rows.append(row("", _answer(checks[job.role])))
    if planned.mode != "runtime-only":
        rows.append(row("GPUs", f"{planned.gpus} effective, {planned.copies} × the model when generating"))
        rows += [row("total", total) for total in planned.totals]
        step = row("step", f"{planned.episodes_per_step} episodes")
        rows.append(row("evaluates", clean(planned.evaluation)) if planned.evaluation else step)
    rows += warnings(planned.warnings)
    for job in planned.jobs:
        rows += [
            Text(),
            Text(f"── {planned.run_dir}/{job.role}.sbatch", "dim"),
            Text(job.script.rstrip("\n")),
        ]
    return lines(rows)


def _answer(check: Check) -> Text:
    styles = {True: "green", False: "bold red", None: "yellow"}
    return Text(clean(check.message), styles[check.accepted])


def warnings(found: Sequence[str]) -> list[Text]:
    return [row("note", Text(warning, "yellow")) for warning in found]


def launched(planned: Plan, jobs: dict[str, str], left_out: Sequence[str]) -> Text:
    """What a launch says: the run, its directory and its jobs."""
    rows = [row("run", Text(planned.run_id, "bold")), row("directory", short_path(planned.run_dir))]
    for job in planned.jobs:
        rows.append(row(job.role, f"job {jobs[job.role]}   {resources(job)}   ", Text(start(job), "dim")))
    rows += warnings(planned.warnings)
    if left_out:
        more = f" and {len(left_out) - 3} more" if len(left_out) > 3 else ""
        rows += warnings([f"not in the code snapshot: {', '.join(left_out[:3])}{more}"])
    return lines(rows)


def next_steps(commands: Sequence[str]) -> Text:
    return lines(row("next" if i == 0 else "", Text(command, "bold")) for i, command in enumerate(commands))


# --- runs --------------------------------------------------------------------------------------------


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """Rates between 0 and 1 as bars; more than `width` of them are averaged in groups."""
    if len(values) > width:
        edges = [round(i * len(values) / width) for i in range(width + 1)]
        values = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    return "".join(BARS[min(7, max(0, int(v * 8)))] for v in values)


def step_line(metrics: dict[str, Any], total: int | None) -> str:
    """One step of training: `step 12/60   success 61 %   reward 0.61   3,120 tok/s`."""
    parts = [f"step {int(metrics.get('step', 0)) + 1:>3}" + (f"/{total}" if total else "")]
    if isinstance(rate := metrics.get("success_rate"), int | float):
        parts.append(f"success {rate:>4.0%}")
    if isinstance(reward := metrics.get("reward_mean"), int | float):
        parts.append(f"reward {reward:.3f}")
    if isinstance(speed := metrics.get("tokens_per_s"), int | float):
        parts.append(f"{speed:,.0f} tok/s")
    return "   ".join(parts)


def job(look: JobView) -> Text:
    told = [look.phase and f"phase {look.phase}", look.attempt and f"attempt {look.attempt}", look.host]
    said = " · ".join(str(t) for t in told if t)
    parts = [
        Text(f"job {look.job_id or '-':<10} "),
        Text(f"{look.state:<8}", STYLES.get(look.state, "")),
        Text(said, "dim"),
    ]
    if look.outcome:
        parts += [Text("  "), styled(look.outcome)]
    if look.reason:
        parts.append(Text(f"  {clean(look.reason)}"))
    return row(look.role, *parts)


def status(look: RunView, total: int | None, sandboxes: Sequence[Text] = ()) -> Text:
    """One run at one moment, about ten lines. `sandboxes`: rows of `orchestrator.view_live`."""
    about = f"  config {Path(look.name).stem} · {look.scheduler} scheduler · {age(look.created_at)} ago"
    rows = [Text.assemble("  ", (look.run_id, "bold"), "  ", styled(look.state), (about, "dim"))]
    if look.reason:
        rows.append(row("reason", clean(look.reason)))
    rows += [job(each) for each in look.jobs]
    if look.url and not look.is_over:
        rows.append(row("server", clean(look.url)))
    rows += sandboxes
    if look.metrics:
        rows.append(row("training", step_line(look.metrics, total)))
    if look.success_rates:
        rates = look.success_rates
        ends = f"  {rates[0]:.0%} → {rates[-1]:.0%}"
        rows.append(row("success", Text(sparkline(rates), "green"), Text(ends, "dim")))
    rows.append(row("directory", short_path(look.path)))
    return lines(rows)


def run_list(looks: Sequence[RunView]) -> Text:
    """All runs, a line each, the newest last."""
    rows = [Text(f"  {'RUN':<24}{'STATE':<11}{'CONFIG':<14}{'AGE':<7}{'STEPS':<7}SUCCESS", "dim")]
    for look in looks:
        steps = str(int(look.metrics.get("step", -1)) + 1) if look.metrics else "-"
        state = styled(look.state)
        state.pad_right(max(0, 11 - len(look.state)))
        spark = sparkline(look.success_rates, 16)
        last = f" {look.success_rates[-1]:.0%}" if look.success_rates else ""
        name = Path(look.name).stem[:13]
        middle = f"{name:<14}{age(look.created_at):<7}{steps:<7}"
        rows.append(Text.assemble(f"  {look.run_id:<24}", state, middle, (spark, "green"), last))
    return lines(rows)


def age(since: float) -> str:
    """How long ago, short: 40s, 12m, 5h, 3d."""
    seconds = max(0, int(time.time() - since))
    for length, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= length:
            return f"{seconds // length}{unit}"
    return f"{seconds}s"
