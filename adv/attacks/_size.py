r"""The size of a perturbation, as ``pdpgd`` minimizes it: norms, counts, powers or the user's own.

``Size`` is $h$ with all that a game needs of it: its value, its proximal operator, the first
multiplier. ``crossing`` is the smallest step, in that sense, over a linear boundary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from adv.attacks.common import expand, settled
from adv.geometry import Box, Norm, Penalty, dual_norm, exponent, pixels, prox

NAMES = {math.inf: "linf", 2.0: "l2", 1.0: "l1"}
POWERS = {"l1/2": 1 / 2, "l2/3": 2 / 3}
NEWTON = 5
"""Newton steps for the level of a proximal operator, twice as many for a crossing."""
MANY, ROUNDING = 256, 1e-3
"""Entries from which on sorting all of them is dear; what to gain more than a gap, to be sure."""


@dataclass(frozen=True)
class Regularizer:
    """Any penalty with a proximal operator, to minimize instead of a norm.

    Args:
        value: perturbations (B, ...) to their penalties (B,), 0 at 0.
        prox: points (B, ...) and weights (B,) to the minimizers of
            ``weight * value(z) + 0.5 * ||z - u||^2``; it is clipped to the bounds afterwards.

    Raises:
        TypeError: one of them is no function.
    """

    value: Callable[[Tensor], Tensor]
    prox: Callable[[Tensor, Tensor], Tensor]

    def __post_init__(self) -> None:
        if not (callable(self.value) and callable(self.prox)):
            raise TypeError("a Regularizer is made of two functions, value(delta) and prox(u, lam)")


class Size:
    """What the search needs to know of a norm or a penalty."""

    def __init__(self, kind: Any, own: Regularizer | None = None) -> None:
        self.kind, self.own = kind, own
        self.smooth, self.isotropic = kind == "l2", own is not None
        self.counts = kind in ("l0", "group_l0")
        self.shape: Any = "l2" if own else "l1" if kind in ("l1/2", "l2/3") else kind

    def sums(self, values: Tensor) -> Tensor:
        """One value for each entry or, where pixels are counted, the sum over its channels."""
        return values.sum(dim=1, keepdim=True) if self.kind == "group_l0" else values

    def used(self, delta: Tensor) -> Tensor:
        """Which entries, or pixels, it changes."""
        return self.sums(delta != 0) > 0

    def value(self, delta: Tensor) -> Tensor:
        """(B,) the penalty itself."""
        if self.own is not None:
            return _fitting("value", self.own.value(delta), delta.shape[:1])
        flat = delta.flatten(1)
        if self.kind == "l0":
            return flat.sign().abs_().sum(dim=1)  # on the CPU four times as fast as counting
        if self.kind == "group_l0":
            return pixels(delta)
        if self.kind in POWERS:
            return flat.abs().pow(POWERS[self.kind]).sum(dim=1)
        if self.kind == "linf":
            return flat.abs().amax(dim=1)
        return torch.linalg.vector_norm(flat, exponent(self.kind), dim=1)

    def prox(
        self, u: Tensor, lam: Tensor, box: Box | None, metric: Tensor | None, size: Tensor
    ) -> Tensor:
        r"""The proximal operator of $\lambda h$ in a metric and a box."""
        if self.own is not None:
            weight = lam if metric is None else lam / metric.flatten(1)[:, 0]
            z = _fitting("prox", self.own.prox(u, weight), u.shape)
            return z if box is None else torch.clamp(z, *box)
        if self.kind == "linf":
            return _prox_linf(u, lam, box, metric, size)
        return prox(u, lam, self.kind, box=box, metric=metric)

    def relaxed(self, u: Tensor, weight: Tensor, box: Box, cut: float) -> Tensor:
        """A soft threshold for entries, or pixels; where they are counted, small ones are cut."""
        colors = self.kind == "group_l0"
        size = torch.linalg.vector_norm(u, dim=1, keepdim=True) if colors else u.abs()
        shrunk = (size - expand(weight, u)).clamp_min(0) / torch.where(size > 0, size, 1.0)
        z = torch.clamp(shrunk * u, *box)
        if not self.counts:
            return z
        largest = z.abs().amax(dim=1, keepdim=True) if colors else z.abs()
        return torch.where(largest < cut, 0.0, z)

    def equilibrium(
        self, m: Tensor, g: Tensor, gain: Tensor, multiplier: float | None, width: float
    ) -> Tensor:
        r"""(B,) the first $\lambda$: by the law $\lambda=\frac12\gamma\|\nabla m\|_q$ unless given.

        Counts and powers are measured in units of the range, ``width``, and so is the slope. A
        penalty of the user's: $\lambda h(\delta)=\frac12\gamma|g^\top\delta|$, as it is for a norm,
        at the nearest point of the linearized boundary.
        """
        tiny = torch.finfo(m.dtype).tiny
        if multiplier is not None:
            return torch.full_like(m, multiplier)
        if self.own is None:
            dual: Norm = self.kind if self.kind in ("linf", "l2") else "l1"
            unit = width ** (1 - POWERS.get(self.kind, 0.0 if self.counts else 1.0))
            return (unit * gain / 2 * dual_norm(g, dual)).clamp_min(tiny)
        slope = g.flatten(1).square().sum(dim=1).clamp_min(tiny)
        size = self.own.value(-expand(m / slope, g) * g)
        return (gain / 2 * m.abs() / torch.where(size > 0, size, 1.0)).clamp_min(tiny)

    def entry(self, distance: Tensor, d: int, width: float) -> Tensor:
        """(B,) how large an entry is when all d share the distance; half the range for counts."""
        if self.kind not in NAMES.values():
            return torch.full_like(distance, width / 2)
        return distance * d ** (-1 / exponent(self.kind))


def _prox_linf(
    u: Tensor, lam: Tensor, box: Box | None, metric: Tensor | None, level: Tensor
) -> Tensor:
    r"""Clip to $\pm t$ with $\sum_iw_i(|u_i|-t)_+=\lambda$, then to the box.

    Newton's method from the last level: the sum is convex and decreasing in t, so the iterates
    increase to the root from the second on (from 0, where the last level was above every entry).
    ``NEWTON`` steps may fall short of it where the metric is spread; the results do not suffer.
    The box after the level and not along with it, as ``geometry.prox_linf`` has it, changes results
    by nothing measurable and needs no sorting.
    """
    size = u.flatten(1).abs()
    w = torch.ones_like(size) if metric is None else metric.flatten(1)
    t = level[:, None]
    for _ in range(NEWTON):
        over = (size - t).clamp_min_(0)
        excess = torch.linalg.vecdot(w, over)[:, None] - lam[:, None]
        slope = torch.linalg.vecdot(w, over.sign_())[:, None]
        t = torch.where(slope > 0, t + excess / slope, 0.0).clamp_min(0)
    t = expand(t, u)
    z = torch.clamp(u, -t, t)
    return z if box is None else torch.clamp(z, *box)


def _fitting(name: str, result: Tensor, shape: torch.Size) -> Tensor:
    if result.shape != shape:
        raise ValueError(
            f"the Regularizer's {name} returns shape {tuple(shape)} here, not {tuple(result.shape)}"
        )
    return result


def size_of(norm: Any, x: Tensor) -> Size:
    """What a norm's name stands for; the counts are of pixels where ``x`` has channels."""
    if isinstance(norm, Regularizer):
        return Size("own", norm)
    if norm in ("l0", "group_l0"):
        return Size("group_l0" if x.ndim == 4 and x.shape[1] > 1 else "l0")
    if isinstance(norm, str) and norm in get_args(Penalty):
        return Size(norm)
    if isinstance(norm, str):
        raise ValueError(
            f"norm is one of {', '.join(map(repr, get_args(Penalty)))} or a Regularizer, "
            f"not {norm!r}"
        )
    p = exponent(norm)
    if p not in NAMES:
        raise ValueError(f"norm has no proximal operator here for p = {norm!r}: give a Regularizer")
    return Size(NAMES[p])


