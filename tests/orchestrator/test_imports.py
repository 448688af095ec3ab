"""Imports are one street: trainer → runtime_server.{client, wire, errors} → orchestrator."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("orchestrator", "runtime_server", "trainer")
HEAVY = {"torch", "vllm", "transformers", "fastapi", "uvicorn", "podman", "numpy", "pyarrow"}
MAY_IMPORT = {  # what each package may use of the other two
    "orchestrator": (),
    "runtime_server": ("orchestrator",),
    "trainer": (
        "runtime_server.client",
        "runtime_server.fleet",
        "runtime_server.wire",
        "runtime_server.errors",
        "orchestrator",
    ),
}
STANDARD_ONLY = ("contract.py", "records.py", "durable.py", "errors.py", "schedulers/__init__.py")


def imports(path: Path) -> Iterator[str]:
    """Every module named by an import, also inside functions; `from a import b` gives a.b."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: write imports in full"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _within(name: str, allowed: tuple[str, ...]) -> bool:
    return any(name == a or name.startswith(f"{a}.") for a in allowed)


@pytest.mark.parametrize("package", PACKAGES)
def test_the_street_is_one_way(package: str) -> None:
    for path in (ROOT / package).rglob("*.py"):
        for name in imports(path):
            foreign = name.partition(".")[0] in set(PACKAGES) - {package}
            assert not foreign or _within(name, MAY_IMPORT[package]), (
                f"{path.relative_to(ROOT)} imports {name}"
            )


def test_the_orchestrator_is_light() -> None:
    for path in (ROOT / "orchestrator").rglob("*.py"):
        heavy = {name for name in imports(path) if name.partition(".")[0] in HEAVY}
        assert not heavy, f"{path.relative_to(ROOT)} imports {heavy}"


@pytest.mark.parametrize("name", STANDARD_ONLY)
def test_the_contract_needs_the_standard_library_only(name: str) -> None:
    import sys

    tops = {n.partition(".")[0] for n in imports(ROOT / "orchestrator" / name)}
    assert tops <= {*sys.stdlib_module_names, "orchestrator"}
