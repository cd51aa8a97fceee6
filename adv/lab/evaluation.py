"""Measures an attack from outside: accuracy under attack, distances, cost.

All shares are fractions of 1. Samples are attacked in chunks, each with the attack's ``seed`` plus
the index of the chunk's first sample among those attacked. A deterministic attack gives the same
for every chunk size. One that draws at random gives other draws of the same law, which is why the
default ``chunk`` is a fixed number and not the memory at hand: a random attack then repeats itself
on any machine. Where that number does not fit, ``memory=`` (bytes) makes the chunks smaller; the
same bytes give the same chunks.
"""

import inspect
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from typing import Any, overload

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from adv.attacks._size import POWERS
from adv.attacks.common import (
    Bounds,
    Model,
    check_count,
    check_labels,
    check_range,
    input_gradient,
    is_adversarial,
    networks,
)
from adv.geometry import Norm, bounds_slack, exponent, pixels, rounding
from adv.geometry import norm as length
from adv.lab.figures import curve

__all__ = [
    "Counts",
    "accuracy",
    "chunk_size",
    "counting",
    "distances",
    "fooling_ratio",
    "minimal_norms",
    "perturb",
    "psnr",
    "report",
    "rho_adv",
    "robust_accuracy",
    "success",
]

Attack = Callable[..., Tensor]

CHUNK = 500
FINITE = (-sys.float_info.max, sys.float_info.max)
SYMBOLS = {"linf": r"$\ell_\infty$", "l2": r"$\ell_2$", "l1": r"$\ell_1$"}
PIXELS = ("l0", "group_l0")
"""Norms whose radius is a number of pixels."""
SYMBOLS |= dict.fromkeys(PIXELS, "pixels")


# ------------------------------------------------------------------------------------- at points


def accuracy(
    model: Model, x: Float[Tensor, "N ..."], y: Int[Tensor, " N"], *, chunk: int = CHUNK
) -> float:
    """Share of samples that the model assigns to their label, and to no other.

    A tie counts as an error, so that a constant model has accuracy 0; the tolerance within which
    logits tie is that of ``attacks.common.is_adversarial``.

    Args:
        model: ``(B, ...) -> (B, K)`` logits, in evaluation mode.
        x: (N, ...) inputs.
        y: (N,) labels.
        chunk: samples in one forward pass.

    Returns:
        A fraction of 1.

    Raises:
        TypeError: not float inputs and int64 labels.
        ValueError: a model in training mode or without logits (B, K); no samples, NaN, not one
            label for each, labels out of range.
    """
    return _share(success(model, x, y, targeted=True, chunk=chunk))


def success(
    model: Model,
    x_adv: Float[Tensor, "N ..."],
    y: Int[Tensor, " N"],
    *,
    targeted: bool = False,
    chunk: int = CHUNK,
) -> Bool[Tensor, " N"]:
    """Which points fool the model: ``attacks.common.is_adversarial`` in chunks.

    Args:
        model: ``(B, ...) -> (B, K)`` logits, in evaluation mode.
        x_adv: (N, ...) points.
        y: (N,) true labels, or the targets where ``targeted``.
        targeted: whether ``y`` is the class wanted.
        chunk: samples in one forward pass.

    Returns:
        (N,) booleans on the device of ``x_adv``; False where logits are NaN or infinite, which
        is no sign of robustness: the measures under attack refuse such a model.

    Raises:
        TypeError: not float inputs and int64 labels.
        ValueError: a model in training mode or without logits (B, K); no samples, NaN, not one
            label for each, labels out of range.
    """
    _check(model, x_adv, y, chunk)
    parts: list[Tensor] = []
    with torch.no_grad():
        for part in _chunks(len(x_adv), chunk):
            logits = model(x_adv[part].clone())  # which a layer may change in place
            if not parts:
                _check_logits(logits, y)
            parts.append(is_adversarial(logits, y[part], targeted))
    return torch.cat(parts)


