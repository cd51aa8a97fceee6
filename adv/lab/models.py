"""The networks of the book and of the papers it follows, built by name.

Classifiers return (B, K) logits; the others, from ``Autoencoder`` on, images.

| name | class | input | parameters |
|---|---|---|---|
| mlp | ``MLP`` | as ``sizes`` says | |
| fcnn | ``MLP`` 784-150-100-10 | 28x28 | 133,860 |
| mlp-1000, mlp-1200 | ``MLP`` with three such layers | 28x28 | 2,797,010; 3,836,410 |
| digits-cnn | ``DigitsCNN`` | 1x8x8 | 38,282 |
| lenet5 | ``LeNet5`` 6-16-120-84 | 1x28x28 | 61,706 |
| lenet5-wide | ``LeNet5`` 32-64-512 | 1x28x28 | 582,026 |
| nin | ``NetworkInNetwork`` | 3x32x32 | 966,986 |
| densenet40 | ``DenseNet40`` | 3x32x32 | 1,019,722 |
| resnet32 | ``ResNet32`` | 3x32x32 | 464,154 |
| autoencoder | ``Autoencoder`` 784-256-32-256-784 | 1x28x28 | 419,120 |
| colorization | ``Colorization`` | 1xHxW | 54,930 |
| vae | ``VAE`` 64-128-8-128-64 | 1x8x8 | 19,792 |
| abs-vae | ``ABSVAE`` | 1x28x28 | 85,361 |
| dc-vae | ``DCVAE`` | 1x28x28 | 23,217,297 |
| vaes | ``VAEs``, one of the last three for each class | | |
| wgan | ``WGAN`` 12-128-128-64 and critic | 1x8x8 | 51,393 |
| dc-gan | ``DCGAN`` | 1x28x28 | 24,722,690 |
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from math import prod
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "ABSVAE",
    "DCGAN",
    "DCVAE",
    "MLP",
    "VAE",
    "WGAN",
    "Autoencoder",
    "Colorization",
    "DenseNet40",
    "DigitsCNN",
    "LeNet5",
    "NetworkInNetwork",
    "Normalize",
    "ResNet32",
    "VAEs",
    "build",
    "initialize",
    "join_color",
    "names",
    "split_color",
]

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

    def extra_repr(self) -> str:
        """Its numbers, by which checkpoints tell networks apart."""
        return f"mean={self.mean.flatten().tolist()}, std={self.std.flatten().tolist()}"


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
        if x.ndim < 2 or prod(x.shape[1:]) != self.sizes[0]:
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


class LeNet5(nn.Module):
    """LeNet-5 with ReLU and max-pooling; by default the classic sizes.

    | layer | classic | wide: ``channels=(32, 64), hidden=(512,), padding=0`` |
    |---|---|---|
    | conv 5x5, ``padding``; ReLU; max-pool 2 | 6 x 14 x 14 | 32 x 12 x 12 |
    | conv 5x5; ReLU; max-pool 2 | 16 x 5 x 5 | 64 x 4 x 4 |
    | dense; ReLU | 120 | 512 |
    | dense; ReLU | 84 | |
    | dense | K | K |

    Args:
        classes: number of classes K.
        channels: filters of the two convolutions.
        hidden: sizes of the hidden dense layers.
        padding: of the first convolution; 2 for the classic 32x32 field on 28x28 images.
        shape: (C, H, W) of an image.
        activation: one of ``ACTIVATIONS``.
        dropout: probability of dropping a unit before the first and after each hidden dense layer.

    Source: LeCun et al. (1998), section II.B, with the usual ReLU, pooling and full connections;
    wide: Matyasko (2020), section 3.6, and its published code.
    """

    def __init__(
        self,
        classes: int = 10,
        channels: tuple[int, int] = (6, 16),
        hidden: Sequence[int] = (120, 84),
        padding: int = 2,
        shape: tuple[int, int, int] = (1, 28, 28),
        activation: str = "relu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        sides = [((n + 2 * padding - 4) // 2 - 4) // 2 for n in shape[1:]]
        if min(sides) < 1:
            raise ValueError(f"LeNet5 takes images of 12x12 at least after padding, not {shape}")
        self.shape = tuple(shape)
        self.features = nn.Sequential(
            nn.Conv2d(shape[0], channels[0], 5, padding=padding),
            *_hidden(activation),
            nn.MaxPool2d(2),
            nn.Conv2d(channels[0], channels[1], 5),
            *_hidden(activation),
            nn.MaxPool2d(2),
            nn.Flatten(),
        )
        sizes = (channels[1] * sides[0] * sides[1], *hidden, classes)
        self.head = nn.Sequential(*_dropout(dropout), MLP(sizes, activation, dropout))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) images of ``shape`` to (B, K) logits."""
        _check_images(self, x, self.shape[0], self.shape[1:])
        return self.head(self.features(x))


