"""Generative networks: closed forms where there are any, and what training makes of digits."""

import inspect
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from adv.lab import checkpoints, data, models
from adv.lab.data import Split
from adv.lab.generative import (
    class_elbo,
    divergence,
    elbo,
    evidence,
    fit_wgan,
    gradient_penalty,
    samples,
)
from adv.lab.training import DivergenceError, fit

DIGITS = data.load("digits").train.take(400)


class Linear(models.VAE):
    """Probabilistic PCA as a VAE: x = W z + b + noise, with the exact posterior."""

    def __init__(self, W, b, variance):
        super().__init__(shape=(1, 2, 3), latent=W.shape[1], hidden=())
        self.register_buffer("W", W)
        self.register_buffer("b", b)
        precision = torch.eye(W.shape[1], dtype=W.dtype) + W.T @ W / variance
        self.register_buffer("cov", torch.linalg.inv(precision))
        self.variance = variance
        self.shift = 0.0

    def posterior(self, x, y=None):
        mean = (x.flatten(1) - self.b) @ self.W @ self.cov / self.variance
        return mean + self.shift, self.cov.diagonal().log().expand_as(mean)

    def decode(self, z, y=None):
        return (z @ self.W.T + self.b).reshape(-1, *self.shape)


@pytest.fixture
def ppca():
    """W with orthogonal columns, so that the posterior is independent."""
    draws = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(6, 2, generator=draws, dtype=torch.float64)).Q
    W, b, variance = Q * torch.tensor([1.5, 0.7], dtype=torch.float64), torch.ones(6).double(), 0.3
    x = torch.randn(7, 1, 2, 3, generator=draws, dtype=torch.float64)
    truth = MultivariateNormal(b, W @ W.T + variance * torch.eye(6).double())
    return Linear(W, b, variance), x, truth.log_prob(x.flatten(1)), variance


def test_the_bound_is_tight_where_the_posterior_is_exact(ppca):
    model, x, truth, variance = ppca
    bound, estimate = evidence(model, x, variance=variance, draws=3)
    assert torch.allclose(bound, truth, atol=1e-10)
    assert torch.allclose(estimate, truth, atol=1e-10)


def test_the_bound_misses_by_the_divergence_from_the_posterior(ppca):
    model, x, truth, variance = ppca
    model.shift = 0.4
    bound, estimate = evidence(model, x, variance=variance, draws=4000)
    # KL between Gaussians of one covariance: half the squared Mahalanobis distance of the means.
    missing = 0.5 * float((0.4**2 / model.cov.diagonal()).sum())
    assert (truth - bound).mean().item() == pytest.approx(missing, rel=0.05)
    assert ((truth - estimate).abs() < 0.2 * missing).all()
    assert (bound <= estimate).all()


def test_the_loss_is_the_negative_bound(ppca):
    model, x, truth, variance = ppca
    with torch.random.fork_rng(devices=[]):
        values = [float(elbo(variance)(model, x, torch.zeros(7).long())) for _ in range(600)]
    assert sum(values) / 600 == pytest.approx(-truth.mean().item(), abs=0.1)


def test_divergence_is_torchs():
    draws = torch.Generator().manual_seed(1)
    mean, log_variance = torch.randn(2, 5, 3, generator=draws)
    q = Normal(mean, (0.5 * log_variance).exp())
    expected = kl_divergence(q, Normal(torch.zeros(3), torch.ones(3))).sum(dim=1)
    assert torch.allclose(divergence(mean, log_variance), expected, atol=1e-5)


def test_gradient_goes_through_the_draw():
    """The reparametrized gradient of E (z - a)^2, z = m + s e, is 2 (m - a) and 2 s."""
    model = models.build("vae", shape=(1, 2, 2), latent=1, hidden=(3,), seed=0)
    x = torch.rand(64, 1, 2, 2)
    elbo(0.1)(model, x, torch.zeros(64).long()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.head.parameters())


def test_a_vae_learns_digits():
    model = models.build("vae", latent=8, hidden=(64,), seed=0)
    before, _ = evidence(model, DIGITS.x[:100], draws=5)
    fit(model, DIGITS, loss=elbo(0.01), epochs=30, lr=4e-3, batch_size=50, progress=False)
    after, better = evidence(model, DIGITS.x[:100], draws=5)
    assert after.mean() > before.mean() + 100
    assert (after <= better).all()
    mean_image = (DIGITS.x[:100] - DIGITS.x.mean(0)).square().mean()
    assert (model(DIGITS.x[:100]) - DIGITS.x[:100]).square().mean() < 0.5 * mean_image


