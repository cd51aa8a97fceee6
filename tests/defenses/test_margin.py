"""The margin losses against loops over classes, finite differences, grids and closed forms."""

import copy
import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from adv.attacks.common import class_gradients, margin
from adv.defenses.margin import (
    contractive,
    double_backpropagation,
    hinge,
    margin_loss,
    sensitivities,
    sensitivity,
)
from adv.lab import data, models, training

NORMS = {"l2": 2.0, "linf": 1.0, "l1": math.inf, 3.0: 1.5}  # of the perturbation: dual exponent


def tanh_net(inputs=6, classes=4, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(inputs, 16), nn.Tanh(), nn.Linear(16, classes)).double()


def batch(n=12, inputs=6, classes=4, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.rand(n, inputs, generator=draw, dtype=torch.float64), torch.arange(n) % classes


def by_loop(model, x, y, q):
    """(B, K) norms of the gradient differences, recorded, one class and sample at a time."""
    table = []
    for sample, label in zip(x, y, strict=True):
        z = sample[None].clone().requires_grad_()
        logits = model(z)[0]
        rows = [torch.autograd.grad(f, z, create_graph=True)[0].flatten() for f in logits]
        table.append(torch.stack([torch.linalg.vector_norm(rows[label] - r, q) for r in rows]))
    return torch.stack(table)


def gradients(value, model):
    return torch.cat(
        [
            torch.zeros_like(p).flatten() if g is None else g.flatten()
            for p, g in zip(
                model.parameters(),
                torch.autograd.grad(value, list(model.parameters()), allow_unused=True),
                strict=True,
            )
        ]
    )


# ------------------------------------------------------------------------------------------ hinge


def test_hinge_by_hand():
    logits = torch.tensor([[3.0, 1.0, 0.0], [0.5, 1.0, 0.0], [1.0, 2.0, 1.5]])
    value = hinge(lambda x: x, logits, torch.tensor([0, 1, 2]))
    assert value.item() == pytest.approx((0 + 0.5 + 1.5) / 3)
    worst = functional.multi_margin_loss(logits, torch.tensor([0, 1, 2]), reduction="none") * 3
    assert value.item() <= worst.mean().item()  # PyTorch's sums over the classes


# ------------------------------------------------------------------------------------ sensitivity


@pytest.mark.parametrize(("norm", "q"), NORMS.items())
def test_sensitivities_are_those_of_a_loop(norm, q):
    model, (x, y) = tanh_net(), batch()
    table = by_loop(model, x, y, q)
    torch.testing.assert_close(sensitivities(model, x, y, norm), table.detach())
    value = sensitivity(model, x, y, norm)
    torch.testing.assert_close(value, table.amax(dim=1))
    torch.testing.assert_close(
        gradients(value.sum(), model), gradients(table.amax(dim=1).sum(), model)
    )


def test_more_classes_than_one_pass_holds():
    model, (x, y) = tanh_net(classes=37), batch(classes=37)
    torch.testing.assert_close(sensitivities(model, x, y), by_loop(model, x, y, 2).detach())


class Odd(torch.autograd.Function):
    """The square, whose backward pass cannot be batched."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        assert float(grad.detach().sum()) < math.inf  # reads a value: not to be vectorized
        return 2 * x * grad


def test_layers_without_a_batching_rule():
    inner, (x, y) = tanh_net(), batch()

    def odd(z):
        return inner(Odd.apply(z))

    def plain(z):
        return inner(z * z)

    torch.testing.assert_close(sensitivity(odd, x, y), sensitivity(plain, x, y))
    torch.testing.assert_close(
        contractive(0.1)(odd, x, y), contractive(0.1)(plain, x, y), check_dtype=False
    )


def test_convolutions():
    model = models.build("digits-cnn", seed=0).double()
    digits = data.load("digits").test
    x, y = digits.x[:5].double(), digits.y[:5]
    table = by_loop(model, x, y, 2)
    value = sensitivity(model, x, y)
    torch.testing.assert_close(value, table.amax(dim=1))
    torch.testing.assert_close(
        gradients(value.sum(), model), gradients(table.amax(dim=1).sum(), model)
    )


def test_flat_networks_have_no_nan():
    model = nn.Linear(6, 3).double()
    with torch.no_grad():
        model.weight.zero_()
    x, y = batch(classes=3)
    for norm in NORMS:
        loss = margin_loss(1.0, norm=norm)(model, x, y)
        assert gradients(loss, model).isfinite().all()


def test_works_without_recording_and_leaves_things_alone():
    model, (x, y) = tanh_net(), batch()
    with torch.no_grad():
        value = sensitivity(model, x, y)
        table = sensitivities(model, x, y)
    assert value.requires_grad
    assert not table.requires_grad
    assert not x.requires_grad
    assert all(p.grad is None for p in model.parameters())


# ------------------------------------------------------------------------------------- objectives


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("power", [1, 2])
def test_surrogate_is_hinge_plus_price(norm, power):
    model, (x, y) = tanh_net(), batch()
    table = by_loop(model, x, y, NORMS[norm]).amax(dim=1)
    wanted = (1 - margin(model(x), y)).clamp_min(0).mean() + 0.3 * (table**power).mean()
    value = margin_loss(0.3, norm=norm, power=power)(model, x, y)
    torch.testing.assert_close(value, wanted)
    torch.testing.assert_close(gradients(value, model), gradients(wanted, model))


def test_surrogate_of_cross_entropy():
    model, (x, y) = tanh_net(), batch()
    wanted = functional.cross_entropy(model(x), y) + 0.3 * sensitivity(model, x, y).mean()
    torch.testing.assert_close(margin_loss(0.3, loss="ce")(model, x, y), wanted)
    torch.testing.assert_close(
        margin_loss(0, loss="ce")(model, x, y), functional.cross_entropy(model(x), y)
    )


@settings(max_examples=15)
@given(weight=st.floats(0, 2), seed=st.integers(0, 5), norm=st.sampled_from(["l2", "linf"]))
def test_linear_form_is_the_worst_case_of_an_affine_model(weight, seed, norm):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Linear(2, 3).double()
    x, y = batch(n=5, inputs=2, classes=3, seed=seed)
    angle = torch.linspace(0, 2 * math.pi, 721, dtype=torch.float64)  # holds the corners
    circle = torch.stack([angle.cos(), angle.sin()], dim=1)
    if norm == "linf":
        circle = circle / circle.abs().amax(dim=1, keepdim=True)
    moved = model(x[:, None] + weight * circle).flatten(0, 1)
    worst = (1 - margin(moved, y.repeat_interleave(721))).clamp_min(0).view(5, -1).amax(dim=1)
    value = margin_loss(weight, norm=norm, form="linear")(model, x, y)
    assert value.item() == pytest.approx(worst.mean().item(), rel=1e-4, abs=1e-9)
    surrogate = margin_loss(weight, norm=norm)(model, x, y)
    assert value.item() <= surrogate.item() + 1e-12


def test_linear_form_is_differentiated_right():
    model, (x, y) = tanh_net(), batch()
    table = by_loop(model, x, y, 2)
    logits = model(x)
    worth = 1 + logits - logits.gather(1, y[:, None]) + 0.2 * table
    wanted = worth.scatter(1, y[:, None], -math.inf).amax(dim=1).clamp_min(0).mean()
    value = margin_loss(0.2, form="linear")(model, x, y)
    torch.testing.assert_close(value, wanted)
    torch.testing.assert_close(gradients(value, model), gradients(wanted, model))


def test_two_classes_are_the_binary_objective():
    """With logits (-f/2, f/2) the difference is f: hinge of y f and the norm of its gradient."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        score = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    (x, y), half = batch(classes=2), torch.tensor([[-0.5, 0.5]], dtype=torch.float64)
    z = x.clone().requires_grad_()
    f = score(z)[:, 0]
    (g,) = torch.autograd.grad(f.sum(), z)
    wanted = (1 - (2 * y - 1) * f).clamp_min(0).mean() + 0.4 * g.norm(dim=1).mean()
    torch.testing.assert_close(margin_loss(0.4)(lambda t: score(t) * half, x, y), wanted)


def test_biases_of_relu_networks_feel_no_price():
    model = models.build("mlp", sizes=(6, 10, 10, 4), seed=0).double()
    x, y = batch()
    sensitivity(model, x, y).sum().backward()
    biases = [p for p in model.parameters() if p.ndim == 1]
    assert all(p.grad is None or not p.grad.any() for p in biases)
    assert all(p.grad.any() for p in model.parameters() if p.ndim == 2)


# -------------------------------------------------------------------------------------- baselines


def test_double_backpropagation():
    model, (x, y) = tanh_net(), batch()
    p = model(x).softmax(dim=1)
    _, jacobian = class_gradients(model, x)
    # The gradient of cross-entropy is J^T (p - onehot).
    g = torch.einsum("bk,bki->bi", p.detach() - functional.one_hot(y, 4), jacobian)
    value = double_backpropagation(0.7)(model, x, y)
    wanted = functional.cross_entropy(model(x), y) + 0.7 * g.square().sum(dim=1).mean()
    torch.testing.assert_close(value, wanted)
    check_slope(double_backpropagation(0.7), model, x, y)


def test_double_backpropagation_keeps_the_precision_and_needs_no_recording():
    model, (x, y) = tanh_net(), batch()
    wanted, loss = double_backpropagation(0.7)(model, x, y), double_backpropagation(0.7)
    single = copy.deepcopy(model).float()
    value = loss(single, x.float(), y)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, wanted, check_dtype=False)
    half = copy.deepcopy(model).bfloat16()
    assert loss(half, x.bfloat16(), y).dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(loss(model, x, y), wanted)


