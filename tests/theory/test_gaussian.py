"""PPCA, attacks and saddle points: Monte Carlo, optimizers over full matrices, scikit-learn."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from sklearn.decomposition import PCA
from torch.distributions import MultivariateNormal

from adv.theory.gaussian import (
    PPCA,
    amplification,
    attack,
    augmented,
    budget,
    decoded,
    displacement,
    distribution_change,
    excess_risk,
    factors,
    fit,
    gains,
    h,
    linear_accuracy,
    multiplier,
    noise,
    saddle,
    saddle_budget,
    saddle_multiplier,
)


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


LAM = vector(5, 3, 1.5, 0.6, 0.4, 0.2)  # the sheet's example, k = 3, sigma^2 = 0.4
K = 3


def rotation(d, seed=0):
    draws = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(d, d, generator=draws, dtype=torch.float64))[0]


def model(lam=LAM, k=K, seed=0):
    mu = torch.linspace(-1, 1, len(lam), dtype=torch.float64)
    return PPCA(mu, rotation(len(lam), seed), lam, k)


def draw(mu, Sigma, n, seed=0):
    draws = torch.Generator().manual_seed(seed)
    white = torch.randn(n, len(mu), generator=draws, dtype=torch.float64)
    return mu + white @ torch.linalg.cholesky(Sigma).T


def loss(x, mu, Sigma):
    return -MultivariateNormal(mu, Sigma).log_prob(x)


spectra = st.lists(st.floats(0.05, 20), min_size=2, max_size=8).map(
    lambda values: vector(*sorted(values, reverse=True))
)
budgets = st.floats(0.01, 10)


# ----------------------------------------------------------------------------------- the generator


def test_the_fit_is_scikit_learns():
    x = draw(torch.arange(6.0).double(), model().Sigma, 500)
    mine, theirs = fit(x, 3), PCA(3).fit(x.numpy())
    scale = 499 / 500  # scikit-learn divides by n - 1
    covariance = mine.W @ mine.W.T + mine.sigma2 * torch.eye(6).double()
    assert np.allclose(covariance, theirs.get_covariance() * scale, rtol=1e-10)
    assert mine.sigma2 == pytest.approx(theirs.noise_variance_ * scale, rel=1e-10)
    assert np.allclose(mine.mu, theirs.mean_)
    assert torch.allclose(mine.Sigma, torch.cov(x.T, correction=0))


def test_the_fit_maximizes_the_likelihood():
    x = draw(torch.zeros(4).double(), torch.diag(vector(3, 2, 0.5, 0.3)), 60, seed=3)

    def objective(p):
        parameters = torch.tensor(p, requires_grad=True)
        W, s2, mu = parameters[:8].view(4, 2), parameters[8].exp(), parameters[9:]
        value = loss(x, mu, W @ W.T + s2 * torch.eye(4)).mean()
        return value.item(), torch.autograd.grad(value, parameters)[0].numpy()

    start = np.random.default_rng(0).normal(size=13)
    found = minimize(objective, start, jac=True, method="L-BFGS-B", options={"maxiter": 2000})
    mine = fit(x, 2)
    covariance = mine.W @ mine.W.T + mine.sigma2 * torch.eye(4)
    assert found.fun == pytest.approx(loss(x, mine.mu, covariance).mean().item(), abs=1e-7)
    W, s2 = found.x[:8].reshape(4, 2), math.exp(found.x[8])
    assert np.allclose(W @ W.T + s2 * np.eye(4), covariance, atol=1e-3)


def test_data_of_low_rank():
    x = draw(torch.zeros(2).double(), torch.eye(2).double(), 50) @ rotation(5)[:2]
    flat = fit(x, 2)
    assert flat.sigma2 == 0
    assert (flat.lam[2:] == 0).all()
    assert (flat.decode(flat.encode(x)) - x).abs().max() < 1e-12
    with pytest.raises(ValueError, match="fewer than k = 3 directions"):
        fit(x, 3)
    full = PPCA(torch.zeros(2).double(), torch.eye(2).double(), vector(2, 1), 2)
    assert full.sigma2 == 0
    assert torch.allclose(full.W @ full.W.T, full.Sigma)


def test_codes_are_posterior_means():
    p = model()
    x = draw(p.mu, p.Sigma, 7)
    precision = torch.eye(K).double() + p.W.T @ p.W / p.sigma2
    mean = torch.linalg.solve(precision, p.W.T @ (x - p.mu).T / p.sigma2).T
    assert torch.allclose(p.encode(x), mean)
    assert torch.allclose(p.decode(torch.zeros(1, K).double())[0], p.mu)


def test_everything_is_in_float64():
    p, single = model(), PPCA(model().mu.float(), model().U.float(), LAM.float(), K)
    assert {t.dtype for t in (single.mu, single.U, single.lam, single.W)} == {torch.float64}
    x = draw(p.mu, p.Sigma, 7).float()
    z = p.encode(x)
    assert torch.equal(z, p.encode(x.double()))
    assert torch.allclose(single.encode(x), z, atol=1e-5)
    assert torch.equal(p.decode(z.float()), p.decode(z.float().double()))
    for strategy in (1, 2, 3):
        passed = p.pass_through(x, strategy)
        assert passed.dtype == torch.float64
        assert torch.equal(passed, p.pass_through(x.double(), strategy))


def test_models_are_compared_as_objects():
    p = model()
    assert p == p
    assert p != model()
    assert len({p, model()}) == 2


def test_lemma_1_in_numbers_and_matrices():
    expected = {1: (4.232, 2.253333333333333, 0.806666666666666, 0, 0, 0), 2: None, 3: None}
    p = model()
    P = p.W.T @ p.W + p.sigma2 * torch.eye(K).double()
    shrink = p.W @ torch.linalg.inv(P) @ p.W.T
    eye = torch.eye(6).double()
    law = {
        1: shrink @ p.Sigma @ shrink,
        2: shrink @ p.Sigma @ shrink + p.sigma2 * shrink + p.sigma2 * eye,
        3: p.W @ p.W.T + p.sigma2 * eye,
    }
    for j in (1, 2, 3):
        values = expected[j] or (5, 3, 1.5, 0.4, 0.4, 0.4)
        assert decoded(LAM, K, j).tolist() == pytest.approx(values, abs=1e-12)
        assert torch.allclose(law[j], (p.U * decoded(LAM, K, j)) @ p.U.T, atol=1e-12)


@pytest.mark.parametrize("strategy", [1, 2, 3])
def test_lemma_1_by_sampling(strategy):
    p = model()
    passed = p.pass_through(draw(p.mu, p.Sigma, 200_000), strategy, seed=1)
    expected = (p.U * decoded(LAM, K, strategy)) @ p.U.T
    assert (torch.cov(passed.T) - expected).abs().max() < 0.04
    assert (passed.mean(0) - p.mu).abs().max() < 0.02
    again = p.pass_through(p.mu.expand(3, -1), strategy, seed=1)
    assert torch.equal(again, p.pass_through(p.mu.expand(3, -1), strategy, seed=1))


@settings(max_examples=40, deadline=None)
@given(lam=spectra, k=st.integers(1, 8))
def test_strategies_two_and_three_are_one_law(lam, k):
    k = min(k, len(lam))
    s2 = noise(lam, k)
    leading = torch.arange(len(lam)) < k
    printed = torch.where(leading, (lam - s2) ** 2 / lam + s2 * (lam - s2) / lam + s2, s2)
    assert torch.allclose(decoded(lam, k, 2), printed, rtol=1e-12)
    assert torch.equal(decoded(lam, k, 2), decoded(lam, k, 3))
    assert decoded(lam, k, 2).sum().item() == pytest.approx(lam.sum().item())
    assert (decoded(lam, k, 1) <= decoded(lam, k, 2) + 1e-12).all()


# -------------------------------------------------------------------------------------- the attack


@pytest.mark.parametrize("latent", [False, True])
def test_the_attack_is_what_an_optimizer_finds(latent):
    p = model()
    W = p.W if latent else torch.eye(6).double()
    L = 1.2 if latent else 6.0
    v = draw(torch.zeros(6).double(), p.Sigma, 3, seed=5)
    found = attack(v, p.Sigma, L, p.W if latent else None)
    for point, u in zip(v, found, strict=True):

        def objective(t, point=point):
            z = torch.tensor(t, requires_grad=True)
            value = L / 2 * z @ z - loss(point + W @ z, torch.zeros(6).double(), p.Sigma)
            return value.item(), torch.autograd.grad(value, z)[0].numpy()

        best = minimize(objective, np.zeros(W.shape[1]), jac=True, options={"gtol": 1e-9})
        assert best.x == pytest.approx(u.numpy(), abs=1e-5)
    moved = (v + found @ W.T) @ p.U
    w = gains(LAM, K) if latent else None
    assert torch.allclose(moved, (v @ p.U) * factors(LAM, L, w))


def test_lemma_2s_two_forms_and_the_threshold():
    p = model()
    v = draw(torch.zeros(6).double(), p.Sigma, 2)
    inverse = torch.linalg.inv(p.Sigma)
    lowest = 1 - p.sigma2 / 5
    for L in (lowest + 1e-6, 1, 4):
        other = L * torch.eye(K).double() - p.W.T @ inverse @ p.W
        expected = torch.linalg.solve(other, p.W.T @ inverse @ v.T).T
        assert torch.allclose(attack(v, p.Sigma, L, p.W), expected, rtol=1e-6)
    for bad, W in ((lowest - 1e-6, p.W), (5 - 1e-6, None), (-1.0, None)):
        with pytest.raises(ValueError, match="without a limit"):
            attack(v, p.Sigma, bad, W)
        with pytest.raises(ValueError, match=r"L must"):
            factors(LAM, bad, None if W is None else gains(LAM, K))


@settings(max_examples=20, deadline=None)
@given(lam=spectra, eps=budgets, k=st.integers(1, 8))
def test_multiplier_and_budget_are_inverse(lam, eps, k):
    k = min(k, len(lam))
    for w in (None, gains(lam, k)):
        if w is not None and not w.max() > 1e-9:
            continue
        L = multiplier(lam, eps, w)
        assert budget(lam, L, w).item() == pytest.approx(eps**2, rel=1e-6)
        assert budget(lam, 1.01 * L, w) < eps**2
        a = saddle_multiplier(lam, eps, w)
        assert saddle_budget(lam, a, w).item() == pytest.approx(eps**2, rel=1e-9)
        assert saddle_budget(lam, 1.01 * a, w) < eps**2


@pytest.mark.parametrize("eps", [1.0, 1e3, 1e5, 1e8])
def test_a_multiplier_near_its_threshold_keeps_few_digits(eps):
    lam = vector(4, 1e-12)
    L = multiplier(lam, eps)
    lost = abs(budget(lam, L) / eps**2 - 1)
    assert lost < 1e-15 * L / (L - 1e12)
    assert lost > 1e-5 or eps < 1e8


def test_multipliers_of_a_batch():
    lam = torch.stack([LAM, 2 * LAM])
    eps = torch.tensor([[0.1], [1.0], [5.0]])
    L = multiplier(lam, eps.expand(3, 2))
    assert L.shape == (3, 2)
    for i in range(3):
        for j in range(2):
            alone = multiplier(lam[j], float(eps[i, 0]))
            assert L[i, j].item() == pytest.approx(alone.item(), rel=1e-12)
    assert saddle_multiplier(lam, 0.3).shape == (2,)
    assert excess_risk(lam, L).shape == (3, 2)
    assert displacement(lam, L).shape == (3, 2, 6)


@pytest.mark.parametrize("latent", [False, True])
def test_budget_of_each_point_by_constrained_optimization(latent):
    p = model()
    W, w = (p.W, gains(LAM, K)) if latent else (torch.eye(6).double(), None)
    v = draw(torch.zeros(6).double(), p.Sigma, 3, seed=7)
    L = multiplier(LAM, 0.5, w, (v @ p.U).square())
    for point, value in zip(v, L, strict=True):
        u = attack(point[None], p.Sigma, float(value), p.W if latent else None)[0]
        assert u.norm().item() == pytest.approx(0.5, rel=1e-8)
        A = (W.T @ torch.linalg.inv(p.Sigma) @ W).numpy()
        b = (W.T @ torch.linalg.solve(p.Sigma, point)).numpy()
        best = max(
            -minimize(
                lambda t, A=A, b=b: -(t @ A @ t) / 2 - b @ t,
                0.5 * start / np.linalg.norm(start),
                constraints={"type": "ineq", "fun": lambda t: 0.25 - t @ t},
                method="SLSQP",
                options={"ftol": 1e-12, "maxiter": 300},
            ).fun
            for start in np.random.default_rng(0).normal(size=(3, W.shape[1]))
        )
        u = u.numpy()
        assert u @ A @ u / 2 + b @ u == pytest.approx(best, abs=1e-7)


@pytest.mark.parametrize("strategy", [1, 2, 3])
def test_theorem_2_by_sampling(strategy):
    p = model()
    clean = draw(p.mu, p.Sigma, 200_000, seed=2)
    x = p.pass_through(clean, strategy, seed=3)
    moved = x + attack(x - p.mu, p.Sigma, 3.0, p.W) @ p.W.T
    before, after, without = (loss(t, p.mu, p.Sigma) for t in (x, moved, clean))
    var, w = decoded(LAM, K, strategy), gains(LAM, K)
    for change, formula, sheet in (
        (after - before, excess_risk(LAM, 3.0, w, var), (1.02641, 1.40476)),
        (before - without, distribution_change(LAM, var), (-1.9324, 0.33333)),
    ):
        error = (after.var() + before.var() + without.var()).sqrt() / math.sqrt(len(x))
        assert abs(change.mean() - formula) < 4 * error
        assert formula.item() == pytest.approx(sheet[min(strategy, 2) - 1], abs=1e-4)
    u = attack(x - p.mu, p.Sigma, 3.0, p.W)
    assert u.square().sum(1).mean().item() == pytest.approx(
        budget(LAM, 3.0, w, var).item(), rel=0.02
    )
    spent = ((u @ p.W.T) @ p.U).square().mean(0)
    assert torch.allclose(spent, displacement(LAM, 3.0, w, var), rtol=0.03, atol=1e-12)


def test_rates():
    support = vector(9, 4, 2, 1, 0.3)
    for L, value in ((10, 1.1728), (100, 1.0152), (1e3, 1.0015), (1e4, 1.00015)):
        risk = excess_risk(support, L, support).item()
        assert L * risk / 5 == pytest.approx(value, abs=1e-4)
        eps = math.sqrt(5) / (L - 1)
        assert risk == pytest.approx(eps * math.sqrt(5) + eps**2 / 2, rel=1e-10)
        assert multiplier(support, eps, support).item() == pytest.approx(L, rel=1e-9)
        assert risk == pytest.approx(excess_risk(torch.ones(5), L, torch.ones(5)).item())
    thin = vector(4, 2, 1, 0.5, 0.1)
    for L, value in ((100, 1.1316), (1e3, 1.0116), (1e4, 1.0012)):
        risk = excess_risk(thin, L).item()
        assert L * risk / (1 / thin).sum().item() == pytest.approx(value, abs=1e-4)
    for smallest, risk, product in (
        (0.1, 2.956, 1.654),
        (1e-2, 17.516, 1.2),
        (1e-3, 140.81, 1.063),
        (1e-4, 1300.0, 1.020),
    ):
        lam = vector(4, 2, 1, 0.5, smallest)
        L = multiplier(lam, 0.5)
        assert excess_risk(lam, L).item() == pytest.approx(risk, rel=1e-3)
        assert L.item() * smallest == pytest.approx(product, abs=1e-3)


@settings(max_examples=40, deadline=None)
@given(lam=spectra, eps=budgets)
def test_where_the_budget_goes(lam, eps):
    lam = lam + torch.arange(len(lam), 0, -1) * 0.1  # distinct
    pixels = displacement(lam, multiplier(lam, eps))
    assert (pixels.diff() > 0).all()
    assert pixels.sum().item() == pytest.approx(eps**2, rel=1e-6)
    k = len(lam) - 1
    w = gains(lam, k)
    latent = displacement(lam, multiplier(lam, eps, w), w)
    assert (latent[:k].diff() < 0).all()
    assert latent[k] == 0


def test_small_attacks_keep_their_digits():
    assert displacement(vector(3), 1e12).item() == pytest.approx(1 / 3 / 1e24, rel=1e-10)
    assert excess_risk(vector(3), 1e12).item() == pytest.approx(1 / 3 / 1e12, rel=1e-10)


# -------------------------------------------------------------------------------- the saddle point


def outer(theta, d, C, L, cov, mean):
    """The risk under the best attack, for any mean and covariance C / L + G G^T."""
    mu, G = theta[:d], theta[d:].view(d, d)
    Q = G @ G.T + 1e-14 * torch.eye(d)
    S = cov + torch.outer(mu - mean, mu - mean)
    return (torch.logdet(Q + C / L) + torch.trace(torch.linalg.solve(Q, S))) / 2


def descend(objective, start):
    def value(t):
        theta = torch.tensor(t, requires_grad=True)
        result = objective(theta)
        return result.item(), torch.autograd.grad(result, theta)[0].numpy()

    options = {"maxiter": 3000, "ftol": 1e-15, "gtol": 1e-9, "maxcor": 30}
    return torch.tensor(minimize(value, start, jac=True, method="L-BFGS-B", options=options).x)


@pytest.mark.parametrize("L", [0.2, 1.0, 3.0, 20.0])
@pytest.mark.parametrize("latent", [False, True])
def test_saddle_points_by_optimizing_full_matrices(L, latent):
    lam, d = vector(3, 1.5, 0.6, 0.2), 4
    p = model(lam, 2, seed=4)
    var, w = (decoded(lam, 2, 3), gains(lam, 2)) if latent else (lam, torch.ones(4))
    C, cov = (p.U * w) @ p.U.T, (p.U * var) @ p.U.T
    expected = (p.U * saddle(var, L, w if latent else None)) @ p.U.T
    for seed in range(2):
        start = np.random.default_rng(seed).normal(size=d + d * d)
        best = descend(lambda t: outer(t, d, C, L, cov, p.mu), start)
        G = best[d:].view(d, d)
        assert torch.allclose(G @ G.T + C / L, expected, rtol=1e-4, atol=1e-5)
        assert torch.allclose(best[:d], p.mu, atol=1e-4)


def test_saddle_of_a_budget_by_danskin():
    lam = vector(4, 2, 1, 0.3, 0.1)
    L = saddle_multiplier(lam, 0.3)
    assert L.item() == pytest.approx(8.8695, abs=1e-4)
    ratios = (1.0556, 1.1099, 1.2150, 1.6669, 2.8011)
    assert amplification(lam, L).tolist() == pytest.approx(ratios, abs=1e-4)

    def objective(theta):
        model = theta.exp()
        attacked = factors(model.detach(), multiplier(model.detach(), 0.3, var=lam))
        return (theta + attacked.square() * lam / model).sum() / 2

    best = descend(objective, np.random.default_rng(1).normal(size=5))
    assert torch.allclose(best.exp(), saddle(lam, L), rtol=1e-5)
    assert multiplier(saddle(lam, L), 0.3, var=lam).item() == pytest.approx(L.item(), rel=1e-9)


@settings(max_examples=40, deadline=None)
@given(lam=spectra, L=st.floats(0.05, 50), k=st.integers(1, 8))
def test_the_saddle_is_the_covariance_of_its_own_adversarial_examples(lam, L, k):
    k = min(k, len(lam))
    for w, var in (
        (None, lam),
        (gains(lam, k), decoded(lam, k, 2)),
    ):
        new = saddle(var, L, w)
        attacked = factors(new, L, w).square() * var
        assert torch.allclose(attacked, new, rtol=1e-9)
        spent = budget(new, L, w, var)
        assert spent.item() == pytest.approx(saddle_budget(var, L, w).item(), rel=1e-8)
        a = torch.ones_like(lam) / L if w is None else w / L
        assert (new >= var + a - 1e-9).all()
        assert (new <= var + 2 * a + 1e-9).all()


def test_the_root_behind_both():
    lam, a = torch.meshgrid(vector(0, 0.1, 1, 9), vector(0, 0.2, 1, 30), indexing="ij")
    root = h(lam, a)
    assert torch.allclose((root - a) ** 2, lam * root, rtol=1e-12)
    assert (root >= a * (1 - 1e-15)).all()
    assert torch.allclose(h(lam, 0.7), lam / 2 + 0.7 + (lam**2 / 4 + 0.7 * lam).sqrt())


def test_closed_forms_without_noise():
    lam, k, eps = vector(7, 2, 1, 0.5, 0.1), 5, 1.0
    L = saddle_multiplier(lam, eps, lam)
    assert L.item() == pytest.approx(k / (eps * (eps + math.sqrt(k))), rel=1e-10)
    ratios = amplification(lam, L, lam)
    assert ratios.tolist() == pytest.approx([2.094427191] * 5, rel=1e-8)
    for L, ratio in ((0.5, 4), (1, 2.618034), (2, 1.866025), (5, 1.37082), (100, 1.019902)):
        assert amplification(lam, L, lam)[0].item() == pytest.approx(ratio, abs=1e-6)
        assert amplification(vector(0.1), 10 * L).item() == pytest.approx(ratio, abs=1e-6)
    singular = vector(2, 1, 0)
    assert saddle(singular, 2.0, singular)[2] == 0
    with pytest.raises(ValueError, match="support"):
        amplification(singular, 2.0, singular)


def test_mean_decoding_shrinks_below_the_threshold():
    s2, L = 0.3, 2.0
    for factor, sign in ((0.999, -1), (1.001, 1)):
        lam = vector(10, (L + 1) * s2 * factor, s2, s2)
        ratio = amplification(lam, L, gains(lam, 2), decoded(lam, 2, 1))
        assert (ratio[1].item() - 1) * sign > 0
        assert (ratio[2:] == 0).all()


@pytest.mark.parametrize(("eps", "L"), [(0.25, 5.7659), (0.5, 2.2763), (1.0, 0.8313)])
def test_figure_1s_numbers(eps, L):
    lam = vector(4, 0.25)
    assert saddle_multiplier(lam, eps).item() == pytest.approx(L, abs=1e-4)
    w, var = gains(lam, 1), decoded(lam, 1, 2)
    latent = saddle(var, saddle_multiplier(var, eps / math.sqrt(3.75), w), w)
    assert latent.tolist() == pytest.approx([(2 + eps) ** 2, 0.25], rel=1e-9)


# ----------------------------------------------------------------------------------- finite samples


@pytest.mark.parametrize("m", [0.0, 30.0, 400.0, math.inf])
def test_theorem_8_by_optimization(m):
    x = draw(torch.zeros(4).double(), torch.diag(vector(3, 1, 0.5, 0.2)), 40, seed=1)
    p, n = fit(x, 2), 40
    share = 1.0 if m == math.inf else m / (n + m)
    S = (p.U * p.lam) @ p.U.T
    made = p.W @ p.W.T + p.sigma2 * torch.eye(4)
    moment = (1 - share) * S + share * made

    def objective(t):
        G = t.view(4, 4)
        Q = G @ G.T + 1e-12 * torch.eye(4)
        return (torch.logdet(Q) + torch.trace(torch.linalg.solve(Q, moment))) / 2

    G = descend(objective, np.random.default_rng(0).normal(size=16)).view(4, 4)
    expected = (p.U * augmented(p.lam, 2, n, m)) @ p.U.T
    assert torch.allclose(G @ G.T, expected, atol=1e-4)
    if m == math.inf:
        assert torch.allclose(expected, made)


def test_theorem_9_on_a_sample():
    x = draw(torch.ones(5).double(), torch.diag(vector(4, 2, 1, 0.3, 0.1)), 60, seed=2)
    p = fit(x, 2)
    w, var = gains(p.lam, 2), decoded(p.lam, 2, 3)
    C, cov = p.W @ p.W.T, p.W @ p.W.T + p.sigma2 * torch.eye(5)
    start = np.random.default_rng(3).normal(size=30)
    best = descend(lambda t: outer(t, 5, C, 2.0, cov, p.mu), start)
    G = best[5:].view(5, 5)
    expected = (p.U * saddle(var, 2.0, w)) @ p.U.T
    assert torch.allclose(G @ G.T + C / 2, expected, rtol=1e-4, atol=1e-5)
    assert torch.allclose(best[:5], p.mu, atol=1e-4)


# ---------------------------------------------------------------------------------- the classifier


def example():
    lam = torch.cat([torch.linspace(4, 1, 5), torch.full((15,), 0.05)]).double()
    mu = 0.45 * lam.sqrt()
    return lam, PPCA(mu, torch.eye(20).double(), lam, 5)


def test_accuracies_of_the_example():
    lam, p = example()
    w, var = gains(lam, 5), decoded(lam, 5, 2)
    models = {
        "clean": (lam, (0.9779, 0.8011, 0.9356)),
        "pixels": (saddle(lam, saddle_multiplier(lam, 0.3)), (0.9737, 0.8382, 0.8914)),
        "latent": (saddle(var, saddle_multiplier(var, 1.0, w), w), (0.9743, 0.7437, 0.9539)),
    }
    for name, (values, expected) in models.items():
        c = p.mu / values
        found = (
            linear_accuracy(c, p.mu, p.Sigma),
            linear_accuracy(c, p.mu, p.Sigma, eps=0.3),
            linear_accuracy(c, p.mu, p.Sigma, eps=1.0, W=p.W),
        )
        assert found == pytest.approx(expected, abs=2e-4), name


@pytest.mark.parametrize("norm", ["l2", "linf", "l1"])
def test_accuracies_by_sampling(norm):
    _, p = example()
    c = p.mu / p.lam
    x = draw(p.mu, p.Sigma, 200_000, seed=6)  # the class 1; the other is its mirror image
    steepest = {"l2": c / c.norm(), "linf": c.sign(), "l1": torch.zeros(20).double()}
    steepest["l1"][c.abs().argmax()] = c.sign()[c.abs().argmax()]
    expected = ((x - 0.2 * steepest[norm]) @ c > 0).double().mean().item()
    found = linear_accuracy(c, p.mu, p.Sigma, eps=0.2, norm=norm)
    assert found == pytest.approx(expected, abs=4e-3)
    g = p.W.T @ c
    z = {"l2": g / g.norm(), "linf": g.sign(), "l1": torch.zeros(5).double()}
    z["l1"][g.abs().argmax()] = g.sign()[g.abs().argmax()]
    expected = ((x - 0.5 * p.W @ z[norm]) @ c > 0).double().mean().item()
    found = linear_accuracy(c, p.mu, p.Sigma, eps=0.5, norm=norm, W=p.W)
    assert found == pytest.approx(expected, abs=4e-3)


# ------------------------------------------------------------------------------------------- errors


NAN = vector(1, math.nan)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fit(torch.ones(1, 3), 1), "x must be"),
        (lambda: fit(torch.full((4, 3), math.nan), 1), "x must be"),
        (lambda: fit(torch.ones(4, 3), 1), "fewer than k"),
        (lambda: fit(torch.randn(9, 3), 4), "k must be an"),
        (lambda: PPCA(torch.ones(2), torch.eye(3), torch.ones(3), 1), "mu, U and lam"),
        (lambda: PPCA(torch.ones(2), torch.ones(2, 2), vector(2, 1), 1), "orthonormal"),
        (lambda: PPCA(torch.full((2,), math.nan), torch.eye(2), vector(2, 1), 1), "finite"),
        (lambda: model().encode(torch.ones(3, 5)), "x must be"),
        (lambda: model().decode(torch.ones(3, 2)), "z must be"),
        (lambda: model().decode(torch.ones(3)), "z must be"),
        (lambda: gains(LAM, 1.5), "integer"),
        (lambda: noise(vector(1, 2), 1), "decreasing"),
        (lambda: gains(vector(1, -1), 1), "not negative"),
        (lambda: gains(vector(2, 1), 0), "k must be an"),
        (lambda: decoded(LAM, 2, 4), "strategy must be"),
        (lambda: model().pass_through(torch.ones(1, 6), 0), "strategy must be"),
        (lambda: factors(vector(1, 0), 2.0), "support"),
        (lambda: budget(LAM, 1.0), "L must exceed max"),
        (lambda: budget(LAM, math.inf), "L must be positive"),
        (lambda: displacement(LAM, 9.0, var=-LAM), "not negative"),
        (lambda: multiplier(LAM, 0.0), "eps must be"),
        (lambda: multiplier(LAM, math.nan), "eps must be"),
        (lambda: multiplier(vector(1, 0.5), 1e17), "rounds to its threshold"),
        (lambda: multiplier(LAM, 1.0, var=vector(1, 1, 1, 1, 1, 0)), "needs variance"),
        (lambda: multiplier(LAM, 1.0, torch.zeros(6)), "needs variance"),
        (lambda: factors(LAM, 9.0, torch.ones(5)), "spectra must agree"),
        (lambda: distribution_change(LAM, torch.ones(1)), "spectra must agree"),
        (lambda: saddle(torch.tensor(1.0), 2.0), "spectra must agree"),
        (lambda: attack(torch.ones(6), torch.eye(6), 9.0), "v and Sigma must"),
        (lambda: attack(torch.ones(2, 6), torch.eye(5), 9.0), "v and Sigma must"),
        (lambda: attack(torch.ones(2, 6), torch.eye(6), 9.0, torch.ones(5, 2)), "W must be"),
        (lambda: attack(torch.ones(2, 6), torch.eye(6), math.nan), "finite"),
        (lambda: attack(torch.full((2, 6), math.nan), torch.eye(6), 9.0), "finite"),
        (lambda: h(vector(1), -1.0), "h needs"),
        (lambda: saddle(LAM, 0.0), "L must be positive"),
        (lambda: saddle(LAM, 1.0, -LAM), "not negative"),
        (lambda: saddle_multiplier(LAM, 1.0, torch.zeros(6)), "positive gain"),
        (lambda: saddle_multiplier(LAM, -1.0), "eps must be"),
        (lambda: augmented(LAM, 2, 0, 1), "n must be"),
        (lambda: augmented(LAM, 2, 1, -1), "n must be"),
        (lambda: linear_accuracy(torch.ones(3), torch.ones(2), torch.eye(2)), "must be"),
        (lambda: linear_accuracy(torch.zeros(2), torch.ones(2), torch.eye(2)), "variance"),
        (lambda: linear_accuracy(torch.ones(2), torch.ones(2), torch.eye(2), eps=-1.0), "eps must"),
        (lambda: linear_accuracy(torch.ones(2), NAN, torch.eye(2)), "finite"),
        (lambda: linear_accuracy(NAN, torch.ones(2), torch.eye(2)), "finite"),
        (
            lambda: linear_accuracy(torch.ones(2), torch.ones(2), torch.eye(2), W=NAN[:, None]),
            "finite",
        ),
        (
            lambda: linear_accuracy(torch.ones(2), torch.ones(2), torch.eye(2), eps=1.0, norm="l0"),
            "norm",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
