"""Proven minimal perturbations against enumeration, dense grids, closed forms and attacks."""

import copy
import math
from itertools import combinations, pairwise, product

import cvxpy as cp
import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import nn

from adv.attacks.boundary import deepfool
from adv.attacks.common import check_range
from adv.attacks.gradient import pgd
from adv.geometry import dual_norm, norm, pixels
from adv.lab import data, zoo
from adv.theory import exact
from adv.theory.exact import minimal_perturbation

NORMS = ("linf", "l2", "l1", "l0")


def network(seed, *sizes):
    """A random ReLU network with decision boundaries inside the unit cube."""
    draw = torch.Generator().manual_seed(seed)
    layers = []
    for inputs, outputs in pairwise(sizes):
        layer = nn.Linear(inputs, outputs)
        layer.weight.data = torch.randn(outputs, inputs, generator=draw) / inputs**0.5
        layer.bias.data = 0.3 * torch.randn(outputs, generator=draw)
        layer.bias.data -= layer.weight.data @ torch.full((inputs,), 0.5 if not layers else 0.3)
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1]).requires_grad_(False)


def scene(seed, *sizes):
    """A network, an input in float64, and its class."""
    model = network(seed, *sizes)
    x = torch.rand(sizes[0], generator=torch.Generator().manual_seed(seed + 100))
    return model, x, int(model(x[None]).argmax())


def length(delta, kind):
    return float(norm(delta.reshape(1, -1), kind))


def check(result, model, x, y, bounds=(0.0, 1.0)):
    """What a result says of its point is so, in float64."""
    point = result.x_adv
    assert point.dtype == torch.float64
    assert point.shape == x.shape
    assert bounds[0] <= point.min()
    assert point.max() <= bounds[1]
    logits = torch.nn.Sequential(model).double()(point[None])[0]
    model.float()
    others = [k for k in range(len(logits)) if k != y]
    assert logits[others].max() >= logits[y]
    assert logits[result.label] == logits[others].max()
    assert length(point - x.double(), result.norm) == pytest.approx(result.upper, abs=1e-15)
    assert result.lower <= result.upper


# ------------------------------------------------------------------------- enumeration of patterns


def affine(model, x, pattern):
    """Rows and offsets of ReLU inputs (signed to be >= 0) and logits on one activation pattern."""
    A, c, rows, offsets, used = np.eye(len(x)), x, [], [], 0
    linear = [layer for layer in model if isinstance(layer, nn.Linear)]
    for layer in linear:
        W, b = layer.weight.double().numpy(), layer.bias.double().numpy()
        A, c = W @ A, W @ c + b
        if layer is linear[-1]:
            break
        on = np.array(pattern[used : used + len(b)])
        used += len(b)
        rows += list(np.where(on, 1, -1)[:, None] * A)
        offsets += list(np.where(on, 1, -1) * c)
        A, c = on[:, None] * A, on * c
    return np.array(rows), np.array(offsets), A, c


def solver(kind, size, count, lo, hi):
    """Least norm with G delta + h >= 0 in the box: a function of G and h."""
    if kind == "l0":

        def count_values(G, h):
            for k in range(size + 1):
                for chosen in combinations(range(size), k):
                    box = [(lo[i], hi[i]) if i in chosen else (0, 0) for i in range(size)]
                    if linprog(np.zeros(size), A_ub=-G, b_ub=h, bounds=box).status == 0:
                        return k
            return math.inf

        return count_values
    delta, G, h = cp.Variable(size), cp.Parameter((count, size)), cp.Parameter(count)
    p = {"linf": "inf", "l2": 2, "l1": 1}[kind]
    problem = cp.Problem(
        cp.Minimize(cp.norm(delta, p)), [G @ delta + h >= 0, delta >= lo, delta <= hi]
    )

    def solve(rows, offsets):
        G.value, h.value = rows, offsets
        problem.solve(solver=cp.CLARABEL)
        return problem.value if problem.status == "optimal" else math.inf

    return solve


