"""The networks of the book and of the papers it follows, built by name."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["MLP", "DigitsCNN", "Normalize", "build", "names"]

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": partial(nn.LeakyReLU, 0.2),
    "elu": nn.ELU,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}


class Normalize(nn.Module):
    """Standardize channels, ``(x - mean) / std``, so that inputs and eps stay in pixel units.

    Args:
        mean: C channel means.
        std: C channel standard deviations, all positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or not mean or min(std) <= 0:
            raise ValueError(
                f"Normalize takes one mean and one positive std per channel, not {mean} and {std}"
            )
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) images to images of the same shape."""
        _check_images(self, x, len(self.mean))
        return (x - self.mean) / self.std


class MLP(nn.Module):
    """Fully connected network on flattened inputs, (B, ...) to (B, K) logits.

    ``layers`` is an ``nn.Sequential`` of linear maps and activations, with none after the last.

    Args:
        sizes: input size, hidden sizes and number of classes, such as ``(784, 150, 100, 10)``.
        activation: one of ``ACTIVATIONS``.
        dropout: probability of dropping a unit after each hidden activation.
    """

    def __init__(
        self, sizes: Sequence[int], activation: str = "relu", dropout: float = 0.0
    ) -> None:
        super().__init__()
        if len(sizes) < 2 or min(sizes) < 1:
            raise ValueError(f"sizes must be two or more positive numbers, not {tuple(sizes)}")
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(sizes):
            layers += [nn.Linear(inputs, outputs), *_hidden(activation, dropout)]
        self.sizes = tuple(sizes)
        self.layers = nn.Sequential(*layers[: -len(_hidden(activation, dropout))])

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) inputs with ``sizes[0]`` values each to (B, K) logits."""
        if x.ndim < 2 or x[0].numel() != self.sizes[0]:
            raise ValueError(
                f"MLP takes (B, ...) inputs of {self.sizes[0]} values each, not {tuple(x.shape)}"
            )
        return self.layers(x.flatten(1))


class DigitsCNN(nn.Module):
    """Small convolutional network for the 8x8 digits.

    | layer | output |
    |---|---|
    | conv 16@3x3, pad 1; ReLU | 16 x 8 x 8 |
    | conv 32@3x3, pad 1; ReLU; max-pool 2 | 32 x 4 x 4 |
    | dense 64; ReLU | 64 |
    | dense K | K |

    Args:
        classes: number of classes K.
        activation: one of ``ACTIVATIONS``.
        dropout: probability of dropping a unit before and after the hidden dense layer.
    """

    def __init__(self, classes: int = 10, activation: str = "relu", dropout: float = 0.0) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            *_hidden(activation),
            nn.Conv2d(16, 32, 3, padding=1),
            *_hidden(activation),
            nn.MaxPool2d(2),
            nn.Flatten(),
        )
        self.head = nn.Sequential(
            *_dropout(dropout),
            nn.Linear(32 * 4 * 4, 64),
            *_hidden(activation, dropout),
            nn.Linear(64, classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1, 8, 8) images to (B, K) logits."""
        _check_images(self, x, 1, (8, 8))
        return self.head(self.features(x))


def names() -> tuple[str, ...]:
    """The networks that ``build`` knows."""
    return tuple(_MODELS)


def build(name: str, *, seed: int | None = None, **settings: Any) -> nn.Module:
    """Construct a network by name, in training mode, on the CPU.

    Args:
        name: one of ``names()``.
        seed: seed of the initial weights; the global random state is left as it was. Without it
            the weights come from the global random state, as for every torch module.
        settings: arguments of the network's class, over those that the name implies.

    Raises:
        ValueError: unknown name or a value that the class refuses.
        TypeError: a setting the class does not have.
    """
    if name not in _MODELS:
        raise ValueError(f"no network {name!r}; there are {', '.join(names())}")
    if seed is None:
        return _MODELS[name](**settings)
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would reseed the accelerators as well, which fork_rng then leaves so.
        torch.default_generator.manual_seed(seed)
        return _MODELS[name](**settings)


def _hidden(activation: str, dropout: float = 0.0) -> list[nn.Module]:
    if activation not in ACTIVATIONS:
        raise ValueError(f"no activation {activation!r}; there are {', '.join(ACTIVATIONS)}")
    return [ACTIVATIONS[activation](), *_dropout(dropout)]


def _dropout(p: float) -> list[nn.Module]:
    return [nn.Dropout(p)] if p else []


def _check_images(
    model: nn.Module, x: Tensor, channels: int, size: tuple[int, int] | None = None
) -> None:
    if x.ndim != 4 or x.shape[1] != channels or (size and x.shape[2:] != size):
        want = f"(B, {channels}, {size[0]}, {size[1]})" if size else f"(B, {channels}, H, W)"
        raise ValueError(f"{type(model).__name__} takes images {want}, not {tuple(x.shape)}")


_MODELS: dict[str, Callable[..., nn.Module]] = {"mlp": MLP, "digits-cnn": DigitsCNN}