class NetworkInNetwork(nn.Module):
    """Network in Network for CIFAR: every convolution is followed by two of 1x1, then ReLUs.

    | block | convolutions, each with ReLU | then | output |
    |---|---|---|---|
    | 1 | 192@5x5, 160@1x1, 96@1x1 | max-pool 3, stride 2; dropout | 96 x 16 x 16 |
    | 2 | 192@5x5, 192@1x1, 192@1x1 | average-pool 3, stride 2; dropout | 192 x 8 x 8 |
    | 3 | 192@3x3, 192@1x1, K@1x1 | global average | K |

    Weights start He-normal. The class maps are averaged after their ReLU, as in the authors' model.

    Args:
        classes: number of classes K.
        channels: channels of an image.
        dropout: probability of dropping a unit after each pooling.

    Source: Lin, Chen, Yan (2014), section 3 and figure 2; sizes of the authors' CIFAR-10 model.
    """

    def __init__(self, classes: int = 10, channels: int = 3, dropout: float = 0.5) -> None:
        super().__init__()
        self.channels = channels
        # Pools round up, so that 32 -> 16 -> 8 without padding values.
        self.layers = nn.Sequential(
            *_mlpconv(channels, (192, 160, 96), 5),
            nn.MaxPool2d(3, 2, ceil_mode=True),
            nn.Dropout(dropout),
            *_mlpconv(96, (192, 192, 192), 5),
            nn.AvgPool2d(3, 2, ceil_mode=True),
            nn.Dropout(dropout),
            *_mlpconv(192, (192, 192, classes), 3),
        )
        initialize(self, "he")

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) images, H and W at least 6, to (B, K) logits."""
        _check_images(self, x, self.channels, least=6)
        return self.layers(x).mean(dim=(2, 3))


def _mlpconv(inputs: int, outputs: Sequence[int], size: int) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for before, after in pairwise((inputs, *outputs)):
        kernel = size if not layers else 1
        layers += [nn.Conv2d(before, after, kernel, padding=kernel // 2), nn.ReLU()]
    return layers


class DenseNet40(nn.Module):
    """DenseNet of 40 layers for CIFAR: each layer sees the maps of all before it in its block.

    | stage | layers | output, k = 12 |
    |---|---|---|
    | conv 16@3x3 | 1 | 16 x 32 x 32 |
    | 3 blocks of 12 x (norm, ReLU, conv k@3x3, dropout), concatenated | 36 | 160, 304, 448 maps |
    | between blocks: norm, ReLU, conv 1x1 (as many maps), dropout, average-pool 2 | 2 | |
    | norm, ReLU, global average, dense K | 1 | K |

    The plain form, without bottlenecks and compression. Weights start He-normal.

    Args:
        classes: number of classes K.
        channels: channels of an image.
        growth: maps k that each layer adds.
        dropout: probability of dropping a unit after each convolution but the first.

    Source: Huang, Liu, van der Maaten, Weinberger (2017), sections 3 and 4.2; table 2: L = 40,
    k = 12, 1.0 M parameters, dropout 0.2 where no augmentation is used.
    """

    def __init__(
        self, classes: int = 10, channels: int = 3, growth: int = 12, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.channels = channels
        width = 16
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1, bias=False)]
        for block in range(3):
            if block:
                layers += [_norm_conv(width, width, 1, dropout), nn.AvgPool2d(2)]
            for _ in range(12):
                layers.append(_Grow(_norm_conv(width, growth, 3, dropout)))
                width += growth
        layers += [nn.BatchNorm2d(width), nn.ReLU()]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(width, classes)
        initialize(self, "he")

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) images, H and W at least 4, to (B, K) logits."""
        _check_images(self, x, self.channels, least=4)
        return self.head(self.layers(x).mean(dim=(2, 3)))