def distances(
    x: Float[Tensor, "N ..."], x_adv: Float[Tensor, "N ..."]
) -> dict[str, Float[Tensor, " N"]]:
    """Distances of each pair of points, in every norm.

    Args:
        x: (N, ...) inputs.
        x_adv: (N, ...) perturbed inputs.

    Returns:
        (N,) tensors in the units of ``x``, called ``"linf"``, ``"l2"``, ``"l1"``; and the numbers
        of values (``"l0"``) and of pixels (``"pixels"``, any channel of (N, C, H, W)) that differ.
        (A radius or minimal norm under l0 is a number of pixels.)

    Raises:
        ValueError: shapes differ.
    """
    if x.shape != x_adv.shape:
        raise ValueError(f"x and x_adv differ in shape: {tuple(x.shape)}, {tuple(x_adv.shape)}")
    delta = x_adv - x
    named: tuple[Norm, ...] = ("linf", "l2", "l1", "l0")
    return {str(kind): length(delta, kind) for kind in named} | {"pixels": pixels(delta)}


def psnr(
    a: Float[Tensor, "B ..."], b: Float[Tensor, "B ..."], *, peak: float = 1.0
) -> Float[Tensor, " B"]:
    r"""Peak signal-to-noise ratio of each pair: $10\log_{10}(\mathrm{peak}^2/\mathrm{MSE})$.

    With a peak of 1, errors of $\pm\varepsilon$ everywhere are $-20\log_{10}\varepsilon$: 20 dB at
    $\varepsilon=0.1$. An average over images is an average of decibels.

    Args:
        a: (B, ...) images, or outputs of a network.
        b: (B, ...) what they are compared with, in the same units; the order does not matter.
        peak: the range of a value, in these units.

    Returns:
        (B,) decibels; infinity where the two are equal.

    Raises:
        TypeError: not floating point.
        ValueError: shapes differ, no batch, or a peak that is not positive and finite.

    Source: Balda et al. (2018), section 5, whose text leaves the logarithm out; chapter
    ``regression``.
    """
    if not (a.is_floating_point() and b.is_floating_point()):
        raise TypeError(f"psnr takes floating-point tensors, not {a.dtype} and {b.dtype}")
    if a.shape != b.shape or a.ndim < 2:
        raise ValueError(
            f"psnr takes two (B, ...) of one shape, not {tuple(a.shape)} and {tuple(b.shape)}"
        )
    if not 0 < peak < math.inf:
        raise ValueError(f"peak={peak} must be positive and finite")
    return -10 * ((a - b) / peak).square().flatten(1).mean(dim=1).log10()


def rho_adv(x: Float[Tensor, "N ..."], norms: Float[Tensor, " N"], *, norm: Norm = "l2") -> float:
    r"""Mean relative size of the minimal perturbations: $\rho=\mathrm{mean}\,\|r\|_p/\|x\|_p$.

    The mean is over the samples with $0<\|r\|_p<\infty$: classified correctly, and fooled. Where an
    attack fails on many, read it beside its success.

    Args:
        x: (N, ...) inputs.
        norms: (N,) what ``minimal_norms`` returned for them in the same norm.
        norm: the norm; l0 and group_l0 count pixels.

    Returns:
        The mean, dimensionless; NaN where no sample counts, infinity where one that counts is zero
        everywhere, relative to which nothing is small.

    Source: Matyasko (2020), (3.20); Balda et al. (2018), $\hat\rho_1$; chapter ``margin``.
    """
    counted = (norms > 0) & (norms < math.inf)
    return float((norms[counted] / _length(x[counted], norm)).mean())


# ---------------------------------------------------------------------------------- under attack


