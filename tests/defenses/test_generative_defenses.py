"""DefenseGAN and analysis by synthesis, against closed forms, a loop and torch's optimizers."""

import copy

import pytest
import torch
from torch import nn

from adv.attacks.common import GradientMaskingWarning, generator, input_gradient
from adv.attacks.gradient import fgsm
from adv.defenses.generative import AnalysisBySynthesis, DefenseGAN
from adv.lab import data, models, zoo
from adv.lab.evaluation import accuracy


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Linear(nn.Module):
    """G(z) = Wz + b: everything is known in closed form."""

    def __init__(self, W, b, shape):
        super().__init__()
        self.W, self.b = nn.Parameter(W), nn.Parameter(b)
        self.latent, self.shape = W.shape[1], shape

    def decode(self, z):
        return (z @ self.W.T + self.b).unflatten(1, self.shape)


class Curved(nn.Module):
    """A generator with several minima and batch normalization."""

    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.net = nn.Sequential(
                nn.Linear(3, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 12)
            )
            self.net(torch.randn(64, 3))
        self.latent = 3
        self.double()

    def decode(self, z):
        return (2 * self.net(z).sin()).unflatten(1, (1, 3, 4))


def classifier(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).double()


@pytest.fixture
def linear():
    return Linear(noise(12, 3), noise(12, seed=1), (1, 3, 4))


@pytest.fixture
def x():
    return noise(5, 1, 3, 4, seed=2)


# ------------------------------------------------------------------------------------ DefenseGAN


def test_the_projection_is_that_of_least_squares(linear, x):
    defense = DefenseGAN(linear, classifier(), restarts=2, steps=600, lr=0.02)
    target = (x.flatten(1) - linear.b).T
    wanted = torch.linalg.lstsq(linear.W, target).solution.T
    z = defense.project(x)
    assert torch.allclose(z, wanted, atol=1e-6)
    P = linear.W @ torch.linalg.pinv(linear.W)
    assert torch.allclose(defense.purify(x).flatten(1), (P @ target).T + linear.b, atol=1e-5)
    assert torch.allclose(defense(x), defense.classifier(linear.decode(wanted)), atol=1e-5)


def test_the_descent_is_that_of_torch_for_one_image_and_one_start(x):
    decoder = Curved().eval()
    defense = DefenseGAN(decoder, classifier(), restarts=3, steps=10, lr=0.01, momentum=0.6)
    starts = [torch.randn(1, 3, generator=generator(0, r)).double() for r in range(3)]
    ends = []
    for image in x:
        found = []
        for start in starts:
            z = start.clone().requires_grad_()
            sgd = torch.optim.SGD([z], lr=0.01, momentum=0.6)
            for step in range(10):
                # torch's buffer holds the gradients without the rate, ours with it
                if step == 8:
                    sgd.state[z]["momentum_buffer"] *= 10
                    sgd.param_groups[0]["lr"] = 0.001
                sgd.zero_grad()
                (decoder.decode(z) - image).square().sum().backward()
                sgd.step()
            error = (decoder.decode(z) - image).square().sum()
            found.append((error.item(), z.detach()))
        ends.append(min(found, key=lambda pair: pair[0])[1])
    assert torch.allclose(defense.project(x), torch.cat(ends), atol=1e-9)


def test_more_restarts_are_never_worse_and_the_batch_plays_no_part(x):
    decoder, values = Curved(), []
    for restarts in (1, 2, 8):
        defense = DefenseGAN(decoder, classifier(), restarts=restarts, steps=30, lr=0.01)
        values.append(defense.inner(defense.project(x), x))
    assert (values[1] <= values[0]).all()
    assert (values[2] <= values[1]).all()
    assert (values[2] < values[0] - 0.1).any()
    assert torch.allclose(defense(x[2:3]), defense(x)[2:3], atol=1e-9)
    assert torch.equal(defense(x), defense(x))


def test_a_given_start_is_the_only_one(linear, x):
    defense = DefenseGAN(linear, classifier(), steps=50, lr=0.01)
    start = noise(5, 3, seed=3)
    assert torch.equal(defense.project(x, start=start, steps=0), start)
    _, gradient = input_gradient(lambda z: defense.inner(z, x), start)
    # One step is in the last fifth of all steps.
    stepped = defense.project(x, start=start, steps=5) - defense.project(x, start=start, steps=0)
    assert (stepped * gradient).sum() < 0
    assert torch.allclose(
        defense.project(x, start=start, steps=1), start - 0.01 * gradient, atol=1e-12
    )


