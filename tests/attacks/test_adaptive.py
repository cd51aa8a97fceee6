"""Models with a gradient of their own, and attacks on them, against closed forms."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from helpers import WIDE, affine, inputs
from torch import nn

from adv.attacks.adaptive import (
    AT_ONCE,
    backtracking,
    bpda,
    distortion_search,
    implicit,
    latent_walk,
    nes,
    nes_gradient,
    surface_search,
)
from adv.attacks.argmin import WarmStart, implicit_gradient, neumann_gradient, unroll
from adv.attacks.common import class_gradients, margin
from adv.attacks.gradient import pgd
from adv.attacks.jacobian import Jacobian, singular
from adv.attacks.regression import quadratic
from adv.lab.evaluation import accuracy


def test_for_linear_generators_every_gradient_has_a_closed_form():
    g = torch.Generator().manual_seed(1)
    W = torch.randn(7, 3, generator=g, dtype=torch.float64)
    net, x, eta = affine(4, 7, seed=2), inputs(5, 7), 0.02
    inner = lambda z, x: (z @ W.T - x).square().sum(dim=1)  # noqa: E731
    solve = lambda x: x @ torch.linalg.pinv(W).T  # noqa: E731
    readout = lambda z, x: net(z @ W.T)  # noqa: E731
    u, s, _ = torch.linalg.svd(W, full_matrices=False)
    gradient = net.weight[1] - net.weight[2]

    def slope(model):
        w = x.clone().requires_grad_()
        logits = model(w)
        assert torch.allclose(logits, net(x @ u @ u.T))
        return torch.autograd.grad((logits[:, 1] - logits[:, 2]).sum(), w)[0]

    expected = u @ (u.T @ gradient)
    found = slope(implicit(solve, inner, readout, damping=0.0, tolerance=1e-10))
    assert torch.allclose(found, expected.expand(5, -1), atol=1e-9)
    damped = slope(implicit(solve, inner, readout, damping=3.0, tolerance=1e-10))
    expected = u @ (2 * s**2 / (2 * s**2 + 3.0) * (u.T @ gradient))
    assert torch.allclose(damped, expected.expand(5, -1), atol=1e-9)
    for steps in (1, 4):
        share = 1 - (1 - 2 * eta * s**2) ** steps
        expected = (u @ (share * (u.T @ gradient))).expand(5, -1)
        for memory in ("graph", "constant"):
            model = backtracking(solve, inner, readout, steps=steps, step_size=eta, memory=memory)
            assert torch.allclose(slope(model), expected, atol=1e-12), memory
    flat = slope(bpda(lambda x: solve(x) @ W.T, net))
    assert torch.allclose(flat, gradient.expand(5, -1))


def closed_forms(device="cpu"):
    """A linear generator with its solver: every model of it, and where a Jacobian is right."""
    g = torch.Generator().manual_seed(1)
    W = torch.randn(7, 3, generator=g, dtype=torch.float64).to(device)
    net = affine(4, 7, seed=2).to(device)
    inner = lambda z, x: (z @ W.T - x).square().sum(dim=1)  # noqa: E731
    pieces = (lambda x: x @ torch.linalg.pinv(W).T, inner, lambda z, x: net(z @ W.T))
    rule = {"steps": 3, "step_size": 0.02}
    return {
        "graph": backtracking(*pieces, **rule),
        "bpda": bpda(lambda x: x @ torch.linalg.pinv(W).T @ W.T, net),
        "constant": backtracking(*pieces, **rule, memory="constant"),
        "implicit": implicit(*pieces),
        "nes": nes(net, samples=4),
    }


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["graph", "bpda", "constant", "implicit", "nes"])
def test_models_agree_on_all_devices(name):
    x, y = inputs(5, 7), torch.arange(5) % 4
    here, there = (
        pgd(closed_forms(place)[name], x.to(place), y.to(place), eps=0.1, steps=5, norm="l2")
        for place in ("cpu", "cuda")
    )
    assert there.is_cuda
    assert torch.allclose(here, there.cpu(), atol=1e-9)


@pytest.mark.cuda
def test_a_warm_solver_agrees_on_all_devices():
    x, y = inputs(5, 7), torch.arange(5) % 4

    def attacked(place):
        inner = lambda z, x: (z - x).square().sum(dim=1)  # noqa: E731
        warm = WarmStart(torch.clone, lambda z, x: z + 0.5 * (x - z), inner)
        net = affine(4, 7, seed=2).to(place)
        model = nes(lambda x: net(warm(x)), samples=6, at_once=70)
        return pgd(model, x.to(place), y.to(place), eps=0.05, steps=5)

    assert torch.allclose(attacked("cpu"), attacked("cuda").cpu(), atol=1e-9)


@pytest.mark.parametrize("name", ["graph", "bpda"])
def test_a_recorded_gradient_can_be_differentiated_again(name):
    model, x = closed_forms()[name], inputs(5, 7)
    J, rows = Jacobian(model, x), class_gradients(model, x)[1]
    assert torch.allclose(J.jvp(x), torch.einsum("bkd,bd->bk", rows, x))
    assert torch.allclose(J.columns(torch.arange(7)), rows)


@pytest.mark.parametrize("name", ["constant", "implicit", "nes"])
def test_a_pulled_gradient_refuses_to_be_differentiated_again(name):
    """It would be taken for a constant: products J u would be zero, without a word."""
    model, x = closed_forms()[name], inputs(5, 7)
    J, w = Jacobian(model, x), x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(w).square().sum(), w, create_graph=True)
    if name != "nes":
        assert torch.allclose(J.rows(torch.arange(4)), class_gradients(model, x)[1])
    for call in (
        lambda: J.jvp(x),
        lambda: J.columns(torch.arange(7)),
        lambda: singular(J),
        lambda: quadratic(model, x, eps=0.1),
        lambda: torch.autograd.grad(slope.sum(), w),
    ):
        with pytest.raises(ValueError, match="J u"):
            call()


def test_without_steps_the_envelope_gradient_is_left(scene):
    world, z, x, _ = scene
    calls = []
    solve = lambda x: calls.append(1) or z  # noqa: E731
    value = lambda z, x: torch.stack([-world.inner(z, x), 0 * x[:, 0]], 1)  # noqa: E731
    w = x.clone().requires_grad_()
    out = backtracking(solve, world.inner, value, steps=0)(w)
    (g,) = torch.autograd.grad(margin(out, torch.zeros(2, dtype=torch.int64)).sum(), w)
    step, slopes = 1e-5, []
    for e in torch.eye(6, dtype=torch.float64):
        ends = [world.inner(world.solve(x + s * step * e, z), x + s * step * e) for s in (1, -1)]
        slopes.append((ends[0] - ends[1]) / (2 * step))
    assert torch.allclose(g, -torch.stack(slopes, 1), rtol=1e-6, atol=1e-8)
    assert len(calls) == 1


def test_gradient_guesses_are_the_sum_they_claim():
    x, gradient = inputs(4, 9), inputs(4, 9, seed=5) - 0.5
    seen = []

    def value(points):
        seen.append(points)
        away = points - x.repeat(6, 1)
        return (away * gradient.repeat(6, 1)).sum(dim=1) + away.abs().sum(dim=1)  # an even part

    found = nes_gradient(value, x, samples=6, sigma=0.3, seed=4)
    points = seen[0].reshape(6, 4, 9).numpy()
    u = (points - x.numpy()) / 0.3
    assert np.allclose(u[:3], -u[3:])
    assert 0.5 < u.std() < 1.5
    by_hand = np.mean([(ui * gradient.numpy()).sum(1, keepdims=True) * ui for ui in u], axis=0)
    assert np.allclose(found.numpy(), by_hand), "pairs cancel what is even"
    assert torch.equal(found, nes_gradient(value, x, samples=6, sigma=0.3, seed=4))
    assert not torch.equal(found, nes_gradient(value, x, samples=6, sigma=0.3, seed=4, call=1))


def test_a_guess_in_blocks_has_the_same_draws_and_a_bounded_size():
    x, seen = inputs(4, 9), []

    def value(points):
        seen.append(points)
        return points.square().sum(dim=1).sin()

    rule = {"samples": 14, "sigma": 0.3, "seed": 4}
    whole = nes_gradient(value, x, **rule)
    half = seen.pop().reshape(2, 7, 4, 9)
    for at_once, pairs in ((4 * 36, [2, 2, 2, 1]), (6 * 36 - 1, [2, 2, 2, 1]), (1, [1] * 7)):
        assert torch.allclose(nes_gradient(value, x, at_once=at_once, **rule), whole, atol=1e-14)
        assert [len(points) // 8 for points in seen] == pairs
        blocks = [points.reshape(2, -1, 4, 9) for points in seen]
        assert torch.equal(torch.cat(blocks, dim=1), half), "every block is made of pairs"
        seen.clear()
    net, labels = affine(3, 9), torch.tensor([0, 1, 2, 0])
    found = [
        pgd(nes(net, samples=14, at_once=at_once), x, labels, eps=0.1, steps=3, norm="l2")
        for at_once in (1, 150, AT_ONCE)
    ]
    assert torch.allclose(found[0], found[2], atol=1e-12)
    assert torch.allclose(found[1], found[2], atol=1e-12)


def test_guesses_of_the_usual_size_are_made_in_one_go():
    calls = []
    for shape, samples in (((30, 64), 20), ((300, 1, 8, 8), 50), ((50, 1, 28, 28), 50)):
        nes_gradient(lambda p: calls.append(len(p)) or p.flatten(1)[:, 0], torch.zeros(shape),
                     samples=samples)  # fmt: skip
    assert calls == [600, 15_000, 2_500]
    calls.clear()
    nes_gradient(lambda p: calls.append(p.numel()) or p[:, 0], torch.zeros(500, 784), samples=12)
    assert max(calls) <= AT_ONCE < sum(calls)


def test_the_angle_of_a_guess():
    x, gradient = inputs(400, 64), torch.randn(64, dtype=torch.float64)
    guess = nes_gradient(lambda p: p @ gradient, x, samples=50)
    cosine = torch.nn.functional.cosine_similarity(guess, gradient.expand(400, -1)).mean()
    assert cosine == pytest.approx(math.sqrt(25 / (25 + 64 + 1)), abs=0.02)


def test_a_guessing_model_never_asks_for_a_gradient_and_draws_anew():
    net = affine(3, 8)
    blind = lambda x: net(x.detach())  # noqa: E731
    x, true = inputs(6, 8), net.weight[2] - net.weight[0]

    def slope(model):
        w = x.clone().requires_grad_()
        logits = model(w)
        assert torch.equal(logits, net(x))
        return torch.autograd.grad((logits[:, 2] - logits[:, 0]).sum(), w)[0]

    model = nes(blind, samples=400, seed=3)
    first, second = slope(model), slope(model)
    assert not torch.equal(first, second)
    assert torch.equal(first, slope(nes(blind, samples=400, seed=3)))
    aligned = torch.nn.functional.cosine_similarity(first, true.expand(6, -1))
    assert aligned.min() > 0.9
    assert first.mean(dim=0) @ true / (true @ true) == pytest.approx(1, abs=0.1), "its length too"


def test_guesses_start_over_when_told_to():
    x, y, model = inputs(4, 8), torch.tensor([0, 1, 2, 0]), nes(affine(3, 8), samples=4)
    rule = {"eps": 0.2, "steps": 3}
    first, second = (pgd(model, x, y, **rule) for _ in range(2))
    assert not torch.equal(first, second)
    assert model.calls == 6
    model.reset()
    assert torch.equal(first, pgd(model, x, y, **rule))


def test_modules_inside_are_in_evaluation_mode_and_stay_what_they_are():
    def noisy(size):
        return nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, size), nn.Dropout())

    x, y = torch.rand(8, 6), torch.zeros(8, dtype=torch.int64)
    purify, net = noisy(6), noisy(3)
    before = [b.clone() for part in (purify, net) for b in part.buffers()]
    state = torch.random.get_rng_state()
    for model in (bpda(purify, torch.sin), bpda(torch.sin, net), nes(net, samples=4)):
        pgd(model, x, y, eps=0.1, steps=2)
        assert torch.equal(model(x), model(x))
    assert torch.equal(state, torch.random.get_rng_state())
    after = [b for part in (purify, net) for b in part.buffers()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(m.training for part in (purify, net) for m in part.modules())


def test_an_attack_reaches_the_networks_behind_an_argmin():
    """Each of them would give other logits at every call if it stayed in training mode."""
    x, y = torch.rand(8, 6), torch.zeros(8, dtype=torch.int64)
    encode, decode, net = (nn.Sequential(nn.Linear(6, 6), nn.Dropout()) for _ in range(3))
    inner = lambda z, x: (decode(z) - x).square().sum(dim=1)  # noqa: E731
    readout = lambda z, x: net(z)  # noqa: E731
    warm = lambda: WarmStart(encode, lambda z, x: z - 0.1 * (z - encode(x)), inner)  # noqa: E731
    for model in (
        lambda: implicit(encode, inner, readout),
        lambda: implicit(warm(), inner, readout),
        lambda: backtracking(warm(), inner, readout, steps=2),
        lambda: backtracking(encode, inner, readout, steps=2, memory="constant"),
    ):
        assert torch.equal(*(pgd(model(), x, y, eps=0.1, steps=2) for _ in range(2)))
    assert all(m.training for part in (encode, decode, net) for m in part.modules())


def test_the_accuracy_of_a_warm_solver_does_not_depend_on_the_chunk():
    inner = lambda z, x: (z - x).square().sum(dim=1)  # noqa: E731
    readout = lambda z, x: z[:, :3]  # noqa: E731
    x = inputs(20, 5)
    y = x[:, :3].argmax(dim=1)
    for chunk in (20, 10, 5, 1):
        warm = WarmStart(torch.clone, lambda z, x: z + 0.1 * (x - z), inner)
        assert accuracy(implicit(warm, inner, readout), x, y, chunk=chunk) == 1


@pytest.mark.parametrize("count", [1, 3])
def test_other_images_are_no_copies(count):
    log = []

    def solve(x):
        log.append(len(x))
        return x.clone()

    warm = WarmStart(solve, lambda z, x: z, lambda z, x: (z - x).square().sum(dim=1))
    net, x = affine(2, 6), inputs(count, 6)
    model, y = nes(lambda x: net(warm(x)), samples=10, sigma=3.0), torch.zeros(count).long()
    pgd(model, x, y, eps=0.05, steps=3, random_start=False)
    assert log.pop(0) == 1, "the look at the first sample"
    assert log == [count] * (count > 1), "draws are copies, however wide"
    blocks = nes(model.model, samples=10, sigma=3.0, at_once=4 * x.numel())
    asked, _ = len(log), warm.reset()
    pgd(blocks, x, y, eps=0.05, steps=3, random_start=False)
    assert log[asked:] == [1, count][:count], "those of a block as well"
    others = inputs(4 * count, 6, seed=2)
    assert torch.equal(warm(others), others)
    assert log[-1] == 4 * count
    near = WarmStart(solve, warm.refine, warm.inner, reach=2.0)
    near(x)
    near(others)
    assert log[-1] == count, "anything is a copy within a long reach"


@pytest.mark.parametrize("update", ["adam", "sign"])
def test_the_search_finds_the_nearest_point_of_a_half_space(update):
    net, x = affine(2, 5), inputs(6, 5)
    y = net(x).argmax(dim=1)
    w = net.weight[0] - net.weight[1]
    distance = margin(net(x), y) / w.norm()
    rule = {"steps": 150, "rounds": 8, "lr": 0.02, "confidence": 0.01, "bounds": WIDE}
    x_adv = distortion_search(net, x, y, update=update, **rule)
    found = (x_adv - x).norm(dim=1)
    assert torch.all(margin(net(x_adv), y) < 0)
    slack = 1.03 if update == "adam" else 2.0  # a sign is no gradient
    assert torch.all(found >= distance)
    assert torch.all(found < slack * distance + 0.01)


def test_sign_steps_grow_linearly_to_their_last():
    net, x = affine(2, 5), inputs(6, 5)
    y, seen = net(x).argmax(dim=1), []
    rule = {"steps": 10, "rounds": 1, "lr": 0.05, "update": "sign", "bounds": WIDE}
    distortion_search(net, x, y, observe=lambda _, s: seen.append(s["x_adv"]), **rule)
    moves = torch.stack([(b - a).abs().amax(dim=1) for a, b in pairwise(seen)])
    lengths = 0.05 * torch.arange(1, 10, dtype=torch.float64) / 10
    assert torch.allclose(moves, lengths[:, None].expand(9, 6), atol=1e-12)


def test_what_is_not_verified_does_not_count():
    net, x = affine(2, 5), inputs(6, 5)
    y = net(x).argmax(dim=1)
    stubborn = lambda x: nn.functional.one_hot(y, 2).to(x)  # noqa: E731
    seen = []
    rule = {"steps": 40, "rounds": 3, "bounds": WIDE}
    x_adv = distortion_search(
        net, x, y, verify=stubborn, observe=lambda _, s: seen.append(s), **rule
    )
    assert torch.equal(x_adv, x)
    assert seen[-1]["unverified"].max() < math.inf
    assert seen[-1]["verified"].min() == math.inf
    assert [float(s["weight"][0]) for s in seen[::40]] == [1, 10, 100]
    half = lambda x: net(x) + 0.5 * nn.functional.one_hot(y, 2)  # noqa: E731
    x_adv = distortion_search(net, x, y, verify=half, confidence=1.0, **rule)
    m = margin(net(x_adv), y)
    assert torch.all(m < -0.5), "the surer of two candidates stands where the nearest fails"


def test_weights_are_bisected_between_failure_and_success():
    net, x = affine(2, 5), inputs(3, 5)
    y, seen = net(x).argmax(dim=1), []
    distortion_search(
        net, x, y, steps=30, rounds=6, bounds=WIDE, observe=lambda _, s: seen.append(s)
    )
    weights = np.stack([s["weight"].numpy() for s in seen[::30]])
    for column in weights.T:
        k = next(i for i in range(1, 6) if column[i] < 10 * column[i - 1])
        assert column[k] == pytest.approx((column[k - 1] + (column[k - 2] if k > 1 else 0)) / 2)
    found = [s["unverified"] for s in seen]
    assert all(torch.all(b <= a) for a, b in pairwise(found))


def test_the_search_turns_a_network_at_about_the_distance_of_pgd(digits):
    model, x, y = digits
    right = model(x).argmax(dim=1) == y
    x, y = x[right][:20], y[right][:20]
    x_adv = distortion_search(model, x, y, steps=60, rounds=6, weight=0.1, confidence=0.1)
    far = (x_adv - x).flatten(1).norm(dim=1)
    assert torch.all(model(x_adv).argmax(dim=1) != y)
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    inside = [
        pgd(model, x[i : i + 1], y[i : i + 1], eps=0.8 * float(far[i]), norm="l2", loss="margin")
        for i in range(20)
    ]
    assert (model(torch.cat(inside)).argmax(dim=1) != y).sum() <= 3


@pytest.fixture
def flat():
    """A linear generator, its exact solver, and a linear classifier behind both."""
    W, b = affine(6, 3, seed=4).weight, inputs(1, 6, seed=5)
    net, x = affine(4, 6, seed=6), inputs(5, 6)
    parts = {
        "encode": lambda x: (x - b) @ torch.linalg.pinv(W).T,
        "decode": lambda z: z @ W.T + b,
        "classifier": net,
    }
    defense = lambda x: net(parts["decode"](parts["encode"](x)))  # noqa: E731
    return defense, x, defense(x).argmax(dim=1), W, parts


SURE = {"steps": 150, "rounds": 8, "confidence": 0.01, "bounds": WIDE}


def test_networks_on_the_surface_are_in_evaluation_mode():
    x, y, net = inputs(3, 4), torch.tensor([0, 1, 0]), affine(2, 4)
    parts = {name: nn.Sequential(nn.Identity(), nn.Dropout()) for name in ("encode", "decode")}
    runs = [surface_search(net, x, y, steps=5, classifier=net, **parts) for _ in range(2)]
    assert torch.equal(*runs)
    assert all(part.training for part in parts.values())


def test_on_a_flat_surface_the_search_finds_the_nearest_input(flat):
    """The defense is linear there: the nearest boundary of another class, seen in the surface."""
    defense, x, y, W, parts = flat
    logits, onto = defense(x), W @ torch.linalg.pinv(W)
    apart = parts["classifier"].weight[y][:, None] - parts["classifier"].weight
    gaps = logits.gather(1, y[:, None]) - logits
    distance = (gaps / (apart @ onto).norm(dim=2)).nan_to_num(math.inf)
    distance = distance.scatter(1, y[:, None], math.inf).amin(dim=1)
    x_adv = surface_search(defense, x, y, reach=1.25, scales=125, **SURE, **parts)
    found = (x_adv - x).norm(dim=1)
    assert torch.all(margin(defense(x_adv), y) < 0)
    assert torch.all(found >= distance)
    assert torch.all(found < 1.03 * distance + 0.01)
    assert torch.allclose((x_adv - x) @ onto, x_adv - x), "what sticks out of the surface is kept"


def test_all_judges_must_be_fooled_from_a_scale_on(flat):
    defense, x, y, _, parts = flat
    quick = SURE | {"steps": 30, "rounds": 2, "weight": 30.0}
    end = surface_search(
        defense, x, y, scales=1, reach=2.0, verify=lambda p: torch.ones(len(p), 4), **quick, **parts
    )
    assert torch.equal(end, x), "equal logits are no success"
    whole = surface_search(defense, x, y, scales=1, reach=2.0, **quick, **parts) - x
    way = lambda p: ((p - x[:1]) @ whole[0]) / whole[0].square().sum()  # noqa: E731

    def judge(*windows):
        def logits(p):
            wrong = sum(((way(p) > low) & (way(p) < high)).double() for low, high in windows)
            return torch.stack([1 - wrong if c == y[0] else wrong for c in range(4)], dim=1)

        return logits

    one = {"scales": 20, "reach": 2.0, **quick, **parts}
    early = judge((0.09, 0.21), (0.49, 9.0))
    for verify, share in (
        (early, 0.5),  # the first window is luck
        ([early, judge((0.59, 9.0))], 0.6),
        ([judge((0.59, 9.0)), early], 0.6),
        ((early, judge((0.2, 0.9))), 0.0),
        (judge((-1.0, 9.0)), 0.0),
    ):
        x_adv = surface_search(defense, x[:1], y[:1], verify=verify, **one)
        assert torch.allclose(x_adv - x[:1], share * whole[:1])


def test_the_search_on_the_surface_stays_in_the_box_and_tells_its_distance(flat):
    defense, x, y, _, parts = flat
    seen = []
    rule = SURE | {"bounds": (0.0, 1.0), "steps": 40, "rounds": 3}
    surface_search(defense, x, y, observe=lambda _, s: seen.append(s), **rule, **parts)
    assert len(seen) == 120
    assert all(s["x_adv"].min() >= 0 and s["x_adv"].max() <= 1 for s in seen)
    best = torch.stack([s["distance"] for s in seen])
    assert torch.all(best[1:] <= best[:-1])
    assert best[0].min() == math.inf
    assert best[-1].max() < math.inf
    assert torch.allclose(parts["decode"](seen[0]["codes"]), parts["decode"](parts["encode"](x)))


def test_what_the_search_on_the_surface_returns_is_in_the_box():
    """The nearest code is outside: its first value is 1 + 1/40, and that of the input ends at 1."""
    ones = torch.ones(2, 2, dtype=torch.float64)
    net = affine(
        2, 2, weight=ones * torch.tensor([[-1.0], [1.0]]), bias=torch.tensor([1.65, -1.65])
    )
    x, y = torch.tensor([[0.9, 0.5]], dtype=torch.float64), torch.tensor([0])
    rule = SURE | {"bounds": (0.0, 1.0)}
    x_adv = surface_search(
        net, x, y, encode=torch.clone, decode=torch.clone, classifier=net, **rule
    )
    assert margin(net(x_adv), y) < 0
    assert x_adv[0, 0] == 1
    assert 0.65 < x_adv[0, 1] < 0.8


def test_only_confidently_wrong_codes_count_on_the_surface(flat):
    defense, x, y, _, parts = flat
    seen = []
    rule = SURE | {"confidence": 1.0, "steps": 60, "rounds": 3}
    surface_search(defense, x, y, observe=lambda _, s: seen.append(s), **rule, **parts)
    made, nearest = parts["decode"](parts["encode"](x)), torch.full((5,), math.inf).double()
    hesitant = torch.zeros(5, dtype=torch.bool)
    for state in seen:
        m = margin(state["logits"], y)
        far = (parts["decode"](state["codes"]) - made).norm(dim=1)
        nearest = torch.where(m <= -1.0, torch.minimum(nearest, far), nearest)
        hesitant |= (m < 0) & (m > -1.0) & (far < nearest)
        assert torch.allclose(state["distance"], nearest)
    assert bool(hesitant.any()), "nearer ones were wrong, but not confidently"
    assert bool((nearest < math.inf).any())


def test_the_walk_goes_straight_and_is_bisected():
    goals = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.9, 0.9]], dtype=torch.float64)
    net = affine(3, 2, weight=2 * goals, bias=-goals.square().sum(dim=1))  # the nearest goal
    x, y = torch.tensor([[0.9, 0.1], [0.1, 0.9]], dtype=torch.float64), torch.tensor([0, 1])
    seen = []
    explain = lambda p: (net(p), goals.expand(len(p), 3, 2))  # noqa: E731
    rule = {"explain": explain, "eta": 0.1, "every": 4, "growth": 2.0}
    x_adv = latent_walk(net, x, y, steps=9, halvings=0, observe=lambda _, s: seen.append(s), **rule)
    shares = [float(s["eta"]) for s in seen]
    assert np.allclose(shares, ([0.1] * 4 + [0.2] * 4 + [0.4])[: len(shares)])
    left = np.cumprod([1, *(1 - np.array(shares))])
    for i, goal in ((0, goals[2]), (1, goals[2])):
        path = [s["x_adv"][i] for s in seen]
        for point, share in zip(path, left, strict=False):
            straight = goal + share * (x[i] - goal)
            assert torch.allclose(point, straight) or margin(net(point[None]), y[i : i + 1]) < 0
        assert margin(net(path[-2][None]), y[i : i + 1]) > 0
    assert torch.equal(x_adv, seen[-1]["x_adv"])
    near = latent_walk(net, x, y, steps=9, halvings=10, **rule)
    assert torch.all(net(near).argmax(dim=1) != y)
    share = (near - x).norm(dim=1) / (x_adv - x).norm(dim=1)
    back = x + (share - 2**-10)[:, None] * (x_adv - x)
    assert torch.all(net(back).argmax(dim=1) == y), "a step less and the label is back"


def test_a_walk_toward_images_outside_the_bounds_stays_inside():
    net = affine(2, 2, weight=torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), bias=torch.zeros(2))
    x, y = torch.tensor([[-0.5, 0.0]], dtype=torch.float64), torch.tensor([0])
    images = torch.tensor([[-1.0, 0.0], [3.0, -5.0]], dtype=torch.float64)
    seen = []
    rule = {"eta": 0.5, "every": 99, "steps": 9, "halvings": 0, "bounds": (-1.0, 1.0)}
    x_adv = latent_walk(
        net, x, y, explain=lambda p: (net(p), images.expand(len(p), 2, 2)),
        observe=lambda _, s: seen.append(s["x_adv"]), **rule,
    )  # fmt: skip
    assert torch.equal(x_adv, torch.tensor([[1.0, -1.0]], dtype=torch.float64))
    assert torch.equal(seen[-1], x_adv)


def test_the_share_of_a_long_walk_stops_at_one():
    net, x = affine(2, 4), inputs(3, 4)
    y, seen = net(x).argmax(dim=1), []
    rule = {"eta": 0.3, "every": 1, "steps": 1100, "observe": lambda _, s: seen.append(s["eta"])}
    latent_walk(net, x, y, explain=lambda p: (net(p), p[:, None].expand(-1, 2, -1)), **rule)
    assert np.allclose(seen, [0.3, 0.6] + [1.0] * 1098)


def test_weights_stop_before_they_overflow():
    x, seen = torch.rand(3, 4), []
    net = affine(2, 4).float()
    y = net(x).argmax(dim=1)
    stubborn = lambda p: nn.functional.one_hot(y[: len(p)], 2) + 0.01 * net(p)  # noqa: E731
    rule = {"rounds": 60, "steps": 3, "observe": lambda _, s: seen.append(s)}
    distortion_search(stubborn, x, y, **rule)
    assert all(s["x_adv"].isfinite().all() for s in seen)
    assert seen[-1]["weight"].tolist() == pytest.approx([1e15] * 3)


def test_inference_mode_makes_no_difference(scene):
    world, z, x, v = scene
    net, y = affine(3, 6), torch.tensor([0, 1])
    pieces = (lambda p: z[: len(p)], world.inner, lambda z, x: net(world.G(z)))
    ways = [
        lambda x, y, z, v: unroll(world.inner, z + 0.1, x, steps=3, step_size=0.05),
        lambda x, y, z, v: neumann_gradient(world.inner, z, x, v, steps=3, step_size=0.05),
        lambda x, y, z, v: implicit_gradient(world.inner, z, x, v).gradient,
        lambda x, y, z, v: distortion_search(net, x, y, steps=3, bounds=WIDE),
        lambda x, y, z, v: surface_search(
            net, x, y, encode=lambda p: z[: len(p)], decode=world.G, classifier=net, bounds=WIDE
        ),
        lambda x, y, z, v: latent_walk(
            net, x, y, steps=3, bounds=WIDE, explain=lambda p: (net(p), p[:, None] * v[:, :, None])
        ),
    ]
    ways += [
        lambda x, y, z, v, model=model: pgd(model(), x, y, eps=0.1, steps=3, bounds=WIDE)
        for model in (
            lambda: backtracking(*pieces, step_size=0.05),
            lambda: backtracking(*pieces, step_size=0.05, memory="constant"),
            lambda: implicit(*pieces),
            lambda: nes(net, samples=4),
            lambda: bpda(torch.tanh, net),
        )
    ]
    for call in ways:
        expected = call(x, y, z, v)
        with torch.inference_mode():
            found = call(x * 1, y * 1, z * 1, v * 1)
        assert torch.allclose(found, expected, atol=1e-12)


def test_a_walk_that_never_arrives_returns_the_input():
    net, x = affine(2, 4), inputs(3, 4)
    y = net(x).argmax(dim=1)
    stay = latent_walk(net, x, y, explain=lambda p: (net(p), p[:, None].expand(-1, 2, -1)), steps=3)
    assert torch.equal(stay, x)
    assert stay.data_ptr() != x.data_ptr()


X, Y, NET = inputs(2, 4), torch.tensor([0, 1]), affine(2, 4)
FLAT = lambda z, x: (z - x).square().sum(dim=1)  # noqa: E731
SAME = {"encode": torch.clone, "decode": torch.clone, "classifier": NET}


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: latent_walk(NET, X, Y, explain=NET, growth=None), TypeError),
        (lambda: latent_walk(NET, X, Y, explain=NET, halvings=None), TypeError),
        (lambda: backtracking(NET, FLAT, FLAT, steps=1.5), TypeError),
        (lambda: backtracking(NET, FLAT, FLAT, steps=-1), ValueError),
        (lambda: backtracking(NET, FLAT, FLAT, step_size=0), ValueError),
        (lambda: backtracking(NET, FLAT, FLAT, memory="none"), ValueError),
        (lambda: implicit(NET, FLAT, FLAT, iterations=0), ValueError),
        (lambda: implicit(NET, FLAT, FLAT, damping=-1.0), ValueError),
        (lambda: nes(NET, samples=3, sigma=0.0), ValueError),
        (lambda: nes(NET, samples=3), ValueError),
        (lambda: nes(NET, seed=-1), ValueError),
        (lambda: nes_gradient(FLAT, X, samples=5), ValueError),
        (lambda: nes_gradient(FLAT, X, samples=2.0), TypeError),
        (lambda: nes_gradient(FLAT, X, at_once=0), ValueError),
        (lambda: nes(NET, at_once=0), ValueError),
        (lambda: distortion_search(NET, X, Y, update="up"), ValueError),
        (lambda: distortion_search(NET, X, Y, weight=0), ValueError),
        (lambda: distortion_search(NET, X, Y, weight=1e16), ValueError),
        (lambda: distortion_search(NET, X, Y, confidence=-1.0), ValueError),
        (lambda: distortion_search(NET, X, Y, rounds=0), ValueError),
        (lambda: surface_search(NET, X, Y, reach=0.0, **SAME), ValueError),
        (lambda: surface_search(NET, X, Y, scales=0, **SAME), ValueError),
        (lambda: surface_search(NET, X, Y, verify=[], **SAME), ValueError),
        (lambda: surface_search(NET, X, Y, **SAME | {"decode": lambda z: z[:, :3]}), ValueError),
        (lambda: surface_search(NET, X, Y, scales=2.5, **SAME), TypeError),
        (lambda: surface_search(NET, X, Y, confidence=-1.0, **SAME), ValueError),
        (lambda: surface_search(NET, X, Y, lr=0.0, **SAME), ValueError),
        (lambda: surface_search(NET, X, Y, weight=1e16, **SAME), ValueError),
        (lambda: latent_walk(NET, X, Y, explain=NET, eta=1.5), ValueError),
        (lambda: latent_walk(NET, X, Y, explain=NET, growth=0.5), ValueError),
        (lambda: latent_walk(NET, X, Y, explain=NET, halvings=-1), ValueError),
    ],
)
def test_bad_settings_are_refused(call, error):
    with pytest.raises(error):
        call()


def test_messages_name_what_was_given():
    with pytest.raises(ValueError, match=r"^steps is an integer >= 0, not -1"):
        backtracking(NET, FLAT, FLAT, steps=-1)
    with pytest.raises(ValueError, match=r"^growth is a factor >= 1, not 0\.5"):
        latent_walk(NET, X, Y, explain=NET, growth=0.5)
    with pytest.raises(ValueError, match=r"^halvings is an integer >= 0, not -1"):
        latent_walk(NET, X, Y, explain=NET, halvings=-1)
