"""Sparse signals and linear encoders: closed forms, cvxpy, projected gradients, brute force."""

import itertools
import math

import cvxpy as cp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adv.theory.sensing import (
    FourierSignals,
    coherence,
    gaussian_encoder,
    guaranteed_sparsity,
    isometry,
    linear_attack,
    matched,
    smallest_l1,
    sparsest,
    welch_bound,
)

SIGNALS = FourierSignals()


def pairs(rows, columns, count, seed):
    draws = torch.Generator().manual_seed(seed)
    x = torch.randn(2, count, columns, generator=draws, dtype=torch.float64)
    return gaussian_encoder(rows, columns, seed), x[0], x[1]


# ------------------------------------------------------------------------------------- the signals


def test_the_dictionary_is_the_products_of_cosines():
    n, d = SIGNALS.size, SIGNALS.dictionary
    assert d.shape == (784, 225)
    for u, v, i, j in ((0, 0, 3, 4), (1, 0, 5, 9), (3, 14, 27, 2), (14, 14, 1, 1)):
        wave = math.cos(2 * math.pi * u * i / n) * math.cos(2 * math.pi * v * j / n)
        assert d[i * n + j, u * 15 + v].item() == pytest.approx(wave, abs=1e-12)
    gram = d.T @ d
    lengths = gram.diagonal()
    assert (gram - lengths.diag()).abs().max() < 1e-10
    assert sorted({round(v) for v in lengths.tolist()}) == [196, 392, 784]


def test_allowed_frequencies_vary_along_one_axis():
    images = SIGNALS.images(torch.eye(225, dtype=torch.float64)[SIGNALS.allowed])[:, 0]
    rows, columns = images.var(dim=1).amax(dim=1) > 1e-9, images.var(dim=2).amax(dim=1) > 1e-9
    assert len(images) == 28
    assert (rows ^ columns).all()


def test_samples_have_the_patterns_and_the_amplitudes():
    x = SIGNALS.sample(500, seed=3)
    known = {tuple(row) for row in SIGNALS.supports.sort(dim=1).values.tolist()}
    assert len(known) == 200
    found = [tuple(row.nonzero()[:, 0].tolist()) for row in x]
    assert set(found) <= known
    assert len(set(found)) > 150
    values = x[x != 0]
    assert values.min() > 1.6
    assert values.max() < 4.8
    assert values.mean().item() == pytest.approx(3.2, abs=0.1)
    assert torch.equal(x, SIGNALS.sample(500, seed=3))


def test_another_seed_is_another_draw():
    for draw in (
        lambda seed: FourierSignals(seed=seed).supports,
        lambda seed: SIGNALS.sample(9, seed),
        lambda seed: gaussian_encoder(3, 5, seed),
    ):
        assert torch.equal(draw(4), draw(4))
        assert not torch.equal(draw(4), draw(5))


@pytest.mark.parametrize(
    "bad", [{"size": 27}, {"size": 0}, {"active": 0}, {"active": 29}, {"patterns": 0}]
)
def test_impossible_signals(bad):
    with pytest.raises(ValueError, match="must be"):
        FourierSignals(**bad)


def test_no_more_patterns_than_there_are():
    with pytest.raises(ValueError, match=r"1\.\.6, not 7"):
        FourierSignals(size=4, active=2, patterns=7)
    assert len(FourierSignals(size=4, active=2, patterns=6).supports) == 6


# ------------------------------------------------------------------------------------ the promises


def test_coherence_by_loops():
    phi = gaussian_encoder(5, 9, seed=1)
    cosines = [
        abs(float(a @ b) / float(a.norm() * b.norm())) for a, b in itertools.combinations(phi.T, 2)
    ]
    assert coherence(phi).item() == pytest.approx(max(cosines), rel=1e-12)
    assert coherence(torch.stack([phi, 3 * phi])).tolist() == pytest.approx([max(cosines)] * 2)


@pytest.mark.parametrize("phi", [torch.ones(3, 1), torch.tensor([[1.0, 0.0], [1.0, 0.0]])])
def test_coherence_refuses(phi):
    with pytest.raises(ValueError, match="two or more columns"):
        coherence(phi)
    with pytest.raises(ValueError, match="finite"):
        coherence(torch.full((3, 3), math.nan))


