import copy
import math

import cvxpy as cp
import numpy as np
import pytest
import torch
from helpers import EXPONENTS, WIDE, affine, inputs, lengths
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from torch import nn

from adv.attacks.common import GradientMaskingWarning, generator, margin
from adv.attacks.gradient import fgsm, noise, pgd, random_noise, sparse_step
from adv.geometry import room

# affine models: the worst case is known


@pytest.mark.parametrize("norm", ["linf", "l2", "l1", 1.5, 3.0])
@pytest.mark.parametrize("loss", ["ce", "margin"])
def test_fgsm_reaches_the_worst_case_of_two_classes(norm, loss):
    model, x, eps = affine(2, 12), inputs(20, 12), 0.3
    y = torch.arange(20) % 2
    p = EXPONENTS.get(norm, norm)
    q = 1.0 if math.isinf(p) else math.inf if p == 1 else p / (p - 1)
    w = (model.weight[0] - model.weight[1]).numpy()
    x_adv = fgsm(model, x, y, eps=eps, norm=norm, loss=loss, bounds=WIDE)
    drop = margin(model(x), y) - margin(model(x_adv), y)
    assert np.allclose(drop, eps * np.linalg.norm(w, q), atol=1e-12)
    assert np.allclose(lengths(x_adv - x, norm), eps, atol=1e-12)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_pgd_reaches_the_worst_case_of_two_classes(norm):
    model, x, eps = affine(2, 12), inputs(20, 12), 0.3
    y = torch.arange(20) % 2
    w = (model.weight[0] - model.weight[1]).numpy()
    q = {"linf": 1, "l2": 2, "l1": np.inf}[norm]
    best = margin(model(x), y) - eps * np.linalg.norm(w, q)
    settings = {"eps": eps, "norm": norm, "bounds": WIDE}
    exact = pgd(model, x, y, **settings, steps=5, random_start=False)
    assert torch.allclose(margin(model(exact), y), best, atol=1e-12)
    started = pgd(model, x, y, **settings, steps=200, step_size=eps / 10)
    assert torch.allclose(margin(model(started), y), best, atol=1e-5)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_pgd_on_several_classes_finds_the_minimum_over_them(norm):
    """min over the ball of the margin = min_j (F_j - eps ||w_j||_q): never less, and attained."""
    model, x, eps = affine(5, 12), inputs(20, 12), 0.2
    y = model(x).argmax(1)
    q = {"linf": 1, "l2": 2, "l1": np.inf}[norm]
    w = model.weight[y][:, None] - model.weight[None]
    gap = model(x).gather(1, y[:, None]) - model(x)
    values = gap - eps * torch.linalg.vector_norm(w, q, dim=2)
    values[torch.arange(20), y] = math.inf
    best = values.amin(1)
    settings = {"eps": eps, "norm": norm, "bounds": WIDE, "random_start": False, "steps": 3}
    assert bool((margin(model(pgd(model, x, y, **settings)), y) >= best - 1e-12).all())
    reached = []
    for j in range(1, 5):  # every other class in turn
        other = (y + j) % 5

        def gap_to(f, y, other=other):
            return (f.gather(1, other[:, None]) - f.gather(1, y[:, None])).squeeze(1)

        reached.append(margin(model(pgd(model, x, y, loss=gap_to, **settings)), y))
    assert torch.allclose(torch.stack(reached).amin(0), best, atol=1e-12)


