import itertools
import math

import cvxpy as cp
import numpy as np
import pytest
import torch
from torch import nn

from adv.attacks import jacobian as module
from adv.attacks.jacobian import (
    Jacobian,
    ascend,
    best_signs,
    flip_search,
    greedy_signs,
    sign_bound,
    singular,
    trust_region,
)
from adv.geometry import linear_oracle, room
from adv.geometry import norm as length


def gaussian(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def square(J, signs, offset=0.0):
    return ((J @ signs[..., None])[..., 0] + offset).square().sum(-1)


# the operator, against a Jacobian that is written out


@pytest.fixture
def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.Softplus(),
            nn.MaxPool2d(2),
            nn.Dropout(0.5),
            nn.Conv2d(4, 3, 3, padding=1),
            nn.Upsample(scale_factor=2, mode="bilinear"),
            nn.Sigmoid(),
        ).double()
        model(torch.rand(20, 2, 4, 4).double())
    return model


def written_out(model, x):
    """(B, K, d), sample by sample, by another function."""
    model.eval()
    rows = [
        torch.autograd.functional.jacobian(lambda z: model(z[None]).flatten(), sample).flatten(1)
        for sample in x
    ]
    model.train()
    return torch.stack(rows)


@pytest.mark.parametrize("outputs", [48, 7])
@pytest.mark.parametrize("chunk", [2**20, 500])
def test_products_are_those_of_the_written_jacobian(network, outputs, chunk, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", chunk)
    cut = nn.Sequential(network, nn.Flatten(), nn.Linear(48, 7).double()).train()
    model = network if outputs == 48 else cut
    x = gaussian(3, 2, 4, 4, seed=1)
    exact = written_out(model, x)
    before = [p.detach().clone() for p in model.parameters()]
    J, d = Jacobian(model, x), 32
    assert J.chunk == (3 * max(outputs, d) <= chunk) * max(1, chunk // (3 * max(outputs, d)))
    u, w = gaussian(3, 2, 4, 4, seed=2), gaussian(*J.value.shape, seed=3)
    ju = (exact @ u.flatten(1)[..., None])[..., 0]
    jw = (w.flatten(1)[:, None] @ exact)[:, 0]
    assert torch.equal(J.value, model.eval()(x))
    assert J.jvp(u).shape == J.value.shape
    assert torch.allclose(J.jvp(u).flatten(1), ju, atol=1e-12)
    assert torch.allclose(J.jvp(u.flatten(1)), J.jvp(u))
    assert torch.allclose(J.vjp(w).flatten(1), jw, atol=1e-12)
    assert torch.allclose(J.gram(u).flatten(1), (ju[:, None] @ exact)[:, 0], atol=1e-12)
    assert torch.allclose(J.dense(), exact, atol=1e-12)
    assert torch.allclose(J.column_squares, exact.square().sum(1), atol=1e-12)
    own = torch.tensor([[3, 0, 5, 5], [1, 2, 3, 4], [31, 30, 0, 9]])
    picked = torch.stack([exact[i][:, own[i]] for i in range(3)])
    assert torch.allclose(J.columns(own), picked, atol=1e-12)
    assert torch.allclose(J.columns(torch.tensor([7, 2])), exact[:, :, [7, 2]], atol=1e-12)
    assert torch.allclose(J.rows(torch.tensor([6, 1])), exact[:, [6, 1]], atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_no_gradients_and_training_mode_make_no_difference(network, context):
    x, u = gaussian(2, 2, 4, 4), gaussian(2, 2, 4, 4, seed=5)
    expected = Jacobian(network.eval(), x).gram(u)
    network.train()
    network[4].eval()
    flags = [m.training for m in network.modules()]
    with context():
        J = Jacobian(network, x * 1)
        assert torch.allclose(J.gram(u * 1), expected, atol=1e-14)
    assert [m.training for m in network.modules()] == flags
    assert not x.requires_grad


class Cube(torch.autograd.Function):
    """A layer without a forward mode that cannot be batched: it reads a number back."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * (3.0 if grad.sum().item() > -math.inf else 0.0) * x**2


def test_layers_without_forward_mode_or_batching():
    W, x = gaussian(4, 5), gaussian(2, 4, seed=1)
    J = Jacobian(lambda z: Cube.apply(z) @ W, x)
    exact = torch.einsum("dk,bd->bkd", W, 3 * x**2)
    assert torch.allclose(J.dense(), exact)
    assert torch.allclose(J.rows(torch.arange(5)), exact)
    assert torch.allclose(J.jvp(x), torch.einsum("bkd,bd->bk", exact, x))


def test_no_path_back_is_a_zero_jacobian():
    x = gaussian(2, 4)
    for model in (lambda z: z.detach().round(), lambda z: 0 * z.round()):
        J = Jacobian(model, x)
        assert not J.dense().any()
        assert not J.jvp(x).any()
        assert not J.vjp(x).any()


def test_matrices_are_operators():
    matrix = gaussian(3, 4, 6)
    J = Jacobian.of(matrix)
    assert torch.equal(J.dense(), matrix)
    assert Jacobian.of(J) is J
    with pytest.raises(ValueError, match=r"\(B, K, d\)"):
        Jacobian.of(matrix[0])


# the l2 ball


def test_power_iteration_finds_the_leading_singular_vector():
    J = gaussian(6, 8, 11)
    found = singular(J, steps=5000, tol=1e-9)
    _, values, rows = np.linalg.svd(J.numpy())
    assert np.allclose(found.value, values[:, 0], rtol=1e-12)
    cosine = np.abs((found.vector.numpy() * rows[:, 0]).sum(1))
    assert np.allclose(cosine, 1, atol=1e-12)
    assert bool((found.residual < 1e-8).all())
    early = singular(J, steps=3, tol=0)
    v = early.vector.numpy()
    gram = np.einsum("bki,bkj,bj->bi", J, J, v)
    size = np.linalg.norm(np.einsum("bkj,bj->bk", J, v), axis=1)
    assert np.allclose(early.value, size)
    assert np.allclose(early.residual, np.linalg.norm(gram / size[:, None] ** 2 - v, axis=1))
    assert bool((early.residual > 1e-3).all())
    assert not torch.equal(singular(J, steps=3, tol=0, seed=1).vector, early.vector)


def test_power_iteration_contracts_by_the_squared_ratio():
    U, V = (torch.linalg.qr(gaussian(9, 9, seed=s)).Q for s in (1, 2))
    sigma = torch.linspace(3, 1, 9, dtype=torch.float64)
    sigma[1] = 2.8
    seen = []
    singular(
        (U * sigma @ V.T)[None], steps=60, tol=0, observe=lambda _, s: seen.append(s["delta"][0])
    )
    angles = [(V.T @ v) for v in seen]
    tangents = [float(a[1:].norm() / a[0].abs()) for a in angles]
    assert tangents[-1] / tangents[-2] == pytest.approx((2.8 / 3) ** 2, abs=1e-6)


def test_iterations_stop_by_their_tolerance():
    count = []
    observe = lambda _, state: count.append(state["moved"])  # noqa: E731
    singular(gaussian(3, 5, 5), tol=1e-2, observe=observe)
    assert len(count) < 200
    assert bool((count[-1] <= 1e-2).all())
    assert bool((count[-2] > 1e-2).any())


@pytest.mark.parametrize("eps", [0.3, 2.0])
def test_trust_region_against_its_semidefinite_program(eps):
    """The relaxation of one quadratic constraint is tight."""
    J, b = gaussian(4, 5, 7), gaussian(4, 7, seed=3)
    delta = trust_region(J, b, eps)
    assert torch.allclose(length(delta, "l2"), torch.full((4,), eps).double(), atol=1e-12)
    value = 2 * (b * delta).sum(1) + square(J, delta)
    for i in range(2):
        X = cp.Variable((8, 8), PSD=True)
        G = (J[i].T @ J[i]).numpy()
        gain = cp.trace(G @ X[:7, :7]) + 2 * b[i].numpy() @ X[:7, 7]
        limits = [cp.trace(X[:7, :7]) <= eps**2, X[7, 7] == 1]
        solved = cp.Problem(cp.Maximize(gain), limits).solve("CLARABEL")
        assert float(value[i]) == pytest.approx(solved, abs=1e-6)


def kkt(J, b, delta):
    """The multiplier, what is left of (mu I - G) delta = b, and mu - lambda_max."""
    pull = torch.einsum("bki,bkj,bj->bi", J, J, delta) + b
    mu = (pull * delta).sum(1) / delta.square().sum(1)
    top = torch.linalg.matrix_norm(J, 2) ** 2
    return mu, length(pull - mu[:, None] * delta, "l2"), mu - top


def test_trust_region_satisfies_its_optimality_conditions():
    J = gaussian(50, 6, 9)
    for scale in (1e-6, 1.0, 1e4):
        b = scale * gaussian(50, 9, seed=4)
        mu, left, above = kkt(J, b, trust_region(J, b, 0.7))
        assert bool((left < 1e-8 * mu).all())
        assert bool((above > -1e-9 * mu).all())


def test_trust_region_in_the_hard_case():
    """B orthogonal to the leading vectors: e_1 and e_2 for the double eigenvalue 9."""
    J = torch.diag(torch.tensor([3.0, 3.0, 2.0, 1.0])).double()[None]
    b = torch.tensor([[0.0, 0.0, 1.0, -0.5]]).double()
    delta = trust_region(J, b, 1.0)[0]
    assert torch.allclose(delta[2:], torch.tensor([1 / 5, -0.5 / 8]).double(), atol=1e-12)
    assert float(delta.norm()) == pytest.approx(1)
    easy = trust_region(J, 10 * b, 1.0)[0]  # no room left for the leading vectors
    assert float(easy[:2].norm()) < 1e-6
    nothing = trust_region(J, 0 * b, 1.0)[0]
    assert float(nothing[:2].norm()) == pytest.approx(1)
    assert not trust_region(J, b, 0.0).any()


@pytest.mark.parametrize("eps", [0.7, 1e5, 1e20, 1e30])
def test_trust_region_of_any_radius_in_single_precision(eps):
    J, b = gaussian(4, 5, 7).float(), gaussian(4, 7, seed=3).float()
    delta = trust_region(J, b, eps)
    exact = trust_region(J.double(), b.double(), eps)
    assert torch.allclose(length(delta, "l2") / eps, torch.ones(4))
    assert torch.allclose(delta.double() / eps, exact / eps, atol=1e-5)


def test_which_linearization_wins():
    """The sheet's shares of the exact optimum, as the residual grows."""
    J, eps = gaussian(1000, 10, 15), 1.0
    v = torch.linalg.svd(J).Vh[:, 0]
    residual = gaussian(1000, 10, seed=9)
    shares = []
    for scale in (0.01, 0.1, 1.0, 10.0):
        b = torch.einsum("bkd,bk->bd", J, scale * residual)

        def gain(delta, b=b):
            return 2 * (b * delta).sum(1) + square(J, delta)

        right = eps * v * (b * v).sum(1, keepdim=True).sign()
        best = gain(trust_region(J, b, eps))
        straight = eps * b / length(b, "l2")[:, None]
        shares.append([float((gain(d) / best).mean()) for d in (right, -right, straight)])
    expected = [
        [1.0, 0.995, 0.59],
        [0.998, 0.947, 0.64],
        [0.906, 0.60, 0.83],
        [0.553, -0.22, 0.995],
    ]
    assert np.allclose(shares, expected, atol=0.04)


def test_the_ascent_reaches_the_global_maximum_of_the_ball():
    J, r, eps = gaussian(30, 6, 9), gaussian(30, 6, seed=2), 0.8
    b = torch.einsum("bkd,bk->bd", J, r)

    def oracle(g):
        return linear_oracle(g, "l2", eps)

    delta = ascend(J, r, oracle(b), oracle, steps=20000, tol=1e-10)
    exact = trust_region(J, b, eps)
    assert torch.allclose(square(J, delta, r), square(J, exact, r), rtol=1e-10)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1", 1.5, 4.0])
def test_the_ascent_never_falls(norm):
    J, r, start = gaussian(20, 6, 9), gaussian(20, 6, seed=2), gaussian(20, 9, seed=3)
    x = torch.rand(20, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    box = room(x) if isinstance(norm, str) else None

    def oracle(g):
        return linear_oracle(g, norm, 0.4, box=box)

    seen = [oracle(start)]
    last = ascend(
        J, r, seen[0], oracle, steps=50, tol=0, observe=lambda _, s: seen.append(s["delta"])
    )
    values = torch.stack([square(J, delta, r) for delta in seen])
    assert bool((values.diff(dim=0) >= -1e-12).all())
    assert bool((values[-1] > values[0] + 1e-3).any())
    assert torch.equal(last, seen[-1])
    assert bool((length(last, norm) <= 0.4 + 1e-12).all())


# signs


def everything(J, offset=0.0):
    """The largest square over all sign vectors, one after the other."""
    all_signs = itertools.product((1.0, -1.0), repeat=J.shape[1])
    return max(float(np.square(J @ np.array(s) + offset).sum()) for s in all_signs)


def test_best_signs_is_the_maximum():
    for Z, count in ((1, 3), (3, 20), (9, 4)):
        J, r = gaussian(count, 4, Z, seed=Z), gaussian(count, 4, seed=Z + 1)
        plain, offset = best_signs(J), best_signs(J, r)
        assert bool((plain.abs() == 1).all())
        assert bool((plain[:, 0] == 1).all())
        for i in range(count):
            assert float(square(J, plain)[i]) == pytest.approx(everything(J[i].numpy()))
            value = float(square(J, offset, r)[i])
            assert value == pytest.approx(everything(J[i].numpy(), r[i].numpy()))
    J = gaussian(2, 3, 14)  # more vectors than one block holds
    assert torch.allclose(
        square(J, best_signs(J, torch.zeros(2, 3).double())), square(J, best_signs(J))
    )
    with pytest.raises(ValueError, match="at most 20"):
        best_signs(gaussian(1, 3, 21))


def greedy_by_hand(J, offset):
    order = np.argsort(-np.square(J).sum(0), kind="stable")
    total, signs = offset.copy(), np.zeros(J.shape[1])
    for z in order:
        signs[z] = 1.0 if total @ J[:, z] >= 0 else -1.0
        total += signs[z] * J[:, z]
    return signs


@pytest.mark.parametrize("chunk", [2**20, 40])
def test_greedy_is_its_rule(chunk, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", chunk)
    J, r = gaussian(5, 4, 13), gaussian(5, 4, seed=8)
    for offset in (None, r):
        signs = greedy_signs(J, offset)
        for i in range(5):
            start = np.zeros(4) if offset is None else r[i].numpy()
            assert np.array_equal(signs[i].numpy(), greedy_by_hand(J[i].numpy(), start))


def flips(J):
    """The better of the two searches: from greedy, and from the singular vector."""
    v = torch.linalg.svd(J).Vh[:, 0]
    top = torch.where(v < 0, -1.0, 1.0).double()
    return top, flip_search(J, greedy_signs(J)), flip_search(J, top)


@pytest.mark.parametrize(
    ("K", "Z", "greedy", "flipped", "top"),
    [(3, 3, 0.990, 1.0, 0.993), (12, 12, 0.927, 0.976, 0.960), (3, 12, 0.947, 0.982, 0.972)],
)
def test_how_good_the_rules_are(K, Z, greedy, flipped, top):
    """The sheet's means of the share of the maximum."""
    J = gaussian(600, K, Z, seed=K * Z)
    best = square(J, best_signs(J))
    ours = greedy_signs(J)
    sign_v, one, two = flips(J)
    shares = [float((square(J, s) / best).mean()) for s in (ours, one, sign_v)]
    assert np.allclose(shares, [greedy, flipped, top], atol=0.012)
    assert bool((square(J, ours) >= J.square().sum((1, 2)) - 1e-9).all())
    both = torch.maximum(square(J, one), square(J, two)) / best
    assert float(both.mean()) > 0.99
    assert bool((both <= 1 + 1e-12).all())


@pytest.mark.parametrize("J", [gaussian(20, 1, 9), gaussian(20, 6, 9).abs(), gaussian(20, 5, 2)])
def test_where_greedy_is_exact(J):
    assert torch.allclose(square(J, greedy_signs(J)), square(J, best_signs(J)))


@pytest.mark.parametrize(("Z", "share"), [(4, 0.371), (6, 0.249), (8, 0.177), (10, 0.135)])
def test_where_greedy_is_worst(Z, share):
    """Each new unit column is orthogonal to the sum, on the side toward the first axis."""
    columns, total = [np.array([1.0, 0.0])], np.array([1.0, 0.0])
    for z in range(1, Z):
        ahead = total / np.linalg.norm(total)
        across = np.array([-ahead[1], ahead[0]])
        across = across if total[1] <= 0 else -across
        new = across + 1e-6 * ahead
        columns.append(new / np.linalg.norm(new) * (1 - 1e-10 * z))
        total = total + columns[-1]
    J = torch.tensor(np.array(columns).T)[None]
    ratio = float(square(J, greedy_signs(J)) / square(J, best_signs(J)))
    assert ratio == pytest.approx(share, abs=0.002)


def test_flips_end_where_no_flip_helps():
    J, r = gaussian(10, 6, 15), gaussian(10, 6, seed=3)
    start = torch.ones(10, 15).double()
    for offset in (None, r):
        shift = torch.zeros(10, 6).double() if offset is None else r
        found = flip_search(J, start, offset)
        value = square(J, found, shift)
        assert bool((value >= square(J, start, shift)).all())
        assert bool((value > square(J, start, shift) + 1).any())
        for k in range(15):
            other = found.clone()
            other[:, k] *= -1
            assert bool((square(J, other, shift) <= value + 1e-9).all())
    assert bool((start == 1).all())


def test_the_bound_is_above_and_near_the_semidefinite_one():
    J = gaussian(5, 8, 8)
    gram = J.transpose(1, 2) @ J
    bound, best = sign_bound(gram), square(J, best_signs(J))
    assert bool((bound >= best - 1e-9).all())
    assert bool((sign_bound(gram, steps=1) >= best - 1e-9).all())
    for i in range(3):
        X = cp.Variable((8, 8), PSD=True)
        program = cp.Problem(cp.Maximize(cp.trace(gram[i].numpy() @ X)), [cp.diag(X) == 1])
        solved = program.solve("CLARABEL")
        assert solved - 1e-5 <= float(bound[i]) <= 1.002 * solved
        assert float(best[i]) >= 2 / math.pi * solved


# bad input

MATRICES, OFFSET, STEP = gaussian(2, 3, 5), gaussian(2, 3), gaussian(2, 5)
IMAGES = Jacobian(lambda z: torch.relu(z), gaussian(2, 1, 2, 2))
POINTS = gaussian(2, 5)


def go(matrix=MATRICES, offset=OFFSET, start=STEP, oracle=torch.sign, **options):
    return ascend(matrix, offset, start, oracle, **options)


BAD = {
    TypeError: [
        ("model", lambda: Jacobian(None, POINTS)),
        ("float32 or float64", lambda: Jacobian(torch.sin, POINTS.long())),
        ("model returns", lambda: Jacobian(lambda z: (z, z), POINTS)),
        ("matrices .* str", lambda: singular("a")),
        ("matrices .*int64", lambda: greedy_signs(MATRICES.long())),
        ("matrices .* Jacobian", lambda: best_signs(Jacobian.of(MATRICES))),
        ("matrices .* NoneType", lambda: sign_bound(None)),
        ("matrices .* str", lambda: trust_region("a", STEP, 1.0)),
        ("u is a", lambda: Jacobian.of(MATRICES).jvp(STEP.float())),
        ("w is a", lambda: Jacobian.of(MATRICES).vjp(None)),
        ("int64", lambda: Jacobian.of(MATRICES).columns(torch.ones(2))),
        ("int64", lambda: Jacobian.of(MATRICES).rows(0)),
        ("steps", lambda: singular(MATRICES, steps=1.5)),
        ("tol", lambda: go(tol="a")),
        ("oracle", lambda: go(oracle=None)),
        ("start", lambda: go(start=None)),
        ("offset", lambda: go(offset=OFFSET.float())),
        ("b is a", lambda: trust_region(MATRICES, STEP.float(), 1.0)),
        ("signs", lambda: flip_search(MATRICES, torch.ones(2, 5, dtype=torch.long))),
    ],
    ValueError: [
        ("NaN", lambda: Jacobian(torch.sin, POINTS * math.nan)),
        ("x has shape", lambda: Jacobian(torch.sin, POINTS[:0])),
        ("for 2 points", lambda: Jacobian(lambda z: z[:1], POINTS)),
        (r"\(B, K, d\)", lambda: singular(MATRICES[0])),
        (r"\(B, K, d\)", lambda: trust_region(MATRICES[0], STEP, 1.0)),
        (r"\(B, K, Z\)", lambda: best_signs(MATRICES[0])),
        (r"\(B, K, Z\)", lambda: best_signs(MATRICES[:, :, :0])),
        (r"\(B, Z, Z\)", lambda: sign_bound(torch.eye(3))),
        ("symmetric", lambda: sign_bound(MATRICES)),
        ("symmetric", lambda: sign_bound(MATRICES[:, :, :3])),
        ("not finite", lambda: best_signs(MATRICES / 0)),
        ("u has shape", lambda: Jacobian.of(MATRICES).jvp(OFFSET)),
        ("w has shape", lambda: Jacobian.of(MATRICES).vjp(OFFSET.T)),
        (r"0\.\.4", lambda: Jacobian.of(MATRICES).columns(torch.tensor([5]))),
        (r"\(2, n\)", lambda: Jacobian.of(MATRICES).rows(torch.zeros(3, 2, dtype=torch.long))),
        ("indices", lambda: Jacobian.of(MATRICES).rows(torch.zeros(0, dtype=torch.long))),
        ("steps", lambda: singular(MATRICES, steps=0)),
        ("tol", lambda: singular(MATRICES, tol=math.nan)),
        ("start", lambda: go(start=STEP[:1])),
        ("start", lambda: go(IMAGES, None, gaussian(2, 4))),  # flat, but steps are not
        ("offset", lambda: go(offset=STEP)),
        ("direction", lambda: go(oracle=lambda g: g[:, 1:])),
        ("b has shape", lambda: trust_region(MATRICES, STEP[:1], 1.0)),
        ("eps", lambda: trust_region(MATRICES, STEP, -1.0)),
        ("b has entries", lambda: trust_region(MATRICES, STEP * math.nan, 1.0)),
        ("offset", lambda: greedy_signs(MATRICES, STEP)),
        ("offset", lambda: best_signs(MATRICES, OFFSET[:1])),
        ("offset", lambda: flip_search(MATRICES, torch.ones_like(STEP), STEP)),
        ("signs has shape", lambda: flip_search(IMAGES, torch.ones_like(IMAGES.x))),
        ("1 or -1", lambda: flip_search(MATRICES, STEP)),
        ("20 columns", lambda: best_signs(gaussian(1, 2, 21))),
        ("steps", lambda: sign_bound(torch.eye(3)[None], steps=0)),
    ],
}


@pytest.mark.parametrize(
    ("error", "message", "call"), [(error, *case) for error in BAD for case in BAD[error]]
)
def test_bad_input_is_refused(error, message, call):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.cuda
def test_the_device_makes_no_difference():
    J, r = gaussian(3, 5, 8), gaussian(3, 5, seed=1)
    there = J.cuda()
    assert torch.allclose(singular(J).vector, singular(there).vector.cpu(), atol=1e-9)
    assert torch.equal(greedy_signs(J, r), greedy_signs(there, r.cuda()).cpu())
    assert torch.equal(best_signs(J, r), best_signs(there, r.cuda()).cpu())
    gram = J.transpose(1, 2) @ J
    assert torch.allclose(sign_bound(gram), sign_bound(gram.cuda()).cpu())


def test_no_graph_to_the_input_is_a_zero_jacobian(network):
    """Even where the parameters ask for gradients."""
    x = gaussian(3, 2, 4, 4, seed=1)
    J = Jacobian(lambda z: network(z.detach()), x)
    assert torch.equal(J.dense(), torch.zeros(3, 48, 32).double())
    assert not J.jvp(torch.ones_like(x)).any()
    assert not J.vjp(torch.ones_like(J.value)).any()
