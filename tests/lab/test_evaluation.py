"""Evaluation against linear models, on which every minimal perturbation has a closed form."""

import math
from functools import partial

import matplotlib as mpl
import numpy as np
import pytest
import torch
from helpers import affine, inputs
from torch import nn

from adv.attacks.boundary import deepfool
from adv.attacks.gradient import fgsm, pgd
from adv.attacks.pdpgd import pdpgd
from adv.lab import evaluation as ev
from adv.lab.models import MLP, DigitsCNN, build

mpl.use("agg")
D, N = 12, 40


def linear_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(D, 2)).double().eval()


@pytest.fixture
def problem():
    """A linear model, inputs far from the limits, and the exact margin of each."""
    model = linear_model()
    x = 0.4 + 0.2 * torch.rand(N, 1, 3, 4, dtype=torch.float64)
    w = (model[1].weight[0] - model[1].weight[1]).detach()
    with torch.no_grad():
        score = model(x)[:, 0] - model(x)[:, 1]
        model[1].bias[0] -= score.quantile(0.5)
        score = model(x)[:, 0] - model(x)[:, 1]
    y = (score < 0).long()
    y[:4] = 1 - y[:4]  # four samples that the model gets wrong
    sign = torch.where(y == 0, 1.0, -1.0)
    return model, x, y, w, sign * score


def exact(model, x, y, *, eps, norm="linf", bounds=(0.0, 1.0), seed=0):
    """The steepest step on a two-class linear model, written without the module."""
    w = (model[1].weight[0] - model[1].weight[1]).detach().reshape(x.shape[1:])
    direction = w.sign() if norm == "linf" else w / w.norm()
    sign = torch.where(y == 0, -1.0, 1.0).double().reshape(-1, 1, 1, 1)
    return x + eps * sign * direction


def nearest(model, x, y, *, norm="l2", bounds=(0.0, 1.0), seed=0):
    """The exact minimal l2 perturbation of a two-class linear model, a millionth beyond."""
    w = (model[1].weight[0] - model[1].weight[1]).detach()
    logits = model(x).detach()
    gap = (logits[:, 0] - logits[:, 1]) / w.norm()
    step = -gap[:, None] * w / w.norm() * (1 + 1e-4)
    return x + step.reshape(x.shape)


def test_robust_accuracy_is_the_closed_form(problem):
    model, x, y, w, m = problem
    grid = [0.0, 0.3, 0.01, 0.02, 0.05]
    for norm, dual in (("linf", w.abs().sum()), ("l2", w.norm())):
        got = ev.robust_accuracy(model, x, y, exact, grid, norm=norm, bounds=(-9, 9))
        want = [float((m > eps * dual).double().mean()) for eps in grid]
        assert got == pytest.approx(want)
    assert got[0] == ev.accuracy(model, x, y) == 36 / 40
    assert len(set(got)) >= 4  # a curve, not a constant
    assert ev.robust_accuracy(model, x, y, exact, 0.02, norm="l2") == pytest.approx(got[3])


def test_57_of_100_is_a_share_of_0_57():
    x = torch.full((100, 2), 0.5)
    x[:43, 1] = 1.0
    y = torch.zeros(100, dtype=torch.long)
    model = lambda x: 2 * x - torch.tensor([0.5, 1.0])  # noqa: E731
    idle = lambda model, x, y, *, eps, **_: x  # noqa: E731
    assert ev.robust_accuracy(model, x, y, idle, 0.1, norm="linf") == 0.57  # not 1 - 0.43


def test_fooled_once_is_fooled_at_larger_radii(problem):
    model, x, y, _, _ = problem

    def only_small(model, x, y, *, eps, norm="linf", bounds=(0.0, 1.0), seed=0):
        return exact(model, x, y, eps=eps, norm=norm) if eps < 0.1 else x

    small, large = ev.robust_accuracy(model, x, y, only_small, [0.05, 0.2])
    assert large == small < ev.robust_accuracy(model, x, y, only_small, 0.2)


