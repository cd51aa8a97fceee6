"""Attacks on a ReLU encoder: their optimality, and that the pieces add up."""

import cvxpy as cp
import pytest
import torch

from adv.theory import relu_encoder
from adv.theory.relu_encoder import _pattern, encode, hidden_attack, input_attack

LAM = 0.05


def problem(n, m, rows, seed):
    draws = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=draws, dtype=torch.float64)

    return normal(n, m) / n**0.5, normal(rows, m) / rows**0.5, normal(n), normal(n)


def objective(d, phi, x_s, x_t, w):
    misfit = (encode(d, phi, w) - encode(d, phi, x_t)).square().sum(dim=-1)
    return misfit + LAM * (w - x_s).square().sum(dim=-1)


@pytest.mark.parametrize("seed", range(3))
def test_the_hidden_attack_is_the_convex_optimum_and_is_reached(seed):
    d, phi, x_s, x_t = problem(40, 20, 8, seed)
    attack = hidden_attack(d, phi, x_s, x_t, lam=LAM)
    gamma_s, code = torch.relu(x_s @ d).numpy(), encode(d, phi, x_t).numpy()
    h = cp.Variable(20, nonneg=True)
    cost = cp.sum_squares(phi.numpy() @ h - code) + LAM * cp.sum_squares(h - gamma_s)
    cp.Problem(cp.Minimize(cost)).solve(solver=cp.CLARABEL, tol_gap_abs=1e-12)
    assert (attack.hidden - torch.from_numpy(h.value)).abs().max() < 1e-5
    reached = torch.relu((x_s + attack.delta) @ d)
    assert (reached - attack.hidden).abs().max() < 1e-12
    assert (attack.informative + attack.nuisance - x_s - attack.delta).abs().max() < 1e-12
    assert (attack.slack >= 0).all()
    assert (attack.slack[attack.on] == 0).all()


def test_the_shortest_perturbation_for_its_hidden_vector():
    d, phi, x_s, x_t = problem(12, 6, 4, seed=4)
    attack = hidden_attack(d, phi, x_s, x_t, lam=LAM)
    assert not attack.on.all()
    delta, on = cp.Variable(12), attack.on.numpy()
    pre = d.numpy().T @ (x_s.numpy() + delta)
    constraints = [pre[~on] <= 0]
    if on.any():
        constraints.append(pre[on] == attack.hidden.numpy()[on])
    shortest = cp.Problem(cp.Minimize(cp.sum_squares(delta)), constraints)
    shortest.solve(solver=cp.CLARABEL)
    assert attack.delta.square().sum().item() == pytest.approx(shortest.value, rel=1e-5)


def test_the_informative_piece_knows_only_the_target():
    """With the pattern held, moving the source within it leaves this piece as it is."""
    d, phi, x_s, x_t = problem(40, 20, 8, seed=0)
    first = hidden_attack(d, phi, x_s, x_t, lam=LAM)
    second = hidden_attack(d, phi, x_s + 1e-4 * x_t, x_t, lam=LAM)
    assert torch.equal(first.on, second.on)
    assert torch.equal(first.informative, second.informative)
    assert not torch.equal(first.nuisance, second.nuisance)


@pytest.mark.parametrize("seed", range(4))
def test_the_input_attack_is_a_local_minimum(seed):
    case = problem(20, 40, 8, seed)
    d, _, x_s, _ = case
    attack = input_attack(*case, lam=LAM)
    w = x_s + attack.delta
    assert (attack.informative + attack.nuisance - w).abs().max() < 1e-12
    assert attack.value == pytest.approx(objective(*case, w).item(), rel=1e-10)
    assert attack.value < objective(*case, x_s)
    assert (w @ d)[attack.kink].abs().amax(dim=0, keepdim=True).sum() < 1e-10
    assert torch.equal((w @ d > 1e-9), attack.on)
    draws = torch.Generator().manual_seed(seed)
    for scale in (1e-1, 1e-2, 1e-3, 1e-4):
        probes = w + scale * torch.randn(400, 20, generator=draws, dtype=torch.float64)
        assert objective(*case, probes).min() >= attack.value - 1e-12


