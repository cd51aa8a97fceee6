"""adv.geometry against closed forms, dense grids, vertices, duality gaps and cvxpy."""

import math

import cvxpy as cp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adv import geometry
from adv.geometry import (
    dual_exponent,
    dual_norm,
    exponent,
    linear_oracle,
    norm,
    pixels,
    project,
    prox,
    prox_power,
    room,
    steepest,
)

BALLS = ("linf", "l2", "l1")
CONVEX = ("linf", "l2", "l1")
SEPARABLE = ("l1", "l0", "l1/2", "l2/3")
PENALTIES = ("linf", "l2", "l1", "l0", "group_l0", "l1/2", "l2/3")
POWERS = {"l1": 1.0, "l0": 0.0, "l1/2": 1 / 2, "l2/3": 2 / 3}
ROUNDING = {torch.float32: 2e-6, torch.float64: 4e-15}
AXES = st.sampled_from([(1,), (2,), (7,), (3, 2, 2), (30,)])
few = settings(max_examples=40, deadline=None)


@st.composite
def batches(draw, axes=AXES, dtypes=ROUNDING):
    """A batch with zeros and ties, a box with walls at 0, and the scale of both."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (draw(st.integers(1, 4)), *draw(axes))
    scale = 10.0 ** draw(st.integers(-6, 6))
    if draw(st.booleans()):
        values = rng.integers(-3, 4, shape) / 2
        sides = rng.integers(0, 5, (2, *shape)) / 4
    else:
        values = rng.normal(size=shape) * 10.0 ** rng.integers(-3, 2, shape)
        sides = rng.uniform(size=(2, *shape)) * rng.integers(0, 2, (2, *shape))
    dtype = draw(st.sampled_from(list(dtypes)))
    u, low, high = (torch.tensor(scale * a, dtype=dtype) for a in (values, -sides[0], sides[1]))
    return u, (low, high), scale


def size(u):
    """The scale that rounding errors are measured in, for each sample."""
    return u.flatten(1).double().abs().sum(1) + 1e-300


def random_metric(u, seed=0):
    weights = 10.0 ** np.random.default_rng(seed).uniform(-1, 1, tuple(u.shape))
    return torch.tensor(weights, dtype=u.dtype)


def value(z, kind):
    """h(z) for each sample, from NumPy."""
    flat = z.double().numpy().reshape(len(z), -1)
    if kind == "group_l0":
        return (z.double().numpy() != 0).any(1).reshape(len(z), -1).sum(1)
    if kind in ("linf", "l2"):
        return np.linalg.norm(flat, {"linf": np.inf, "l2": 2}[kind], axis=1)
    return np.where(flat == 0, 0, np.abs(flat) ** POWERS[kind]).sum(1)


def objective(z, u, lam, kind, metric=None):
    """What a proximal operator minimizes, for each sample, in float64."""
    w = torch.ones_like(u) if metric is None else metric
    square = (w.double() * (z.double() - u.double()).square()).flatten(1).sum(1).numpy()
    return lam * value(z, kind) + square / 2


# Norms and steepest directions


@few
@given(batches())
def test_norms_are_numpys(batch):
    u, _, _ = batch
    flat = u.double().numpy().reshape(len(u), -1)
    for p in (1, 1.25, 2, 3, 10, np.inf):
        expected = np.linalg.norm(flat / (abs(flat).max() + 1e-300), p, axis=1) * abs(flat).max()
        np.testing.assert_allclose(
            norm(u, p).double(), expected, rtol=1e-5 if u.dtype == torch.float32 else 1e-12
        )
        torch.testing.assert_close(dual_norm(u, p), norm(u, dual_exponent(p)))
    assert norm(u, "l0").tolist() == (flat != 0).sum(1).tolist()


def test_names_are_exponents():
    assert [exponent(k) for k in (*BALLS, 2, 1.5)] == [math.inf, 2, 1, 2, 1.5]
    assert [dual_exponent(k) for k in (*BALLS, 4.0, math.inf)] == [1, 2, math.inf, 4 / 3, 1]


def test_pixels_count_any_channel():
    delta = torch.zeros(2, 3, 4, 5)
    delta[0, 0, 1, 1] = delta[0, 2, 1, 1] = delta[0, 1, 2, 2] = 1e-9
    assert pixels(delta).tolist() == [2, 0]
    assert norm(delta, "l0").tolist() == [3, 0]
    assert pixels(delta.flatten(1)).tolist() == [3, 0]


@few
@given(batches(), st.sampled_from([1.0, 1.001, 1.01, 1.5, 2.0, 3.0, 100.0, 1e9, math.inf]))
def test_steepest_attains_hoelders_bound(batch, p):
    g, _, _ = batch
    v = steepest(g, p)
    zero = (g.flatten(1) == 0).all(1)
    tolerance = 1e-4 if g.dtype == torch.float32 else 1e-11
    inner = (g.double() * v.double()).flatten(1).sum(1)
    assert (inner - dual_norm(g.double(), p)).abs().le(tolerance * size(g)).all()
    length = norm(v.double(), p)
    assert torch.where(zero, length == 0, (length - 1).abs() <= tolerance).all()


@pytest.mark.parametrize("p", [1.25, 3.0])
def test_steepest_is_what_a_solver_finds(p):
    g = np.random.default_rng(1).normal(size=8)
    v = cp.Variable(8)
    best = cp.Problem(cp.Maximize(g @ v), [cp.pnorm(v, p) <= 1]).solve()
    ours = steepest(torch.tensor(g)[None], p)[0].numpy()
    assert abs(ours @ g - best) < 1e-6
    assert np.abs(ours - v.value).max() < 1e-3


def test_steepest_beats_every_vertex():
    g = torch.randn(5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0]).double()] * 6)
    axes = torch.cat([torch.eye(6), -torch.eye(6)]).double()
    for kind, vertices in (("linf", corners), ("l1", axes)):
        reached = (g * steepest(g, kind)).sum(1)
        torch.testing.assert_close(reached, (g @ vertices.T).amax(1))


def test_steepest_at_the_edges_of_p_and_of_the_range():
    tie = torch.tensor([[3.0, -3.0, 1.0, 0.0]])
    torch.testing.assert_close(
        steepest(tie, 1.0001), torch.tensor([[0.5, -0.5, 0, 0]]), rtol=0, atol=1e-4
    )
    assert steepest(tie, "l1").tolist() == [[1, 0, 0, 0]]
    torch.testing.assert_close(steepest(tie, 1e300), tie.sign())
    for scale in (1e-42, 1e-30, 1e30, 1e38):
        for p in (1.0, 1.001, 1.5, 2.0, 3.0, math.inf):
            v = steepest(torch.tensor([[scale, -scale / 2, 0.0]]), p)
            torch.testing.assert_close(
                v, steepest(torch.tensor([[1.0, -0.5, 0.0]]), p), rtol=1e-4, atol=1e-6
            )
    close = torch.tensor([[0.7, 0.7 * (1 - 2.0**-20)]], dtype=torch.float32)
    first, second = steepest(close, 1 + 1e-5)[0].tolist()
    assert abs(second / first - (close[0, 1].double() / close[0, 0].double()) ** 1e5) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(dtype):
    g = torch.full((2, 3, 400), 200.0, dtype=dtype)
    assert norm(g, "l2").dtype == dtype
    assert abs(float(norm(g, "l2")[0]) / (200 * math.sqrt(1200)) - 1) < 0.01
    assert (
        steepest(g, 1.5).dtype == project(g, "l1", 1.0).dtype == prox(g, 1.0, "l2/3").dtype == dtype
    )


# Projections


def support(direction, kind, eps, low, high):
    """max <direction, v> over the ball and the box, in closed form or by bisection, in float64."""
    side = np.where(direction > 0, high, -low)
    gain = np.abs(direction)
    if kind == "linf":
        return (gain * np.minimum(side, eps)).sum()
    if kind == "l1":
        order = np.argsort(-gain)
        before = np.concatenate([[0], np.cumsum(side[order])[:-1]])
        return (gain[order] * np.clip(eps - before, 0, side[order])).sum()
    corner = side * (gain > 0)
    if np.linalg.norm(corner) <= eps:
        return (gain * corner).sum()
    unit = gain / gain.max()
    low, high = -100.0, 100.0
    for _ in range(100):
        middle = (low + high) / 2
        short = np.linalg.norm(np.minimum(unit * np.exp(middle), side)) < eps
        low, high = (middle, high) if short else (low, middle)
    return (gain * np.minimum(unit * np.exp(low), side)).sum()


@few
@given(batches(), st.sampled_from(BALLS), st.booleans(), st.sampled_from([0, 1e-3, 0.3, 1, 20]))
def test_projections_are_feasible_fixed_and_optimal(batch, kind, boxed, radius):
    u, box, scale = batch
    eps, rounding = radius * scale, ROUNDING[u.dtype]
    z = project(u, kind, eps, box=box if boxed else None)
    assert norm(z.double(), kind).le(eps * (1 + rounding * u[0].numel())).all()
    if boxed:
        assert ((box[0] <= z) & (z <= box[1])).all()
    again = project(z, kind, eps, box=box if boxed else None)
    assert (again - z).flatten(1).abs().amax(1).le(rounding * size(z)).all()
    # No feasible v makes an acute angle with u - z; by how much one does bounds |z - z*|^2.
    wide = np.full(u[0].numel(), np.inf)
    for i in range(len(u)):
        residual, flat = (a[i].double().numpy().ravel() for a in (u.double() - z.double(), z))
        low, high = (b[i].double().numpy().ravel() for b in box) if boxed else (-wide, wide)
        radius_box = np.minimum(high, eps), np.maximum(low, -eps)
        gap = support(residual, kind, eps, radius_box[1], radius_box[0]) - residual @ flat
        length = float(size(u)[i])
        assert gap <= 100 * rounding * length * min(eps, length) + 1e-300


@few
@given(batches(dtypes=[torch.float64]), st.sampled_from(BALLS), st.sampled_from([0.1, 0.5, 2.0]))
def test_projections_are_what_a_solver_finds(batch, kind, radius):
    u, box, scale = batch
    p = exponent(kind)
    ours = project(u, kind, radius * scale, box=box)[0].numpy().ravel() / scale
    point, low, high = (a[0].numpy().ravel() / scale for a in (u, *box))
    z = cp.Variable(len(point))
    constraints = [cp.norm(z, "inf" if p == math.inf else p) <= radius, low <= z, z <= high]
    cp.Problem(cp.Minimize(cp.sum_squares(z - point)), constraints).solve(solver=cp.CLARABEL)
    assert np.abs(ours - z.value).max() < 1e-3
    assert np.linalg.norm(ours - point) <= np.linalg.norm(z.value - point) + 1e-5


@few
@given(batches(), st.sampled_from(BALLS), st.booleans())
def test_projections_never_expand(batch, kind, boxed):
    u, box, scale = batch
    other, limits = u.flip(0) * 0.7 + scale, box if boxed else None
    moved = (project(u, kind, scale, box=limits) - project(other, kind, scale, box=limits)).double()
    before = (u.double() - other.double()).flatten(1).norm(dim=1)
    assert (
        moved.flatten(1).norm(dim=1) <= before + ROUNDING[u.dtype] * (size(u) + size(other))
    ).all()


def test_clipping_after_projecting_is_another_point():
    u, box = torch.tensor([[2.0, 1.5]]), (torch.zeros(1, 2), torch.tensor([[0.3, 2.0]]))
    for kind, expected in (("l2", math.sqrt(1 - 0.09)), ("l1", 0.7)):
        z = project(u, kind, 1.0, box=box)
        torch.testing.assert_close(z, torch.tensor([[0.3, expected]]))
        clipped = project(u, kind, 1.0).clamp(*box)
        assert (clipped - u).norm() > (z - u).norm() + 0.01


# the linear oracle


@given(batches(), st.sampled_from(BALLS), st.booleans(), st.sampled_from([0, 1e-3, 0.3, 1, 20]))
def test_the_linear_oracle_gains_at_least_as_much_as_any_step(batch, kind, boxed, radius):
    g, box, scale = batch
    eps = radius * scale
    step = linear_oracle(g, kind, eps, box=box if boxed else None)
    slack = 20 * ROUNDING[g.dtype]
    assert bool((norm(step, kind).double() <= eps * (1 + slack) + 1e-300).all())
    assert bool((step[g == 0] == 0).all())
    if boxed:
        assert bool(((box[0] <= step) & (step <= box[1])).all())
    gain = (g * step).flatten(1).double().sum(1)
    rng = np.random.default_rng(0)
    for reach in (0.1, 1, 1e3):
        far = torch.tensor(rng.normal(size=g.shape), dtype=g.dtype) * scale + reach * g
        other = project(far, kind, eps, box=box if boxed else None)
        rounding = slack * eps * size(g) * g.shape[1:].numel()
        assert bool(((g * other).flatten(1).double().sum(1) <= gain + rounding).all())


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(BALLS), st.sampled_from([0.1, 0.5, 2.0]))
def test_the_linear_oracle_is_what_a_solver_finds(seed, kind, eps):
    rng = np.random.default_rng(seed)
    g, cap = rng.normal(size=(2, 1, 8))
    low, high = -np.abs(cap), np.where(rng.random((1, 8)) < 0.3, 0, np.abs(rng.normal(size=(1, 8))))
    z, p = cp.Variable(8), exponent(kind)
    limits = [cp.norm(z, "inf" if p == math.inf else p) <= eps, low[0] <= z, z <= high[0]]
    best = cp.Problem(cp.Maximize(g[0] @ z), limits).solve(solver=cp.CLARABEL)
    box = (torch.tensor(low), torch.tensor(high))
    step = linear_oracle(torch.tensor(g), kind, eps, box=box)
    assert (step.numpy() * g).sum() == pytest.approx(best, abs=1e-6)


def test_the_linear_oracle_without_a_box_is_the_steepest_step():
    g = torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(0))
    radii = torch.tensor([0.5, 1.0, 2.0])
    assert torch.equal(linear_oracle(g, 3.0, radii), radii[:, None, None] * steepest(g, 3.0))
    with pytest.raises(ValueError, match="within a box"):
        linear_oracle(g, 3.0, 1.0, box=(-torch.ones_like(g), torch.ones_like(g)))


def test_radius_for_each_sample():
    u = torch.randn(3, 1, 2, 5, generator=torch.Generator().manual_seed(0))
    u[:, 0, 0, 0] = 0
    eps = torch.tensor([0.0, 0.5, math.inf])
    for kind in BALLS:
        for box in (None, room(torch.full_like(u, 0.5))):
            z = project(u, kind, eps, box=box)
            alone = torch.cat(
                [
                    project(u[i : i + 1], kind, float(eps[i]), box=box and (box[0][:1], box[1][:1]))
                    for i in range(3)
                ]
            )
            torch.testing.assert_close(z, alone)
            assert (z[0] == 0).all()
            assert torch.equal(z[2], u[2] if box is None else u[2].clamp(-0.5, 0.5))


def test_room_is_what_is_left_of_the_range():
    x = torch.tensor([[0.0, 0.25, 1.0, 1 + 5e-7, -5e-7]])
    low, high = room(x)
    assert low.tolist() == [[0, -0.25, -1, pytest.approx(-1), 0]]
    assert high.tolist() == [[1, 0.75, 0, 0, pytest.approx(1)]]
    low, high = room(x, (-1, 2))
    assert low[0, 1] == -1.25
    assert high[0, 1] == 1.75


# Proximal operators


@few
@given(
    batches(dtypes=[torch.float64]),
    st.sampled_from(SEPARABLE),
    st.booleans(),
    st.sampled_from([0, 1e-4, 0.05, 0.5, 3]),
)
def test_separable_proxes_beat_every_grid_point(batch, kind, boxed, weight):
    u, box, scale = batch
    u, box = u / scale, tuple(b / scale for b in box)
    w = random_metric(u)
    z = prox(u, weight, kind, box=box if boxed else None, metric=w)
    steps = torch.linspace(0, 1, 4001, dtype=u.dtype)[:, None]
    for ui, zi, wi, lo, hi in zip(*(a.flatten() for a in (u, z, w, *box)), strict=True):
        ends = (lo, hi) if boxed else (-ui.abs(), ui.abs())
        assert ends[0] <= zi <= ends[1]
        grid = ends[0] + (ends[1] - ends[0]) * steps
        grid = torch.cat([grid, torch.zeros(1, 1, dtype=u.dtype), zi + 1e-4 * (steps - 0.5)]).clamp(
            *ends
        )
        costs = objective(grid, ui.expand_as(grid), weight, kind, wi.expand_as(grid))
        ours = objective(zi.view(1, 1), ui.view(1, 1), weight, kind, wi.view(1, 1))
        assert ours <= costs.min() + 1e-13 * (1 + costs.max())


@few
@given(
    batches(dtypes=[torch.float64]),
    st.sampled_from(CONVEX),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0.01, 0.3, 2.0]),
)
def test_norms_proxes_are_what_a_solver_finds(batch, kind, boxed, weighted, weight):
    u, box, scale = batch
    u, box = u / scale, tuple(b / scale for b in box)
    w = random_metric(u) if weighted else None
    z = prox(u, weight, kind, box=box if boxed else None, metric=w)
    point, low, high = (a[0].numpy().ravel() for a in (u, *box))
    root = np.ones_like(point) if w is None else w[0].numpy().ravel() ** 0.5
    v = cp.Variable(len(point))
    penalty = {"linf": cp.norm_inf, "l2": cp.norm2, "l1": cp.norm1}[kind](v)
    cost = weight * penalty + cp.sum_squares(cp.multiply(root, v - point)) / 2
    cp.Problem(cp.Minimize(cost), [low <= v, v <= high] if boxed else []).solve(solver=cp.CLARABEL)
    best = torch.tensor(v.value).view_as(u[:1])
    if boxed:
        assert ((box[0] <= z) & (z <= box[1])).all()
        best = best.clamp(box[0][:1], box[1][:1])
    metric = None if w is None else w[:1]
    ours, theirs = (objective(a, u[:1], weight, kind, metric) for a in (z[:1], best))
    assert ours <= theirs + 1e-12 * (1 + theirs)
    assert (z[:1] - best).abs().max() < 1e-3


@few
@given(
    batches(dtypes=[torch.float64]), st.sampled_from(PENALTIES), st.sampled_from([0.02, 0.2, 1.0])
)
def test_proxes_beat_a_grid_of_the_plane(batch, kind, weight):
    u, box, scale = batch
    w = random_metric(u)
    corner = [
        (a.flatten()[:2].repeat(2)[:2] / s).view(1, 2, 1, 1)
        for a, s in ((u, scale), (box[0], scale), (box[1], scale), (w, 1))
    ]
    point, low, high, w = corner
    ours = objective(prox(point, weight, kind, box=(low, high), metric=w), point, weight, kind, w)
    axes = [
        torch.cat(
            [
                torch.linspace(low[0, i, 0, 0], high[0, i, 0, 0], 201).double(),
                torch.zeros(1).double(),
            ]
        )
        for i in (0, 1)
    ]
    grid = torch.cartesian_prod(*axes)[:, :, None, None]
    costs = objective(grid, point.expand_as(grid), weight, kind, w.expand_as(grid))
    assert ours <= costs.min() + 1e-9 * (1 + costs.max())


@few
@given(
    batches(axes=st.just((3, 2, 2)), dtypes=[torch.float64]),
    st.booleans(),
    st.sampled_from([0.0, 0.1, 0.5, 2.0]),
)
def test_group_l0_is_the_best_set_of_pixels(batch, boxed, weight):
    u, box, scale = batch
    u, box, w = u / scale, tuple(b / scale for b in box), random_metric(u)
    z = prox(u, weight, "group_l0", box=box if boxed else None, metric=w)
    clipped = u.clamp(*box) if boxed else u
    sets = torch.cartesian_prod(*[torch.tensor([0.0, 1.0]).double()] * 4).view(16, 1, 2, 2)
    for i in range(len(u)):
        costs = objective(
            sets * clipped[i],
            u[i].expand(16, 3, 2, 2),
            weight,
            "group_l0",
            w[i].expand(16, 3, 2, 2),
        )
        assert (
            objective(z[i : i + 1], u[i : i + 1], weight, "group_l0", w[i : i + 1])
            <= costs.min() + 1e-12
        )


def test_l2_in_a_metric_is_stationary_and_zero_below_its_threshold():
    u = torch.randn(2, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    w, box = random_metric(u), room(torch.full_like(u, 0.5), (-9.0, 9.0))
    box[0][:, 0] = box[1][:, 0] = 0  # an entry that cannot move has no say
    threshold = (w * u)[:, 1:].norm(dim=1)
    assert (prox(u, threshold * (1 + 1e-12), "l2", box=box, metric=w) == 0).all()
    assert (prox(u, threshold * (1 - 1e-6), "l2", box=box, metric=w) != 0).any(1).all()
    z = prox(u, threshold / 3, "l2", box=box, metric=w)[:, 1:]
    pull, unit = (w * u)[:, 1:] - w[:, 1:] * z, z / z.norm(dim=1, keepdim=True)
    torch.testing.assert_close(pull, threshold[:, None] / 3 * unit, rtol=1e-13, atol=1e-14)


def test_group_l0_of_single_channels_is_l0():
    u = torch.randn(2, 1, 5, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(prox(u, 0.3, "group_l0"), prox(u, 0.3, "l0"))
    torch.testing.assert_close(prox(u.flatten(1), 0.3, "group_l0"), prox(u, 0.3, "l0").flatten(1))


@few
@given(batches(), st.sampled_from(CONVEX), st.sampled_from([0, 1e-3, 0.5, 2, 100]))
def test_moreau(batch, kind, weight):
    """prox of a norm is what remains after projecting onto the dual ball of radius lambda."""
    u, _, scale = batch
    lam = weight * scale
    dual = {"linf": "l1", "l2": "l2", "l1": "linf"}[kind]
    rest = prox(u, lam, kind) + project(u, dual, lam) - u
    assert rest.flatten(1).abs().amax(1).le(2 * ROUNDING[u.dtype] * size(u)).all()


@few
@given(batches(), st.sampled_from(CONVEX), st.booleans())
def test_norms_proxes_never_expand(batch, kind, boxed):
    u, box, scale = batch
    other, limits = u.flip(0) * 0.7 + scale, box if boxed else None
    moved = (prox(u, scale, kind, box=limits) - prox(other, scale, kind, box=limits)).double()
    before = (u.double() - other.double()).flatten(1).norm(dim=1)
    assert (
        moved.flatten(1).norm(dim=1) <= before + 4 * ROUNDING[u.dtype] * (size(u) + size(other))
    ).all()


@few
@given(
    batches(dtypes=[torch.float32]),
    st.sampled_from(PENALTIES),
    st.booleans(),
    st.sampled_from([0, 1e-4, 0.3, 1e8]),
)
def test_single_precision_costs_no_more_than_rounding(batch, kind, boxed, weight):
    """The objective is float64's at any scale; the points may differ where two tie."""
    u, box, scale = batch
    homogeneous = {"linf": 1, "l2": 1, "group_l0": 2}.get(kind, 2 - POWERS.get(kind, 0))
    lam = float(np.float32(weight * scale**homogeneous))
    if not np.isfinite(lam):
        return
    w, limits = random_metric(u), box if boxed else None
    z = prox(u, lam, kind, box=limits, metric=w)
    assert z.isfinite().all()
    wide = box and tuple(b.double() for b in box)
    exact = prox(u.double(), lam, kind, box=wide if boxed else None, metric=w.double())
    ours, best = (objective(a, u, lam, kind, w) for a in (z, exact))
    floor = objective(torch.zeros_like(u), u, lam, kind, w)
    assert (ours <= best + 1e-5 * floor).all()