def test_minimal_norm_attack_gives_the_same_curve(problem):
    model, x, y, w, m = problem
    grid = [0.0, 0.02, 0.05, 0.1, 0.3]
    got = ev.robust_accuracy(model, x, y, nearest, grid)
    assert got == pytest.approx(ev.robust_accuracy(model, x, y, exact, grid, norm="l2"))
    norms = ev.minimal_norms(model, x, y, nearest)
    assert torch.equal(norms == 0, m < 0)
    assert torch.allclose(norms, m.clamp_min(0) / w.norm() * (1 + 1e-4), rtol=1e-9)
    assert ev.rho_adv(x, norms) == pytest.approx(
        float((norms / x.flatten(1).norm(dim=1))[4:].mean()), rel=1e-9
    )


@pytest.mark.parametrize("norm", ["l0", "group_l0"])
def test_both_counts_of_minimal_norms_are_of_pixels(problem, norm):
    _, x, y, _, _ = problem
    color = torch.cat([x, x, x], dim=1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * D, 2)).double().eval()
    model[1].weight.data = torch.zeros(2, 3 * D).double()
    model[1].weight.data[1, 0] = 0.5  # class 1 wins where the first value is above 1/2 + 1/8
    model[1].bias.data = torch.tensor([0.3125, 0.0]).double()
    seen = []

    def brighten(model, x, y, *, norm, bounds=(0.0, 1.0), seed=0):
        """Two values of one pixel, and one of another."""
        seen.append(norm)
        x = x.clone()
        x[:, :2, 0, 0], x[:, 0, 1, 1] = 1.0, 0.0
        return x

    norms = ev.minimal_norms(model, color, 0 * y, brighten, norm=norm)
    assert norms.tolist() == [2.0] * N
    assert seen == [norm]
    assert ev.robust_accuracy(model, color, 0 * y, brighten, [1, 2], norm=norm) == [1.0, 0.0]
    table, figure = ev.report({"m": model}, color, 0 * y, {"a": brighten}, [1, 2], norm=norm)
    assert table.loc[("m", "a")].tolist() == [100.0, 100.0, 0.0]
    assert figure.axes[0].get_xlabel() == r"$\varepsilon$ (pixels)"
    mpl.pyplot.close(figure)


def test_nothing_found_is_infinite(problem):
    model, x, y, _, m = problem

    def idle(model, x, y, *, norm="l2", bounds=(0.0, 1.0), seed=0):
        return x.clone()

    norms = ev.minimal_norms(model, x, y, idle)
    assert torch.equal(norms == math.inf, m > 0)
    assert torch.equal(norms == 0, m < 0)
    assert math.isnan(ev.rho_adv(x, norms))


def test_fooling_ratio_is_of_the_correct_ones(problem):
    model, x, y, w, m = problem
    eps = 0.03
    want = float(((m > 0) & (m < eps * w.norm())).sum() / (m > 0).sum())
    assert 0 < want < 1
    assert ev.fooling_ratio(model, x, y, exact, eps, norm="l2") == pytest.approx(want)
    assert ev.fooling_ratio(model, x, y, exact, [0, eps], norm="l2") == pytest.approx([0, want])
    assert math.isnan(ev.fooling_ratio(model, x[:4], y[:4], exact, eps))


def test_real_attacks_are_exact_on_the_linear_model(problem):
    model, x, y, w, m = problem
    grid = [0.005, 0.01, 0.03]
    want = ev.robust_accuracy(model, x, y, exact, grid)
    assert ev.robust_accuracy(model, x, y, fgsm, grid, loss="margin") == pytest.approx(want)
    weak_start = partial(pgd, steps=10, random_start=False)
    assert ev.robust_accuracy(model, x, y, weak_start, grid) == pytest.approx(want)
    norms = ev.minimal_norms(model, x, y, deepfool, overshoot=1e-6)
    assert torch.allclose(norms, m.clamp_min(0) / w.norm(), rtol=1e-4)


def test_norm_comes_from_the_attack_unless_given(problem):
    model, x, y, _, _ = problem
    l2 = partial(exact, norm="l2")
    assert ev.robust_accuracy(model, x, y, l2, 0.03) == ev.robust_accuracy(
        model, x, y, exact, 0.03, norm="l2"
    )

    def silent(model, x, y, *, eps, bounds=(0.0, 1.0), seed=0):
        return x

    with pytest.raises(ValueError, match="norm"):
        ev.robust_accuracy(model, x, y, silent, 0.1)
    assert ev.robust_accuracy(model, x, y, silent, 0.1, norm="l1") == 36 / 40