def perturb(
    model: Model,
    x: Float[Tensor, "N ..."],
    y: Int[Tensor, " N"],
    attack: Attack,
    *,
    eps: float | None = None,
    norm: Norm | None = None,
    bounds: Bounds = (0.0, 1.0),
    seed: int = 0,
    chunk: int = CHUNK,
    memory: int | None = None,
    **settings: Any,
) -> Float[Tensor, "N ..."]:
    """Run an attack in chunks and check that it kept to the rules.

    The attack gets copies of the inputs and labels, so that what it does to them changes nothing.

    Args:
        model: ``(B, ...) -> (B, K)`` logits, in evaluation mode.
        x: (N, ...) inputs inside ``bounds``.
        y: (N,) true labels, or the targets of a targeted attack.
        attack: ``(model, x, y, *, ...) -> x_adv``.
        eps: radius; None for a minimal-norm attack.
        norm: norm of the radius (l0 counts pixels); by default the attack's own. An attack to which
            a penalty of the caller's own is bound keeps it, and is measured in ``norm``.
        bounds: smallest and largest value of an input.
        seed: of the first chunk; a later one gets ``seed`` plus its first sample's index.
        chunk: samples attacked at once.
        memory: bytes; take smaller chunks where ``chunk_size`` says so. None keeps ``chunk``, with
            which a random attack gives the same on any machine.
        settings: passed on to the attack.

    Returns:
        (N, ...) perturbed inputs.

    Raises:
        TypeError: not float inputs and int64 labels.
        ValueError: bad input; one sample needs more than ``memory``; or the attack returned another
            shape, NaN, a point outside the bounds or farther away than ``eps`` (by more than
            rounding).
    """
    _check(model, x, y, chunk, bounds)
    if eps is not None:
        _grid(eps)
    if memory is not None:
        chunk = chunk_size(model, x, memory, limit=chunk)
    norm = _norm_of(attack, norm)
    accepted = {"eps": eps, "norm": norm, "bounds": bounds}
    if eps is None:
        del accepted["eps"]
    if not _takes(attack, "norm") or not _named(_default(attack, "norm")):
        del accepted["norm"]
    parts = []
    for part in _chunks(len(x), chunk):
        options = accepted | settings | {"seed": seed + part.start}
        x_adv = attack(model, x[part].clone(), y[part].clone(), **options)
        _check_points(x[part], x_adv, eps, norm, bounds)
        parts.append(x_adv.detach())
    return torch.cat(parts)


@overload
def robust_accuracy(
    model: Model, x: Tensor, y: Tensor, attack: Attack, eps: float, **options: Any
) -> float: ...
@overload
def robust_accuracy(
    model: Model, x: Tensor, y: Tensor, attack: Attack, eps: Sequence[float], **options: Any
) -> list[float]: ...
def robust_accuracy(
    model: Model,
    x: Float[Tensor, "N ..."],
    y: Int[Tensor, " N"],
    attack: Attack,
    eps: float | Sequence[float],
    **options: Any,
) -> float | list[float]:
    """Share of samples still classified correctly under attack, for each radius.

    The worst over the grid: a sample fooled at one radius counts as fooled at every larger one of
    the grid, and is not attacked again, so that the curve never rises. At ``eps=0`` this is the
    clean accuracy. A minimal-norm attack (one without ``eps``) runs once; a sample counts as fooled
    from its distance on.

    Args:
        model: ``(B, ...) -> (B, K)`` logits, in evaluation mode.
        x: (N, ...) inputs inside the bounds.
        y: (N,) true labels.
        attack: ``(model, x, y, *, ...) -> x_adv``.
        eps: a radius, or a grid of radii in any order, in the units of ``x``.
        options: ``norm``, ``bounds``, ``seed``, ``chunk``, ``memory`` and the attack's settings, as
            ``perturb`` takes them.

    Returns:
        A fraction of 1, or a list of them in the order of ``eps``.

    Raises:
        TypeError: ``eps`` is no number and no grid of numbers.
        ValueError: bad input, a negative radius, a targeted attack, or one that cheats, as
            ``perturb`` says; a model that returns NaN or infinite logits.
    """
    grid = _radii(eps)
    fooled = _fooled(model, x, y, attack, grid, **options)
    shares = [_share(~row) for row in fooled]
    return shares if np.ndim(eps) else shares[0]


