import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from torch import nn

from adv.attacks.confidence import unrolled
from adv.defenses.critic import (
    Critic,
    RunningConfidence,
    critic_loss,
    cycle_loss,
    fooling_loss,
    slope_penalty,
)


class Constant(nn.Module):
    """A critic that says the same logits of everything."""

    def __init__(self, z):
        super().__init__()
        self.z = nn.Parameter(torch.as_tensor(z, dtype=torch.float64))

    def forward(self, x):
        return self.z.expand(len(x), -1) + 0 * x.flatten(1).sum(1, keepdim=True)


def images(count=6):
    return torch.rand(count, 1, 2, 3, dtype=torch.float64)


def labels(*values):
    return torch.tensor(values)


# losses


def test_losses_are_binary_cross_entropies_of_the_claimed_class():
    critic = Critic((6, 8, 3)).double().eval()
    x, x_adv = images(), images()
    y, t = labels(0, 1, 2, 0, 1, 2), labels(1, 2, 0, 2, 0, 1)
    D, D_adv = (torch.sigmoid(critic(z)).detach().numpy() for z in (x, x_adv))
    rows = np.arange(6)
    real, made = -np.log(D[rows, y]).mean(), -np.log(1 - D_adv[rows, t]).mean()
    assert critic_loss(critic, x, y, x_adv, t).item() == pytest.approx(real + made)
    fooled = -np.log(D_adv[rows, t])
    assert fooling_loss(critic, x_adv, t).item() == pytest.approx(fooled.mean())
    some = torch.tensor([True, False, True, False, False, False])
    assert fooling_loss(critic, x_adv, t, some).item() == pytest.approx(fooled[[0, 2]].mean())
    assert fooling_loss(critic, x_adv, t, ~some & some).item() == 0


def test_best_critic_is_the_share_of_real_images():
    """Where 7 of 10 images at a point are real, the loss is least at D = 0.7."""
    x, y = images(1).expand(7, -1, -1, -1), labels(*[0] * 7)
    x_adv, t = images(1).expand(3, -1, -1, -1), labels(*[0] * 3)

    def loss(z):
        # A mean each for real and made: their sum is weighted by giving each as often as it occurs.
        critic = Constant([z, 0.0])
        parts = [critic_loss(critic, x, y, x_adv, t), fooling_loss(critic, x, y)]
        real, made = parts[1], parts[0] - parts[1]
        return (0.7 * real + 0.3 * made).item()

    z = minimize_scalar(loss, bounds=(-5, 5), method="bounded").x
    assert 1 / (1 + math.exp(-z)) == pytest.approx(0.7, abs=1e-4)


def test_saturated_logits_stay_finite():
    critic, x = Constant([200.0, -200.0]), images(2)
    assert critic_loss(critic, x, labels(1, 1), x, labels(0, 0)).item() == pytest.approx(400)
    assert fooling_loss(critic, x, labels(1, 0), labels(1, 1) > 0).item() == pytest.approx(100)


def test_slope_penalty_of_an_affine_critic():
    critic = nn.Sequential(nn.Flatten(), nn.Linear(6, 3)).double()
    w = critic[1].weight
    y = labels(0, 1, 2, 2)
    expected = (torch.linalg.vector_norm(w[y], dim=1) - 1).square().mean()
    found = slope_penalty(critic, images(4), y)
    assert found.item() == pytest.approx(expected.item())
    ours, theirs = (torch.autograd.grad(v, w)[0] for v in (found, expected))
    assert torch.allclose(ours, theirs)


def test_slope_penalty_by_finite_differences():
    critic = Critic((6, 8, 3)).double().eval()
    x, y = images(3), labels(0, 1, 2)
    total = 0.0
    for i in range(3):
        numeric = []
        for k in range(6):
            step = torch.zeros(6, dtype=torch.float64)
            step[k] = 1e-6
            step = step.view(1, 1, 2, 3)
            up, down = (critic(x[i : i + 1] + s * step)[0, y[i]].item() for s in (1, -1))
            numeric.append((up - down) / 2e-6)
        total += (np.linalg.norm(numeric) - 1) ** 2 / 3
    assert slope_penalty(critic, x, y).item() == pytest.approx(total, rel=1e-5)


def test_gradients_reach_the_right_player():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3)).double()
    critic, x = Critic((6, 8, 3)).double(), images()
    said = model(x).argmax(1)
    x_adv = unrolled(model, x, (said + 1) % 3, confidence=0.8)
    loss = fooling_loss(critic, x_adv, (said + 1) % 3)
    first = next(model.parameters())
    (gradient,) = torch.autograd.grad(loss, first, retain_graph=True)
    assert gradient.abs().sum() > 0
    slope = slope_penalty(critic, x_adv, said)
    gradients = torch.autograd.grad(slope, list(model.parameters()), allow_unused=True)
    assert all(g is None for g in gradients), "the critic's penalty is none of the model's business"


# the cycle


def test_cycle_is_the_distance_of_the_way_back():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3)).double()
    x = images()
    said = model(x).argmax(1)
    x_adv = unrolled(model, x, (said + 1) % 3, confidence=0.8)
    back = unrolled(model, x_adv, said, confidence=0.9, steps=4, overshoot=0.1)
    each = (back - x).flatten(1).norm(dim=1) ** 2
    told = {"confidence": 0.9, "steps": 4, "overshoot": 0.1}
    found = cycle_loss(model, x, said, x_adv, **told)
    assert found.item() == pytest.approx(each.mean().item())
    some = torch.arange(6) > 3
    found = cycle_loss(model, x, said, x_adv, counts=some, **told)
    assert found.item() == pytest.approx(each[some].mean().item())