def test_a_conditional_vae_makes_the_class_it_is_told():
    from adv.lab import zoo

    model = models.build("vae", latent=4, hidden=(64,), classes=10, seed=0)
    fit(model, DIGITS, loss=elbo(0.02), epochs=40, lr=4e-3, batch_size=50, progress=False)
    judge = zoo.load("digits/cnn")
    for label in (0, 4, 6):
        made = samples(model, 40, label=label)
        assert (judge(made).argmax(1) == label).double().mean() > 0.6


def test_pairs_teach_the_targets():
    """Trained to turn an image upside down, it does; the labels are indices of targets."""
    turned = DIGITS.x.flip(2)
    pairs = Split(DIGITS.x, torch.arange(len(DIGITS)))
    model = models.build("vae", latent=12, hidden=(96,), seed=0)
    fit(model, pairs, loss=elbo(0.01, turned), epochs=30, lr=4e-3, batch_size=50, progress=False)
    made = model(DIGITS.x)
    assert (made - turned).square().mean() < 0.5 * (made - DIGITS.x).square().mean()


def test_each_class_is_learned_by_its_own_model():
    bank = models.build("vaes", seed=0, latent=3, hidden=(16,))
    x, y = DIGITS.x[:90], DIGITS.y[:90].clamp(max=3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        loss = class_elbo(0.05)(bank, x, y)
        torch.manual_seed(0)
        parts = [elbo(0.05)(bank.parts[c], x[y == c], y[y == c]) * (y == c).sum() for c in range(4)]
    assert torch.allclose(loss, sum(parts) / 90)
    loss.backward()
    for c, part in enumerate(bank.parts):
        assert (part.head.layers[0].weight.grad is None) == (c > 3)
    fit(bank, DIGITS, loss=class_elbo(0.05), epochs=8, batch_size=100, lr=0.01, progress=False)
    errors = (bank(DIGITS.x) - DIGITS.x[:, None]).flatten(2).square().sum(2)
    assert (errors.argmin(1) == DIGITS.y).double().mean() > 0.6


# ----------------------------------------------------------------------------- the Wasserstein game


GAME = {"epochs": 4, "batch_size": 16, "critic_steps": 3, "progress": False}


def player(seed=0, **settings):
    return models.build("wgan", **{"hidden": (8,), "seed": seed} | settings)


def test_a_label_without_a_model_is_refused():
    bank = models.build("vaes", classes=2)
    x = torch.rand(3, 1, 8, 8)
    for wrong in (2, -1):
        with pytest.raises(ValueError, match="the classes 0 to 1 alone"):
            class_elbo(0.05)(bank, x, torch.tensor([0, 1, wrong]))


def test_a_game_that_was_killed_goes_on(tmp_path, monkeypatch):
    """In its third epoch; also where its numbers are NumPy's."""

    saved = checkpoints.save

    def kill(path, run, state):
        saved(path, run, state)
        if len(state["game"]["distance"]) == 2:
            raise KeyboardInterrupt

    whole, part, again = player(), player(), player(9)
    expected = fit_wgan(whole, DIGITS.take(100), lr=1e-3, weight=5, **GAME)
    given = {"lr": np.logspace(-3, 0, 2)[0], "weight": np.float32(5), "checkpoint": tmp_path / "g"}
    given |= GAME | {"batch_size": np.int64(16), "epochs": np.int64(4)}
    monkeypatch.setattr(checkpoints, "save", kill)
    with pytest.raises(KeyboardInterrupt):
        fit_wgan(part, DIGITS.take(100), **given)
    monkeypatch.undo()
    game = fit_wgan(again, DIGITS.take(100), **given)
    assert game == expected
    assert len(game.seconds) == 4
    assert all(map(torch.equal, whole.parameters(), again.parameters()))


OTHER = {
    "model": player(hidden=(9,)),
    "train": DIGITS[1:41],
    "epochs": 2,
    "batch_size": 20,
    "lr": 2e-4,
    "critic_steps": 4,
    "weight": 11.0,
    "seed": 1,
}


@pytest.mark.parametrize("name", OTHER)
def test_the_checkpoint_of_another_game_is_refused(tmp_path, name):
    given = {"model": player(), "train": DIGITS[:40], **GAME, "epochs": 1}
    given |= {"checkpoint": tmp_path / "game.pt"}
    fit_wgan(**given)
    kept = (tmp_path / "game.pt").read_bytes()
    with pytest.raises(
        ValueError, match=rf"another run \({'data' if name == 'train' else name} = "
    ):
        fit_wgan(**given | {name: OTHER[name]})
    assert (tmp_path / "game.pt").read_bytes() == kept


def test_no_setting_of_the_game_is_forgotten():
    free = {"checkpoint", "progress"}
    assert inspect.signature(fit_wgan).parameters.keys() - free == OTHER.keys()


def test_a_damaged_game_is_refused(tmp_path):
    (tmp_path / "game.pt").write_bytes(b"hello")
    with pytest.raises(ValueError, match=r"game\.pt is no checkpoint"):
        fit_wgan(player(), DIGITS[:40], checkpoint=tmp_path / "game.pt", **GAME)


def test_gradient_penalty_of_linear_critics():
    real, made, share = torch.rand(2, 5, 1, 2, 2), torch.rand(5, 1, 2, 2), torch.rand(5)
    slope = torch.tensor([3.0, 0.0, 4.0, 0.0])
    penalty = gradient_penalty(lambda x: x.flatten(1) @ slope, real[0], made, share)
    assert penalty.item() == pytest.approx((5 - 1) ** 2)


def test_gradient_penalty_looks_between_the_images():
    real, made = torch.ones(3, 1, 1, 1), torch.zeros(3, 1, 1, 1)
    share = torch.tensor([0.0, 0.5, 1.0])
    penalty = gradient_penalty(lambda x: x.flatten(1).square().sum(1), real, made, share)
    assert penalty.item() == pytest.approx(((0 - 1) ** 2 + (1 - 1) ** 2 + (2 - 1) ** 2) / 3)


def test_the_critic_measures_how_far_a_shift_is():
    """Between two images that differ by v, the Wasserstein distance is the length of v."""
    model = models.build("wgan", shape=(1, 2, 2), latent=2, hidden=(32,), seed=0)
    for parameter in model.generator.parameters():
        nn.init.zeros_(parameter)  # every image it makes is gray: 1/2
    target = torch.tensor([0.9, 0.5, 0.8, 0.5]).reshape(1, 1, 2, 2)
    train = Split(target.expand(64, 1, 2, 2).clone(), torch.zeros(64).long())
    game = fit_wgan(
        model, train, epochs=250, lr=3e-3, batch_size=64, critic_steps=10**6, progress=False
    )
    assert game.distance[-1] == pytest.approx(math.hypot(0.4, 0.3), rel=0.06)
    assert game.penalty[-1] < 0.01


def test_both_players_step_by_adam_with_the_papers_momenta_and_a_falling_rate(monkeypatch):
    steps, whole = [], torch.optim.Adam.step

    def noted(optimizer, *arguments, **settings):
        (group,) = optimizer.param_groups
        owner = "critic" if group["params"][0] is first else "generator"
        steps.append((owner, group["lr"], group["betas"]))
        return whole(optimizer, *arguments, **settings)

    model = player()
    first = next(model.critic.parameters())
    monkeypatch.setattr(torch.optim.Adam, "step", noted)
    given = {"epochs": 4, "batch_size": 20, "critic_steps": 2, "lr": 0.008, "progress": False}
    fit_wgan(model, DIGITS.take(80), **given)
    assert {betas for *_, betas in steps} == {(0.5, 0.9)}
    for name, count in (("critic", 4), ("generator", 2)):
        rates = [rate for owner, rate, _ in steps if owner == name]
        assert rates == pytest.approx(
            [r for r in (0.008, 0.006, 0.004, 0.002) for _ in range(count)]
        )


def test_a_wgan_learns_where_the_ink_is():
    model = models.build("wgan", seed=0)
    before = samples(model, 200).mean(0)
    fit_wgan(model, DIGITS, epochs=40, lr=2e-3, batch_size=50, critic_steps=2, progress=False)
    after, truth = samples(model, 200).mean(0), DIGITS.x.mean(0)
    assert (after - truth).square().mean() < 0.2 * (before - truth).square().mean()
    assert not model.training


def test_the_game_is_repeatable_and_leaves_the_global_state():
    state = torch.get_rng_state()
    runs = [models.build("wgan", hidden=(8,), seed=0) for _ in range(2)]
    games = [fit_wgan(m, DIGITS.take(60), epochs=2, progress=False) for m in runs]
    assert games[0] == games[1]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in runs), strict=True))


