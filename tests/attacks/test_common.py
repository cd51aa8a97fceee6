import math
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from adv.attacks import common
from adv.attacks.common import (
    TOLERANCE,
    Best,
    GradientMaskingWarning,
    GradientWatch,
    check_inputs,
    check_range,
    check_seed,
    class_gradients,
    eval_mode,
    expand,
    generator,
    input_gradient,
    is_adversarial,
    loss_gradient,
    margin,
    networks,
    objective,
    row_products,
    settled,
)
from adv.attacks.gradient import fgsm


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()


@pytest.fixture
def x():
    return torch.rand(5, 1, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


Y = torch.tensor([0, 1, 2, 3, 0])


# margins


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(2, 7))
def test_margin_is_the_gap_to_the_best_other_class(seed, count, classes):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, classes, generator=g)
    y = torch.randint(classes, (count,), generator=g)
    for row, label, m in zip(logits.tolist(), y.tolist(), margin(logits, y).tolist(), strict=True):
        rest = row[:label] + row[label + 1 :]
        assert m == pytest.approx(row[label] - max(rest), abs=1e-6)


def test_adversarial_means_beyond_the_tolerance_of_the_logits_scale():
    y = torch.tensor([0])

    def fooled(gap, scale, **options):
        logits = scale * torch.tensor([[1.0, 1.0 + gap, 0.0]], dtype=torch.float64)
        return bool(is_adversarial(logits, y, **options))

    for scale in (1e-9, 1.0, 1e9):
        assert fooled(2 * TOLERANCE, scale)
        assert not fooled(0.5 * TOLERANCE, scale)
        assert not fooled(0.0, scale)
        assert fooled(0.5 * TOLERANCE, scale, tolerance=0.0)
        assert not fooled(2 * TOLERANCE, scale, targeted=True)
        assert fooled(-2 * TOLERANCE, scale, targeted=True)
        assert not fooled(-0.5 * TOLERANCE, scale, targeted=True)
    assert not bool(is_adversarial(torch.tensor([[math.nan, 1.0]]), y))


# objectives


def test_objectives_have_their_textbook_values():
    logits = torch.tensor([[2.0, -1.0, 0.5], [0.0, 3.0, 1.0]], dtype=torch.float64)
    y = torch.tensor([0, 2])
    log_total = logits.exp().sum(1).log()
    ce = log_total - torch.tensor([2.0, 1.0])
    assert torch.allclose(objective("ce")(logits, y), ce)
    assert torch.allclose(objective("ce", targeted=True)(logits, y), -ce)
    assert objective("margin")(logits, y).tolist() == [-1.5, 2.0]
    assert torch.equal(objective("score")(logits, y), -logits[[0, 1], y])
    assert objective(lambda f, y: f[:, 0], targeted=True)(logits, y).tolist() == [-2.0, 0.0]


@pytest.mark.parametrize(("loss", "error"), [("hinge", ValueError), (3, TypeError)])
def test_objective_refuses(loss, error):
    with pytest.raises(error, match="'ce', 'margin', 'score' or a function"):
        objective(loss)


# gradients


def difference(f, x, h=1e-6):
    """Central differences of f: (B, ...) -> (B,), entry by entry."""
    g = torch.zeros_like(x)
    for i in range(x[0].numel()):
        step = torch.zeros(x[0].numel(), dtype=x.dtype)
        step[i] = h
        step = step.view_as(x[0])
        g.flatten(1)[:, i] = (f(x + step) - f(x - step)) / (2 * h)
    return g


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_input_gradient_matches_differences_in_every_mode(net, x, mode):
    def f(z):
        return objective("ce")(net(z), Y)

    with torch.no_grad():
        expected, value = difference(f, x), f(x)
    with mode():
        got, gradient = input_gradient(f, x.clone())
    assert torch.allclose(gradient, expected, atol=1e-8)
    assert torch.equal(got, value)
    assert not got.requires_grad