@pytest.mark.parametrize("chunk", [1, 7, 40, 1000])
def test_chunks_change_nothing_for_deterministic_attacks(problem, chunk):
    model, x, y, _, _ = problem
    whole = ev.perturb(model, x, y, deepfool, chunk=N)
    assert torch.allclose(ev.perturb(model, x, y, deepfool, chunk=chunk), whole, atol=1e-12)
    assert torch.equal(ev.success(model, whole, y, chunk=chunk), ev.success(model, whole, y))
    assert ev.accuracy(model, x, y, chunk=chunk) == 36 / 40


def test_each_chunk_is_seeded_by_its_first_index(problem):
    model, x, y, _, _ = problem
    seen = []

    def spy(model, x, y, *, eps, norm="linf", bounds=(0.0, 1.0), seed=0):
        seen.append((len(x), seed))
        return x

    ev.perturb(model, x, y, spy, eps=0.1, chunk=15, seed=3)
    assert seen == [(15, 3), (15, 18), (10, 33)]


def test_distances_agree_with_numpy():
    rng = np.random.default_rng(0)
    delta = rng.normal(size=(5, 3, 4, 4)) * (rng.random((5, 1, 4, 4)) < 0.4)
    delta *= rng.random((5, 3, 4, 4)) < 0.7
    x = torch.tensor(rng.random((5, 3, 4, 4)))
    got = ev.distances(torch.zeros_like(x), torch.tensor(delta))
    flat = delta.reshape(5, -1)
    for key, order in (("linf", np.inf), ("l2", 2), ("l1", 1), ("l0", 0)):
        assert np.allclose(got[key], [np.linalg.norm(row, order) for row in flat])
    assert np.array_equal(got["pixels"], (delta != 0).any(axis=1).sum(axis=(1, 2)))
    assert (got["pixels"] < got["l0"]).all()
    with pytest.raises(ValueError, match="shape"):
        ev.distances(x, x[:2])


def cheat(kind):
    def attack(model, x, y, *, eps, norm="linf", bounds=(0.0, 1.0), seed=0):
        return {
            "far": x + 1.01 * eps,
            "below": x - 1.0,
            "above": x + 1.0,
            "nan": x * math.nan,
            "shape": x[:1],
            "dtype": x.float(),
            "rounding": x + eps * (1 + 1e-7),
        }[kind]

    return attack


@pytest.mark.parametrize("kind", ["far", "below", "above", "nan", "shape", "dtype"])
def test_cheating_attacks_are_refused(problem, kind):
    model, x, y, _, _ = problem
    radius = 2.0 if kind in ("below", "above") else 0.1
    with pytest.raises(ValueError, match=r"the attack (left|returned)"):
        ev.robust_accuracy(model, x, y, cheat(kind), radius)
    ev.robust_accuracy(model, x, y, cheat("rounding"), 0.1)


def test_what_an_attack_does_to_its_arguments_changes_nothing(problem):
    """Moving ``x`` along, or agreeing with the model about ``y``, would hide any distance."""
    model, x, y, _, _ = problem
    before = x.clone(), y.clone()

    def in_place(model, x, y, *, eps, norm="linf", bounds=(0.0, 1.0), seed=0):
        return x.sub_(x.sign() * 3 * eps)

    def relabel(model, x, y, *, eps, norm="linf", bounds=(0.0, 1.0), seed=0):
        y.copy_(1 - y)
        return x.requires_grad_()

    with pytest.raises(ValueError, match="left the linf ball"):
        ev.perturb(model, x, y, in_place, eps=0.1)
    with pytest.raises(ValueError, match="left the linf ball"):
        ev.robust_accuracy(model, x, y, in_place, 0.1)
    assert not ev.perturb(model, x, y, relabel, eps=0.1).requires_grad
    assert ev.robust_accuracy(model, x, y, relabel, 0.1) == 36 / 40
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])
    with pytest.raises(ValueError, match="returned a ndarray"):
        ev.perturb(model, x, y, lambda m, x, y, **_: x.numpy(), eps=0.1, norm="linf")


