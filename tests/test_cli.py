"""The command line, judged by what it prints, writes and exits with."""

import importlib.metadata
import json
import os
import sqlite3
import subprocess
import sys

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from typer.testing import CliRunner

import adv.lab
from adv.__main__ import app
from adv.attacks.boundary import deepfool
from adv.attacks.gradient import fgsm
from adv.lab import annotate, data, evaluation, training, zoo

FACTORY = """
import torch
from torch import nn

def make():
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 10))

def wide():
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))

def two():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 2))

def seven():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 7))

def broken():
    raise OSError("the disk is full")

def ended():
    raise SystemExit(0)

def text():
    return "no network"

class Picky(nn.Module):
    def forward(self, x):
        return x[0, 0, 100]

number = 3
"""


IN_PLACE = """
from helpers import Stretch

torch.manual_seed(0)
layers = nn.Flatten(), nn.Linear(64, 10)
plain, in_place = (nn.Sequential(Stretch(flag), *layers) for flag in (False, True))
"""


@pytest.fixture(scope="module")
def linear():
    """scikit-learn's logistic regression on the digits, as weights of ``make``."""
    source = data.load("digits")
    fitted = LogisticRegression(max_iter=300).fit(source.train.x.flatten(1), source.train.y)
    state = {
        "2.weight": torch.tensor(fitted.coef_.copy()).float().contiguous(),
        "2.bias": torch.tensor(fitted.intercept_).float(),
    }
    return state, fitted.score(source.test.x.flatten(1), source.test.y)


