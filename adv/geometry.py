r"""Norms, dual norms, steepest directions, projections and proximal operators, for batches.

Axis 0 is the batch; all other axes of a sample are one vector of length $d$. Everything runs on the
device and in the precision of the tensors it is given (half precision is computed in float32), in
a number of operations that the shapes fix, and never waits for the device: types, shapes and Python
numbers are checked, the values of tensors are not.
"""

import math
from collections.abc import Callable
from numbers import Real
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

__all__ = [
    "Box",
    "Norm",
    "Penalty",
    "bounds_slack",
    "dual_exponent",
    "dual_norm",
    "exponent",
    "linear_oracle",
    "norm",
    "pixels",
    "project",
    "project_l1",
    "project_l2",
    "project_linf",
    "prox",
    "prox_group_l0",
    "prox_l0",
    "prox_l1",
    "prox_l2",
    "prox_linf",
    "prox_power",
    "room",
    "rounding",
    "steepest",
]

Norm = Literal["linf", "l2", "l1", "l0"] | float
Penalty = Literal["linf", "l2", "l1", "l0", "group_l0", "l1/2", "l2/3"]
Box = tuple[Tensor, Tensor]

EXPONENTS = {"linf": math.inf, "l2": 2.0, "l1": 1.0}


# Norms and duals


def exponent(norm: Norm) -> float:
    r"""The exponent $p\in[1,\infty]$ of a norm given by its name or by $p$ itself.

    Args:
        norm: ``"linf"``, ``"l2"``, ``"l1"``, or a number $p\ge1$ (``math.inf`` included).

    Raises:
        ValueError: any other name ("l0" counts and has no exponent), $p<1$, or NaN.
        TypeError: neither a name nor a number.
    """
    if isinstance(norm, str):
        if norm in EXPONENTS:
            return EXPONENTS[norm]
        near = "l" + norm.lower().lstrip("l_")
        hint = " ('l0' counts values and is not a norm)" if norm == "l0" else ""
        hint = f"; did you mean {near!r}?" if near in EXPONENTS else hint
        raise ValueError(f"norm must be 'linf', 'l2', 'l1' or a number p >= 1, not {norm!r}{hint}")
    if isinstance(norm, bool) or not isinstance(norm, Real):
        raise TypeError(f"norm must be a name or a number p >= 1, not {type(norm).__name__}")
    if not norm >= 1:
        raise ValueError(f"norm must be a number p >= 1, not {norm!r}: below 1 there is no norm")
    return float(norm)


def dual_exponent(norm: Norm) -> float:
    r"""The exponent $q$ of the dual norm, $1/p+1/q=1$; errors as in ``exponent``."""
    p = exponent(norm)
    if p == 1:
        return math.inf
    return 1.0 if math.isinf(p) else p / (p - 1)


def norm(delta: Float[Tensor, "B ..."], kind: Norm) -> Float[Tensor, " B"]:
    r"""$\|\delta\|_p$ of each sample, without overflow on the way; ``"l0"`` counts nonzero values.

    Args:
        delta: (B, ...) perturbations.
        kind: ``"l0"`` or whatever ``exponent`` takes.

    Returns:
        (B,) of the dtype of ``delta``; counts of half precision are float32, which holds them.

    Source: chapter ``geometry``.
    """
    flat = _flat(delta)
    if kind == "l0":
        return (flat != 0).sum(dim=1).to(_counting(delta))
    return _length(flat, exponent(kind)).squeeze(1).to(delta.dtype)


def pixels(delta: Float[Tensor, "B ..."]) -> Float[Tensor, " B"]:
    """How many pixels of each sample change: those with any channel of (B, C, H, W) nonzero.

    Tensors of any other number of axes have no channels: there each value is a pixel. Counts of
    half precision are float32, which holds them.
    """
    _flat(delta)
    changed = (delta != 0).any(dim=1) if delta.ndim == 4 else delta != 0
    return changed.flatten(1).sum(dim=1).to(_counting(delta))


def dual_norm(g: Float[Tensor, "B ..."], kind: Norm) -> Float[Tensor, " B"]:
    r"""$\|g\|_q=\max_{\|v\|_p\le1}\langle g,v\rangle$: what the best unit step of norm $p$ gains.

    Args:
        g: (B, ...) gradients.
        kind: the norm $p$ of the *step*, not $q$.

    Source: Balda et al. (2018), section 2 (Hölder); chapter ``geometry``.
    """
    return _length(_flat(g), dual_exponent(kind)).squeeze(1).to(g.dtype)


