import copy
import inspect
import math

import numpy as np
import pytest
import torch
from torch import nn

from adv.attacks.confidence import nearest_class, unrolled
from adv.defenses.critic import RunningConfidence, critic_loss, cycle_loss, slope_penalty
from adv.lab.data import Split
from adv.lab.duel import Duel, fit_critic, new_critic
from adv.lab.training import DivergenceError

SIZES = (6, 8, 3)
QUICK = {"batch_size": 10, "pretrain": 5, "lr": 0.01, "critic_lr": 0.01, "progress": False}


def classifier(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))


def blobs(count=60):
    """Three easy classes in six dimensions."""
    draws = torch.Generator().manual_seed(0)
    y = torch.arange(count) % 3
    x = 0.5 + 0.3 * nn.functional.one_hot(y, 6) + 0.05 * torch.randn(count, 6, generator=draws)
    return Split(x.view(-1, 1, 2, 3).clamp(0, 1), y)


def weights(*parts):
    return torch.cat([p.detach().flatten() for part in parts for p in part.parameters()])


def test_one_batch_by_hand():
    """One image batch, no noise, plain code: the same weights of both players."""
    split, model, critic = blobs(10), classifier(), new_critic(0, sizes=SIZES, noise=(0.0, 0.0))
    ours, theirs = copy.deepcopy(model), copy.deepcopy(critic)
    told = fit_critic(
        model, critic, split, epochs=1, **QUICK | {"pretrain": 0}, weight=0.7, cycle=0.3, penalty=4
    )

    x, y = split.x, split.y
    first = torch.optim.Adam(ours.parameters(), lr=0.01, betas=(0.5, 0.999))
    second = torch.optim.Adam(theirs.parameters(), lr=0.01, betas=(0.5, 0.999))
    said, c = ours(x).argmax(1), RunningConfidence(3)(ours(x))
    t = nearest_class(ours, x, said)
    x_adv = unrolled(ours, x, t, confidence=c[t])
    taken = ours(x_adv).argmax(1)
    fixed = x_adv.detach()
    loss = critic_loss(theirs, x, y, fixed, taken)
    slope = slope_penalty(theirs, x, y) + slope_penalty(theirs, fixed, taken)
    second.zero_grad()
    (loss + 4 * slope).backward()
    second.step()
    z = theirs(x_adv)[torch.arange(10), taken][taken != said]
    price = 0.7 * nn.functional.softplus(-z).mean()
    own = ours(x).softmax(1).amax(1).detach()
    price = price + 0.3 * cycle_loss(ours, x, said, x_adv, confidence=own, counts=taken != said)
    first.zero_grad()
    (nn.functional.cross_entropy(ours(x), y) + price).backward()
    first.step()

    assert (taken != said).any()
    assert torch.allclose(weights(model, critic), weights(ours, theirs), atol=1e-5)
    assert told.critic[0] == pytest.approx(loss.item(), rel=1e-4)
    assert told.penalty[0] == pytest.approx(slope.item(), rel=1e-4)
    assert told.success[0] == pytest.approx((taken != said).float().mean().item())
    assert told.length[0] == pytest.approx(
        (fixed - x).flatten(1).norm(dim=1).mean().item(), rel=1e-4
    )


def test_a_killed_run_ends_like_one_that_was_not(tmp_path):
    def run(epochs, file, stop=None):
        model, critic = classifier(), new_critic(1, sizes=SIZES)

        def kill(epoch, history):
            if epoch == stop:
                raise KeyboardInterrupt

        try:
            told = fit_critic(
                model, critic, blobs(), epochs=epochs, checkpoint=file, observe=kill, **QUICK
            )
        except KeyboardInterrupt:
            return None
        return weights(model, critic), told

    whole, told = run(4, tmp_path / "a.pt")
    assert run(4, tmp_path / "b.pt", stop=2) is None
    again, resumed = run(4, tmp_path / "b.pt")
    assert torch.equal(whole, again)
    assert resumed.loss == told.loss
    assert len(resumed.seconds) == 4
    finished, _ = run(4, tmp_path / "b.pt")
    assert torch.equal(finished, whole), "a finished run is read, not repeated"
    (tmp_path / "c.pt").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="no checkpoint"):
        run(4, tmp_path / "c.pt")


