"""Attacks on codes: the linear encoder's closed form, and how all attacks behave."""

import pytest
import torch
from helpers import WIDE, affine, inputs
from torch import nn

from adv.attacks.common import GradientMaskingWarning
from adv.attacks.representation import match
from adv.geometry import norm as length
from adv.lab import data, zoo
from adv.theory.sensing import linear_attack


def gap(encoder, x, code):
    with torch.no_grad():
        return (encoder(x) - code).flatten(1).norm(dim=1)


@pytest.fixture(scope="module")
def digits():
    model = zoo.load("digits/autoencoder")
    return model.encoder, data.load("digits").test.x[:12]


def test_a_linear_encoder_is_attacked_as_well_as_in_closed_form():
    encoder, x, target = affine(6, 15), inputs(4, 15), inputs(4, 15, seed=5)
    for eps in (0.3, 1.0, 4.0):
        best = linear_attack(encoder.weight, x, target, eps=eps).delta
        x_adv = match(encoder, x, encoder(target), eps=eps, steps=300, bounds=WIDE)
        reached, least = (gap(encoder, z, encoder(target)) for z in (x_adv, x + best))
        start = gap(encoder, x, encoder(target))
        assert (reached >= least - 1e-9).all()
        assert (reached - least <= 0.01 * start).all()
        assert (length(x_adv - x, "l2") <= eps + 1e-9).all()


def test_linf_reaches_the_optimum_of_a_projection():
    """The code is the input: each value goes as far towards the target as it may."""
    x, target = inputs(3, 8), inputs(3, 8, seed=2)
    x_adv = match(nn.Identity(), x, target, eps=0.2, norm="linf", steps=400, step_size=0.002)
    ideal = x + (target - x).clamp(-0.2, 0.2)
    assert (gap(nn.Identity(), x_adv, target) - gap(nn.Identity(), ideal, target)).max() < 0.01


def test_codes_of_digits_are_matched_inside_the_budget(digits):
    encoder, x = digits
    with torch.no_grad():
        code = encoder(x.flip(0))
    x_adv = match(encoder, x, code, eps=1.5, steps=60)
    assert (length(x_adv - x, "l2") <= 1.5 + 1e-5).all()
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    assert (gap(encoder, x_adv, code) < 0.5 * gap(encoder, x, code)).all()


def test_more_restarts_are_never_worse_and_nothing_is_random(digits):
    encoder, x = digits
    code = encoder(x.flip(0)).detach()
    runs = [match(encoder, x, code, eps=0.8, steps=15, restarts=n) for n in (1, 3, 3)]
    assert (gap(encoder, runs[1], code) <= gap(encoder, runs[0], code) + 1e-6).all()
    assert torch.equal(runs[1], runs[2])
    assert not torch.equal(runs[0], match(encoder, x, code, eps=0.8, steps=15, seed=1))


def test_what_is_kept_is_the_best_point_seen(digits):
    encoder, x = digits
    seen = []
    code = encoder(x.flip(0)).detach()
    x_adv = match(
        encoder, x, code, eps=0.8, steps=9, step_size=0.8, observe=lambda _, s: seen.append(s)
    )
    assert [s["restart"] for s in seen] == [0] * 9
    assert torch.allclose(seen[3]["distance"], gap(encoder, seen[3]["x_adv"], code), atol=1e-5)
    least = torch.stack([s["distance"] for s in seen]).amin(dim=0)
    assert (gap(encoder, x_adv, code) <= least + 1e-5).all()


def test_the_point_after_the_last_step_counts():
    x, target = inputs(3, 8), inputs(3, 8, seed=2)
    given = {"eps": 0.2, "steps": 1, "step_size": 0.2, "random_start": False}
    x_adv = match(nn.Identity(), x, target, **given)
    way = target - x
    assert torch.allclose(x_adv, x + 0.2 * way / way.norm(dim=1, keepdim=True), atol=1e-12)


def test_an_encoder_in_training_mode_is_used_in_evaluation_mode():
    encoder, x, target = affine(6, 15), inputs(4, 15), inputs(4, 15, seed=5)
    code, noisy = encoder(target), nn.Sequential(nn.Dropout(), encoder).train()
    given = {"eps": 0.3, "steps": 5, "bounds": WIDE}
    assert torch.equal(match(noisy, x, code, **given), match(encoder, x, code, **given))
    assert all(part.training for part in (noisy, noisy[0]))


def test_no_budget_and_no_distance(digits):
    encoder, x = digits
    code = encoder(x).detach()
    assert torch.equal(match(encoder, x, code[:1].expand_as(code), eps=0.0, steps=2), x)
    same = match(encoder, x, code, eps=0.5, steps=3, random_start=False)
    assert torch.equal(same, x)


def test_a_dead_encoder_is_reported():
    x = inputs(3, 4)
    with pytest.warns(GradientMaskingWarning, match="3 of 3"):
        match(lambda z: z.round() * 0 + 0 * z, x, x, eps=0.1, steps=2)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"norm": "l1"}, "'linf' or 'l2'"),
        ({"norm": 3.0}, "'linf' or 'l2'"),
        ({"eps": -1.0}, "eps"),
        ({"steps": 0}, "steps"),
        ({"restarts": 2, "random_start": False}, "restarts"),
        ({"step_size": -0.1}, "step_size"),
        ({"bounds": (0.2, 0.3)}, "bounds"),
    ],
)
def test_bad_settings(settings, says):
    x = inputs(2, 5)
    with pytest.raises(ValueError, match=says):
        match(nn.Identity(), x, x, **{"eps": 0.1, **settings})


def test_bad_codes():
    x = inputs(2, 5)
    encoder = affine(3, 5)
    for code in (x, x[:1, :3], torch.full((2, 3), torch.nan, dtype=x.dtype)):
        with pytest.raises(ValueError, match="y is"):
            match(encoder, x, code, eps=0.1)
    with pytest.raises(TypeError, match="y is"):
        match(encoder, x, torch.zeros(2, 3, dtype=torch.int64), eps=0.1)