@pytest.fixture
def here(tmp_path, monkeypatch, linear):
    (tmp_path / "mynet.py").write_text(FACTORY)
    torch.save(linear[0], tmp_path / "weights.pt")
    save_file(linear[0], tmp_path / "weights.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "mynet", raising=False)
    monkeypatch.delenv("ADV_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def evaluate(*arguments, model="mynet:make", weights="weights.pt"):
    extra = [] if weights is None else ["--weights", weights]
    result = run("evaluate", model, "--data", "digits", "--json", *extra, *arguments)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture
def network(linear):
    model = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Identity(), torch.nn.Linear(64, 10)
    ).eval()
    model.load_state_dict(linear[0])
    return model


@pytest.mark.parametrize("weights", ["weights.pt", "weights.safetensors"])
def test_evaluate_agrees_with_others(here, linear, network, weights):
    got = evaluate("--attack", "fgsm", "--eps", 0.05, "--eps", 0.02, weights=weights)
    assert got["clean_accuracy"] == pytest.approx(linear[1])
    assert got["samples"] == 400
    test = data.load("digits").test
    want = evaluation.robust_accuracy(network, test.x, test.y, fgsm, [0.05, 0.02])
    assert [row["eps"] for row in got["robust"]] == [0.05, 0.02]
    assert [row["accuracy"] for row in got["robust"]] == pytest.approx(want)
    assert got["robust"][0]["accuracy"] < got["robust"][1]["accuracy"] < linear[1]
    assert 400 <= got["backward_passes"] <= 800


def test_evaluate_within_a_memory(here, monkeypatch):
    sizes = []
    real = evaluation.chunk_size
    monkeypatch.setattr(
        evaluation, "chunk_size", lambda *a, **k: sizes.append(real(*a, **k)) or sizes[-1]
    )
    need = 4 * 2 * (64 + 10)
    got = evaluate("--eps", 0.05, "--steps", 3, "--samples", 40, "--memory", 7 * need)
    assert (sizes, got["memory"]) == ([7], 7 * need)
    assert evaluate("--eps", 0.05, "--steps", 3, "--samples", 40)["memory"] is None
    assert sizes == [7]


def test_evaluate_minimal_norms(here, network):
    got = evaluate("--attack", "deepfool", "--norm", "l2", "--samples", 60)
    test = data.load("digits").test.take(60)
    norms = evaluation.minimal_norms(network, test.x, test.y, deepfool, norm="l2")
    correct = norms[norms > 0]
    assert got["found"] == 1
    assert got["median_norm"] == pytest.approx(float(correct.median()), rel=1e-4)
    assert got["mean_norm"] == pytest.approx(float(correct.mean()), rel=1e-4)


def test_clean_accuracy_counts_what_an_attack_could_not_fool(here, linear):
    weak = ("--attack", "deepfool", "--norm", "l2", "--steps", 1)
    got = evaluate(*weak, model="adv.lab.models:DigitsCNN", weights=zoo.entry("digits/cnn").path)
    test = data.load("digits").test
    assert got["clean_accuracy"] == evaluation.accuracy(zoo.load("digits/cnn"), test.x, test.y)
    assert got["found"] < 1


def test_evaluate_prints_a_table(here, linear):
    arguments = ["--weights", "weights.pt", "--eps", 0.03, "--steps", 4, "--seed", 3]
    shown = run("evaluate", "mynet:make", "--data", "digits", "--device", "cpu", *arguments)
    assert shown.exit_code == 0, shown.output
    assert f"{100 * linear[1]:.1f} %" in shown.stdout
    assert "accuracy at eps 0.03" in shown.stdout
    assert "pgd, linf, seed 3, cpu" in shown.stdout
    minimal = ["--weights", "weights.pt", "--attack", "deepfool", "--samples", 20]
    assert "median norm" in run("evaluate", "mynet:make", "--data", "digits", *minimal).stdout


def test_evaluate_takes_networks_of_the_zoo(here):
    name = next(n for n in zoo.names() if n.startswith("digits/") and zoo.entry(n).path.is_file())
    got = evaluate("--eps", 0, "--samples", 100, model=name, weights=None)
    assert got["robust"][0]["accuracy"] == got["clean_accuracy"] > 0.9


def test_evaluate_takes_a_network_as_it_is_and_does_not_change_what_it_reads(here):
    with (here / "mynet.py").open("a") as file:
        file.write(IN_PLACE)
    plain, habit = (
        evaluate("--eps", 0.1, "--samples", 4, model=f"mynet:{name}", weights=None)
        for name in ("plain", "in_place")
    )
    assert plain["robust"] == habit["robust"]
    assert plain["clean_accuracy"] == habit["clean_accuracy"]
    shown = run("evaluate", "mynet:plain", *BASE, "--eps", 8)
    assert "mynet:plain (no --weights: as it was made) on the first" in shown.stdout
    assert "note: pixels are in [0, 1], and eps >= 1 allows any image" in shown.stderr


class Trap:
    def __reduce__(self):
        return print, ("this must not run",)


BASE = ("--data", "digits", "--eps", 0.1)
WITH = (*BASE, "--weights")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["digits/none", *BASE], 2, "digits/cnn"),
        (["digits", *BASE], 2, "nor is it an import path"),
        (["Digits/CNN-att", *BASE], 2, "; closest: digits/cnn-at, "),
        (["digits/cnn-att", *BASE], 2, f"; adv info lists all {len(zoo.names())}"),
        (["digits/cnn", *WITH, "weights.pt"], 2, "its own weights"),
        (["mynet:make", "--data", "digit", "--eps", 0.1], 2, "no data set 'digit'"),
        (["mynet:make", "--data", "digits"], 2, "needs a radius"),
        (["mynet:make", *BASE, "--eps", -1], 2, "finite number"),
        (
            ["mynet:make", *BASE, "--eps", "0.1,0.2"],
            2,
            "'--eps': '0.1,0.2' is not a number; several take one --eps each: --eps 0.1 --eps 0.2",
        ),
        (["mynet:make", *BASE, "--norm", "l7"], 2, "l7"),
        (["mynet:make", *BASE, "--attack", "none"], 2, "none"),
        (["mynet:make", *BASE, "--attack", "fgsm", "--steps", 3], 2, "one step"),
        (["mynet:make", *BASE, "--device", "toaster"], 2, "no device 'toaster'"),
        (["mynet:make", *BASE, "--samples", 0], 1, "take(0)"),
        (["mynet:make", *BASE, "--samples", 4000], 1, "400"),
        (["mynet:make", *BASE, "--steps", 0], 1, "steps"),
        (["mynet:make", *BASE, "--seed", -1], 1, "seed"),
        (["mynet:make", "--data", "mnist", "--eps", 0.1], 1, "ADV_DATA"),
        (["mynet:absent", *BASE], 1, "no 'absent'"),
        (["nonet:make", *BASE], 1, "cannot import 'nonet'"),
        ([":make", *BASE], 1, "cannot import"),
        (["mynet:number", *BASE], 1, "no factory"),
        (["mynet:broken", *BASE], 1, "the disk is full"),
        (["mynet:ended", *BASE], 1, "mynet:ended() failed: SystemExit: 0"),
        (["mynet:text", *BASE], 1, "returned a str"),
        (["mynet:Picky", *BASE], 1, "does not take digits's images"),
        (["bad_syntax:make", *BASE], 1, "cannot import 'bad_syntax': SyntaxError"),
        (["bad_number:make", *BASE], 1, "cannot import 'bad_number': ZeroDivisionError: div"),
        (["bad_name:make", *BASE], 1, "cannot import 'bad_name': AttributeError: module 'math'"),
        (["bad_end:make", *BASE], 1, "cannot import 'bad_end': SystemExit: 0"),
        (["mynet:wide", *BASE], 1, "does not take digits's images (1, 8, 8)"),
        (["mynet:two", *BASE], 1, "(B, 10) logits"),
        (["mynet:seven", *BASE, "--samples", 1], 1, "(B, 10) logits"),
        (["mynet:make", *BASE, "--memory", 0], 1, "memory"),
        (["mynet:make", *BASE, "--memory", 100], 1, "one sample needs"),
        (["mynet:make", *WITH, "absent.pt"], 1, "no weights at absent.pt"),
        (["mynet:make", *WITH, "mynet.py"], 1, "cannot read"),
        (["mynet:make", *WITH, "hello.pt"], 1, "cannot read hello.pt"),
        (["mynet:make", *WITH, "cut.pt"], 1, "cannot read cut.pt"),
        (["mynet:make", *WITH, "nan.pt"], 1, "not finite"),
        (["mynet:make", *WITH, "trap.pt"], 1, "runs code"),
        (["mynet:make", *WITH, "list.pt"], 1, "no state dict"),
        (["mynet:make", *WITH, "nested.pt"], 1, ": model, epoch; save the state dict alone"),
        (["mynet.py:make", *BASE], 1, "; write mynet:make"),
        (["mynet:make", *WITH, "text.safetensors"], 1, "cannot read"),
        (["mynet:two", *WITH, "weights.pt"], 1, "does not fit"),
        (
            ["mynet:make", *BASE, "--attack", "deepfool", "--norm", "l1"],
            1,
            "p > 1",
        ),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else None,
)
def test_errors_are_one_friendly_message(here, linear, arguments, code, message, capfd):
    torch.save(Trap(), here / "trap.pt")
    torch.save([torch.zeros(2)], here / "list.pt")
    torch.save({"model": {"w": torch.zeros(2)}, "epoch": 5}, here / "nested.pt")
    torch.save({k: v * torch.nan for k, v in linear[0].items()}, here / "nan.pt")
    (here / "hello.pt").write_bytes(b"hello")
    (here / "cut.pt").write_bytes((here / "weights.pt").read_bytes()[:-100])
    (here / "text.safetensors").write_text("not tensors")
    (here / "bad_syntax.py").write_text("def make(:")
    (here / "bad_number.py").write_text("1 / 0")
    (here / "bad_name.py").write_text("import math\nmath.absent")
    (here / "bad_end.py").write_text("raise SystemExit(0)")
    result = run("evaluate", *arguments)
    assert result.exit_code == code, result.output
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert isinstance(result.exception, SystemExit)
    assert "this must not run" not in result.output + capfd.readouterr().out
    assert not result.stdout