def steepest(g: Float[Tensor, "B ..."], kind: Norm) -> Float[Tensor, "B ..."]:
    r"""The unit step that climbs fastest: $v_p(g)\in\arg\max_{\|v\|_p\le1}\langle g,v\rangle$.

    For $1<p<\infty$, $v_i=\operatorname{sign}(g_i)\,|g_i|^{q-1}/\|g\|_q^{q-1}$; for $p=\infty$ the
    signs; for $p=1$ the largest entry alone (the first among equals). Powers are taken of
    $|g_i|/\max_j|g_j|$, so that no $p$ and no scale of $g$ overflows.

    Args:
        g: (B, ...) gradients.
        kind: the norm $p\in[1,\infty]$ of the step.

    Returns:
        (B, ...) with $\|v\|_p=1$ and $\langle g,v\rangle=\|g\|_q$; the zero vector where $g=0$.

    Source: Balda et al. (2018), Theorem 2; chapter ``geometry``.
    """
    p, flat = exponent(kind), _flat(g)
    if p == math.inf:
        return _like(flat.sign(), g)
    size = flat.abs()
    top = size.amax(dim=1, keepdim=True)
    if p == 1:
        first = size.argmax(dim=1, keepdim=True)
        v = torch.zeros_like(flat).scatter(1, first, flat.gather(1, first).sign())
        return _like(v, g)
    if p == 2:
        unit = flat / _nonzero(top)
        return _like(unit / _nonzero(_length(unit, 2.0)), g)
    # log(size / top), by log1p near 1: at p = 1.001 its error is multiplied by q - 1 = 1000.
    safe = _nonzero(top)
    log = torch.where(size > safe / 2, torch.log1p((size - safe) / safe), torch.log(size / safe))
    power = torch.where(size > 0, torch.exp(log / (p - 1)), 0.0)
    return _like(flat.sign() * power / _nonzero(_length(power, p)), g)


# Boxes and projections


def room(x: Float[Tensor, "B ..."], bounds: tuple[float, float] = (0.0, 1.0)) -> Box:
    r"""The box $lo\le\delta\le hi$ that keeps $x+\delta$ within ``bounds``; $lo\le0\le hi$.

    Args:
        x: (B, ...) inputs.
        bounds: smallest and largest value of an input.

    Raises:
        ValueError: ``bounds`` are not two increasing numbers.
    """
    _flat(x)
    if len(bounds) != 2 or not bounds[0] < bounds[1]:
        raise ValueError(f"bounds must be two increasing numbers (low, high), not {bounds!r}")
    return (bounds[0] - x).clamp_max(0), (bounds[1] - x).clamp_min(0)


def rounding(bounds: tuple[float, float], dtype: torch.dtype) -> float:
    """The relative precision of a type times the largest bound (1 if that is less).

    A value within the bounds, or a sum of such values, is rounded by half of it at most.
    """
    return torch.finfo(dtype).eps * max(1.0, *map(abs, bounds))


def bounds_slack(bounds: tuple[float, float], dtype: torch.dtype) -> float:
    """How far outside the bounds a value may lie: 1e-6, or four roundings where these are more."""
    return max(1e-6, 4 * rounding(bounds, dtype))


def project(
    delta: Float[Tensor, "B ..."],
    kind: Norm,
    eps: float | Float[Tensor, " B"],
    *,
    box: Box | None = None,
) -> Float[Tensor, "B ..."]:
    r"""Euclidean projection onto $\{\|z\|_p\le\varepsilon\}$, or onto its intersection with a box.

    Exact in every case, up to rounding: under a box this is the nearest point of the intersection,
    which for l2 and l1 is not the clipped projection.

    Args:
        delta: (B, ...) perturbations.
        kind: ``"linf"``, ``"l2"`` or ``"l1"`` (or $p=\infty$, 2, 1).
        eps: radius $\ge0$, in the units of ``delta``; a number or one for each sample, (B,).
        box: ``(lo, hi)`` shaped like ``delta`` with $lo\le0\le hi$, as ``room`` makes it.

    Raises:
        ValueError: another norm, an ``eps`` that is a number and negative or NaN, shapes or devices
            that do not fit.
        TypeError: something else than floating-point tensors and numbers.

    Source: chapter ``geometry``.
    """
    known = {math.inf: project_linf, 2.0: project_l2, 1.0: project_l1}
    p = math.nan if kind == "l0" else exponent(kind)
    if p not in known:
        raise ValueError(f"projections are onto 'linf', 'l2' and 'l1' balls, not {kind!r}")
    return known[p](delta, eps, box=box)