class _Grow(nn.Module):
    """Append to a layer's input what the layer makes of it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.layer(x)], dim=1)


def _norm_conv(inputs: int, outputs: int, kernel: int, dropout: float) -> nn.Module:
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU(), conv, *_dropout(dropout))


class ResNet32(nn.Module):
    """ResNet of 32 layers for CIFAR, 6 n + 2 with n = 5.

    | stage | layers | output |
    |---|---|---|
    | conv 16@3x3, norm, ReLU | 1 | 16 x 32 x 32 |
    | 5 residual blocks of 2 x conv 16@3x3 | 10 | 16 x 32 x 32 |
    | 5 residual blocks of 2 x conv 32@3x3, first stride 2 | 10 | 32 x 16 x 16 |
    | 5 residual blocks of 2 x conv 64@3x3, first stride 2 | 10 | 64 x 8 x 8 |
    | global average, dense K | 1 | K |

    Shortcuts have no parameters (option A): where a stage halves the image, they take every second
    pixel and pad the new maps with zeros. Weights start He-normal.

    Args:
        classes: number of classes K.
        channels: channels of an image.

    Source: He, Zhang, Ren, Sun (2016), section 4.2; table 6: 0.46 M parameters.
    """

    def __init__(self, classes: int = 10, channels: int = 3) -> None:
        super().__init__()
        self.channels = channels
        widths = [16] * 6 + [32] * 5 + [64] * 5
        blocks = [_Residual(before, after) for before, after in pairwise(widths)]
        stem = (nn.Conv2d(channels, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.layers = nn.Sequential(*stem, *blocks)
        self.head = nn.Linear(64, classes)
        initialize(self, "he")

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) images to (B, K) logits."""
        _check_images(self, x, self.channels)
        return self.head(self.layers(x).mean(dim=(2, 3)))


class _Residual(nn.Module):
    """Two 3x3 convolutions around an option-A shortcut; stride 2 where the width grows."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.stride, self.grown = (1, 0) if inputs == outputs else (2, outputs - inputs)
        self.residual = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, self.stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x[:, :, :: self.stride, :: self.stride]
        half = self.grown // 2
        shortcut = nn.functional.pad(shortcut, (0, 0, 0, 0, half, self.grown - half))
        return torch.relu(self.residual(x) + shortcut)


class Autoencoder(nn.Module):
    """Fully connected autoencoder: images, through a code of a few numbers, to images in [0, 1].

    | part | layers |
    |---|---|
    | ``encoder`` | d - hidden - code |
    | ``decoder`` | code - hidden - d, then a sigmoid |

    Both are an ``MLP``; the activation follows the hidden layers, while the code is linear.

    Args:
        shape: (C, H, W) of an image; d = C H W.
        hidden: size of the layer before and of the one after the code.
        code: size of the code.
        activation: one of ``ACTIVATIONS``.

    Source: Balda et al. (2018), section 5.2: 96 % compression on MNIST, that is 32 of 784 numbers;
    the other sizes are ours, the paper gives none.
    """

    def __init__(
        self,
        shape: tuple[int, int, int] = (1, 28, 28),
        hidden: int = 256,
        code: int = 32,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        self.shape = tuple(shape)
        size = prod(shape)
        self.encoder = MLP((size, hidden, code), activation)
        self.decoder = MLP((code, hidden, size), activation)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) images of ``shape`` to images of the same shape, in (0, 1)."""
        _check_images(self, x, self.shape[0], self.shape[1:])
        return self.decoder(self.encoder(x)).sigmoid().view_as(x)