def test_other_seeds_give_other_starts_and_copies_of_the_networks(x):
    defense = DefenseGAN(Curved(), classifier(), restarts=1, steps=0, spread=0.5)
    other = defense.reseeded(7)
    assert not torch.equal(other.project(x), defense.project(x))
    assert torch.equal(other.project(x), other.project(x))
    assert other.generator is not defense.generator
    draws = DefenseGAN(Curved(), classifier(), restarts=1, steps=0, spread=2.0)
    assert torch.allclose(draws.project(x), 4 * defense.project(x))


def test_the_gradient_vanishes_and_attacks_say_so(linear, x):
    x = x.sigmoid()
    defense = DefenseGAN(linear, classifier(), restarts=1, steps=5, lr=0.01)
    value, gradient = input_gradient(lambda z: defense(z)[:, 0], x)
    assert value.isfinite().all()
    assert (gradient == 0).all()
    with pytest.warns(GradientMaskingWarning):
        fgsm(defense, x, defense(x).argmax(1), eps=0.1)


def test_nothing_is_left_behind(x):
    decoder = Curved().train()
    defense = DefenseGAN(decoder, classifier(), restarts=2, steps=3, lr=0.01)
    assert not decoder.training
    decoder.train()
    before = [value.clone() for value in decoder.state_dict().values()]
    state = torch.get_rng_state()
    with torch.no_grad():
        first = defense(x)
    assert torch.allclose(first, defense(x))
    assert decoder.training
    assert all(map(torch.equal, before, decoder.state_dict().values()))
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in defense.parameters())
    assert not x.requires_grad


class Cubic(nn.Module):
    """G(z) = z^3, on which large steps from far away explode."""

    latent = 12

    def decode(self, z):
        return z.pow(3).unflatten(1, (1, 3, 4))


def test_a_start_that_diverges_does_not_win():
    x = torch.full((1, 1, 3, 4), 0.5).double()
    defense = DefenseGAN(Cubic(), classifier(), restarts=40, steps=60, lr=0.02)
    ends = [
        defense.project(x, start=torch.randn(1, 12, generator=generator(0, r)).double())
        for r in range(40)
    ]
    fine = [z for z in ends if z.isfinite().all()]
    assert 0 < len(fine) < 40
    best = min(fine, key=lambda z: defense.inner(z, x).item())
    assert torch.allclose(defense.project(x), best)


# ------------------------------------------------------------------------ analysis by synthesis


@pytest.fixture
def synthesis():
    decoders = [Linear(noise(12, 3, seed=s), noise(12, seed=10 + s), (1, 3, 4)) for s in range(4)]
    settings = {"beta": 0.4, "draws": 40, "steps": 250, "lr": 0.05, "radius": 50.0}
    return decoders, AnalysisBySynthesis(decoders, **settings).double(), settings


def test_losses_are_those_of_ridge_regression(synthesis, x):
    decoders, defense, _ = synthesis
    found, codes = defense.losses(x), defense.infer(x)
    for c, decoder in enumerate(decoders):
        W, target = decoder.W.detach(), (x.flatten(1) - decoder.b).T.detach()
        z = torch.linalg.solve(W.T @ W + 0.2 * torch.eye(3), W.T @ target)
        loss = (W @ z - target).square().sum(0) + 0.2 * z.square().sum(0)
        assert torch.allclose(found[:, c], loss, atol=1e-4)
        assert torch.allclose(codes[:, c], z.T, atol=1e-3)
    assert torch.equal(defense(x), -found)


def test_the_gradient_is_that_of_the_envelope(synthesis, x):
    decoders, defense, _ = synthesis
    _, gradient = input_gradient(lambda v: defense(v)[:, 1], x)
    # The closed form of the whole: -2 (x - b - W (W'W + beta/2)^-1 W' (x - b)).
    W, b = decoders[1].W.detach(), decoders[1].b.detach()
    S = W @ torch.linalg.solve(W.T @ W + 0.2 * torch.eye(3), W.T)
    wanted = -2 * ((torch.eye(12) - S) @ (x.flatten(1) - b).T).T
    assert torch.allclose(gradient.flatten(1), wanted, atol=1e-2)


