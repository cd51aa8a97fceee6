import math

import cvxpy as cp
import numpy as np
import pytest
import torch
from helpers import WIDE, affine, inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from adv.attacks.boundary import deepfool
from adv.attacks.common import GradientMaskingWarning, input_gradient, margin
from adv.attacks.convex import (
    ensemble,
    gnm,
    margin_radius,
    margin_step,
    successive_linearization,
)
from adv.attacks.gradient import fgsm, pgd
from adv.geometry import dual_norm
from adv.geometry import norm as length

NORMS = [1.0, 1.25, 1.5, 2.0, 3.0, 10.0, math.inf]


# the two programs, against a conic solver


@pytest.mark.parametrize("p", NORMS)
def test_a_step_solves_the_norm_constrained_program(p):
    model, x, eps = affine(2, 12), inputs(3, 12), 0.7
    y = model(x).argmax(dim=1)
    x_adv = gnm(model, x, y, eps=eps, norm=p, bounds=WIDE)
    w = (model.weight[0] - model.weight[1]).numpy()
    for i in range(3):
        g = w if y[i] == 0 else -w
        delta = cp.Variable(12)
        gain = cp.Problem(cp.Minimize(g @ delta), [cp.norm(delta, p) <= eps]).solve("CLARABEL")
        drop = margin(model(x_adv), y)[i] - margin(model(x), y)[i]
        assert abs(gain - drop.item()) < 1e-6


@pytest.mark.parametrize("p", NORMS)
def test_margin_step_is_the_smallest(p):
    g = torch.randn(4, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    g[:, 3] = 0
    value = torch.tensor([1.3, 0.2, 0.0, -0.4], dtype=torch.float64)
    step = margin_step(value, g, p)
    assert torch.allclose((value + (g * step).sum(1))[:2], torch.zeros(2).double(), atol=1e-12)
    assert torch.equal(step[2:], torch.zeros_like(step[2:]))
    for i in range(2):
        delta = cp.Variable(12)
        rule = [value[i].item() + g[i].numpy() @ delta <= 0]
        least = cp.Problem(cp.Minimize(cp.norm(delta, p)), rule).solve("CLARABEL")
        assert abs(least - length(step, p)[i].item()) < 1e-6


def test_the_printed_exponent_misses_the_boundary():
    g = torch.tensor([[3.0, 1.0, -1.29]], dtype=torch.float64)
    value, size = torch.tensor([1.3], dtype=torch.float64), dual_norm(g, "l2")
    printed = -(value / size) * g
    assert (value + (g * printed).sum()).item() == pytest.approx((value * (1 - size)).item())
    assert length(printed, "l2") / length(margin_step(value, g, "l2"), "l2") == pytest.approx(
        size.item()
    )


def test_a_zero_gradient_gives_a_zero_step():
    step = margin_step(torch.ones(2), torch.zeros(2, 1, 3, 3), "l2")
    assert torch.equal(step, torch.zeros(2, 1, 3, 3))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["linf", "l2", "l1"]), st.floats(0, 6))
def test_a_step_within_the_box_is_the_best_one(seed, norm, eps):
    rng = np.random.default_rng(seed)
    d = int(rng.integers(1, 9))
    x = torch.tensor(np.where(rng.random((1, d)) < 0.3, 0.0, rng.random((1, d))))
    model = affine(2, d, seed)
    y = torch.tensor([seed % 2])
    x_adv = gnm(model, x, y, eps=eps, norm=norm)
    w = (model.weight[y] - model.weight[1 - y]).numpy()[0]
    delta = cp.Variable(d)
    p = {"linf": np.inf, "l2": 2, "l1": 1}[norm]
    inside = [cp.norm(delta, p) <= eps, delta >= -x[0].numpy(), delta <= 1 - x[0].numpy()]
    best = cp.Problem(cp.Minimize(w @ delta), inside).solve("CLARABEL")
    found = (w * (x_adv - x)[0].numpy()).sum()
    assert abs(found - best) < 1e-5 * (1 + abs(best))
    assert length(x_adv - x, norm).item() <= eps + 1e-9


# theorem 1 and the radius of a margin


@pytest.mark.parametrize("p", NORMS)
def test_below_the_radius_the_program_has_no_solution(p):
    model, x = affine(2, 12), inputs(5, 12)
    y = model(x).argmax(dim=1)
    radius = margin_radius(model, x, y, norm=p)
    for scale, sign in ((1 - 1e-9, 1), (1 + 1e-9, -1)):
        worst = torch.cat(
            [
                gnm(model, x[i : i + 1], y[i : i + 1], eps=scale * r, norm=p, bounds=WIDE)
                for i, r in enumerate(radius.tolist())
            ]
        )
        assert bool((sign * margin(model(worst), y) > 0).all())