@pytest.mark.parametrize(
    ("norm", "eps", "share", "tolerance"),
    [("linf", 0.4, 0.2, 1e-6), ("l2", 1.2, 0.5, 1e-5), ("l1", 2.5, 0.005, 0.02)],
)
def test_pgd_in_ball_and_box_matches_a_solver(norm, eps, share, tolerance):
    """Under l1 the last entries swing by a step, hence the tolerance of one step's gain."""
    model, x = affine(2, 10), inputs(4, 10)
    y = torch.tensor([0, 1, 0, 1])
    x_adv = pgd(model, x, y, eps=eps, norm=norm, steps=400, step_size=eps * share)
    w = (model.weight[0] - model.weight[1]).numpy()
    for i in range(4):
        z = cp.Variable(10)
        near = cp.norm(z - x[i].numpy(), {"linf": "inf", "l2": 2, "l1": 1}[norm]) <= eps
        value = (w @ z + float(model.bias[0] - model.bias[1])) * (1 - 2 * int(y[i]))
        solved = cp.Problem(cp.Minimize(value), [z >= 0, z <= 1, near]).solve(cp.CLARABEL)
        assert float(margin(model(x_adv[i : i + 1]), y[i : i + 1])) == pytest.approx(
            solved, abs=tolerance
        )


def test_targeted_attacks_climb_the_target(digits):
    model, x, y = digits
    target = (y + 1) % 10

    def at_target(attack, **settings):
        x_adv = attack(model, x, target, eps=0.3, targeted=True, **settings)
        with torch.no_grad():
            return margin(model(x_adv), target)

    with torch.no_grad():
        clean = margin(model(x), target)
    noisy = at_target(random_noise, draws=20)
    assert bool((noisy >= at_target(random_noise) - 1e-4).all())
    assert noisy.mean() > at_target(random_noise).mean() + 0.1
    assert at_target(fgsm).mean() > max(clean.mean(), noisy.mean()) + 1
    assert at_target(pgd).mean() > at_target(fgsm).mean() + 1
    assert float((at_target(pgd) > 0).float().mean()) > 0.8


# the iterations, against loops written out


def test_pgd_is_its_formula(digits):
    """Linf with momentum against NumPy, gradients from the closed form of the network."""
    model, x, y = digits
    model = copy.deepcopy(model).double()
    x = x.double()
    w1, b1, w2, b2 = (p.detach().numpy() for p in model.parameters())
    clean, labels = x.flatten(1).numpy(), y.numpy()
    z, g, seen = clean.copy(), np.zeros_like(clean), []
    for _ in range(4):
        hidden = z @ w1.T + b1
        logits = np.maximum(hidden, 0) @ w2.T + b2
        seen.append(logits)
        prob = np.exp(logits - logits.max(1, keepdims=True))
        prob /= prob.sum(1, keepdims=True)
        prob[np.arange(len(z)), labels] -= 1
        gradient = ((prob @ w2) * (hidden > 0)) @ w1
        g = 0.9 * g + gradient / np.abs(gradient).sum(1, keepdims=True)
        z = np.clip(np.clip(z + 0.03 * np.sign(g), clean - 0.08, clean + 0.08), 0, 1)
    states = []
    pgd(
        model, x, y, eps=0.08, steps=4, step_size=0.03, momentum=0.9, random_start=False,
        observe=lambda step, state: states.append((step, state)),
    )  # fmt: skip
    assert [step for step, _ in states] == [0, 1, 2, 3]
    for logits, (_, state) in zip(seen, states, strict=True):
        assert np.allclose(logits, state["logits"], atol=1e-9)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_pgd_s_steps_share_two_and_a_half_radii_by_default(norm):
    model, x, y = affine(5, 12), inputs(6, 12), torch.arange(6) % 5
    given = {"eps": 0.3, "norm": norm, "steps": 7, "bounds": WIDE}
    paths = {}
    for name, more in (("default", {}), ("explicit", {"step_size": 2.5 * 0.3 / 7})):
        seen = paths[name] = []
        pgd(model, x, y, observe=lambda _, s, seen=seen: seen.append(s["x_adv"]), **given, **more)
    assert torch.equal(torch.stack(paths["default"]), torch.stack(paths["explicit"]))