def enumerate_patterns(model, x, y, kind, target=None):
    """The least norm over all patterns, one convex program each."""
    x = x.double().numpy()
    hidden = sum(layer.out_features for layer in model if isinstance(layer, nn.Linear))
    classes = model[-1].out_features
    hidden -= classes
    goals = [target] if target is not None else [k for k in range(classes) if k != y]
    extra = classes - 1 if target is not None else 1
    solve = solver(kind, len(x), hidden + extra, -x, 1 - x)
    best = math.inf
    for pattern in product([0, 1], repeat=hidden):
        rows, offsets, A, c = affine(model, x, pattern)
        for t in goals:
            rivals = [k for k in range(classes) if k != t] if target is not None else [y]
            G = np.concatenate([rows, A[t] - A[rivals]])
            best = min(best, solve(G, np.concatenate([offsets, c[t] - c[rivals]])))
    return best


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize(("seed", "sizes"), [(0, (3, 3, 3)), (2, (3, 2, 2, 3)), (5, (4, 3, 2))])
def test_equals_the_enumeration_of_all_patterns(kind, seed, sizes):
    model, x, y = scene(seed, *sizes)
    best = enumerate_patterns(model, x, y, kind)
    result = minimal_perturbation(model, x, y, norm=kind)
    assert result.optimal
    if math.isinf(best):
        assert result.lower == result.upper == math.inf
        assert result.x_adv is None
    else:
        assert result.lower <= best * (1 + 1e-6)
        assert result.upper == pytest.approx(best, rel=2e-4)
        check(result, model, x, y)


@pytest.mark.parametrize("kind", ["linf", "l2"])
def test_targeted_equals_the_enumeration(kind):
    model, x, y = scene(0, 3, 3, 3)
    reached = 0
    for target in {0, 1, 2} - {y}:
        best = enumerate_patterns(model, x, y, kind, target)
        result = minimal_perturbation(model, x, y, norm=kind, target=target)
        assert result.optimal
        assert result.upper == pytest.approx(best, rel=2e-4)
        reached += result.upper < math.inf
    assert reached


# -------------------------------------------------------------------------------------- dense grids


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("seed", range(3))
def test_no_grid_point_is_nearer(kind, seed):
    """Networks too wide to enumerate, in the plane: all points of a fine grid."""
    model, x, y = scene(seed, 2, 12, 12, 3)
    axis = torch.linspace(0, 1, 401)
    grid = torch.cartesian_prod(axis, axis)
    if kind == "l0":
        line, still = torch.linspace(0, 1, 4001), torch.ones(4001)
        lines = [torch.stack([line, still * x[1]], 1), torch.stack([still * x[0], line], 1)]
        grid = torch.cat([grid, *lines])
    wrong = grid[model(grid).argmax(1) != y]
    result = minimal_perturbation(model, x, y, norm=kind)
    assert result.optimal
    if not len(wrong):
        assert result.lower > 0
        return
    nearest = float(norm(wrong - x, kind).min())
    assert result.lower <= nearest * (1 + 1e-6)
    assert result.upper <= nearest + 1e-6
    assert result.upper >= nearest - (0 if kind == "l0" else 2 * 0.0025)
    check(result, model, x, y)


# ------------------------------------------------------------------------------------ closed forms


@pytest.mark.parametrize("kind", ["linf", "l2", "l1"])
def test_linear_classifiers_have_a_closed_form(kind):
    """min over k of margin_k / dual norm, where no bound is in the way."""
    model, x, y = scene(3, 12, 4)
    W, b = model[0].weight.double(), model[0].bias.double()
    logits = W @ x.double() + b
    others = [k for k in range(4) if k != y]
    expected = (logits[y] - logits[others]) / dual_norm(W[y] - W[others], kind)
    result = minimal_perturbation(model, x, y, norm=kind, bounds=(-50.0, 50.0))
    assert result.optimal
    assert result.upper == pytest.approx(float(expected.min()), rel=1e-4)
    assert result.lower == pytest.approx(float(expected.min()), rel=2e-4)
    check(result, model, x, y, (-50.0, 50.0))


