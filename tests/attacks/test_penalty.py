import copy
import math

import numpy as np
import pytest
import torch
from helpers import WIDE, affine, inputs, lengths
from scipy.optimize import minimize
from torch import nn

from adv.attacks.boundary import deepfool
from adv.attacks.common import GradientMaskingWarning, is_adversarial, margin
from adv.attacks.penalty import carlini_wagner, lbfgs
from adv.lab.evaluation import counting

ATTACKS = [lbfgs, carlini_wagner]
SHORT = {lbfgs: {"steps": 200}, carlini_wagner: {"steps": 900, "weight": 0.1, "lr": 0.05}}


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("attack", ATTACKS)
def test_on_affine_models_both_come_to_the_closed_form(attack, classes):
    model, x = affine(classes, 8), inputs(4, 8)
    y = model(x).argmax(1)
    w = (model.weight[None] - model.weight[y][:, None]).numpy()
    gap = (model(x).gather(1, y[:, None]) - model(x)).numpy()
    with np.errstate(invalid="ignore"):
        distance = np.nanmin(gap / np.linalg.norm(w, 2, axis=2), axis=1)
    options = {
        lbfgs: {"steps": 900, "searches": 30},
        carlini_wagner: {"steps": 900, "weight": 0.1, "lr": 3e-3},
    }[attack]
    x_adv = attack(model, x, y, bounds=WIDE, **options)
    found = lengths(x_adv - x, "l2")
    assert bool(is_adversarial(model(x_adv), y).all())
    assert (found >= distance * (1 - 1e-9)).all()
    assert np.median(found / distance) < 1.05
    assert (found < distance * 1.15).all()


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("attack", ATTACKS)
def test_what_is_found_is_adversarial_near_and_in_the_box(digits, attack, targeted):
    model, x, y = digits
    x, label = x[:8], (y[:8] + 3) % 10 if targeted else y[:8]
    x_adv = attack(model, x, label, targeted=targeted, **SHORT[attack])
    assert bool(((x_adv >= 0) & (x_adv <= 1)).all())
    with torch.no_grad():
        assert bool(is_adversarial(model(x_adv), label, targeted).all())
        start = is_adversarial(model(x), label, targeted)
    assert torch.equal(x_adv[start], x[start])
    rough = lengths(deepfool(model, x, label, targeted=targeted) - x, "l2")
    assert lengths(x_adv - x, "l2").mean() < 1.1 * rough.mean()


def test_lbfgs_solves_the_problem_it_states(digits):
    """One weight, against scipy on a finite-difference gradient of the objective typed out."""
    source, x, y = digits
    model = copy.deepcopy(source).double()
    one, label, c = x[:1].double(), y[:1], 0.2
    seen = []
    lbfgs(model, one, label, steps=200, searches=1, weight=c,
          observe=lambda step, state: seen.append(state["x_adv"]))  # fmt: skip

    def value(z):
        point = torch.as_tensor(z).reshape(one.shape)
        with torch.no_grad():
            p = model(point).softmax(1)[0, label[0]]
        return float((point - one).square().sum() - c * torch.log1p(-p))

    start = one.flatten().numpy()
    theirs = minimize(
        value, start, method="L-BFGS-B", bounds=[(0, 1)] * 64, options={"maxfun": 10**5}
    )
    ours = min(value(z.flatten().numpy()) for z in seen)
    assert value(start) > ours * 1.05
    assert ours == pytest.approx(theirs.fun, rel=1e-3)


@pytest.mark.parametrize("variable", ["tanh", "clip"])
def test_the_gradient_step_of_carlini_wagner_is_adam_s(digits, variable):
    """The iterates for one weight, against PyTorch's Adam on the objective typed out."""
    source, x, y = digits
    model, x, y = copy.deepcopy(source).double(), x[:5].double(), y[:5]
    seen = []
    options = {"searches": 1, "weight": 2.0, "lr": 0.05, "confidence": 0.3, "variable": variable}
    note = lambda k, state: seen.append(state["x_adv"])  # noqa: E731
    carlini_wagner(model, x, y, steps=12, observe=note, **options)
    share = 2 * x - 1
    w = (torch.atanh(0.999999 * share) if variable == "tanh" else share.clone()).requires_grad_()
    adam = torch.optim.Adam([w], 0.05)
    for step in range(11):
        point = (torch.tanh(w) + 1) / 2 if variable == "tanh" else (w + 1) / 2
        assert torch.allclose(seen[step + 1], point.detach(), atol=1e-9)
        loss = (point - x).square().sum() + 2 * (margin(model(point), y) + 0.3).clamp_min(0).sum()
        adam.zero_grad()
        (w.grad,) = torch.autograd.grad(loss, w)
        adam.step()
        if variable == "clip":
            w.data.clamp_(-1, 1)