def test_fgsm_under_linf_is_clipped_signs(digits):
    model, x, y = digits
    states = []
    x_adv = fgsm(model, x, y, eps=0.1, observe=lambda step, state: states.append(state))
    expected = np.clip(x.numpy() + 0.1 * np.sign(states[0]["gradient"].numpy()), 0, 1)
    assert np.allclose(x_adv, expected, atol=1e-7)
    assert len(states) == 1


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_restarts_are_nested_and_the_worst_point_seen_is_kept(digits, norm):
    model, x, y = digits
    eps = {"linf": 0.05, "l2": 0.4, "l1": 1.5}[norm]
    seen = {}

    def run(restarts, steps=5):
        states = seen[restarts] = []
        x_adv = pgd(
            model, x, y, eps=eps, norm=norm, steps=steps, restarts=restarts, seed=3,
            observe=lambda step, state: states.append(state),
        )  # fmt: skip
        return margin(model(x_adv), y)

    one, four = run(1), run(4)
    for first, again in zip(seen[1], seen[4], strict=False):
        assert torch.equal(first["x_adv"], again["x_adv"])
    assert bool((four <= one + 1e-6).all())
    assert bool((four < one - 1e-6).any())
    worst = torch.stack([margin(state["logits"], y) for state in seen[4]]).amin(0)
    assert bool((four <= worst + 1e-5).all())
    assert len({float(state["x_adv"].sum()) for state in seen[4][::5]}) == 4


def test_the_worst_point_may_lie_on_the_way():
    """A step that overshoots a bump must not lose what it passed."""

    def bump(z):
        value = (z - 0.5).abs().sum(1)  # the margin of class 0 is smallest at 0.5
        return torch.stack([value, -value], dim=1)

    x = torch.full((1, 1), 0.44, dtype=torch.float64)
    x_adv = pgd(
        bump,
        x,
        torch.tensor([0]),
        eps=0.4,
        steps=2,
        step_size=0.05,
        random_start=False,
        loss="margin",
    )
    assert float(x_adv) == pytest.approx(0.49)
    x_adv = pgd(
        bump,
        x,
        torch.tensor([0]),
        eps=0.4,
        steps=3,
        step_size=0.3,
        random_start=False,
        loss="margin",
    )
    assert float(x_adv) == pytest.approx(0.44)


# the balls


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["linf", "l2", "l1"]),
    st.floats(0, 5),
    st.integers(1, 4),
    st.floats(0, 2),
    st.integers(0, 99),
    st.booleans(),
)
def test_results_stay_in_ball_and_box(norm, eps, steps, momentum, seed, double):
    dtype = torch.float64 if double else torch.float32
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)
    x = torch.rand(4, 1, 3, 3).to(dtype).round(decimals=1)
    y = torch.tensor([0, 1, 2, 0])
    slack = 1e-5
    for x_adv in (
        pgd(model, x, y, eps=eps, norm=norm, steps=steps, momentum=momentum, seed=seed),
        fgsm(model, x, y, eps=eps, norm=norm),
        random_noise(model, x, y, eps=eps, norm=norm, kind="ball", seed=seed),
        random_noise(model, x, y, eps=eps, norm=norm, kind="sign", seed=seed),
    ):
        assert x_adv.shape == x.shape
        assert x_adv.dtype == x.dtype
        assert not x_adv.requires_grad
        assert bool((x_adv >= 0).all() & (x_adv <= 1).all())
        assert (lengths(x_adv - x, norm) <= eps * (1 + slack) + 1e-6).all()
        if eps == 0:
            assert torch.equal(x_adv, x)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1", 1.5, 4.0, 200.0])
def test_noise_is_uniform_in_the_ball(norm):
    x = torch.zeros(40_000, 2, dtype=torch.float64)
    z = noise(x, 2.0, norm, generator=generator(0)).numpy() / 2
    # E||z|| = d / (d + 1); E z_1^2 is an integral over the ball (1/4 in the disk)
    assert lengths(torch.tensor(z), norm).mean() == pytest.approx(2 / 3, abs=0.01)
    p, t = EXPONENTS.get(norm, norm), np.linspace(0, 1, 20_001)
    height = np.ones_like(t) if math.isinf(p) else (1 - t**p) ** (1 / p)
    assert (z[:, 0] ** 2).mean() == pytest.approx((t**2 * height).mean() / height.mean(), abs=0.005)
    assert np.abs(z.mean(0)).max() < 0.01
    assert abs((z[:, 0] * z[:, 1]).mean()) < 0.01


