"""Where a result comes from."""

from pathlib import Path

import torch

import reproduce.origin
from reproduce.origin import provenance
from reproduce.plan import ROOT


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


def test_files_as_committed_are_not_modified():
    made = provenance([ROOT / "LICENSE"], place=torch.device("cpu"))
    assert made["modified"] in ([], None)