@few
@given(batches(), st.sampled_from(PENALTIES), st.booleans())
def test_weights_zero_and_infinite(batch, kind, boxed):
    u, box, _ = batch
    for w in (None, random_metric(u)):
        free = prox(u, 0.0, kind, box=box if boxed else None, metric=w)
        torch.testing.assert_close(free, u.clamp(*box) if boxed else u, rtol=1e-6, atol=0)
        for lam in (1e30, math.inf):
            assert (prox(u, lam, kind, box=box if boxed else None, metric=w) == 0).all()


def test_weight_for_each_sample():
    u = torch.randn(3, 3, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    lam = torch.tensor([0.0, 0.2, 5.0], dtype=torch.float64)
    low, high = room(torch.full_like(u, 0.5))
    for kind in PENALTIES:
        z = prox(u, lam, kind, box=(low, high), metric=random_metric(u))
        for i in range(3):
            part = slice(i, i + 1)
            alone = prox(
                u[part],
                float(lam[i]),
                kind,
                box=(low[part], high[part]),
                metric=random_metric(u)[part],
            )
            torch.testing.assert_close(z[part], alone)


def test_thresholds_and_jumps_are_the_published_ones():
    lam, signs = 0.3, torch.tensor([[1, -1]], dtype=torch.float64)
    known = {
        "l0": (math.sqrt(2 * lam),) * 2,
        "l1/2": (1.5 * lam ** (2 / 3), lam ** (2 / 3)),
        "l2/3": (2 * (2 * lam / 3) ** 0.75, (2 * lam / 3) ** 0.75),
        "l1": (lam, 0),
    }
    for kind, (threshold, jump) in known.items():
        below, above = (threshold * (1 + s) * signs for s in (-1e-9, 1e-9))
        assert (prox(below, lam, kind) == 0).all()
        torch.testing.assert_close(
            prox(above, lam, kind), torch.tensor([[jump, -jump]]).double(), rtol=1e-7, atol=1e-8
        )


@pytest.mark.parametrize("kind", ["l0", "group_l0"])
def test_of_two_minimizers_it_is_zero(kind):
    assert prox(torch.tensor([[2.0, -2.0, 2.5]]), 2.0, kind).tolist() == [[0, 0, 2.5]]


@pytest.mark.parametrize("lam", [1e-4, 0.3, 7.0])
def test_power_proxes_are_the_closed_forms(lam):
    u = np.linspace(1.001, 30, 500) * 2 * (2 * lam / 3) ** 0.75
    phi = np.arccosh(27 * u**2 / 16 * (2 * lam) ** -1.5)
    a = 2 / np.sqrt(3) * (2 * lam) ** 0.25 * np.sqrt(np.cosh(phi / 3))
    two_thirds = ((a + np.sqrt(2 * u / a - a**2)) / 2) ** 3
    v = np.linspace(1.001, 30, 500) * 1.5 * lam ** (2 / 3)
    half = 2 / 3 * v * (1 + np.cos(2 / 3 * np.arccos(-3 * np.sqrt(3) / 4 * lam * v**-1.5)))
    for dtype, rtol in ((torch.float64, 1e-13), (torch.float32, 1e-6)):
        for kind, point, expected in (("l2/3", u, two_thirds), ("l1/2", v, half)):
            ours = prox(torch.tensor(-point, dtype=dtype)[None], lam, kind)
            np.testing.assert_allclose(-ours[0].double().numpy(), expected, rtol=rtol)


def test_other_powers_lie_between_l0_and_l1():
    u = torch.linspace(-3, 3, 41, dtype=torch.float64)[None]
    torch.testing.assert_close(prox_power(u, 0.5, 1 - 1e-9), prox(u, 0.5, "l1"), rtol=0, atol=1e-6)
    torch.testing.assert_close(prox_power(u, 0.5, 1e-9), prox(u, 0.5, "l0"), rtol=0, atol=1e-6)


# Devices, and bad input


def everything(u, low, high, w):
    """Each public function once, on the tensors given."""
    lam = w.flatten(1)[:, 0]
    results = [norm(u, k) for k in ("linf", 1.5, "l0")] + [pixels(u), dual_norm(u, "linf")]
    results += [steepest(u, p) for p in (1, 1.01, 2, 3.5, math.inf)] + list(room(u.sigmoid()))
    for box in (None, (low, high)):
        results += [project(u, k, e, box=box) for k in BALLS for e in (0.5, lam)]
        pairs = ((0.5, None), (lam, w))
        results += [prox(u, e, k, box=box, metric=m) for k in PENALTIES for e, m in pairs]
    return results


def inputs(device="cpu"):
    rng = torch.Generator().manual_seed(0)
    u = torch.randn(4, 3, 5, 5, generator=rng)
    low, high = room(torch.rand(u.shape, generator=rng))
    return [a.to(device) for a in (u, low, high, random_metric(u))]


def test_nothing_reads_a_value_back():
    """The meta device has shapes, no values: .item(), bool(), data-dependent shapes fail there."""
    for result, real in zip(everything(*inputs("meta")), everything(*inputs()), strict=True):
        assert result.device.type == "meta"
        assert (result.shape, result.dtype) == (real.shape, real.dtype)


def test_inputs_are_left_alone_and_any_layout_will_do():
    before, after = inputs(), inputs()
    straight = everything(*after)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    strided = [a.to(memory_format=torch.channels_last) for a in before]
    for a, b in zip(straight, everything(*strided), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.cuda
def test_cuda_agrees_and_never_waits():
    here = everything(*inputs())
    everything(*inputs("cuda"))
    arguments = inputs("cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        there = everything(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(here, there, strict=True):
        torch.testing.assert_close(a, b.cpu(), rtol=1e-5, atol=1e-6)


U = torch.zeros(2, 3)
BAD_VALUES = [
    lambda: exponent("l3"),
    lambda: exponent("l0"),
    lambda: exponent(0.5),
    lambda: exponent(math.nan),
    lambda: dual_norm(U, "l0"),
    lambda: steepest(U, "l0"),
    lambda: steepest(torch.zeros(3), "l2"),
    lambda: norm(torch.zeros(3, 0), "l2"),
    lambda: project(U, 3.0, 1.0),
    lambda: project(U, "l0", 1.0),
    lambda: project(U, "l2", -0.1),
    lambda: project(U, "l2", math.nan),
    lambda: project(U, "l2", torch.ones(3)),
    lambda: project(U, "l2", torch.ones(2, 1)),
    lambda: project(U, "l2", 1.0, box=(torch.zeros(3), torch.ones(3))),
    lambda: project(U, "l2", 1.0, box=(U, torch.ones(2, 4))),
    lambda: project(U, "l2", 1.0, box=(U.double(), U.double())),
    lambda: project(U, "l2", torch.ones(2, device="meta")),
    lambda: prox(U, -1.0, "l1"),
    lambda: prox(U, math.nan, "l1"),
    lambda: prox(U, 1.0, "l3"),
    lambda: prox(U, 1.0, "l1", metric=torch.ones(3, 2)),
    lambda: prox_power(U, 1.0, 1.0),
    lambda: prox_power(U, 1.0, math.nan),
    lambda: room(U, (1, 0)),
    lambda: room(U, (0, 1, 2)),
]
BAD_TYPES = [
    lambda: exponent(None),
    lambda: exponent(True),
    lambda: norm(torch.zeros(2, 3, dtype=torch.int64), "l2"),
    lambda: norm([[1.0]], "l2"),
    lambda: project(U, "l2", "1"),
    lambda: project(U, "l2", True),
    lambda: project(U, "l2", torch.ones(2, dtype=torch.int64)),
    lambda: project(U, "l2", 1.0, box=torch.zeros(2, 2, 3)),
    lambda: prox(U, None, "l1"),
    lambda: prox(U, 1.0, "l1", metric=2.0),
]


@pytest.mark.parametrize("call", BAD_VALUES)
def test_bad_values_are_refused(call):
    with pytest.raises(ValueError, match=r"must|expected|projections"):
        call()


@pytest.mark.parametrize("call", BAD_TYPES)
def test_bad_types_are_refused(call):
    with pytest.raises(TypeError, match=r"must|expected"):
        call()


def test_the_public_names_exist():
    assert all(hasattr(geometry, name) for name in geometry.__all__)