@pytest.mark.parametrize(
    ("norm", "kind"),
    [
        ("linf", "sphere"),
        ("l2", "sphere"),
        ("l1", "sphere"),
        (3.0, "sphere"),
        ("linf", "sign"),
        (3.0, "sign"),
    ],
)
def test_noise_on_the_sphere_has_full_length(norm, kind):
    z = noise(torch.zeros(50, 3, 4), 0.7, norm, kind, generator=generator(0))
    assert np.allclose(lengths(z, norm), 0.7, atol=1e-5)
    assert len(z.flatten(1).sum(1).unique()) > 1
    if kind == "sign":
        assert z.abs().unique().numel() == 1
        assert abs(float(z.sign().mean())) < 0.2


@pytest.mark.parametrize("end", [0.0, 1 - 2.0**-24])
def test_noise_is_finite_at_the_ends_of_the_uniform_law(end, monkeypatch):
    """torch.rand gives 0 once in 2^24 draws, where the Laplace law's logarithm is infinite."""
    monkeypatch.setattr(
        torch, "rand", lambda size, dtype, generator, device: torch.full(size, end).to(dtype)
    )
    z = noise(torch.zeros(2, 4), 1.0, "l1", "sphere", generator=generator(0))
    assert torch.allclose(z, torch.full((2, 4), 0.25 if end else -0.25))


@pytest.mark.parametrize("kind", ["ball", "sphere"])
@pytest.mark.parametrize("norm", ["linf", "l2", 1.5])
def test_noise_of_one_value_is_finite_where_0_is_drawn(norm, kind, monkeypatch):
    for name, drawn in (("rand", 0.5), ("randn", 0.0)):
        monkeypatch.setattr(
            torch,
            name,
            lambda size, dtype, generator, device, drawn=drawn: torch.full(size, drawn).to(dtype),
        )
    assert (noise(torch.zeros(2, 1), 1.0, norm, kind, generator=generator(0)) == 0).all()


def test_targets_stand_in_the_place_of_labels(digits):
    model, x, y = digits
    for wrong in (3, "no", (y + 1) % 10):
        with pytest.raises(TypeError, match="classes wanted stand in the place of y"):
            pgd(model, x, y, eps=0.1, targeted=wrong)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_a_huge_ball_leaves_the_box(digits, norm):
    model, x, y = digits
    for attack in (fgsm, pgd, random_noise):
        x_adv = attack(model, x, y, eps=1e30, norm=norm)
        assert bool(((x_adv >= 0) & (x_adv <= 1)).all())
    corner = pgd(
        affine(2, 4).float(), torch.rand(3, 4), torch.tensor([0, 0, 1]), eps=1e30, norm=norm
    )
    assert bool(((corner == 0) | (corner == 1)).all())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_points_without_finite_logits_are_not_kept(bad):
    def model(z):
        f = torch.stack([z[:, 0], 0.8 - z[:, 0]], dim=1)
        return torch.where(z[:, :1] < 0.35, bad, f)

    x, y = torch.full((4, 2), 0.6, dtype=torch.float64), torch.zeros(4, dtype=torch.int64)
    x_adv = pgd(model, x, y, eps=0.5, steps=20, step_size=0.04, random_start=False, loss="margin")
    assert bool((x_adv[:, 0] >= 0.35).all())
    assert bool((margin(model(x_adv), y) < -0.05).all())