def linear_oracle(
    g: Float[Tensor, "B ..."],
    kind: Norm,
    eps: float | Float[Tensor, " B"],
    *,
    box: Box | None = None,
) -> Float[Tensor, "B ..."]:
    r"""The step that gains most: $\arg\max\langle g,\delta\rangle$ over a ball, or a ball in a box.

    Without a box $\varepsilon v_p(g)$. Within one: under linf that, clipped; under l1 the entries
    with the largest $|g_i|$ are moved as far as the box allows until $\varepsilon$ is spent; under
    l2 $\delta=\operatorname{clip}(tg,lo,hi)$ with the $t$ that makes its norm $\varepsilon$, or
    the whole corner where that is shorter. Clipping afterwards is exact under linf only.

    Args:
        g: (B, ...) gradients.
        kind: ``"linf"``, ``"l2"``, ``"l1"``; without a box any number $p\ge1$.
        eps: radius $\ge0$, in the units of the step, a number or one for each sample, (B,); an
            infinite one gives NaN.
        box: ``(lo, hi)`` shaped like ``g`` with $lo\le0\le hi$, as ``room`` makes it.

    Returns:
        (B, ...) steps, 0 where $g_i=0$.

    Raises:
        ValueError: another norm with a box, an ``eps`` that is a number and negative or NaN, shapes
            that do not fit.
        TypeError: something else than floating-point tensors and numbers.

    Source: Balda et al. (2018), Theorem 2, without a box; chapter ``convex``.
    """
    p, flat, radius, limits = exponent(kind), _flat(g), _column(eps, g, "eps"), _flat_box(box, g)
    far = radius * _flat(steepest(g, kind))
    if limits is None or p == math.inf:
        return _like(_clip(far, limits), g)
    cap = _clip(flat.sign() * radius, limits).abs()
    if p == 1:
        order = flat.abs().argsort(dim=1, descending=True, stable=True)
        wanted = cap.gather(1, order)
        left = radius - (wanted.cumsum(dim=1) - wanted)
        spent = torch.minimum(wanted, left.clamp_min(0))
        return _like(flat.sign() * torch.zeros_like(flat).scatter(1, order, spent), g)
    if p != 2:
        raise ValueError(f"steps within a box are for 'linf', 'l2' and 'l1', not {kind!r}")
    # So far along g that every entry meets its bound: the projection walks back to the ball.
    ratio = torch.where(flat != 0, cap / _nonzero(far.abs()), 0.0).amax(dim=1, keepdim=True)
    # Finite: an entry too small to be carried to its bound gains nothing, and inf * 0 is NaN.
    ratio = torch.minimum(ratio, torch.finfo(flat.dtype).max / 4 / radius.clamp_min(1))
    return _like(project_l2(ratio * far, eps, box=limits), g)


def project_linf(
    delta: Float[Tensor, "B ..."], eps: float | Float[Tensor, " B"], *, box: Box | None = None
) -> Float[Tensor, "B ..."]:
    r"""Nearest point for linf: clip to $[\max(lo,-\varepsilon),\min(hi,\varepsilon)]$."""
    u, radius = _flat(delta), _column(eps, delta, "eps")
    return _like(_clip(u.clamp(-radius, radius), _flat_box(box, delta)), delta)


def project_l2(
    delta: Float[Tensor, "B ..."], eps: float | Float[Tensor, " B"], *, box: Box | None = None
) -> Float[Tensor, "B ..."]:
    r"""Nearest point for l2: $z=\operatorname{clip}(tu,lo,hi)$, the largest $t\le1$ that fits.

    $t=1/(1+\mu)$, $\mu$ the ball's multiplier. Entry $i$ meets its bound at $t_i$; between two
    consecutive $t_i$, found by bisection over the sorted ones, $\|z\|_2^2=C+t^2U$ gives $t$.
    """
    u, radius, limits = _flat(delta), _column(eps, delta, "eps"), _flat_box(box, delta)
    if limits is None:
        length = _length(u, 2.0)
        return _like(torch.where(length <= radius, u, u * (radius / _nonzero(length))), delta)
    size, cap = u.abs(), _clip(u, limits).abs()
    meets = torch.where(size > 0, cap / _nonzero(size), 1.0)
    points = torch.cat([meets, torch.zeros_like(radius), torch.ones_like(radius)], dim=1)
    low, high = _bracket(points, lambda t: _length(torch.minimum(t * size, cap), 2.0) >= radius)
    bound = meets <= low
    scale = torch.where(radius > 0, radius, 1.0)
    left = 1 - (torch.where(bound, cap, 0.0) / scale).square().sum(dim=1, keepdim=True)
    free = _length(torch.where(bound, 0.0, size), 2.0)
    t = left.clamp_min(0).sqrt() * (radius / _nonzero(free))
    t = torch.maximum(low, torch.minimum(t, high))
    return _like(u.sign() * torch.minimum(t * size, cap), delta)


