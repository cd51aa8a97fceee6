"""The training loop against a loop by hand, against kills, and against divergence."""

import inspect
import math
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from adv.defenses.adversarial import adversarial_loss, joint, trades
from adv.defenses.margin import margin_loss
from adv.lab import models, training
from adv.lab.data import Split
from adv.lab.training import (
    DivergenceError,
    colorization,
    cross_entropy,
    fit,
    mixed,
    reconstruction,
)


def blobs(n=60, seed=0):
    """Three Gaussian classes in eight dimensions, as a split of 1x2x4 images."""
    draw = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    centers = torch.randn(3, 8, generator=torch.Generator().manual_seed(99))
    x = centers[y] + 0.3 * torch.randn(n, 8, generator=draw)
    return Split(x.view(n, 1, 2, 4), y)


def network(seed=0, dropout=0.0, width=16, bend=nn.ReLU):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [nn.Linear(8, width), bend(), nn.Dropout(dropout), nn.Linear(width, 3)]
        return nn.Sequential(nn.Flatten(), *layers)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def quiet(model, train, **settings):
    return fit(model, train, progress=False, **settings)


def test_full_batch_descent_is_plain_gradient_descent():
    """One batch an epoch leaves no order: momentum written out by hand must give the same."""
    data, lr, model, ours = blobs(), 0.05, network(), network()
    history = quiet(
        ours, data, epochs=7, batch_size=1000, lr=lr, optimizer="sgd", schedule=0.9, seed=3
    )
    velocity = [torch.zeros_like(p) for p in model.parameters()]
    values = []
    for epoch in range(7):
        value = nn.functional.nll_loss(model(data.x).log_softmax(1), data.y)
        values.append(float(value.detach()))
        gradients = torch.autograd.grad(value, list(model.parameters()))
        with torch.no_grad():
            for p, v, g in zip(model.parameters(), velocity, gradients, strict=True):
                v.mul_(0.9).add_(g)
                p.sub_(lr * 0.9**epoch * v)
    torch.testing.assert_close(weights(ours), weights(model), rtol=1e-5, atol=1e-6)
    assert history.loss == pytest.approx(values, rel=1e-5)
    assert history.best == 6
    assert len(history.seconds) == 7


def test_each_epoch_sees_every_sample_once_in_a_new_order():
    data, seen = Split(torch.arange(80.0).view(10, 1, 2, 4), torch.arange(10) % 3), []

    def watch(model, x, y):
        seen.append(x[:, 0, 0, 0].clone())
        return cross_entropy(model, x, y)

    quiet(network(), data, epochs=3, batch_size=4, loss=watch, seed=5)
    assert [len(b) for b in seen] == [4, 4, 2] * 3
    epochs = [torch.cat(seen[i : i + 3]) for i in (0, 3, 6)]
    for order in epochs:
        assert torch.equal(order.sort().values, data.x[:, 0, 0, 0])
    assert not torch.equal(epochs[0], epochs[1])


def test_mean_loss_weighs_a_short_last_batch_by_its_samples():
    data = blobs(7)
    history = quiet(network(), data, epochs=1, batch_size=5, lr=1e-12)
    assert history.loss[0] == pytest.approx(
        float(cross_entropy(network(), data.x, data.y).detach()), 1e-5
    )


def test_cosine_and_callable_schedules_set_the_rate():
    rates = []

    class Recorder(torch.optim.SGD):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    settings = {"epochs": 4, "batch_size": 60, "lr": 0.1, "optimizer": Recorder}
    quiet(network(), blobs(), schedule="cosine", **settings)
    assert rates == pytest.approx([0.1 * math.cos(math.pi * e / 8) ** 2 for e in range(4)])
    rates.clear()
    quiet(network(), blobs(), schedule=lambda e: 0.5 if e >= 2 else 1.0, **settings)
    assert rates == pytest.approx([0.1, 0.1, 0.05, 0.05])


def test_same_seed_same_weights_whatever_the_global_state():
    """Dropout draws from the global generator, which fit seeds and puts back."""
    first, second, third = network(dropout=0.5), network(dropout=0.5), network(dropout=0.5)
    torch.manual_seed(1)
    quiet(first, blobs(), epochs=2, batch_size=20, seed=7)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    quiet(second, blobs(), epochs=2, batch_size=20, seed=7)
    assert torch.equal(torch.get_rng_state(), before)
    quiet(third, blobs(), epochs=2, batch_size=20, seed=8)
    assert torch.equal(weights(first), weights(second))
    assert not torch.equal(weights(first), weights(third))


