import itertools
import math

import cvxpy as cp
import numpy as np
import pytest
import torch
from helpers import WIDE, affine, inputs, lengths
from torch import nn
from torch.func import functional_call

from adv.attacks.common import GradientMaskingWarning
from adv.attacks.confidence import confidence_step, high_confidence, nearest_class, unrolled

NORMS = ["l2", "linf", "l1", 3.0]


def log_p(model, x, target):
    return model(x).log_softmax(1).gather(1, target[:, None]).squeeze(1)


def smooth_net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)).double()


# one step


@pytest.mark.parametrize("norm", NORMS)
def test_step_is_the_convex_program(norm):
    torch.manual_seed(1)
    w, start = torch.randn(3, 5).double(), torch.tensor([-9.0, -2.0, -0.4]).double()
    goal = torch.tensor([-0.1, -0.05, -0.01]).double()
    r = confidence_step(start, w, goal, norm)
    p = {"l2": 2, "linf": "inf", "l1": 1}.get(norm, norm)
    for i in range(3):
        z = cp.Variable(5)
        problem = cp.Problem(
            cp.Minimize(cp.norm(z, p)), [w[i].numpy() @ z >= float(goal[i] - start[i])]
        )
        assert lengths(r[i : i + 1], norm)[0] == pytest.approx(problem.solve(), rel=1e-5)
        assert float(w[i] @ r[i]) == pytest.approx(float(goal[i] - start[i]), rel=1e-12)


def test_step_is_limited_leads_back_and_is_zero_without_gradient():
    w = torch.tensor([[3.0, 4.0], [3.0, 4.0], [0.0, 0.0]])
    r = confidence_step(torch.tensor([-5.0, 0.0, -5.0]), w, torch.tensor([0.0, -5.0, 0.0]))
    assert torch.allclose(r, torch.tensor([[0.6, 0.8], [-0.6, -0.8], [0.0, 0.0]]))
    r = confidence_step(torch.tensor([-5.0]), w[:1], torch.tensor([0.0]), max_step=0.5)
    assert torch.allclose(r, torch.tensor([[0.3, 0.4]]))
    r = confidence_step(torch.tensor([0.0]), w[:1], torch.tensor([-5.0]), max_step=0.5)
    assert torch.allclose(r, torch.tensor([[-0.3, -0.4]])), "steps back are limited, too"


# the attack


def test_affine_logits_are_approached_from_below():
    model, x = affine(5, 12).double(), inputs(30, 12).double()
    target = (model(x).argmax(1) + 1) % 5
    z, goal = x.clone(), torch.full((30,), math.log(0.95)).double()
    before = log_p(model, z, target)
    for _ in range(6):
        zg = z.detach().requires_grad_()
        value = log_p(model, zg, target)
        (w,) = torch.autograd.grad(value.sum(), zg)
        z = z + confidence_step(value.detach(), w, goal)
        now = log_p(model, z, target)
        assert (now <= goal + 1e-12).all()
        assert (now > before - 1e-12).all()
        before = now


@pytest.mark.parametrize(("norm", "slack"), [("l2", 0.05), ("linf", 0.2)])
def test_length_is_near_the_convex_optimum(norm, slack):
    model, x = affine(4, 8).double(), inputs(6, 8).double()
    target = (model(x).argmax(1) + 2) % 4
    x_adv = high_confidence(
        model, x, target, confidence=0.9, norm=norm, targeted=True, bounds=WIDE, overshoot=0.01
    )
    weight, bias = model.weight.detach().numpy(), model.bias.detach().numpy()
    for i in range(6):
        z, t = cp.Variable(8), int(target[i])
        logits = weight @ (x[i].numpy() + z) + bias
        sure = cp.log_sum_exp(logits) - logits[t] <= -math.log(0.9)
        best = cp.Problem(cp.Minimize(cp.norm(z, {"l2": 2, "linf": "inf"}[norm])), [sure]).solve(
            solver=cp.CLARABEL
        )
        found = lengths(x_adv[i : i + 1] - x[i : i + 1], norm)[0]
        assert best * (1 - 1e-6) <= found <= best * (1 + slack)


