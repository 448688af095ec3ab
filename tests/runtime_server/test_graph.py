"""Podman's storage is tidied: what nobody wrote down or uses goes, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from runtime_server.engines import graph

ID = {
    name: f"{number:x}" * 64
    for number, name in enumerate(("own", "orphan", "image", "base", "unwritten", "top"))
}
LAYERS: list[dict[str, Any]] = [
    {"id": ID["own"], "names": ["c-1-layer"]},
    {"id": ID["orphan"]},
    {"id": ID["image"], "diff-digest": "sha256:1"},
    {"id": ID["base"]},
    {"id": ID["top"], "parent": ID["base"]},
]


def write(root: Path, what: str, records: object, name: str = "") -> Path:
    file = root / f"overlay-{what}" / f"{name}{what}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(records if isinstance(records, str) else json.dumps(records))
    return file


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for layer in ID.values():
        (tmp_path / "overlay" / layer / "diff").mkdir(parents=True)
    write(tmp_path, "containers", [{"id": "c1", "layer": ID["own"]}])
    write(tmp_path, "images", [{"id": "i1", "layer": ID["top"]}])
    return tmp_path


def there(root: Path) -> set[str]:
    return {name for name, layer in ID.items() if (root / "overlay" / layer).exists()}


@pytest.mark.parametrize("name", ["", "volatile-"])
def test_only_what_nobody_uses_goes(root: Path, name: str) -> None:
    file = write(root, "layers", LAYERS, name)
    half = root / "overlay-layers" / ".tmp-layers.json123"
    half.write_text("[")
    graph.tidy(root, root / "run")
    assert there(root) == {"own", "image", "base", "top"} and not half.exists()
    assert json.loads(file.read_bytes()) == [layer for layer in LAYERS if layer["id"] != ID["orphan"]]


def test_nothing_that_is_in_order_is_written_again(root: Path) -> None:
    file = write(root, "layers", [layer for layer in LAYERS if layer["id"] != ID["orphan"]])
    before = file.stat().st_mtime_ns, file.stat().st_ino
    graph.tidy(root, root / "run")
    assert (file.stat().st_mtime_ns, file.stat().st_ino) == before


@pytest.mark.parametrize("containers", ["", "[", '{"c1": {}}', "[1]", '[{"id": "c1"}]'])
def test_records_that_cannot_be_read_cost_no_layer_that_is_written_down(root: Path, containers: str) -> None:
    write(root, "layers", LAYERS)
    write(root, "containers", containers)
    graph.tidy(root, root / "run")
    assert there(root) == ID.keys() - {"unwritten"}


def test_directories_of_containers_that_are_written_down_nowhere_go(root: Path) -> None:
    mine, lost = "c" * 64, "d" * 64
    write(root, "containers", [{"id": mine, "layer": ID["own"]}])
    tops = [root / "overlay-containers", root / "run" / "overlay-containers"]
    for top in tops:
        for name in (mine, lost):
            (top / name / "userdata").mkdir(parents=True)
    graph.tidy(root, root / "run")
    assert [sorted(path.name for path in top.glob("?" * 64)) for top in tops] == [[mine], [mine]]


def test_containers_may_be_written_down_elsewhere(root: Path) -> None:
    write(root, "layers", LAYERS)
    (root / "overlay-containers" / "containers.json").unlink()
    graph.tidy(root, root / "run")
    assert there(root) == ID.keys() - {"unwritten"}


def test_an_empty_storage_is_fine(tmp_path: Path) -> None:
    graph.tidy(tmp_path, tmp_path / "run")
    assert not [*tmp_path.iterdir()]