def test_coherence_is_at_most_one_whatever_the_rounding():
    draws = torch.Generator().manual_seed(0)
    column = torch.rand(500, 7, 1, generator=draws, dtype=torch.float64)
    twins = torch.cat([column, 3 * column], dim=2)
    assert coherence(twins).max() == 1
    assert {guaranteed_sparsity(float(mu)) for mu in coherence(twins)} == {0}
    assert {guaranteed_sparsity(float(mu)) for mu in coherence(twins.float())} == {0}


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(2, 12), more=st.integers(1, 20), seed=st.integers(0, 99))
def test_welch_bounds_every_matrix(rows, more, seed):
    phi = gaussian_encoder(rows, rows + more, seed)
    assert coherence(phi) >= welch_bound(rows, rows + more) - 1e-12


def test_welch_is_reached_by_an_equiangular_frame():
    angles = torch.arange(3, dtype=torch.float64) * 2 * math.pi / 3
    frame = torch.stack([angles.cos(), angles.sin()])
    assert coherence(frame).item() == pytest.approx(welch_bound(2, 3), abs=1e-12)
    assert welch_bound(50, 225) == pytest.approx(0.125, abs=1e-15)
    assert welch_bound(5, 5) == 0
    for rows, columns in ((0, 5), (5, 0), (-1, 5)):
        with pytest.raises(ValueError, match="at least 1"):
            welch_bound(rows, columns)


@pytest.mark.parametrize(
    ("mu", "most"), [(1, 0), (0.99, 1), (1 / 3, 1), (0.33, 2), (1 / 9, 4), (0.11, 5)]
)
def test_guaranteed_sparsity_is_strict(mu, most):
    assert guaranteed_sparsity(mu) == most


def test_rounding_proves_nothing_more():
    # (1 + 49) / 2 = 25 is no K below itself; nor is any other with an odd 1 / mu.
    for odd in range(1, 200, 2):
        for mu in (1 / odd, np.nextafter(1 / odd, 0), float(np.float32(1 / odd))):
            assert guaranteed_sparsity(min(mu, 1.0)) == (odd - 1) // 2
        assert guaranteed_sparsity(0.9999 / odd) == (odd + 1) // 2


@pytest.mark.parametrize("mu", [0, -0.1, 1.1, math.nan])
def test_guaranteed_sparsity_refuses(mu):
    with pytest.raises(ValueError, match="mu must be"):
        guaranteed_sparsity(mu)


def test_isometry_by_the_grammian():
    phi = gaussian_encoder(50, 225, seed=0)
    low, high = isometry(phi, SIGNALS.supports[:6])
    for support, a, b in zip(SIGNALS.supports, low, high, strict=False):
        eigenvalues = torch.linalg.eigvalsh(phi[:, support].T @ phi[:, support])
        assert a.item() == pytest.approx(eigenvalues[0].item(), rel=1e-10)
        assert b.item() == pytest.approx(eigenvalues[-1].item(), rel=1e-10)
    wide = isometry(gaussian_encoder(3, 9, seed=0), torch.arange(8).reshape(2, 4))
    assert wide[0].tolist() == [0, 0]


def test_l1_is_what_cvxpy_finds():
    phi, x, _ = pairs(8, 20, 1, seed=2)
    y = phi @ x[0]
    z = cp.Variable(20)
    problem = cp.Problem(cp.Minimize(cp.norm1(z)), [phi.numpy() @ z == y.numpy()])
    problem.solve(solver=cp.CLARABEL)
    mine = smallest_l1(phi, y)
    assert (phi @ mine - y).abs().max() < 1e-8
    assert mine.abs().sum().item() == pytest.approx(problem.value, rel=1e-6)