def test_confidence_is_reached_or_x_comes_back():
    model, x = smooth_net(), torch.rand(40, 6).double()
    y = model(x).argmax(1)
    goal = torch.linspace(0.3, 0.97, 40).double()
    target = nearest_class(model, x, y)
    x_adv = high_confidence(model, x, y, confidence=goal)
    p = log_p(model, x_adv, target).exp()
    moved = (x_adv != x).any(1)
    assert moved.any()
    assert not moved.all(), "some confidences are out of reach in the box"
    assert (p[moved] >= goal[moved] * (1 - 2e-6)).all()
    assert (model(x_adv)[moved].argmax(1) == target[moved]).all()
    assert 0 <= x_adv.min() <= x_adv.max() <= 1


def test_with_an_overshoot_the_iterates_themselves_do_not_count():
    """A region that the first step enters and the overshoot crosses."""

    def model(x):
        logit = torch.where((x - 0.265).abs() < 0.05, 9.0, 10 * x - 2.0)[:, 0]
        return torch.stack([torch.zeros_like(logit), torch.where(x[:, 0] > 0.315, -9.0, logit)], 1)

    x, target = torch.tensor([[0.1]]).double(), torch.tensor([1])
    given = {"confidence": 0.9, "targeted": True, "steps": 1}
    near = high_confidence(model, x, target, overshoot=0.0, **given)
    assert 0.215 < near.item() < 0.315
    assert torch.equal(high_confidence(model, x, target, overshoot=0.5, **given), x)


def test_own_confidence_and_points_that_have_it_already():
    model, x = smooth_net(), torch.rand(20, 6).double()
    said = model(x).argmax(1)
    assert torch.equal(high_confidence(model, x, said, confidence=None, targeted=True), x)
    wrong = (said + 1) % 4
    assert torch.equal(high_confidence(model, x, wrong, confidence=0.1), x), "wrong already"
    x_adv = high_confidence(model, x, said, confidence=None, bounds=(-9.0, 9.0))
    moved = (x_adv != x).any(1)
    before, after = (model(z).softmax(1).amax(1)[moved] for z in (x, x_adv))
    assert moved.any()
    assert (after >= before * (1 - 2e-6)).all()


def test_max_step_limits_each_step():
    model, x = smooth_net(), torch.rand(10, 6).double()
    y, seen = model(x).argmax(1), []
    high_confidence(
        model, x, y, max_step=0.1, steps=12, observe=lambda step, state: seen.append(state["x_adv"])
    )
    moves = torch.stack([(b - a).norm(dim=1).amax() for a, b in itertools.pairwise(seen)])
    assert 0.09 < moves.max() <= 0.1 + 1e-9


def test_vanishing_gradients_are_told():
    class Flat(nn.Module):
        def forward(self, x):
            return torch.stack([x.sum(1) * 0 + 1, x.sum(1) * 0], 1)

    x = torch.rand(4, 6)
    with pytest.warns(GradientMaskingWarning, match="4 of 4"):
        x_adv = high_confidence(Flat(), x, torch.zeros(4).long())
    assert torch.equal(x_adv, x)
    assert nearest_class(Flat(), x, torch.zeros(4).long()).tolist() == [1] * 4


@pytest.mark.parametrize("norm", ["l2", "linf", "l1", 3.0])
def test_nearest_class_by_loops(norm):
    model, x = smooth_net(), torch.rand(15, 6).double()
    y = model(x).argmax(1)
    q = {"l2": 2, "linf": 1, "l1": np.inf, 3.0: 1.5}[norm]
    for i, found in enumerate(nearest_class(model, x, y, norm)):
        z = x[i].clone().requires_grad_()
        f, distance = model(z), {}
        for j in set(range(4)) - {int(y[i])}:
            gap = f[j] - f[y[i]]
            (g,) = torch.autograd.grad(gap, z, retain_graph=True)
            distance[j] = abs(gap.item()) / np.linalg.norm(g.numpy(), q)
        assert int(found) == min(distance, key=distance.get)