def test_targets_are_not_taken_for_labels(problem):
    model, x, y, _, _ = problem
    calls = (
        lambda: ev.robust_accuracy(model, x, y, fgsm, 0.1, targeted=True),
        lambda: ev.fooling_ratio(model, x, y, partial(pgd, targeted=True), [0.1]),
        lambda: ev.minimal_norms(model, x, y, deepfool, targeted=True),
    )
    for call in calls:
        with pytest.raises(ValueError, match="targeted attack"):
            call()
    aimed = ev.perturb(model, x, 1 - y, partial(fgsm, targeted=True), eps=0.05, loss="margin")
    got = ev.success(model, aimed, 1 - y, targeted=True).double().mean()
    assert float(got) == pytest.approx(1 - ev.robust_accuracy(model, x, y, exact, 0.05))


# What a sample costs, entry by entry: what autograd saves (values that the next derivative needs;
# pooling saves the places of its maxima), the logits, and the gradients of input and logits.
def mlp_bytes(size):
    return size * ((64 + 100 + 10) + (64 + 10))


CNN_BYTES = 4 * ((64 + 16 * 64 + 32 * 64 + 512 + 64 + 10) + (64 + 10)) + 8 * 512


@pytest.mark.parametrize(
    ("model", "need"),
    [
        (MLP((64, 100, 10)), mlp_bytes(4)),
        (MLP((64, 100, 10)).double(), mlp_bytes(8)),
        (MLP((64, 100, 10)).requires_grad_(False), mlp_bytes(4)),
        (DigitsCNN(), CNN_BYTES),
    ],
)
def test_chunk_size_by_counting_entries(model, need):
    x = torch.rand(30, 1, 8, 8, dtype=next(model.parameters()).dtype)
    model.eval()
    assert ev.chunk_size(model, x, need) == 1
    assert ev.chunk_size(model, x, 7 * need + need // 2) == 7
    assert ev.chunk_size(model, x, 10**12) == ev.CHUNK == 500
    assert ev.chunk_size(model, x, 10**12, limit=20) == 20
    with torch.no_grad():
        assert ev.chunk_size(model, x[:1], 7 * need - 1) == 6
    with pytest.raises(ValueError, match=rf"{need:,} bytes, more than memory={need - 1:,}"):
        ev.chunk_size(model, x, need - 1)
    assert all(p.grad is None for p in model.parameters())


def test_a_chunk_keeps_no_more_than_the_memory():
    """The graph of a whole chunk, counted apart: its saved tensors, input, logits, gradients."""
    model, memory = build("resnet32", seed=0).eval(), 10_000_000
    x = torch.rand(30, 3, 16, 16)
    fixed = {t.untyped_storage().data_ptr() for t in model.state_dict().values()}

    def kept(count):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda _: None):
            z = x[:count].clone().requires_grad_()
            logits = model(z)
        held = {t.untyped_storage().data_ptr(): t for t in [*saved, z, logits]}
        return sum(t.untyped_storage().nbytes() for p, t in held.items() if p not in fixed) + 4 * (
            z.numel() + logits.numel()
        )

    chunk = ev.chunk_size(model, x, memory)
    assert 1 < chunk < 29
    assert kept(chunk) <= memory < kept(chunk + 1)


def test_memory_sets_the_chunks_everywhere(problem):
    model, x, y, _, _ = problem
    need = 8 * ((D + 2) + (D + 2))
    sizes, seeds = [], []

    def spy(model, x, y, *, eps, norm="linf", bounds=(0.0, 1.0), seed=0):
        sizes.append(len(x))
        seeds.append(seed)
        return x

    def near(model, x, y, *, norm="l2", bounds=(0.0, 1.0), seed=0):
        return spy(model, x, y, eps=0, seed=seed)

    ev.perturb(model, x, y, spy, eps=0.1, memory=15 * need, seed=2)
    assert (sizes, seeds) == ([15, 15, 10], [2, 17, 32])
    for call in (
        lambda: ev.robust_accuracy(model, x, y, spy, 0.1, memory=15 * need),
        lambda: ev.minimal_norms(model, x, y, near, memory=15 * need),
        lambda: ev.report({"m": model}, x, y, {"spy": spy}, [0.1], norm="linf", memory=15 * need),
    ):
        sizes.clear()
        call()
        assert sizes == [15, 15, 6]  # four samples are misclassified as they are
    sizes.clear()
    ev.perturb(model, x, y, spy, eps=0.1, chunk=9, memory=15 * need)
    assert max(sizes) == 9
    with pytest.raises(ValueError, match="one sample needs"):
        ev.robust_accuracy(model, x, y, spy, 0.1, memory=need - 1)
    with pytest.raises(ValueError, match="memory"):
        ev.perturb(model, x, y, spy, eps=0.1, memory=0)
    mpl.pyplot.close("all")


