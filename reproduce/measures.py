"""What is measured on perturbed images: each function is a measure that settings can name.

A measure takes a ``Sample`` and returns named values: numbers, or lists with one for each radius.
Shares are fractions of 1; a table's settings scale them to what the paper prints.
"""

import base64
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from adv.attacks.convex import margin_radius
from adv.attacks.gradient import fgsm
from adv.geometry import Norm, pixels
from adv.geometry import norm as length
from adv.lab.committee import Committee, judge
from adv.lab.evaluation import CHUNK, accuracy, psnr, rho_adv, success
from adv.lab.models import VAE
from reproduce.pairs import partners

__all__ = ["MEASURES", "Sample", "Value"]

Value = float | list[float]
Named = Mapping[str, float | str | list[float]]
# Images of a strip, half as many where one has more values than LARGE.
SHOWN, LARGE = 8, 2000
# Which eigenvalues are stored: the first ones, and of the others every fifth.
LEADING, EVERY = 200, 5


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


def counts(sample: Sample) -> dict[str, Value]:
    """Mean number of values and of pixels that successful perturbations change.

    A pixel is changed where any of its channels is. Initially correct images, as in ``norms``.

    Source: chapter ``benchmark``, erratum E21 of Matyasko (2020).
    """
    x, y = sample.x[sample.attacked], sample.y[sample.attacked]
    fooled = success(sample.model, sample.points[0], y)
    delta = (sample.points[0] - x)[fooled]
    return {
        "values": float(length(delta, "l0").mean()),
        "pixels": float(pixels(delta).mean()),
        "found": float(fooled.double().mean()),
    }


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


def reconstruction(sample: Sample) -> Named:
    """What an autoencoder makes of its inputs: squared error an image, summed over the pixels.

    ``error`` is against what is wanted: of ``target: pair`` the target image, else the clean image
    itself; ``relative`` the same over the images' mean squared distance from their mean, so that 1
    is what the mean image gets. ``best`` is the error of the clean wanted images, which an attack
    cannot beat by more than luck; ``source`` that against the source image.

    Source: "Understanding Adversarial Attacks on Autoencoders", section 5.
    """
    wanted = _wanted(sample)
    output = _outputs(sample.model, sample.points[0])
    error = _square(output - wanted)
    return {
        "error": error,
        "relative": error / _square(wanted - wanted.mean(dim=0)),
        "best": _square(_outputs(sample.model, wanted) - wanted),
        "source": _square(output - sample.x),
    }


def code(sample: Sample) -> Named:
    """How far an attack moved the codes to the targets': mean distances before and after.

    ``moved`` is the mean ratio of the two, ``length`` the mean l2 norm of the perturbation.

    Source: "Understanding Adversarial Attacks on Autoencoders", (1.2).
    """
    start = torch.zeros_like(sample.x) if sample.settings.get("start") == "zero" else sample.x
    codes = [_codes(sample.model, images) for images in (start, sample.points[0], _wanted(sample))]
    before, after = ((one - codes[2]).norm(dim=1) for one in codes[:2])
    return {
        "before": float(before.mean()),
        "after": float(after.mean()),
        "moved": float((after / before).mean()),
        "length": float(length(sample.points[0] - start, "l2").mean()),
    }