def test_a_linear_autoencoder_learns_the_principal_subspace():
    """The mean squared error of the best rank 2 is what the singular values beyond leave."""
    images = blobs()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        linear = nn.Sequential(nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False))
    model = nn.Sequential(nn.Flatten(), *linear, nn.Unflatten(1, (1, 2, 4)))
    settings = {"epochs": 400, "batch_size": 60, "lr": 0.05, "schedule": "cosine"}
    history = quiet(model, images, loss=reconstruction, **settings)
    best = torch.linalg.svdvals(images.x.flatten(1))[2:].square().sum() / images.x.numel()
    assert history.loss[-1] == pytest.approx(float(best), rel=1e-3)
    assert history.loss[0] > 3 * float(best)


def test_colorization_gives_the_luminance_and_asks_for_the_chroma():
    """A gray guess costs the mean square of the color differences; the right one, nothing."""
    rgb = torch.rand(4, 3, 2, 5, generator=torch.Generator().manual_seed(0))
    y = torch.zeros(4, dtype=torch.int64)
    red, green, blue = rgb.unbind(1)
    luminance = 0.299 * red + 0.587 * green + 0.114 * blue
    differences = torch.stack([(blue - luminance) / 1.772, (red - luminance) / 1.402], 1)

    class Guess(nn.Module):
        def __init__(self, chroma):
            super().__init__()
            self.chroma = chroma

        def forward(self, x):
            torch.testing.assert_close(x, luminance[:, None])
            return self.chroma

    gray = colorization(Guess(torch.zeros(4, 2, 2, 5)), rgb, y)
    assert float(gray) == pytest.approx(float(differences.square().mean()), rel=1e-5)
    assert float(colorization(Guess(differences), rgb, y)) < 1e-12


def test_keeps_the_best_epoch_on_validation_and_the_latest_of_equals():
    model, marks, scores = network(), [], iter([0.2, 0.8, 0.8, 0.5])

    def keep(epoch, model):
        assert not model.training
        marks.append(weights(model))

    history = quiet(
        model,
        blobs(),
        epochs=4,
        batch_size=20,
        lr=0.05,
        val=blobs(9, seed=1),
        score=lambda *_: next(scores),
        observe=keep,
    )
    assert history.best == 2
    assert history.score == [0.2, 0.8, 0.8, 0.5]
    assert torch.equal(weights(model), marks[2])
    assert not torch.equal(weights(model), marks[3])


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ([math.nan, 0.1, 0.4, 0.2], 2),
        ([0.3, math.nan, 0.1, math.nan], 0),
        ([math.nan] * 4, 3),
        ([math.nan, -math.inf, math.nan, 0.0], 3),
    ],
)
def test_no_score_at_all_is_the_lowest(tmp_path, scores, best):
    model, again, marks, told = network(), network(), [], iter(scores)
    settings = {"epochs": 4, "batch_size": 20, "lr": 0.05, "val": blobs(9, seed=1)}
    settings |= {"score": lambda *_: next(told), "checkpoint": tmp_path / "run.pt"}
    assert (
        quiet(model, blobs(), observe=lambda _, m: marks.append(weights(m)), **settings).best
        == best
    )
    assert torch.equal(weights(model), marks[best])
    assert quiet(again, blobs(), **settings).best == best
    assert torch.equal(weights(again), marks[best]), "also from the file"


def test_leaves_flags_and_gradients_as_promised():
    model = network()
    model[1].bias.requires_grad_(False)
    frozen = model[1].bias.detach().clone()
    quiet(model, blobs(), epochs=1, batch_size=20)
    assert not model.training
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(model[1].bias, frozen)
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, True]


@pytest.mark.parametrize("name", ["mlp", "digits-cnn"])
@pytest.mark.parametrize("loss", [cross_entropy, margin_loss(0.1), margin_loss(0.01, norm="linf")])
def test_mixed_precision_changes_little_but_changes_it(name, loss):
    """Gradients of float32 weights, off by what eight binary digits allow, and not by less."""
    settings = {"sizes": (64, 64, 64, 10)} if name == "mlp" else {}
    model = models.build(name, seed=0, **settings)
    draw = torch.Generator().manual_seed(0)
    x, y = torch.rand(32, 1, 8, 8, generator=draw), torch.arange(32) % 10
    parameters = list(model.parameters())
    whole, half = loss(model, x, y), mixed(loss)(model, x, y)
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(whole.item(), rel=0.02)
    one, other = (
        torch.cat([g.flatten() for g in torch.autograd.grad(value, parameters, allow_unused=False)])
        for value in (whole, half)
    )
    assert other.dtype == torch.float32
    gap = float((one - other).norm() / one.norm())
    assert 1e-5 < gap < 0.1


