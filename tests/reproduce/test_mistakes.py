"""What is mistyped, dead or half there: said at once, or an empty cell, and no lost hours."""

import io
import json
import math
import re
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from adv.lab.files import sha256
from reproduce import steps, summary, versions
from reproduce.__main__ import _parser, main
from reproduce.files import dumps, read, write_json
from reproduce.items import Network, Run
from reproduce.options import friendly
from reproduce.plan import OF_STEPS, Plan

DIGITS = Network("convex", "digits", "fcnn", "none", 0)


def folders(bench):
    return [f"--{name}={bench.folder / name}" for name in ("settings", "results", "work")]


# ----------------------------------------------------------------------------------- said at once


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        (("attacks", "deepfool"), {"measures": ["minimall"]}, "no 'minimall' in reproduce.measure"),
        (("attacks", "deepfool"), {"measures": []}, "deepfool has no measures"),
        (("attacks", "deepfool"), {"call": "boundary.depfool"}, "no 'depfool' in adv.attacks.boun"),
        (("attacks", "deepfool"), {"call": "peers.dnn"}, "no entry 'dnn' in adv.lab.peers.PEERS"),
        (
            ("networks", "fcnn"),
            {"loss": {"name": "defenses.adversarial.tradse"}},
            "no 'tradse' in adv.defenses.adversarial",
        ),
        (("networks", "fcnn"), {"model": {"name": "mpl"}}, r"no entry 'mpl' in adv.lab.models"),
        (
            ("networks", "fcnn", "training"),
            {"mixde": True, "warmpu": 3},
            "the training of fcnn has no mixde, warmpu",
        ),
    ],
)
def test_what_is_mistyped_is_said_before_anything_runs(bench, part, change, message):
    entry = bench.content
    for name in part:
        entry = entry[name]
    entry |= change
    bench.write()
    with pytest.raises(ValueError, match=r"^convex-3, fcnn, \S+: .*" + message):
        bench.plan().check()


def test_networks_that_are_used_are_looked_at_too(bench):
    bench.content["networks"]["wgan"] = {
        "data": ["digits"],
        "seeds": 1,
        "model": {"name": "wgan"},
        "training": {"epochs": 2, "critic_steps": 5, "mixed": True},
    }
    bench.content["attacks"]["deepfool"]["uses"] = "wgan"
    bench.write()
    with pytest.raises(ValueError, match="the training of wgan has no mixed"):
        bench.plan().check()
    del bench.content["networks"]["wgan"]["training"]["mixed"]
    bench.write()
    bench.plan().check()


def test_all_that_a_training_can_say_is_known(bench):
    """The entries that steps.py takes out, and the arguments of fit."""
    training = bench.content["networks"]["fcnn"]["training"]
    training |= dict.fromkeys(OF_STEPS, 1) | {"schedule": "cosine", "optimizer": "adam"}
    bench.write()
    bench.plan().check()
    names = versions.arguments("adv.lab.training.fit")
    assert {"epochs", "lr", "schedule", "optimizer"} <= set(names)
    assert not {"model", "train"} & set(names)


def test_an_attack_is_refused_what_it_has_no_argument_for(bench):
    plan, run = bench.plan(), Run(DIGITS, "pgd")
    steps.train(plan, DIGITS)
    bench.content["attacks"]["pgd"]["stpes"] = 2
    bench.write()
    with pytest.raises(ValueError, match=r"^gradient\.pgd has no stpes$"):
        steps.attack(bench.plan(), run)
    assert not plan.points(run).exists()


def test_the_stored_settings_name_arguments_of_their_attacks():
    plan = Plan(datasets=frozenset())
    plan.check()
    runs = (run for item in plan.items.values() for c in item.needed for run in plan.runs(c)[:1])
    for run in set(runs):
        steps._check_options(plan.attack(run))


def test_weight_decay_and_another_optimizer_are_refused(bench):
    bench.content["networks"]["fcnn"]["training"] |= {"optimizer": "sgd", "weight_decay": 0.01}
    bench.write()
    with pytest.raises(ValueError, match="weight_decay is Adam's"):
        steps.train(bench.plan(), DIGITS)
    bench.content["networks"]["fcnn"]["training"] |= {"optimizer": "adam"}
    bench.write()
    steps.train(bench.plan(), DIGITS)


def test_data_sets_that_no_settings_name_are_refused(bench):
    with pytest.raises(SystemExit, match=r"no data set digist; there are cifar10, .*, digits$"):
        main(["convex-3", "--dry", "--datasets=digist", *folders(bench)])


def test_every_option_says_what_it_is():
    told = " ".join(_parser().format_help().split())
    for words in (
        "--settings SETTINGS folder of settings; default: reproduce/settings",
        "--results RESULTS folder of results; default: reproduce/results",
        "--work WORK folder of work; default: reproduce/work",
        "all that follows goes to it",
        "instead of looking",
    ):
        assert words in told


def test_a_terminal_without_a_table_s_characters_gets_others(monkeypatch):
    file = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(file, encoding="ascii"))
    with friendly("reproduce"):
        print("1 ± 2 —")
        sys.stdout.flush()
    assert file.getvalue() == b"1 \\xb1 2 \\u2014\n"
    monkeypatch.setattr(sys, "stdout", io.StringIO())  # of a notebook, say
    with friendly("reproduce"):
        print("—")


