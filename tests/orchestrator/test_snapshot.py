"""The code snapshot: what git knows, what is built, and nothing that looks like a secret."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from orchestrator import snapshot
from orchestrator.code_store import Store


def git(folder: Path, *arguments: str) -> None:
    who = ["-c", "user.name=t", "-c", "user.email=t@t"]
    subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True, timeout=30)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    root = tmp_path / "checkout"
    for name, text in {
        "trainer/a.py": "one\n",
        "trainer/tokenizer.py": "t\n",
        ".env": "KEY=s3cret\n",
        "tracked.pem": "s3cret\n",
        ".gitignore": "ignored/\nruntime_server/agent/bin/\n",
        "gone.py": "x\n",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    git(root, "init", "-q")
    git(root, "add", "-A", "-f")
    git(root, "commit", "-q", "-m", "first")
    return root


def test_the_snapshot_takes_what_git_knows_and_no_secret(checkout: Path, tmp_path: Path) -> None:
    (checkout / "trainer" / "a.py").write_text("two\n")
    (checkout / "tracked.pem").write_text("s3cret two\n")
    (checkout / "new.py").write_text("new\n")
    (checkout / "gone.py").unlink()
    (checkout / "large.bin").write_bytes(bytes(snapshot.MAX_FILE + 1))
    (checkout / "link").symlink_to("/etc/passwd")
    unwanted = ("ignored/x.py", "runs/r1/env.sh", "docs/guide.md", "tests/test_a.py")
    for name in (*unwanted, "runtime_server/agent/bin/agent-x86_64"):
        (checkout / name).parent.mkdir(parents=True)
        (checkout / name).write_text("s3cret")
    taken = snapshot.take(checkout, tmp_path / "code", [checkout / "runs"])
    files = {str(p.relative_to(tmp_path / "code")) for p in (tmp_path / "code").rglob("*") if p.is_file()}
    agent = "runtime_server/agent/bin/agent-x86_64"
    assert files == {"trainer/a.py", "trainer/tokenizer.py", ".gitignore", "new.py", agent}
    assert taken.dirty and len(taken.commit) == 40 and taken.files == len(files)
    assert "+two" in taken.patch and "s3cret" not in taken.patch
    assert {entry.partition(" ")[0] for entry in taken.left_out} == {
        ".env",
        "tracked.pem",
        "large.bin",
        "link",
    }


def test_a_snapshot_of_a_clean_checkout_has_no_patch(checkout: Path, tmp_path: Path) -> None:
    taken = snapshot.take(checkout, tmp_path / "code")
    assert (taken.dirty, taken.patch) == (False, "")


def test_a_snapshot_needs_no_git(tmp_path: Path) -> None:
    agent = "runtime_server/agent/bin/agent-x86_64"  # in a folder of the code, and among what was built
    for name in ("orchestrator/a.py", "jobs/x.sh", "orchestrator/__pycache__/a.pyc", "notes.txt", agent):
        (tmp_path / "src" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "src" / name).write_text("x")
    taken = snapshot.take(tmp_path / "src", tmp_path / "code")
    assert (taken.commit, taken.files) == ("", 3)


# --- the store of copies -----------------------------------------------------------------------------


def inode(path: Path) -> int:
    return path.stat().st_ino


@pytest.fixture
def store(checkout: Path, tmp_path: Path) -> Store:
    found = Store.of(tmp_path / "runs", checkout)
    assert found is not None
    found.settled_s = 0.0
    return found


def test_what_has_not_changed_is_linked_and_no_edit_is_seen(
    checkout: Path, tmp_path: Path, store: Store
) -> None:
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    (checkout / "trainer" / "a.py").chmod(0o755)
    snapshot.take(checkout, first, store=store)
    snapshot.take(checkout, second, store=store)
    assert inode(first / "trainer/a.py") == inode(second / "trainer/a.py") != inode(checkout / "trainer/a.py")
    (checkout / "trainer" / "a.py").write_text("two\n")
    taken = snapshot.take(checkout, third, store=store)
    assert [(folder / "trainer/a.py").read_text() for folder in (first, second, third)] == [
        *("one\n", "one\n", "two\n")
    ]
    assert inode(first / "trainer/tokenizer.py") == inode(third / "trainer/tokenizer.py")
    assert "+two" in taken.patch
    assert {stat.S_IMODE((folder / "trainer/a.py").stat().st_mode) for folder in (first, third)} == {0o555}


@pytest.mark.parametrize("way", ["replaced with the same times", "size, times and inode as before"])
def test_a_change_that_hides_is_seen(checkout: Path, tmp_path: Path, store: Store, way: str) -> None:
    """Whoever sets the time of modification back changes the time of change."""
    path = checkout / "trainer" / "a.py"
    before = path.stat()
    snapshot.take(checkout, tmp_path / "first", store=store)
    if way.startswith("replaced"):
        (checkout / "beside").write_text("two\n")
        (checkout / "beside").replace(path)
    else:
        path.write_text("two\n")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    snapshot.take(checkout, tmp_path / "second", store=store)
    assert (tmp_path / "second" / "trainer" / "a.py").read_text() == "two\n"
    assert (tmp_path / "first" / "trainer" / "a.py").read_text() == "one\n"


def test_a_file_that_changed_a_moment_ago_is_copied_and_not_kept(
    checkout: Path, tmp_path: Path, store: Store
) -> None:
    store.settled_s = 60.0
    snapshot.take(checkout, tmp_path / "first", store=store)
    snapshot.take(checkout, tmp_path / "second", store=store)
    assert inode(tmp_path / "first" / "trainer/a.py") != inode(tmp_path / "second" / "trainer/a.py")


def test_who_edits_the_code_of_a_run_edits_no_later_one(checkout: Path, tmp_path: Path, store: Store) -> None:
    snapshot.take(checkout, tmp_path / "first", store=store)
    edited = tmp_path / "first" / "trainer" / "a.py"
    edited.chmod(0o644)
    edited.write_text("his")
    edited.chmod(0o444)
    snapshot.take(checkout, tmp_path / "second", store=store)
    assert (tmp_path / "second" / "trainer" / "a.py").read_text() == "one\n"
    snapshot.take(checkout, tmp_path / "third", store=store)
    assert inode(tmp_path / "second" / "trainer/a.py") == inode(tmp_path / "third" / "trainer/a.py")


def test_a_store_that_others_may_write_to_is_not_used(checkout: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    assert Store.of(runs, checkout) is not None
    (folder,) = runs.glob(".code-*")
    folder.chmod(0o770)
    assert Store.of(runs, checkout) is None
    folder.chmod(0o700)
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    assert Store.of(runs, checkout) is None


def test_without_a_place_for_the_store_everything_is_copied(checkout: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert Store.of(tmp_path / "file", checkout) is None
    gone = Store(tmp_path / "gone", settled_s=0.0)
    taken = snapshot.take(checkout, tmp_path / "code", store=gone)
    assert taken.files and (tmp_path / "code" / "trainer" / "a.py").read_text() == "one\n"


def test_only_what_no_run_has_used_for_a_day_is_pruned(checkout: Path, tmp_path: Path, store: Store) -> None:
    snapshot.take(checkout, tmp_path / "first", store=store)
    kept = len(list(Path(store.folder).iterdir()))
    shutil.rmtree(tmp_path / "first")
    store.prune()
    assert len(list(Path(store.folder).iterdir())) == kept  # a run may be about to link them
    store.unused_s = 0.0
    snapshot.take(checkout, tmp_path / "second", store=store)
    (checkout / "trainer" / "a.py").write_text("two\n")
    shutil.rmtree(tmp_path / "second")
    snapshot.take(checkout, tmp_path / "third", store=store)
    assert len(list(Path(store.folder).iterdir())) == kept  # all but the old a.py
