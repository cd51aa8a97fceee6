"""Robust losses against closed forms, eigenvectors, and each other."""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional

from adv.attacks.common import class_gradients, margin
from adv.attacks.gradient import fgsm, pgd
from adv.defenses.adversarial import (
    adversarial_loss,
    ascend,
    joint,
    kl,
    trades,
    vat,
    virtual_direction,
)
from adv.geometry import norm

WIDE = (-100.0, 100.0)


def linear(inputs=6, classes=2, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(inputs, classes).double()


def tanh_net(inputs=6, classes=4, seed=0, dropout=0.0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(inputs, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, classes)
        ).double()


def batch(n=20, inputs=6, classes=4, seed=0):
    draw = torch.Generator().manual_seed(seed)
    x = torch.rand(n, inputs, generator=draw, dtype=torch.float64)
    return x, torch.arange(n) % classes


def gradients(loss, model, x, y):
    return torch.cat(
        [g.flatten() for g in torch.autograd.grad(loss(model, x, y), list(model.parameters()))]
    )


def hessian(model, x):
    r"""$J^\top(\mathrm{diag}\,p-pp^\top)J$ of each sample, formed as a matrix."""
    logits, jacobian = class_gradients(model, x)
    p, j = logits.softmax(1), jacobian.flatten(2)
    middle = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    return j.transpose(1, 2) @ middle @ j


# --------------------------------------------------------------------------- adversarial training


@pytest.mark.parametrize(("name", "dual"), [("linf", 1), ("l2", 2), ("l1", math.inf)])
@pytest.mark.parametrize("attack", ["fgsm", "pgd"])
def test_linear_model_gives_the_robust_logistic_loss(name, dual, attack):
    """The inner maximum of a linear model is known: log(1 + exp(-(m - eps |w|_dual)))."""
    model, (x, y), eps = linear(), batch(classes=2), 0.3
    w = (model.weight[1] - model.weight[0]).detach()
    logits = model(x).detach()
    m = (logits[:, 1] - logits[:, 0]) * (2 * y - 1)
    expected = torch.log1p(torch.exp(-(m - eps * torch.linalg.vector_norm(w, dual)))).mean()
    steps = {"steps": 60, "step_size": 0.1} if attack == "pgd" else {}
    value = adversarial_loss(attack, eps=eps, norm=name, bounds=WIDE, **steps)(model, x, y)
    torch.testing.assert_close(value.detach(), expected, rtol=1e-9, atol=0)


def test_outer_gradient_is_the_gradient_at_the_maximizer():
    """Danskin: on a linear model the whole loss is smooth, so finite differences must agree."""
    model, (x, y) = linear(), batch(classes=2)
    loss = adversarial_loss("fgsm", eps=0.2, bounds=WIDE)
    analytic = gradients(loss, model, x, y)
    numeric = []
    for parameter in model.parameters():
        flat = parameter.data.view(-1)
        for i in range(len(flat)):
            values = []
            for step in (1e-6, -1e-6):
                flat[i] += step
                values.append(float(loss(model, x, y).detach()))
                flat[i] -= step
            numeric.append((values[0] - values[1]) / 2e-6)
    torch.testing.assert_close(analytic, torch.tensor(numeric).double(), rtol=1e-6, atol=1e-8)


def test_mix_is_the_weighted_sum_and_half_is_goodfellow():
    model, (x, y) = tanh_net(), batch()
    settings = {"eps": 0.1, "norm": "linf"}
    clean = functional.cross_entropy(model(x), y)
    moved = fgsm(model, x, y, **settings)
    hard = functional.cross_entropy(model(moved), y)
    assert not torch.allclose(clean, hard, rtol=1e-2)
    for mix in (0.0, 0.25, 0.5, 1.0):
        value = adversarial_loss(fgsm, mix=mix, **settings)(model, x, y)
        torch.testing.assert_close(value, mix * clean + (1 - mix) * hard)


def test_gradient_does_not_flow_through_the_attack():
    model, (x, y) = tanh_net(), batch()
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)

    def leaky(model, x, y, *, seed):
        return x * scale

    value = adversarial_loss(leaky)(model, x, y)
    assert torch.autograd.grad(value, scale, allow_unused=True) == (None,)