def test_inference_is_adam_from_the_best_draw_with_the_code_kept_short(x):
    decoders = [Curved(seed) for seed in range(3)]
    settings = {"beta": 0.3, "draws": 9, "steps": 12, "lr": 0.2, "radius": 1.0}
    defense = AnalysisBySynthesis(decoders, **settings)
    for decoder in decoders:
        decoder.eval()
    drawn = torch.randn(10, 3, generator=generator(0))
    codes = drawn[drawn.norm(dim=1).argsort()[:9]].double()
    assert torch.equal(defense.codes, codes)
    for n, image in enumerate(x):
        for c, decoder in enumerate(decoders):

            def energy(z, decoder=decoder, image=image):
                return (decoder.decode(z) - image).flatten(1).square().sum(1) + 0.15 * (z * z).sum(
                    1
                )

            z = codes[energy(codes).argmin()][None].clone()
            z = (z * (1 / z.norm().clamp_min(1))).requires_grad_()
            adam = torch.optim.Adam([z], lr=0.2)
            for _ in range(12):
                adam.zero_grad()
                energy(z).sum().backward()
                adam.step()
                with torch.no_grad():
                    z *= 1 / z.norm().clamp_min(1)
            assert torch.allclose(defense.infer(x)[n, c], z[0].detach(), atol=1e-7)
    assert (defense.infer(x).norm(dim=2) <= 1 + 1e-9).all()
    assert (defense.infer(x).norm(dim=2) > 0.999).any(), "the clip is never active"


def test_all_classes_in_one_pass_are_the_decoders_one_by_one(x):
    decoders = [Curved(seed).eval() for seed in range(3)]
    defense = AnalysisBySynthesis(decoders, draws=5, steps=0)
    z = noise(4, 3, 3)
    apart = torch.stack([decoder.decode(z[:, c]) for c, decoder in enumerate(decoders)], dim=1)
    assert torch.allclose(defense.decode(z), apart, atol=1e-12)
    assert defense.inner(z[:4], x[:4]).shape == (4,)
    whole = -defense.logits(z, x[:4]).sum(1)
    assert torch.allclose(defense.inner(z, x[:4]), whole)


@pytest.mark.parametrize("kind", ["abs-vae", "dc-vae"])
def test_convolutional_decoders_are_evaluated_as_one(kind):
    widths = {"widths": (4, 6, 8), "code": 6} if kind == "dc-vae" else {}
    bank = models.build("vaes", seed=0, classes=3, kind=kind, latent=4, **widths)
    for part in bank.parts:
        for module in part.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
    defense = AnalysisBySynthesis(bank.eval().parts, draws=5, steps=1)
    z = noise(2, 3, 4).float()
    apart = torch.stack([part.decode(z[:, c]) for c, part in enumerate(bank.parts)], dim=1)
    assert torch.allclose(defense.decode(z), apart, atol=1e-5)
    assert defense(torch.rand(2, 1, 28, 28)).shape == (2, 3)


def test_confidence_is_bayes_rule_and_uniform_far_away(synthesis, x):
    defense = synthesis[1]
    defense.steps = 20
    losses = defense.losses(x)
    p = defense.confidence(x)
    assert torch.allclose(p.sum(1), torch.ones(5).double())
    assert torch.equal(p.argmax(1), defense(x).argmax(1))
    defense.scale, defense.offset = 0.1, 0.0
    assert torch.allclose(defense.confidence(x), (-0.1 * losses).softmax(1))
    defense.scale, defense.offset = 1.0, 1e-3
    expected = ((-losses).exp() + 1e-3) / ((-losses).exp() + 1e-3).sum(1, keepdim=True)
    assert torch.allclose(defense.confidence(x), expected)
    assert torch.allclose(defense.confidence(x + 100), torch.full((5, 4), 0.25).double())


def test_weights_are_copied_and_move_as_one(synthesis, x):
    decoders, defense, _ = synthesis
    defense.steps = 100
    before = defense(x)
    with torch.no_grad():
        decoders[0].W.zero_()
    assert torch.equal(defense(x), before)
    assert defense.float()(x.float()).dtype == torch.float32
    again = defense.double().reseeded(3)
    assert not torch.equal(again.codes, defense.codes)
    assert torch.allclose(again(x), before, atol=1e-2)


def test_a_confidence_without_an_offset_does_not_underflow(synthesis, x):
    defense = synthesis[1]
    defense.steps, defense.scale, defense.offset = 5, 1e4, 0.0
    p = defense.confidence(x)
    assert (1e4 * defense.losses(x) > 1e3).all(), "float64 has no exp(-1000)"
    assert torch.allclose(p, (-1e4 * defense.losses(x)).softmax(1))