def test_the_runner_up_need_not_be_nearest():
    weight = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, -10.0]], dtype=torch.float64)
    model = affine(3, 2, weight=weight, bias=torch.tensor([1.0, 0.0, -0.1]))
    x, y = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([0])
    assert margin_radius(model, x, y, norm="l2").item() == pytest.approx(1.0)
    assert margin_radius(model, x, y, norm="l2", nearest=True).item() == pytest.approx(0.11)


@pytest.mark.parametrize("norm", ["linf", "l2", 3.0])
def test_the_nearest_radius_is_the_distance_of_an_affine_model(norm):
    model, x = affine(7, 15, seed=3), inputs(30, 15)
    y = model(x).argmax(dim=1)
    radius = margin_radius(model, x, y, norm=norm, nearest=True)
    x_adv = deepfool(model, x, y, norm=norm, overshoot=0.0, bounds=WIDE)
    assert torch.allclose(radius, length(x_adv - x, norm), atol=1e-4)
    assert bool((margin_radius(model, x, y, norm=norm) >= radius - 1e-12).all())


def test_radii_by_hand_on_a_network(digits):
    model, x, _ = digits
    y = model(x).argmax(dim=1)
    value, gradient = input_gradient(lambda z: margin(model(z), y), x)
    by_hand = value / gradient.flatten(1).abs().sum(1)
    assert torch.allclose(margin_radius(model, x, y, norm="linf"), by_hand, rtol=1e-5)
    per_class = []
    for j in range(10):
        value, gradient = input_gradient(
            lambda z, j=j: (model(z).gather(1, y[:, None]) - model(z)[:, j : j + 1]).squeeze(1), x
        )
        radius = value / gradient.flatten(1).norm(dim=1)
        per_class.append(torch.where(y == j, math.inf, radius))
    by_hand = torch.stack(per_class).amin(dim=0)
    nearest = margin_radius(model, x, y, norm="l2", nearest=True)
    assert torch.allclose(nearest, by_hand, rtol=1e-4)


def test_a_wrong_label_has_a_negative_radius_and_a_flat_model_an_infinite_one():
    model, x = affine(3, 4), inputs(6, 4)
    wrong = model(x).argmin(dim=1)
    assert bool((margin_radius(model, x, wrong) < 0).all())
    flat = affine(3, 4, weight=torch.zeros(3, 4), bias=torch.tensor([1.0, 0.0, 0.0]))
    y = torch.zeros(6, dtype=torch.int64)
    assert bool(margin_radius(flat, x, y).isinf().all())
    assert bool(margin_radius(flat, x, y, nearest=True).isinf().all())


@pytest.mark.parametrize("nearest", [False, True])
def test_a_radius_is_that_of_the_model_in_evaluation_mode(nearest):
    net, x = affine(3, 8), inputs(6, 8)
    y = net(x).argmax(dim=1)
    model = nn.Sequential(nn.Dropout(), net).train()
    radius = margin_radius(model, x, y, nearest=nearest)
    assert torch.equal(radius, margin_radius(net, x, y, nearest=nearest))
    assert all(part.training for part in (model, model[0]))


@pytest.mark.parametrize("nearest", [False, True])
@pytest.mark.parametrize(
    ("x", "y", "error", "says"),
    [
        (inputs(2, 4) + 1, [0, 1], ValueError, "bounds"),
        (inputs(2, 4) * math.nan, [0, 1], ValueError, "NaN"),
        (inputs(2, 4), [0, 3], ValueError, r"0\.\.2"),
        (inputs(2, 4), [0, 1, 2], ValueError, "label for each"),
        (inputs(2, 4), [0.0, 1.0], TypeError, "int64"),
    ],
)
def test_a_radius_of_bad_input_is_refused(nearest, x, y, error, says):
    with pytest.raises(error, match=says):
        margin_radius(affine(3, 4), x, torch.tensor(y), nearest=nearest)


# known attacks are settings of one


@pytest.mark.parametrize("norm", ["linf", 3.0])
def test_one_step_on_the_cross_entropy_is_fgsm(norm, digits):
    model, x, y = digits
    ours = gnm(model, x, y, eps=0.1, norm=norm, loss="ce")
    assert torch.equal(ours, fgsm(model, x, y, eps=0.1, norm=norm))


