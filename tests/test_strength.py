"""The race of attacks: its rows against direct calls, and that a stopped race goes on."""

import json
from functools import partial

import pytest
import torch

from adv.attacks.gradient import pgd
from adv.attacks.pdpgd import pdpgd
from adv.lab import data, peers, zoo
from adv.lab.evaluation import counting, minimal_norms
from benchmarks import overhead, radius, strength
from benchmarks.__main__ import main
from benchmarks.strength import Network, contest, path, table

NETWORK = Network("digits/mlp-24", 6, first=True)
SMALL = {"norms": ("l2",), "budgets": (20,), "attacks": ("pdpgd", "peers.ddn", "deepfool")}


@pytest.fixture
def raced(tmp_path):
    lines = []
    return contest(NETWORK, results=tmp_path, show=lines.append, **SMALL), lines, tmp_path


def test_rows_are_what_the_attacks_find(raced):
    content, lines, _ = raced
    rows = {row["attack"]: row for row in content["rows"]}
    assert list(rows) == ["pdpgd", "deepfool", "peers.ddn"]
    assert len(lines) == 3
    model, test = zoo.load("digits/mlp-24"), data.load("digits").test
    for name, attack in (("pdpgd", pdpgd), ("peers.ddn", partial(peers.attack, "ddn"))):
        norms = minimal_norms(model, test.x[:6], test.y[:6], attack, norm="l2", steps=20)
        assert rows[name]["norms"] == pytest.approx(norms.tolist(), rel=1e-4)
        assert rows[name]["backward"] == 20
        assert 20 <= rows[name]["forward"] <= 30
        assert rows[name]["cost"] > 0
    assert content["images"] == list(range(6))
    for name, row in rows.items():
        assert row["made"]["device"]["type"] in ("cpu", "cuda", "mps"), name
        assert "foolbox" in row["made"]["versions"]


def test_a_stopped_race_goes_on_and_other_code_runs_again(raced):
    content, _, folder = raced
    file, lines = path(NETWORK.name, folder), []
    contest(NETWORK, results=folder, show=lines.append, **SMALL)
    assert lines == []
    content["rows"][0]["code"] = "older"
    del content["rows"][1]
    file.write_text(json.dumps(content))
    contest(NETWORK, results=folder, show=lines.append, trust=True, **SMALL)
    assert [line.split()[2] for line in lines] == ["deepfool"]
    contest(NETWORK, results=folder, show=lines.append, **SMALL)
    assert [line.split()[2] for line in lines] == ["deepfool", "pdpgd"]
    again = contest(Network(NETWORK.name, 5), results=folder, show=lines.append, **SMALL)
    assert len(again["images"]) == 5
    assert len(lines) == 5, "other images, all anew"


def test_rows_that_others_add_meanwhile_stay(tmp_path):
    given = {"norms": ("l2",), "budgets": (20,), "results": tmp_path}

    def another(line):
        if line.split()[2] == "pdpgd":
            contest(NETWORK, attacks=("deepfool",), show=str, **given)

    content = contest(NETWORK, attacks=("pdpgd", "peers.ddn"), show=another, **given)
    assert {row["attack"] for row in content["rows"]} == {"pdpgd", "deepfool", "peers.ddn"}


