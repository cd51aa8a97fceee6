"""Derivatives through an argmin, against solved systems and finite differences."""

import math

import pytest
import torch
from helpers import inputs

from adv.attacks.argmin import WarmStart, implicit_gradient, neumann_gradient, unroll


def filtered(world, z, x, v, steps, eta):
    """The Neumann series by hand, with explicit matrices."""
    rows = []
    for one in zip(z, x, v, strict=True):
        H, M = world.jacobians(*one[:2])
        A = torch.eye(len(H), dtype=H.dtype) - eta * H
        series = sum((torch.linalg.matrix_power(A, t) for t in range(steps)), torch.zeros_like(H))
        rows.append(-eta * M.T @ series @ one[2])
    return torch.stack(rows)


def test_the_implicit_gradient_is_that_of_the_solver(scene):
    world, z, x, v = scene
    found = implicit_gradient(world.inner, z, x, v)
    step, eye = 1e-5, torch.eye(6, dtype=torch.float64)
    slopes = []
    for e in eye:
        ends = [(world.solve(x + s * step * e, z) * v).sum(dim=1) for s in (1, -1)]
        slopes.append((ends[0] - ends[1]) / (2 * step))
    assert torch.allclose(found.gradient, torch.stack(slopes, 1), rtol=1e-7, atol=1e-8)
    assert found.products <= 4, "three dimensions take three products"
    assert found.residual.max() < 1e-6
    least = [torch.linalg.eigvalsh(world.jacobians(*p)[0])[0] for p in zip(z, x, strict=True)]
    assert torch.all(found.curvature >= torch.stack(least) - 1e-9)


def test_damping_and_iterations_do_what_they_say(scene):
    world, z, x, v = scene
    damped = implicit_gradient(world.inner, z, x, v, damping=0.5).gradient
    for i in range(2):
        H, M = world.jacobians(z[i], x[i])
        u = torch.linalg.solve(H + 0.5 * torch.eye(3, dtype=H.dtype), v[i])
        assert torch.allclose(damped[i], -M.T @ u, atol=1e-6)
    early = implicit_gradient(world.inner, z, x, v, iterations=1)
    assert early.products == 1
    assert early.residual.min() > 1e-3
    nothing = implicit_gradient(world.inner, z, x, torch.zeros_like(v))
    assert (nothing.products, nothing.gradient.abs().max()) == (0, 0)


@pytest.mark.parametrize("tolerance", [1e-1, 1e-3, 1e-6])
def test_conjugate_gradients_go_on_to_the_tolerance_and_no_further(tolerance):
    """In 30 dimensions, where they don't end by themselves before."""
    bends = torch.linspace(1, 30, 30, dtype=torch.float64)
    inner = lambda z, x: 0.5 * (bends * z * z).sum(dim=1) - (z * x).sum(dim=1)  # noqa: E731
    x, v = inputs(1, 30), inputs(1, 30, seed=3)
    rule = {"tolerance": tolerance}
    found = implicit_gradient(inner, x / bends, x, v, **rule)
    assert found.residual.item() <= tolerance
    early = implicit_gradient(inner, x / bends, x, v, iterations=found.products - 1, **rule)
    assert early.residual.item() > tolerance
    assert (found.gradient - v / bends).norm() <= tolerance * v.norm()


def test_indefinite_problems_are_told():
    H = torch.diag(torch.tensor([1.0, -0.5], dtype=torch.float64))
    inner = lambda z, x: 0.5 * ((z @ H) * z).sum(dim=1) - (z * x).sum(dim=1)  # noqa: E731
    zero = torch.zeros(2, 2, dtype=torch.float64)
    v = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    found = implicit_gradient(inner, zero, zero, v)
    assert torch.allclose(found.curvature, torch.tensor([-0.5, 1.0], dtype=torch.float64))
    assert torch.allclose(found.gradient, v), "down where it bends, solved where it doesn't"
    assert torch.allclose(found.residual[1], torch.zeros(1, dtype=torch.float64))


@pytest.mark.parametrize("steps", [0, 1, 2, 7])
def test_unrolling_from_the_minimizer_is_the_neumann_series(scene, steps):
    world, z, x, v = scene
    expected = filtered(world, z, x, v, steps, 0.05)
    found = neumann_gradient(world.inner, z, x, v, steps=steps, step_size=0.05)
    assert torch.allclose(found, expected, atol=1e-13)
    w = x.clone().requires_grad_()
    end = unroll(world.inner, z, w, steps=steps, step_size=0.05)
    assert torch.allclose(end, z, atol=1e-12), "nothing moves"
    if steps:
        (g,) = torch.autograd.grad((end * v).sum(), w)
        assert torch.allclose(g, expected, atol=1e-11)
    else:
        assert not end.requires_grad