def test_bim_with_the_step_eps_over_t(digits):
    model, x, y = digits
    x_adv = x.clone()
    for _ in range(10):
        _, g = input_gradient(
            lambda z: nn.functional.cross_entropy(model(z), y, reduction="none"), x_adv
        )
        x_adv = (x_adv + 0.1 / 10 * g.sign()).clamp(0, 1)
        x_adv = x + (x_adv - x).clamp(-0.1, 0.1)
    ours = gnm(model, x, y, eps=0.1, steps=10, loss="ce")
    assert torch.allclose(ours, x_adv, atol=1e-6)
    steps = []
    pgd(
        model,
        x,
        y,
        eps=0.1,
        steps=10,
        step_size=0.01,
        random_start=False,
        observe=lambda _, s: steps.append(s["x_adv"]),
    )
    ours = gnm(model, x, y, eps=0.09, steps=9, loss="ce")
    assert torch.allclose(ours, steps[-1], atol=1e-6)


def test_the_score_of_softmax_outputs_is_fgsm_with_the_predicted_label(digits):
    model = digits[0].double()
    x = digits[1].double()
    y = model(x).argmax(dim=1)
    probabilities = nn.Sequential(model, nn.Softmax(dim=1))
    ours = gnm(probabilities, x, y, eps=0.1, loss="score")
    assert torch.equal(ours, fgsm(model, x, y, eps=0.1))
    logits = gnm(model, x, y, eps=0.1, loss="score")
    digits[0].float()
    assert not torch.equal(logits, ours)


def test_the_targeted_attack_goes_to_the_target(digits):
    model, x, y = digits
    target = (y + 1) % 10
    before = margin(model(x), target)
    x_adv = gnm(model, x, target, eps=0.3, steps=10, targeted=True)
    after = margin(model(x_adv), target)
    assert bool((after > before).all())
    assert (after > 0).float().mean() > 0.5


def test_more_steps_fool_more(digits):
    model, x, y = digits
    fooled = [
        (margin(model(gnm(model, x, y, eps=0.12, steps=t)), y) < 0).float().mean() for t in (1, 10)
    ]
    assert fooled[0] > 0.3
    assert fooled[1] >= fooled[0]


# dithering


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(["linf", "l2", "l1", 1.5, 3.0]),
    st.lists(st.floats(0, 2), max_size=6),
    st.integers(0, 1000),
)
def test_the_radius_is_kept_whatever_the_dither(norm, radii, seed):
    model = nn.Sequential(affine(9, 10), nn.Tanh(), affine(4, 9, seed=5))
    x, y = inputs(8, 10), torch.arange(8) % 4
    x_adv = gnm(model, x, y, eps=0.4, norm=norm, steps=6, dither=radii, seed=seed, bounds=WIDE)
    assert bool((length(x_adv - x, norm) <= 0.4 * (1 + 1e-12)).all())


def test_the_dither_moves_the_expansion_point_only():
    model, x, y = affine(3, 6), inputs(4, 6), torch.arange(4) % 3
    seen = []
    args = {"eps": 0.2, "steps": 3, "norm": "l2"}
    x_adv = gnm(
        model, x, y, dither=(0.1, 0.05), seed=3, observe=lambda _, s: seen.append(s), **args
    )
    away = [length(s["point"] - s["x_adv"], "l2") for s in seen]
    assert bool((away[0] <= 0.1 + 1e-12).all())
    assert bool((away[0] > 0).all())
    assert bool((away[1] <= 0.05 + 1e-12).all())
    assert torch.equal(seen[2]["point"], seen[2]["x_adv"])
    assert torch.equal(seen[0]["x_adv"], x)
    # an affine model with two classes has one gradient everywhere
    model, y = affine(2, 6), torch.arange(4) % 2
    plain = gnm(model, x, y, **args)
    assert torch.equal(gnm(model, x, y, dither=0.3, **args), plain)
    assert x_adv.shape == plain.shape


def test_the_model_is_asked_inside_the_bounds_only():
    net, asked = affine(3, 6), []
    x, y = inputs(8, 6).round(), torch.arange(8) % 3  # at corners an offset leaves the box

    def model(z):
        asked.append(z.detach())
        return net(z)

    gnm(model, x, y, eps=0.2, steps=2, dither=(0.5, 0.3), bounds=(0.0, 1.0))
    dithered = torch.cat(asked[1:])  # the first is a look at the first sample
    assert 0 <= dithered.min() <= dithered.max() <= 1
    assert bool(((dithered > 0) & (dithered < 1)).any())


def test_a_number_dithers_the_first_step_only():
    model, x, y = affine(3, 6), inputs(4, 6), torch.arange(4) % 3
    seen = []
    gnm(model, x, y, eps=0.2, steps=2, dither=0.1, observe=lambda _, s: seen.append(s))
    assert not torch.equal(seen[0]["point"], seen[0]["x_adv"])
    assert torch.equal(seen[1]["point"], seen[1]["x_adv"])


# any objective, and several models