def project_l1(
    delta: Float[Tensor, "B ..."], eps: float | Float[Tensor, " B"], *, box: Box | None = None
) -> Float[Tensor, "B ..."]:
    r"""Nearest point for l1: $|z_i|=\min((|u_i|-\mu)_+,c_i)$, $c_i$ the room, $\mu$ the multiplier.

    $\|z\|_1$ is piecewise linear in $\mu$ and breaks at $|u_i|$ and $|u_i|-c_i$; interpolation
    between the two breaks around $\varepsilon$ is exact and keeps the sum at $\varepsilon$.
    """
    u, radius, limits = _flat(delta), _column(eps, delta, "eps"), _flat_box(box, delta)
    size, cap = u.abs(), _clip(u, limits).abs()

    def shrunk(mu: Tensor) -> Tensor:
        return torch.minimum((size - mu).clamp_min(0), cap)

    def total(mu: Tensor) -> Tensor:
        return shrunk(mu).sum(dim=1, keepdim=True)

    breaks = [size, torch.zeros_like(radius)] + ([] if limits is None else [size - cap])
    low, high = _bracket(torch.cat(breaks, dim=1), lambda mu: total(mu) <= radius)
    more, less = shrunk(low), shrunk(high)
    gap = (more - less).sum(dim=1, keepdim=True)
    share = ((radius - less.sum(dim=1, keepdim=True)) / _nonzero(gap)).clamp(0, 1)
    return _like(u.sign() * torch.minimum(less + share * (more - less), cap), delta)


# Proximal operators


def prox(
    u: Float[Tensor, "B ..."],
    lam: float | Float[Tensor, " B"],
    kind: Penalty,
    *,
    box: Box | None = None,
    metric: Float[Tensor, "B ..."] | None = None,
) -> Float[Tensor, "B ..."]:
    r"""$\arg\min_z\ \lambda h(z)+\tfrac12\sum_i w_i(z_i-u_i)^2$ over the box, exactly.

    The penalties $h$ are $\|z\|_\infty$, $\|z\|_2$, $\|z\|_1$, the number of nonzero values
    (``"l0"``) or of pixels (``"group_l0"``, counted as ``pixels`` does), and $\sum_i|z_i|^{1/2}$,
    $\sum_i|z_i|^{2/3}$. Every one is solved exactly, up to rounding, with a box, in a diagonal
    metric, and with both. The last four are not convex: where 0 and another point tie, 0 it is.

    Args:
        u: (B, ...) points.
        lam: weight $\lambda\ge0$; a number or one for each sample, (B,). 0 returns the clipped $u$.
        kind: the penalty $h$.
        box: ``(lo, hi)`` shaped like ``u`` with $lo\le0\le hi$, as ``room`` makes it.
        metric: positive weights $w$, shaped like ``u``; ones by default. After a step of size $a$
            preconditioned by $\psi$, as in Adam, $w=\psi/a$, and ``lam`` is the penalty's weight.

    Raises:
        ValueError: unknown penalty, a ``lam`` that is a number and negative or NaN, shapes or
            devices that do not fit.
        TypeError: something else than floating-point tensors and numbers.

    Source: Matyasko (2020), eqs. (5.4) and (5.11)-(5.16), with boxes and metrics; chapter
    ``geometry``.
    """
    if kind == "linf":
        return prox_linf(u, lam, box=box, metric=metric)
    if kind == "l2":
        return prox_l2(u, lam, box=box, metric=metric)
    if kind == "l1":
        return prox_l1(u, lam, box=box, metric=metric)
    if kind == "l0":
        return prox_l0(u, lam, box=box, metric=metric)
    if kind == "group_l0":
        return prox_group_l0(u, lam, box=box, metric=metric)
    if kind == "l1/2":
        return prox_power(u, lam, 1 / 2, box=box, metric=metric)
    if kind == "l2/3":
        return prox_power(u, lam, 2 / 3, box=box, metric=metric)
    raise ValueError(
        f"penalty must be one of {', '.join(map(repr, get_args(Penalty)))}, not {kind!r}"
    )


