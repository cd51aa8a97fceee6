"""The mutations' runner, on chapters that are only pretended to run."""

import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import book  # noqa: E402
import mutants  # noqa: E402


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with two mutations of one chapter."""
    for name in ("adv/a.py", "adv/__pycache__/a.pyc", "book/a.md", "book/a.ipynb", "_toc.yml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    for name in ("paper/p.yaml", "results/p-1.json", "results/p/seed-0/a.json", "work/p/weights"):
        (tmp_path / "reproduce" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "reproduce" / name).write_text(name)
    (tmp_path / "tests/book").mkdir(parents=True)
    content = {"circles": [{"why": "first"}, {"why": "second"}], "lines": [{"why": "third"}]}
    (tmp_path / "tests/book/mutations.yaml").write_text(yaml.safe_dump(content))
    monkeypatch.setattr(book, "ROOT", tmp_path)
    return tmp_path


def test_unknown_chapters_are_refused(project, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["mutants.py", "circles", "cirlces"])
    with pytest.raises(SystemExit, match="no mutations of cirlces; there are circles, lines"):
        mutants.main()


def test_a_copy_has_what_a_chapter_reads_and_no_weights_of_long_runs(project, tmp_path):
    target = tmp_path / "copy"
    target.mkdir()
    mutants.copy_project(target)
    copied = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
    assert copied == {
        "_toc.yml",
        "adv/a.py",
        "book/a.md",
        "reproduce/paper/p.yaml",
        "reproduce/results/p-1.json",
        "reproduce/results/p/seed-0/a.json",
    }


def test_a_run_that_is_stopped_begins_no_more(project, monkeypatch):
    begun = []

    def outcome(chapter, mutation):
        begun.append(mutation)
        if len(begun) == 1:
            raise KeyboardInterrupt
        time.sleep(0.05)
        return True, "caught"

    content = {"circles": [{"why": "some"}] * 30}
    (project / "tests/book/mutations.yaml").write_text(yaml.safe_dump(content))
    monkeypatch.setattr(mutants, "outcome", outcome)
    monkeypatch.setattr(sys, "argv", ["mutants.py"])
    with pytest.raises(KeyboardInterrupt):
        mutants.main()
    assert len(begun) < 30


def test_each_outcome_is_told_once_it_is_there(project, monkeypatch, capsys):
    told, seen = threading.Event(), []

    def outcome(chapter, mutation):
        if mutation["why"] == "first":  # ends only after the second has been told
            assert told.wait(30)
            return False, "survived"
        return True, "circles/a (does not hold)"

    def say(*words, **settings):
        seen.append(" ".join(words))
        if "second" in seen[-1]:
            told.set()

    monkeypatch.setattr(mutants, "outcome", outcome)
    monkeypatch.setattr(mutants, "print", say, raising=False)
    monkeypatch.setattr(sys, "argv", ["mutants.py", "circles"])
    with pytest.raises(SystemExit) as stop:
        mutants.main()
    assert stop.value.code == 1
    assert [line for line in seen if "circles: " in line] == [
        "caught  circles: second",
        "MISSED  circles: first",
    ]
    assert seen[-1] == "1 of 2 mutations caught by a claim"
