import copy
import math

import cvxpy as cp
import numpy as np
import pytest
import torch
from helpers import EXPONENTS, WIDE, affine, inputs, lengths
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from adv.attacks.boundary import boundary_step, deepfool
from adv.attacks.common import TOLERANCE, GradientMaskingWarning, is_adversarial, margin
from adv.geometry import norm as length

NORMS = ["l2", "linf", 1.5, 4.0]


# affine models: the distance is known


@pytest.mark.parametrize("norm", NORMS)
def test_one_step_reaches_the_closed_form_distance(norm):
    model, x = affine(5, 12), inputs(40, 12)
    y = model(x).argmax(1)
    p = EXPONENTS.get(norm, norm)
    q = 1.0 if math.isinf(p) else p / (p - 1)
    w = (model.weight[None] - model.weight[y][:, None]).numpy()
    gap = (model(x).gather(1, y[:, None]) - model(x)).numpy()
    with np.errstate(invalid="ignore"):
        distance = gap / np.linalg.norm(w, q, axis=2)
    distance = np.nanmin(distance, axis=1)
    x_adv = deepfool(model, x, y, norm=norm, steps=1, overshoot=0.0, bounds=WIDE)
    assert bool(is_adversarial(model(x_adv), y).all())
    assert np.allclose(lengths(x_adv - x, norm), distance, atol=1e-5)
    x_adv = deepfool(model, x, y, norm=norm, steps=1, overshoot=0.1, bounds=WIDE)
    assert np.allclose(lengths(x_adv - x, norm), 1.1 * distance, atol=1e-5)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_in_the_box_it_comes_close_to_a_solver(norm):
    model, x = affine(4, 16), inputs(6, 16)
    y = model(x).argmax(1)
    x_adv = deepfool(model, x, y, norm=norm, overshoot=0.0)
    assert bool(((x_adv >= 0) & (x_adv <= 1)).all())
    assert bool(is_adversarial(model(x_adv), y).all())
    assert bool(((x_adv == 0) | (x_adv == 1)).any())  # the box took part
    found, best = lengths(x_adv - x, norm), np.full(6, math.inf)
    for i in range(6):
        for j in set(range(4)) - {int(y[i])}:
            z = cp.Variable(16)
            w = (model.weight[j] - model.weight[y[i]]).numpy()
            over = w @ z + float(model.bias[j] - model.bias[y[i]]) >= 0
            size = cp.norm(z - x[i].numpy(), "inf" if norm == "linf" else 2)
            value = cp.Problem(cp.Minimize(size), [z >= 0, z <= 1, over]).solve(cp.CLARABEL)
            best[i] = min(best[i], value)
    assert (found >= best - 1e-6).all()
    assert (found <= best * 1.2 + 1e-4).all()
    assert np.median(found / best) < 1.02


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([*NORMS, 1.05]))
def test_boundary_step_lands_on_the_nearest_boundary(seed, norm):
    rng = np.random.default_rng(seed)
    f, jac = rng.normal(size=(1, 5)), rng.normal(size=(1, 5, 7))
    y = int(f.argmax())
    step, distance = boundary_step(torch.tensor(f), torch.tensor(jac), torch.tensor([y]), norm)
    step, p = step[0].numpy(), EXPONENTS.get(norm, norm)
    moved = f[0] + jac[0] @ step
    rest = np.delete(moved, y)
    assert moved[y] == pytest.approx(rest.max(), abs=1e-4)  # a tie, and no other class above
    assert np.linalg.norm(step, p) == pytest.approx(float(distance.min()), rel=1e-9)
    assert distance[0, y] == math.inf
    for j in set(range(5)) - {y}:  # random steps as long as the distance never pass the boundary
        tries = rng.normal(size=(50, 7))
        tries *= float(distance[0, j]) / np.linalg.norm(tries, p, axis=1)[:, None]
        gap = f[0, y] - f[0, j] + tries @ (jac[0, y] - jac[0, j])
        assert (gap > -1e-4).all()


def test_boundary_step_is_the_corrected_formula():
    """Erratum 10: the gap closes with w pointing to the boundary and the power q, not q - 1."""
    rng = np.random.default_rng(0)
    w, gap = rng.normal(size=12), 5.02
    jac = torch.tensor(np.stack([np.zeros(12), w]))[None]
    f = torch.tensor([[gap, 0.0]], dtype=torch.float64)
    for norm, q in (("l2", 2.0), ("linf", 1.0), (3.0, 1.5)):
        ours = boundary_step(f, jac, torch.tensor([0]), norm)[0][0].numpy()
        formula = gap * np.sign(w) * np.abs(w) ** (q - 1) / (np.abs(w) ** q).sum()
        assert np.allclose(ours, formula, rtol=1e-5)
        assert w @ ours - gap == pytest.approx(2 * TOLERANCE * gap, rel=1e-6)