def test_the_game_is_played_in_training_mode():
    """Whatever mode it starts in; its layers count the batches that they see while training."""
    runs = [models.build("dc-gan", seed=0).train(mode) for mode in (True, False)]
    some = Split(nn.functional.interpolate(DIGITS.x[:12], 28), DIGITS.y[:12])
    for model in runs:
        fit_wgan(model, some, epochs=1, batch_size=6, critic_steps=1, progress=False)
        assert not any(module.training for module in model.modules())
    one, other = (model.state_dict() for model in runs)
    counts = [v for name, v in other.items() if name.endswith("num_batches_tracked")]
    assert counts
    assert min(counts) > 0
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_divergence_of_the_game_is_said():
    model = models.build("wgan", hidden=(8,), seed=0)
    with pytest.raises(DivergenceError, match="diverged"):
        fit_wgan(model, DIGITS.take(60), epochs=3, lr=1e30, progress=False)
    assert not any(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


# --------------------------------------------------------------------------------------- the models


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"classes": 3},
        {"shape": (3, 16, 24), "channels": (4, 6), "hidden": (20, 10), "latent": 5},
        {"hidden": (), "latent": 2},
    ],
)
def test_shapes(settings):
    model = models.build("vae", **settings)
    x = torch.rand(2, *model.shape)
    y = torch.tensor([0, 2]) if model.classes else None
    mean, log_variance = model.posterior(x, y)
    assert mean.shape == log_variance.shape == (2, model.latent)
    made = model.decode(mean, y)
    assert made.shape == x.shape
    assert torch.equal(model(x, y), made)
    assert 0 < made.min() < made.max() < 1