@pytest.mark.parametrize(("norm", "size"), [("l2", math.sqrt(12)), ("l1", 12.0), ("l0", 12)])
def test_the_ball_is_checked_in_its_norm(problem, norm, size):
    model, x, y, _, _ = problem

    def shift(model, x, y, *, eps, norm=norm, bounds=(0.0, 1.0), seed=0):
        return x + 0.01

    scale = 1.0 if norm == "l0" else 0.01
    ev.perturb(model, x, y, shift, eps=size * scale)
    for dtype in (torch.float64, torch.float32):
        with pytest.raises(ValueError, match=f"{norm} ball"):
            ev.perturb(model, x.to(dtype), y, shift, eps=0.99 * size * scale)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_rounding_of_many_entries_is_no_cheat(norm):
    """In float32, adding 1e-4 to 0.9 is off by up to 3e-8 an entry, all on one side."""
    x, y = torch.full((2, 3, 64, 64), 0.9), torch.zeros(2, dtype=torch.long)
    d = 3 * 64 * 64
    eps = {"linf": 1e-4, "l2": 1e-4 * math.sqrt(d), "l1": 1e-4 * d}[norm]

    def shift(model, x, y, *, eps, norm=norm, bounds=(0.0, 1.0), seed=0):
        return x + 1e-4

    ev.perturb(None, x, y, shift, eps=eps, norm=norm)
    with pytest.raises(ValueError, match=f"{norm} ball"):
        ev.perturb(None, x, y, shift, eps=0.97 * eps, norm=norm)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("bounds", [(0.0, 255.0), (-123.68, 151.061)])
def test_rounding_in_other_units_is_no_cheat(norm, bounds):
    """Clamping to 151.061 gives another number in float32, and so does adding 0.05 to 200."""
    x = bounds[0] + (bounds[1] - bounds[0]) * inputs(20, 3 * 8 * 8).float().view(-1, 3, 8, 8)
    x = x.clamp(*bounds)
    model = nn.Sequential(nn.Flatten(), affine(3, 192).float()).eval()
    y = torch.zeros(20).long()
    attack = partial(pgd, steps=5, loss="margin")
    for eps in (0.05, 0.1, 0.5, 500.0):
        ev.perturb(model, x, y, attack, eps=eps, norm=norm, bounds=bounds)

    def far(model, x, y, *, eps, norm=norm, bounds=bounds, seed=0):
        return torch.where(x > 20, x - 1.01 * eps, x + 1.01 * eps)

    with pytest.raises(ValueError, match=f"{norm} ball"):
        ev.perturb(model, x, y, far, eps=0.1, norm=norm, bounds=bounds)

    def outside(model, x, y, *, norm=norm, bounds=bounds, seed=0):
        return x.masked_fill(x == x.max(), bounds[1] + 1e-3)

    with pytest.raises(ValueError, match="left the bounds"):
        ev.perturb(model, x, y, outside, norm=norm, bounds=bounds)


def test_pixels_are_counted_wherever_a_norm_is_one():
    x = torch.zeros(2, 3, 2, 2)
    x[0, :, 0] = 1.0
    x[1] = 1.0
    for norm in ("l0", "group_l0"):
        assert ev.rho_adv(x, torch.tensor([1.0, 1.0]), norm=norm) == pytest.approx(0.375)

        def two(model, x, y, *, eps, norm=norm, bounds=(0.0, 1.0), seed=0):
            x[:, :, 1] = 0.5
            return x

        ev.perturb(None, x, torch.zeros(2).long(), two, eps=2, norm=norm)
        with pytest.raises(ValueError, match=f"{norm} ball"):
            ev.perturb(None, x, torch.zeros(2).long(), two, eps=1, norm=norm)