@pytest.mark.parametrize("kind", ["linf", "l1"])
def test_linear_classifiers_in_a_box_are_linear_programs(kind):
    model, x, y = scene(7, 12, 3)
    W, b, z = model[0].weight.double().numpy(), model[0].bias.double().numpy(), x.double().numpy()
    size, best = len(z), math.inf
    low = np.full(size, 0.4 * z.min())
    high = np.full(size, z.max() + 0.05)
    for k in {0, 1, 2} - {y}:
        w, margin = W[k] - W[y], (W[y] - W[k]) @ z + b[y] - b[k]
        eye, wide = np.eye(size), 1 if kind == "linf" else size
        reach = np.ones((size, 1)) if kind == "linf" else eye
        A = np.block([[eye, -reach], [-eye, -reach], [-w[None], np.zeros((1, wide))]])
        cost = np.append(np.zeros(size), np.ones(wide))
        box = [*zip(low - z, high - z, strict=True), *[(0, None)] * wide]
        solved = linprog(cost, A_ub=A, b_ub=np.append(np.zeros(2 * size), -margin), bounds=box)
        best = min(best, solved.fun if solved.status == 0 else math.inf)
    assert best < math.inf
    result = minimal_perturbation(model, x, y, norm=kind, bounds=(low[0], high[0]))
    assert result.optimal
    assert result.upper == pytest.approx(best, rel=1e-4)