def test_pgd_finds_at_least_as_much_as_fgsm():
    """PGD keeps the point with the lowest margin, which is therefore the loss to compare it by."""
    model, (x, y) = tanh_net(), batch()
    values = [float(-margin(model(x), y).mean().detach())]
    for attack, settings in (("fgsm", {}), ("pgd", {"steps": 20, "restarts": 3})):
        loss = adversarial_loss(attack, loss="margin", eps=0.3, **settings)
        values.append(float(loss(model, x, y).detach()))
    assert values[0] < values[1] <= values[2] + 1e-6


def test_joint_average_and_worst():
    model, (x, y) = tanh_net(), batch()
    specs = [{"attack": "fgsm", "eps": 0.1}, partial(fgsm, eps=0.8, norm="l1")]
    moved = [fgsm(model, x, y, eps=0.1), fgsm(model, x, y, eps=0.8, norm="l1")]
    each = torch.stack([functional.cross_entropy(model(z), y, reduction="none") for z in moved])
    assert 0 < int((each[0] > each[1]).sum()) < len(y)
    torch.testing.assert_close(joint(specs)(model, x, y), each.mean())
    torch.testing.assert_close(joint(specs, rule="worst")(model, x, y), each.max(0).values.mean())


def test_attacks_see_evaluation_mode_and_the_loss_sees_training_mode():
    model, seen = tanh_net(dropout=0.5).train(), []
    x, y = batch()

    def spy(model, x, y, *, seed):
        seen.append([m.training for m in model.modules()])
        return x

    value = adversarial_loss(spy)(model, x, y)
    assert not any(seen[0])
    assert all(m.training for m in model.modules())
    assert not torch.allclose(value, functional.cross_entropy(model.eval()(x), y))


@pytest.mark.parametrize(
    "loss",
    [adversarial_loss("pgd", eps=0.2, steps=3), vat(0.5), trades(0.2, steps=3)],
    ids=["adversarial", "vat", "trades"],
)
def test_the_global_seed_decides_the_draws(loss):
    model, (x, y) = tanh_net(), batch()
    values = []
    with torch.random.fork_rng():
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            values.append(float(loss(model, x, y).detach()))
    assert values[0] == values[1]
    assert values[0] != values[2]


def test_saturated_samples_do_not_warn_while_training():
    """Cross-entropy of a margin of thousands has no gradient; an attack alone would warn."""
    model, (x, y) = linear(), batch(classes=2)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.copy_(torch.tensor([0.0, 5000.0]))
    adversarial_loss("fgsm", eps=0.1)(model, x, torch.ones_like(y))


# ------------------------------------------------------------------------------------ divergences


