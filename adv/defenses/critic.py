r"""The adversary critic: a network's own adversarial images must look like the class they imitate.

The pieces of the game: the ``Critic`` with one output for each class, its loss and the penalty on
its slope, what the classifier pays, and the running confidences that the attack aims for.
``adv.lab.duel.fit_critic`` plays it. The losses are of batches that are not empty.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from adv.attacks.common import check_count, check_labels, check_number
from adv.attacks.confidence import unrolled

__all__ = [
    "Critic",
    "RunningConfidence",
    "critic_loss",
    "cycle_loss",
    "fooling_loss",
    "slope_penalty",
]


class Critic(nn.Module):
    r"""Is this a real image of class $k$? (B, ...) images to K logits $z$, $D_k=\sigma(z_k)$.

    A fully connected network with leaky ReLUs. In training mode Gaussian noise is added to the
    input and to the hidden layers, drawn from torch's global generator as dropout is; in evaluation
    mode there is none.

    Args:
        sizes: input size, hidden sizes and number of classes, such as ``(784, 1200, 1200, 10)``.
        noise: standard deviations at the input and at each hidden layer.
        slope: of the leaky ReLU below 0.

    Source: Matyasko (2020), sections 4.2 and 4.4; chapter ``critic``.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        noise: tuple[float, float] = (0.1, 0.5),
        slope: float = 0.2,
    ) -> None:
        super().__init__()
        if len(sizes) < 2 or min(sizes) < 1:
            raise ValueError(f"sizes must be two or more positive numbers, not {tuple(sizes)}")
        for value in noise:
            check_number("noise", value)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.sizes, self.noise, self.slope = tuple(sizes), noise, slope

    def forward(self, x: Float[Tensor, "B ..."]) -> Float[Tensor, "B K"]:
        """(B, ...) inputs with ``sizes[0]`` values each to (B, K) logits."""
        if x.ndim < 2 or math.prod(x.shape[1:]) != self.sizes[0]:
            raise ValueError(
                f"the critic takes (B, ...) inputs of {self.sizes[0]} values, not {tuple(x.shape)}"
            )
        z = self._blur(x.flatten(1), self.noise[0])
        for layer in self.layers[:-1]:
            z = self._blur(functional.leaky_relu(layer(z), self.slope), self.noise[1])
        return self.layers[-1](z)

    def extra_repr(self) -> str:
        """Its numbers, by which checkpoints tell critics apart."""
        return f"noise={self.noise}, slope={self.slope}"

    def _blur(self, z: Tensor, std: float) -> Tensor:
        return z + std * torch.randn_like(z) if self.training and std else z


class RunningConfidence(nn.Module):
    r"""How sure the classifier is of each class on clean data: $\bar c_k$, a running mean.

    Each batch moves $\bar c_k\leftarrow\alpha\bar c_k+(1-\alpha)\cdot$ the mean of
    $\max_jp_j(x)$ over its images that are classified as $k$; a class that is missing keeps its
    value. It starts at 1.

    Args:
        classes: their number K.
        decay: $\alpha$ in [0, 1].

    Source: Matyasko (2020), section 4.3; chapter ``critic``.
    """

    mean: Tensor

    def __init__(self, classes: int, decay: float = 0.5) -> None:
        super().__init__()
        check_count("classes", classes)
        check_number("decay", decay, high=1)
        self.register_buffer("mean", torch.ones(classes))
        self.decay = decay

    @torch.no_grad()
    def forward(self, logits: Float[Tensor, "B K"]) -> Float[Tensor, " K"]:
        """Take in the logits of a clean batch.

        Args:
            logits: (B, K); a class whose mean would not be finite keeps its value.

        Returns:
            (K,) the means after it, which later batches leave as they are.

        Raises:
            ValueError: logits of another number of classes.
        """
        if logits.ndim != 2 or logits.shape[1] != len(self.mean):
            raise ValueError(f"logits must be (B, {len(self.mean)}), not {tuple(logits.shape)}")
        sure, said = logits.to(self.mean.dtype).softmax(dim=1).max(dim=1)
        count = torch.zeros_like(self.mean).index_add(0, said, torch.ones_like(sure))
        total = torch.zeros_like(self.mean).index_add(0, said, sure)
        moved = self.decay * self.mean + (1 - self.decay) * total / count.clamp_min(1)
        self.mean.copy_(torch.where((count > 0) & moved.isfinite(), moved, self.mean))
        return self.mean.clone()

    def extra_repr(self) -> str:
        """Its number, by which checkpoints tell trainings apart."""
        return f"decay={self.decay}"


