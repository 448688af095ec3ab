"""How the sandbox servers of a live run look in a terminal: a line, and one for each of several.

What it does not do
    It asks nobody (`orchestrator.live` does) and prints nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

from orchestrator.live import ServerView, summary
from orchestrator.view import clean, row


def rows(servers: Sequence[ServerView]) -> list[Text]:
    """What the servers do, in a line; with several of them a line each below it."""
    if not servers:
        return []
    whole = summary(servers)
    if not whole["answer"]:
        return [row("sandboxes", Text("no server answers", "yellow"))]
    told = [f"{whole['in_use']} of {whole['places']} in use", f"{whole['queued']} queued"]
    told += [f"{whole['warm']} warm"] if whole["warm"] else []
    if (p95 := whole["exec_p95_ms"]) is not None:
        told.append(f"exec p95 {p95:,.1f} ms" if p95 < 100 else f"exec p95 {p95 / 1000:,.1f} s")
    if whole["servers"] > 1:
        told.append(f"{whole['answer']} of {whole['servers']} servers answer")
    each = [_server(server) for server in servers] if whole["servers"] > 1 else []
    return [row("sandboxes", " · ".join(told)), *each]


def _server(server: ServerView) -> Text:
    where = f"{server.name:<4}{clean(server.url):<28} "
    if server.problem:
        return row("", Text(where, "dim"), Text(clean(server.problem), "yellow"))
    return row("", Text(where, "dim"), f"{server.in_use} of {server.places} · {server.queued} queued")
