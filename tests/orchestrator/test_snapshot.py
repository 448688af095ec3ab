"""The code snapshot: what git knows, what is built, and nothing that looks like a secret."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from orchestrator import snapshot


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
    for name in ("orchestrator/a.py", "jobs/x.sh", "orchestrator/__pycache__/a.pyc", "notes.txt"):
        (tmp_path / "src" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "src" / name).write_text("x")
    taken = snapshot.take(tmp_path / "src", tmp_path / "code")
    assert (taken.commit, taken.files) == ("", 2)
