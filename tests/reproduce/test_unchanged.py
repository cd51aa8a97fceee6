"""Edits that are vouched for leave records as they are; others don't."""

import shutil
import subprocess

import pytest

from reproduce import unchanged, versions
from reproduce.files import read

CODE = "def first(x):\n    return x + 1\n\ndef second(x):\n    return x - 1\n"
NAMES = ["adv.main.first", "adv.main.second"]


def git(folder, *arguments):
    subprocess.run(
        ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments],
        cwd=folder,
        check=True,
        capture_output=True,
    )


@pytest.fixture
def repository(tmp_path):
    if shutil.which("git") is None:
        pytest.skip("needs git")
    folder = tmp_path / "repository"
    for package in versions.PACKAGES:
        (folder / package).mkdir(parents=True)
        (folder / package / "__init__.py").write_text("")
    (folder / "adv" / "main.py").write_text(CODE)
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "before")
    with versions.rooted(folder):
        yield folder


def edit(folder, find, replace):
    file = folder / "adv" / "main.py"
    assert find in file.read_text()
    file.write_text(file.read_text().replace(find, replace))
    versions._forget()


def test_a_record_stands_through_edits_that_are_vouched_for(repository, tmp_path):
    file, (first, second) = tmp_path / "unchanged.json", NAMES
    told = {name: versions.digest(name) for name in NAMES}
    assert all(versions.same(name, told[name], file) for name in NAMES)
    edit(repository, "x + 1", "1 + x")
    assert not versions.same(first, told[first], file)
    assert unchanged.add("HEAD", "sums commute", NAMES, file) == 1
    versions._forget()
    assert versions.same(first, told[first], file)
    assert versions.same(first, versions.digest(first), file)
    assert not versions.same(first, None, file)
    assert not versions.same(first, told[second], file)
    assert [one["change"] for one in read(file)["changes"]] == ["sums commute"]
    git(repository, "commit", "-qam", "between")
    edit(repository, "1 + x", "1.0 + x")
    edit(repository, "x - 1", "x - 1.0")
    assert not versions.same(first, told[first], file)
    assert unchanged.add("HEAD", "whole numbers", NAMES, file) == 2
    versions._forget()
    assert all(versions.same(name, told[name], file) for name in NAMES)
    git(repository, "commit", "-qam", "after")
    edit(repository, "1.0 + x", "2 + x")  # of this nobody says so
    assert not versions.same(first, told[first], file)
    assert versions.same(second, told[second], file)


def test_what_cannot_be_vouched_for(repository, tmp_path):
    file = tmp_path / "unchanged.json"
    with pytest.raises(ValueError, match="no code of a record has changed since HEAD"):
        unchanged.add("HEAD", "nothing", NAMES, file)
    with pytest.raises(ValueError, match="no code at nowhere"):
        unchanged.add("nowhere", "nothing", NAMES, file)
    edit(repository, "x - 1", "x - 2 + 1")
    edit(repository, "def first", "def third")
    assert unchanged.add("HEAD", "a new name", [*NAMES, "adv.main.third"], file) == 1
    assert list(read(file)["changes"][0]["digests"]) == ["adv.main.second"]


def test_what_is_stored_is_of_code_that_there_is():
    for change in read(versions.UNCHANGED)["changes"]:
        assert "hecked" in change["change"], "a reason says how it was checked"
        for name, (before, after) in change["digests"].items():
            assert before != after
            assert versions.digest(name)
