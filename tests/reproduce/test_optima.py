"""Stored optima: they are resumed, belong to the zoo's network, and can be proved again."""

import math

import pytest

from adv.lab import data, zoo
from adv.theory.exact import minimal_perturbation
from reproduce import optima
from reproduce.files import read, write_json

NAME = "digits/mlp-24"


@pytest.fixture
def counted(monkeypatch):
    """The inputs' labels for which something was proved."""
    calls, prove = [], optima.minimal_perturbation

    def counting(model, x, y, **settings):
        calls.append((settings["norm"], y))
        return prove(model, x, y, **settings)

    monkeypatch.setattr(optima, "minimal_perturbation", counting)
    return calls


def test_rows_are_kept_until_something_changes(tmp_path, counted):
    test = data.load("digits").test
    settings = {"norms": ("l0",), "results": tmp_path}
    first = optima.solve(NAME, 2, **settings)
    assert counted == [("l0", int(y)) for y in test.y[:2]]
    assert [row["index"] for row in first["norms"]["l0"]] == [0, 1]
    assert read(optima.path(NAME, tmp_path)) == first
    assert optima.solve(NAME, 2, **settings) == first
    assert len(counted) == 2
    more = optima.solve(NAME, 3, **settings)
    assert more["norms"]["l0"][:2] == first["norms"]["l0"]
    assert len(counted) == 3
    write_json(optima.path(NAME, tmp_path), more | {"code": {}})
    optima.solve(NAME, 3, trust=True, **settings)
    assert len(counted) == 3
    optima.solve(NAME, 4, trust=True, **settings)  # a new row among old ones
    assert len(counted) == 4
    optima.solve(NAME, 1, **settings)  # the code is another: from the start
    assert len(counted) == 5
    write_json(optima.path(NAME, tmp_path), more | {"weights": "others"})
    optima.solve(NAME, 1, trust=True, **settings)
    assert len(counted) == 6


def test_two_processes_that_solve_other_norms_keep_each_other_s_rows(tmp_path, monkeypatch):
    prove, others = optima.minimal_perturbation, [("l2",), ("linf",)]

    def meanwhile(*arguments, **settings):
        if others:  # each started before the one around it has stored anything
            optima.solve(NAME, 1, norms=others.pop(), results=tmp_path)
        return prove(*arguments, **settings)

    monkeypatch.setattr(optima, "minimal_perturbation", meanwhile)
    optima.solve(NAME, 1, norms=("l0",), results=tmp_path)
    stored = read(optima.path(NAME, tmp_path))["norms"]
    assert {norm: len(rows) for norm, rows in stored.items()} == {"l0": 1, "linf": 1, "l2": 1}


def test_an_unknown_norm_or_network_is_told_before_anything_is_proved(counted):
    for arguments in ([NAME, "--norms=linf,l7"], ["digits/none"]):
        with pytest.raises(
            SystemExit, match=r"^reproduce\.optima: no n(orm l7|etwork 'digits/none')"
        ):
            optima.main(arguments)
    assert not counted


def test_the_stored_optima_are_of_this_network_and_hold():
    stored = read(optima.path(NAME))
    assert stored["weights"] == zoo.entry(NAME).record["sha256"]
    model, test = zoo.load(NAME), data.load(stored["data"]).test
    assert set(stored["norms"]) == {"linf", "l2", "l1", "l0"}
    for rows in stored["norms"].values():
        assert len(rows) >= 25
        for index, row in enumerate(rows):
            assert (row["index"], row["label"]) == (index, int(test.y[index]))
            assert 0 <= row["lower"] <= row["upper"]
            assert row["optimal"] == (
                row["lower"] >= row["upper"] * (1 - stored["settings"]["gap"])
            )
    for norm, index in (("linf", 2), ("l0", 1)):
        row = stored["norms"][norm][index]
        again = minimal_perturbation(model, test.x[index], int(test.y[index]), norm=norm)
        assert again.upper == pytest.approx(row["upper"], rel=2e-4)


def test_optima_of_one_image_respect_the_order_of_norms():
    """linf <= l2 <= l1 <= l0, all of them times what the others' proofs leave open."""
    norms = read(optima.path(NAME))["norms"]
    for linf, l2, l1, l0 in zip(*(norms[k] for k in ("linf", "l2", "l1", "l0")), strict=True):
        for small, large in ((linf, l2), (l2, l1), (l1, l0)):
            assert small["lower"] <= large["upper"]
        assert l2["lower"] <= math.sqrt(64) * linf["upper"]
        assert l1["lower"] <= math.sqrt(64) * l2["upper"]
