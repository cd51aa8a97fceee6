"""The edge of what attacks accept: tiny gradients, odd types, wide bounds, models with habits.

What is here went wrong silently, or far from its cause, on inputs that are rare but allowed.
"""

import copy
import inspect
import math
import warnings
from functools import partial

import helpers
import pytest
import torch
from helpers import Stretch
from torch import nn

from adv.attacks._search import Search
from adv.attacks._size import size_of
from adv.attacks.adaptive import _reweighed, distortion_search, latent_walk, nes
from adv.attacks.argmin import WarmStart, implicit_gradient
from adv.attacks.boundary import deepfool
from adv.attacks.common import GradientMaskingWarning, check_range, leaf
from adv.attacks.confidence import confidence_step, high_confidence, nearest_class, unrolled
from adv.attacks.convex import ensemble, gnm, margin_radius
from adv.attacks.gradient import pgd
from adv.attacks.jacobian import Jacobian, singular
from adv.attacks.latent import latent_fgsm, latent_pgd, reconstruct
from adv.attacks.pdpgd import pdpgd
from adv.attacks.regression import linear, quadratic, random_perturbation, subset
from adv.attacks.representation import match
from adv.geometry import linear_oracle, norm, pixels, room


def attacks():
    """Those that need a model, inputs, what to aim at, at most a radius, and nothing else."""
    for param in helpers.attacks():
        given = inspect.signature(param.values[0]).parameters
        needed = {key for key, value in given.items() if value.default is value.empty}
        if "model" in given and needed <= {"model", "x", "y", "eps"}:
            yield param


def call(attack, model, x, y, **more):
    given = inspect.signature(attack).parameters
    settings = {"eps": 0.3, "steps": 4, **more}
    if given["y"].default is None:  # a regression's targets
        y = None
    return attack(model, x, y, **{k: v for k, v in settings.items() if k in given})


