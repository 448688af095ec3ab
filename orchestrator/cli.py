"""The entry of `orchestrate`: a plain launch at once, everything else through click.

What it is
    `orchestrate launch -c NAME [--json] [KEY=VALUE]…` is what scripts and people wait for, and importing
    click with what it needs costs a fifth of a launch. So that command line, and nothing that is unusual in
    any way, is read here. What fails, fails in click's hands: messages and exit codes are the same.

How to use it
    orchestrate --help

What it does not do
    It declares no command (`orchestrator.cli_commands` does) and knows no option but these two.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

from orchestrator.errors import OrchestrateError

_COMPLETION = "_ORCHESTRATE_COMPLETE"  # click's own variable: the shell asks for words, not for a launch


def main() -> None:
    """Entry point of the console script."""
    raised: BaseException | None = None
    if (options := plain_launch(sys.argv[1:])) is not None and _COMPLETION not in os.environ:
        try:
            raise SystemExit(launch(options))
        except (OrchestrateError, OSError, KeyboardInterrupt, EOFError) as error:
            raised = error
    from orchestrator.cli_commands import cli

    cli(prog_name="orchestrate", obj=raised)


def plain_launch(argv: Sequence[str]) -> dict[str, Any] | None:
    """The options of a launch as click would read them; None for whatever is not that simple."""
    if argv[:1] != ["launch"]:
        return None
    options: dict[str, Any] = {"config_name": None, "as_json": False}
    assignments: list[str] = []
    words = iter(argv[1:])
    for word in words:
        if word == "--json":
            options["as_json"] = True
        elif word in ("-c", "--config"):
            options["config_name"] = next(words, None)
        elif word.startswith("-"):
            return None
        else:
            assignments.append(word)
    name = options["config_name"]
    if not name or name.startswith("-"):
        return None
    return options | _USUAL | {"assignments": tuple(assignments)}


_USUAL = {
    **dict.fromkeys(("dry_run", "follow", "runtime_only"), False),
    **dict.fromkeys(("runtime_url", "runtime_api_key_file")),
}


def launch(options: dict[str, Any]) -> int:
    """Launch; returns what to exit with. git answers while the rest is imported and checked."""
    from orchestrator import resources, snapshot

    checkout = None if options["dry_run"] else resources.checkout()
    with snapshot.asked(checkout) as asked:
        from orchestrator import cli_launch

        return cli_launch.main(cli_launch.Options(**options), asked)