def prox_linf(
    u: Float[Tensor, "B ..."],
    lam: float | Float[Tensor, " B"],
    *,
    box: Box | None = None,
    metric: Float[Tensor, "B ..."] | None = None,
) -> Float[Tensor, "B ..."]:
    r"""``prox`` of $\|z\|_\infty$: clip to $\pm t$ and to the box, $t$ where the slope is 0.

    At level $t$ the slope is $\lambda-\sum_{i:t<c_i}w_i(|u_i|-t)$, $c=|\operatorname{clip}(u)|$:
    linear between the sorted $c_i$, with a jump at those that the box stops.

    Source: Matyasko (2020), eq. (5.11).
    """
    flat, weight, limits = _flat(u), _column(lam, u, "lam"), _flat_box(box, u)
    w = _weights(metric, u)
    size, clipped = flat.abs(), _clip(flat, limits)
    cap = clipped.abs()

    def pull(t: Tensor) -> Tensor:
        return torch.where(t < cap, w * (size - t), 0.0).sum(dim=1, keepdim=True)

    points = torch.cat([torch.zeros_like(weight), cap], dim=1)
    low, high = _bracket(points, lambda t: pull(t) <= weight)
    slope = torch.where(low < cap, w, torch.zeros_like(cap)).sum(dim=1, keepdim=True)
    t = torch.minimum(low + (pull(low) - weight).clamp_min(0) / _nonzero(slope), high)
    return _like(clipped.clamp(-t, t), u)


def prox_l2(
    u: Float[Tensor, "B ..."],
    lam: float | Float[Tensor, " B"],
    *,
    box: Box | None = None,
    metric: Float[Tensor, "B ..."] | None = None,
) -> Float[Tensor, "B ..."]:
    r"""``prox`` of $\|z\|_2$: $(1-\lambda/\|u\|_2)_+u$; under a box or in a metric, by bisection.

    There $z_i=\operatorname{clip}(u_i\,sw_i/(sw_i+\lambda))$ with $s=\|z\|_2$, which is found to
    rounding of $\|\operatorname{clip}(u)\|_2$; $z=0$ exactly when $\|w\odot u\|_2\le\lambda$ over
    the entries that the box lets move.

    Source: Matyasko (2020), eq. (5.12).
    """
    flat, weight, limits = _flat(u), _column(lam, u, "lam"), _flat_box(box, u)
    w = _weights(metric, u)
    if limits is None and metric is None:
        length = _length(flat, 2.0)
        kept = (length - weight) / _nonzero(length)
        return _like(torch.where(length > weight, kept * flat, 0.0), u)
    clipped = _clip(flat, limits)

    def at(s: Tensor) -> Tensor:
        return _clip(flat * (s * w / _nonzero(s * w + weight)), limits)

    low, high = torch.zeros_like(weight), _length(clipped, 2.0)
    for _ in range(60 if flat.dtype == torch.float64 else 30):
        middle = (low + high) / 2
        short = _length(at(middle), 2.0) > middle
        low, high = torch.where(short, middle, low), torch.where(short, high, middle)
    moves = _length(torch.where(clipped != 0, w * flat, 0.0), 2.0) > weight
    return _like(torch.where(moves, at(high), 0.0), u)


def prox_l1(
    u: Float[Tensor, "B ..."],
    lam: float | Float[Tensor, " B"],
    *,
    box: Box | None = None,
    metric: Float[Tensor, "B ..."] | None = None,
) -> Float[Tensor, "B ..."]:
    r"""``prox`` of $\|z\|_1$: $\operatorname{sign}(u_i)(|u_i|-\lambda/w_i)_+$, clipped to the box.

    Source: Matyasko (2020), eq. (5.13), corrected.
    """
    flat, weight = _flat(u), _column(lam, u, "lam") / _weights(metric, u)
    return _like(_clip(flat.sign() * (flat.abs() - weight).clamp_min(0), _flat_box(box, u)), u)