def fooling_ratio(
    model: Model,
    x: Float[Tensor, "N ..."],
    y: Int[Tensor, " N"],
    attack: Attack,
    eps: float | Sequence[float],
    **options: Any,
) -> float | list[float]:
    """Share of the correctly classified samples that an attack gets misclassified.

    Args:
        model: ``(B, ...) -> (B, K)`` logits, in evaluation mode.
        x: (N, ...) inputs inside the bounds.
        y: (N,) true labels.
        attack: ``(model, x, y, *, ...) -> x_adv``.
        eps: a radius or a grid of radii, treated as in ``robust_accuracy``.
        options: as in ``robust_accuracy``.

    Returns:
        A fraction of 1, or a list of them in the order of ``eps``; NaN where no sample is
        classified correctly.

    Raises:
        TypeError, ValueError: as in ``robust_accuracy``.

    Source: Balda et al. (2018), section 5; chapter ``convex``.
    """
    clean, *robust = robust_accuracy(model, x, y, attack, [0.0, *_radii(eps)], **options)
    ratios = [1 - share / clean if clean else math.nan for share in robust]
    return ratios if np.ndim(eps) else ratios[0]


def minimal_norms(
    model: Model,
    x: Float[Tensor, "N ..."],
    y: Int[Tensor, " N"],
    attack: Attack,
    **options: Any,
) -> Float[Tensor, " N"]:
    """Distance to the adversarial point that a minimal-norm attack finds for each sample.

    Args:
        model: ``(B, ...) -> (B, K)`` logits, in evaluation mode.
        x: (N, ...) inputs inside the bounds.
        y: (N,) true labels.
        attack: ``(model, x, y, *, ...) -> x_adv``; it gets the correctly classified samples only.
        options: ``norm`` (l0 or group_l0 count pixels), ``bounds``, ``seed``, ``chunk``, ``memory``
            and the attack's settings, as ``perturb`` takes them.

    Returns:
        (N,) distances in the units of ``x`` (pixels under l0), 0 where the sample is misclassified
        as it is, infinity where the attack found nothing.

    Raises:
        ValueError: bad input, a targeted attack, one with a radius, or one that cheats, as
            ``perturb`` says; a model that returns NaN or infinite logits.
    """
    radius = inspect.signature(attack).parameters.get("eps")
    if radius is not None and radius.default is not None:
        raise ValueError("the attack has a radius, eps, and goes that far: use robust_accuracy()")
    options = _resolved(model, x, attack, options)
    chunk = options["chunk"]
    correct = _judged(model, x, y, targeted=True, chunk=chunk)
    norms = torch.zeros(len(x), dtype=x.dtype, device=x.device)
    if correct.any():
        x_adv = perturb(model, x[correct], y[correct], attack, **options)
        found = _judged(model, x_adv, y[correct], chunk=chunk)
        norm = _norm_of(attack, options.get("norm"))
        distance = _length(x_adv - x[correct], norm)
        norms[correct] = torch.where(found, distance.to(x.dtype), math.inf)
    return norms


def report(
    models: Mapping[str, Model],
    x: Float[Tensor, "N ..."],
    y: Int[Tensor, " N"],
    attacks: Mapping[str, Attack],
    eps: Sequence[float],
    *,
    norm: Norm,
    **options: Any,
) -> tuple[pd.DataFrame, Figure]:
    """Robust accuracy of every model under every attack, as a table and a figure.

    Args:
        models: label and model, each in evaluation mode.
        x: (N, ...) inputs inside the bounds.
        y: (N,) true labels.
        attacks: label and attack, norm-bounded or minimal-norm; settings of one attack are bound
            with ``functools.partial``.
        eps: grid of radii; 0, the clean accuracy, is added.
        norm: the norm of all attacks.
        options: ``bounds``, ``seed``, ``chunk``, ``memory``, as ``perturb`` takes them.

    Returns:
        The table in percent, rows (model, attack), and where there are several attacks ``all``,
        a sample counts as fooled if any of them fools it; columns the radii. The figure: one panel
        for each model.

    Raises:
        TypeError: models or attacks without labels, or as in ``robust_accuracy``.
        ValueError: no models, no attacks, or as in ``robust_accuracy``.
    """
    for what, given in (("models", models), ("attacks", attacks)):
        if not isinstance(given, Mapping):
            raise TypeError(f"{what} is a mapping from labels, not {type(given).__name__}")
    if not models or not attacks:
        raise ValueError("report() needs at least one model and one attack")
    grid = sorted({0.0, *_radii(eps)})
    rows: dict[tuple[str, str], list[float]] = {}
    for name, model in models.items():
        fooled = {
            label: _fooled(model, x, y, attack, grid, norm=norm, **options)
            for label, attack in attacks.items()
        }
        if len(fooled) > 1:
            fooled["all"] = torch.stack(list(fooled.values())).any(dim=0)
        for label, each in fooled.items():
            rows[name, label] = [_share(~row) for row in each]
    table = 100 * pd.DataFrame.from_dict(rows, orient="index", columns=grid)
    table.index = pd.MultiIndex.from_tuples(rows, names=["model", "attack"])
    table.columns.name = f"eps ({norm})"
    table.attrs = {"unit": "percent", "samples": len(x)}
    return table, _panels(rows, list(models), grid, norm)