def test_mixed_precision_puts_the_channels_of_images_last():
    seen = []

    def loss(model, x, y):
        seen.append((x, torch.is_autocast_enabled("cpu")))
        return model(x).sum()

    for shape in ((2, 3, 4, 4), (2, 8)):
        x = torch.rand(shape)
        mixed(loss)(nn.Flatten(), x, torch.zeros(2))
        got, cast = seen.pop()
        assert torch.equal(got, x)
        assert cast
        assert not torch.is_autocast_enabled("cpu")
        assert x.ndim < 4 or got.is_contiguous(memory_format=torch.channels_last)


def test_mixed_losses_are_float32_and_their_factors_bfloat16():
    seen = []

    def loss(model, x, y):
        value = model(x).sum()
        seen.append((torch.get_autocast_dtype("cpu"), value.dtype))
        return value

    value = mixed(loss)(network(), blobs().x, blobs().y)
    assert value.dtype == torch.float32
    assert seen == [(torch.bfloat16, torch.bfloat16)]


@pytest.mark.parametrize(
    "loss", [trades(0.1, steps=1), adversarial_loss("pgd", eps=0.1, steps=1)], ids=["trades", "pgd"]
)
def test_mixed_losses_that_attack_reach_every_parameter(loss):
    """Copies of weights that an attack has made without a graph must not be used again."""
    model = models.build("resnet32", seed=0).train()
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    seen = []

    def watched(model, x, y):
        seen.append(torch.is_autocast_cache_enabled())
        return loss(model, x, y)

    mixed(watched)(model, x, torch.arange(2)).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert seen == [False]


def test_the_checkpoint_of_another_mixed_loss_is_refused(tmp_path):
    given = {"epochs": 1, "checkpoint": tmp_path / "run.pt"}
    quiet(network(), blobs(), loss=mixed(cross_entropy), **given)
    with pytest.raises(ValueError, match=r"loss = mixed\S+\(loss=cross_entropy\S+\) there"):
        quiet(network(), blobs(), loss=mixed(reconstruction), **given)


def bound(way, eps):
    """Losses that differ by a number, kept in different places."""

    def own(model, x, y):
        return eps * cross_entropy(model, x, y)

    def default(model, x, y, *, eps=eps):
        return eps * cross_entropy(model, x, y)

    ways = {
        "attack": adversarial_loss("pgd", eps=eps, steps=1),
        "mixed": mixed(trades(eps, steps=1)),
        "closure": own,
        "default": default,
        "lambda": [
            lambda m, x, y: 0.5 * cross_entropy(m, x, y),
            lambda m, x, y: 0.25 * cross_entropy(m, x, y),
        ][eps == 0.25],
        "partial": partial(default, eps=eps),
        "list": (lambda rates: lambda m, x, y: rates[0] * cross_entropy(m, x, y))([eps]),
        "dictionary": (lambda d: lambda m, x, y: d["eps"] * cross_entropy(m, x, y))({"eps": eps}),
        "object": Scaled(eps),
        "method": Scaled(eps).of,
        "slots": Slotted(eps),
        "dataclass": (lambda given: lambda m, x, y: given.eps * cross_entropy(m, x, y))(Given(eps)),
        "tensor": Scaled(torch.tensor([eps], dtype=torch.bfloat16)),
        "array": Scaled(np.array([eps])),
        "network": Scaled(nn.CrossEntropyLoss(label_smoothing=eps)),
        "weights": Scaled(nn.Linear(1, 1).requires_grad_(False).apply(partial(fill, eps=eps))),
        "body": [half, other_half][eps == 0.25],
        "deep": mixed(mixed(mixed(joint([partial(Scaled(eps).attack, steps=1)])))),
    }
    return ways[way]


def fill(layer, eps):
    layer.weight.fill_(eps)
    layer.bias.fill_(0.0)