def test_l0_counts_pixels_of_images():
    """Class 1 gains the sum of three channels at each of four pixels: one pixel is worth 3/2."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    model[1].weight.data = torch.stack([torch.zeros(12), torch.ones(12)])
    model[1].bias.data = torch.tensor([2.5, 0.0])
    image = torch.zeros(3, 2, 2)
    assert minimal_perturbation(model, image, 0, norm="l0").upper == 1  # one pixel gains 3
    assert minimal_perturbation(model, image.flatten(), 0, norm="l0").upper == 3  # values
    model[1].bias.data = torch.tensor([3.5, 0.0])
    result = minimal_perturbation(model, image, 0, norm="l0")
    assert (result.lower, result.upper, result.optimal) == (2, 2, True)
    assert pixels(result.x_adv[None]) == 2


# ------------------------------------------------------------------------------------------- edges


def test_inputs_may_be_rounded_in_the_units_of_the_bounds():
    """An attack takes inputs that are off by some roundings, which at 151 are 1.5e-5 each."""
    model, bounds = network(0, 3, 4, 2), (-123.68, 151.061)
    x = torch.tensor([151.061, -123.68, 3.0])
    x[0] += 3e-5
    check_range(x[None], bounds)
    y = int(model(x[None]).argmax())
    result = minimal_perturbation(model, x, y, norm="linf", bounds=bounds)
    assert result.lower <= result.upper
    with pytest.raises(ValueError, match="within the bounds"):
        minimal_perturbation(model, x + 1e-3, y, norm="linf", bounds=bounds)


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("seed", [41, 50, 54])
def test_wide_bounds_are_no_harder(kind, seed):
    """The tolerances of the programs follow the length of the solution, not that of the box."""
    model, x, y = scene(seed, 4, 6, 5, 3)
    near = minimal_perturbation(model, x, y, norm=kind, bounds=(-2.0, 3.0))
    wide = minimal_perturbation(model, x, y, norm=kind, bounds=(-255.0, 255.0))
    assert near.optimal
    assert wide.optimal
    if kind == "linf" and near.upper < 2:  # no better point can lie outside
        assert wide.upper == pytest.approx(near.upper, rel=2e-5)
    assert wide.upper <= near.upper * (1 + 2e-5)


@pytest.mark.parametrize("kind", NORMS)
def test_no_adversarial_point_in_the_box(kind):
    """A bias that no input makes up for: proved, not merely not found."""
    model, x, y = scene(0, 3, 6, 3)
    model[-1].bias.data[y] += 100
    result = minimal_perturbation(model, x, y, norm=kind)
    assert (result.lower, result.upper) == (math.inf, math.inf)
    assert result.optimal
    assert result.x_adv is None
    assert result.label is None
    assert result.gap == 0


@pytest.mark.parametrize("kind", NORMS)
def test_misclassified_inputs_and_ties_are_at_distance_zero(kind):
    model, x, y = scene(0, 3, 6, 3)
    result = minimal_perturbation(model, x, (y + 1) % 3, norm=kind)
    assert (result.lower, result.upper, result.optimal) == (0, 0, True)
    assert result.x_adv.tolist() == x.double().tolist()
    tie = nn.Linear(3, 2)
    tie.weight.data = torch.ones(2, 3)
    tie.bias.data = torch.zeros(2)
    assert minimal_perturbation(tie, x, 0, norm=kind).upper == 0


@pytest.mark.parametrize("kind", NORMS)
def test_a_radius_that_is_too_small_is_no_optimum(kind):
    model, x, y = scene(4, 5, 6, 6, 3)
    best = minimal_perturbation(model, x, y, norm=kind)
    small = best.upper - 1 if kind == "l0" else 0.7 * best.upper
    told = minimal_perturbation(model, x, y, norm=kind, upper=small)
    assert not told.optimal or told.upper == pytest.approx(best.upper, rel=1e-4)
    assert told.lower <= best.upper
    assert told.lower >= small
    right = minimal_perturbation(model, x, y, norm=kind, upper=best.upper)
    assert right.optimal
    assert right.upper == pytest.approx(best.upper, rel=1e-4)


def test_nothing_is_claimed_beyond_the_radius(monkeypatch):
    """Without first points of its own, all that is proved is that the radius is empty."""
    model, x, y = scene(4, 5, 6, 6, 3)
    best = minimal_perturbation(model, x, y)
    monkeypatch.setattr(exact._Search, "approach", lambda self, targets: dict.fromkeys(targets, 1))
    told = minimal_perturbation(model, x, y, upper=0.7 * best.upper)
    assert told.lower == pytest.approx(0.7 * best.upper, rel=1e-5)
    assert told.upper == math.inf
    assert told.x_adv is None
    assert not told.optimal
    assert told.gap == 1
    for kind in NORMS:  # the programs find the optimum themselves
        full = minimal_perturbation(model, x, y, norm=kind)
        assert full.optimal
        check(full, model, x, y)
    assert minimal_perturbation(model, x, y).upper == pytest.approx(best.upper, rel=1e-4)


@pytest.mark.parametrize("kind", ["linf", "l1", "l0"])
def test_solutions_that_the_network_denies_are_excluded(kind, monkeypatch):
    """A solver that makes its first solutions up costs time, not truth."""
    model, x, y = scene(4, 5, 6, 6, 3)
    best = minimal_perturbation(model, x, y, norm=kind)
    monkeypatch.setattr(exact._Search, "approach", lambda self, targets: dict.fromkeys(targets, 1))
    solve, lies = exact.milp, []

    def lying(cost, **call):
        result = solve(cost, **call)
        if call["integrality"].any() and result.x is not None and len(lies) < 3:
            result.x = np.where(call["integrality"] > 0, 1 - np.round(result.x), 0.0)
            result.fun, result.mip_dual_bound = result.fun / 2, result.mip_dual_bound / 2
            lies.append(result)
        return result

    monkeypatch.setattr(exact, "milp", lying)
    result = minimal_perturbation(model, x, y, norm=kind)
    assert len(lies) == 3
    assert result.optimal
    assert result.upper == pytest.approx(best.upper, rel=1e-4)
    assert result.lower == pytest.approx(best.lower, rel=2e-4)


def test_l0_counts_the_pixels_that_the_solver_opened(monkeypatch):
    """Other values may differ from 0 by the solver's tolerance: they are not part of its answer."""
    model, x, y = scene(4, 5, 6, 6, 3)
    best = minimal_perturbation(model, x, y, norm="l0")
    monkeypatch.setattr(exact._Search, "approach", lambda self, targets: dict.fromkeys(targets, 1))
    solve, programs = exact.milp, []

    def noisy(cost, **call):
        result = solve(cost, **call)
        if call["integrality"].any() and result.x is not None:
            result.x = np.where(call["integrality"] > 0, result.x, result.x - 1e-7)
            programs.append(result)
        return result

    monkeypatch.setattr(exact, "milp", noisy)
    result = minimal_perturbation(model, x, y, norm="l0")
    assert programs
    assert (result.lower, result.upper, result.optimal) == (best.lower, best.upper, True)


