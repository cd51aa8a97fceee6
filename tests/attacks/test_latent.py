"""Attacks on codes of a manifold: closed forms for linear decoders, and their manners."""

import math
from functools import partial

import pytest
import torch
from helpers import WIDE, affine, inputs
from torch import nn
from torch.nn.functional import cross_entropy

from adv.attacks.common import GradientMaskingWarning, margin
from adv.attacks.latent import latent_fgsm, latent_noise, latent_pgd, reconstruct
from adv.defenses.adversarial import adversarial_loss, joint
from adv.lab import data, training, zoo
from adv.lab.generative import VAEManifold

NORMS = {"linf": 1, "l2": 2, 3.0: 1.5}  # and the dual exponents


class Linear:
    """Probabilistic PCA of each class: orthogonal decoders of unequal scales."""

    def __init__(self, d, k, classes, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.mean = torch.rand(classes, d, generator=g, dtype=torch.float64)
        basis = torch.linalg.qr(torch.randn(classes, d, k, generator=g, dtype=torch.float64))[0]
        self.W = basis * torch.linspace(2, 0.5, k, dtype=torch.float64)

    def encode(self, x, y):
        return torch.linalg.lstsq(self.W[y], (x - self.mean[y])[..., None]).solution[..., 0]

    def decode(self, z, y):
        return self.mean[y] + (self.W[y] @ z[..., None])[..., 0]


@pytest.fixture
def scene():
    """A two-class affine model and a linear manifold: everything has a closed form."""
    model, x = affine(2, 9), inputs(7, 9)
    y = torch.arange(7) % 2
    return model, x, y, Linear(9, 4, 2)


def least_margin(model, x, y, manifold, eps, norm):
    """The margin of the reconstruction less the radius times the slope's dual norm."""
    c = torch.where(y == 0, 1.0, -1.0)[:, None] * (model.weight[0] - model.weight[1])
    slope = (manifold.W[y].mT @ c[..., None])[..., 0]
    return margin(model(manifold.decode(manifold.encode(x, y), y)), y) - eps * torch.linalg.norm(
        slope, ord=NORMS[norm], dim=1
    )


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_on_affine_models_both_attacks_are_the_closed_form(scene, norm):
    model, x, y, manifold = scene
    given = {"manifold": manifold, "eps": 0.7, "norm": norm, "bounds": WIDE}
    least = least_margin(*scene, 0.7, norm)
    for x_adv in (
        latent_fgsm(model, x, y, **given),
        latent_pgd(model, x, y, **given, steps=60, step_size=0.2),
    ):
        assert torch.allclose(margin(model(x_adv), y), least, atol=1e-3)
        off = x_adv - manifold.decode(manifold.encode(x_adv, y), y)
        assert off.abs().max() < 1e-10, "the point lies on the manifold of its class"
        code = manifold.encode(x_adv, y) - manifold.encode(x, y)
        lengths = torch.linalg.norm(code, ord=math.inf if norm == "linf" else 2, dim=1)
        assert lengths.max() <= 0.7 + 1e-9
    one = latent_fgsm(model, x, y, **given)
    assert torch.allclose(margin(model(one), y), least, atol=1e-9)


def test_no_budget_is_the_reconstruction(scene):
    model, x, y, manifold = scene
    projector = manifold.W[y] @ torch.linalg.pinv(manifold.W[y])
    expected = manifold.mean[y] + (projector @ (x - manifold.mean[y])[..., None])[..., 0]
    given = {"manifold": manifold, "bounds": WIDE}
    again = reconstruct(x, y, **given)
    assert torch.allclose(again, expected, atol=1e-12)
    clipped = reconstruct(x, y, manifold=manifold)
    assert torch.equal(clipped, again.clamp(0, 1))
    assert not torch.equal(clipped, again)
    for attack in (latent_fgsm, latent_noise):
        assert torch.equal(attack(model, x, y, eps=0.0, **given), again)
    assert torch.equal(latent_pgd(model, x, y, eps=0.0, steps=2, **given), again)


@pytest.mark.parametrize("loss", ["ce", "margin"])
def test_one_step_in_any_norm_and_the_last_point_of_pgd_count(scene, loss):
    model, x, y, manifold = scene
    given = {"manifold": manifold, "eps": 0.7, "loss": loss, "bounds": WIDE}
    cubic = latent_fgsm(model, x, y, norm=3.0, **given)
    assert torch.allclose(margin(model(cubic), y), least_margin(*scene, 0.7, 3.0), atol=1e-9)
    seen = []
    one = latent_pgd(
        model,
        x,
        y,
        steps=1,
        step_size=0.7,
        random_start=False,
        observe=lambda _, s: seen.append(s["z"]),
        **given,
    )
    assert torch.allclose(seen[0], manifold.encode(x, y))
    assert torch.allclose(margin(model(one), y), least_margin(*scene, 0.7, "linf"), atol=1e-9)


def test_nothing_is_drawn_without_a_random_start(scene, monkeypatch):
    model, x, y, manifold = scene
    monkeypatch.setattr("adv.attacks.latent.noise", None)
    given = {"manifold": manifold, "eps": 0.7, "steps": 2, "bounds": WIDE}
    assert latent_pgd(model, x, y, random_start=False, **given).shape == x.shape
    with pytest.raises(ValueError, match="seed"):
        latent_pgd(model, x, y, random_start=False, seed=-1, **given)


def test_a_manifold_in_training_mode_is_used_in_evaluation_mode(digits):
    model, x, y, manifold = digits

    class Dropping(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def encode(self, x, y):
            return self.drop(manifold.encode(x, y))

        decode = staticmethod(manifold.decode)

    given = {"eps": 0.5}
    for attack in (latent_fgsm, latent_noise, partial(latent_pgd, steps=2)):
        expected = attack(model, x, y, manifold=manifold, **given)
        assert torch.equal(attack(model, x, y, manifold=Dropping().train(), **given), expected)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda x, y: (x + 1, y), ValueError),
        (lambda x, y: (x * math.nan, y), ValueError),
        (lambda x, y: (x, y[:3]), ValueError),
        (lambda x, y: (x, y.double()), TypeError),
    ],
)
def test_reconstruct_refuses_bad_input(digits, change, error):
    _, x, y, manifold = digits
    with pytest.raises(error):
        reconstruct(*change(x, y), manifold=manifold)


