"""What the Makefile's variables become, and a set-up that can be tried again."""

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def make(*arguments):
    """Run make; variables of this process's environment must not matter."""
    environment = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME")}
    return subprocess.run(
        ["make", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def shown(*arguments):
    done = make("-n", "-s", *arguments)
    assert done.returncode == 0, done.stderr
    return " ".join(done.stdout.replace("\\\n", " ").split())


def test_dry_and_store_are_off_where_they_are_empty_or_zero():
    for value, dry in (("1", True), ("yes", True), ("0", False), ("", False)):
        assert ("--dry" in shown("reproduce", f"DRY={value}")) == dry
        assert ("--store" in shown("bench", f"STORE={value}")) == dry


def test_a_folder_of_results_may_have_a_space():
    assert "--results='my results' --work='my results/work'" in shown(
        "reproduce", "RESULTS=my results"
    )


def test_an_environment_that_was_half_made_is_made_again(tmp_path):
    python, log = tmp_path / "python", tmp_path / "log"
    python.write_text(  # as on Debian without python3-venv: links, and then no pip
        f'#!/bin/sh\necho "$@" >> {log}\n'
        f'[ "$1" = -m ] || exit 0\nmkdir -p "$3/bin"; touch "$3/bin/python"; exit 1\n'
    )
    python.chmod(0o755)
    for runs in (1, 2):
        done = make(f"PYTHON={python}", f"VENV={tmp_path}/venv", f"{tmp_path}/venv/bin/python")
        assert done.returncode
        assert "apt install python3-venv" in done.stdout
        assert log.read_text().count("-m venv") == runs


def test_a_switch_back_to_earlier_pins_installs_again(tmp_path):
    pip, log = tmp_path / "venv/bin/pip", tmp_path / "log"
    pip.parent.mkdir(parents=True)
    pip.write_text(f'#!/bin/sh\necho "$@" >> {log}\n')
    pip.chmod(0o755)
    (pip.parent / "python").touch()
    runs = []
    for pins in ("1", "1", "2", "1"):
        target = f"{tmp_path}/venv/.book-{pins}"
        assert make(f"VENV={tmp_path}/venv", f"PINS={pins}", target).returncode == 0
        runs.append(log.read_text().count("install"))
    assert runs == [1, 1, 2, 3]