def critic_loss(
    critic: nn.Module,
    x: Float[Tensor, "B ..."],
    y: Int[Tensor, " B"],
    x_adv: Float[Tensor, "B ..."],
    y_adv: Int[Tensor, " B"],
) -> Float[Tensor, ""]:
    r"""$\mathbb E[-\log D_y(x)]+\mathbb E[-\log(1-D_{t}(x_{adv}))]$, what the critic minimizes.

    Args:
        critic: ``(B, ...) -> (B, K)`` logits $z$, $D=\sigma(z)$.
        x: real images.
        y: (B,) their labels.
        x_adv: adversarial images.
        y_adv: (B,) the classes $t$ that they are taken for.

    Returns:
        A scalar.

    Raises:
        TypeError, ValueError: labels that are not int64, or not one for each image.

    Source: Matyasko (2020), (4.3) as corrected by errata 14; chapter ``critic``.
    """
    real = functional.softplus(-_claimed(critic, x, y))
    made = functional.softplus(_claimed(critic, x_adv, y_adv))
    return real.mean() + made.mean()


def slope_penalty(
    critic: nn.Module, x: Float[Tensor, "B ..."], y: Int[Tensor, " B"]
) -> Float[Tensor, ""]:
    r"""$\mathbb E(\|\nabla_xz_y(x)\|_2-1)^2$: the critic's logit in units of distance.

    The thesis takes it at real and at adversarial images, one term each, not between them.

    Args:
        critic: ``(B, ...) -> (B, K)`` logits.
        x: images.
        y: (B,) the outputs looked at.

    Returns:
        A scalar that can be differentiated with respect to the critic's weights.

    Raises:
        TypeError, ValueError: outputs that are not int64, or not one for each image.

    Source: Matyasko (2020), section 4.2; chapter ``critic``.
    """
    z = x.detach().clone().requires_grad_()
    (slope,) = torch.autograd.grad(_claimed(critic, z, y).sum(), z, create_graph=True)
    return (slope.flatten(1).norm(dim=1) - 1).square().mean()


def fooling_loss(
    critic: nn.Module,
    x_adv: Float[Tensor, "B ..."],
    y_adv: Int[Tensor, " B"],
    counts: Bool[Tensor, " B"] | None = None,
) -> Float[Tensor, ""]:
    r"""$\mathbb E[-\log D_t(x_{adv})]$, what the classifier pays where its images look unreal.

    Args:
        critic: ``(B, ...) -> (B, K)`` logits.
        x_adv: adversarial images, with a graph to the classifier's weights.
        y_adv: (B,) the classes $t$ that they are taken for.
        counts: (B,) the images in the mean, such as those whose prediction changed; default all.

    Returns:
        The mean, 0 where no image counts.

    Raises:
        TypeError, ValueError: classes that are not int64, or classes or ``counts`` that are not one
            for each image.

    Source: Matyasko (2020), (4.4) as corrected by errata 15; chapter ``critic``.
    """
    return _mean(functional.softplus(-_claimed(critic, x_adv, y_adv)), counts)


def cycle_loss(
    model: nn.Module,
    x: Float[Tensor, "B ..."],
    said: Int[Tensor, " B"],
    x_adv: Float[Tensor, "B ..."],
    *,
    confidence: float | Float[Tensor, " B"],
    counts: Bool[Tensor, " B"] | None = None,
    steps: int = 5,
    overshoot: float = 0.05,
) -> Float[Tensor, ""]:
    r"""$\mathbb E\|\mathcal A(x_{adv},s)-x\|_2^2$: attacked back into its class, an image returns.

    Args:
        model: the classifier.
        x: (B, ...) images.
        said: (B,) $s$, the classes that the model gave them.
        x_adv: (B, ...) adversarial images; constants here.
        confidence: of the way back: the model's in ``said`` at ``x``.
        counts: (B,) the images in the mean; default all.
        steps: of the way back.
        overshoot: of the way back.

    Returns:
        The mean, in squared units of the images; 0 where no image counts. The thesis prints it
        without the square (errata 19).

    Raises:
        TypeError, ValueError: images, classes or ``counts`` of shapes that don't fit, or a way back
            that makes no sense.

    Source: Matyasko (2020), (4.5); chapter ``critic``.
    """
    if x.shape != x_adv.shape:
        raise ValueError(f"x_adv must be shaped like x, {tuple(x.shape)}, not {tuple(x_adv.shape)}")
    back = unrolled(model, x_adv, said, confidence=confidence, steps=steps, overshoot=overshoot)
    return _mean((back - x).flatten(1).square().sum(dim=1), counts)


def _claimed(critic: nn.Module, x: Tensor, y: Tensor) -> Float[Tensor, " B"]:
    """The critic's logit for the class that each image is said to be of."""
    check_labels(x, y)
    return critic(x.clone()).gather(1, y[:, None]).squeeze(1)  # a layer may change it in place


def _mean(values: Tensor, counts: Tensor | None) -> Tensor:
    if counts is None:
        return values.mean()
    if counts.shape != values.shape or counts.dtype != torch.bool:
        raise ValueError(
            f"counts must be ({len(values)},) booleans, one for each image, not {counts.dtype} of "
            f"shape {tuple(counts.shape)}"
        )
    # The sum of a selection, not of products: 0 times an infinite value would be NaN.
    return torch.where(counts, values, 0.0).sum() / counts.sum().clamp_min(1)