def pictures(sample: Sample) -> Named:
    """The first images, what was made of them, and what was wanted, as strips.

    Each is a PNG file in base64, images side by side: ``picture-source``, ``picture-input`` and
    ``picture-wanted``, and with ``-output`` behind it what the model makes of each. Without pairs
    there is only the source. Inputs from a black image are shown on grey, as perturbations.
    """
    inputs = {"source": sample.x}
    if sample.settings.get("target") == "pair":
        inputs |= {"input": sample.points[0], "wanted": _wanted(sample)}
    strips = {}
    for name, images in inputs.items():
        few = images[: SHOWN if images[0].numel() <= LARGE else SHOWN // 2]
        strips[f"picture-{name}-output"] = _strip(_outputs(sample.model, few))
        if name == "input" and sample.settings.get("start") == "zero":
            few = 0.5 + 0.5 * few / few.abs().max()
        strips[f"picture-{name}"] = _strip(few)
    return strips


def portraits(sample: Sample) -> Named:
    """The first image of each class and what became of it, as strips, and what each is taken for.

    ``picture-source`` and ``picture-input`` are PNG files in base64, images side by side in the
    order of the classes. With ``-said`` behind it, the name stands for the classes, with spaces
    between them: of a source its label, of an input what the model says. An image that was not
    attacked, or on which the attack failed, is its own input.
    """
    first = torch.stack([(sample.y == k).nonzero()[0, 0] for k in sample.y.unique()])
    inputs = sample.x.clone()
    inputs[sample.attacked] = sample.points[0]
    few = inputs[first]
    return {
        "picture-source": _strip(sample.x[first]),
        "picture-source-said": _classes(sample.y[first]),
        "picture-input": _strip(few),
        "picture-input-said": _classes(_outputs(sample.model, few).argmax(dim=1)),
    }


def _classes(y: Tensor) -> str:
    return " ".join(map(str, y.tolist()))


def _strip(images: Tensor) -> str:
    levels = (images.clamp(0, 1) * 255).round().byte().cpu()
    row = torch.cat(list(levels), dim=2).permute(1, 2, 0).squeeze(2).numpy()
    file = io.BytesIO()
    Image.fromarray(row).save(file, "png", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def _wanted(sample: Sample) -> Tensor:
    """What a reconstruction is compared with: the partner's image, or one's own."""
    if sample.settings.get("target") != "pair":
        return sample.x
    return sample.x[partners(len(sample.x)).to(sample.x.device)]


def _square(difference: Tensor) -> float:
    return float(difference.flatten(1).square().sum(dim=1).mean())


@torch.no_grad()
def _codes(model: nn.Module, x: Tensor) -> Tensor:
    if not isinstance(model, VAE):
        raise TypeError(f"codes are of a VAE, not of a {type(model).__name__}")
    return torch.cat([model.posterior(part.clone())[0] for part in x.split(CHUNK)])


def kept(sample: Sample) -> Named:
    """Share of all images that the perturbed ones of each radius are classified as.

    Images that weren't attacked count as wrong; with ``every: true`` all are, as an attack through
    a generative model may also mend what was wrong. Without radii the only one is 0.

    Source: "Disentangling Adversarial Robustness", Tables 1 and 2.
    """
    y = sample.y[sample.attacked]
    right = [success(sample.model, points, y, targeted=True) for points in sample.points]
    shares = [float(flags.sum()) / len(sample.x) for flags in right]
    return {"eps": list(sample.eps or [0.0]), "kept": shares}


def spectra(sample: Sample) -> Named:
    """Eigenvalues of the covariance of each class's perturbed images, largest first.

    ``spectrum-C`` is of class C, ``spectrum`` the mean over the classes; ``index`` says which
    eigenvalues (from 1) are stored. Covariances divide by the number of images less 1.

    Source: "Disentangling Adversarial Robustness", Figures 2 and 3.
    """
    points, y = sample.points[-1].flatten(1).double(), sample.y[sample.attacked]
    size = points.shape[1]
    first = list(range(1, min(LEADING, size) + 1))
    index = [*first, *range(LEADING + EVERY, size + 1, EVERY)]
    values: dict[str, list[float]] = {"index": [float(i) for i in index]}
    whole = []
    for label in y.unique().tolist():
        # Rounding may leave eigenvalues of a singular matrix below 0.
        spectrum = torch.linalg.eigvalsh(points[y == label].T.cov()).flip(0).clamp_min(0)
        whole.append(spectrum[[i - 1 for i in index]])
        values[f"spectrum-{label}"] = _short(whole[-1])
    return values | {"spectrum": _short(torch.stack(whole).mean(dim=0))}


def _short(values: Tensor) -> list[float]:
    return [float(f"{value:.4g}") for value in values.tolist()]


def relative(sample: Sample) -> Named:
    r"""Relative sizes $\|r\|_p/\|x\|_p$ of minimal perturbations of initially correct images.

    ``rho`` is their mean, ``q1``, ``median`` and ``q3`` are quartiles, ``whisker-lo`` and ``-hi``
    the smallest and largest within 1.5 interquartile ranges of the quartiles: all over the images
    that were fooled, whose share is ``found``.

    Source: Matyasko (2020), (3.20), (4.9) and Figure 3.6.
    """
    sizes, x = sample.norms(), sample.x[sample.attacked]
    found = sizes < math.inf
    if not found.any():
        names = ("rho", "q1", "median", "q3", "whisker-lo", "whisker-hi")
        return dict.fromkeys(names, math.nan) | {"found": 0.0}
    rho = (sizes[found] / length(x[found], sample.norm)).double()
    q1, median, q3 = torch.quantile(rho, rho.new_tensor([0.25, 0.5, 0.75])).tolist()
    reach = 1.5 * (q3 - q1)
    return {
        "rho": float(rho.mean()),
        "q1": q1,
        "median": median,
        "q3": q3,
        "whisker-lo": float(rho[rho >= q1 - reach].min()),
        "whisker-hi": float(rho[rho <= q3 + reach].max()),
        "found": float(found.double().mean()),
    }


def single_step(sample: Sample) -> Named:
    """Error on FGSM images of all images, clipped to the box (``inside``) and not (``outside``).

    Source: Matyasko (2020), Tables 3.1 and 3.2, whose program does not clip.
    """
    (eps,) = sample.eps or ()
    errors = {}
    for name, bounds in (("inside", (0.0, 1.0)), ("outside", (-eps, 1 + eps))):
        points = [
            fgsm(sample.model, *pair, eps=eps, bounds=bounds)
            for pair in zip(sample.x.split(CHUNK), sample.y.split(CHUNK), strict=True)
        ]
        errors[name] = 1 - accuracy(sample.model, torch.cat(points), sample.y)
    return errors


def judged(sample: Sample) -> Named:
    """What a committee sees in images that fooled the network, in place of people.

    ``change``: the class that the network takes them for; ``no-change``: the original one;
    ``rest``; of ``answers`` images. ``change-MEMBER`` is what one member alone says, and
    ``right-on-clean`` the share of the clean images that the committee names right.

    Source: Matyasko (2020), Table 4.2, which had 10,000 images judged by people.
    """
    council: Committee = sample.settings["committee"]
    y, points = sample.y[sample.attacked], sample.points[0]
    fooled = success(sample.model, points, y)
    if not fooled.any():
        names = ["change", "no-change", "rest", "right-on-clean"]
        names += [f"change-{name}" for name in council.members]
        return dict.fromkeys(names, math.nan) | {"answers": 0.0}
    y, points = y[fooled], points[fooled]
    target = _outputs(sample.model, points).argmax(dim=1).cpu()
    verdict = judge(council.answers(points), y.cpu(), target)
    alone = {
        f"change-{name}": float((votes == target).double().mean())
        for name, votes in council.votes(points).items()
    }
    return {
        "answers": float(verdict.answers),
        "change": verdict.change.value,
        "no-change": verdict.no_change.value,
        "rest": verdict.rest.value,
        "right-on-clean": float((council.answers(sample.x) == sample.y.cpu()).double().mean()),
        **alone,
    }


def convincing(sample: Sample) -> Named:
    """At each radius, the share of images that network and committee name alike, and wrong.

    ``convincing`` is of all that were attacked; ``fooled`` the share that the network names wrong,
    whatever the committee says. At equal radii networks can be compared whose adversarial images
    differ in length otherwise.
    """
    council: Committee = sample.settings["committee"]
    y = sample.y[sample.attacked]
    shares: dict[str, list[float]] = {"fooled": [], "convincing": []}
    for points in sample.points:
        said = _outputs(sample.model, points).argmax(dim=1).cpu()
        wrong = success(sample.model, points, y).cpu()
        alike = wrong & (council.answers(points) == said)
        for name, flags in (("fooled", wrong), ("convincing", alike)):
            shares[name].append(float(flags.double().mean()))
    return {"eps": list(sample.eps or []), **shares}


@torch.no_grad()
def _outputs(model: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([model(part.clone()) for part in x.split(CHUNK)])


MEASURES: dict[str, Callable[[Sample], Named]] = {
    function.__name__: function
    for function in (
        error,
        radius,
        minimal,
        fooling,
        noise_ratio,
        correct,
        norms,
        robust,
        counts,
        reconstruction,
        code,
        pictures,
        portraits,
        kept,
        spectra,
        relative,
        single_step,
        judged,
        convincing,
    )
}