def test_seeded_samples():
    vae, wgan = models.build("vae", classes=10, seed=0), models.build("wgan", seed=0)
    assert samples(wgan, 3).shape == (3, 1, 8, 8)
    assert torch.equal(samples(vae, 3, label=2), samples(vae, 3, label=2))
    assert not torch.equal(samples(vae, 3, label=2), samples(vae, 3, label=3))


def test_what_is_refused():
    vae, told = models.build("vae"), models.build("vae", classes=10)
    x, y = torch.rand(2, 1, 8, 8), torch.zeros(2).long()
    for model, label in ((vae, y), (told, None)):
        with pytest.raises(ValueError, match="classes"):
            model(x, label)
    with pytest.raises(ValueError, match="latent vectors"):
        vae.decode(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="latent vectors"):
        models.build("wgan").decode(torch.zeros(12))
    with pytest.raises(ValueError, match="takes images"):
        vae(torch.rand(2, 1, 9, 8))
    with pytest.raises(ValueError, match="takes images"):
        models.build("wgan").judge(torch.rand(2, 64))
    with pytest.raises(ValueError, match="halvings"):
        models.build("vae", shape=(1, 10, 10), channels=(4, 8))
    with pytest.raises(ValueError, match="variance"):
        elbo(0.0)
    with pytest.raises(TypeError, match="VAE"):
        elbo()(nn.Identity(), x, y)
    with pytest.raises(TypeError, match="VAEs"):
        class_elbo()(vae, x, y)
    with pytest.raises(ValueError, match="isn't told the class"):
        models.build("vaes", kind="wgan")
    with pytest.raises(ValueError, match="draws"):
        evidence(vae, x, draws=0)
    for variance in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="variance must be"):
            evidence(vae, x, variance=variance)
    with pytest.raises(ValueError, match="no images"):
        evidence(vae, x[:0])
    with pytest.raises(ValueError, match="count"):
        samples(vae, 0)
    for label in (-1, 10):
        with pytest.raises(ValueError, match=r"label must be in 0\.\.9"):
            samples(models.build("vae", classes=10), 3, label=label)
    for label, model in ((None, models.build("vae", classes=10)), (0, vae), (1, vae)):
        with pytest.raises(ValueError, match="classes; y must be"):
            samples(model, 3, label=label)
    with pytest.raises(ValueError, match="empty"):
        fit_wgan(models.build("wgan"), DIGITS[:0], epochs=1)
    with pytest.raises(ValueError, match="epochs"):
        fit_wgan(models.build("wgan"), DIGITS, epochs=0)
    with pytest.raises(ValueError, match="critic_steps is"):
        fit_wgan(models.build("wgan"), DIGITS, epochs=1, critic_steps=0)
    for name in ("lr", "weight"):
        with pytest.raises(ValueError, match=name):
            fit_wgan(models.build("wgan"), DIGITS, epochs=1, **{name: math.nan})