def test_noise_is_weaker_and_as_long(scene):
    model, x, y, manifold = scene
    given = {"manifold": manifold, "eps": 0.7, "bounds": WIDE}
    seen = []
    noisy = latent_noise(model, x, y, draws=5, observe=lambda _, s: seen.append(s), **given)
    best = least_margin(*scene, 0.7, "linf")
    assert (margin(model(noisy), y) >= best - 1e-9).all()
    assert torch.equal(
        margin(model(noisy), y), torch.stack([margin(s["logits"], y) for s in seen]).amin(0)
    )
    assert len({tuple(s["z"].flatten().tolist()) for s in seen}) == 5
    code = manifold.encode(noisy, y) - manifold.encode(x, y)
    assert torch.allclose(code.abs(), torch.full_like(code, 0.7))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_noise_has_the_law_and_the_seed_asked_for(scene, norm):
    model, x, y, manifold = scene
    order = {"linf": math.inf, "l2": 2.0}[norm]

    def shift(**settings):
        seen = []
        latent_noise(model, x, y, manifold=manifold, eps=0.7, norm=norm, bounds=WIDE,
                     observe=lambda _, s: seen.append(s["z"]), **settings)  # fmt: skip
        return seen[0] - manifold.encode(x, y)

    sign, sphere, ball = (shift(kind=kind) for kind in ("sign", "sphere", "ball"))
    sizes = [torch.linalg.norm(z, ord=order, dim=1) for z in (sign, sphere, ball)]
    assert torch.allclose(torch.stack(sizes[:2]), torch.tensor(0.7).double())
    assert (sizes[2] < 0.7).all()
    assert torch.allclose(sign.abs(), sign.abs()[:1, :1].expand_as(sign))
    assert sphere.abs().std(dim=1).min() > 0.01
    for kind in ("sign", "sphere", "ball"):
        assert torch.equal(shift(kind=kind, seed=3), shift(kind=kind, seed=3))
        assert not torch.equal(shift(kind=kind, seed=3), shift(kind=kind, seed=4))


@pytest.fixture(scope="module")
def digits():
    test = data.load("digits").test
    manifold = VAEManifold(zoo.load("digits/cvae"))
    return zoo.load("digits/mlp"), test.x[:40], test.y[:40], manifold