def crossing(
    g: Float[Tensor, "B ..."],
    gap: Float[Tensor, " B"],
    kind: Norm | Penalty,
    *,
    box: Box,
) -> Float[Tensor, "B ..."]:
    r"""The smallest perturbation across a linear boundary: $\min h(\delta)$, $g^\top\delta\le-c$.

    Under linf and l2 $\delta_i=-\operatorname{sign}(g_i)\min(t\,r_i,c_i)$ with $c_i$ the room and
    $r_i=1$ or $|g_i|$, $t$ found by ten steps of Newton's method on the gain, which is piecewise
    linear: exact unless nearly the whole box is needed, where under l2 less than a hundredth of
    the gap may be left.
    Under l1 the entries with the largest $|g_i|$ move as far as they can until the gap is closed,
    under l0 those with the largest $|g_i|c_i$ (pixels: the largest sum over channels); of equal
    ones the first in memory.

    Args:
        g: (B, ...) gradients of the function that is to fall below 0.
        gap: (B,) its values $c$ at $\delta=0$; nothing moves where they are not positive.
        kind: ``"linf"``, ``"l2"``, ``"l1"`` (or $p=\infty$, 2, 1), ``"l0"`` (values) or
            ``"group_l0"`` (pixels).
        box: ``(lo, hi)`` shaped like ``g``, as ``geometry.room`` makes it.

    Returns:
        (B, ...) perturbations in the box; the corner of the box that gains most where the boundary
        is out of reach.

    Raises:
        TypeError, ValueError: another kind; no floating-point tensors of these shapes.

    Source: Croce and Hein (2020), section 3, extended to counts; chapter ``pdpgd``.
    """
    name = _check_crossing(g, gap, kind, box)
    flat, c = g.flatten(1), gap.clamp_min(0)[:, None]
    size = flat.abs()
    cap = torch.where(flat < 0, box[1].flatten(1), -box[0].flatten(1)) * (flat != 0)
    if name in ("linf", "l2"):
        move = _ray(size, torch.ones_like(size) if name == "linf" else size, cap, c)
    elif name == "group_l0" and g.ndim == 4:
        gains = (size * cap).reshape(g.flatten(2).shape).sum(dim=1)
        taken = _greedy(gains, torch.ones_like(gains), c) > 0
        move = cap * taken.repeat(1, g.shape[1])
    elif name == "l1":
        move = _greedy(size, cap, c)
    else:
        move = cap * (_greedy(size * cap, torch.ones_like(cap), c) > 0)
    return (-flat.sign() * move).reshape(g.shape)