# ------------------------------------------------------------------------------------------- cost


def chunk_size(model: Model, x: Float[Tensor, "N ..."], memory: int, *, limit: int = CHUNK) -> int:
    """How many samples to attack at once so that a forward and a backward pass fit into a memory.

    The first sample is sent through the model and back. What counts is what the graph keeps for the
    backward pass (each storage once, without the model's parameters and buffers), the input, the
    logits, and the gradients of both. An attack's own copies of its inputs and a backend's scratch
    space come on top, and an attack that takes all K class gradients (DeepFool, the first step of
    ``high_confidence``) holds K times the input: give a part of the memory that is free.

    Args:
        model: ``(B, ...) -> (B, K)`` logits, in evaluation mode.
        x: (N, ...) inputs, of which the first is measured.
        memory: bytes.
        limit: the most samples to take; the default is the default chunk.

    Returns:
        A number of samples from 1 to ``limit``.

    Raises:
        TypeError, ValueError: ``memory`` or ``limit`` is no integer >= 1; bad input.
        ValueError: a single sample needs more than ``memory``.
    """
    check_count("memory", memory)
    check_count("limit", limit)
    _check_mode(model)
    check_range(x, FINITE)
    need = _kept(model, x[:1].clone())
    if need > memory:
        raise ValueError(f"one sample needs {need:,} bytes, more than memory={memory:,}")
    return min(limit, memory // need)


def _kept(model: Model, x: Tensor) -> int:
    """Bytes that the passes of a batch keep."""
    lasting = {
        tensor.untyped_storage().data_ptr()
        for network in networks(model)
        for tensor in (*network.parameters(), *network.buffers())
    }
    # The storages are held until the end, or another one could take an address once counted.
    kept: dict[int, torch.UntypedStorage] = {}
    ends = [x]

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    def value(z: Tensor) -> Tensor:
        ends.append(note(model(note(z))))
        return ends[1].flatten(1).sum(dim=1)

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        input_gradient(value, x)
    graph = sum(storage.nbytes() for place, storage in kept.items() if place not in lasting)
    return graph + sum(end.nbytes for end in ends)


@dataclass
class Counts:
    """Passes of single samples through a model: a batch of B counts B times."""

    forward: int = 0
    backward: int = 0


@contextmanager
def counting(model: nn.Module) -> Iterator[Counts]:
    """Count the samples that pass through a model, forward and backward, inside a block.

    Everything that goes through the model counts, also the forward pass of one sample by which an
    attack checks its input. A backward pass counts where it reaches the model's output, each of the
    gradients taken at once (``is_grads_batched``, ``torch.func``) by itself. Blocks may be nested.

    Args:
        model: the module whose own calls are counted (not those of its parts).

    Yields:
        The running counts.

    Raises:
        TypeError: not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"counting() needs a torch module, not {type(model).__name__}")
    counts = Counts()

    def backward(gradient: Tensor) -> None:
        with _Physical() as physical:
            gradient.view(gradient.shape)
        counts.backward += len(gradient) * physical.size // max(1, gradient.numel())

    def forward(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        counts.forward += len(output)
        if output.requires_grad:
            output.register_hook(backward)

    handle = model.register_forward_hook(forward)
    try:
        yield counts
    finally:
        handle.remove()


class _Physical(TorchDispatchMode):
    """Sees tensors with the axes that vmap hides."""

    size = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.size = max(self.size, args[0].numel())
        return func(*args, **(kwargs or {}))


# ---------------------------------------------------------------------------------------- helpers


def _fooled(
    model: Model, x: Tensor, y: Tensor, attack: Attack, grid: Sequence[float], **options: Any
) -> Bool[Tensor, "E N"]:
    """For each radius in the order of the grid, the samples fooled there or at a smaller one."""
    if not _takes(attack, "eps"):
        norms = minimal_norms(model, x, y, attack, **options)
        return torch.stack([norms <= eps * (1 + 1e-6) for eps in grid])
    options = _resolved(model, x, attack, options)
    chunk = options["chunk"]
    fooled = ~_judged(model, x, y, targeted=True, chunk=chunk)
    at = {0.0: fooled}
    for eps in sorted(set(grid) - {0.0}):
        standing = ~fooled
        if standing.any():
            x_adv = perturb(model, x[standing], y[standing], attack, eps=eps, **options)
            fooled = fooled.clone()
            fooled[standing] = _judged(model, x_adv, y[standing], chunk=chunk)
        at[eps] = fooled
    return torch.stack([at[eps] for eps in grid])


def _judged(model: Model, x: Tensor, y: Tensor, **options: Any) -> Tensor:
    """``success`` for a model whose logits are numbers: others would look like a perfect defense.

    Raises:
        ValueError: NaN or infinite logits.
    """

    def checked(points: Tensor) -> Tensor:
        logits = model(points)
        if isinstance(logits, Tensor) and not logits.isfinite().all():
            kind = "NaN" if logits.isnan().any() else "infinite logits"
            raise ValueError(
                f"the model returns {kind} at these points; they are neither fooled nor robust"
            )
        return logits

    _check_mode(model)
    return success(checked, x, y, **options)


def _resolved(
    model: Model, x: Tensor, attack: Attack, options: Mapping[str, Any]
) -> dict[str, Any]:
    """The options with ``memory`` measured once and turned into a chunk."""
    if options.get("targeted", _default(attack, "targeted")):
        raise ValueError(
            "y are the true labels here; measure a targeted attack with perturb() and "
            "success(..., targeted=True)"
        )
    others = {name: value for name, value in options.items() if name != "memory"}
    chunk, memory = options.get("chunk", CHUNK), options.get("memory")
    if memory is not None:
        chunk = chunk_size(model, x, memory, limit=chunk)
    return others | {"chunk": chunk}


def _radii(eps: Any) -> list[float]:
    """What a caller gave as a radius or a grid of them, as a list."""
    given = eps if np.ndim(eps) else [eps]
    if not all(isinstance(e, Real | Tensor | np.ndarray) for e in given):
        raise TypeError(f"eps is a number or a sequence of numbers, not {eps!r}")
    return _grid(given)


def _grid(eps: Any) -> list[float]:
    grid = [float(e) for e in (eps if np.ndim(eps) else [eps])]
    if not grid or not all(0 <= e < math.inf for e in grid):
        raise ValueError(f"eps is a finite number >= 0 or a grid of them, not {eps!r}")
    return grid


def _chunks(count: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, count)) for start in range(0, count, chunk)]


def _share(flags: Tensor) -> float:
    return int(flags.sum()) / len(flags)


def _length(delta: Tensor, norm: Norm) -> Tensor:
    """The length a radius bounds: under l0 and group_l0 the number of pixels."""
    return pixels(delta) if norm in PIXELS else length(delta, norm)


def _takes(attack: Attack, name: str) -> bool:
    parameters = inspect.signature(attack).parameters.values()
    return any(p.name == name or p.kind == p.VAR_KEYWORD for p in parameters)


def _norm_of(attack: Attack, given: Norm | None) -> Norm:
    norm = _default(attack, "norm") if given is None else given
    if not _named(norm) or norm in POWERS:
        raise TypeError(
            "a norm to measure in has a name: bind a penalty of your own to the attack with "
            "functools.partial(attack, norm=...), and say norm=... here"
        )
    if norm is None:
        raise ValueError("say norm=...: the attack has none of its own")
    return norm


def _named(norm: Any) -> bool:
    """Whether it is a norm's name or number, or none, and not the caller's own penalty."""
    return norm is None or isinstance(norm, str | Real)


def _default(attack: Attack, name: str) -> Any:
    """The attack's own value of a setting, also one bound by ``partial``; None without one."""
    parameter = inspect.signature(attack).parameters.get(name)
    return None if parameter is None or parameter.default is parameter.empty else parameter.default


def _check(model: Model, x: Tensor, y: Tensor, chunk: int, bounds: Bounds = FINITE) -> None:
    _check_mode(model)
    check_range(x, bounds)
    check_labels(x, y)
    check_count("chunk", chunk)


def _check_mode(model: Model) -> None:
    for network in networks(model):
        if any(module.training for module in _switchable(network)):
            whose = "the model" if network is model else f"{type(network).__name__} in the model"
            raise ValueError(f"{whose} is in training mode; call its eval() before measuring it")


def _switchable(network: nn.Module) -> Iterator[nn.Module]:
    """The modules with two modes: one that was exported has but one, and refuses ``eval()``."""
    if "eval" not in vars(network):
        yield network
        for child in network.children():
            yield from _switchable(child)


def _check_logits(logits: Any, y: Tensor) -> None:
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[1] < 2:
        given = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"the model must return logits (B, K) of two or more classes, not {given}")
    first, last = int(y.min()), int(y.max())
    if first < 0 or last >= logits.shape[1]:
        raise ValueError(f"labels lie in 0..{logits.shape[1] - 1}, but y spans {first}..{last}")