OTHER = {
    "model": nn.Sequential(nn.Flatten(), nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)),
    "critic": new_critic(0, sizes=(6, 9, 3)),
    "train": Split(blobs().x, (blobs().y + 1) % 3),
    "epochs": 2,
    "batch_size": 11,
    "lr": 0.02,
    "critic_lr": 0.02,
    "weight": 0.6,
    "cycle": 0.02,
    "penalty": 9.0,
    "steps": 4,
    "overshoot": 0.06,
    "pretrain": 1,
    "halve_every": 39,
    "seed": 1,
}


MIXED = Split(blobs().x.flip(0), blobs().y)


@pytest.mark.parametrize(("name", "other"), [*OTHER.items(), ("train", MIXED)])
def test_the_checkpoint_of_another_duel_is_refused(tmp_path, name, other):
    given = {"model": classifier(), "critic": new_critic(0, sizes=SIZES), "train": blobs()}
    given |= {"epochs": 1, "checkpoint": tmp_path / "duel.pt", **QUICK}
    fit_critic(**given)
    kept = (tmp_path / "duel.pt").read_bytes()
    with pytest.raises(
        ValueError, match=rf"another run \({'data' if name == 'train' else name} = "
    ):
        fit_critic(**given | {name: other})
    assert (tmp_path / "duel.pt").read_bytes() == kept


def test_no_setting_of_the_duel_is_forgotten():
    free = {"checkpoint", "observe", "progress"}
    assert inspect.signature(fit_critic).parameters.keys() - free == OTHER.keys()


def test_numbers_of_numpy_are_read_again(tmp_path):
    rates = {"lr": np.logspace(-2, 0, 3)[0], "critic_lr": np.float64(0.01)}
    counts = {name: np.int64(QUICK[name]) for name in ("batch_size", "pretrain")}
    runs = []
    for given in ({}, rates | counts, rates | counts):
        parts = classifier(), new_critic(1, sizes=SIZES)
        file = tmp_path / "duel.pt"
        fit_critic(*parts, blobs(), epochs=2, checkpoint=file, **QUICK | given)
        runs.append(weights(*parts))
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])


def test_seeded_and_quiet():
    runs = []
    for _ in range(2):
        model, critic = classifier(), new_critic(1, sizes=SIZES)
        before = torch.get_rng_state()
        fit_critic(model, critic, blobs(), epochs=2, **QUICK)
        assert torch.equal(torch.get_rng_state(), before)
        assert not model.training
        assert not critic.training
        assert all(p.grad is None for p in [*model.parameters(), *critic.parameters()])
        runs.append(weights(model, critic))
        torch.rand(3)
    assert torch.equal(*runs)
    other = classifier()
    fit_critic(other, new_critic(1, sizes=SIZES), blobs(), epochs=2, seed=1, **QUICK)
    assert not torch.equal(runs[0][: len(weights(other))], weights(other))


def test_layers_that_are_frozen_stay_as_they_are():
    model, critic = classifier(), new_critic(1, sizes=SIZES)
    model[1].requires_grad_(False)
    critic.layers[0].bias.requires_grad_(False)
    frozen = copy.deepcopy((model[1].weight, critic.layers[0].bias))
    before = weights(model[3], critic.layers[0])
    fit_critic(model, critic, blobs(), epochs=1, **QUICK)
    assert torch.equal(model[1].weight, frozen[0])
    assert torch.equal(critic.layers[0].bias, frozen[1])
    assert (weights(model[3], critic.layers[0]) != before).sum() > 50


