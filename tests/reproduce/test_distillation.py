"""Table 1 of the autoencoders' paper: its numbers, its spread, and that a stopped run goes on."""

from dataclasses import replace

import numpy as np
import pytest

from adv.theory.sensing import FourierSignals, gaussian_encoder, matched
from reproduce import distillation
from reproduce.distillation import RECIPES, Recipe, distill
from reproduce.files import read, write_json

ROWS, SHORT = 12, Recipe(steps=1, batch=4, lr=1e-12)


def test_an_encoder_that_is_not_trained_has_the_lengths_of_numpy():
    got = distill(SHORT, 3, rows=ROWS, tested=300)
    phi = gaussian_encoder(ROWS, 225, 3)
    m = matched(phi, SHORT.lam).numpy()
    psi = SHORT.scale * gaussian_encoder(ROWS, 225, 1003).numpy()
    x_s, x_t = FourierSignals(amplitudes=SHORT.amplitudes).sample(600, 3 * 10**6 + 1).chunk(2)
    x_s, x_t = x_s.numpy(), x_t.numpy()
    x_adv = x_s + (x_t - x_s) @ m
    inputs = (x_s - x_s @ m, x_t @ m, x_t - x_t @ m, x_adv - x_t, x_s - x_t)
    want = [np.linalg.norm(x @ psi.T, axis=1).mean() for x in inputs]
    assert list(got["values"].values()) == pytest.approx(want, rel=1e-3)
    assert got["constant"] == pytest.approx(
        np.linalg.norm((inputs[0] @ psi.T).mean(axis=0)), rel=1e-3
    )


def test_only_what_is_paired_can_be_learned():
    recipe = Recipe(steps=100, batch=32, lr=4e-3)
    learned, shuffled, targets = (
        distill(replace(recipe, inputs=inputs), 0, rows=30, tested=200)["error"]
        for inputs in ("pairs", "shuffled", "targets")
    )
    assert learned["adversarial"] < 0.9 < shuffled["adversarial"]
    assert targets["delta_t"] < 0.6 < learned["delta_t"]


@pytest.fixture
def computed(monkeypatch):
    """Recipes and seeds for which something was computed."""
    calls = []

    def counting(recipe, seed):
        calls.append((recipe.lam, seed))
        return {"values": {"c1": 1.0}, "error": {}}

    monkeypatch.setattr(distillation, "distill", counting)
    return calls


def test_rows_are_kept_until_recipe_or_code_change(tmp_path, monkeypatch, computed):
    file = tmp_path / "table.json"

    def main(*recipes, seeds=2):
        computed.clear()
        given = [f"--seeds={seeds}", f"--recipes={','.join(recipes)}", f"--results={file}"]
        distillation.main(given)
        return list(computed)

    lams = {name: recipe.lam for name, recipe in RECIPES.items()}
    assert main("table") == [(lams["table"], 0), (lams["table"], 1)]
    assert main("table", seeds=1) == []
    assert main("table", "strong attack", seeds=1) == [(lams["strong attack"], 0)]
    assert len(read(file)["rows"]) == 3
    monkeypatch.setitem(RECIPES, "table", replace(RECIPES["table"], lam=8.0))
    assert main("table", "strong attack", seeds=1) == [(8.0, 0)]
    assert sorted((row["recipe"], row["seed"]) for row in read(file)["rows"]) == [
        ("strong attack", 0),
        ("table", 0),
        ("table", 1),
    ]
    write_json(file, read(file) | {"code": {}})
    assert main("strong attack", seeds=1) == [(lams["strong attack"], 0)]
    assert len(read(file)["rows"]) == 1


def test_an_unknown_recipe_is_told_before_anything_is_computed(tmp_path, computed):
    with pytest.raises(SystemExit, match=r"^reproduce\.distillation: no recipe none; there are"):
        distillation.main(["--recipes=table,none", f"--results={tmp_path / 'table.json'}"])
    assert not computed


def test_rows_that_others_add_meanwhile_stay(tmp_path, monkeypatch):
    file = tmp_path / "table.json"

    def interrupted(recipe, _seed):
        if recipe == RECIPES["table"]:
            distillation.run(["strong attack"], 1, file)
        return {"values": {}, "error": {}}

    monkeypatch.setattr(distillation, "distill", interrupted)
    distillation.run(["table"], 1, file)
    assert [row["recipe"] for row in read(file)["rows"]] == ["strong attack", "table"]