def test_codes_of_length_zero(synthesis, x):
    decoders = synthesis[0]
    defense = AnalysisBySynthesis(decoders, draws=5, steps=3, radius=0.0, lr=0.0).double()
    assert (defense.infer(x) == 0).all()
    wanted = torch.stack([(d.b.view(1, 3, 4) - x).flatten(1).square().sum(1) for d in decoders], 1)
    assert torch.allclose(-defense(x), wanted)


@pytest.mark.parametrize("way", ["itself", "copied", "saved"])
def test_loaded_weights_are_drawn_from(way, x, tmp_path):
    banks = [[Curved(seed).eval() for seed in seeds] for seeds in ((0, 1), (2, 3))]
    first, second = (AnalysisBySynthesis(bank, draws=20, steps=2) for bank in banks)
    if way == "copied":
        first = copy.deepcopy(first)
    if way == "saved":
        torch.save(first, tmp_path / "defense.pt")
        first = torch.load(tmp_path / "defense.pt", weights_only=False)
    first.load_state_dict(second.state_dict())
    assert torch.equal(first.images, second.images)
    assert torch.equal(first.offsets, second.offsets)
    assert torch.equal(first(x), second(x))
    assert torch.equal(first.reseeded(1).images, second.reseeded(1).images)


# --------------------------------------------------------------------------------------- together


def test_digits_are_classified_by_both():
    some = data.load("digits").test.take(200)
    gan = DefenseGAN(zoo.load("digits/wgan"), zoo.load("digits/cnn"), restarts=4, steps=40)
    assert accuracy(gan, some.x, some.y) >= 0.9
    settings = zoo.entry("digits/abs").defense
    synthesis = AnalysisBySynthesis(zoo.load("digits/abs").parts, **settings)
    assert accuracy(synthesis, some.x, some.y) >= 0.95
    sure = synthesis.confidence(some.x).amax(1).mean()
    assert synthesis.confidence(torch.rand_like(some.x)).amax(1).mean() < sure


WRONG = [
    ({"steps": -1}, "steps"),
    ({"lr": -1.0}, "lr"),
    ({"seed": -1}, "seed"),
]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [*WRONG, ({"restarts": 0}, "restarts"), ({"momentum": 1.0}, "momentum")],
)
def test_defensegan_refuses_bad_settings(linear, wrong, said):
    with pytest.raises(ValueError, match=said):
        DefenseGAN(linear, classifier(), **wrong)


@pytest.mark.parametrize(
    ("wrong", "said"), [*WRONG, ({"draws": 0}, "draws"), ({"beta": -1.0}, "beta")]
)
def test_synthesis_refuses_bad_settings(linear, wrong, said):
    with pytest.raises(ValueError, match=said):
        AnalysisBySynthesis([linear, linear], **wrong)


def test_decoders_are_several_of_one_architecture(linear):
    with pytest.raises(ValueError, match="two or more"):
        AnalysisBySynthesis([linear])
    with pytest.raises(ValueError, match="one architecture"):
        AnalysisBySynthesis([linear, Linear(noise(12, 2), noise(12), (1, 3, 4))])


@pytest.mark.parametrize("steps", [True, False, 0.0, 2.0, "3"])
def test_steps_are_whole(linear, steps, x):
    with pytest.raises(TypeError, match="integer >= 0"):
        DefenseGAN(linear, classifier(), steps=steps)
    with pytest.raises(TypeError, match="integer >= 0"):
        AnalysisBySynthesis([linear, linear], steps=steps)
    with pytest.raises(TypeError, match="integer >= 0"):
        DefenseGAN(linear, classifier()).project(x, steps=steps)


def test_inputs_are_of_the_shape_that_is_generated(linear, x):
    for defense in (
        DefenseGAN(linear, classifier(), restarts=1, steps=2, lr=0.01),
        AnalysisBySynthesis([linear, linear], draws=5, steps=2),
    ):
        for steps in (0, 2):
            defense.steps = steps
            for bad in (x[:, 0], x[:, :, None]):
                with pytest.raises(ValueError, match="the generator makes"):
                    defense(bad)
    with pytest.raises(ValueError, match="the generator makes"):
        DefenseGAN(linear, classifier()).inner(noise(5, 3), x[:1])