def test_the_generators_of_all_devices_are_put_back_too(monkeypatch):
    kept, fork = [], torch.random.fork_rng

    def watched(devices):
        kept.append(list(devices))
        return fork(devices=[])

    parts = classifier(), new_critic(1, sizes=SIZES)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.random, "fork_rng", watched)
    fit_critic(*parts, blobs(), epochs=1, **QUICK)
    assert kept == [[0, 1, 2]]


def test_both_rates_are_halved_again_and_again(monkeypatch):
    rates, step = [], torch.optim.Adam.step

    def watched(self, closure=None):
        rates.append(self.param_groups[0]["lr"])
        return step(self, closure)

    monkeypatch.setattr(torch.optim.Adam, "step", watched)
    settings = {"batch_size": 60, "pretrain": 1, "halve_every": 2, "progress": False}
    parts = classifier(), new_critic(1, sizes=SIZES)
    fit_critic(*parts, blobs(), epochs=5, lr=0.01, critic_lr=0.04, **settings)
    # One batch an epoch: of the pretraining the classifier alone, then the critic first.
    factors = [1, 1, 0.5, 0.5, 0.25]
    assert rates == [0.01, *(rate * factor for factor in factors for rate in (0.04, 0.01))]


def history(**last):
    fine = {"accuracy": 0.99, "success": 0.9, "real": 0.7, "made": 0.7, "length": 1.0}
    names = ("loss", "fooling", "cycle", "confidence", "critic", "penalty", "seconds")
    values = dict.fromkeys(names, 0.5) | fine
    return Duel(**{name: [value] + 3 * [last.get(name, value)] for name, value in values.items()})


@pytest.mark.parametrize(
    ("last", "verdict"),
    [
        ({}, "in balance"),
        ({"accuracy": 0.3}, "lost its classes"),
        ({"success": 0.02}, "masked"),
        ({"real": 0.99, "made": 0.99}, "everything apart"),
        ({"real": 0.02, "made": 0.95}, "says the same"),
        ({"real": 0.95, "made": 0.02}, "says the same"),
        ({"length": 0.6}, "less and less"),
    ],
)
def test_verdict(last, verdict):
    assert verdict in history(**last).verdict
    assert history(**last).verdict.startswith("collapsed") == bool(last)


def test_no_verdict_before_the_first_epoch():
    assert Duel().verdict == "not started"


def test_collapse_is_seen_in_training():
    """Without any lesson the classifier knows no classes."""
    told = fit_critic(
        classifier(),
        new_critic(0, sizes=SIZES),
        blobs(),
        epochs=3,
        **QUICK | {"lr": 1e-9, "pretrain": 0},
    )
    assert told.verdict == "collapsed: the classifier has lost its classes"


def test_divergence_is_told_and_leaves_the_players_at_rest():
    parts = classifier(), new_critic(0, sizes=SIZES)
    with pytest.raises(DivergenceError):
        fit_critic(*parts, blobs(), epochs=30, **QUICK | {"lr": 1e30})
    assert not any(module.training for part in parts for module in part.modules())
    assert all(p.grad is None for part in parts for p in part.parameters())


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"epochs": 0}, ValueError),
        ({"steps": 0}, ValueError),
        ({"batch_size": 0}, ValueError),
        ({"halve_every": 0}, ValueError),
        ({"cycle": -1.0}, ValueError),
        ({"penalty": -1.0}, ValueError),
        ({"pretrain": -1}, ValueError),
        ({"pretrain": 1.5}, TypeError),
        ({"lr": -1e-3}, ValueError),
        ({"critic_lr": math.nan}, ValueError),
        ({"epochs": 1.5}, TypeError),
    ],
)
def test_refuses(wrong, error):
    with pytest.raises(error):
        fit_critic(
            classifier(), new_critic(0, sizes=SIZES), blobs(), **{"epochs": 1} | QUICK | wrong
        )
    with pytest.raises(ValueError, match="empty"):
        fit_critic(classifier(), new_critic(0, sizes=SIZES), blobs()[:0], epochs=1, **QUICK)