def test_contractive():
    model, (x, y) = tanh_net(), batch()
    _, jacobian = class_gradients(model, x)
    value = contractive(0.7)(model, x, y)
    wanted = functional.cross_entropy(model(x), y) + 0.7 * jacobian.square().sum((1, 2)).mean()
    torch.testing.assert_close(value, wanted)
    check_slope(contractive(0.7), model, x, y)


def check_slope(loss, model, x, y, t=1e-6):
    """The gradient against a finite difference along a random direction of the weights."""
    slope = gradients(loss(model, x, y), model)
    draws = torch.Generator().manual_seed(0)
    v = torch.randn(len(slope), generator=draws, dtype=torch.float64)
    theta = nn.utils.parameters_to_vector(model.parameters()).detach()
    ends = []
    for step in (t, -t):
        nn.utils.vector_to_parameters(theta + step * v, model.parameters())
        ends.append(loss(model, x, y).item())
    nn.utils.vector_to_parameters(theta, model.parameters())
    assert (ends[0] - ends[1]) / (2 * t) == pytest.approx((slope @ v).item(), rel=1e-4)


@pytest.mark.parametrize("form", ["surrogate", "linear"])
def test_margin_slopes(form):
    model, (x, y) = tanh_net(), batch()
    check_slope(margin_loss(0.3, form=form), model, x, y)


