"""A small paper to reproduce: the settings of ``convex`` on scikit-learn's digits."""

import copy
import os
import subprocess
import sys

import pytest
import yaml

from reproduce.plan import ROOT, Plan

SETTINGS = {
    "networks": {
        "fcnn": {
            "data": ["digits"],
            "seeds": 2,
            "model": {"name": "mlp", "sizes": [64, 16, 10]},
            "training": {"epochs": 3, "batch_size": 100, "lr": 0.01},
            "images": 60,
            "eps": [0.05, 0.1],
            "seconds": 5,
        },
        "nin": {
            "data": ["cifar10", "cifar10-subset"],
            "seeds": 2,
            "model": {"name": "nin"},
            "training": {"epochs": 1},
            "images": 10,
            "eps": [0.1],
        },
    },
    "defenses": {"none": None},
    "attacks": {
        "clean": {"images": None, "measures": ["error", "radius"]},
        "deepfool": {
            "call": "boundary.deepfool",
            "norm": "linf",
            "measured_at": "network",
            "measures": ["minimal", "fooling"],
        },
        "pgd": {
            "call": "gradient.pgd",
            "norm": "linf",
            "steps": 3,
            "eps": "network",
            "measures": ["fooling"],
        },
    },
    "tables": {
        "3": {
            "rows": {"fcnn": {"model": "fcnn"}, "nin": {"model": "nin"}},
            "columns": {
                "test-error": {"attack": "clean", "value": "error", "scale": 100},
                "rho1": {"attack": "deepfool", "value": "rho1"},
            },
        }
    },
    "figures": {
        "3a": {
            "axes": {"x": "eps", "y": "fooling ratio (%)"},
            "x": "eps",
            "clean": {"attack": "clean", "value": "error", "scale": 100},
            "cell": {"model": "fcnn", "value": "fooling", "scale": 100},
            "curves": {"DeepFool": {"attack": "deepfool"}, "PGD": {"attack": "pgd"}},
        }
    },
}


@pytest.fixture(autouse=True)
def _no_data(monkeypatch, tmp_path):
    """Data of the machine that runs the tests must not matter."""
    monkeypatch.delenv("ADV_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


class Bench:
    """A folder of settings, results and work, and the program on them."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir()
        self.content = copy.deepcopy(SETTINGS)
        self.write()

    def write(self):
        (self.folder / "settings").mkdir(exist_ok=True)
        text = yaml.safe_dump(self.content, sort_keys=False)
        (self.folder / "settings" / "convex.yaml").write_text(text)

    def plan(self, **options):
        folders = (self.folder / name for name in ("settings", "results", "work"))
        return Plan(*folders, **{"datasets": frozenset({"digits"}), **options})

    def command(self, *arguments):
        folders = (f"--{name}={self.folder / name}" for name in ("settings", "results", "work"))
        return [sys.executable, "-m", "reproduce", *folders, "--datasets=digits", *arguments]

    def run(self, *arguments, status=0):
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            self.command(*arguments), cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr


@pytest.fixture
def bench_folder(tmp_path):
    return tmp_path / "it's #1: {a} $b"  # what YAML, Snakemake or a shell could take amiss


@pytest.fixture
def bench(bench_folder):
    return Bench(bench_folder)