def test_kl_is_torchs():
    a, b = torch.randn(2, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p, q = torch.distributions.Categorical(logits=a), torch.distributions.Categorical(logits=b)
    torch.testing.assert_close(kl(a, b), torch.distributions.kl_divergence(p, q))


def test_kl_is_quadratic_with_the_stated_hessian():
    """The error of r'Hr/2 falls eightfold as r is halved, and H is the Hessian at 0."""
    model, (x, _) = tanh_net(), batch(6)
    h = hessian(model, x)
    r = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def error(scale):
        quadratic = torch.einsum("bi,bij,bj->b", r, h, r) * scale**2 / 2
        return float((kl(model(x), model(x + scale * r)) - quadratic).abs().mean().detach())

    errors = [error(0.04 / 2**k) for k in range(4)]
    slopes = [math.log2(a / b) for a, b in pairwise(errors)]
    assert slopes == pytest.approx([3, 3, 3], abs=0.1)
    fixed = model(x[:1]).detach()
    exact = torch.autograd.functional.hessian(
        lambda z: kl(fixed, model(x[:1] + z)).sum(), torch.zeros_like(x[:1])
    ).view(6, 6)
    torch.testing.assert_close(exact, h[0], rtol=1e-9, atol=1e-12)


def test_power_iteration_reaches_the_top_eigenvector():
    model, (x, _) = tanh_net(seed=3), batch(12)
    values, vectors = torch.linalg.eigh(hessian(model, x))
    assert float((values[:, -2] / values[:, -1]).max()) < 0.95
    d = virtual_direction(model, x, xi=1e-6, power_steps=300)
    torch.testing.assert_close(norm(d, "l2"), torch.ones(12, dtype=torch.float64))
    cosine = (d * vectors[:, :, -1]).sum(1).abs()
    torch.testing.assert_close(cosine, torch.ones_like(cosine), rtol=0, atol=1e-4)


def test_one_power_step_multiplies_by_the_hessian():
    model, (x, _) = tanh_net(), batch(12)
    first = virtual_direction(model, x, xi=1e-5, power_steps=1, seed=4)
    second = virtual_direction(model, x, xi=1e-5, power_steps=2, seed=4)
    expected = torch.einsum("bij,bj->bi", hessian(model, x), first)
    expected = expected / expected.norm(dim=1, keepdim=True)
    torch.testing.assert_close(second, expected, rtol=0, atol=1e-4)


def test_virtual_direction_of_a_constant_model_is_its_random_start():
    model, (x, _) = linear(), batch()
    with torch.no_grad():
        model.weight.zero_()
    d = virtual_direction(model, x, power_steps=3)
    torch.testing.assert_close(norm(d, "l2"), torch.ones(20, dtype=torch.float64))


def drawn(loss, model, x, y):
    """A loss that draws, its gradients, and the seed that it drew."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        value = loss(model, x, y)
        analytic = torch.cat([g.flatten() for g in torch.autograd.grad(value, model.parameters())])
        torch.manual_seed(5)
        return value, analytic, int(torch.randint(2**31, ()))


def test_vat_is_its_formula_with_a_constant_clean_prediction():
    model, (x, y) = tanh_net(), batch()
    value, analytic, seed = drawn(vat(0.7, weight=2.5, power_steps=2), model, x, y)
    moved = x + 0.7 * virtual_direction(model, x, power_steps=2, seed=seed)
    p = model(x).softmax(1).detach()

    def by_hand(model, x, y):
        entropy = (p * p.log()).sum(1)
        change = entropy - (p * model(moved).log_softmax(1)).sum(1)
        return functional.nll_loss(model(x).log_softmax(1), y) + 2.5 * change.mean()

    torch.testing.assert_close(value, by_hand(model, x, y))
    torch.testing.assert_close(analytic, gradients(by_hand, model, x, y))


def test_trades_is_its_formula_and_differentiates_both_predictions():
    model, (x, y) = tanh_net(), batch()
    value, analytic, seed = drawn(trades(0.2, beta=3.0, steps=4), model, x, y)
    clean = model(x).detach()
    moved = ascend(lambda z: kl(clean, model(z)), x, eps=0.2, steps=4, seed=seed)

    def by_hand(model, x, y):
        p, log_p, log_q = model(x).softmax(1), model(x).log_softmax(1), model(moved).log_softmax(1)
        change = (p * (log_p - log_q)).sum(1)
        return functional.nll_loss(log_p, y) + 3 * change.mean()

    torch.testing.assert_close(value, by_hand(model, x, y))
    torch.testing.assert_close(analytic, gradients(by_hand, model, x, y))


@pytest.mark.parametrize("loss", [trades(0.0, steps=2), vat(0.0)], ids=["trades", "vat"])
def test_at_eps_zero_only_cross_entropy_is_left(loss):
    model, (x, y) = tanh_net(), batch()
    plain = functional.cross_entropy(model(x), y)
    torch.testing.assert_close(loss(model, x, y), plain)
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(plain, model.parameters())])
    torch.testing.assert_close(gradients(loss, model, x, y), expected, rtol=1e-9, atol=1e-12)


def test_trades_on_a_linear_model_finds_the_worst_corner():
    """Two classes: the divergence is monotone in the logit's shift, so a corner is the maximum."""
    model, (x, y), eps, beta = linear(), batch(classes=2), 0.2, 3.0
    model.weight.data *= 4
    w = (model.weight[1] - model.weight[0]).detach()
    corners = [x + s * eps * w.sign() for s in (1, -1)]
    worst = torch.stack([kl(model(x), model(z)) for z in corners]).max(0).values.mean()
    plain = functional.cross_entropy(model(x), y)
    assert float((beta * worst / plain).detach()) > 0.15
    loss, prices = trades(eps, beta=beta, steps=20, bounds=WIDE), []
    with torch.random.fork_rng():
        for seed in range(20):
            torch.manual_seed(seed)
            prices.append(float((loss(model, x, y) - plain).detach()))
    expected = beta * float(worst.detach())
    assert max(prices) <= expected + 1e-9
    assert max(prices) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(("name", "dual"), [("linf", 1), ("l2", 2), ("l1", math.inf)])
def test_ascend_maximizes_a_linear_function_over_ball_and_box(name, dual):
    x = torch.full((3, 6), 0.5, dtype=torch.float64)
    g = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    found = ascend(lambda z: (z * g).sum(1), x, eps=0.2, norm=name, steps=200, seed=1)
    gain = ((found - x) * g).sum(1)
    expected = 0.2 * torch.linalg.vector_norm(g, dual, dim=1)
    torch.testing.assert_close(gain, expected, rtol=2e-2, atol=0)
    assert float(norm(found - x, name).max()) <= 0.2 + 1e-9
    seen = []
    ascend(lambda z: seen.append(z.detach()) or (z * g).sum(1), x, eps=0.4, steps=5, seed=1)
    free = (seen[1] - x).abs() < 0.4 - 1e-9  # not stopped by the ball
    assert 0 < int(free.sum()) < free.numel()
    steps = (seen[1] - seen[0])[free]  # 2.5 * 0.4 / 5 each
    torch.testing.assert_close(steps, 0.2 * g.sign()[free])
    leaf = x.clone().requires_grad_()
    assert not ascend(lambda z: (z * g).sum(1), leaf, eps=0.1, steps=1).requires_grad
    at_edge = ascend(lambda z: (z * g).sum(1), x, eps=5.0, norm="linf", steps=10)
    torch.testing.assert_close(at_edge, (g > 0).double())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: adversarial_loss("pgd", mix=1.5, eps=0.1), "mix"),
        (lambda: adversarial_loss("cw", eps=0.1), "cw"),
        (lambda: adversarial_loss("pgd", eps=0.1, seed=3), "no seed"),
        (lambda: joint([]), "at least one"),
        (lambda: joint("pgd"), "no attack 'p'"),
        (lambda: joint([pgd], rule="max"), "rule"),
        (lambda: vat(-1.0), "eps"),
        (lambda: vat(1.0, weight=-1.0), "weight"),
        (lambda: trades(math.nan), "eps"),
        (lambda: trades(0.1, beta=-1.0), "beta"),
        (lambda: trades(0.1, steps=0), "steps"),
        (lambda: ascend(lambda z: z.sum(1), batch()[0], eps=-0.1), "eps is a number"),
        (lambda: trades(0.1, step_size=-1.0)(tanh_net(), *batch()), "step_size"),
        (lambda: vat(1.0, xi=0.0)(tanh_net(), *batch()), "xi"),
        (lambda: vat(1.0, power_steps=0)(tanh_net(), *batch()), "power_steps"),
        (lambda: trades(0.1)(tanh_net(), batch()[0] + 5, batch()[1]), "bounds"),
    ],
)
def test_bad_input_raises(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: adversarial_loss(3), "an attack is"),
        (lambda: adversarial_loss("pgd", mix="half"), "mix"),
        (lambda: joint([{"eps": 0.1}]), "an attack is"),
        (lambda: vat("1"), "eps"),
    ],
)
def test_wrong_types_raise(make, message):
    with pytest.raises(TypeError, match=message):
        make()