def test_the_step_is_that_of_automatic_differentiation(digits):
    model, x, y, manifold = digits
    z = manifold.encode(x, y).detach().requires_grad_()
    images = manifold.vae.decode(z, y)
    (gradient,) = torch.autograd.grad(cross_entropy(model(images), y, reduction="sum"), z)
    expected = manifold.vae.decode(z + 1.0 * gradient.sign(), y)
    x_adv = latent_fgsm(model, x, y, manifold=manifold, eps=1.0)
    assert torch.allclose(x_adv, expected, atol=1e-6)
    assert not x_adv.requires_grad
    given = {"manifold": manifold, "eps": 1.0}
    fall = latent_fgsm(
        model, x, y, loss=lambda f, y: -cross_entropy(f, y, reduction="none"), **given
    )
    opposite = manifold.vae.decode(z - 1.0 * gradient.sign(), y)
    assert torch.allclose(fall, opposite, atol=1e-6), "the loss given is the one that climbs"


def test_pgd_is_stronger_than_one_step_and_than_noise(digits):
    model, x, y, manifold = digits
    given = {"manifold": manifold, "eps": 1.0}
    attacks = (latent_pgd, latent_fgsm, latent_noise)
    margins = [margin(model(attack(model, x, y, **given)), y).mean() for attack in attacks]
    assert margins[0] < margins[1] < margins[2] - 0.5


def test_more_restarts_are_never_worse_and_nothing_is_random(digits):
    model, x, y, manifold = digits
    runs = [
        latent_pgd(model, x, y, manifold=manifold, eps=0.8, steps=8, restarts=n) for n in (1, 3, 3)
    ]
    worth = [margin(model(run), y) for run in runs]
    assert (worth[1] <= worth[0] + 1e-5).all()
    assert torch.equal(runs[1], runs[2])
    other = latent_pgd(model, x, y, manifold=manifold, eps=0.8, steps=8, seed=1)
    assert not torch.equal(runs[0], other)


def test_what_is_kept_is_the_worst_point_seen(digits):
    model, x, y, manifold = digits
    seen = []
    x_adv = latent_pgd(
        model,
        x,
        y,
        manifold=manifold,
        eps=0.8,
        steps=6,
        step_size=0.8,
        restarts=2,
        observe=lambda _, s: seen.append(s),
    )
    assert [s["restart"] for s in seen] == [0] * 6 + [1] * 6
    assert not torch.equal(seen[0]["z"], seen[6]["z"])
    center = manifold.encode(x, y).detach()
    assert max(float((s["z"] - center).abs().max()) for s in seen) <= 0.8 + 1e-6
    assert torch.allclose(seen[3]["x_adv"], manifold.decode(seen[3]["z"], y), atol=1e-6)
    least = torch.stack([margin(s["logits"], y) for s in seen]).amin(dim=0)
    assert (margin(model(x_adv), y) <= least + 1e-4).all()


def test_nothing_is_disturbed(digits):
    model, x, y, manifold = digits
    manifold.train()
    parameters = [*model.parameters(), *manifold.parameters()]
    random = torch.get_rng_state()
    with torch.inference_mode():
        latent_pgd(model, x, y, manifold=manifold, eps=0.5, steps=2)
    latent_fgsm(model, x, y, manifold=manifold, eps=0.5)
    assert all(p.grad is None and p.requires_grad for p in parameters)
    assert manifold.training
    assert manifold.vae.training
    assert torch.equal(random, torch.get_rng_state())
    manifold.eval()


def test_a_model_without_classes_is_a_manifold_that_ignores_the_label(digits):
    model, x, y, _ = digits
    manifold = VAEManifold(zoo.load("digits/vae"))
    assert torch.equal(manifold.encode(x, y), manifold.encode(x, 9 - y))
    assert torch.equal(
        reconstruct(x, y, manifold=manifold), reconstruct(x, 9 - y, manifold=manifold)
    )
    assert latent_fgsm(model, x, y, manifold=manifold, eps=1.0).shape == x.shape


def test_decoded_images_are_clipped_before_the_model_sees_them(scene):
    model, x, y, manifold = scene
    seen = []
    x_adv = latent_pgd(
        model, x, y, manifold=manifold, eps=1.0, steps=5, observe=lambda _, s: seen.append(s)
    )
    assert x_adv.min() == 0
    assert x_adv.max() == 1
    assert torch.allclose(seen[2]["logits"], model(seen[2]["x_adv"]))