def _check_crossing(g: Any, gap: Any, kind: Any, box: Any) -> str:
    """The name of the kind, where everything fits."""
    name = kind if isinstance(kind, str) else NAMES.get(exponent(kind), kind)
    if name not in (*NAMES.values(), "l0", "group_l0"):
        raise ValueError(f"kind is 'linf', 'l2', 'l1', 'l0' or 'group_l0', not {kind!r}")
    if not all(isinstance(part, Tensor) and part.is_floating_point() for part in (g, gap, *box)):
        raise TypeError("g, gap and both sides of the box are floating-point tensors")
    if g.ndim < 2 or gap.shape != g.shape[:1] or any(side.shape != g.shape for side in box):
        shapes = ", ".join(str(tuple(part.shape)) for part in (g, gap, *box))
        raise ValueError(f"g and both sides of the box are (B, ...) and gap is (B,), not {shapes}")
    return str(name)


def _ray(size: Tensor, rate: Tensor, cap: Tensor, c: Tensor) -> Tensor:
    """min(t * rate, cap) with the smallest t for which the sum weighted by ``size`` reaches c.

    Newton's method from t = 0: the sum is concave and piecewise linear, so that the iterates
    increase to the root and meet it when they come to its piece.
    """
    t = torch.zeros_like(c)
    speed = size * rate
    for k in range(2 * NEWTON):
        left = cap - t * rate
        missing = c - torch.linalg.vecdot(size, cap - left.clamp_min_(0))[:, None]
        slope = torch.linalg.vecdot(speed, left.sign_())[:, None]
        before, t = t, torch.where(slope > 0, t + missing.clamp_min(0) / slope, math.inf)
        if settled((t == before).squeeze(1), k):
            break
    return torch.minimum(torch.where(rate > 0, t * rate, 0.0), cap)


def _greedy(key: Tensor, cap: Tensor, c: Tensor) -> Tensor:
    """How much of ``cap`` to take in the order of ``key`` until the sum weighted by it is c.

    Of equal keys the first comes first; otherwise what a sample gets could depend on the others in
    its batch. Where sorting is dear a share of the keys is tried first, the largest.
    """
    if key.device.type != "cpu" or key.dtype != torch.float32 or key.shape[1] < MANY:
        return _take(key, cap, c, key.argsort(dim=1, descending=True, stable=True))
    order = _largest(key, key.shape[1] // 8)
    taken = _take(key, cap, c, order)
    gained = (key * cap).gather(1, order).sum(dim=1)
    short = (gained < (1 + ROUNDING) * c[:, 0]).nonzero().squeeze(1)
    if len(short):
        whole = key[short].argsort(dim=1, descending=True, stable=True)
        taken[short] = _take(key[short], cap[short], c[short], whole)
    return taken


def _largest(key: Tensor, count: int) -> Tensor:
    """Where the largest keys are, in order; of equal ones the first comes first.

    The bits of positive floats are in the order of their values. As the upper half of an integer,
    above the index counted down, they leave no two equal, so that ``topk`` has no choice.
    """
    d = key.shape[1]
    down = d - 1 - torch.arange(d, device=key.device)
    unique = (key.contiguous().view(torch.int32).long() << 32) | down
    return d - 1 - (unique.topk(count, dim=1).values & (2**32 - 1))


def _take(key: Tensor, cap: Tensor, c: Tensor, order: Tensor) -> Tensor:
    """The rule of ``_greedy`` in a given order; nothing of what is not in it."""
    key_, cap_ = key.gather(1, order), cap.gather(1, order)
    total = (key_ * cap_).cumsum(dim=1)
    left = (c - total + key_ * cap_).clamp_min(0)
    taken = torch.minimum(left / torch.where(key_ > 0, key_, 1.0), cap_)
    return torch.zeros_like(key).scatter_(1, order, taken)