@pytest.mark.parametrize("kind", ["linf", "l1", "l0"])
def test_programs_admit_the_boundary_and_a_little_before_it(kind, monkeypatch):
    """By SAFETY, in units of the largest weight: rounding must not shut a solution out."""
    model = nn.Linear(2, 2)
    model.weight.data = torch.tensor([[4.0, 1.0], [0.0, 0.0]])
    model.bias.data = torch.tensor([-1.0, 0.0])
    x, solve, seen = torch.tensor([0.5, 0.0]), exact.milp, []  # the margin is 1 + 4 d_0 + d_1

    def noting(cost, **call):
        seen.append(call)
        return solve(cost, **call)

    monkeypatch.setattr(exact, "milp", noting)
    monkeypatch.setattr(exact._Search, "approach", lambda self, targets: dict.fromkeys(targets, 1))
    result = minimal_perturbation(model, x, 0, norm=kind)
    assert result.upper == pytest.approx(1 if kind == "l0" else 0.25, rel=1e-4)
    unit = 0.5 / seen[0]["bounds"][1][0]  # of the variables: 0.5 is how far d_0 may grow
    rows = seen[0]["constraints"]  # the last: -(d_0 + d_1 / 4) / unit >= 1 / (4 unit)
    last = rows.A.toarray()[-1]
    assert sorted({*np.abs(last)} - {0.0}) == [0.25, 1.0]
    assert rows.lb[-1] == pytest.approx(0.25 / unit - exact.SAFETY, abs=1e-12)


@pytest.mark.parametrize("kind", NORMS)
def test_points_that_the_network_denies_prove_nothing_either(kind, monkeypatch):
    """Rounding could deny each point at the boundary: then their distances bound from below."""
    model, x, y = scene(4, 6, 8, 3)
    best = minimal_perturbation(model, x, y, norm=kind)
    monkeypatch.setattr(exact._Search, "offer", lambda self, delta, target: False)
    told = minimal_perturbation(model, x, y, norm=kind, upper=1.2 * best.upper)
    assert told.x_adv is None
    assert not told.optimal
    assert told.lower <= best.upper
    assert told.lower == pytest.approx(best.upper, rel=2e-3)


@pytest.mark.parametrize("noise", [1e-3, 0.3])
def test_any_multipliers_prove_a_bound_in_l2(noise, monkeypatch):
    """Weak duality: a poor least-squares solution costs time, never truth."""
    draw, solve = np.random.default_rng(0), exact.nnls

    def poor(E, f):
        u, residual = solve(E, f)
        return u * draw.uniform(1 - noise, 1 + noise, u.shape) + (
            noise * u.max() * draw.uniform(size=u.shape) * (draw.uniform(size=u.shape) < 0.1)
        ), residual

    for seed in range(3):
        model, x, y = scene(seed, 3, 4, 4, 3)
        best = minimal_perturbation(model, x, y, norm="l2")
        with monkeypatch.context() as patch:
            patch.setattr(exact, "nnls", poor)
            told = minimal_perturbation(model, x, y, norm="l2", time_limit=1.0)
        assert told.lower <= best.upper
        assert told.upper >= best.lower


@pytest.mark.parametrize("kind", NORMS)
def test_scales_of_the_layers_do_not_matter(kind):
    """ReLU is homogeneous: weights of 1e6 and 1e-6 make the same network and the same optimum."""
    model, x, y = scene(4, 5, 6, 6, 3)
    best = minimal_perturbation(model, x, y, norm=kind)
    for layer, bias, weight in ((0, 1e6, 1e6), (2, 1e-2, 1e-8), (4, 1.0, 1e2)):
        model[layer].weight.data *= weight
        model[layer].bias.data *= bias
    result = minimal_perturbation(model, x, y, norm=kind)
    assert result.optimal
    assert result.upper == pytest.approx(best.upper, rel=1e-4)
    check(result, model, x, y)


# --------------------------------------------------------------------------------- digits, attacks