@pytest.fixture
def scene():
    """A small network, points that it classifies, and its classes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)).requires_grad_(False)
        x = torch.rand(5, 6)
    return net, x, net(x).argmax(dim=1)


# ------------------------------------------------------------------------------- tiny gradients


@pytest.mark.parametrize(
    ("dtype", "small"),
    [(torch.float32, 1e-39), (torch.float32, 1e-42), (torch.float64, 1e-310)],
)
def test_the_l2_step_ignores_entries_too_small_to_be_carried_to_their_bound(dtype, small):
    g, x = torch.tensor([[1.0, small, 0.0]], dtype=dtype), torch.full((1, 3), 0.5, dtype=dtype)
    for eps in (0.1, 2.0, 100.0):
        step = linear_oracle(g, "l2", eps, box=room(x))
        assert step[0, 0] == pytest.approx(min(eps, 0.5))
        assert step[0, 2] == 0
        assert step.isfinite().all()


def test_weights_that_decay_has_made_subnormal_do_no_harm():
    model, x = nn.Linear(6, 3), torch.full((4, 6), 0.5)
    with torch.no_grad():
        model.weight.copy_(torch.randn(3, 6, generator=torch.Generator().manual_seed(0)))
        model.weight[:, 0] *= 1e-42
        model.weight[:, 1] = 0
        y = model(x).argmax(dim=1)
        x_adv = gnm(model, x, y, eps=0.3, norm="l2")
        assert norm(x_adv - x, "l2").numpy() == pytest.approx(0.3)
        x_adv = quadratic(model, x, eps=0.3)
        assert norm(x_adv - x, "l2").numpy() == pytest.approx(0.3)


@pytest.mark.parametrize("scale", [1e-18, 1e-25, 1e-37, 1e-3, 1e18])
def test_an_implicit_gradient_is_linear_however_small_the_one_it_pulls_back(scale):
    g = torch.Generator().manual_seed(0)
    x, v, b = (torch.randn(3, 4, generator=g) for _ in range(3))
    a = torch.randn(4, 4, generator=g)
    curved = a @ a.T + torch.eye(4)

    def inner(z, x):
        return torch.einsum("bi,ij,bj->b", z, curved, z) / 2 - (x * z).sum(dim=1)

    v[2] = 0
    plain = implicit_gradient(inner, b, x, v)
    found = implicit_gradient(inner, b, x, scale * v)
    assert torch.allclose(found.gradient / scale, plain.gradient, rtol=1e-4, atol=1e-6)
    assert found.products == plain.products
    assert (found.residual <= 1e-6).all()
    assert (plain.gradient[2] == 0).all()
    assert torch.allclose(plain.gradient, torch.linalg.solve(curved, v.T).T, atol=1e-4)


def test_a_power_of_two_scales_an_implicit_gradient_to_the_bit():
    g = torch.Generator().manual_seed(0)
    x, v, b = (torch.randn(3, 4, generator=g) for _ in range(3))

    def inner(z, x):
        return (z - x.tanh()).square().sum(dim=1) + z.pow(4).sum(dim=1)

    one, two = (implicit_gradient(inner, b, x, s * v) for s in (1.0, 2.0**-60))
    assert torch.equal(one.gradient, two.gradient * 2.0**60)
    assert torch.equal(one.residual, two.residual)


def test_a_gradient_that_is_not_a_number_gives_no_radius():
    def model(z):
        length = z.square().sum(dim=1, keepdim=True).sqrt()
        return torch.cat([1 - length, length], dim=1)

    x, y = torch.tensor([[0.0, 0.0], [0.1, 0.1]]), torch.tensor([0, 0])
    flat = nn.Linear(2, 2)
    nn.init.zeros_(flat.weight)
    for nearest in (False, True):
        radius = margin_radius(model, x, y, nearest=nearest)
        assert radius.isfinite().tolist() == [False, True]
        assert radius[0].isnan()
        assert (margin_radius(flat, x, y, nearest=nearest) == math.inf).all()


# --------------------------------------------------------------------------- types and the device


@pytest.mark.parametrize("attack", list(attacks()))
@pytest.mark.parametrize("settings", [{}, {"steps": 60}, {"norm": "l2"}], ids=str)
@pytest.mark.filterwarnings("ignore")
def test_models_may_be_more_precise_than_their_inputs(attack, settings, scene):
    model, x, y = scene
    given = inspect.signature(attack).parameters
    x_adv = call(attack, lambda z: model(z).double(), x, y, **settings)
    assert x_adv.dtype == x.dtype
    assert x_adv.isfinite().all()
    if "eps" not in given:
        assert torch.allclose(x_adv, call(attack, model, x, y, **settings), atol=0.02)


@pytest.mark.parametrize("attack", list(attacks()))
@pytest.mark.filterwarnings("ignore")
def test_models_may_calculate_in_half_precision_inside(attack, scene):
    model, x, y = scene
    half = copy.deepcopy(model).bfloat16()
    x_adv = call(attack, lambda z: half(z.bfloat16()), x, y)
    assert x_adv.dtype == x.dtype
    assert x_adv.isfinite().all()


@pytest.mark.parametrize("kind", ["linf", "l2", "l1", "l0", "l1/2"])
def test_pdpgd_keeps_the_precision_of_the_inputs(kind, scene):
    model, x, y = scene
    x_adv = pdpgd(lambda z: model(z).double(), x, y, norm=kind, steps=60)
    assert x_adv.dtype == x.dtype
    assert (model(x_adv).argmax(dim=1) != y).all()


def test_the_steps_of_training_keep_the_precision_of_the_inputs(scene):
    model, x, y = scene
    z = unrolled(lambda z: model(z).double(), x, (y + 1) % 3, steps=3)
    assert z.dtype == x.dtype
    assert torch.allclose(z, unrolled(model, x, (y + 1) % 3, steps=3), atol=1e-4)
    w = torch.ones(2, 3)
    long = torch.zeros(2, dtype=torch.float64)
    assert confidence_step(long - 1, w, long, "l2").dtype == w.dtype


def test_counts_of_half_precision_are_exact():
    delta = torch.ones(1, 3, 224, 224)
    for dtype in (torch.float16, torch.bfloat16):
        assert norm(delta.to(dtype), "l0").item() == 3 * 224**2
        assert pixels(delta.to(dtype)).item() == 224**2
        assert norm(delta.to(dtype), "linf").dtype == dtype
    assert norm(delta.double(), "l0").dtype == torch.float64


@pytest.mark.parametrize("wrong", [-1, 4])
def test_indices_out_of_range_are_told_before_they_are_used(wrong):
    J = Jacobian.of(torch.ones(2, 3, 4))
    with pytest.raises(ValueError, match=rf"indices lie in 0\.\.3, but they span {min(wrong, 0)}"):
        J.columns(torch.tensor([0, wrong]))
    with pytest.raises(ValueError, match=r"indices lie in 0\.\.2"):
        J.rows(torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="indices are on meta, but the operator on cpu"):
        J.rows(torch.tensor([0], device="meta"))
    assert (singular(torch.zeros(1, 2, 3)).vector == 0).all()


@pytest.mark.cuda
def test_on_a_gpu_indices_are_checked_and_confidences_may_be_on_the_cpu(scene):
    model, x, y = scene
    J = Jacobian.of(torch.ones(2, 3, 4, device="cuda"))
    with pytest.raises(ValueError, match="indices lie in"):
        J.columns(torch.tensor([9], device="cuda"))
    with pytest.raises(ValueError, match="indices are on cpu"):
        J.columns(torch.tensor([0]))
    assert J.dense().sum() == 24
    x_adv = high_confidence(
        model.to("cuda"), x.to("cuda"), y.to("cuda"), confidence=torch.full((5,), 0.5)
    )
    assert x_adv.is_cuda


def test_labels_told_to_a_manifold_may_come_from_inference(scene):
    """An embedding, as of a conditional autoencoder, saves the labels for its backward pass."""
    model, x, y = scene

    class Conditional(nn.Module):
        def __init__(self):
            super().__init__()
            self.code, self.image = nn.Linear(6, 2), nn.Linear(4, 6)
            self.embedding = nn.Embedding(3, 2)

        def encode(self, x, y):
            return self.code(x) + self.embedding(y)

        def decode(self, z, y):
            return torch.sigmoid(self.image(torch.cat([z, self.embedding(y)], dim=1)))

    manifold = Conditional()
    for attack in (latent_fgsm, latent_pgd):
        plain = attack(model, x, y, manifold=manifold, eps=0.3)
        with torch.inference_mode():
            found = attack(model, x.clone(), y.clone(), manifold=manifold, eps=0.3)
        assert torch.equal(found, plain)


# --------------------------------------------------------------------------- models with habits


def matched(model, x, y):
    return match(model, x, torch.full((len(x), 3), 2.0), eps=0.1, steps=4)


class Habit:
    """A manifold, or a search for codes, that changes what it is given."""

    def __init__(self, model):
        self.layer = model[0]

    def encode(self, x, y):
        return self.layer(x).tanh()

    def decode(self, z, y):
        return torch.sigmoid(z)

    def explain(self, x):
        z = self.layer(x)
        return torch.stack([z[:, 0], z[:, 1], z[:, 2]], 1), z.sigmoid()[:, None].expand(-1, 3, -1)


PARTS = {
    "representation": matched,
    "quadratic subset": lambda model, x, y: subset(model, x, eps=0.1, kind="quadratic"),
    "ensemble": lambda model, x, y: ensemble([model, model])(x),
    "latent": lambda model, x, y: latent_pgd(model, x, y, manifold=Habit(model), eps=0.2, steps=3),
    "reconstruction": lambda model, x, y: reconstruct(x, y, manifold=Habit(model)),
    "walk": lambda model, x, y: latent_walk(
        model, x, y, explain=Habit(model).explain, steps=5, halvings=3
    ),
    "guessed": lambda model, x, y: pgd(nes(model, samples=4), x, y, eps=0.1, steps=3),
    "nearest class": nearest_class,
    "steps of training": lambda model, x, y: unrolled(model, x, (y + 1) % 3, confidence=None),
    "all of the graph": lambda model, x, y: unrolled(model, x, (y + 1) % 3, detached=False),
    "jacobian": lambda model, x, y: Jacobian(model, x).dense(),
    "outputs": lambda model, x, y: Jacobian(model, x).value,
    "own confidence": lambda model, x, y: high_confidence(
        model, x, (y + 1) % 3, targeted=True, confidence=None, bounds=(-9.0, 9.0)
    ),
}


@pytest.mark.parametrize(
    "attack", [*attacks(), *(pytest.param(part, id=name) for name, part in PARTS.items())]
)
@pytest.mark.filterwarnings("ignore")
def test_a_model_that_works_in_place_is_attacked_like_any_other(attack, scene):
    net, x, _ = scene
    plain, in_place = (nn.Sequential(Stretch(flag), net) for flag in (False, True))
    y, before = plain(x).argmax(dim=1), x.clone()
    runs = [partial(call, attack, steps=steps, confidence=0.4) for steps in (4, 40)]
    for run in [attack] if attack in PARTS.values() else runs:
        expected, found = run(plain, x, y), run(in_place, x, y)
        assert torch.equal(x, before)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("attack", [*attacks()])
@pytest.mark.filterwarnings("ignore")
def test_draws_stay_on_the_cpu_whatever_the_default_device(attack, scene):
    net, x, y = scene
    expected = call(attack, net, x, y)
    with torch.device("meta"):  # where a tensor made without a device has no values
        found = call(attack, net, x, y)
    assert torch.equal(found, expected)


def test_a_rounding_beyond_the_bounds_is_no_changed_pixel(scene):
    net, x, _ = scene
    x = x.clone()
    x[:, 0], x[:, 1] = 1 + 5e-7, -5e-7
    changed = [subset(net, x, eps=0.1), random_perturbation(x, eps=0.1, norm="pixels")]
    changed += [subset(net, x, eps=0.1, kind="quadratic")]
    for found in changed:
        assert ((found != x).sum(dim=1) <= 1).all()


def test_probabilities_are_told_from_logits(scene):
    net, x, y = scene
    sure = nn.Sequential(net, nn.Softmax(dim=1))
    with pytest.warns(UserWarning, match="probabilities: give it without its softmax"):
        deepfool(sure, x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        deepfool(net, x, y)
        pgd(sure, x, y, eps=0.1)  # the score of a softmax is an objective like others


@pytest.mark.parametrize("norm", ["l1", 1.01])
def test_confidence_is_reached_by_few_entries_though_the_box_stops_them(norm, scene):
    net, x, _ = scene
    target = net(1 - x).argmax(dim=1)
    found = high_confidence(
        net, x, target, targeted=True, confidence=0.4, norm=norm, bounds=(-0.5, 1.5)
    )
    assert (net(found).argmax(dim=1) == target).all()
    assert found.min() >= -0.5
    assert found.max() <= 1.5


def test_a_leaf_is_outside_all_graphs_and_its_copy_may_be_changed():
    x = 2 * torch.ones(2, 3, requires_grad=True)
    z, given = leaf(x)
    given.mul_(3)
    assert z.is_leaf
    assert (z == 2).all()
    assert (torch.autograd.grad(given.sum(), z)[0] == 3).all()
    with torch.inference_mode():
        x = torch.ones(2, 3)
    z, given = leaf(x)
    assert (torch.autograd.grad((given * given).sum(), z)[0] == 2).all()


def test_a_judge_without_parts_is_a_judge(scene):
    """A module of length 0 is False where Python asks for a truth value."""
    model, x, y = scene

    class Committee(nn.ModuleList):
        def forward(self, x):
            return nn.functional.one_hot(y, 3).float()  # never fooled

    x_adv = distortion_search(model, x, y, verify=Committee(), steps=20, rounds=2)
    assert torch.equal(x_adv, x)
    assert not torch.equal(distortion_search(model, x, y, steps=20, rounds=2), x)


def test_a_warm_start_keeps_its_memory_to_itself():
    def inner(z, x):
        return (z - x).square().sum(dim=1)

    warm = WarmStart(torch.zeros_like, lambda z, x: z + 0.5 * (x - z), inner)
    x = torch.ones(2, 3)
    for expected in (0.0, 0.5, 0.75):
        z = warm(x)
        assert (z == expected).all()
        z += 5


# ----------------------------------------------------------------------- weights, units and boxes


def test_a_weight_that_succeeds_has_succeeded_however_large():
    lam = torch.tensor([1e8, 1e10, 1e12])
    low, high = torch.zeros(3), torch.full((3,), math.inf)
    lam, low, high = _reweighed(lam, low, high, torch.tensor([True, True, False]))
    assert lam.tolist() == pytest.approx([5e7, 5e9, 1e13])
    assert high.tolist() == pytest.approx([1e8, 1e10, math.inf])


@pytest.mark.parametrize("width", [1.0, 255.0])
def test_equal_counts_are_told_apart_alike_in_every_unit(width):
    """Five entries of the full range are fewer than six short ones."""

    def model(z):
        z = z / width
        full, short = z[:, :5].sum(dim=1) - 4.5, (z[:, 5:] - 0.95).sum(dim=1) - 0.28
        return torch.stack([0 * full, full, short], dim=1)

    x, y = width * torch.tensor([5 * [0.0] + 6 * [0.95]]), torch.tensor([0])
    search = Search(model, x, y, size_of("l0", x), False, (0.0, width), 100, None)
    search.begin()
    for rival, distance in ((1, 5 + 1e-3 * 5), (2, 6 + 1e-3 * 6 * 0.05)):
        found = search.locate(torch.zeros_like(x), torch.tensor([rival]))[1]
        assert found.item() == pytest.approx(distance, abs=1e-5)


def test_subset_tries_the_opposite_vertex_of_the_box():
    """With unequal room it is not the same step the other way."""

    def model(z):
        return (z - 0.02) + 30 * (z - 0.02) ** 2

    x = torch.full((1, 1), 0.02)
    y = model(x) + 0.5
    x_adv = subset(model, x, y, eps=0.3, kind="quadratic")
    assert x_adv.item() == pytest.approx(0.32)
    assert quadratic(model, x, y, eps=0.3, norm="linf").item() == pytest.approx(0.32)


def test_values_just_outside_the_bounds_are_shown_to_be():
    with pytest.raises(ValueError, match=r"255\.00\d+\], outside the bounds \[0, 255\]"):
        check_range(torch.tensor([[0.0, 255.0003]]), (0, 255))


# --------------------------------------------------------------------------------------- warnings


@pytest.mark.parametrize("attack", [*attacks(), pytest.param(
    lambda *args, **given: linear(*args, accumulate=False, **given), id="linear, full steps"
)])  # fmt: skip
def test_warnings_name_the_attack_and_the_line_that_called_it(attack):
    x, y = torch.full((2, 4), 0.5), torch.tensor([0, 0])

    def model(z):
        return (0 * z[:, :2]).detach() + torch.tensor([1.0, 0.0])

    given = inspect.signature(attack).parameters
    settings = {"steps": 20} if "steps" in given else {}
    settings |= {"eps": 0.3} if "eps" in given or "given" in given else {}
    if "given" in given or given["y"].default is None:
        y = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        attack(model, x, y, **settings)
    caught = [w for w in caught if w.category is GradientMaskingWarning]
    if attack.__name__ == "random_noise":
        assert not caught
        return
    name = "linear" if attack.__name__ == "<lambda>" else attack.__name__
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert str(caught[0].message).startswith(f"{name}()")