def test_the_weight_is_searched_for_each_sample(digits):
    model, x, y = digits
    seen = []
    carlini_wagner(model, x, y, steps=1 + 8 * 40, searches=8, weight=1e-2, lr=0.05,
                   observe=lambda k, state: seen.append(state))  # fmt: skip
    weights = torch.stack([state["weight"] for state in seen[1::40]])
    low, high = np.zeros(len(x)), np.full(len(x), math.inf)
    for search in range(7):
        part = seen[1 + 40 * search : 1 + 40 * (search + 1)]
        hit = torch.stack([is_adversarial(s["logits"], y) for s in part]).any(dim=0).numpy()
        c = weights[search].double().numpy()
        low, high = np.where(hit, low, c), np.where(hit, c, high)
        expected = np.where(np.isinf(high), 10 * c, (low + np.where(np.isinf(high), 0, high)) / 2)
        assert np.allclose(weights[search + 1], expected, rtol=1e-5)
    assert len(set(weights[-1].tolist())) > 5


def test_lbfgs_bisects_the_logarithm_of_the_weight():
    """Tenfold until one succeeds; then the geometric mean, a hundredth standing for a zero."""
    model, x = affine(3, 6), inputs(4, 6)
    y, turns = model(x).argmax(1), set()
    for first in (1e-2, 1e3):
        seen = []
        lbfgs(model, x, y, steps=400, searches=8, weight=first, bounds=WIDE,
              observe=lambda _, state, seen=seen: seen.append(state))  # fmt: skip
        for i in range(4):
            mine = [state for state in seen if int(state["index"]) == i]
            label, tried = y[i : i + 1], {}  # weights in the order of their first pass
            for state in mine:
                hit = bool(is_adversarial(state["logits"], label))
                c = float(state["weight"])
                tried[c] = tried.get(c, False) or hit
            assert len(tried) == 8
            low, high, expected = 0.0, math.inf, first
            for c, success in tried.items():
                assert c == pytest.approx(expected, rel=1e-5)
                low, high = (low, c) if success else (c, high)
                turns.add((success, low > 0))
                expected = 10 * c if math.isinf(high) else math.sqrt(max(low, high / 100) * high)
    assert turns == {(True, True), (True, False), (False, True)}


def test_confidence_keeps_a_margin(digits):
    model, x, y = digits[0], digits[1][:20], digits[2][:20]
    x_adv = carlini_wagner(model, x, y, confidence=1.0, **SHORT[carlini_wagner])
    with torch.no_grad():
        m = margin(model(x_adv), y)
    moved = (x_adv != x).flatten(1).any(1)
    assert float(moved.float().mean()) > 0.9
    assert bool((m[moved] < -1).all())


def test_confidence_keeps_a_margin_of_the_target(digits):
    model, x, y = digits[0], digits[1][:10], digits[2][:10]
    target = (y + 3) % 10
    options = {"steps": 300, "searches": 3, "weight": 1.0, "lr": 0.05}
    x_adv = carlini_wagner(model, x, target, confidence=1.0, targeted=True, **options)
    with torch.no_grad():
        m = margin(model(x_adv), target)
    moved = (x_adv != x).flatten(1).any(1)
    assert float(moved.float().mean()) > 0.9
    assert bool((m[moved] > 1).all())


def test_passes_are_counted(digits):
    model, x, y = digits
    with counting(model) as counts:
        carlini_wagner(model, x[:3], y[:3], steps=50)
    assert (counts.forward, counts.backward) == (3 * 50 + 1, 3 * 50)
    for steps in (1, 20, 300):
        with counting(model) as counts:
            lbfgs(model, x[:2], y[:2], steps=steps)
        assert counts.backward <= 2 * steps
        assert counts.forward == counts.backward + 1
    assert counts.backward > 2 * 100