# unrolled


def by_loops(model, x, target, c, steps, overshoot):
    """The sum of products of indicators, term by term."""
    delta, indicators, terms = torch.zeros_like(x), [], []
    for _ in range(steps):
        z = (x + delta).requires_grad_()
        value = log_p(model, z, target)
        (w,) = torch.autograd.grad(value.sum(), z)
        indicators.append((value.exp() < c).double().detach())
        terms.append(((math.log(c) - value) / w.square().sum(1))[:, None].detach() * w)
        delta = delta + torch.stack(indicators).prod(0)[:, None] * terms[-1]
    total = sum(torch.stack(indicators[: i + 1]).prod(0)[:, None] * terms[i] for i in range(steps))
    return x + (1 + overshoot) * total


def test_loop_is_the_sum_of_products():
    model, x = smooth_net(), torch.rand(20, 6).double()
    target = (model(x).argmax(1) + 1) % 4
    ours = unrolled(model, x, target, confidence=0.5, steps=6)
    assert torch.allclose(ours, by_loops(model, x, target, 0.5, 6, 0.05), atol=1e-12)
    p = log_p(model, x + (ours - x) / 1.05, target).exp()
    assert (p >= 0.5).any(), "some stop before the last step"


def value_of(model, settings, x, target, weights):
    """A number that depends on the weights through the attack alone."""
    moved = unrolled(lambda z: functional_call(model, weights, (z,)), x, target, **settings)
    return (moved * torch.linspace(-1, 1, x.numel()).view_as(x).double()).sum()


@pytest.mark.parametrize(
    ("stop", "confidence"), [("smooth", 0.6), ("hard", 0.6), ("straight-through", 1.0)]
)
@pytest.mark.parametrize("norm", ["l2", "linf", 3.0])
def test_gradient_is_that_of_finite_differences(stop, confidence, norm):
    model, x = smooth_net(), torch.rand(8, 6).double()
    target = (model(x).argmax(1) + 1) % 4
    weights = {k: v.detach().clone() for k, v in model.named_parameters()}
    told = {"confidence": confidence, "steps": 2, "stop": stop, "detached": False, "norm": norm}
    direction = {k: torch.randn_like(v) for k, v in weights.items()}

    def at(t):
        return value_of(
            model, told, x, target, {k: v + t * direction[k] for k, v in weights.items()}
        )

    t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(at(t), t)
    numeric = (at(1e-6) - at(-1e-6)).detach() / 2e-6
    if stop == "straight-through":
        told["stop"] = "hard"  # every step is taken, so the rounded forward is constant
        (without,) = torch.autograd.grad(at(t), t)
        assert torch.isclose(without, numeric, rtol=1e-4)
        assert not torch.isclose(slope, without, rtol=1e-3), "the stop has a derivative of its own"
    else:
        assert torch.isclose(slope, numeric, rtol=1e-5)


def test_straight_through_differentiates_the_smooth_stop():
    model, x = smooth_net(), torch.rand(5, 6).double()
    target = (model(x).argmax(1) + 1) % 4
    weight = model[2].bias
    p = log_p(model, x, target).exp()
    z = x.clone().requires_grad_()
    value = log_p(model, z, target)
    (w,) = torch.autograd.grad(value.sum(), z, create_graph=True)
    r = confidence_step(value, w, torch.zeros(5).double())
    soft = torch.sigmoid(1 - p)
    expected = (r + (soft[:, None] - soft.detach()[:, None]) * r.detach()).sum()
    (expected,) = torch.autograd.grad(expected, weight)
    moved = unrolled(model, x, target, confidence=1.0, steps=1, overshoot=0.0)
    (ours,) = torch.autograd.grad(moved.sum(), weight)
    assert torch.allclose(ours, expected, rtol=1e-8)