# ------------------------------------------------------------------------------- in training loops


def test_training_makes_the_network_less_sensitive():
    digits = data.load("digits")
    outcome = {}
    for weight in (0.0, 0.1):
        model = models.build("mlp", sizes=(64, 32, 10), seed=0)
        training.fit(
            model, digits.train, loss=margin_loss(weight), epochs=8, lr=0.003, progress=False
        )
        x, y = digits.test.x, digits.test.y
        right = (model(x).argmax(dim=1) == y).double().mean().item()
        distance = margin(model(x), y) / sensitivity(model, x, y)
        outcome[weight] = right, distance.median().item()
    assert min(right for right, _ in outcome.values()) > 0.9
    assert outcome[0.1][1] > 1.1 * outcome[0.0][1]


@pytest.mark.parametrize(
    ("place", "dtype"),
    [
        ("cpu", torch.bfloat16),
        pytest.param("cuda", torch.bfloat16, marks=pytest.mark.cuda),
        pytest.param("cuda", torch.float16, marks=pytest.mark.cuda),
    ],
)
@pytest.mark.parametrize(
    "loss", [margin_loss(0.1), margin_loss(0.1, form="linear"), contractive(0.01)]
)
def test_mixed_precision(place, dtype, loss):
    model = models.build("digits-cnn", seed=0).to(place)
    digits = data.load("digits").test.to(torch.device(place))
    x, y = digits.x[:64], digits.y[:64]
    exact = gradients(loss(model, x, y), model)
    with torch.autocast(place, dtype):
        value = loss(model, x, y)
    assert value.dtype == torch.float32
    mixed = gradients(value, model)
    assert functional.cosine_similarity(mixed, exact, dim=0) > 0.99
    assert mixed.norm().item() == pytest.approx(exact.norm().item(), rel=0.05)


# ------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (partial(margin_loss, -1.0), ValueError),
        (partial(margin_loss, math.nan), ValueError),
        (partial(margin_loss, "1"), TypeError),
        (partial(margin_loss, 1.0, norm="l0"), ValueError),
        (partial(margin_loss, 1.0, norm=0.5), ValueError),
        (partial(margin_loss, 1.0, power=3), ValueError),
        (partial(margin_loss, 1.0, form="robust"), ValueError),
        (partial(margin_loss, 1.0, form="linear", power=2), ValueError),
        (partial(margin_loss, 1.0, form="linear", loss="ce"), ValueError),
        (partial(margin_loss, 1.0, loss="mse"), ValueError),
        (partial(double_backpropagation, -1.0), ValueError),
        (partial(contractive, -1.0), ValueError),
    ],
)
def test_settings_are_refused(make, error):
    with pytest.raises(error):
        make()


def test_outputs_are_refused():
    x, y = batch()
    for function in (sensitivity, sensitivities, margin_loss(0.1)):
        with pytest.raises(ValueError, match="logits"):
            function(lambda z: z.sum(dim=1), x, y)
        with pytest.raises(ValueError, match="logits"):
            function(lambda z: z[:, :1], x, y)
    with pytest.raises(ValueError, match="norm"):
        sensitivity(tanh_net(), x, y, "l0")


@pytest.mark.parametrize("function", [sensitivity, sensitivities])
def test_inputs_are_refused(function):
    relu, (x, y) = models.build("mlp", sizes=(6, 10, 4), seed=0).double(), batch()
    for bad in (-1, 4):
        with pytest.raises(ValueError, match=r"labels lie in 0\.\.3"):
            function(relu, x, torch.where(y == 2, bad, y))
    with pytest.raises(TypeError, match="int64"):
        function(relu, x, y.int())
    with pytest.raises(ValueError, match="one label for each"):
        function(relu, x, y[:2])
    for bad in (math.nan, math.inf):
        spoilt = x.clone()
        spoilt[1, 2] = bad
        with pytest.raises(ValueError, match="not finite"):
            function(relu, spoilt, y)