def test_data(here):
    listed = run("data").stdout
    assert [line.split()[0] for line in listed.splitlines()] == list(data.names())
    assert "missing" in listed
    file = data.FILES["faces"][0][0]
    data.cache().mkdir(parents=True)
    (data.cache() / file.path).write_bytes(bytes(file.size))  # only its digest gives it away
    assert "altered: sha256" in run("data").stdout
    shown = run("data", "digits")
    assert "400 test; 1x8x8" in shown.stdout
    assert run("data", "digit").exit_code == 2
    assert run("data", "--download").exit_code == 2
    missing = run("data", "mnist")
    assert (missing.exit_code, missing.stdout) == (1, "")
    assert missing.stderr.startswith("adv: ")
    assert "`adv data mnist --download`" in missing.stderr


def test_info(here):
    shown = run("info")
    assert shown.exit_code == 0
    assert f"torch {importlib.metadata.version('torch')}\n" in shown.stdout
    words = [line.split() for line in shown.stdout.splitlines()]
    for name in (*data.names(), *zoo.names()):
        assert name in [line[0] for line in words]  # no name is glued to its state


@pytest.mark.parametrize("folder", ["/nowhere/at/all", "relative"])
def test_info_goes_on_without_a_folder_of_data(here, monkeypatch, folder):
    monkeypatch.setenv("ADV_DATA", folder)
    shown = run("info")
    assert shown.exit_code == 1
    words = [line.split() for line in shown.stdout.splitlines()]
    assert f"ADV_DATA={folder}" in [line[0] for line in words]
    assert ["digits/cnn", "found"] in words


def test_names_of_many_are_told_by_the_closest():
    names = [f"{part}/{kind}" for part in ("digits", "mnist") for kind in "abcdefg"]
    told = adv.lab.known("mnist/z", names, "adv info")
    assert told.startswith("closest: mnist/")
    assert told.endswith("; adv info lists all 14")
    assert told.count("/") == 5
    assert adv.lab.known("§", names, "adv info") == "adv info lists all 14"
    assert adv.lab.known("x", names[:2], "adv info") == "there are digits/a, digits/b"