def test_sparsest_by_all_supports():
    phi = gaussian_encoder(6, 12, seed=5)
    x = torch.zeros(12, dtype=torch.float64)
    x[[2, 7]] = torch.tensor([1.5, -2.0], dtype=torch.float64)
    y = phi @ x
    fits = [
        size
        for size in range(7)
        for support in itertools.combinations(range(12), size)
        if np.linalg.norm(
            phi[:, support].numpy() @ np.linalg.lstsq(phi[:, support].numpy(), y.numpy())[0]
            - y.numpy()
        )
        < 1e-9
    ]
    found = sparsest(phi, y, bound=4.0)
    assert int((found != 0).sum()) == min(fits) == 2
    assert (found - x).abs().max() < 1e-10


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e6])
def test_small_coefficients_are_found_or_their_loss_is_said(scale):
    phi = gaussian_encoder(6, 12, seed=5)
    x = torch.zeros(12, dtype=torch.float64)
    x[[2, 7]] = scale * torch.tensor([1.5, 1e-4], dtype=torch.float64)
    assert (sparsest(phi, phi @ x, bound=4 * scale) - x).abs().max() < 1e-10 * scale
    with pytest.raises(ValueError, match="give a tighter one"):
        sparsest(phi, phi @ x, bound=1e4 * scale)
    assert (sparsest(phi, 0 * phi @ x, bound=scale) == 0).all()


@pytest.mark.parametrize("bound", [0.0, -1.0, math.nan, math.inf])
def test_bad_bounds(bound):
    with pytest.raises(ValueError, match="bound must be"):
        sparsest(torch.eye(2), torch.ones(2), bound=bound)