def test_training_takes_them_by_name_and_jointly(digits):
    model, x, y, manifold = digits
    latent = {"attack": "latent_fgsm", "manifold": manifold, "eps": 1.0}
    moved = latent_fgsm(model, x, y, manifold=manifold, eps=1.0)
    expected = cross_entropy(model(moved), y)
    assert torch.allclose(adversarial_loss(**latent)(model, x, y), expected)
    both = joint([latent, {"attack": "fgsm", "eps": 0.0}])
    assert torch.allclose(both(model, x, y), (expected + cross_entropy(model(x), y)) / 2)
    worst = joint(
        [latent, {"attack": "latent_pgd", "manifold": manifold, "eps": 1.0, "steps": 3}],
        rule="worst",
    )(model, x, y)
    assert worst >= expected - 1e-6


def test_a_dead_decoder_is_reported(scene):
    class Dead(Linear):
        def decode(self, z, y):
            return torch.full((len(z), 9), 0.5, dtype=z.dtype)

    model, x, _, _ = scene
    y = model(torch.full_like(x, 0.5)).argmax(dim=1)
    with pytest.warns(GradientMaskingWarning, match="7 of 7"):
        latent_fgsm(model, x, y, manifold=Dead(9, 4, 2), eps=0.1)
    with pytest.warns(GradientMaskingWarning, match="7 of 7"):
        latent_pgd(model, x, y, manifold=Dead(9, 4, 2), eps=0.1, steps=2)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"norm": "l1"}, "'linf' or 'l2'"),
        ({"norm": 3.0}, "'linf' or 'l2'"),
        ({"eps": -1.0}, "eps"),
        ({"steps": 0}, "steps"),
        ({"restarts": 2, "random_start": False}, "restarts"),
        ({"step_size": -0.1}, "step_size"),
        ({"bounds": (0.2, 0.3)}, "bounds"),
    ],
)
def test_bad_settings(scene, settings, says):
    model, x, y, manifold = scene
    with pytest.raises(ValueError, match=says):
        latent_pgd(model, x, y, **{"manifold": manifold, "eps": 0.1, **settings})


class Wrong:
    """A manifold with one fault."""

    def __init__(self, fault):
        self.fault = fault

    def encode(self, x, y):
        z = x[:, :3]
        return {"rank": z[..., None], "count": z[:1], "nan": z * math.nan}.get(self.fault, z)

    def decode(self, z, y):
        image = torch.ones(len(z), 9, dtype=torch.float64)
        wrong = {"shape": image[:, :8], "dtype": image.int(), "infinite": image / 0}
        return wrong.get(self.fault, image)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("rank", "codes"),
        ("count", "codes"),
        ("nan", "not finite"),
        ("shape", "decode"),
        ("dtype", "decode"),
        ("infinite", "not finite"),
    ],
)
def test_bad_manifolds(scene, fault, says):
    model, x, y, _ = scene
    for attack in (latent_fgsm, latent_pgd, latent_noise):
        with pytest.raises(ValueError, match=says):
            attack(model, x, y, manifold=Wrong(fault), eps=0.1)
    with pytest.raises(ValueError, match=says):
        reconstruct(x, y, manifold=Wrong(fault))


@pytest.mark.parametrize("attack", [latent_fgsm, latent_pgd, latent_noise])
def test_under_autocast_images_keep_the_precision_of_the_inputs(digits, attack):
    model, x, y, manifold = digits
    exact = attack(model, x, y, manifold=manifold, eps=0.5)
    with torch.autocast("cpu", torch.bfloat16):
        assert manifold.decode(manifold.encode(x, y), y).dtype == torch.bfloat16
        mixed = attack(model, x, y, manifold=manifold, eps=0.5)
        again = reconstruct(x, y, manifold=manifold)
    assert mixed.dtype == again.dtype == x.dtype
    # A sign that flips moves a code by twice the radius: few of them do.
    assert ((mixed - exact).abs() < 0.05).float().mean() > 0.9


def test_joint_training_in_mixed_precision(digits):
    model, x, y, manifold = digits
    latent = {"attack": "latent_fgsm", "eps": 0.5, "manifold": manifold}
    loss = joint([{"attack": "pgd", "eps": 0.1, "steps": 2}, latent])
    exact, mixed = (f(model, x, y) for f in (loss, training.mixed(loss)))
    assert mixed.dtype == torch.float32
    assert mixed.item() == pytest.approx(exact.item(), rel=0.05)


def test_a_manifold_may_be_a_module_or_not(digits):
    model, x, y, manifold = digits

    class Plain:
        encode, decode = manifold.encode, manifold.decode

    assert not isinstance(Plain(), nn.Module)
    given = {"eps": 0.5}
    assert torch.equal(
        latent_fgsm(model, x, y, manifold=Plain(), **given),
        latent_fgsm(model, x, y, manifold=manifold, **given),
    )