def _check_points(x: Tensor, x_adv: Tensor, eps: float | None, norm: Norm, bounds: Bounds) -> None:
    if not isinstance(x_adv, Tensor):
        raise ValueError(f"the attack returned a {type(x_adv).__name__}, not a tensor")
    if x_adv.shape != x.shape or x_adv.dtype != x.dtype or x_adv.device != x.device:
        raise ValueError(
            f"the attack returned {tuple(x_adv.shape)} {x_adv.dtype} on {x_adv.device} "
            f"for {tuple(x.shape)} {x.dtype} on {x.device}"
        )
    low, high = x_adv.min().item(), x_adv.max().item()
    slack = bounds_slack(bounds, x.dtype)
    if not (bounds[0] - low <= slack and high - bounds[1] <= slack):
        raise ValueError(f"the attack left the bounds {bounds}: values from {low:g} to {high:g}")
    if eps is None:
        return
    farthest = _length(x_adv - x, norm).max().item()
    p = 0.0 if norm in PIXELS else exponent(norm)
    # x + delta is rounded entry by entry, by which the norm of the difference can grow.
    entries = x[0].numel() ** (1 / p) if p else 0.0
    if farthest > eps * (1 + 1e-5) + 1e-6 + rounding(bounds, x.dtype) * entries:
        raise ValueError(f"the attack left the {norm} ball: distance {farthest:g}, eps {eps:g}")


def _panels(
    rows: Mapping[tuple[str, str], Sequence[float]],
    models: list[str],
    grid: list[float],
    norm: Norm,
) -> Figure:
    import matplotlib.pyplot as plt

    columns = min(2, len(models))
    lines = math.ceil(len(models) / columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(7, 3.0 * lines), sharex=True, sharey=True, squeeze=False
    )
    for ax, name in zip(axes.flat, models, strict=False):
        curves = {label: values for (model, label), values in rows.items() if model == name}
        curve(grid, curves, xlabel=rf"$\varepsilon$ ({SYMBOLS.get(str(norm), norm)})", ax=ax)
        ax.set_title(name)
        ax.label_outer()
        if ax is not axes[0, 0] and ax.get_legend() is not None:
            ax.get_legend().remove()
    for ax in axes.flat[len(models) :]:
        ax.set_visible(False)
    return figure