def test_gradients_leave_model_and_input_alone(net, x):
    net[1].weight.grad = torch.ones_like(net[1].weight)
    net[3].weight.requires_grad_(False)
    loss_gradient(net, x, Y, objective("ce"))
    class_gradients(net, x)
    assert torch.equal(net[1].weight.grad, torch.ones_like(net[1].weight))
    assert net[1].bias.grad is None
    assert [p.requires_grad for p in net.parameters()] == [True, True, False, True]
    assert not x.requires_grad
    assert x.grad is None


def test_input_gradient_wants_one_value_for_each_sample(net, x):
    with pytest.raises(ValueError, match=r"shape \(5,\)"):
        input_gradient(lambda z: net(z), x)


def test_a_cut_graph_gives_zero_gradients(net, x):
    for model in (lambda z: net(z.detach()), lambda z: net(z.detach()).detach()):
        logits, gradient = loss_gradient(model, x, Y, objective("ce"))
        assert torch.equal(logits, net(x).detach())
        assert not gradient.any()
        assert class_gradients(model, x)[1].shape == (5, 4, 1, 2, 3)
        assert not class_gradients(model, x)[1].any()


class Stubborn(torch.autograd.Function):
    """tanh whose backward cannot be batched, for it reads a number back from the tensor."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x.tanh())
        return x.tanh()

    @staticmethod
    def backward(ctx, grad):
        (t,) = ctx.saved_tensors
        return grad * (1 - t**2) * (1.0 if grad.sum().item() > -math.inf else 0.0)


def test_class_gradients_are_the_jacobian(net, x):
    logits, jacobian = class_gradients(net, x)
    with torch.no_grad():
        assert torch.equal(logits, net(x))
        for k in range(4):
            expected = difference(lambda z, k=k: net(z)[:, k], x)
            assert torch.allclose(jacobian[:, k], expected, atol=1e-8)


def test_class_gradients_without_vmap_support(net, x):
    stubborn = nn.Sequential(*net[:2])
    logits, jacobian = class_gradients(lambda z: net[3](Stubborn.apply(stubborn(z))), x)
    expected = class_gradients(net, x)
    assert torch.allclose(logits, expected[0])
    assert torch.allclose(jacobian, expected[1])


class Greedy(torch.autograd.Function):
    """tanh whose backward has no memory for a batch, and says so in one of two ways."""

    error: Exception
    calls = 0

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x.tanh())
        return x.tanh()

    @staticmethod
    def backward(ctx, grad):
        Greedy.calls += 1
        raise Greedy.error


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    ],
)
def test_out_of_memory_is_no_layer_that_cannot_be_batched(net, x, error):
    Greedy.error, Greedy.calls = error, 0
    with pytest.raises(RuntimeError, match="memory") as caught:
        class_gradients(lambda z: net[3](Greedy.apply(net[1](net[0](z)))), x)
    assert Greedy.calls == 1
    assert "AT_ONCE" in caught.value.__notes__[-1]


def test_class_gradients_are_one_forward_pass(net, x):
    calls = []
    net.register_forward_hook(lambda *_: calls.append(1))
    class_gradients(net, x)
    assert len(calls) == 1


@pytest.mark.parametrize(("blocks", "held"), [([4], 120), ([3, 1], 119), ([1, 1, 1, 1], 1)])
def test_class_gradients_come_in_blocks(net, x, blocks, held, monkeypatch):
    """Of as many classes as fit: 4 classes, 5 samples and 6 entries are 120 numbers."""
    expected, seen = class_gradients(net, x), []

    def counting(outputs, inputs, rows):
        seen.append(len(rows))
        return row_products(outputs, inputs, rows)

    monkeypatch.setattr(common, "row_products", counting)
    monkeypatch.setattr(common, "AT_ONCE", held)
    logits, jacobian = class_gradients(net, x)
    assert seen == blocks
    assert torch.equal(logits, expected[0])
    assert torch.allclose(jacobian, expected[1], rtol=1e-12)


def test_watch_counts_stuck_samples_and_warns():
    x = torch.zeros(4, 2)
    watch = GradientWatch(x)
    gradient = torch.tensor([[0.0, 0.0], [0.0, 1.0], [math.nan, 0.0], [0.0, 0.0]])
    cleaned = watch.see(gradient, torch.tensor([False, False, False, True]))
    assert cleaned.tolist() == [[0, 0], [0, 1], [0, 0], [0, 0]]
    # the last sample had succeeded: that it is flat and no longer adversarial is no finding
    watch.see(torch.tensor([[1.0, 1.0]] * 3 + [[0.0, 0.0]]), torch.zeros(4, dtype=torch.bool))
    says = r"the input gradient vanished for 1 and was not finite for 1 of 4 samples"
    with pytest.warns(GradientMaskingWarning, match=says):
        watch.report("test")
    GradientWatch(x).report("silent")  # warnings are errors here


def test_watch_tells_overflow_from_a_gradient_that_vanished():
    running = torch.zeros(2, dtype=torch.bool)
    for value, says in ((0.0, "vanished for 2 of 2"), (math.inf, "was not finite for 2 of 2")):
        watch = GradientWatch(torch.zeros(2, 2))
        watch.see(torch.full((2, 2), value), running)
        with pytest.warns(GradientMaskingWarning, match=f"gradient {says} samples"):
            watch.report("test")
    watch = GradientWatch(torch.zeros(2, 2))
    watch.see(torch.tensor([[math.nan, 1.0], [math.nan, 0.0]]), ~running)
    watch.report("silent")
    watch = GradientWatch(torch.zeros(3, 2))  # large entries, whose sum overflows or cancels
    watch.see(torch.tensor([[3e38, 3e38], [1.0, -1.0], [math.inf, 1.0]]), torch.zeros(3).bool())
    watch.report("silent")
    watch.see(torch.tensor([[math.inf, -math.inf], [0.0, 0.0], [1.0, 0.0]]), torch.zeros(3).bool())
    assert watch.broken.tolist() == [True, False, False]
    assert watch.stuck.tolist() == [True, True, False]


# best so far


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.tuples(st.floats(0, 9, width=16), st.booleans()), min_size=3, max_size=3))
)
def test_best_keeps_the_smallest_allowed(rounds):
    x = torch.full((3, 2), -1.0)
    best = Best(x)
    for number, scores in enumerate(rounds):
        distance = torch.tensor([s for s, _ in scores])
        best.update(
            torch.full((3, 2), float(number)), distance, torch.tensor([a for _, a in scores])
        )
    for i in range(3):
        allowed = [(r[i][0], n) for n, r in enumerate(rounds) if r[i][1]]
        score, number = min(allowed, default=(math.inf, -1))
        assert best.distance[i] == torch.tensor(score)
        assert best.x_adv[i].tolist() == [number, number]
        assert bool(best.found[i]) == bool(allowed)


def test_best_ignores_what_is_not_finite_and_does_not_share_memory():
    x = torch.zeros(1, 2)
    best = Best(x)
    for score in (math.nan, math.inf, -math.inf):
        assert not best.update(torch.ones(1, 2), torch.tensor([score]))
    best.x_adv += 1
    assert not x.any()


def test_settled_reads_the_cpu_only_when_all_is_done():
    assert settled(torch.tensor([True, True]), 0)
    assert not settled(torch.tensor([True, False]), 49)
    elsewhere = torch.ones(2, dtype=torch.bool, device="meta")
    assert not settled(elsewhere, 0)


def test_expand_broadcasts_over_samples():
    assert expand(torch.arange(3.0), torch.zeros(3, 1, 2, 2)).shape == (3, 1, 1, 1)


# modes and draws


def test_eval_mode_gives_each_flag_back():
    model = nn.Sequential(nn.Dropout(0.9), nn.Sequential(nn.BatchNorm1d(2)))
    model.train()
    model[1].eval()
    x = torch.rand(3, 2)

    with pytest.raises(KeyError), eval_mode(model):  # noqa: PT012
        assert not any(module.training for module in model.modules())
        assert torch.allclose(model(x), x, atol=1e-4)
        raise KeyError
    assert [module.training for module in model.modules()] == [True, True, False, False]
    with eval_mode(torch.tanh):
        pass


class Wrapper:
    def __init__(self, net):
        self.parts = [net]

    def logits(self, x):
        return self.parts[0](x)


class Slots:
    __slots__ = ("__net",)  # kept under another name, that of the class before it

    def __init__(self, net):
        self.__net = net

    def __call__(self, x):
        return self.__net(x)


def around(net):
    """Functions that call a network, each of which holds it in another way."""

    def default(x, net=net):
        return net(x)

    def only(x, *, net=net):
        return net(x)

    def deep(x):
        return default(x)

    class Attribute:
        part = (net,)

        def __call__(self, x):
            return self.part[0](x)

    class Call:
        def __call__(self, x):
            return net(x)

    return {
        "closure": lambda x: net(x),
        "default": default,
        "keyword": only,
        "two functions": deep,
        "method": Wrapper(net).logits,
        "partial": partial(lambda net, x: net(x), net),
        "keyword of a partial": partial(lambda x, net: net(x), net=net),
        "bound call": net.forward,
        "module": net,
        "slot": Slots(net),
        "attribute of a class": Attribute(),
        "what a call closes over": Call(),
    }


@pytest.mark.parametrize("way", list(around(nn.Identity())))
def test_networks_inside_functions_are_found(way):
    net = nn.Dropout(0.9).train()
    model, x = around(net)[way], torch.ones(3, 50)
    assert networks(model) == [net]
    with eval_mode(model):
        assert torch.equal(model(x), x)
    assert net.training


def test_globals_that_a_function_names_are_found(monkeypatch):
    net = nn.Dropout(0.9).train()
    monkeypatch.setitem(globals(), "GLOBAL", net)
    assert networks(lambda x: GLOBAL(x)) == [net]
    assert networks(lambda x: torch.tanh(x)) == []
    assert networks(nn.Dropout) == []
    kept = SimpleNamespace(GLOBAL=nn.Identity())
    assert networks(lambda x: kept.GLOBAL(x)) == [kept.GLOBAL]


def test_globals_that_inner_functions_and_calls_name_are_found(monkeypatch):
    net = nn.Dropout(0.9).train()
    monkeypatch.setitem(globals(), "GLOBAL", net)

    def comprehension(x):  # a function of its own in Python 3.11
        return torch.stack([GLOBAL(x + s) for s in (-0.1, 0.1)]).mean(0)

    def defined(x):
        def inner(z):
            return (lambda u: GLOBAL(u))(z)

        return inner(x)

    class Call:
        def __call__(self, x):
            return GLOBAL(x)

    for model in (comprehension, defined, Call(), torch.vmap(lambda x: GLOBAL(x))):
        assert networks(model) == [net]
    unset = Slots.__new__(Slots)
    assert networks(unset) == []


def test_data_that_a_function_names_is_not_searched(monkeypatch):
    """Collections of up to ``MANY`` entries are; those of data would take long."""
    net = nn.Identity()
    monkeypatch.setattr(common, "MANY", 3)
    few, many = [0, 1, net], [0, 1, 2, net]
    assert networks(lambda x: few[2](x)) == [net]
    assert networks(lambda x: many[3](x)) == []
    table = {"a": 0, "b": 1, "c": net}
    assert networks(lambda x: table["c"](x)) == [net]
    table["d"] = 3
    assert networks(lambda x: table["c"](x)) == []


def test_a_variable_without_a_value_holds_no_network():
    def model(x):
        return later(x)

    assert networks(model) == []
    later = nn.Identity()
    assert networks(model) == [later]


def test_a_wrapped_network_is_attacked_in_evaluation_mode(net, x):
    torch.manual_seed(0)
    free = nn.Sequential(*net, nn.BatchNorm1d(4), nn.Dropout(0.5)).double().train()
    before = free[4].running_mean.clone()
    state = torch.get_rng_state()
    x_adv = fgsm(lambda z: {"logits": free(z)}["logits"], x, Y, eps=0.1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(free[4].running_mean, before)
    assert all(module.training for module in free.modules())
    assert torch.equal(x_adv, fgsm(free.eval(), x, Y, eps=0.1))


def test_layers_that_work_in_place_change_no_input(net, x):
    scale = lambda z: net(z.sub_(0.5).mul_(2.0))  # noqa: E731
    plain = lambda z: net((z - 0.5) * 2.0)  # noqa: E731
    kept = x.clone()
    for function in (class_gradients, partial(loss_gradient, y=Y, loss=objective("ce"))):
        for got, expected in zip(function(scale, x), function(plain, x), strict=True):
            assert torch.allclose(got, expected, rtol=1e-12)
    assert torch.equal(fgsm(scale, x, Y, eps=0.1), fgsm(plain, x, Y, eps=0.1))
    assert torch.equal(x, kept)


@pytest.mark.parametrize("shape", [(-1,), (-1, 1)])
def test_one_logit_is_told_how_to_become_two(net, x, shape):
    with pytest.raises(ValueError, match=r"stack\(\[torch.zeros_like\(f\), f\], 1\)"):
        fgsm(lambda z: net(z)[:, 0].reshape(shape), x, Y, eps=0.1)
    f = torch.tensor([-2.0, 0.3], dtype=torch.float64)
    two = torch.stack([torch.zeros_like(f), f], 1)
    assert torch.allclose(two.softmax(dim=1)[:, 1], f.sigmoid())


def test_a_missing_batch_axis_is_named(net, x):
    with pytest.raises(ValueError, match=r"x\[None\], y\[None\]"):
        fgsm(net, x[0], Y[0], eps=0.1)


def test_a_model_that_takes_no_such_input_says_why(net, x):
    with pytest.raises(ValueError, match=r"float32 of shape .*its weights are torch.float64"):
        fgsm(net, x.float(), Y, eps=0.1)


def test_generator_is_its_own():
    state = torch.get_rng_state()
    draws = {
        key: tuple(torch.rand(3, generator=generator(*key)).tolist())
        for key in [(0,), (1,), (0, 0), (0, 1), (1, 0)]
    }
    assert torch.equal(torch.get_rng_state(), state)
    assert tuple(torch.rand(3, generator=generator(0, 1)).tolist()) == draws[0, 1]
    assert len(set(draws.values())) == 5
    assert generator(0).device.type == "cpu"


@pytest.mark.parametrize(("seed", "error"), [(-1, ValueError), (0.5, TypeError), (True, TypeError)])
def test_seeds_are_refused(seed, error):
    for check in (check_seed, generator, partial(generator, 0)):
        with pytest.raises(error, match="seed is an integer"):
            check(seed)
    check_seed(0)


# checks

GOOD = torch.full((2, 3), 0.5)
LABELS = torch.tensor([0, 2])


def linear(x):
    return x @ torch.eye(3, dtype=x.dtype)


BAD = [
    ("model is a function", TypeError, {"model": 3}),
    ("outside the bounds", ValueError, {"x": GOOD + 0.6}),
    ("outside the bounds", ValueError, {"x": GOOD - 0.6}),
    ("outside the bounds", ValueError, {"x": GOOD + 0.501}),
    ("outside the bounds", ValueError, {"x": GOOD - 0.501}),
    ("outside the bounds", ValueError, {"bounds": (0.0, 0.4)}),
    ("NaN", ValueError, {"x": GOOD / 0 * 0}),
    ("outside the bounds", ValueError, {"x": GOOD / 0}),
    ("float32 or float64", TypeError, {"x": GOOD.long()}),
    ("float32 or float64", TypeError, {"x": GOOD.half()}),
    ("float32 or float64", TypeError, {"x": [[0.5, 0.5, 0.5]]}),
    ("shape", ValueError, {"x": GOOD[0]}),
    ("shape", ValueError, {"x": GOOD[:0], "y": LABELS[:0]}),
    ("int64", TypeError, {"y": LABELS.float()}),
    ("int64", TypeError, {"y": LABELS.int()}),
    ("int64", TypeError, {"y": [0, 2]}),
    ("one label", ValueError, {"y": LABELS[:1]}),
    ("one label", ValueError, {"y": LABELS[:, None]}),
    ("device|on cpu", ValueError, {"y": LABELS.to("meta")}),
    (r"0\.\.2", ValueError, {"y": torch.tensor([0, 3])}),
    (r"0\.\.2", ValueError, {"y": torch.tensor([-1, 0])}),
    ("low < high", ValueError, {"bounds": (1.0, 0.0)}),
    ("low < high", ValueError, {"bounds": (0.0, math.inf)}),
    ("two numbers", TypeError, {"bounds": 1.0}),
    ("two numbers", TypeError, {"bounds": (0.0, 1.0, 2.0)}),
    ("two numbers", TypeError, {"bounds": ("0", "1")}),
    ("eps", ValueError, {"eps": -0.1}),
    ("eps", ValueError, {"eps": math.nan}),
    ("eps", ValueError, {"eps": math.inf}),
    ("eps", ValueError, {"eps": 1e39}),
    ("eps", TypeError, {"eps": "0.1"}),
    ("eps", TypeError, {"eps": None}),
    ("eps", TypeError, {"eps": True}),
    ("eps", TypeError, {"eps": torch.tensor(0.1)}),
    ("steps", ValueError, {"steps": 0}),
    ("steps", TypeError, {"steps": 1.5}),
    ("steps", TypeError, {"steps": None}),
    ("restarts", ValueError, {"restarts": 0}),
    ("logits", ValueError, {"model": lambda x: linear(x)[0]}),
    ("logits", ValueError, {"model": lambda x: (linear(x), 0)}),
    ("floating-point logits", TypeError, {"model": lambda x: linear(x).long()}),
    ("two classes", ValueError, {"model": lambda x: linear(x)[:, :1]}),
    ("not finite", ValueError, {"model": lambda x: linear(x) / 0}),
    ("float64", ValueError, {"model": nn.Linear(3, 3), "x": GOOD.double()}),
    ("meta", ValueError, {"model": nn.Linear(3, 3, device="meta")}),
]


@pytest.mark.parametrize(("message", "error", "change"), BAD)
def test_bad_input_is_refused(message, error, change):
    given = {"model": linear, "x": GOOD, "y": LABELS, "bounds": (0.0, 1.0), "eps": 0.1, "steps": 1}
    given |= change
    with pytest.raises(error, match=message):
        check_inputs(given.pop("model"), given.pop("x"), given.pop("y"), **given)


@pytest.mark.parametrize("bounds", [(-123.68, 151.061), (0.0, 255.3), (-3e4, 1.0)])
def test_inputs_may_be_rounded_in_the_units_of_the_bounds(bounds):
    """0.1 in float32 is not 0.1, and 151.061 is off by more."""
    for dtype in (torch.float32, torch.float64):
        ends = torch.tensor([bounds], dtype=dtype)
        check_range(ends, bounds)
        off = 6 * torch.finfo(dtype).eps * max(map(abs, bounds))
        for wrong in (ends + max(off, 2e-6), ends - max(off, 2e-6)):
            with pytest.raises(ValueError, match="outside the bounds"):
                check_range(wrong, bounds)
    everything = (-sys.float_info.max, sys.float_info.max)
    check_range(ends, everything)
    for wrong in (math.inf, -math.inf):
        with pytest.raises(ValueError, match="outside the bounds"):
            check_range(torch.full_like(ends, wrong), everything)


def test_good_input_passes_and_changes_nothing():
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)).train()
    state = torch.get_rng_state()
    check_inputs(model, GOOD, LABELS, bounds=(0, 1), eps=0, steps=1, restarts=2)
    check_inputs(model, GOOD + 0.5 + 5e-7, LABELS, bounds=(0, 1))
    assert model[1].training
    assert torch.equal(torch.get_rng_state(), state)