def prox_l0(
    u: Float[Tensor, "B ..."],
    lam: float | Float[Tensor, " B"],
    *,
    box: Box | None = None,
    metric: Float[Tensor, "B ..."] | None = None,
) -> Float[Tensor, "B ..."]:
    r"""``prox`` of the number of nonzero values: $c=\operatorname{clip}(u)$ where it pays, else 0.

    It pays where $w_ic_i(2u_i-c_i)>2\lambda$: without box and metric, $|u_i|>\sqrt{2\lambda}$.

    Source: Matyasko (2020), eq. (5.14), corrected.
    """
    flat, weight = _flat(u), 2 * _column(lam, u, "lam") / _weights(metric, u)
    clipped = _clip(flat, _flat_box(box, u))
    return _like(torch.where(_gain(flat, clipped) > weight.sqrt_(), clipped, 0.0), u)


def prox_group_l0(
    u: Float[Tensor, "B ..."],
    lam: float | Float[Tensor, " B"],
    *,
    box: Box | None = None,
    metric: Float[Tensor, "B ..."] | None = None,
) -> Float[Tensor, "B ..."]:
    r"""``prox`` of the number of nonzero pixels: keep those whose channels together pay, else 0.

    With $c=\operatorname{clip}(u)$ pixel $g$ pays where $\sum_{i\in g}w_ic_i(2u_i-c_i)>2\lambda$;
    without box and metric, where $\|u_g\|_2>\sqrt{2\lambda}$. Channels are axis 1 of
    (B, C, H, W); in other shapes each value is a pixel, as in ``pixels``.

    Source: Matyasko (2020), eq. (5.16), corrected.
    """
    flat, weight = _flat(u), _column(lam, u, "lam")
    clipped = _clip(flat, _flat_box(box, u))
    shape = u.flatten(2).shape if u.ndim == 4 else (len(u), 1, flat.shape[1])
    gain = _gain(flat, clipped) * _weights(metric, u).sqrt()
    pays = _length(gain.reshape(shape), 2.0) > (2 * weight).sqrt()[:, None]
    return _like(torch.where(pays, clipped.reshape(shape), 0.0), u)


def prox_power(
    u: Float[Tensor, "B ..."],
    lam: float | Float[Tensor, " B"],
    power: float,
    *,
    box: Box | None = None,
    metric: Float[Tensor, "B ..."] | None = None,
) -> Float[Tensor, "B ..."]:
    r"""``prox`` of $\sum_i|z_i|^r$ for a power $0<r<1$, such as ``"l1/2"`` and ``"l2/3"``.

    With $\beta=(2\lambda(1-r)/w)^{1/(2-r)}$ the size of the result is 0 up to
    $|u|=\tau=\beta\frac{2-r}{2(1-r)}$, where it jumps to $\beta$, and then $|u|y$ for the largest
    root of $y+\kappa y^{r-1}=1$, $\kappa=\frac r{2(1-r)}(\beta/|u|)^{2-r}$. Newton's method falls
    onto that root from $y=1$: six steps reach rounding, and no ratio of $u$ to $\lambda$
    overflows, as it does in the closed forms. Where the box cuts the root off, the better of 0 and
    the bound is taken.

    Source: Matyasko (2020), eq. (5.4); chapter ``geometry`` derives it and has the closed forms.
    """
    if not 0 < power < 1:
        raise ValueError(f"power must lie strictly between 0 and 1, not {power!r}")
    flat, weight = _flat(u), _column(lam, u, "lam") / _weights(metric, u)
    cap = _clip(flat, _flat_box(box, u)).abs()
    size = flat.abs()
    beta = (2 * (1 - power) * weight) ** (1 / (2 - power))
    moves = size > beta * (2 - power) / (2 * (1 - power))
    kappa = (
        power / (2 * (1 - power)) * torch.where(moves, beta / _nonzero(size), 0.0) ** (2 - power)
    )
    y = torch.ones_like(size)
    for _ in range(6):
        y = y - (y + kappa * y ** (power - 1) - 1) / (1 - (1 - power) * kappa * y ** (power - 2))
    root = size * y
    bound_pays = weight < cap ** (1 - power) * (size - cap / 2)
    z = torch.where(root <= cap, root, torch.where(bound_pays, cap, 0.0))
    return _like(flat.sign() * torch.where(moves, z, 0.0), u)


# Shared steps