def test_bad_input(problem):
    model, x, y, _, _ = problem
    for call in (
        lambda: ev.robust_accuracy(model, x, y, fgsm, -0.1),
        lambda: ev.robust_accuracy(model, x, y, fgsm, []),
        lambda: ev.robust_accuracy(model, x, y, fgsm, torch.tensor(-1.0)),
        lambda: ev.robust_accuracy(model, x, y, fgsm, math.nan),
        lambda: ev.accuracy(model, x, y[:3]),
        lambda: ev.accuracy(model, x[:0], y[:0]),
        lambda: ev.accuracy(model, x, y, chunk=0),
        lambda: ev.accuracy(model, x * math.nan, y),
        lambda: ev.accuracy(model, x, y + 1),
        lambda: ev.accuracy(model, x, y - 1),
        lambda: ev.accuracy(lambda z: model(z)[:, 0], x, y),
        lambda: ev.accuracy(lambda z: model(z)[:, :1], x, 0 * y),
        lambda: ev.perturb(model, x, y, exact, eps=-0.1),
        lambda: ev.perturb(model, x + 1, y, exact, eps=0.1),
        lambda: ev.report({}, x, y, {"fgsm": fgsm}, [0.1], norm="linf"),
    ):
        with pytest.raises(ValueError, match=r"eps|sample|chunk|model|NaN|labels lie|bounds"):
            call()
    for call in (
        lambda: ev.accuracy(model, x, y.float()),
        lambda: ev.accuracy(model, x.numpy(), y),
        lambda: ev.accuracy(model, x, y, chunk=2.5),
    ):
        with pytest.raises(TypeError, match=r"int64|tensor|chunk"):
            call()
    model[1].train()  # one part in training mode is enough
    with pytest.raises(ValueError, match="training mode"):
        ev.accuracy(model, x, y)


def test_a_constant_model_is_never_right():
    x, y = torch.rand(6, 3), torch.zeros(6, dtype=torch.long)
    assert ev.accuracy(lambda x: torch.ones(len(x), 3), x, y) == 0
    assert not ev.success(lambda x: torch.ones(len(x), 3), x, y).any()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_model_that_breaks_under_attack_is_no_defense(problem, value):
    model, x, y, _, _ = problem

    def breaking(z):
        """The model near the inputs; beyond them some logits overflow."""
        logits, far = model(z), (z - 0.5).flatten(1).abs().amax(dim=1) > 0.3
        return torch.where(far[:, None] & torch.tensor([True, False]), value, logits)

    def far(model, x, y, *, eps=0.4, norm="linf", bounds=(0.0, 1.0), seed=0):
        return (x + 0.4).clamp(max=0.95)

    def nearby(model, x, y, *, norm="linf", bounds=(0.0, 1.0), seed=0):
        return far(model, x, y)

    assert ev.accuracy(breaking, x, y) == 36 / 40
    assert not ev.success(breaking, far(model, x, y), y).any()
    for call in (
        lambda: ev.robust_accuracy(breaking, x, y, far, 0.4),
        lambda: ev.robust_accuracy(breaking, x, y, nearby, 0.4),
        lambda: ev.fooling_ratio(breaking, x, y, far, [0.4]),
        lambda: ev.minimal_norms(breaking, x, y, nearby),
        lambda: ev.report({"m": breaking}, x, y, {"far": far}, [0.4], norm="linf"),
        lambda: ev.robust_accuracy(breaking, far(model, x, y), y, far, 0.0),
    ):
        with pytest.raises(ValueError, match="neither fooled nor robust"):
            call()
    model.train()  # is still seen behind the check
    with pytest.raises(ValueError, match="training mode"):
        ev.robust_accuracy(model, x, y, far, 0.0)


@pytest.mark.parametrize("eps", ["0.1", ["0.1"], None, [0.1, None], {0.1}, (e for e in [0.1])])
def test_radii_are_numbers(problem, eps):
    model, x, y, _, _ = problem
    for call in (
        lambda: ev.robust_accuracy(model, x, y, fgsm, eps),
        lambda: ev.fooling_ratio(model, x, y, fgsm, eps),
        lambda: ev.report({"m": model}, x, y, {"fgsm": fgsm}, eps, norm="linf"),
    ):
        with pytest.raises(TypeError, match="eps is a number or a sequence"):
            call()
    for some in (np.float32(0.1), np.array(0.1), torch.tensor(0.1), 0):
        assert isinstance(ev.robust_accuracy(model, x, y, fgsm, some), float)
    for some in (np.array([0, 1]), torch.tensor([0, 0.5]), (0, 1.0), range(2)):
        assert len(ev.robust_accuracy(model, x, y, fgsm, some)) == 2