def test_noise_keeps_the_worst_draw(digits):
    model, x, y = digits
    draws = []
    worst = random_noise(
        model, x, y, eps=0.3, draws=6, observe=lambda k, s: draws.append(s["x_adv"])
    )
    with torch.no_grad():
        margins = torch.stack([margin(model(z), y) for z in draws])
        assert torch.allclose(margin(model(worst), y), margins.amin(0), atol=1e-5)
        one = random_noise(model, x, y, eps=0.3, draws=1)
    assert torch.equal(one, draws[0])
    assert len(draws) == 6


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_random_noise_is_as_long_as_allowed_by_default(norm):
    """As an attack is that it is compared with: in many dimensions a ball is not much shorter."""
    model, x, y = affine(3, 2), inputs(30, 2), torch.arange(30) % 3
    x_adv = random_noise(model, x, y, eps=0.3, norm=norm, bounds=WIDE)
    assert np.allclose(lengths(x_adv - x, norm), 0.3, atol=1e-12)


def test_sparse_step_takes_the_largest_entries_with_room():
    x = torch.tensor([[0.0, 1.0, 0.5, 0.5, 0.2]])
    g = torch.tensor([[-9.0, 8.0, -3.0, 2.0, 4.0]])
    box = room(x, (0.0, 1.0))
    zero = torch.zeros_like(x)
    step = sparse_step(g, zero, 0.2, box, sparsity=0.6)  # two of the five entries
    assert torch.allclose(step, torch.tensor([[0, 0, -0.1, 0, 0.1]]))
    step = sparse_step(g, zero, 0.2, box, sparsity=0.99)
    assert torch.allclose(step, torch.tensor([[0, 0, 0, 0, 0.2]]))
    step = sparse_step(g, zero, 1.5, box, sparsity=0.99)  # what does not fit goes to the next
    assert torch.allclose(step, torch.tensor([[0, 0, -0.5, 0.2, 0.8]]))
    assert torch.allclose(sparse_step(g, step, 9.0, box), torch.tensor([[0, 0, 0, 0.3, 0]]))
    assert not sparse_step(zero, zero, 1.0, box).any()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999), st.floats(0.1, 4))
def test_sparse_step_of_one_entry_solves_the_linear_program(seed, size):
    rng = np.random.default_rng(seed)
    g, x = rng.normal(size=6), rng.uniform(size=6)
    box = room(torch.tensor(x)[None], (0.0, 1.0))
    step = sparse_step(torch.tensor(g)[None], torch.zeros(1, 6).double(), size, box)[0].numpy()
    # max g @ (u - v): u + v <= size in total, each in its room
    solved = linprog(
        -np.concatenate([g, -g]),
        A_ub=np.ones((1, 12)),
        b_ub=size,
        bounds=[(0, 1 - v) for v in x] + [(0, v) for v in x],
    )
    assert g @ step == pytest.approx(-solved.fun, abs=1e-9)


# manners


@pytest.mark.parametrize("attack", [fgsm, pgd, random_noise])
def test_attacks_leave_everything_as_it_was(digits, attack):
    source, x, y = digits
    model = nn.Sequential(*source, nn.Dropout(0.9)).train()
    state, clean = torch.get_rng_state(), x.clone()
    first = attack(model, x, y, eps=0.1, seed=5)
    assert model[-1].training
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, clean)
    with torch.no_grad():
        assert torch.equal(attack(model, x, y, eps=0.1, seed=5), first)
    with torch.inference_mode():
        assert torch.equal(attack(model, x.clone(), y.clone(), eps=0.1, seed=5), first)
    leaf = x.clone().requires_grad_()
    assert torch.equal(attack(model, leaf, y, eps=0.1, seed=5), first)
    assert leaf.grad is None
    model.eval()
    assert torch.equal(attack(model, x, y, eps=0.1, seed=5), first)
    assert attack is fgsm or not torch.equal(attack(model, x, y, eps=0.1, seed=6), first)


