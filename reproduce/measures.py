"""What is measured on perturbed images: each function is a measure that settings can name.

A measure takes a ``Sample`` and returns named values: numbers, or lists with one for each radius.
Shares are fractions of 1; a table's settings scale them to what the paper prints.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adv.attacks.convex import margin_radius
from adv.geometry import Norm, pixels
from adv.geometry import norm as length
from adv.lab.evaluation import CHUNK, accuracy, psnr, rho_adv, success

__all__ = ["MEASURES", "Sample", "Value"]

Value = float | list[float]


@dataclass(frozen=True)
class Sample:
    """A network, the images that were attacked, and what became of them.

    Args:
        model: in evaluation mode.
        x: (N, C, H, W) the images considered, attacked or not.
        y: (N,) their labels.
        attacked: (N,) which of them were attacked.
        points: perturbed copies of those, one tensor for each radius, or a single one.
        eps: the radii; None for a minimal-norm attack.
        settings: of the attack.
    """

    model: nn.Module
    x: Tensor
    y: Tensor
    attacked: Tensor
    points: Sequence[Tensor]
    eps: Sequence[float] | None
    settings: Mapping[str, Any]

    @property
    def norm(self) -> Norm:
        """The norm of the attack."""
        return self.settings.get("norm", "linf")

    def norms(self) -> Tensor:
        """Sizes of minimal perturbations; infinite where nothing was found."""
        if self.eps is not None:
            raise ValueError("this measure is of an attack without eps")
        x, y = self.x[self.attacked], self.y[self.attacked]
        found = success(self.model, self.points[0], y)
        return torch.where(found, length(self.points[0] - x, self.norm), math.inf)


def error(sample: Sample) -> dict[str, Value]:
    """Share of the images that are misclassified without a perturbation."""
    return {"error": 1 - accuracy(sample.model, sample.x, sample.y)}


def radius(sample: Sample) -> dict[str, Value]:
    r"""Mean linearized distance to the boundary, $\hat\rho_2$, over correctly classified images.

    Also its median, and its mean where every class is considered instead of the runner-up (E2).

    Source: Balda et al. (2018), section 2.
    """
    x, y = (part[sample.attacked].split(CHUNK) for part in (sample.x, sample.y))
    runner_up, nearest = (
        torch.cat(
            [
                margin_radius(sample.model, *pair, norm=sample.norm, nearest=every)
                for pair in zip(x, y, strict=True)
            ]
        )
        for every in (False, True)
    )
    return {
        "rho2": float(runner_up.mean()),
        "rho2-median": float(runner_up.median()),
        "rho2-nearest": float(nearest.mean()),
    }


def minimal(sample: Sample) -> dict[str, Value]:
    r"""Of minimal perturbations: $\hat\rho_1$, and the smallest radius that fools more than 99 %.

    The radius is infinite where the attack fails on 1 % of the images.

    Source: Balda et al. (2018), Table 3.
    """
    norms = sample.norms()
    return {
        "rho1": rho_adv(sample.x[sample.attacked], norms, norm=sample.norm),
        "eps99": float(norms.sort().values[int(0.99 * len(norms))]),
        "found": float((norms < math.inf).double().mean()),
    }


def fooling(sample: Sample) -> dict[str, Value]:
    """Share of the correctly classified images that are misclassified at each radius.

    Each radius counts by itself, as the source plots it: a curve may fall. A minimal-norm attack
    counts from its distance on, at the radii of ``measured_at``.

    Source: Balda et al. (2018), section 6.1.
    """
    if sample.eps is None:
        norms, grid = sample.norms(), sample.settings["measured_at"]
        shares = [float((norms <= eps * (1 + 1e-6)).double().mean()) for eps in grid]
    else:
        y, grid = sample.y[sample.attacked], sample.eps
        fooled = (success(sample.model, points, y) for points in sample.points)
        shares = [float(flags.double().mean()) for flags in fooled]
    return {"eps": list(grid), "fooling": shares}


def correct(sample: Sample) -> dict[str, Value]:
    """Share of the images that are classified correctly without a perturbation."""
    return {"accuracy": accuracy(sample.model, sample.x, sample.y)}


def norms(sample: Sample) -> dict[str, Value]:
    """Mean and median size of successful perturbations of initially correct images.

    ``found`` is the share of those images for which the attack succeeded, ``all`` the mean over
    all of them, infinite where it failed on one. Under l0 values are counted, under
    group_l0 pixels.

    Source: Matyasko (2020), Tables 5.1 and 5.5.
    """
    sizes = _sizes(sample)
    found = sizes[sizes < math.inf]
    return {
        "mean": float(found.mean()),
        "median": float(sizes.median()),
        "all": float(sizes.mean()),
        "found": float((sizes < math.inf).double().mean()),
    }


def robust(sample: Sample) -> dict[str, Value]:
    """Share of all images that stay correct under perturbations up to each radius.

    A minimal-norm attack counts from its distance on, at the radii of ``measured_at``.

    Source: Matyasko (2020), Tables 5.2 to 5.4 and 5.6 to 5.8.
    """
    if sample.eps is None:
        sizes, grid = _sizes(sample), sample.settings["measured_at"]
        standing = [sizes > eps * (1 + 1e-6) for eps in grid]
    else:
        y, grid = sample.y[sample.attacked], sample.eps
        standing = [~success(sample.model, points, y) for points in sample.points]
    shares = [float(flags.sum()) / len(sample.x) for flags in standing]
    return {"eps": list(grid), "robust": shares}


def _sizes(sample: Sample) -> Tensor:
    """Sizes of minimal perturbations; pixels under group_l0; infinite where nothing was found."""
    x, y = sample.x[sample.attacked], sample.y[sample.attacked]
    delta, kind = sample.points[0] - x, sample.settings["norm"]
    sizes = pixels(delta) if kind == "group_l0" else length(delta, kind)
    return torch.where(success(sample.model, sample.points[0], y), sizes, math.inf)


def noise_ratio(sample: Sample) -> dict[str, Value]:
    """Mean PSNR in dB of inputs and outputs at each radius, and of the clean outputs.

    Inputs are compared with the clean ones; outputs with what they should be: the images, or, where
    the attack had no ``target`` but the clean outputs, with those.

    Source: Balda et al. (2018), section 6.2; chapter ``regression``.
    """
    x = sample.x[sample.attacked]
    clean = _outputs(sample.model, x)
    wanted = x if sample.settings["target"] == "input" else clean
    outputs = (_outputs(sample.model, points) for points in sample.points)
    return {
        "eps": list(sample.eps or []),
        "clean": float(psnr(clean, wanted).mean()),
        "input": [float(psnr(points, x).mean()) for points in sample.points],
        "output": [float(psnr(output, wanted).mean()) for output in outputs],
    }


@torch.no_grad()
def _outputs(model: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([model(part) for part in x.split(CHUNK)])


MEASURES: dict[str, Callable[[Sample], dict[str, Value]]] = {
    function.__name__: function
    for function in (error, radius, minimal, fooling, noise_ratio, correct, norms, robust)
}