class Scaled:
    """A loss that is an object, or one of its methods; so is an attack."""

    def __init__(self, by):
        self.by, self.same = by, {"name", "of", "a", "set"}

    def __call__(self, model, x, y):
        return cross_entropy(model, x, y)

    def of(self, model, x, y):
        return self(model, x, y)

    def attack(self, model, x, y, *, seed, steps):
        return x


class Slotted:
    __slots__ = ("by",)

    def __init__(self, by):
        self.by = by

    def __call__(self, model, x, y):
        return self.by * cross_entropy(model, x, y)


@dataclass
class Given:
    eps: float


def half(model, x, y):
    """Half of the loss."""
    return 0.5 * cross_entropy(model, x, y)


def other_half(model, x, y):
    return 0.25 * cross_entropy(model, x, y)


other_half.__qualname__ = half.__qualname__

WAYS = ["attack", "mixed", "closure", "default", "lambda", "partial", "list", "dictionary"]
WAYS += ["object", "method", "slots", "dataclass", "tensor", "array", "network", "weights", "body"]
WAYS += ["deep"]
ONCE = ("lambda", "body")


@pytest.mark.parametrize(
    ("way", "other"), [(way, e) for way in WAYS for e in (0.25, 0.0) if e or way not in ONCE]
)
def test_a_checkpoint_knows_the_settings_bound_in_a_loss(way, other, tmp_path):
    given = {"epochs": 1, "checkpoint": tmp_path / "run.pt"}
    images = Split(blobs().x.sigmoid(), blobs().y)
    first = quiet(network(), images, loss=bound(way, 0.5), **given)
    assert quiet(network(), images, loss=bound(way, 0.5), **given) == first
    with pytest.raises(ValueError, match="another run"):
        quiet(network(), images, loss=bound(way, other), **given)


def everything():
    """Settings of many kinds, as text."""
    held = {way: bound(way, 0.5) for way in WAYS}
    return training._text(
        partial(
            bound("attack", 0.5),
            model=network(),
            other=[object(), Path("a"), torch.float64, np.exp, torch.add, nn.ReLU],
            data=np.float64(2),
            generator=torch.Generator(),
            names={"a", "b", "c", (1, 2)},
            chosen=lambda kind: kind in {"one", "two", "three"},
            **held,
        )
    )


def test_settings_are_told_the_same_in_each_process():
    """No addresses, and no order of sets: of objects that hold nothing only the kind."""
    text = everything()
    assert "0x" not in text
    assert "model=Sequential#" in text
    assert "other=[object, a, torch.float64, " in text
    assert "data=2.0" in text
    code = "import sys; sys.path.insert(0, {!r}); import test_training as t; print(t.everything())"
    code = code.format(str(Path(__file__).parent))
    for seed in ("1", "2"):
        again = subprocess.run(
            [sys.executable, "-c", code],
            check=True,
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONHASHSEED": seed},
        )
        assert again.stdout.strip() == text


def test_of_code_neither_place_nor_docstring_counts():
    bodies = [
        "def f(x):\n    return x in {'a', 'b'}",
        "\n\ndef f(x):\n    # Why.\n    return x in {'a', 'b'}",
        "def f(x):\n    'What.'\n    return x in {'a', 'b'}",
        "def f(x):\n    return x in {'a', 'c'}",
        "def f(x):\n    return x not in {'a', 'b'}",
        "def f(x):\n    return [g(y) for y in x]",
        "def f(x):\n    return [h(y) for y in x]",
    ]
    texts = []
    for body in bodies:
        made = {}
        exec(body, made)
        texts.append(training._text(made["f"]))
    assert texts[0] == texts[1] == texts[2]
    assert len({*texts}) == 5


def test_an_object_that_holds_itself_is_told():
    loss = Scaled(None)
    loss.by = [loss, loss]
    assert training._text(loss).startswith("Scaled(")


def test_a_loss_may_hold_what_is_trained(tmp_path):
    """Its weights are other ones when a finished training is asked for again."""
    ends = []
    for seed in (0, 1):
        model = network(seed)

        class Own:
            def __init__(self, model):
                self.parts = [model, model[1], *model.parameters()]

            def __call__(self, model, x, y):
                return cross_entropy(model, x, y)

        quiet(model, blobs(), epochs=1, loss=Own(model), checkpoint=tmp_path / "run.pt")
        ends.append(weights(model))
    assert torch.equal(*ends)


