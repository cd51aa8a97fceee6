import itertools
import math

import cvxpy as cp
import numpy as np
import pytest
import torch
from helpers import WIDE, affine, inputs
from torch import nn

from adv.attacks import jacobian as operators
from adv.attacks import regression
from adv.attacks.common import GradientMaskingWarning, generator
from adv.attacks.gradient import noise
from adv.attacks.jacobian import Jacobian, trust_region
from adv.attacks.regression import linear, quadratic, random_perturbation, subset
from adv.geometry import norm as length
from adv.geometry import pixels
from adv.lab import data, zoo

EPS = 0.3


def error(model, x, y=None, at=None):
    with torch.no_grad():
        goal = model(at) if y is None else y
        return (model(x) - goal).flatten(1).square().sum(1)


def corners(x, eps, bounds=(0.0, 1.0)):
    """All vertices of the box within eps, (2^d, d) for one sample."""
    low, high = (x - eps).clamp_min(bounds[0]), (x + eps).clamp_max(bounds[1])
    ends = zip(low.tolist(), high.tolist(), strict=True)
    return torch.tensor(list(itertools.product(*ends)), dtype=x.dtype)


@pytest.fixture(scope="module")
def curved():
    """A smooth network from 4 to 5 values, and a batch."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 5)).double()
    return model.requires_grad_(False), inputs(6, 4), inputs(6, 5, seed=9)


@pytest.fixture(scope="module")
def autoencoder():
    """The sheet's autoencoder of digits, as stored, and 20 digits."""
    return zoo.load("digits/autoencoder").double(), data.load("digits").test.x[:20].double()


# the quadratic attack: where the model is affine it solves the problem itself