def test_any_objective_can_be_climbed():
    g = torch.tensor([[1.0, -2.0, 0.5]])
    x = torch.full((1, 3), 0.5)
    x_adv = successive_linearization(lambda z: (z * g).sum(1), x, eps=0.2, norm="l2", steps=4)
    assert torch.allclose(x_adv - x, 0.2 * g / g.norm(), atol=1e-6)
    with pytest.raises(ValueError, match="one value for each sample"):
        successive_linearization(lambda z: z, x, eps=0.2)
    with pytest.raises(ValueError, match="outside the bounds"):
        successive_linearization(lambda z: z.sum(1), x + 1, eps=0.2)
    for wrong in ({"eps": -1.0}, {"eps": 0.1, "steps": 0}, {"eps": 0.1, "norm": 0.5}):
        with pytest.raises(ValueError, match=r"number|integer"):
            successive_linearization(lambda z: z.sum(1), x, **wrong)


def test_networks_in_an_objective_run_in_evaluation_mode():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5))
    net, x = nn.Sequential(*net, nn.Linear(8, 1)).train(), torch.rand(6, 4)
    mean = net[1].running_mean.clone()
    first = successive_linearization(lambda z: net(z).squeeze(1), x, eps=0.1, steps=3)
    assert torch.equal(net[1].running_mean, mean)
    assert net.training
    net.eval()
    again = successive_linearization(lambda z: net(z).squeeze(1), x, eps=0.1, steps=3)
    assert torch.equal(again, first)


def test_a_vanishing_gradient_is_reported():
    with pytest.warns(GradientMaskingWarning, match="successive_linearization"):
        successive_linearization(lambda z: (0 * z).sum(1), torch.rand(2, 3), eps=0.1)
    model = nn.Sequential(affine(3, 4), nn.Threshold(1e9, 1.0))
    y = torch.zeros(2, dtype=torch.int64)
    with pytest.warns(GradientMaskingWarning, match="gnm"):
        gnm(model, torch.rand(2, 4).double(), y, eps=0.1)


def test_an_ensemble_averages_probabilities():
    models = [affine(4, 6, seed) for seed in range(3)]
    x = inputs(5, 6)
    both = ensemble(models, [1, 1, 2])(x).exp()  # log-probabilities already
    weighted = sum(w * m(x).softmax(1) for w, m in zip((0.25, 0.25, 0.5), models, strict=True))
    assert torch.allclose(both, weighted, atol=1e-12)
    y = torch.arange(5) % 4
    alone = gnm(ensemble(models[:1]), x, y, eps=0.1, loss="ce")
    assert torch.equal(alone, gnm(models[0], x, y, eps=0.1, loss="ce"))


def test_an_ensemble_runs_its_models_in_evaluation_mode():
    parts = [nn.BatchNorm1d(6), nn.Linear(6, 3), nn.Dropout()]
    net, x, y = nn.Sequential(*parts), torch.rand(5, 6), torch.zeros(5, dtype=torch.int64)
    before, state = [b.clone() for b in net.buffers()], torch.random.get_rng_state()
    model = ensemble([net, lambda z: z[:, :3]])
    gnm(model, x, y, eps=0.1, steps=2)
    assert torch.equal(model(x), model(x))
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(before, net.buffers(), strict=True))
    assert all(part.training for part in net.modules())


@pytest.mark.parametrize(
    ("models", "weights"),
    [
        ([], None),
        ([nn.Identity()], [0.0]),
        ([nn.Identity()], [1.0, 1.0]),
        ([nn.Identity()] * 2, [1.0, math.inf]),
        ([nn.Identity()], [math.nan]),
    ],
)
def test_bad_ensembles(models, weights):
    with pytest.raises(ValueError, match="one positive weight"):
        ensemble(models, weights)


def test_one_model_is_no_sequence_of_models():
    with pytest.raises(TypeError, match="not Linear"):
        ensemble(affine(3, 4))


@pytest.mark.parametrize("shape", [(3,), (5, 1), ()])
def test_margin_step_wants_one_margin_for_each_gradient(shape):
    with pytest.raises(ValueError, match=r"shape \(5,\)"):
        margin_step(torch.ones(shape), torch.ones(5, 2), "l2")


@pytest.mark.parametrize(
    ("wrong", "error", "says"),
    [
        ({"steps": 2, "dither": (0.1, 0.1, 0.1)}, ValueError, "3 radii for 2 steps"),
        ({"dither": -0.1}, ValueError, "dither"),
        ({"dither": ("a",)}, TypeError, "dither"),
        ({"dither": "0.1"}, TypeError, "a radius or a sequence of radii"),
        ({"dither": None}, TypeError, "a radius or a sequence of radii"),
        ({"loss": "hinge"}, ValueError, "score"),
    ],
)
def test_bad_settings(wrong, error, says):
    with pytest.raises(error, match=says):
        gnm(affine(3, 4), inputs(2, 4), torch.tensor([0, 1]), **({"eps": 0.1} | wrong))