@pytest.mark.parametrize("schedule", [None, 0.5])
def test_groups_of_parameters_keep_their_rates(schedule, tmp_path):
    """Also in a training that goes on."""

    def groups(parameters, lr):
        slow = {"params": parameters[:2], "lr": lr / 4}
        return torch.optim.SGD([slow, {"params": parameters[2:]}], lr=lr)

    def stop(epoch, _):
        if epoch == 1:
            raise KeyboardInterrupt

    ours, resumed, model = network(), network(), network()
    given = {"epochs": 3, "batch_size": 1000, "lr": 0.2, "optimizer": groups, "schedule": schedule}
    quiet(ours, blobs(), **given)
    for epoch in range(3):
        gradients = torch.autograd.grad(
            cross_entropy(model, blobs().x, blobs().y), list(model.parameters())
        )
        with torch.no_grad():
            factor = (schedule or 1.0) ** epoch
            for i, (p, g) in enumerate(zip(model.parameters(), gradients, strict=True)):
                p.sub_((0.05 if i < 2 else 0.2) * factor * g)
    torch.testing.assert_close(weights(ours), weights(model), rtol=1e-5, atol=1e-6)
    file = tmp_path / "run.pt"
    with pytest.raises(KeyboardInterrupt):
        quiet(resumed, blobs(), checkpoint=file, observe=stop, **given)
    quiet(resumed, blobs(), checkpoint=file, **given)
    assert torch.equal(weights(resumed), weights(ours))


@pytest.mark.parametrize("which", ["train", "val"])
def test_a_set_is_a_split(which):
    data = {"train": blobs()} | {which: (blobs().x, blobs().y)}
    with pytest.raises(TypeError, match=rf"{which} is a data.Split\(x, y\), not tuple"):
        fit(network(), data.pop("train"), epochs=1, progress=False, **data)


def test_the_generators_of_all_devices_are_put_back(monkeypatch):
    """torch.manual_seed seeds them all, whatever the model is on."""
    kept, fork = [], torch.random.fork_rng

    def watched(devices):
        kept.append(list(devices))
        return fork(devices=[])

    model = network()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.random, "fork_rng", watched)
    quiet(model, blobs(), epochs=1)
    assert kept == [[0, 1, 2]]


def test_divergence_is_an_error():
    model = network()
    with pytest.raises(DivergenceError, match="learning rate"):
        quiet(model, blobs(), epochs=50, batch_size=20, lr=1e20, optimizer="sgd")
    assert not model.training
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"batch_size": 0},
        {"lr": 0.0},
        {"lr": math.nan},
        {"optimizer": "lion"},
        {"schedule": "steps"},
        {"schedule": math.nan},
        {"schedule": math.inf},
        {"schedule": -0.5},
        {"schedule": lambda _: math.nan},
        {"schedule": lambda _: -1},
    ],
)
def test_bad_settings_raise(wrong):
    model = network()
    with pytest.raises(ValueError, match=next(iter(wrong))):
        quiet(model, blobs(), **({"epochs": 1} | wrong))
    assert torch.equal(weights(model), weights(network())), "before anything is trained"


def test_nothing_to_train_raises():
    with pytest.raises(ValueError, match="training set is empty"):
        quiet(network(), blobs()[:0], epochs=1)
    model = network()
    with pytest.raises(ValueError, match="validation set is empty"):
        quiet(model, blobs(), epochs=1, val=blobs()[:0])
    assert torch.equal(weights(model), weights(network())), "before anything is trained"
    with pytest.raises(ValueError, match="no parameter"):
        quiet(network().requires_grad_(False), blobs(), epochs=1)
    with pytest.raises(ValueError, match="no parameter"):
        quiet(nn.Flatten(), blobs(), epochs=1)
    with pytest.raises(TypeError, match="epochs"):
        quiet(network(), blobs(), epochs=1.5)
    with pytest.raises(TypeError, match="model is a torch module, not function"):
        quiet(lambda x: x, blobs(), epochs=1)
    for loss in ("ce", nn.CrossEntropyLoss()):
        with pytest.raises(TypeError, match="for cross-entropy leave it out"):
            quiet(network(), blobs(), epochs=1, loss=loss)


X, Y = blobs().x, blobs().y
OTHER = {
    "seed": 4,
    "epochs": 2,
    "batch_size": 30,
    "lr": 0.5,
    "optimizer": torch.optim.SGD,
    "schedule": 0.5,
    "loss": lambda m, x, y: m(x).square().mean(),
    "val": blobs(9, seed=1),
    "score": lambda *_: 1.0,
    "model": network(bend=nn.Tanh),
    "train": Split(X + 0.1, Y),
}