def test_unrolling_elsewhere_is_gradient_descent(scene):
    world, z, x, _ = scene
    far = z + 0.2
    by_hand = far
    for _ in range(5):
        by_hand = by_hand - 0.05 * world.slope(by_hand, x)
    with torch.no_grad():
        end = unroll(world.inner, far, x.clone().requires_grad_(), steps=5, step_size=0.05)
    assert torch.allclose(end, by_hand, atol=1e-14)
    assert not end.requires_grad


def test_only_the_image_itself_decides(scene):
    """Gradients of a batch are those of its samples alone."""
    world, z, x, v = scene
    both = implicit_gradient(world.inner, z, x, v, tolerance=1e-12).gradient
    alone = torch.cat(
        [
            implicit_gradient(world.inner, *(t[i : i + 1] for t in (z, x, v)), tolerance=1e-12)[0]
            for i in range(2)
        ]
    )
    assert torch.allclose(both, alone, atol=1e-10)


def test_a_warm_solver_starts_at_the_better_of_two_answers():
    log = []

    def solve(x):
        log.append(("full", len(x)))
        return torch.zeros(len(x), 1, dtype=x.dtype)

    def refine(z, x):
        log.append(("warm", z.flatten().tolist()))
        return z + 10

    inner = lambda z, x: (z - x).square().sum(dim=1)  # noqa: E731
    warm, x = WarmStart(solve, refine, inner, far=15.0), inputs(2, 1)
    warm(x[:1] + 1)
    assert warm(x).flatten().tolist() == [0, 0]
    assert warm(x).flatten().tolist() == [10, 10]
    warm(torch.tensor([[9.0], [0.0]], dtype=torch.float64))
    warm(torch.full((2, 1), 14.0, dtype=torch.float64))
    warm(torch.tensor([[9.0], [9.0], [19.0], [19.0]], dtype=torch.float64))
    warm(torch.full((2, 1), 19.0, dtype=torch.float64))
    assert log == [
        ("full", 1),
        ("full", 2),
        ("warm", [0, 0]),
        ("warm", [10, 0]),
        ("warm", [20, 10]),
        ("warm", [0, 0, 30, 20]),
        ("warm", [30, 20]),
    ]
    warm.reset()
    warm(x)
    assert log[-1] == ("full", 2)


def test_a_warm_solver_knows_its_inputs_by_where_they_are():
    log = []
    solve = lambda x: log.append(len(x)) or x.clone()  # noqa: E731
    warm = WarmStart(solve, lambda z, x: z, lambda z, x: (z - x).square().sum(dim=1))
    x = inputs(3, 6)
    for step in range(5):
        warm(x + 0.049 * step)
    warm(x)
    assert log == [3], "steps, and a round that begins where the first one did"
    far = x.clone()
    far[1] += 0.051
    assert torch.equal(warm(far), far)
    warm(inputs(3, 6, seed=2))
    assert log == [3, 3, 3], "one sample elsewhere makes a new batch"
    warm(far)
    assert log == [3, 3, 3, 3], "the first inputs are now those of another batch"
    any_batch = WarmStart(solve, lambda z, x: z, warm.inner, far=math.inf)
    any_batch(x)
    any_batch(x + 9)
    assert len(log) == 5


X = inputs(2, 4)
FLAT = lambda z, x: (z - x).square().sum(dim=1)  # noqa: E731


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: unroll(FLAT, X, X, steps=-1, step_size=0.1), ValueError),
        (lambda: unroll(FLAT, X, X, steps=None, step_size=0.1), TypeError),
        (lambda: WarmStart(torch.clone, FLAT, FLAT, reach=-1.0), ValueError),
        (lambda: WarmStart(torch.clone, FLAT, FLAT, far=-1.0), ValueError),
        (lambda: unroll(FLAT, X, X, steps=1, step_size=0.0), ValueError),
        (lambda: neumann_gradient(FLAT, X, X, X, steps=1, step_size=-1.0), ValueError),
        (lambda: neumann_gradient(FLAT, X, X, X[:1], steps=1, step_size=0.1), ValueError),
        (lambda: implicit_gradient(FLAT, X, X, X[:, :2]), ValueError),
        (lambda: implicit_gradient(FLAT, X, X, X, iterations=0), ValueError),
        (lambda: implicit_gradient(FLAT, X, X, X, tolerance=-1.0), ValueError),
    ],
)
def test_bad_settings_are_refused(call, error):
    with pytest.raises(error):
        call()


@pytest.mark.parametrize(
    "call", [unroll, lambda z, x, v, **rule: neumann_gradient(z, x, v, v, **rule)]
)
def test_messages_name_what_was_given(call):
    with pytest.raises(ValueError, match=r"^steps is an integer >= 0, not -1"):
        call(FLAT, X, X, steps=-1, step_size=0.1)