@pytest.mark.parametrize("attack", ATTACKS)
def test_one_sample_behaves_as_in_a_batch(digits, attack):
    model, x, y = digits
    model, x = copy.deepcopy(model).double(), x.double()
    options = {"steps": 100, "weight": 0.5}
    batch = attack(model, x[:4], y[:4], **options)
    alone = [attack(model, x[i : i + 1], y[i : i + 1], **options) for i in range(4)]
    assert torch.allclose(batch, torch.cat(alone), atol=1e-6)


@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_found_returns_the_input_and_warns(attack):
    x, y = inputs(3, 4), torch.tensor([0, 0, 0])

    def constant(z):
        return torch.stack([torch.ones(len(z)), torch.zeros(len(z))], dim=1).to(z)

    name = rf"{attack.__name__}\(\): .* 3 of 3"
    with pytest.warns(GradientMaskingWarning, match=name):
        assert torch.equal(attack(constant, x, y, steps=30), x)


@pytest.mark.parametrize("attack", ATTACKS)
def test_weights_of_many_searches_do_not_overflow(attack):
    """No weight is enough for a class that no point of the box has; the gradient never vanishes."""
    weight, bias = torch.tensor([[1.0, 2.0], [-1.0, 0.0]]), torch.tensor([9.0, 0.0])
    model, x, y = affine(2, 2, weight=weight, bias=bias).float(), inputs(2, 2).float(), [0, 0]
    weights = []
    x_adv = attack(
        model,
        x,
        torch.tensor(y),
        steps=600,
        searches=60,
        observe=lambda step, state: weights.append(float(state["weight"].max())),
    )
    assert torch.equal(x_adv, x)
    assert max(weights) == pytest.approx(1e15)


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps"),
        ({"searches": 0}, "searches"),
        ({"weight": 0.0}, "weight"),
        ({"weight": -1.0}, "weight"),
        ({"weight": 1e-300}, "float32"),
        ({"weight": 1e16}, "weight"),
        ({"seed": -1}, "seed"),
        ({"bounds": (0.0, 0.1)}, "bounds"),
    ],
)
def test_bad_settings_are_refused(attack, change, message):
    with pytest.raises(ValueError, match=message):
        attack(affine(3, 4).float(), inputs(2, 4).float(), torch.tensor([0, 1]), **change)


def test_more_bad_settings_are_refused():
    for change in ({"lr": -1.0}, {"lr": 0.0}, {"confidence": -1.0}, {"variable": "sigmoid"}):
        with pytest.raises(ValueError, match=next(iter(change))):
            carlini_wagner(affine(3, 4), inputs(2, 4), torch.tensor([0, 1]), **change)


@pytest.mark.filterwarnings("ignore")
def test_against_foolbox(digits):
    import foolbox as fb

    model, x, y = digits
    with torch.no_grad():
        keep = model(x).argmax(1) == y
    x, y = x[keep][:20], y[keep][:20]
    peer = fb.PyTorchModel(nn.Sequential(model).eval(), bounds=(0, 1), device="cpu")
    attack = fb.attacks.L2CarliniWagnerAttack(
        binary_search_steps=6, steps=150, stepsize=0.05, initial_const=0.1, abort_early=False
    )
    theirs = lengths(attack(peer, x, y, epsilons=None)[1] - x, "l2")
    ours = carlini_wagner(model, x, y, steps=900, searches=6, weight=0.1, lr=0.05)
    ours = lengths(ours - x, "l2")
    assert ours.mean() == pytest.approx(theirs.mean(), rel=0.03)
    assert np.median(ours / theirs) == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("attack", [lbfgs, carlini_wagner])
def test_the_unit_of_the_inputs_plays_no_part(attack, digits):
    model, x, y = digits
    model, x, y = copy.deepcopy(model).double(), x[:4].double(), y[:4]
    plain = attack(model, x, y, steps=100, searches=4)
    wide = attack(lambda z: model(z / 256), 256 * x, y, steps=100, searches=4, bounds=(0.0, 256.0))
    assert (plain != x).any()
    assert torch.allclose(wide / 256, plain, atol=1e-6)
