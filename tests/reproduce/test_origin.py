"""Where a result comes from."""

import subprocess
from pathlib import Path

import torch

import reproduce.origin
from reproduce.origin import provenance


def test_packages_that_are_not_installed_have_no_version():
    made = provenance(packages=("scipy", "no-such-package"), place=torch.device("cpu"))
    assert made["versions"]["no-such-package"] is None
    assert made["versions"]["torch"] == torch.__version__
    assert made["versions"]["scipy"].count(".") == 2
    assert made["device"]["type"] == "cpu"


def test_outside_a_repository_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce.origin, "ROOT", tmp_path)
    made = provenance([Path("some.py")], place=torch.device("cpu"))
    assert made["commit"] is None
    assert made["modified"] is None


def test_without_git_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    made = provenance([Path("some.py")], place=torch.device("cpu"))
    assert made["commit"] is None
    assert made["modified"] is None


def test_files_that_differ_from_the_commit_are_named(tmp_path, monkeypatch):
    def git(*arguments):
        person = ("-c", "user.name=A", "-c", "user.email=a@b.example")
        line = ["git", "-C", tmp_path, *person, *arguments]
        return subprocess.run(line, check=True, capture_output=True, text=True).stdout.strip()

    files = [tmp_path / name for name in ("same.py", "changed.py", "in/new.py")]
    files[2].parent.mkdir()
    for file in files[:2]:
        file.write_text("one")
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    for file in (*files[1:], tmp_path / "other.py"):
        file.write_text("two")
    monkeypatch.setattr(reproduce.origin, "ROOT", tmp_path)
    made = provenance(files, place=torch.device("cpu"))
    assert made["commit"] == git("rev-parse", "HEAD")
    assert made["modified"] == ["changed.py", "in/new.py"]