# ---------------------------------------------------------------------- dead networks, half tables


@pytest.fixture
def dead(bench):
    """A network whose logits are equal, so that it gets nothing right."""
    plan = bench.plan()
    steps.train(plan, DIGITS)
    path, record = plan.weights(DIGITS), read(plan.record(DIGITS))
    save_file({name: 0 * value for name, value in load_file(path).items()}, path)
    write_json(plan.record(DIGITS), record | {"weights": sha256(path)})
    return bench


def test_a_network_that_gets_nothing_right_leaves_cells_empty(dead):
    dead.content["networks"]["fcnn"]["seeds"] = 1
    dead.content["attacks"]["psnr"] = dead.content["attacks"]["pgd"] | {"eps": {"psnr": [10, 20]}}
    dead.content["attacks"]["psnr"] |= {"norm": "l2", "nested": True}
    dead.write()
    plan = dead.plan()
    for attack in ("clean", "deepfool", "pgd", "psnr"):
        run = Run(DIGITS, attack)
        steps.attack(plan, run)
        assert [len(p) for p in torch.load(plan.points(run))["points"]] == [0] * (
            2 if attack in ("pgd", "psnr") else 1
        )
        steps.measure(plan, run)
        record = read(plan.record(run))
        assert record["attacked"] == 0
        assert record["values"] == ({"error": 1.0} if attack == "clean" else {})
    table = summary.table(plan, plan.items["convex-3"])
    assert table["rows"][0]["values"] == {"test-error": 100.0, "rho1": None}
    why = {(gap["row"], gap["column"]): gap["why"] for gap in table["missing"]}
    assert why["fcnn", "rho1"] == "the network gets no image right"
    figure = summary.figure(plan, plan.items["convex-figure-3a"])
    assert {gap["why"] for gap in figure["missing"]} == {"the network gets no image right"}
    assert figure["clean"]["mean"] == 100
    assert dumps(table)
    assert summary.show(table)


def test_a_mean_is_over_all_seeds_or_none(bench):
    """One of two networks has no number: half a mean would pass for a whole one."""
    plan = bench.plan()
    item = plan.items["convex-3"]
    runs = plan.runs(item.cells["fcnn", "test-error"])
    for run, error in zip(runs, (0.25, None), strict=True):
        settings = {"training": plan.recipe(run.network), "attack": plan.attack(run)}
        content = {"settings": settings, "values": {"error": error}, "weights": "w"}
        content |= {"images": 60, "of": 60, "complete": True, "dataset": "digits", "attacked": 9}
        plan.record(run).parent.mkdir(parents=True, exist_ok=True)
        plan.record(run).write_text(json.dumps(content | {"code": plan.versions(run)}))
    table = summary.table(plan, item)
    assert table["rows"][0]["values"]["test-error"] is None
    why = {(gap["row"], gap["column"]): gap["why"] for gap in table["missing"]}
    assert why["fcnn", "test-error"] == "no finite value for every seed"
    record = json.loads(plan.record(runs[1]).read_text())
    plan.record(runs[1]).write_text(json.dumps(record | {"values": {"error": 0.75}}))
    table = summary.table(plan, item)
    assert table["rows"][0]["values"]["test-error"] == 50
    assert table["rows"][0]["spread"]["test-error"] == pytest.approx(50 / math.sqrt(2))


# ------------------------------------------------------------------------------- mixed precision


@pytest.mark.parametrize("warmup", [0, 1])
@pytest.mark.parametrize("half", [True, False])
def test_a_mixed_training_is_mixed_in_each_of_its_stages(bench, monkeypatch, half, warmup):
    bench.content["networks"]["fcnn"]["training"] |= {"epochs": 2, "mixed": half, "warmup": warmup}
    bench.content["networks"]["fcnn"]["loss"] = {"name": "lab.training.cross_entropy"}
    bench.write()
    seen, stages, whole = [], [], steps.fit

    def cross_entropy(model, x, y):
        seen.append(torch.is_autocast_enabled(x.device.type))
        return torch.nn.functional.cross_entropy(model(x), y)

    def watched(model, train, **settings):
        seen.clear()
        told = whole(model, train, **settings)
        stages.append((settings["epochs"], set(seen)))
        return told

    monkeypatch.setattr(steps, "cross_entropy", cross_entropy)
    monkeypatch.setattr("adv.lab.training.cross_entropy", cross_entropy)
    monkeypatch.setattr(steps, "fit", watched)
    steps.train(bench.plan(), DIGITS)
    assert stages == ([(1, {half}), (1, {half})] if warmup else [(2, {half})])


def test_the_code_of_mixed_precision_counts_where_it_is_used(bench):
    assert "adv.lab.training.mixed" not in bench.plan().versions(DIGITS)
    bench.content["networks"]["fcnn"]["training"]["mixed"] = True
    bench.write()
    assert "adv.lab.training.mixed" in bench.plan().versions(DIGITS)
    assert re.fullmatch("[0-9a-f]{12}", bench.plan().versions(DIGITS)["adv.lab.training.mixed"])