def test_l2_is_the_leading_singular_vector():
    model, x = affine(6, 9), inputs(5, 9)
    x_adv = quadratic(model, x, eps=EPS, bounds=WIDE, tol=1e-8, steps=2000)
    _, sigma, V = np.linalg.svd(model.weight.numpy())
    assert np.allclose(error(model, x_adv, at=x), (EPS * sigma[0]) ** 2, rtol=1e-12)
    assert np.allclose(np.abs((x_adv - x).numpy() @ V[0]), EPS, atol=1e-10)


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_l2_with_a_target_solves_the_trust_region_problem(scale):
    model, x = affine(6, 9), inputs(8, 9)
    r = scale * torch.randn(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    y = model(x) - r
    x_adv = quadratic(model, x, y, eps=EPS, bounds=WIDE, tol=1e-10, steps=20000)
    J = model.weight.expand(8, 6, 9)
    best = x + trust_region(J, r @ model.weight, EPS)
    assert torch.allclose(error(model, x_adv, y), error(model, best, y), rtol=1e-10)


@pytest.mark.parametrize("known", [0.0, 0.2, 5.0])
def test_l1_is_the_best_vertex(known):
    model, x = affine(6, 9), inputs(40, 9)
    y = model(x) + known * (inputs(40, 6, seed=4) - 0.5) if known else None
    x_adv = quadratic(model, x, y, eps=EPS, norm="l1", bounds=WIDE)
    vertices = EPS * torch.cat([torch.eye(9), -torch.eye(9)]).double()
    every = torch.stack([error(model, x + v, y, at=x) for v in vertices])
    assert torch.allclose(error(model, x_adv, y, at=x), every.amax(0), rtol=1e-12)
    assert bool((length(x_adv - x, "l0") == 1).all())


def test_l1_in_a_box_is_the_best_single_value():
    model, x, y = affine(3, 5), inputs(20, 5).round(), inputs(20, 3, seed=4)
    x_adv = quadratic(model, x, y, eps=EPS, norm="l1")
    tries = [x + EPS * side * torch.eye(5)[k].double() for k in range(5) for side in (1, -1)]
    every = torch.stack([error(model, z.clamp(0, 1), y) for z in tries])
    assert torch.allclose(error(model, x_adv, y), every.amax(0), rtol=1e-12)


@pytest.mark.parametrize("bounds", [WIDE, (0.0, 1.0)])
@pytest.mark.parametrize("known", [False, True])
def test_linf_against_all_corners(bounds, known):
    """The search finds the best corner nearly always, greedy does within its guarantee."""
    model, x = affine(5, 8), inputs(30, 8)
    y = inputs(30, 5, seed=4) if known else None
    best = torch.stack([error(model, corners(z, EPS, bounds), goal).max() for z, goal in
                        zip(x, model(x) if y is None else y, strict=True)])  # fmt: skip
    found = {
        rule: error(
            model, quadratic(model, x, y, eps=EPS, norm="linf", rule=rule, bounds=bounds), y, at=x
        )
        / best
        for rule in ("greedy", "search", "iterate")
    }
    assert all(bool((share <= 1 + 1e-12).all()) for share in found.values())
    assert float((found["search"] > 1 - 1e-12).double().mean()) > 0.8
    assert float(found["search"].min()) > 0.9
    assert float(found["greedy"].mean()) > 0.85
    assert float(found["iterate"].mean()) > 0.85
    assert bool((found["search"] >= found["greedy"] - 1e-12).all())


def test_the_search_starts_on_the_residuals_side(monkeypatch):
    model, x = affine(6, 9), inputs(5, 9)
    left = torch.linalg.svd(model.weight).U[:, 0]
    r = left * torch.tensor([5.0, -5.0, 7.0, -9.0, 5.0]).double()[:, None]
    starts = []
    monkeypatch.setattr(regression, "flip_search", lambda J, s, r: starts.append(s) or s)
    quadratic(model, x, model(x) - r, eps=EPS, norm="linf", rule="search", bounds=WIDE)
    gain = ((starts[1] @ model.weight.T) * r).sum(1)
    assert bool((gain > 0).all())


def test_linf_greedy_is_the_greedy_rule():
    """Columns one by one, largest first; 4 outputs, no box, the sum starts at the residual."""
    model, x = affine(4, 12), inputs(3, 12)
    W, order = model.weight.numpy(), None
    for y in (None, inputs(3, 4, seed=6)):
        x_adv = quadratic(model, x, y, eps=EPS, norm="linf", bounds=WIDE)
        for i in range(3):
            total = np.zeros(4) if y is None else (model(x) - y)[i].numpy() / EPS
            order = np.argsort(-np.square(W).sum(0), kind="stable")
            signs = np.zeros(12)
            for z in order:
                signs[z] = 1.0 if total @ W[:, z] >= 0 else -1.0
                total = total + signs[z] * W[:, z]
            tries = torch.tensor(EPS * np.stack([signs, -signs])) + x[i]
            goal = model(x[i]) if y is None else y[i]
            best = tries[error(model, tries, goal.expand(2, 4)).argmax()]
            value = error(model, x_adv[i : i + 1], goal[None])
            assert torch.allclose(value, error(model, best[None], goal[None]), rtol=1e-10)


def test_in_a_box_the_l2_solution_is_stationary_and_beats_clipping():
    model, x = affine(6, 9), inputs(20, 9).round(decimals=1)
    y, eps = inputs(20, 6, seed=8), 1.0
    x_adv = quadratic(model, x, y, eps=eps, steps=5000, tol=1e-10)
    delta = x_adv - x
    W = model.weight
    slope = (model(x_adv) - y) @ W
    # first-order optimality in ball and box, against a solver of the linear problem
    for i in range(4):
        u = cp.Variable(9)
        inside = [cp.norm(u) <= eps, x[i].numpy() + u >= 0, x[i].numpy() + u <= 1]
        solved = cp.Problem(cp.Maximize(slope[i].numpy() @ u), inside).solve("CLARABEL")
        assert float((slope * delta).sum(1)[i]) == pytest.approx(solved, rel=1e-5)
    free = quadratic(model, x, y, eps=eps, bounds=WIDE).clamp(0, 1)
    assert bool((error(model, x_adv, y) >= error(model, free, y) - 1e-9).all())
    assert bool((error(model, x_adv, y) > error(model, free, y) + 1e-3).any())
    assert bool((length(delta, "l2") <= eps + 1e-12).all())


def test_any_other_norm_is_climbed():
    model, x = affine(4, 6), inputs(3, 6)
    x_adv = quadratic(model, x, eps=EPS, norm=3.0, bounds=WIDE, restarts=5, tol=1e-9, steps=2000)
    assert torch.allclose(length(x_adv - x, 3.0), torch.full((3,), EPS).double())
    draws = generator(0)
    tries = [noise(x, EPS, 3.0, "sphere", generator=draws) for _ in range(2000)]
    best = torch.stack([error(model, x + d, at=x) for d in tries]).amax(0)
    assert bool((error(model, x_adv, at=x) >= best).all())


def test_the_sign_is_chosen_by_the_actual_error():
    """exp rises faster than it falls, which no linearization knows."""
    x = torch.full((4, 3), 0.5, dtype=torch.float64)
    for norm, seed in itertools.product(("l2", "l1", "linf", 3.0), range(3)):
        x_adv = quadratic(torch.exp, x, eps=EPS, norm=norm, seed=seed, bounds=WIDE)
        assert bool(((x_adv - x).sum(1) > 0).all())


def test_without_the_residual_the_target_chooses_the_sign_only():
    model, x = affine(6, 9), inputs(8, 9)
    y = model(x) + 3 * inputs(8, 6, seed=2)
    args = {"eps": EPS, "bounds": WIDE, "tol": 1e-9, "steps": 3000}
    x_adv = quadratic(model, x, y, residual=False, **args)
    v = torch.linalg.svd(model.weight).Vh[0]
    assert torch.allclose((x_adv - x).abs(), (EPS * v).abs().expand(8, 9), atol=1e-7)
    other = 2 * x - x_adv
    assert bool((error(model, x_adv, y) >= error(model, other, y)).all())
    assert bool((error(model, quadratic(model, x, y, **args), y) > error(model, x_adv, y)).all())


def test_restarts_are_never_worse(autoencoder):
    model, x = autoencoder
    args = {"eps": 0.1, "norm": "linf", "rule": "iterate"}
    values = [error(model, quadratic(model, x, restarts=k, **args), at=x) for k in (1, 4)]
    assert bool((values[1] >= values[0]).all())
    assert bool((values[1] > values[0]).any())


@pytest.mark.parametrize("restarts", [1, 2, 4])
def test_restarts_count_the_run_without_a_random_direction(curved, restarts):
    """The singular vector and its opposite, each also climbed from; and one solution for each."""
    model, x, y = curved
    seen = []
    quadratic(model, x, y, eps=EPS, restarts=restarts, observe=lambda _, s: seen.append(s))
    assert sum("error" in state for state in seen) == 4 + restarts - 1


def test_observe_follows_the_power_iteration(curved):
    model, x, y = curved
    seen = []
    x_adv = quadratic(model, x, y, eps=EPS, observe=lambda step, s: seen.append((step, s)))
    steps, states = zip(*seen, strict=True)
    assert list(steps) == list(range(len(steps)))
    moved = [s for s in states if "moved" in s]
    solved = [s for s in states if "error" in s]
    assert len(solved) == 4
    assert len(moved) >= 2
    top = torch.stack([s["error"] for s in solved]).amax(0)
    assert torch.allclose(error(model, x_adv, y), top)
    assert all(bool((length(s["x_adv"] - x, "l2") <= EPS + 1e-12).all()) for s in states)


# memory: large networks


def test_no_jacobian_is_stored(monkeypatch):
    """3x96x96 to 3x96x96: vectors of one image's size, as many as the iterations take."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 3, padding=1)
        )
    x = torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    sizes, plain = [], operators.row_products

    def counting(outputs, inputs, vectors, **options):
        found = plain(outputs, inputs, vectors, **options)
        sizes.append(max(vectors.numel(), found.numel()))
        return found

    monkeypatch.setattr(operators, "row_products", counting)
    for norm in ("l2", "linf"):
        sizes.clear()
        x_adv = quadratic(model, x, eps=0.05, norm=norm, steps=6, tol=0)
        # forward and backward for 3 iterations of 6 steps, and a few to begin and end
        assert 36 <= len(sizes) <= 44
        assert max(sizes) == x.numel()
        random = random_perturbation(x, eps=0.05, norm=norm)
        assert float(error(model, x_adv, at=x)) > 2 * float(error(model, random, at=x))
        assert float(length(x_adv - x, norm)) <= 0.05 * (1 + 1e-5)


def test_columns_come_in_blocks(monkeypatch):
    """Greedy, l1 and pixels on a network whose Jacobian is never in memory as a whole."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Conv2d(3, 3, 3, padding=1).double()
    x = inputs(2, 192).view(2, 3, 8, 8)
    runs = {
        "greedy": lambda: quadratic(model, x, eps=0.1, norm="linf"),
        "l1": lambda: quadratic(model, x, eps=0.1, norm="l1"),
        "pixels": lambda: subset(model, x, eps=0.1, count=2, kind="quadratic"),
    }
    whole = {name: run() for name, run in runs.items()}
    monkeypatch.setattr(operators, "CHUNK", 5000)
    sizes, plain = [], Jacobian._units

    def counting(self, outputs, inputs, indices):
        sizes.append(indices.shape[1] * 2 * 192)
        return plain(self, outputs, inputs, indices)

    monkeypatch.setattr(Jacobian, "_units", counting)
    for name, run in runs.items():
        assert torch.allclose(run(), whole[name], atol=1e-12)
        assert max(sizes) <= 5000
        assert len(sizes) >= 192 // (5000 // 384)
        sizes.clear()


# the linear attack


def gradient(model, x, y):
    z = x.clone().requires_grad_()
    (g,) = torch.autograd.grad((model(z) - y).square().sum(), z)
    return g


@pytest.mark.parametrize("accumulate", [True, False])
def test_linear_is_its_iteration(curved, accumulate):
    model, x, y = curved
    seen = []
    x_adv = linear(
        model, x, y, eps=EPS, steps=4, accumulate=accumulate, dither=0.1, seed=3, bounds=WIDE,
        observe=lambda step, state: seen.append((step, state)),
    )  # fmt: skip
    at, point = x, seen[0][1]["point"]
    assert bool(((point - x).abs().amax(1) <= 0.1).all())
    assert bool(((point - x).abs().amax(1) > 0).all())
    for step, (index, state) in enumerate(seen):
        assert step == index
        assert torch.allclose(state["x_adv"], at, atol=1e-12)
        assert step == 0 or torch.equal(state["point"], state["x_adv"])
        g = gradient(model, point, y)
        assert torch.allclose(state["gradient"], g)
        assert torch.allclose(state["value"], error(model, point, y))
        at = (at + EPS / 4 * g.sign()) if accumulate else (x + EPS * g.sign())
        point = at
    assert torch.allclose(x_adv, at, atol=1e-12)


@pytest.mark.parametrize("accumulate", [True, False])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_linear_returns_no_graph(curved, norm, accumulate):
    model, x, _ = curved
    asked = x.clone().requires_grad_()
    assert not linear(model, asked, eps=EPS, norm=norm, accumulate=accumulate).requires_grad


@pytest.mark.parametrize("norm", ["linf", "l2", "l1", 3.0])
@pytest.mark.parametrize("accumulate", [True, False])
def test_linear_stays_in_ball_and_box(curved, norm, accumulate):
    model, x, _ = curved
    x_adv = linear(model, x, eps=0.6, norm=norm, steps=5, accumulate=accumulate)
    assert bool((length(x_adv - x, norm) <= 0.6 + 1e-12).all())
    assert 0 <= x_adv.min() <= x_adv.max() <= 1
    assert bool((error(model, x_adv, at=x) > 0).all())


@pytest.mark.parametrize("accumulate", [True, False])
def test_linear_is_first_linearized_anywhere_in_the_ball(curved, accumulate):
    model, x, _ = curved
    points = []
    for dither in (None, EPS):
        seen = []
        linear(model, x, eps=EPS, accumulate=accumulate, dither=dither, bounds=WIDE,
               observe=lambda _, s, seen=seen: seen.append(s["point"]))  # fmt: skip
        points.append(seen[0])
    assert torch.equal(*points)
    assert EPS / 2 < float((points[0] - x).abs().max()) <= EPS


def test_full_steps_are_power_iteration():
    model, x = affine(6, 9), inputs(4, 9)
    seen = []
    x_adv = linear(
        model, x, eps=EPS, norm="l2", steps=7, accumulate=False, bounds=WIDE,
        observe=lambda _, state: seen.append(state["point"]),
    )  # fmt: skip
    gram = (model.weight.T @ model.weight).numpy()
    u = (seen[0] - x).numpy() @ np.linalg.matrix_power(gram, 7)
    unit = u / np.linalg.norm(u, axis=1, keepdims=True)
    assert np.allclose((x_adv - x).numpy(), EPS * unit, atol=1e-9)


def test_short_steps_waste_the_budget_on_the_first_direction():
    """Share of the optimum, y = f(x): after 1 step the same, then the full steps win."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(40, 60), nn.Tanh(), nn.Linear(60, 40)).double()
        for layer in (model[0], model[2]):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
    x, eps = inputs(20, 40), 1e-3
    best = (eps * torch.linalg.svdvals(Jacobian(model, x).dense())[:, 0]) ** 2
    args = {"eps": eps, "norm": "l2", "bounds": WIDE}

    def share(steps, accumulate):
        x_adv = linear(model, x, steps=steps, accumulate=accumulate, **args)
        return float((error(model, x_adv, at=x) / best).mean())

    assert share(1, True) == pytest.approx(share(1, False))
    short, full = ([share(t, how) for t in (2, 10, 50)] for how in (True, False))
    assert np.allclose(short, [0.71, 0.82, 0.89], atol=0.08)
    assert np.allclose(full, [0.80, 0.97, 1.00], atol=0.06)
    assert all(f > s + 0.03 for s, f in zip(short, full, strict=True))


def test_the_sheets_autoencoder(autoencoder):
    """Mean output PSNR against x, input PSNR 20 dB, no box; one training instead of five."""
    model, x = autoencoder

    def psnr(z):
        return float((-10 * (error(model, z, x) / 64).log10()).mean())

    for norm, eps, expected in [
        ("linf", 0.1, {"random": 16.4, "quadratic": 12.3, "linear-1": 13.0, "linear-20": 12.1}),
        ("l2", 0.8, {"random": 17.1, "quadratic": 9.6, "linear-1": 11.2, "linear-20": 9.5}),
    ]:
        args = {"eps": eps, "norm": norm, "bounds": WIDE}
        ours = {
            "random": psnr(random_perturbation(x, **args)),
            "quadratic": psnr(quadratic(model, x, x, residual=False, **args)),
            "linear-1": psnr(linear(model, x, x, dither=0.0, **args)),
            "linear-20": psnr(linear(model, x, x, steps=20, dither=0.0, **args)),
        }
        assert psnr(x) == pytest.approx(19.0, abs=1)
        for name, value in expected.items():
            assert ours[name] == pytest.approx(value, abs=1.2), (norm, name)
        slack = 0.2 if norm == "linf" else 1e-6  # greedy may lose from a better start
        assert psnr(quadratic(model, x, x, **args)) <= ours["quadratic"] + slack
        full = psnr(linear(model, x, x, steps=20, dither=0.0, accumulate=False, **args))
        assert full < ours["linear-20"] - 0.5  # E14
        assert ours["linear-20"] < ours["linear-1"] < ours["random"] - 2


# groups


@pytest.mark.parametrize("known", [False, True])
def test_one_group_of_all_is_the_best_corner(known):
    model, x = affine(5, 8), inputs(10, 8)
    y = inputs(10, 5, seed=4) if known else None
    one = torch.zeros(8, dtype=torch.int64)
    x_adv = subset(model, x, y, eps=EPS, groups=one, kind="quadratic")
    goals = model(x) if y is None else y
    best = [error(model, corners(z, EPS), goal).max() for z, goal in zip(x, goals, strict=True)]
    assert torch.allclose(error(model, x_adv, goals), torch.stack(best), rtol=1e-10)


@pytest.mark.parametrize("kind", ["quadratic", "linear"])
def test_a_pixel_is_the_best_of_all_pixels(kind):
    """On an affine model; the linear attack needs a target, and a small radius."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Conv2d(3, 2, 3).double()
    x, eps = inputs(5, 75).view(5, 3, 5, 5), EPS if kind == "quadratic" else 1e-6
    y = torch.randn(5, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    x_adv = subset(model, x, y, eps=eps, kind=kind, dither=0.0)
    tries = []
    for i, j in itertools.product(range(5), range(5)):
        for signs in itertools.product((1, -1), repeat=3):
            z = x.clone()
            z[:, :, i, j] += eps * torch.tensor(signs)
            tries.append(error(model, z.clamp(0, 1), y))
    best = torch.stack(tries).amax(0)
    gained = (error(model, x_adv, y) - error(model, x, y)) / (best - error(model, x, y))
    assert torch.allclose(gained, torch.ones(5).double(), atol=1e-4)
    assert bool((pixels(x_adv - x) == 1).all())


def test_several_groups_are_those_of_largest_gain():
    """A loss that is linear in x: the best set of groups, by trying all."""
    model, x, y = affine(2, 12), inputs(6, 12), torch.arange(6) % 2
    groups = torch.tensor([5, 5, 5, 0, 0, 9, 9, 9, 9, 2, 2, 7])
    seen = []
    x_adv = subset(
        model, x, y, eps=EPS, count=3, groups=groups, loss="margin",
        observe=lambda _, state: seen.append(state),
    )  # fmt: skip
    g = (model.weight[0] - model.weight[1]) * (2 * y - 1)[:, None]
    move = torch.where(g > 0, (x + EPS).clamp_max(1), (x - EPS).clamp_min(0)) - x
    sums = [sum((g * move * (groups == k)).sum(1) for k in chosen)
            for chosen in itertools.combinations(groups.unique().tolist(), 3)]  # fmt: skip
    ours = (g * (x_adv - x)).sum(1)
    assert torch.allclose(ours, torch.stack(sums).amax(0))
    chosen = torch.stack([state["group"] for state in seen], dim=1)
    assert all(len(set(row)) == 3 for row in chosen.tolist())
    assert seen[0]["gain"].shape == (6, 5)
    assert torch.equal(seen[-1]["x_adv"], x_adv)


def test_groups_of_different_sizes():
    """Quadratic, against all groups and all corners of each."""
    model, x = affine(5, 7), inputs(12, 7)
    groups = torch.tensor([4, 8, 8, 8, 4, 1, 8])
    x_adv = subset(model, x, eps=EPS, groups=groups, kind="quadratic")
    best = []
    for z in x:
        tries = [
            torch.where(groups == k, corner, z)
            for k in (1, 4, 8)
            for corner in corners(z, EPS)
        ]  # fmt: skip
        best.append(error(model, torch.stack(tries), model(z)).max())
    assert torch.allclose(error(model, x_adv, at=x), torch.stack(best))


@pytest.mark.parametrize("kind", ["quadratic", "linear"])
def test_groups_are_used_once(kind):
    """Without this rule the same pixel would be moved at every step."""
    model, x = nn.Conv2d(3, 3, 1).double().requires_grad_(False), inputs(4, 48).view(4, 3, 4, 4)
    x_adv = subset(model, x, eps=EPS, count=5, kind=kind)
    assert bool((pixels(x_adv - x) == 5).all())
    assert bool((length(x_adv - x, "linf") <= EPS + 1e-12).all())
    assert 0 <= x_adv.min() <= x_adv.max() <= 1
    every = subset(model, x, eps=EPS, count=16, kind=kind)
    assert bool((pixels(every - x) == 16).all())
    values = subset(model.weight[0, :, 0, 0].mul, x.flatten(1)[:, :3], eps=EPS, count=2, kind=kind)
    assert bool((length(values - x.flatten(1)[:, :3], "l0") == 2).all())


def test_large_groups_are_greedy():
    model, x = affine(4, 26), inputs(3, 26)
    groups = torch.arange(26) // 13
    x_adv = subset(model, x, eps=EPS, groups=groups, kind="quadratic", bounds=WIDE)
    halves = [quadratic(lambda h, k=k: h @ model.weight[:, 13 * k : 13 * k + 13].T,
                        x[:, 13 * k : 13 * k + 13], eps=EPS, norm="linf", bounds=WIDE)
              for k in (0, 1)]  # fmt: skip
    values = []
    for k, half in enumerate(halves):
        z = x.clone()
        z[:, 13 * k : 13 * k + 13] = half
        values.append(error(model, z, at=x))
    assert torch.allclose(error(model, x_adv, at=x), torch.stack(values).amax(0))


def test_the_quadratic_subset_takes_the_better_sign():
    x = torch.full((2, 3), 0.5, dtype=torch.float64)
    x_adv = subset(torch.exp, x, eps=EPS, kind="quadratic", bounds=WIDE)
    assert torch.allclose((x_adv - x).sum(1), torch.full((2,), EPS).double())


def test_subset_attacks_classifiers(digits):
    model, x, y = digits
    with torch.no_grad():
        right = model(x).argmax(1) == y
        fooled = [
            (model(subset(model, x, y, eps=1.0, count=k, loss="margin")).argmax(1) != y)[right]
            for k in (1, 8)
        ]
    assert fooled[0].float().mean() < fooled[1].float().mean()
    assert fooled[1].float().mean() > 0.5


# baselines


def test_random_perturbations():
    x = torch.full((50, 3, 6, 6), 0.5, dtype=torch.float64)
    one = random_perturbation(x, eps=EPS, norm="l2") - x
    assert torch.allclose(length(one, "l2"), torch.full((50,), EPS).double())
    two = random_perturbation(x, eps=EPS, norm="linf") - x
    assert torch.allclose(two.abs(), torch.full_like(x, EPS))
    assert abs(float(two.mean())) < 0.02
    few = random_perturbation(x, eps=EPS, norm="pixels", count=7) - x
    assert bool((pixels(few) == 7).all())
    assert torch.allclose(few.abs().amax(1), EPS * (few != 0).any(1).double())
    assert len({tuple(row.tolist()) for row in (few != 0).any(1).flatten(1)}) > 40
    assert float(few.mean()) == pytest.approx(0, abs=0.02)
    again = random_perturbation(x, eps=EPS, norm="pixels", count=7) - x
    assert torch.equal(few, again)
    assert not torch.equal(few, random_perturbation(x, eps=EPS, norm="pixels", count=7, seed=1) - x)
    clipped = random_perturbation(x, eps=2.0, bounds=(0.25, 1.0))
    assert set(clipped.unique().tolist()) == {0.25, 1.0}


# bad input


BAD = [
    ({"model": 3}, TypeError, "function"),
    ({"model": lambda x: x > 0}, TypeError, "floating-point"),
    ({"model": lambda x: x.sum()}, ValueError, "one sample"),
    ({"model": lambda x: x.sum(1)}, ValueError, "one sample"),
    ({"model": lambda x: x / 0}, ValueError, "finite"),
    ({"model": nn.Linear(9, 2).double()}, ValueError, "does not take"),
    ({"model": nn.Linear(4, 2)}, ValueError, "does not take"),
    ({"y": torch.zeros(6, 4).double()}, ValueError, "shaped like the output"),
    ({"y": torch.zeros(5, 5).double()}, ValueError, "shaped like the output"),
    ({"y": torch.zeros(6, 5)}, TypeError, "float64"),
    ({"y": torch.zeros(6, dtype=torch.int64)}, TypeError, "float64"),
    ({"y": torch.full((6, 5), math.nan).double()}, ValueError, "finite"),
    ({"x": 2 + inputs(6, 4)}, ValueError, "bounds"),
    ({"eps": -1.0}, ValueError, "eps"),
    ({"eps": math.nan}, ValueError, "eps"),
    ({"seed": -1}, ValueError, "seed"),
]


@pytest.mark.parametrize("attack", [quadratic, linear, subset])
@pytest.mark.parametrize(("wrong", "kind", "says"), BAD)
def test_bad_input(attack, wrong, kind, says, curved):
    model, x, y = curved
    given = {"model": model, "x": x, "y": y, "eps": EPS} | wrong
    with pytest.raises(kind, match=says):
        attack(given.pop("model"), given.pop("x"), given.pop("y"), **given)


@pytest.mark.parametrize(
    ("attack", "wrong", "says"),
    [
        (quadratic, {"norm": "l9"}, "norm"),
        (quadratic, {"steps": 0}, "steps"),
        (quadratic, {"restarts": 0}, "restarts"),
        (quadratic, {"tol": -1.0}, "tol"),
        (quadratic, {"rule": "greedy"}, "rule"),
        (quadratic, {"rule": "best", "norm": "linf"}, "rule"),
        (linear, {"norm": 0.5}, "norm"),
        (linear, {"steps": 0}, "steps"),
        (linear, {"dither": -0.1}, "dither"),
        (subset, {"count": 0}, "count"),
        (subset, {"count": 5}, "number of groups, 4"),
        (subset, {"groups": "rows"}, "groups"),
        (subset, {"groups": torch.zeros(3, dtype=torch.int64)}, "groups"),
        (subset, {"groups": torch.zeros(4)}, "groups"),
        (subset, {"kind": "cubic"}, "kind"),
        (subset, {"kind": "quadratic", "loss": "ce"}, "kind"),
        (subset, {"dither": -1.0}, "dither"),
    ],
)
def test_bad_settings(attack, wrong, says, curved):
    model, x, y = curved
    with pytest.raises(ValueError, match=says):
        attack(model, x, y, **({"eps": EPS} | wrong))


def test_bad_baselines():
    x = inputs(2, 12).view(2, 3, 2, 2)
    for wrong in ({"norm": "l1"}, {"eps": -1.0}, {"count": 0}, {"count": 5, "norm": "pixels"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            random_perturbation(x, **({"eps": EPS} | wrong))


def test_labels_are_checked_where_a_loss_is_given(curved):
    model, x, y = curved
    with pytest.raises(TypeError, match="int64"):
        subset(model, x, y, eps=EPS, loss="margin")


@pytest.mark.parametrize(
    ("attack", "name"), [(quadratic, "quadratic"), (linear, "linear"), (subset, "subset")]
)
def test_vanishing_gradients_are_reported(attack, name):
    x = inputs(3, 4)
    for settings in [{}, {"accumulate": False, "steps": 2}] if name == "linear" else [{}]:
        with pytest.warns(GradientMaskingWarning, match="vanished for 3 of 3"):
            attack(lambda z: z.detach().round(), x, eps=EPS, **settings)


@pytest.mark.parametrize("kind", ["linear", "quadratic"])
def test_a_gradient_that_leads_out_of_the_box_has_not_vanished(kind):
    """The sum is to move away from 5, but no value can fall below 0."""
    x, y = torch.zeros(2, 3), torch.full((2, 1), 5.0)
    x_adv = subset(lambda z: z.sum(1, keepdim=True), x, y, eps=0.1, kind=kind)
    assert torch.equal(x_adv, x)
    with pytest.warns(GradientMaskingWarning, match="vanished for 2 of 2"):
        subset(lambda z: z.sum(1, keepdim=True).round(), x, y, eps=0.1, kind=kind)


@pytest.mark.parametrize("norm", ["l2", "l1", "linf"])
def test_no_radius_is_no_change_and_no_gradient_that_vanished(norm, curved):
    model, x, y = curved
    assert torch.equal(quadratic(model, x, y, eps=0.0, norm=norm), x)
    for accumulate in (True, False):
        assert torch.equal(linear(model, x, eps=0.0, norm=norm, accumulate=accumulate), x)
    for kind in ("linear", "quadratic"):
        assert torch.equal(subset(model, x, eps=0.0, kind=kind), x)


def test_inference_mode_makes_no_difference(curved):
    model, x, y = curved
    runs = [
        lambda x, y: quadratic(model, x, y, eps=EPS, norm="linf", rule="search"),
        lambda x, y: quadratic(model, x, y, eps=EPS),
        lambda x, y: linear(model, x, y, eps=EPS, steps=2, accumulate=False),
        lambda x, y: subset(model, x, y, eps=EPS, count=2, kind="quadratic"),
        lambda x, y: subset(model, x, y.argmax(1), eps=EPS, count=2, loss="ce"),
    ]
    for run in runs:
        expected = run(x, y)
        with torch.inference_mode():
            assert torch.allclose(run(x * 1, y * 1), expected, atol=1e-12)