def test_train(here, monkeypatch):
    smallest = min(zoo.names(), key=lambda n: zoo.entry(n).record.get("seconds", 1e9))
    result = run("train", smallest, "--out", "again.safetensors")
    assert result.exit_code == 0, result.output
    assert "same predictions" in result.stdout
    assert (here / "again.safetensors").stat().st_size > 1000
    monkeypatch.setattr(zoo, "WEIGHTS", here / "weights")
    (here / "weights").mkdir()
    (here / "weights" / zoo.MANIFEST).write_text(
        '["tiny/one"]\ndata = "digits"\nmodel = { name = "mlp", sizes = [64, 10] }\n'
        "training = { epochs = 1 }\n"
    )
    missing = run("evaluate", "tiny/one", *BASE)
    assert missing.exit_code == 1
    hint = missing.stderr.strip().split("adv ")[-1].split()
    assert run(*hint).exit_code == 0  # what the message says is what helps
    assert run("evaluate", "tiny/one", *BASE, "--samples", 20, "--steps", 1).exit_code == 0
    assert run(*hint, "--out", "x.safetensors").exit_code == 2
    smallest = "tiny/one"
    wrong = run("train", "digits/none")
    assert wrong.exit_code == 2
    assert smallest in wrong.stderr


@pytest.mark.parametrize(
    "error",
    [
        training.DivergenceError("the loss is nan"),
        OverflowError("too large"),
        ImportError("no such extra"),
        EOFError("cut short"),
        sqlite3.OperationalError("database is locked"),
        SafetensorError("header too small"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_whatever_a_training_raises_is_one_line(here, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(zoo, "train", fail)
    result = run("train", zoo.names()[0])
    assert (result.exit_code, result.stderr) == (1, f"adv: {error}\n")


def test_a_bad_place_for_weights_is_told_before_the_training(here, monkeypatch):
    monkeypatch.setattr(zoo, "_make", lambda *_: pytest.fail("it trained"))
    result = run("train", zoo.names()[0], "--out", here)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"adv: {here} is no file")


def test_annotate_looks_at_its_arguments_before_it_attacks(here, monkeypatch):
    monkeypatch.setattr(annotate, "collect", lambda *_, **__: pytest.fail("it attacked"))
    missing = run("annotate", here / "absent" / "answers.sqlite")
    assert missing.exit_code == 1
    assert missing.stderr.startswith("adv: no folder")
    for port in (99999, -1):
        assert run("annotate", "answers.sqlite", "--port", port).exit_code == 2
    for content in (b"", b"PK\x03\x04"):
        (here / "images.npz").write_bytes(content)
        result = run("annotate", "answers.sqlite", "--images", "images.npz")
        assert result.exit_code == 1
        assert result.stderr.startswith("adv: images.npz holds no collection")
    assert not (here / "answers.sqlite").exists()


def test_warnings_are_one_line_each(here):
    (here / "dead.py").write_text(
        "from torch import nn\n"
        "class Dead(nn.Module):\n"
        "    def forward(self, x):\n"
        "        return x.flatten(1)[:, :10].round().detach()\n"
    )
    result = run("evaluate", "dead:Dead", *BASE, "--samples", 200, "--steps", 2)
    assert result.exit_code == 0, result.output
    assert result.stderr.startswith("warning: pgd()")
    assert "gradient vanished" in result.stderr


def test_a_warning_is_said_before_the_error_that_it_explains(here):
    (here / "strange.py").write_text(
        "import warnings\n"
        "def Strange():\n"
        "    warnings.warn('all weights are zero')\n"
        "    raise ValueError('no network')\n"
    )
    result = run("evaluate", "strange:Strange", *BASE)
    assert result.exit_code == 1
    warning, error = result.stderr.splitlines()
    assert warning == "warning: all weights are zero"
    assert error.startswith("adv: ")
    assert "no network" in error


def test_a_terminal_without_a_table_s_characters_gets_others(here):
    """The dash of an empty cell is not in Latin-1."""
    code = "from adv import __main__ as cli; cli._percent = lambda share: chr(0x2014); cli.app()"
    command = [sys.executable, "-c", code, "evaluate", "mynet:make", "--data", "digits"]
    command += ["--weights", "weights.pt", "--samples", "20", "--attack", "deepfool"]
    narrow = os.environ | {"PYTHONIOENCODING": "latin-1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=narrow)
    assert done.returncode == 0, done.stderr
    assert "\\u2014" in done.stdout


def test_the_installed_command_in_a_process(here):
    command = [sys.executable, "-m", "adv", "evaluate", "mynet:make", *map(str, BASE), "--json"]
    arguments = ["--weights", "weights.pt", "--samples", "20", "--steps", "2"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["samples"] == 20