def test_detached_and_full_agree_for_one_step_only():
    model, x = smooth_net(), torch.rand(5, 6).double()
    target = (model(x).argmax(1) + 1) % 4
    slopes = {}
    for steps in (1, 3):
        for detached in (True, False):
            moved = unrolled(model, x, target, steps=steps, detached=detached)
            slopes[steps, detached] = torch.autograd.grad(moved.sum(), model[0].weight)[0]
    assert torch.allclose(slopes[1, True], slopes[1, False])
    assert not torch.allclose(slopes[3, True], slopes[3, False], rtol=1e-2)


def test_unrolled_changes_nothing_and_works_without_gradients():
    model, x = nn.Sequential(nn.Linear(6, 9), nn.Dropout(), nn.Linear(9, 4)), torch.rand(5, 6)
    target = torch.tensor([0, 1, 2, 3, 0])
    model.train()
    with torch.no_grad():
        one = unrolled(model, x, target)
    assert model.training
    assert model[1].training
    assert all(p.grad is None for p in model.parameters())
    assert not x.requires_grad
    assert torch.equal(one, unrolled(model, x, target)), "dropout is switched off"
    assert one.requires_grad


def test_inference_mode_makes_no_difference():
    model, x = smooth_net(), torch.rand(9, 6).double()
    y, sure = model(x).argmax(1), torch.full((9,), 0.9, dtype=torch.float64)
    calls = (high_confidence, nearest_class, unrolled)
    for call, labels, settings in zip(
        calls, (y, y, (y + 1) % 4), ({}, {}, {"confidence": sure}), strict=True
    ):
        expected = call(model, x, labels, **settings)
        with torch.inference_mode():
            found = call(model, x * 1, labels * 1, **{k: v * 1 for k, v in settings.items()})
        assert torch.equal(found, expected)
        assert found.requires_grad == expected.requires_grad


@pytest.mark.parametrize("call", [nearest_class, unrolled])
@pytest.mark.parametrize(
    ("x", "y", "classes", "says"),
    [
        (torch.rand(2, 6), [0, 4], 4, r"0\.\.3, .* 0\.\.4"),
        (torch.rand(2, 6), [-1, 0], 4, r"0\.\.3, .* -1\.\.0"),
        (torch.rand(2, 6) * math.nan, [0, 1], 4, "NaN"),
        (torch.rand(0, 6), [], 4, "samples"),
        (torch.rand(2, 6), [0, 0], 1, "two classes"),
    ],
)
def test_what_makes_no_sense_is_refused(call, x, y, classes, says):
    with pytest.raises(ValueError, match=says):
        call(nn.Linear(6, classes), x, torch.tensor(y, dtype=torch.int64))


BAD = [
    ({"confidence": 0.0}, ValueError),
    ({"confidence": 1.2}, ValueError),
    ({"confidence": "high"}, TypeError),
    ({"confidence": torch.full((3,), 0.9)}, ValueError),
    ({"confidence": torch.full((5,), math.nan)}, ValueError),
    ({"overshoot": -0.1}, ValueError),
    ({"steps": 0}, ValueError),
    ({"norm": "l0"}, ValueError),
]


@pytest.mark.parametrize(("settings", "error"), [*BAD, ({"max_step": 0.0}, ValueError)])
def test_attack_refuses(settings, error):
    with pytest.raises(error):
        high_confidence(smooth_net().float(), torch.rand(5, 6), torch.zeros(5).long(), **settings)


@pytest.mark.parametrize(("settings", "error"), [*BAD, ({"stop": "soft"}, ValueError)])
def test_unrolled_refuses(settings, error):
    with pytest.raises(error):
        unrolled(smooth_net().float(), torch.rand(5, 6), torch.zeros(5).long(), **settings)