@pytest.fixture(scope="module")
def digits():
    return zoo.load("digits/mlp-24"), data.load("digits").test.take(3)


@pytest.mark.parametrize("kind", ["linf", "l2"])
def test_the_time_limit_leaves_bounds(digits, kind):
    model, test = digits
    x, y = test.x[2], int(test.y[2])
    full = minimal_perturbation(model, x, y, norm=kind, time_limit=60)
    assert full.optimal
    for seconds in (0.01, 0.1):
        cut = minimal_perturbation(model, x, y, norm=kind, time_limit=seconds)
        assert cut.lower <= full.upper
        assert cut.upper >= full.lower
        assert cut.optimal == (cut.lower >= cut.upper * (1 - 1e-5))
    short = minimal_perturbation(model, x, y, norm=kind, time_limit=0.01)
    assert not short.optimal
    assert short.seconds < full.seconds + 1


@pytest.mark.parametrize(
    ("kind", "attack"),
    [
        ("linf", lambda m, x, y: deepfool(m, x, y, norm="linf")),
        ("l2", lambda m, x, y: deepfool(m, x, y, norm="l2")),
        ("l1", lambda m, x, y: pgd(m, x, y, norm="l1", eps=3.0, steps=100)),
    ],
)
def test_attacks_stay_above_the_bound(digits, kind, attack):
    model, test = digits
    some = test[2:]
    x_adv = attack(model, some.x, some.y)
    reached = norm(x_adv - some.x, kind)
    proved = minimal_perturbation(model, some.x, some.y, norm=kind, upper=reached)
    for each, distance in zip(proved, reached.tolist(), strict=True):
        assert each.optimal
        assert each.lower <= distance
        assert each.upper <= distance * (1 + 1e-4)


def test_inside_the_proven_radius_pgd_finds_nothing(digits):
    model, test = digits
    x, y = test.x[2:], test.y[2:]
    proved = minimal_perturbation(model, x[0], int(y), norm="linf")
    for eps, found in ((0.999 * proved.lower, False), (1.05 * proved.upper, True)):
        x_adv = pgd(model, x, y, eps=eps, steps=100, restarts=3, loss="margin")
        assert bool(model(x_adv).argmax(1) != y) == found


# ------------------------------------------------------------------------------------------ manners


def test_a_batch_is_its_inputs_one_by_one():
    model, _, _ = scene(1, 4, 6, 3)
    x = torch.rand(3, 2, 2, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.Flatten(), *model)
    y = model(x).argmax(1)
    target = (y + 1) % 3
    batch = minimal_perturbation(model, x, y, target=target)
    for i, result in enumerate(batch):
        alone = minimal_perturbation(model, x[i], int(y[i]), target=int(target[i]))
        assert (alone.lower, alone.upper) == (result.lower, result.upper)
        assert result.x_adv is None or result.x_adv.shape == (2, 2)