# confidences


def test_running_confidence_by_loops():
    running, mean = RunningConfidence(3, decay=0.75), [1.0, 1.0, 1.0]
    torch.manual_seed(0)
    for _ in range(4):
        logits = 2 * torch.randn(7, 3)
        logits[:, 2] -= 100.0  # class 2 is never said
        p = logits.softmax(1)
        for k in range(2):
            mine = [float(row.max()) for row in p if int(row.argmax()) == k]
            if mine:
                mean[k] = 0.75 * mean[k] + 0.25 * sum(mine) / len(mine)
        assert running(logits).tolist() == pytest.approx(mean)
    assert mean[2] == 1.0


def test_a_class_with_one_image_has_its_confidence():
    logits = torch.tensor([[0.0, 3.0, 0.0], [2.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    p = logits.softmax(1).amax(1).tolist()
    found = RunningConfidence(3, decay=0.0)(logits).tolist()
    assert found == pytest.approx([(p[1] + p[2]) / 2, p[0], 1.0])


def test_what_was_returned_stays_as_it_was():
    running = RunningConfidence(2)
    first = running(torch.tensor([[1.0, 0.0]]))
    kept = first.tolist()
    second = running(torch.tensor([[0.5, 0.0]]))
    assert first.tolist() == kept != second.tolist()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_one_batch_that_is_not_finite_is_passed_over(bad):
    running = RunningConfidence(2)
    before = running(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    logits = torch.tensor([[bad, 0.0], [0.0, 1.0]])
    after = running(logits)
    assert after[0] == before[0]
    assert after[1].item() == pytest.approx((before[1].item() + 1 / (1 + math.exp(-1))) / 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_confidences_of_any_precision(dtype):
    logits = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    found = RunningConfidence(2)(logits.to(dtype))
    assert found.dtype == torch.float32
    assert torch.allclose(found, RunningConfidence(2)(logits), rtol=1e-2)


# the network


def test_noise_is_there_in_training_only():
    x = torch.rand(5, 6)
    critic = Critic((6, 50, 3))
    assert not torch.equal(critic(x), critic(x))
    quiet = critic.eval()(x)
    assert torch.equal(quiet, critic(x))
    silent = Critic((6, 50, 3), noise=(0.0, 0.0))
    assert torch.equal(silent(x), silent(x))
    inner, outer = (Critic((6, 50, 3), noise=noise) for noise in ((0.0, 1.0), (1.0, 0.0)))
    assert not torch.equal(inner(x), inner(x))
    assert not torch.equal(outer(x), outer(x))
    # Without hidden layers, the first number alone counts.
    bare, linear = (Critic((6, 3), noise=noise) for noise in ((0.0, 1.0), (1.0, 0.0)))
    assert torch.equal(bare(x), bare(x))
    assert not torch.equal(linear(x), linear(x))
    # Noise at one place has its own size: through identities it adds up to what was asked for.
    many, wide = torch.zeros(4000, 1), Critic((1, 1, 1), noise=(0.0, 2.0), slope=1.0)
    with torch.no_grad():
        for layer in wide.layers:
            layer.weight.fill_(1.0)
            layer.bias.zero_()
    assert float(wide(many).detach().std()) == pytest.approx(2, rel=0.1)
    hidden = critic.layers[0](x)
    by_hand = critic.layers[1](torch.where(hidden > 0, hidden, 0.2 * hidden))
    assert torch.allclose(quiet, by_hand)


@pytest.mark.parametrize(
    ("build", "error"),
    [
        (lambda: Critic((6,)), ValueError),
        (lambda: Critic((6, 3), noise=(-1.0, 0.0)), ValueError),
        (lambda: Critic((6, 3))(torch.rand(2, 7)), ValueError),
        (lambda: RunningConfidence(3, decay=1.5), ValueError),
        (lambda: RunningConfidence(0), ValueError),
        (lambda: RunningConfidence(3)(torch.rand(5, 2)), ValueError),
        (lambda: RunningConfidence(3)(torch.rand(3)), ValueError),
    ],
)
def test_refuses(build, error):
    with pytest.raises(error):
        build()


X, Y = torch.rand(5, 6), torch.tensor([0, 1, 2, 0, 1])
COUNTS = torch.ones(5, dtype=torch.bool)
PLAIN = nn.Linear(6, 3)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: critic_loss(PLAIN, X, Y[:2], X, Y), ValueError, "one label for each"),
        (lambda: critic_loss(PLAIN, X, Y, X, Y[:, None]), ValueError, "one label for each"),
        (lambda: critic_loss(PLAIN, X, Y.int(), X, Y), TypeError, "int64"),
        (lambda: slope_penalty(PLAIN, X, Y[:2]), ValueError, "one label for each"),
        (lambda: fooling_loss(PLAIN, X, Y[:2]), ValueError, "one label for each"),
        (lambda: fooling_loss(PLAIN, X, Y, COUNTS[:, None]), ValueError, "counts must"),
        (lambda: fooling_loss(PLAIN, X, Y, COUNTS[:1]), ValueError, "counts must"),
        (lambda: fooling_loss(PLAIN, X, Y, COUNTS.float()), ValueError, "counts must"),
        (lambda: cycle_loss(PLAIN, X[:1], Y, X, confidence=0.9), ValueError, "shaped like x"),
        (lambda: cycle_loss(PLAIN, X, Y[:1], X, confidence=0.9), ValueError, "one label for each"),
        (
            lambda: cycle_loss(PLAIN, X, Y, X, confidence=0.9, counts=COUNTS[:, None]),
            ValueError,
            "counts must",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(call, error, says):
    with pytest.raises(error, match=says):
        call()