def test_the_table_counts_only_what_was_attacked():
    row = {"norm": "l2", "attack": "some", "steps": 20, "forward": 1, "backward": 1, "cost": 1}
    rows = [row | {"norms": [0.0, 0.2, 0.6, None]}]
    proved = [{"index": 3 + i, "upper": u} for i, u in enumerate((0.0, 0.1, 0.6, 0.5))]
    content, optima = {"rows": rows, "images": [3, 4, 5, 6]}, {"norms": {"l2": proved}}
    (line,) = table(content, optima).to_dict("records")
    assert line["mean"] == pytest.approx(0.4)
    assert line["median"] == pytest.approx(0.6)
    assert line["found"] == pytest.approx(2 / 3)
    assert line["gap"] == pytest.approx(0.5)
    # More may be proved than was attacked, or less, or nothing of an image but a lower bound.
    optima["norms"]["l2"] = [*proved, {"index": 9, "upper": 1.0}]
    assert table(content, optima)["gap"].item() == pytest.approx(0.5)
    optima["norms"]["l2"] = [proved[0], proved[1] | {"upper": None}, proved[2] | {"upper": 0.4}]
    assert table(content, optima)["gap"].item() == pytest.approx(0.5)
    assert table(content, {"norms": {}})["gap"].isna().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only=digits/none"], "benchmarks: no network digits/none; there are digits/mlp-24"),
        (["--store", "--norms=l7"], "benchmarks: no norm l7; there are linf, l2, l1, l0"),
        (["--store", "--budgets=7"], "benchmarks: no budget 7; there are 20, 100, 500, 2000"),
        (["--norms=l2"], "2"),  # argparse's own status
    ],
)
def test_what_cannot_be_run_is_said(monkeypatch, arguments, message):
    monkeypatch.setattr(strength, "networks", lambda: [NETWORK])
    monkeypatch.setattr(strength, "_measure", pytest.fail)
    monkeypatch.setattr("sys.argv", ["benchmarks", "strength", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert message in str(stop.value.code)


@pytest.mark.parametrize(
    "arguments",
    [
        ["speed", "--store"],
        ["speed", "--only=digits/none", "--store"],
        ["speed", "--only=digits/mlp-24"],
        ["radius", "--store", "--norms=l2"],
        ["overhead", "--store", "--only=mnist/lenet5"],
    ],
)
def test_options_that_a_part_lacks_are_refused(monkeypatch, capsys, arguments):
    monkeypatch.setattr("benchmarks.__main__.speed", pytest.fail)
    monkeypatch.setattr(radius, "contest", pytest.fail)
    monkeypatch.setattr(overhead, "contest", pytest.fail)
    monkeypatch.setattr("sys.argv", ["benchmarks", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert "chosen" in capsys.readouterr().err


def test_every_norm_has_ours_and_a_peer_and_mnist_is_replaced_where_missing(monkeypatch):
    for norm in strength.NORMS:
        names = list(strength.entries(norm))
        assert names[0] == "pdpgd"
        assert any(name.startswith("peers.") for name in names)
    found = [row for row in data.found() if row.name == "digits"]
    monkeypatch.setattr(strength.data, "found", lambda: found)
    assert [one.name for one in strength.networks()] == [
        "digits/mlp-24",
        "digits/cnn",
        "digits/cnn-at",
    ]


def test_make_bench_shows_what_is_stored_and_runs_nothing_unasked(raced, monkeypatch, capsys):
    _, _, folder = raced
    file = path(NETWORK.name, folder)
    before = file.read_bytes()
    monkeypatch.setattr(
        strength, "networks", lambda: [Network(NETWORK.name, 6), Network("digits/cnn", 5)]
    )
    monkeypatch.setattr(strength, "path", lambda name: path(name, folder))
    monkeypatch.setattr(strength, "contest", pytest.fail)
    monkeypatch.setattr("sys.argv", ["benchmarks", "strength"])
    main()
    told = capsys.readouterr().out
    assert "digits/mlp-24, 6 images of digits" in told
    assert "peers.ddn" in told
    assert "digits/cnn: nothing stored yet" in told
    assert file.read_bytes() == before
    given = []
    monkeypatch.setattr(strength, "contest", lambda one, **_: given.append(one) or raced[0])
    monkeypatch.setattr("sys.argv", ["benchmarks", "strength", "--store", "--only=digits/mlp-24"])
    main()
    assert [one.name for one in given] == [NETWORK.name]


def test_at_one_radius_what_is_left_is_what_attacks_leave(tmp_path, monkeypatch, capsys):
    network, lines = Network("digits/cnn-at", 12), []
    chosen = {"results": tmp_path, "show": lines.append, "budgets": (20,)}
    attacks = ("pgd.margin", "pdpgd", "peers.fab")
    content = radius.contest(network, attacks=attacks, **chosen)
    rows = {row["attack"]: row for row in content["rows"]}
    assert tuple(rows) == attacks
    model, test = zoo.load("digits/cnn-at"), data.load("digits").test
    x, y = test.x[content["images"]], test.y[content["images"]]
    norms = minimal_norms(model, x, y, pdpgd, norm="linf", steps=20)
    assert rows["pdpgd"]["left"] == (norms > 0.2).tolist()
    points = pgd(model, x, y, eps=0.2, steps=20, loss="margin")
    assert rows["pgd.margin"]["left"] == (model(points).argmax(1) == y).tolist()
    assert rows["pgd.margin"]["backward"] == rows["pdpgd"]["backward"] == 20
    assert radius.table(content).loc["pdpgd", 20] == sum(rows["pdpgd"]["left"])
    radius.contest(network, attacks=("pdpgd",), **chosen)
    assert len(lines) == 3, "nothing again"
    file = radius.path(results=tmp_path)
    monkeypatch.setattr(radius, "path", lambda: file)
    monkeypatch.setattr(radius, "contest", pytest.fail)
    monkeypatch.setattr("sys.argv", ["benchmarks", "radius"])
    main()
    assert "radius 0.2" in capsys.readouterr().out
    file.unlink()
    main()
    assert "nothing stored" in capsys.readouterr().out


def test_time_between_passes_is_told_from_that_of_passes(tmp_path, monkeypatch, capsys):
    """By a clock that counts the passes through the network: an attack makes one each step."""
    network, lines = Network("digits/cnn", 30), []
    model, some, origin = strength.scene(network)
    right = model(some.x).argmax(1) == some.y

    def attack(recorded, x, y, *, norm, steps, seed):
        assert torch.equal(x, some.x[right])
        for _ in range(steps):
            recorded(0.5 * x)
            if norm == "l2":  # not told to the recorder: time between the passes
                model(x), model(x)
        return x

    entry = strength.Entry(attack, ("adv.attacks.pdpgd.pdpgd",))
    monkeypatch.setattr(overhead, "ENTRY", entry)
    monkeypatch.setattr(overhead, "scene", lambda network: (model, some, origin))
    with counting(model) as counts:
        monkeypatch.setattr(overhead, "now", lambda: counts.forward)
        content = overhead.contest(network, steps=20, results=tmp_path, show=lines.append)
    cost = overhead.table(content)
    assert cost.loc["cost"].to_dict() == {"linf": 1, "l2": 3, "l1": 1, "l0": 1}
    assert [row["points"] for row in content["rows"]] == [1] * 4
    overhead.contest(network, steps=20, results=tmp_path, show=lines.append)
    assert len(lines) == 4, "nothing again"
    file = overhead.path(network.name, tmp_path)
    monkeypatch.setattr(overhead, "network", lambda: network)
    monkeypatch.setattr(overhead, "path", lambda name: file)
    monkeypatch.setattr("sys.argv", ["benchmarks", "overhead"])
    main()
    assert "30 images, 20 passes" in capsys.readouterr().out
    file.unlink()
    main()
    assert "nothing stored" in capsys.readouterr().out