@pytest.mark.parametrize("attack", [fgsm, pgd])
def test_masked_gradients_warn_once_and_the_margin_loss_cures_saturation(digits, attack):
    model, x, y = digits
    correct = model(x).argmax(1) == y
    x, y = x[correct], y[correct]
    with pytest.warns(
        GradientMaskingWarning, match=f"{attack.__name__}\\(\\): .* vanished"
    ) as caught:
        attack(lambda z: 1e4 * model(z), x, y, eps=0.2)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    cured = attack(lambda z: 1e4 * model(z), x, y, eps=0.2, loss="margin")
    plain = attack(model, x, y, eps=0.2, loss="margin")
    assert torch.equal(cured, plain)
    with pytest.warns(GradientMaskingWarning):
        attack(lambda z: model((4 * z).round() / 4), x, y, eps=0.2)


@pytest.mark.parametrize(
    ("attack", "change", "error", "message"),
    [
        (fgsm, {"eps": -1.0}, ValueError, "eps"),
        (fgsm, {"norm": "l7"}, ValueError, "norm"),
        (fgsm, {"norm": 0.5}, ValueError, "norm"),
        (fgsm, {"loss": "nll"}, ValueError, "loss"),
        (fgsm, {"seed": -1}, ValueError, "seed"),
        (fgsm, {"bounds": (0.0, 0.1)}, ValueError, "bounds"),
        (pgd, {"norm": 3.0}, ValueError, "projects"),
        (pgd, {"norm": "l0"}, ValueError, "norm"),
        (pgd, {"steps": 0}, ValueError, "steps"),
        (pgd, {"restarts": 0}, ValueError, "restarts"),
        (pgd, {"restarts": 2, "random_start": False}, ValueError, "random start"),
        (pgd, {"step_size": -0.1}, ValueError, "step_size"),
        (pgd, {"step_size": "0.1"}, TypeError, "step_size"),
        (pgd, {"momentum": math.nan}, ValueError, "momentum"),
        (pgd, {"sparsity": 1.0}, ValueError, "sparsity"),
        (random_noise, {"draws": 0}, ValueError, "draws"),
        (random_noise, {"kind": "gauss"}, ValueError, "kind"),
        (random_noise, {"norm": "l0"}, ValueError, "norm"),
    ],
)
def test_bad_settings_are_refused(attack, change, error, message):
    with pytest.raises(error, match=message):
        attack(affine(3, 4), inputs(2, 4), torch.tensor([0, 1]), **{"eps": 0.1, **change})


# another library


@pytest.mark.filterwarnings("ignore")
def test_against_foolbox(digits):
    import foolbox as fb

    model, x, y = digits
    peer = fb.PyTorchModel(model, bounds=(0, 1), device="cpu")
    theirs = fb.attacks.FGSM(random_start=False)(peer, x, y, epsilons=0.1)[1]
    assert torch.allclose(fgsm(model, x, y, eps=0.1), theirs, atol=1e-6)
    theirs = fb.attacks.L2FastGradientAttack(random_start=False)(peer, x, y, epsilons=0.5)[1]
    assert torch.allclose(fgsm(model, x, y, eps=0.5, norm="l2"), theirs, atol=1e-5)
    for norm, eps, attack in (
        ("linf", 0.1, fb.attacks.LinfPGD),
        ("l2", 0.5, fb.attacks.L2PGD),
    ):
        peer_attack = attack(abs_stepsize=eps / 8, steps=20, random_start=False)
        theirs = margin(model(peer_attack(peer, x, y, epsilons=eps)[1]), y)
        ours = pgd(model, x, y, eps=eps, norm=norm, steps=20, step_size=eps / 8, random_start=False)
        # the same path up to the l2 projection with a box; ours keeps the worst point of it
        assert bool((margin(model(ours), y) <= theirs + 0.1).all())
        assert float((margin(model(ours), y) - theirs).abs().median()) < 0.05
    theirs = fb.attacks.SparseL1DescentAttack(steps=60, random_start=False)
    theirs = margin(model(theirs(peer, x, y, epsilons=2.0)[1]), y).mean()
    ours = margin(
        model(pgd(model, x, y, eps=2.0, norm="l1", steps=60, random_start=False)), y
    ).mean()
    assert ours < theirs + 0.1