def test_no_solution_is_said():
    phi = torch.tensor([[1.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    y = torch.tensor([1.0, 2.0], dtype=torch.float64)
    with pytest.raises(ValueError, match="no signal"):
        smallest_l1(phi, y)
    with pytest.raises(ValueError, match="no sparsest"):
        sparsest(phi, y, bound=9.0)
    with pytest.raises(ValueError, match="no sparsest"):
        sparsest(torch.eye(2, dtype=torch.float64), y, bound=9.0, most=1)


# -------------------------------------------------------------------------------------- the attack


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 12),
    share=st.floats(0.001, 1.5),
    seed=st.integers(0, 99),
)
def test_the_attack_satisfies_its_conditions(rows, columns, share, seed):
    """Karush-Kuhn-Tucker: stationary, within the budget, and no multiplier where it has slack."""
    phi, x_s, x_t = pairs(rows, columns, 4, seed)
    eps = share * float((x_t - x_s).norm(dim=1).mean())
    attack = linear_attack(phi, x_s, x_t, eps=eps)
    rest = (x_s + attack.delta - x_t) @ phi.T @ phi
    scale = 1 + attack.lam[:, None] * eps
    assert ((rest + attack.lam[:, None] * attack.delta).abs() / scale).max() < 1e-8
    size = attack.delta.norm(dim=1)
    assert (size <= eps * (1 + 1e-12)).all()
    active = attack.lam > 0
    assert ((size - eps).abs()[active] <= 1e-12 * eps).all()
    assert (attack.lam >= 0).all()


def test_the_attack_is_what_projected_gradients_find():
    phi, x_s, x_t = pairs(10, 30, 5, seed=7)
    eps = 1.5
    step = 1 / float(torch.linalg.matrix_norm(phi, 2)) ** 2
    delta = torch.zeros_like(x_s)
    for _ in range(3000):
        delta = delta - step * (x_s + delta - x_t) @ phi.T @ phi
        delta = delta * (eps / delta.norm(dim=1, keepdim=True)).clamp_max(1)
    assert (linear_attack(phi, x_s, x_t, eps=eps).delta - delta).abs().max() < 1e-10


def test_the_attack_and_its_multiplier_are_what_cvxpy_finds():
    phi, x_s, x_t = pairs(6, 15, 1, seed=8)
    delta = cp.Variable(15)
    ball = cp.sum_squares(delta) <= 0.5**2
    misfit = cp.sum_squares(phi.numpy() @ (delta + (x_s - x_t)[0].numpy()))
    cp.Problem(cp.Minimize(misfit), [ball]).solve(solver=cp.CLARABEL, tol_gap_rel=1e-12)
    attack = linear_attack(phi, x_s, x_t, eps=0.5)
    assert np.abs(attack.delta[0].numpy() - delta.value).max() < 1e-5
    assert attack.lam.item() == pytest.approx(ball.dual_value.item(), rel=1e-4)


def test_parts_and_limits():
    phi, x_s, x_t = pairs(5, 12, 3, seed=9)
    d = x_t - x_s
    rows = torch.linalg.pinv(phi) @ phi
    attack = linear_attack(phi, x_s, x_t, lam=0.3)
    direct = torch.linalg.solve(phi.T @ phi + 0.3 * torch.eye(12).double(), phi.T @ phi)
    assert (attack.source + x_s @ direct).abs().max() < 1e-12
    assert (attack.target - x_t @ direct).abs().max() < 1e-12
    assert (matched(phi, 0.3) - direct).abs().max() < 1e-12
    assert (matched(phi, 0.0) - rows).abs().max() < 1e-12
    assert (linear_attack(phi, x_s, x_t, lam=0).delta - d @ rows).abs().max() < 1e-12
    enough = linear_attack(phi, x_s, x_t, eps=float((d @ rows).norm(dim=1).max()) + 0.1)
    assert enough.lam.tolist() == [0, 0, 0]
    assert ((x_s + enough.delta - x_t) @ phi.T).abs().max() < 1e-12
    far = linear_attack(phi, x_s, x_t, lam=1e9).delta * 1e9
    assert (far - d @ phi.T @ phi).abs().max() < 1e-5


def test_dependent_rows_and_equal_signals():
    phi, x_s, x_t = pairs(2, 6, 2, seed=3)
    phi = torch.cat([phi, phi[:1]])
    x_t[1] = x_s[1]
    attack = linear_attack(phi, x_s, x_t, eps=0.1)
    assert attack.delta.norm(dim=1).tolist() == pytest.approx([0.1, 0])
    assert attack.lam[1] == 0
    assert torch.linalg.matrix_rank(matched(phi, 0.0)) == 2


def test_an_encoder_of_zeros_needs_no_attack():
    _, x_s, x_t = pairs(3, 5, 2, seed=0)
    for wish in ({"eps": 0.5}, {"lam": 0.0}, {"lam": 2.0}):
        attack = linear_attack(torch.zeros(3, 5).double(), x_s, x_t, **wish)
        assert (attack.delta == 0).all()
        assert attack.lam.tolist() == [wish.get("lam", 0.0)] * 2


def test_values_that_are_not_finite():
    phi, x_s, x_t = pairs(3, 5, 2, seed=0)
    for bad in (math.nan, math.inf):
        for which in range(3):
            parts = [phi.clone(), x_s.clone(), x_t.clone()]
            parts[which][1, 2] = bad
            with pytest.raises(ValueError, match="must be finite"):
                linear_attack(*parts, eps=1.0)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({}, "either eps"),
        ({"eps": 1.0, "lam": 1.0}, "either eps"),
        ({"eps": 0.0}, "eps must be positive"),
        ({"eps": math.nan}, "eps must be positive"),
        ({"eps": math.inf}, "eps must be positive"),
        ({"lam": -1.0}, "lam must be finite"),
        ({"lam": math.nan}, "lam must be finite"),
    ],
)
def test_bad_budgets(bad, says):
    phi, x_s, x_t = pairs(3, 5, 2, seed=0)
    with pytest.raises(ValueError, match=says):
        linear_attack(phi, x_s, x_t, **bad)


def test_bad_shapes():
    phi, x_s, x_t = pairs(3, 5, 2, seed=0)
    for one, other in ((x_s[0], x_t[0]), (x_s[:, :4], x_t[:, :4]), (x_s, x_t[:1])):
        with pytest.raises(ValueError, match="sources and targets"):
            linear_attack(phi, one, other, eps=1.0)
    with pytest.raises(ValueError, match="lam must be finite"):
        matched(phi, math.inf)


def test_other_dtypes():
    phi, x_s, x_t = pairs(3, 5, 2, seed=0)
    whole = [t.round().long() for t in (phi, x_s, x_t)]
    for parts in ((phi.float(), x_s, x_t), (phi, x_s.float(), x_t), (phi, x_s, x_t.int()), whole):
        with pytest.raises(ValueError, match="one floating-point dtype"):
            linear_attack(*parts, lam=1.0)
    single = linear_attack(*(t.float() for t in (phi, x_s, x_t)), lam=1.0).delta
    assert single.dtype == torch.float32
    assert (single - linear_attack(phi, x_s, x_t, lam=1.0).delta).abs().max() < 1e-5