def test_targeted_step_goes_to_the_farthest_violated_boundary():
    f = torch.tensor([[3.0, 0.0, 1.0, -1.0]], dtype=torch.float64)
    jac = torch.eye(4, dtype=torch.float64)[None]
    step, distance = boundary_step(f, jac, torch.tensor([1]), "l2", targeted=True)
    assert torch.allclose(step, torch.tensor([[-1.5, 1.5, 0, 0]], dtype=torch.float64), atol=1e-4)
    assert distance[0].tolist() == pytest.approx([3 / 2**0.5, math.inf, 1 / 2**0.5, 0], abs=1e-4)


# networks


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("targeted", [False, True])
def test_what_is_found_is_adversarial_and_near(digits, norm, targeted):
    model, x, y = digits
    label = (y + 3) % 10 if targeted else y
    x_adv = deepfool(model, x, label, norm=norm, targeted=targeted)
    with torch.no_grad():
        assert bool(is_adversarial(model(x_adv), label, targeted).all())
        start = is_adversarial(model(x), label, targeted)
    assert torch.equal(x_adv[start], x[start])
    assert bool(((x_adv >= 0) & (x_adv <= 1)).all())
    moved = lengths(x_adv - x, norm)
    assert (moved[~start.numpy()] > 0).all()
    # shrinking by more than the overshoot leads back over the boundary for most samples
    with torch.no_grad():
        back = is_adversarial(model(x + 0.9 * (x_adv - x)), label, targeted)
    assert float(back[~start].float().mean()) < 0.2


def test_the_search_ends_at_the_first_success(digits):
    model, x, y = digits
    states = []
    x_adv = deepfool(model, x, y, observe=lambda step, state: states.append((step, state)))
    again = deepfool(model, x, y, steps=len(states))
    assert torch.equal(x_adv, again)
    assert len(states) < 12
    assert [step for step, _ in states] == list(range(len(states)))
    first = states[0][1]
    assert torch.equal(first["x_adv"], x)
    with torch.no_grad():
        f = model(x)
    correct = f.argmax(1) == y
    jac = torch.func.vmap(torch.func.jacrev(lambda z: model(z[None])[0]))(x).flatten(2)
    w = jac - jac[torch.arange(len(x)), y][:, None]
    free = (f - f.gather(1, y[:, None])).abs() / w.norm(dim=2)
    others = torch.arange(10)[None] != y[:, None]
    assert bool((first["distance"][others] >= free[others].detach() - 1e-4).all())
    early = deepfool(model, x, y, steps=1)
    unfinished = (early == x).flatten(1).all(1) & correct
    assert 0 < int(unfinished.sum()) < len(x)


def test_one_sample_behaves_as_in_a_batch(digits):
    model, x, y = digits
    model, x = copy.deepcopy(model).double(), x.double()
    batch = deepfool(model, x, y)
    alone = torch.cat([deepfool(model, x[i : i + 1], y[i : i + 1]) for i in range(10)])
    assert torch.allclose(batch[:10], alone, atol=1e-9)


def test_nothing_found_returns_the_input_and_warns():
    x, y = inputs(3, 4), torch.tensor([0, 0, 0])

    def constant(z):
        return torch.stack([torch.ones(len(z)), torch.zeros(len(z))], dim=1).to(z)

    with pytest.warns(GradientMaskingWarning, match=r"deepfool\(\): .* 3 of 3"):
        assert torch.equal(deepfool(constant, x, y), x)
    far = affine(2, 4)
    far.bias.copy_(torch.tensor([100.0, 0.0]))
    assert torch.equal(deepfool(far, x, y, steps=3), x)


def test_manners(digits):
    source, x, y = digits
    model = nn.Sequential(*source, nn.Dropout(0.9)).train()
    state = torch.get_rng_state()
    first = deepfool(model, x, y)
    assert model[-1].training
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(deepfool(model, x.clone(), y.clone()), first)
    leaf = x.clone().requires_grad_()
    assert torch.equal(deepfool(model, leaf, y), first)
    assert leaf.grad is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": "l1"}, "p > 1"),
        ({"norm": "l0"}, "norm"),
        ({"steps": 0}, "steps"),
        ({"overshoot": -0.1}, "overshoot"),
        ({"seed": -1}, "seed"),
        ({"bounds": (0.0, 0.1)}, "bounds"),
    ],
)
def test_bad_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        deepfool(affine(3, 4), inputs(2, 4), torch.tensor([0, 1]), **change)


# another library, another device


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_against_foolbox(digits, norm):
    import foolbox as fb

    model, x, y = digits
    keep = model(x).argmax(1) == y
    x, y = x[keep], y[keep]
    attack = fb.attacks.L2DeepFoolAttack if norm == "l2" else fb.attacks.LinfDeepFoolAttack
    peer = fb.PyTorchModel(model, bounds=(0, 1), device="cpu")
    theirs = attack(steps=50, candidates=None, overshoot=0.02)(peer, x, y, epsilons=None)[1]
    ours = deepfool(model, x, y, norm=norm)
    assert bool((margin(model(theirs), y) < 0).all())
    a, b = length(ours - x, norm), length(theirs - x, norm)
    assert float(a.mean() / b.mean()) == pytest.approx(1.0, abs=0.015)
    assert float((a / b).median()) == pytest.approx(1.0, abs=0.03)