def test_counting_by_hand(problem):
    model, x, *_ = problem
    z = x[:7].clone().requires_grad_()
    with ev.counting(model) as outer:
        model(x)
        with ev.counting(model) as inner:
            logits = model(z)
            torch.autograd.grad(logits.sum(), z, retain_graph=True)
            rows = torch.eye(2, dtype=z.dtype)[:, None].expand(2, 7, 2)
            torch.autograd.grad(logits, z, rows, is_grads_batched=True)
        with torch.no_grad():
            model(x[:3])
    assert (inner.forward, inner.backward) == (7, 7 + 2 * 7)
    assert (outer.forward, outer.backward) == (N + 7 + 3, 21)
    model(x)
    assert outer.forward == N + 10  # the hooks are gone
    with ev.counting(model) as counts:
        torch.func.vmap(torch.func.grad(lambda v: model(v[None])[0, 0]))(x[:5])
    assert counts.backward == 5
    with pytest.raises(TypeError, match="module"), ev.counting(lambda x: x):
        pass


def test_counting_real_attacks(problem):
    model, x, y, _, _ = problem
    with ev.counting(model) as counts:
        fgsm(model, x, y, eps=0.01)
    assert counts.backward == N
    assert N <= counts.forward <= N + 1  # the check of the inputs runs one sample
    with ev.counting(model) as counts:
        pgd(model, x, y, eps=0.01, steps=6, restarts=2)
    assert counts.backward == 2 * 6 * N
    with ev.counting(model) as counts:
        deepfool(model, x, y, steps=1)
    assert counts.backward == 2 * N  # both classes' gradients


def test_report(problem):
    model, x, y, _, _ = problem
    models = {"first": model, "second": linear_model(1)}
    attacks = {"fgsm": fgsm, "pgd": partial(pgd, steps=5)}
    table, figure = ev.report(models, x, y, attacks, [0.05, 0.02], norm="linf", seed=1)
    assert list(table.columns) == [0.0, 0.02, 0.05]
    assert list(table.loc["first"].index) == ["fgsm", "pgd", "all"]
    want = ev.robust_accuracy(model, x, y, fgsm, [0.0, 0.02, 0.05], seed=1)
    assert np.allclose(table.loc[("first", "fgsm")], 100 * np.array(want))
    parts = table.loc["first"]
    assert (parts.loc["all"] <= parts.loc[["fgsm", "pgd"]].min() + 1e-9).all()
    drawn = [line.get_ydata() for line in figure.axes[0].lines]
    assert np.allclose(100 * np.array(drawn), parts.to_numpy())
    assert [ax.get_title() for ax in figure.axes] == ["first", "second"]
    mpl.pyplot.close("all")


def test_report_joins_attacks_that_fool_different_samples(problem):
    model, x, y, _, _ = problem

    def only(label, model, x, y, *, eps, norm="linf", bounds=(0.0, 1.0), seed=0):
        fooled = exact(model, x, y, eps=eps, norm=norm)
        return torch.where((y == label).reshape(-1, 1, 1, 1), fooled, x)

    attacks = {"zeros": partial(only, 0), "ones": partial(only, 1), "both": exact}
    table, _ = ev.report({"m": model}, x, y, attacks, [0.02], norm="linf")
    zeros, ones, both, joined = table[0.02]
    assert joined == both < min(zeros, ones)
    mpl.pyplot.close("all")


def test_psnr_of_signs_and_of_spheres_is_the_closed_form():
    x = torch.rand(3, 2, 8, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for eps, decibels in ((0.1, 20.0), (0.01, 40.0), (10**-0.5, 10.0)):
        signs = torch.where(x > 0.4, eps, -eps)
        assert ev.psnr(x + signs, x).tolist() == pytest.approx([decibels] * 3)
        sphere = eps * math.sqrt(112) * (x / x.flatten(1).norm(dim=1).view(3, 1, 1, 1))
        assert ev.psnr(x, x + sphere).tolist() == pytest.approx([decibels] * 3)


def test_psnr_is_one_number_for_each_pair():
    a = torch.zeros(3, 4, dtype=torch.float64)
    b = torch.tensor([[1.0, 1, 1, 1], [2, 0, 0, 0], [0, 0, 0, 0]], dtype=torch.float64)
    assert ev.psnr(a, b).tolist() == [0, 0, math.inf]
    assert ev.psnr(a, b / 4, peak=25.5)[:2].tolist() == pytest.approx(
        [10 * math.log10(25.5**2 * 16)] * 2
    )


def test_psnr_refuses_what_it_cannot_compare():
    x = torch.rand(2, 3, 4)
    for a, b in ((x, x[:1]), (x, x.flatten(1)), (x[0, 0], x[0, 0])):
        with pytest.raises(ValueError, match="one shape"):
            ev.psnr(a, b)
    with pytest.raises(TypeError, match="floating"):
        ev.psnr((255 * x).byte(), x)
    for peak in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="peak"):
            ev.psnr(x, x, peak=peak)