@pytest.mark.parametrize("code", [-3.0, -0.5, 0.0, 0.5, 2.0, 5.0])
@pytest.mark.parametrize("x_s", [-1.0, 0.0, 1.0, 3.0])
def test_a_unit_rests_at_its_kink_where_that_is_a_minimum(x_s, code):
    """(max(w, 0) - code)^2 + (w - x_s)^2 at w = 0, against its values on both sides."""

    def value(w):
        return (max(w, 0.0) - code) ** 2 + (w - x_s) ** 2

    one = torch.ones(1, 1, dtype=torch.float64)
    near = torch.full((1,), 1e-9, dtype=torch.float64)
    source = torch.full((1,), x_s, dtype=torch.float64)
    target = torch.full((1,), code, dtype=torch.float64)
    found = _pattern(one, one, source, target, 1.0, near, 1.0)
    minimum = min(value(-1e-4), value(1e-4)) >= value(0.0)
    assert (found is not None) == minimum
    if found is not None:
        assert found.kink.all()
        assert found.value == pytest.approx(value(0.0))


def test_more_starts_are_never_worse_and_kinks_occur():
    cases = [problem(20, 40, 8, seed) for seed in range(3)]
    few = [input_attack(*case, lam=LAM, starts=1) for case in cases]
    more = [input_attack(*case, lam=LAM, starts=3) for case in cases]
    assert all(b.value <= a.value for a, b in zip(few, more, strict=True))
    assert any(bool(attack.kink.any()) for attack in more)


def test_the_first_start_is_the_source_and_the_seed_draws_the_others(monkeypatch):
    case, descend, begun = problem(20, 40, 8, seed=0), relu_encoder._descend, []

    def noting(d, phi, x_s, code, lam, w):
        begun.append(w)
        return descend(d, phi, x_s, code, lam, case[2])  # quickly; where from plays no part here

    monkeypatch.setattr(relu_encoder, "_descend", noting)

    def starts(seed):
        begun.clear()
        input_attack(*case, lam=LAM, starts=3, seed=seed)
        return torch.stack(begun)

    first, other = starts(1), starts(2)
    assert first.shape == (3, 20)
    assert torch.equal(first[0], case[2])
    assert torch.equal(other[0], case[2])
    assert len({tuple(w.tolist()) for w in (*first, *other[1:])}) == 5
    assert torch.equal(first, starts(1))


def test_one_layer_without_kinks_is_the_linear_attack():
    """Far inside the orthant the ReLU does nothing: the encoder is the matrix."""
    draws = torch.Generator().manual_seed(0)
    phi = torch.randn(3, 6, generator=draws, dtype=torch.float64)
    x_s, x_t = 10 + torch.rand(2, 6, generator=draws, dtype=torch.float64)
    eye = torch.eye(6, dtype=torch.float64)
    expected = torch.linalg.solve(phi.T @ phi + LAM * eye, phi.T @ phi @ (x_t - x_s))
    for attack in (
        hidden_attack(eye, phi, x_s, x_t, lam=LAM),
        input_attack(eye, phi, x_s, x_t, lam=LAM, starts=1),
    ):
        assert (attack.delta - expected).abs().max() < 1e-9


@pytest.mark.parametrize("attack", [hidden_attack, input_attack])
def test_bad_input(attack):
    d, phi, x_s, x_t = problem(6, 4, 3, seed=0)
    for bad in ((d, phi[:, :3], x_s, x_t), (d, phi, x_s[:5], x_t), (d, phi, x_s, x_t[:, None])):
        with pytest.raises(ValueError, match="atoms"):
            attack(*bad, lam=LAM)
    for lam in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="lam"):
            attack(d, phi, x_s, x_t, lam=lam)
    for bad in (float("nan"), float("inf")):
        for which in range(4):
            parts = [part.clone() for part in (d, phi, x_s, x_t)]
            parts[which].view(-1)[1] = bad
            with pytest.raises(ValueError, match="finite"):
                attack(*parts, lam=LAM)


def test_more_bad_input():
    d, phi, x_s, x_t = problem(4, 6, 3, seed=0)
    with pytest.raises(ValueError, match="independent"):
        hidden_attack(d, phi, x_s, x_t, lam=LAM)
    with pytest.raises(ValueError, match="starts"):
        input_attack(d, phi, x_s, x_t, lam=LAM, starts=0)