def _flat(x: Tensor) -> Float[Tensor, "B d"]:
    """Checks a batch and lays each sample out as one vector of at least single precision."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        given = f"a tensor of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"expected a floating-point tensor, got {given}")
    if x.ndim < 2 or x.shape[1:].numel() == 0:
        raise ValueError(
            f"expected (B, ...) with values in each sample, got shape {tuple(x.shape)}"
        )
    return x.flatten(1).to(torch.promote_types(x.dtype, torch.float32))


def _like(flat: Tensor, x: Tensor) -> Tensor:
    return flat.reshape(x.shape).to(x.dtype)


def _column(value: float | Tensor, like: Tensor, name: str) -> Float[Tensor, "B 1"]:
    """A number, or one for each sample, as a column in the working precision."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    if isinstance(value, Tensor):
        if value.shape != like.shape[:1] or value.device != like.device:
            raise ValueError(
                f"{name} must be a number or of shape ({len(like)},) on {like.device}, "
                f"got shape {tuple(value.shape)} on {value.device}"
            )
        if not value.is_floating_point():
            raise TypeError(f"{name} must be floating-point, got {value.dtype}")
        return value.to(dtype)[:, None]
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number or a tensor, not {type(value).__name__}")
    if not value >= 0:
        raise ValueError(f"{name} must be at least 0, got {value!r}")
    number = float(value) if value <= torch.finfo(dtype).max else math.inf
    return torch.full((len(like), 1), number, dtype=dtype, device=like.device)


def _matching(part: Tensor, like: Tensor, name: str) -> Float[Tensor, "B d"]:
    flat = _flat(part)
    if part.shape != like.shape or part.device != like.device or part.dtype != like.dtype:
        raise ValueError(
            f"{name} must match its point: {like.dtype} of shape {tuple(like.shape)} on "
            f"{like.device}, got {part.dtype} of shape {tuple(part.shape)} on {part.device}"
        )
    return flat


def _flat_box(box: Box | None, like: Tensor) -> Box | None:
    if box is None:
        return None
    if not isinstance(box, tuple) or len(box) != 2:
        raise TypeError("box must be a pair (lo, hi) of tensors, as room(x, bounds) makes it")
    return _matching(box[0], like, "the box's lo"), _matching(box[1], like, "the box's hi")


def _weights(metric: Tensor | None, like: Tensor) -> Tensor:
    if metric is None:
        return torch.ones(
            (), dtype=torch.promote_types(like.dtype, torch.float32), device=like.device
        )
    return _matching(metric, like, "the metric")


def _clip(flat: Tensor, box: Box | None) -> Tensor:
    return flat if box is None else torch.clamp(flat, *box)


def _nonzero(x: Tensor) -> Tensor:
    """A divisor: 1 where ``x`` is 0."""
    return torch.where(x == 0, 1.0, x)


def _counting(delta: Tensor) -> torch.dtype:
    """The dtype of counts: half precision would round them, or end at 65504."""
    return torch.promote_types(delta.dtype, torch.float32)


def _length(flat: Tensor, p: float) -> Tensor:
    """The p-norm along axis 1 (kept); entries are divided by the largest, lest squares overflow."""
    size = flat.abs()
    top = size.amax(dim=1, keepdim=True)
    if p == math.inf:
        return top
    unit = torch.where(top < math.inf, top, 1.0)
    return top * torch.linalg.vector_norm(size / _nonzero(unit), p, dim=1, keepdim=True)


def _gain(flat: Tensor, clipped: Tensor) -> Tensor:
    """Square root of c(2u - c), what moving from 0 to c = clip(u) saves; roots do not overflow."""
    return clipped.abs().sqrt_().mul_(torch.sub(clipped, flat, alpha=2).abs_().sqrt_())


def _bracket(
    points: Float[Tensor, "B K"], reached: Callable[[Tensor], Bool[Tensor, "B 1"]]
) -> tuple[Tensor, Tensor]:
    """The neighbors among the sorted points between which ``reached`` turns true, once and for all.

    Twice the first point where it is true there already; the last two where it is true nowhere.
    """
    points = points.sort(dim=1).values
    low = torch.zeros(len(points), 1, dtype=torch.long, device=points.device)
    high = torch.full_like(low, points.shape[1] - 1)
    for _ in range((points.shape[1] - 1).bit_length()):
        middle = (low + high) // 2
        done = reached(points.gather(1, middle))
        low, high = torch.where(done, low, middle), torch.where(done, middle, high)
    return points.gather(1, low), points.gather(1, high)