# -------------------------------------------------------------------- what users bring with them


def test_a_network_in_training_mode_inside_a_function_is_told():
    net = nn.Sequential(nn.Flatten(), nn.Linear(6, 3), nn.Dropout(0.5))
    x, y = torch.rand(4, 6), torch.zeros(4, dtype=torch.long)
    with pytest.raises(ValueError, match="Sequential in the model is in training mode"):
        ev.accuracy(lambda z: {"logits": net(z)}["logits"], x, y)
    net.eval()
    assert ev.accuracy(lambda z: {"logits": net(z)}["logits"], x, y) == ev.accuracy(net, x, y)


def test_layers_that_work_in_place_change_no_input(problem):
    model, x, y, *_ = problem
    kept = x.clone()
    shifted = lambda z: model(z.sub_(0.5).add_(0.5))  # noqa: E731
    assert ev.accuracy(shifted, x, y) == ev.accuracy(model, x, y)
    assert ev.robust_accuracy(shifted, x, y, fgsm, 0.1) == ev.robust_accuracy(
        model, x, y, fgsm, 0.1
    )
    assert torch.equal(x, kept)


@pytest.mark.parametrize("attack", [fgsm, partial(fgsm, eps=0.1)], ids=["free", "bound"])
def test_an_attack_with_a_radius_has_no_minimal_norm(problem, attack):
    with pytest.raises(ValueError, match="use robust_accuracy"):
        ev.minimal_norms(*problem[:3], attack)


def test_a_penalty_of_ones_own_is_bound_to_the_attack_and_measured_in_a_norm(problem):
    seen = []

    def own(model, x, y, *, norm="l2", bounds=(0.0, 1.0), seed=0):
        seen.append(norm)
        return nearest(model, x, y, norm="l2", bounds=bounds, seed=seed)

    mine = object()
    with pytest.raises(TypeError, match="bind a penalty of your own"):
        ev.minimal_norms(*problem[:3], own, norm=mine)
    with pytest.raises(TypeError, match="bind a penalty of your own"):
        ev.minimal_norms(*problem[:3], partial(own, norm=mine))
    assert not seen
    norms = ev.minimal_norms(*problem[:3], partial(own, norm=mine), norm="l2")
    assert seen == [mine]
    assert torch.equal(norms, ev.minimal_norms(*problem[:3], nearest, norm="l2"))


def test_an_exported_network_is_measured_in_the_one_mode_that_it_has():
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.BatchNorm1d(3)).eval()
    x = torch.rand(6, 4, generator=torch.Generator().manual_seed(0))
    batch = ({0: torch.export.Dim("batch", min=1, max=100)},)
    exported = torch.export.export(net, (x,), dynamic_shapes=batch).module()
    y = net(x).argmax(dim=1)
    assert ev.accuracy(lambda z: exported(z), x, y) == 1
    with pytest.raises(ValueError, match="training mode"):
        ev.accuracy(nn.Sequential(exported, nn.Dropout()), x, y)


def test_powers_are_bound_to_the_attack():
    net = nn.Linear(4, 3).eval()
    x = torch.rand(2, 4)
    y = net(x).argmax(dim=1)
    with pytest.raises(TypeError, match=r"functools.partial\(attack, norm=...\)"):
        ev.minimal_norms(net, x, y, pdpgd, norm="l1/2")


def test_a_report_needs_labels():
    model, x, y = affine(3, 4), inputs(2, 4), torch.tensor([0, 1])
    with pytest.raises(TypeError, match="models is a mapping from labels, not "):
        ev.report(model, x, y, {"fgsm": fgsm}, [0.1], norm="linf")
    with pytest.raises(TypeError, match="attacks is a mapping from labels, not list"):
        ev.report({"mine": model}, x, y, [fgsm], [0.1], norm="linf")