MORE = [
    ("model", network(width=17)),
    ("model", network(dropout=0.5)),
    ("model", network().double()),
    ("train", Split(X, (Y + 1) % 3)),
]


@pytest.mark.parametrize(("name", "other"), [*OTHER.items(), *MORE])
def test_checkpoint_of_another_run_is_refused(tmp_path, name, other):
    file = tmp_path / "deep" / "run.pt"
    given = {"model": network(), "train": blobs(), "epochs": 1, "checkpoint": file}
    quiet(**given)
    kept = file.read_bytes()
    with pytest.raises(
        ValueError, match=rf"another run \({'data' if name == 'train' else name} = "
    ):
        quiet(**given | {name: other})
    assert file.read_bytes() == kept


def test_no_setting_is_forgotten():
    """A parameter of ``fit`` either makes another run or can't change the weights."""
    free = {"checkpoint", "observe", "progress"}
    assert inspect.signature(fit).parameters.keys() - free == OTHER.keys()


def test_numbers_of_numpy_are_numbers(tmp_path):
    """Also those that a schedule or an optimizer leaves in the file."""

    def stop(epoch, _):
        if epoch == 2:
            raise KeyboardInterrupt

    def halves(epoch):
        return np.float64(0.5) ** epoch

    file = tmp_path / "run.pt"
    given = {"epochs": np.int64(4), "batch_size": np.int64(20), "lr": np.logspace(-2, 0, 3)[0]}
    for schedule in (halves, np.float32(0.5), np.float64(0.5)):
        given |= {"schedule": schedule, "seed": np.int64(3)}
        resumed, straight = network(), network()
        with pytest.raises(KeyboardInterrupt):
            quiet(resumed, blobs(), checkpoint=file, observe=stop, **given)
        quiet(resumed, blobs(), checkpoint=file, **given)
        plain = {"epochs": 4, "batch_size": 20, "lr": 0.01, "schedule": 0.5, "seed": 3}
        quiet(straight, blobs(), **plain)
        assert torch.equal(weights(resumed), weights(straight))
        file.unlink()


@pytest.mark.parametrize("content", [b"", b"hello", "weights", "half"])
def test_what_is_no_checkpoint_is_refused_by_name(tmp_path, content):
    file = tmp_path / "run.pt"
    if content == "half":
        quiet(network(), blobs(), epochs=1, checkpoint=file)
        content = file.read_bytes()[:-200]
    if content == "weights":
        torch.save(network().state_dict(), file)
    else:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=r"run\.pt is no checkpoint"):
        quiet(network(), blobs(), epochs=1, checkpoint=file)


def test_finished_run_is_loaded_not_repeated(tmp_path):
    file, first, second = tmp_path / "run.pt", network(), network(seed=1)
    settings = {"epochs": 3, "val": blobs(9, seed=1), "checkpoint": file}
    told = quiet(first, blobs(), **settings)
    assert quiet(second, blobs(), **settings) == told
    assert torch.equal(weights(first), weights(second))


RUN = {"epochs": 12, "batch_size": 20, "lr": 0.02, "schedule": "cosine", "seed": 11}
CHILD = """
import sys, time
sys.path.insert(0, {folder!r})
from test_training import RUN, blobs, network, quiet

model = network(dropout=0.5)
model.register_forward_pre_hook(lambda *_: time.sleep(0.03))
quiet(model, blobs(), val=blobs(9, seed=1), checkpoint={file!r},
      observe=lambda epoch, model: print(epoch, flush=True), **RUN)
"""


def test_resumes_exactly_after_a_kill(tmp_path):
    """SIGKILL a training process in mid-flight; the end must not differ in a single bit."""
    file = str(tmp_path / "run.pt")
    code = CHILD.format(folder=str(Path(__file__).parent), file=file)
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert [process.stdout.readline() for _ in range(4)] == ["0\n", "1\n", "2\n", "3\n"]
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    seen, resumed, straight = [], network(seed=1, dropout=0.5), network(dropout=0.5)
    settings = {"val": blobs(9, seed=1), **RUN}
    told = quiet(resumed, blobs(), checkpoint=file, observe=lambda e, _: seen.append(e), **settings)
    assert seen in (list(range(3, 12)), list(range(4, 12)))
    expected = quiet(straight, blobs(), **settings)
    assert (told.loss, told.score, told.best) == (expected.loss, expected.score, expected.best)
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