class VAE(nn.Module):
    r"""Variational autoencoder: a Gaussian posterior of a latent vector, and its decoder.

    The encoder gives mean and logarithm of the variances of $q(z\mid x)$, the decoder the image
    $G(z)$ in (0, 1), the mean of $p(x\mid z)$; the prior is standard normal. With ``classes`` both
    also get the class, one-hot: $q(z\mid x,y)$ and $p(x\mid z,y)$.

    | part | fully connected | with ``channels`` |
    |---|---|---|
    | encoder | d - hidden - 2 latent | 4x4 convolutions, stride 2 - hidden - 2 latent |
    | decoder | latent - hidden reversed - d | the same backwards, transposed |

    Args:
        shape: (C, H, W) of an image; d = C H W.
        latent: size of $z$.
        hidden: sizes of the fully connected layers between.
        channels: of the convolutions, each of which halves the image; empty for none.
        classes: how many, or 0 for a model that is not told the class.
        activation: one of ``ACTIVATIONS``; smooth ones let the decoder be differentiated twice.

    Source: Kingma and Welling (2014); Sohn, Lee and Yan (2015) for the class; chapter
    ``generative_models``.
    """

    def __init__(
        self,
        shape: tuple[int, int, int] = (1, 8, 8),
        latent: int = 8,
        hidden: tuple[int, ...] = (128,),
        channels: tuple[int, ...] = (),
        classes: int = 0,
        activation: str = "elu",
    ) -> None:
        super().__init__()
        sides, factor = shape[1:], 2 ** len(channels)
        if any(side % factor for side in sides):
            raise ValueError(f"{len(channels)} halvings don't divide images of {sides} pixels")
        self.shape, self.latent, self.classes = tuple(shape), latent, classes
        maps = (shape[0], *channels)
        small = (maps[-1], sides[0] // factor, sides[1] // factor)
        down = [
            layer
            for a, b in pairwise(maps)
            for layer in (nn.Conv2d(a, b, 4, stride=2, padding=1), *_hidden(activation))
        ]
        up = [
            layer
            for a, b in pairwise(reversed(maps))
            for layer in (*_hidden(activation), nn.ConvTranspose2d(a, b, 4, stride=2, padding=1))
        ]
        self.features = nn.Sequential(*down, nn.Flatten())
        self.head = MLP((prod(small) + classes, *hidden, 2 * latent), activation)
        self.tail = MLP((latent + classes, *reversed(hidden), prod(small)), activation)
        self.paint = nn.Sequential(nn.Unflatten(1, small), *up)

    def posterior(
        self, x: Float[Tensor, "B C H W"], y: Int[Tensor, " B"] | None = None
    ) -> tuple[Float[Tensor, "B latent"], Float[Tensor, "B latent"]]:
        """Mean and logarithm of the variances of the latent vector, given images.

        Args:
            x: (B, C, H, W) images of ``shape``.
            y: (B,) their classes, for a model that is told them.

        Raises:
            ValueError: another shape; a class missing, or given to a model that has none.
        """
        _check_images(self, x, self.shape[0], self.shape[1:])
        mean, log_variance = self.head(self._told(self.features(x), y)).chunk(2, dim=1)
        return mean, log_variance

    def decode(
        self, z: Float[Tensor, "B latent"], y: Int[Tensor, " B"] | None = None
    ) -> Float[Tensor, "B C H W"]:
        """Latent vectors, of given classes where the model is told them, to images in (0, 1)."""
        if z.ndim != 2 or z.shape[1] != self.latent:
            raise ValueError(f"latent vectors are (B, {self.latent}), not {tuple(z.shape)}")
        return self.paint(self.tail(self._told(z, y))).sigmoid()

    def forward(
        self, x: Float[Tensor, "B C H W"], y: Int[Tensor, " B"] | None = None
    ) -> Float[Tensor, "B C H W"]:
        """Reconstructions of images, through the mean of their posterior."""
        return self.decode(self.posterior(x, y)[0], y)

    def _told(self, features: Tensor, y: Tensor | None) -> Tensor:
        if (y is None) != (self.classes == 0):
            raise ValueError(f"this model has {self.classes} classes; y must be given if any")
        if y is None:
            return features
        return torch.cat([features, F.one_hot(y, self.classes).to(features.dtype)], dim=1)


class ABSVAE(VAE):
    """The VAE of one class in the released code of analysis by synthesis, for 28x28 images.

    | part | layers, each but the last with batch normalization and ELU | sides |
    |---|---|---|
    | encoder | conv 32@5x5; 32@4x4, stride 2; 64@3x3, stride 2; 2 latent@5x5 | 28, 24, 11, 5, 1 |
    | decoder | transposed 32@4x4; 16@5x5, stride 2; 16@5x5, stride 2; 1@4x4 | 1, 4, 11, 25, 28 |

    Args:
        latent: size of $z$.

    Source: Schott et al. (2019), released code.
    """

    def __init__(self, latent: int = 8) -> None:
        super().__init__((1, 28, 28), latent, hidden=())
        maps, kernels, strides = (1, 32, 32, 64, 2 * latent), (5, 4, 3, 5), (1, 2, 2, 1)
        down = [
            nn.Conv2d(a, b, size, stride)
            for (a, b), size, stride in zip(pairwise(maps), kernels, strides, strict=True)
        ]
        maps, kernels = (latent, 32, 16, 16, 1), (4, 5, 5, 4)
        up = [
            nn.ConvTranspose2d(a, b, size, stride)
            for (a, b), size, stride in zip(pairwise(maps), kernels, strides, strict=True)
        ]
        self.add_module("features", nn.Sequential(*_normalized(down, nn.ELU), nn.Flatten()))
        self.add_module("head", nn.Identity())
        self.add_module("tail", nn.Unflatten(1, (latent, 1, 1)))
        self.add_module("paint", nn.Sequential(*_normalized(up, nn.ELU)))


class DCVAE(VAE):
    """The encoder and decoder of Tables 1 and 2 of Chen, Xie and Zhu, as a VAE.

    | encoder | sides | decoder | sides |
    |---|---|---|---|
    | conv 256@4x4, stride 2, pad 1 | 32 to 16 | transposed 1024@4x4 | 1 to 4 |
    | conv 512@4x4, stride 2, pad 1 | 16 to 8 | transposed 512@4x4, stride 2, pad 1 | 4 to 8 |
    | conv 1024@4x4, stride 2, pad 1 | 8 to 4 | transposed 256@4x4, stride 2, pad 1 | 8 to 16 |
    | conv 128@4x4 | 4 to 1 | transposed C@4x4, stride 2, pad 1 | 16 to 32 |
    | dense 2 latent | | sigmoid | |

    Leaky ReLUs (0.2) follow the encoder's convolutions, batch normalization and ReLU the decoder's
    but the last. Where an image is smaller than 32x32, the encoder pads it with zeros and the
    decoder's output is cut. The paper's tanh, moved to [0, 1], is a sigmoid with the last layer's
    weights doubled; its table has one number in place of mean and variance.

    Args:
        shape: (C, H, W) of an image, even sides of at most 32.
        latent: size of $z$, which the paper does not give.
        widths: maps of the first three convolutions, reversed for the decoder.
        code: maps of the encoder's fourth convolution.

    Source: "On Breaking Deep Generative Model-based Defenses", Tables 1 and 2.
    """

    def __init__(
        self,
        shape: tuple[int, int, int] = (1, 28, 28),
        latent: int = 8,
        widths: tuple[int, int, int] = (256, 512, 1024),
        code: int = 128,
    ) -> None:
        super().__init__(shape, latent, hidden=())
        self.add_module("features", nn.Sequential(*_shrink(shape, widths, code)))
        self.add_module("head", nn.Linear(code, 2 * latent))
        self.add_module("tail", nn.Identity())
        self.add_module("paint", nn.Sequential(*_grow(shape, latent, widths)))


def _shrink(shape: Sequence[int], widths: Sequence[int], code: int) -> list[nn.Module]:
    """Table 1 up to its dense layer: images of ``shape`` to (B, code)."""
    layers: list[nn.Module] = [nn.ZeroPad2d(_frame(shape))]
    for before, after in pairwise((shape[0], *widths)):
        layers += [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
    return [*layers, nn.Conv2d(widths[-1], code, 4), nn.LeakyReLU(0.2), nn.Flatten()]


def _grow(shape: Sequence[int], latent: int, widths: Sequence[int]) -> list[nn.Module]:
    """Table 2 up to its last function: (B, latent) to images of ``shape``."""
    up: list[nn.Module] = [nn.ConvTranspose2d(latent, widths[-1], 4)]
    up += [
        nn.ConvTranspose2d(before, after, 4, stride=2, padding=1)
        for before, after in pairwise((*reversed(widths), shape[0]))
    ]
    left, right, top, bottom = _frame(shape)
    cut = nn.ZeroPad2d((-left, -right, -top, -bottom))
    return [nn.Unflatten(1, (latent, 1, 1)), *_normalized(up, nn.ReLU), cut]


def _frame(shape: Sequence[int]) -> tuple[int, int, int, int]:
    """What is missing to 32x32 at the left, right, top and bottom."""
    height, width = shape[1:]
    if max(height, width) > 32 or height % 2 or width % 2:
        raise ValueError(f"images have even sides of at most 32, not {height}x{width}")
    rows, columns = (32 - height) // 2, (32 - width) // 2
    return columns, columns, rows, rows


def _normalized(
    convolutions: Sequence[nn.Module], activation: Callable[[], nn.Module]
) -> list[nn.Module]:
    """Batch normalization and an activation after all but the last."""
    layers = [
        layer
        for convolution in convolutions[:-1]
        for layer in (convolution, nn.BatchNorm2d(convolution.out_channels), activation())  # type: ignore[arg-type]
    ]
    return [*layers, convolutions[-1]]


class VAEs(nn.Module):
    """A variational autoencoder for each class, of one architecture: analysis by synthesis.

    ``parts[c]`` is that of class c. Each is trained on images of its class alone
    (``lab.generative.class_elbo``).

    Args:
        classes: how many.
        kind: name of their architecture for ``build``: ``"vae"``, ``"abs-vae"``, ``"dc-vae"``.
        settings: of each.

    Source: Schott et al. (2019), section 3; chapter ``generative``.
    """

    def __init__(self, classes: int = 10, kind: str = "vae", **settings: Any) -> None:
        super().__init__()
        parts = [build(kind, **settings) for _ in range(classes)]
        if not all(isinstance(part, VAE) and not part.classes for part in parts):
            raise ValueError(f"kind={kind!r} must be a VAE that isn't told the class")
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K C H W"]:
        """Every class's reconstruction of each image."""
        return torch.stack([part(x) for part in self.parts], dim=1)


class WGAN(nn.Module):
    r"""Wasserstein generative adversarial network: a generator and its critic.

    ``generator`` maps $z\sim\mathcal N(0,I)$ to flat images in (0, 1), ``critic`` flat images to a
    number that is large for real ones. The critic has no batch normalization, because the gradient
    penalty is a property of each image.

    Args:
        shape: (C, H, W) of an image.
        latent: size of $z$.
        hidden: sizes of the generator's hidden layers; the critic's are the same, reversed.
        activation: of the generator, one of ``ACTIVATIONS``; the critic's is a leaky ReLU.

    Source: Arjovsky, Chintala and Bottou (2017); Gulrajani et al. (2017); chapter
    ``generative_models``.
    """

    def __init__(
        self,
        shape: tuple[int, int, int] = (1, 8, 8),
        latent: int = 12,
        hidden: tuple[int, ...] = (128, 128),
        activation: str = "elu",
    ) -> None:
        super().__init__()
        self.shape, self.latent, size = tuple(shape), latent, prod(shape)
        self.generator = MLP((latent, *hidden, size), activation)
        self.critic = MLP((size, *reversed(hidden), 1), "leaky_relu")

    def decode(self, z: Float[Tensor, "B latent"]) -> Float[Tensor, "B C H W"]:
        """Latent vectors to images in (0, 1)."""
        if z.ndim != 2 or z.shape[1] != self.latent:
            raise ValueError(f"latent vectors are (B, {self.latent}), not {tuple(z.shape)}")
        return self.generator(z).sigmoid().unflatten(1, self.shape)

    def judge(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, " B"]:
        """The critic's opinion of images, larger for those it takes for real."""
        _check_images(self, x, self.shape[0], self.shape[1:])
        return self.critic(x).squeeze(1)

    def forward(self, z: Float[Tensor, "B latent"]) -> Float[Tensor, "B C H W"]:
        """As ``decode``."""
        return self.decode(z)


class DCGAN(WGAN):
    """The generator and critic of Tables 1 and 2 of Chen, Xie and Zhu: those of ``DCVAE``.

    The critic ends in one number.

    Args:
        shape: (C, H, W) of an image, even sides of at most 32.
        latent: size of $z$, which the paper does not give.
        widths: maps of the critic's first three convolutions, reversed for the generator.
        code: maps of the critic's fourth convolution.

    Source: "On Breaking Deep Generative Model-based Defenses", Tables 1 and 2.
    """

    def __init__(
        self,
        shape: tuple[int, int, int] = (1, 28, 28),
        latent: int = 100,
        widths: tuple[int, int, int] = (256, 512, 1024),
        code: int = 128,
    ) -> None:
        super().__init__(shape, latent, hidden=())
        self.add_module("generator", nn.Sequential(*_grow(shape, latent, widths), nn.Flatten()))
        self.add_module("critic", nn.Sequential(*_shrink(shape, widths, code), nn.Linear(code, 1)))


class Colorization(nn.Module):
    """Guess the colors of a gray image: luminance to the two chroma channels of ``split_color``.

    | layer | output |
    |---|---|
    | conv 16@3x3; ReLU | 16 x H x W |
    | conv 32@3x3, stride 2; ReLU | 32 x H/2 x W/2 |
    | conv 64@3x3, stride 2; ReLU | 64 x H/4 x W/4 |
    | each pixel with the mean of all; conv 64@1x1; ReLU | 64 x H/4 x W/4 |
    | conv 32@3x3; ReLU; to the size before, nearest pixel | 32 x H/2 x W/2 |
    | conv 16@3x3; ReLU; to the size before, nearest pixel | 16 x H x W |
    | conv 2@3x3; tanh / 2 | 2 x H x W |

    Convolutions pad with zeros to keep the size; halves are rounded up. The encoder, the fusion
    with a description of the whole image and the decoder follow the paper's network; ours has fewer
    layers and maps, takes the description from its own encoder instead of a network trained on
    ImageNet, and works in a linear color space instead of CIELAB.

    Args:
        widths: maps of the encoder's three layers; the decoder mirrors them.
        activation: one of ``ACTIVATIONS``.

    Source: Baldassarre, Gonzalez Morin, Rodes-Guirao (2017), table 1; chapter ``regression``.
    """

    def __init__(
        self, widths: tuple[int, int, int] = (16, 32, 64), activation: str = "relu"
    ) -> None:
        super().__init__()
        first, second, third = widths

        def layer(inputs: int, outputs: int, size: int = 3, stride: int = 1) -> nn.Module:
            conv = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2)
            return nn.Sequential(conv, *_hidden(activation))

        self.encoder = nn.ModuleList(
            [layer(1, first), layer(first, second, stride=2), layer(second, third, stride=2)]
        )
        self.fusion = layer(2 * third, third, size=1)
        self.decoder = nn.ModuleList([layer(third, second), layer(second, first)])
        self.head = nn.Conv2d(first, 2, 3, padding=1)

    def forward(self, luminance: Tensor) -> Tensor:
        """(B, 1, H, W) luminance in [0, 1] to (B, 2, H, W) chroma in (-1/2, 1/2)."""
        _check_images(self, luminance, 1)
        maps, sizes = luminance, []
        for layer in self.encoder:
            maps = layer(maps)
            sizes.append(maps.shape[2:])
        whole = maps.mean(dim=(2, 3), keepdim=True).expand_as(maps)
        maps = self.fusion(torch.cat([maps, whole], dim=1))
        for layer, size in zip(self.decoder, sizes[1::-1], strict=True):
            maps = nn.functional.interpolate(layer(maps), size=tuple(size))
        return self.head(maps).tanh() / 2


RED, GREEN, BLUE = 0.299, 0.587, 0.114


def split_color(
    rgb: Float[Tensor, "B 3 H W"],
) -> tuple[Float[Tensor, "B 1 H W"], Float[Tensor, "B 2 H W"]]:
    r"""Luminance and chroma of color images: a linear change of basis.

    $$
    \begin{pmatrix}Y\\C_b\\C_r\end{pmatrix}=\begin{pmatrix}
    0.299&0.587&0.114\\-0.299/1.772&-0.587/1.772&0.5\\0.5&-0.587/1.402&-0.114/1.402
    \end{pmatrix}\begin{pmatrix}R\\G\\B\end{pmatrix},
    \qquad C_b=\frac{B-Y}{2(1-0.114)},\quad C_r=\frac{R-Y}{2(1-0.299)}.
    $$

    Args:
        rgb: (B, 3, H, W) images.

    Returns:
        (B, 1, H, W) luminance $Y$, in [0, 1] where the image is; (B, 2, H, W) chroma $(C_b,C_r)$,
        then in [-1/2, 1/2], and 0 where the image is gray.

    Raises:
        ValueError: not (B, 3, H, W).

    Source: ITU-R BT.601 with the full range, as in JPEG files; chapter ``regression``.
    """
    if rgb.ndim != 4 or rgb.shape[1] != 3:
        raise ValueError(f"split_color takes images (B, 3, H, W), not {tuple(rgb.shape)}")
    red, green, blue = rgb.split(1, dim=1)
    y = RED * red + GREEN * green + BLUE * blue
    return y, torch.cat([(blue - y) / (2 - 2 * BLUE), (red - y) / (2 - 2 * RED)], dim=1)


def join_color(
    luminance: Float[Tensor, "B 1 H W"], chroma: Float[Tensor, "B 2 H W"]
) -> Float[Tensor, "B 3 H W"]:
    """Color images from luminance and chroma: the inverse of ``split_color``, linear as well.

    Args:
        luminance: (B, 1, H, W), in [0, 1].
        chroma: (B, 2, H, W), in [-1/2, 1/2].

    Returns:
        (B, 3, H, W) images. Not every pair is a color. Where it is none, values leave [0, 1], and
        a picture needs ``clamp(0, 1)``.

    Raises:
        ValueError: other shapes, or shapes that do not belong together.

    Source: ITU-R BT.601 with the full range, as in JPEG files; chapter ``regression``.
    """
    fits = luminance.ndim == 4 and luminance.shape[1] == 1
    if not fits or chroma.shape != (len(luminance), 2, *luminance.shape[2:]):
        raise ValueError(
            "join_color takes luminance (B, 1, H, W) and chroma (B, 2, H, W), not "
            f"{tuple(luminance.shape)} and {tuple(chroma.shape)}"
        )
    cb, cr = chroma.split(1, dim=1)
    red, blue = luminance + (2 - 2 * RED) * cr, luminance + (2 - 2 * BLUE) * cb
    return torch.cat([red, (luminance - RED * red - BLUE * blue) / GREEN, blue], dim=1)


def initialize(model: nn.Module, kind: Literal["he", "glorot"]) -> nn.Module:
    """Draw the weights of all linear maps and convolutions anew, in place; set their biases to 0.

    Transposed convolutions are left as they are.

    Args:
        model: any network.
        kind: ``"he"``, normal with variance 2 / fan-in, or ``"glorot"``, uniform with variance
            2 / (fan-in + fan-out). Draws come from the global random state.

    Returns:
        The same network.

    Source: He et al. (2015), eq. (10); Glorot and Bengio (2010), eq. (16).
    """
    if kind not in ("he", "glorot"):
        raise ValueError(f"initialize takes 'he' or 'glorot', not {kind!r}")
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            if kind == "he":
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            else:
                nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


def names() -> tuple[str, ...]:
    """The networks that ``build`` knows."""
    return tuple(_MODELS)


def build(
    name: str,
    *,
    seed: int | None = None,
    init: Literal["he", "glorot"] | None = None,
    normalize: tuple[Sequence[float], Sequence[float]] | None = None,
    **settings: Any,
) -> nn.Module:
    """Construct a network by name, in training mode, on the CPU.

    Args:
        name: one of ``names()``.
        seed: seed of the initial weights; the global random state is left as it was. Without it
            the weights come from the global random state, as for every torch module.
        init: weights by ``initialize`` instead of the network's own.
        normalize: means and standard deviations of the channels; puts ``Normalize`` in front, and
            the network becomes ``nn.Sequential(Normalize, network)``.
        settings: arguments of the network's class, over those that the name implies.

    Raises:
        ValueError: unknown name or a value that the class refuses.
        TypeError: a setting the class does not have.
    """
    if name not in _MODELS:
        raise ValueError(f"no network {name!r}; there are {', '.join(names())}")
    if seed is not None:
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would reseed the accelerators too, and fork_rng leave them so.
            torch.default_generator.manual_seed(seed)
            return build(name, init=init, normalize=normalize, **settings)
    model = _MODELS[name](**settings)
    if init is not None:
        initialize(model, init)
    return model if normalize is None else nn.Sequential(Normalize(*normalize), model)


def _hidden(activation: str, dropout: float = 0.0) -> list[nn.Module]:
    if activation not in ACTIVATIONS:
        raise ValueError(f"no activation {activation!r}; there are {', '.join(ACTIVATIONS)}")
    return [ACTIVATIONS[activation](), *_dropout(dropout)]


def _dropout(p: float) -> list[nn.Module]:
    return [nn.Dropout(p)] if p else []


def _check_images(
    model: nn.Module, x: Tensor, channels: int, size: tuple[int, ...] = (), least: int = 1
) -> None:
    """Refuse what is not (B, ``channels``, H, W), with (H, W) = ``size`` or at least ``least``."""
    fits = x.ndim == 4 and x.shape[1] == channels and x.shape[2:] == (size or x.shape[2:])
    if not fits or min(x.shape[2:]) < least:
        sides = (
            f"{size[0]}, {size[1]})" if size else "H, W)" + f" with H, W >= {least}" * (least > 1)
        )
        raise ValueError(
            f"{type(model).__name__} takes images (B, {channels}, {sides}, not {tuple(x.shape)}"
        )


_MODELS: dict[str, Callable[..., nn.Module]] = {
    "mlp": MLP,
    "fcnn": partial(MLP, (784, 150, 100, 10)),
    "mlp-1000": partial(MLP, (784, 1000, 1000, 1000, 10)),
    "mlp-1200": partial(MLP, (784, 1200, 1200, 1200, 10)),
    "digits-cnn": DigitsCNN,
    "lenet5": LeNet5,
    "lenet5-wide": partial(LeNet5, channels=(32, 64), hidden=(512,), padding=0),
    "nin": NetworkInNetwork,
    "densenet40": DenseNet40,
    "resnet32": ResNet32,
    "autoencoder": Autoencoder,
    "colorization": Colorization,
    "vae": VAE,
    "abs-vae": ABSVAE,
    "dc-vae": DCVAE,
    "vaes": VAEs,
    "wgan": WGAN,
    "dc-gan": DCGAN,
}