class Normalized(nn.Module):
    """A network that normalizes inside itself, where no layer tells of it."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net((x - 0.4) / 0.25)


def test_normalization_is_a_layer_or_folded_into_the_first():
    net = network(4, 5, 6, 3)
    model, x = Normalized(net), torch.rand(5, generator=torch.Generator().manual_seed(1))
    y = int(model(x[None]).argmax())
    with pytest.raises(ValueError, match="write normalization as a Linear layer, or fold it into"):
        minimal_perturbation(model, x, y)
    layer, folded = nn.Linear(5, 5), copy.deepcopy(net)
    layer.weight.data, layer.bias.data = torch.eye(5) / 0.25, torch.full((5,), -0.4 / 0.25)
    folded[0].weight.data /= 0.25
    folded[0].bias.data -= folded[0].weight.data.sum(dim=1) * 0.4
    one, other = (minimal_perturbation(n, x, y) for n in (nn.Sequential(layer, *net), folded))
    assert one.upper == pytest.approx(other.upper, rel=1e-4)
    wrapped = copy.deepcopy(model).double()
    assert wrapped(one.x_adv[None]).topk(2).values.diff().abs() < 1e-4


@pytest.mark.parametrize("kind", NORMS)
def test_a_point_is_checked_with_a_copy_in_float64(kind):
    net, x, y = scene(5, 4, 6, 3)
    dtype = net[0].weight.dtype
    point = minimal_perturbation(net, x, y, norm=kind).x_adv
    with pytest.raises(RuntimeError, match="dtype"):
        net(point[None])
    logits = copy.deepcopy(net).double()(point[None])[0]  # the docstring's advice
    others = torch.cat([logits[:y], logits[y + 1 :]])
    assert logits[y] <= others.max()
    assert net[0].weight.dtype == dtype == torch.float32


def test_layers_that_compute_nothing_and_layers_in_a_row():
    model, x, y = scene(1, 4, 6, 3)
    plain = minimal_perturbation(model, x, y)
    relu = nn.ReLU()
    odd = nn.Sequential(
        nn.Dropout(0.5), model[0], relu, relu, nn.Sequential(nn.Identity(), model[2])
    )
    odd.train()
    assert minimal_perturbation(odd, x, y).upper == pytest.approx(plain.upper, rel=1e-6)
    assert odd.training
    assert odd[1].weight.dtype == torch.float32
    first = nn.Sequential(nn.ReLU(), *model, nn.ReLU())  # ReLUs on the input and on the logits
    result = minimal_perturbation(first, x, y)
    assert result.upper <= plain.upper * (1 + 1e-6)  # a tie at 0 counts


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        return x + self.layer(x)


LINEAR = nn.Linear(3, 3)
BROKEN = nn.Linear(3, 3)
BROKEN.weight.data[0] = math.nan
X = torch.full((3,), 0.5)


@pytest.mark.parametrize(
    ("error", "match", "model", "x", "y", "settings"),
    [
        (TypeError, "Tanh", nn.Sequential(LINEAR, nn.Tanh()), X, 0, {}),
        (TypeError, "Module", lambda x: x, X, 0, {}),
        (ValueError, "sequence", Residual(), X, 0, {}),
        (ValueError, "not finite", BROKEN, X, 0, {}),
        (ValueError, "takes 3", LINEAR, X[:2], 0, {}),
        (ValueError, "K >= 2", nn.Linear(3, 1), X, 0, {}),
        (TypeError, "floating", LINEAR, X.long(), 0, {}),
        (TypeError, "floating", LINEAR, X.numpy(), 0, {}),
        (ValueError, "within the bounds", LINEAR, X + 1, 0, {}),
        (ValueError, "within the bounds", LINEAR, X * math.nan, 0, {}),
        (ValueError, r"y lies in 0\.\.2", LINEAR, X, 3, {}),
        (TypeError, "y is an integer", LINEAR, X, 0.0, {}),
        (TypeError, "y is an integer", LINEAR, X, True, {}),
        (ValueError, "y has shape", LINEAR, X[None], torch.tensor([0, 1]), {}),
        (TypeError, "upper is a tensor", LINEAR, X[None], torch.tensor([0]), {"upper": 0.5}),
        (ValueError, "already", LINEAR, X, 0, {"target": 0}),
        (ValueError, "target lies", LINEAR, X, 0, {"target": -1}),
        (ValueError, "norm is one of", LINEAR, X, 0, {"norm": "l3"}),
        (ValueError, "norm is one of", LINEAR, X, 0, {"norm": 2.0}),
        (ValueError, "upper", LINEAR, X, 0, {"upper": -1.0}),
        (ValueError, "upper", LINEAR, X, 0, {"upper": math.nan}),
        (TypeError, "upper", LINEAR, X, 0, {"upper": "1"}),
        (ValueError, "time_limit", LINEAR, X, 0, {"time_limit": 0}),
        (ValueError, "gap", LINEAR, X, 0, {"gap": 1.0}),
        (TypeError, "gap", LINEAR, X, 0, {"gap": None}),
        (ValueError, "bounds", LINEAR, X, 0, {"bounds": (1.0, 0.0)}),
    ],
)
def test_bad_input_is_refused(error, match, model, x, y, settings):
    with pytest.raises(error, match=match):
        minimal_perturbation(model, x, y, **settings)
