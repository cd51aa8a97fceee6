r"""Proven minimal adversarial perturbations of small ReLU networks.

An attack's distance is an upper bound: some adversarial point is no farther. Here the other half is
proved, that none is nearer. For each class $t\ne y$

$$\min_\delta\ \|\delta\|\quad\text{such that}\quad
f_t(x+\delta)\ge f_k(x+\delta)\ \text{for all}\ k,\qquad lo\le\delta\le hi,$$

is solved under linf, l1 and l0 as a mixed-integer linear program by HiGHS
(``scipy.optimize.milp``), with a binary variable for each ReLU whose sign the radius still to be
searched leaves open; under l2 by branch and bound on the same ReLUs. The feasible set is closed: it
holds the boundary, where $m_y=0$, and its minimum is the infimum over the points with $m_y<0$.

What is proved, and how far. ``upper`` never rests on a solver: it is the distance of a point which
the network itself, run in float64, puts at a margin $m_y\le0$. ``lower`` under l2 rests on weak
duality, evaluated in float64 at every node whatever the solver returned; otherwise on HiGHS, which
admits rows violated by 1e-7 and binaries by 1e-6. That enlarges the set searched, so a bound stays
a bound, but it can make up a solution. Such a one fails at the network; its activation pattern is
then solved for itself, without big-M constants, and excluded, and the search goes on. Bounds are
lowered by ``SAFETY`` and the margins relaxed by as much, to be on the right side of rounding.
"""

import copy
import heapq
import math
import time
from dataclasses import dataclass
from itertools import count
from numbers import Real
from typing import Any, Literal, NamedTuple, get_args, overload

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import sparse
from scipy.optimize import LinearConstraint, OptimizeResult, milp, nnls
from torch import Tensor, nn

from adv.geometry import bounds_slack, linear_oracle

__all__ = ["SAFETY", "Exact", "Kind", "minimal_perturbation"]

Kind = Literal["linf", "l2", "l1", "l0"]
Array = np.ndarray[Any, np.dtype[Any]]
Layer = tuple[Array, Array]

SAFETY = 1e-7
"""What lower bounds give away, relative to the radius searched and to the logits' weights."""


@dataclass(frozen=True)
class Exact:
    """What is proved about the smallest adversarial perturbation of one input.

    Args:
        norm: the norm of the bounds; ``"l0"`` counts pixels.
        lower: no point within the pixel bounds that is nearer than this has a margin <= 0.
            Infinite where there is no such point at all.
        upper: distance of ``x_adv`` from the input; infinite where no point was found.
        x_adv: a point in float64 on the CPU, shaped like the input, at which the network in float64
            has a margin <= 0; None where none was found. Rounded to float32 it may fall back, so
            check it with ``copy.deepcopy(net).double()``.
        label: the class that wins there, or draws with the true one; None where none was found.
        optimal: whether the bounds agree to the gap asked for, or both are infinite.
        seconds: time spent.
        nodes: nodes of branch and bound, over all programs.
    """

    norm: Kind
    lower: float
    upper: float
    x_adv: Tensor | None
    label: int | None
    optimal: bool
    seconds: float
    nodes: int

    @property
    def gap(self) -> float:
        """The part of ``upper`` that is open, from 0 where the bounds meet to 1."""
        return 0.0 if self.lower == self.upper else 1 - self.lower / self.upper


@overload
def minimal_perturbation(
    model: nn.Module,
    x: Float[Tensor, "..."],
    y: int,
    *,
    norm: Kind = ...,
    upper: float | None = ...,
    target: int | None = ...,
    time_limit: float = ...,
    bounds: tuple[float, float] = ...,
    gap: float = ...,
) -> Exact: ...


@overload
def minimal_perturbation(
    model: nn.Module,
    x: Float[Tensor, "B ..."],
    y: Int[Tensor, " B"],
    *,
    norm: Kind = ...,
    upper: Float[Tensor, " B"] | None = ...,
    target: Int[Tensor, " B"] | None = ...,
    time_limit: float = ...,
    bounds: tuple[float, float] = ...,
    gap: float = ...,
) -> list[Exact]: ...


def minimal_perturbation(
    model: nn.Module,
    x: Float[Tensor, "..."],
    y: int | Int[Tensor, " B"],
    *,
    norm: Kind = "linf",
    upper: float | Float[Tensor, " B"] | None = None,
    target: int | Int[Tensor, " B"] | None = None,
    time_limit: float = 60.0,
    bounds: tuple[float, float] = (0.0, 1.0),
    gap: float = 1e-5,
) -> Exact | list[Exact]:
    r"""The smallest perturbation that takes an input out of its class, with proof.

    For networks of some dozen ReLUs; the time grows exponentially with those left open, and an
    attack's radius as ``upper`` closes many of them.

    Args:
        model: Linear, ReLU and Flatten layers, one after the other (Identity and Dropout are idle).
            Normalization is one more Linear layer, or folded into the first.
        x: one input (...), where ``y`` is a number; a batch (B, ...) where ``y`` is a tensor.
        y: the class to leave, or (B,) of them.
        norm: ``"linf"``, ``"l2"``, ``"l1"``, or ``"l0"``, which counts pixels: for inputs
            (C, H, W) those with any channel changed, else values.
        upper: radius at which an attack succeeded, or (B,) of them: nothing beyond is searched. It
            is not taken on trust: if no point is found within, ``lower`` is what was searched, and
            the result's ``upper`` the distance of a point met beyond, or infinite.
        target: the class to reach, or (B,) of them; by default the nearest.
        time_limit: seconds for each input, > 0 and finite; what is proved by then is returned. A
            linear program that has begun may take up to 60 seconds more.
        bounds: smallest and largest value of an input.
        gap: relative difference of the bounds at which the search ends, in (0, 1).

    Returns:
        An ``Exact``, or a list of B. Inputs that are misclassified, or on the boundary, have 0.

    Raises:
        TypeError: other layers or types than these.
        ValueError: shapes, labels or ranges that do not fit, unknown norms, NaN; a model that is
            not the sequence of its layers.

    Source: the big-M encoding of Tjeng, Xiao and Tedrake (2019), *Evaluating Robustness of Neural
    Networks with Mixed Integer Programming*, section 4; chapter ``exact``.
    """
    _check_settings(norm, time_limit, bounds, gap)
    if isinstance(y, Tensor) and y.ndim == 1:
        rows = [_column(name, part, x) for name, part in (("upper", upper), ("target", target))]
        labels = _column("y", y, x)
        return [
            minimal_perturbation(
                model, z, c, norm=norm, upper=u, target=t,
                time_limit=time_limit, bounds=bounds, gap=gap,
            )
            for z, c, u, t in zip(x, labels, *rows, strict=True)
        ]  # fmt: skip
    start = time.perf_counter()
    question = _question(model, x, norm, bounds)
    targets = _targets(question, y, target)
    limit = math.inf if upper is None else _radius(upper, norm)
    search = _Search(question, limit, gap, start + time_limit)
    lower = search.run(targets)
    both = lower == search.upper == math.inf
    return Exact(
        norm=norm,
        lower=min(lower, search.upper),
        upper=search.upper,
        x_adv=search.point,
        label=search.label,
        optimal=both or (lower >= search.upper * (1 - gap) and search.upper < math.inf),
        seconds=time.perf_counter() - start,
        nodes=search.nodes,
    )


# ----------------------------------------------------------------------------------- the question


@dataclass(frozen=True)
class _Question:
    """One network and input, as arrays: reach a class by a delta in [lo, hi] of the least norm."""

    layers: tuple[Layer, ...]
    model: nn.Module
    shape: torch.Size
    x: Array
    lo: Array
    hi: Array
    norm: Kind
    pixel: Array

    @property
    def reach(self) -> float:
        """The norm of the box: no perturbation in it is longer."""
        return self.measure(np.maximum(-self.lo, self.hi))

    def measure(self, delta: Array) -> float:
        """The norm of a perturbation; l0 counts pixels."""
        if self.norm == "l0":
            return float(len(np.unique(self.pixel[delta != 0])))
        return float(np.linalg.norm(delta, {"linf": math.inf, "l2": 2, "l1": 1}[self.norm]))

    def place(self, delta: Array) -> Tensor:
        """The point x + delta, inside the box to the last bit."""
        z = np.clip(self.x + delta, self.x + self.lo, self.x + self.hi)
        return torch.from_numpy(z).reshape(self.shape)

    def logits(self, point: Tensor) -> Array:
        """The network itself, in float64."""
        with torch.no_grad():
            return self.model(point[None])[0].numpy()


def _question(model: nn.Module, x: Tensor, norm: Kind, bounds: tuple[float, float]) -> _Question:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        given = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x is a floating-point tensor, not {given}")
    low, high = bounds
    slack = bounds_slack(bounds, x.dtype)
    if x.numel() == 0 or not bool(((x >= low - slack) & (x <= high + slack)).all()):
        raise ValueError(f"x has values, all of them within the bounds [{low:g}, {high:g}]")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a torch.nn.Module, not {type(model).__name__}")
    model = copy.deepcopy(model).cpu().double().eval()
    point = x.detach().cpu().double()
    flat = point.flatten().numpy()
    pixel = np.arange(len(flat)) % (len(flat) // x.shape[0] if x.ndim == 3 else len(flat))
    question = _Question(
        layers=_layers(model, len(flat)),
        model=model,
        shape=point.shape,
        x=flat,
        lo=np.minimum(low - flat, 0.0),
        hi=np.maximum(high - flat, 0.0),
        norm=norm,
        pixel=pixel,
    )
    _check_layers(question)
    return question


IDLE = (nn.Flatten, nn.Identity, nn.Dropout, nn.Sequential)
"""Modules that compute nothing by themselves, in evaluation."""


def _layers(model: nn.Module, size: int) -> tuple[Layer, ...]:
    """The network as affine maps (W, b) with a ReLU between each two."""
    layers: list[Layer] = []
    W, b = np.eye(size), np.zeros(size)
    for name, part in model.named_modules(remove_duplicate=False):
        if isinstance(part, nn.Linear):
            if part.in_features != len(b):
                raise ValueError(f"layer {name} takes {part.in_features} values, not {len(b)}")
            V = part.weight.detach().numpy()
            if not np.isfinite(V).all():
                raise ValueError(f"layer {name} has weights that are not finite")
            W, b = V @ W, V @ b + (0.0 if part.bias is None else part.bias.detach().numpy())
        elif isinstance(part, nn.ReLU):
            layers.append((W, b))
            W, b = np.eye(len(b)), np.zeros(len(b))
        elif next(part.children(), None) is None and not isinstance(part, IDLE):
            raise TypeError(
                "exact bounds are for networks of Linear, ReLU and Flatten layers; "
                f"{name or 'this model'} is a {type(part).__name__}"
            )
    return _balanced([*layers, (W, b)])


def _balanced(layers: list[Layer]) -> tuple[Layer, ...]:
    """The same network with rows of largest entry 1 below each ReLU, which is homogeneous.

    HiGHS drops entries below 1e-9, and its tolerances are absolute.
    """
    balanced: list[Layer] = []
    scale = np.ones(layers[0][0].shape[1])
    for index, (W, b) in enumerate(layers):
        W = W * scale
        scale = np.abs(W).max(axis=1)
        scale = np.where((scale == 0) | (index == len(layers) - 1), 1.0, scale)
        balanced.append((W / scale[:, None], b / scale))
    return tuple(balanced)


def _run(q: _Question, delta: Array) -> tuple[Array, list[Array]]:
    """Logits, and the inputs of the ReLUs."""
    z, inputs = q.x + delta, []
    for W, b in q.layers[:-1]:
        inputs.append(W @ z + b)
        z = np.maximum(inputs[-1], 0)
    W, b = q.layers[-1]
    return W @ z + b, inputs


LEADS = (0.0, 1e-13, 1e-12, 1e-11, 1e-10, 1e-9, 1e-8)
"""What points are asked to win by, relative to the logits, until rounding lets them."""

APPROACH = 15
"""Steps of the search for a first point."""


def _slopes(q: _Question, inputs: list[Array]) -> Array:
    """The Jacobian (K, d) of the logits where the ReLUs have these inputs."""
    slope = q.layers[0][0]
    for h, (W, _) in zip(inputs, q.layers[1:], strict=True):
        slope = W @ ((h > 0)[:, None] * slope)
    return slope


# ------------------------------------------------------------------------------------------ bounds


def _farthest(q: _Question, W: Array, radius: float | Array) -> Array:
    r"""For each row w the step that maximizes $\langle w,\delta\rangle$ over ball and box.

    Under l1 a fractional knapsack, under l0 the pixels with the largest gains.
    """
    reach = np.broadcast_to(np.minimum(radius, q.reach), len(W))
    if q.norm == "l0":
        corner = np.where(W > 0, q.hi, q.lo)
        gain = (W * corner) @ np.eye(q.pixel.max() + 1)[q.pixel]
        rank = (-gain).argsort(axis=1, kind="stable").argsort(axis=1)
        return np.asarray(corner * (rank < reach[:, None])[:, q.pixel])
    g = torch.from_numpy(W)
    lo, hi = (torch.from_numpy(side).expand_as(g) for side in (q.lo, q.hi))
    step = linear_oracle(g, q.norm, torch.from_numpy(reach.copy()), box=(lo, hi))
    return np.asarray(step.numpy())


def _bounds(q: _Question, radius: float) -> list[tuple[Array, Array]]:
    """Bounds of all inputs of ReLUs over the ball within the box, outward by the rounding.

    The better of interval arithmetic and of a linear bound, carried back through the ReLUs' linear
    bounds to delta, whose farthest step then is exact; in the first layer both are exact.

    Source: Zhang et al. (2018), *Efficient Neural Network Robustness Certification with General
    Activation Functions*, section 3; chapter ``exact``.
    """
    bounds: list[tuple[Array, Array]] = []
    for W, b in q.layers[: len(q.layers) - 1]:
        low, high = -_ceiling(q, -W, -b, bounds, radius), _ceiling(q, W, b, bounds, radius)
        if bounds:
            below, above = (np.maximum(side, 0) for side in bounds[-1])
            plus, minus = np.maximum(W, 0), np.minimum(W, 0)
            low = np.maximum(low, plus @ below + minus @ above + b)
            high = np.minimum(high, plus @ above + minus @ below + b)
        slack = 1e-9 * (1 + np.abs(low) + np.abs(high))
        bounds.append((low - slack, high + slack))
    return bounds


def _ceiling(
    q: _Question, A: Array, c: Array, bounds: list[tuple[Array, Array]], radius: float
) -> Array:
    """Upper bounds of A a + c, a the outputs of the last ReLUs of ``bounds``, as ``_bounds`` says.

    Above, a ReLU open on [l, u] lies under the line from (l, 0) to (u, u); below, over 0 or h,
    whichever is nearer.
    """
    for (low, high), (W, b) in zip(bounds[::-1], q.layers[: len(bounds)][::-1], strict=True):
        on, off = low >= 0, high <= 0
        above = np.where(on, 1.0, np.where(off, 0.0, high / (high - low)))
        below = np.where(on, 1.0, np.where(off, 0.0, high > -low))
        plus, minus = np.maximum(A, 0), np.minimum(A, 0)
        c = c - plus @ np.where(on | off, 0.0, above * low)
        A = plus * above + minus * below
        A, c = A @ W, A @ b + c
    return np.asarray(A @ q.x + c + (A * _farthest(q, A, radius)).sum(axis=1))


# ---------------------------------------------------------------------------------- linear programs


class _Program:
    """A mixed-integer linear program, put together block by block."""

    def __init__(self) -> None:
        self.cost = self.low = self.high = self.integer = np.zeros(0)
        self.rows: list[tuple[tuple[tuple[slice, Array], ...], Array, Array]] = []

    def columns(
        self, low: Array, high: Array, *, cost: float = 0.0, integer: bool = False
    ) -> slice:
        """Variables between bounds; returns where they stand."""
        start, number = len(self.cost), len(low)
        self.low, self.high = np.append(self.low, low), np.append(self.high, high)
        self.cost = np.append(self.cost, np.full(number, cost))
        self.integer = np.append(self.integer, np.full(number, integer))
        return slice(start, start + number)

    def require(
        self, *blocks: tuple[slice, Array], low: Any = -math.inf, high: Any = math.inf
    ) -> None:
        """Rows low <= sum of (matrix @ variables) <= high."""
        number = len(blocks[0][1])
        self.rows.append((blocks, np.broadcast_to(low, number), np.broadcast_to(high, number)))

    def solve(self, seconds: float, *, gap: float = 0.0, relaxed: bool = False) -> OptimizeResult:
        """Minimize the cost; ``relaxed`` lets the integers be fractions."""
        matrix = np.zeros((sum(len(low) for _, low, _ in self.rows), len(self.cost)))
        start = 0
        for blocks, low, _ in self.rows:
            for where, block in blocks:
                matrix[start : start + len(low), where] += block
            start += len(low)
        sides = [np.concatenate([row[side] for row in self.rows]) for side in (1, 2)]
        call: dict[str, Any] = {
            "integrality": self.integer * (not relaxed),
            "bounds": np.stack([self.low, self.high]),
            "constraints": LinearConstraint(sparse.csc_array(matrix), *sides),
        }
        options = {"time_limit": max(seconds, 0.01), "mip_rel_gap": gap}
        result = milp(self.cost, **call, options=options)
        if result.status > 2:  # presolve could not tell infeasible from unbounded
            result = milp(self.cost, **call, options=options | {"presolve": False})
        return result


class _Steps(NamedTuple):
    """Where the variables for delta stand, the matrix that makes delta of them, and l0's pixels."""

    where: slice
    spread: Array
    pixels: slice | None = None


def _steps(program: _Program, q: _Question, radius: float, unit: float) -> _Steps:
    r"""Variables for delta, in multiples of ``unit``, with their norm as the cost.

    linf: $t\ge|\delta_i|$. l1: positive and negative parts. l0: a binary for each pixel opens it.
    """
    lo, hi = np.maximum(q.lo / unit, -radius / unit), np.minimum(q.hi / unit, radius / unit)
    limit, eye, size = min(radius, q.reach) / unit, np.eye(len(q.x)), len(q.x)
    if q.norm == "linf":
        step = program.columns(lo, hi)
        t = program.columns(np.zeros(1), np.array([limit]), cost=1)
        program.require((t, np.ones((size, 1))), (step, eye), low=0)
        program.require((t, np.ones((size, 1))), (step, -eye), low=0)
        return _Steps(step, unit * eye)
    if q.norm == "l1":
        step = program.columns(np.zeros(2 * size), np.append(hi, -lo), cost=1)
        program.require((step, np.ones((1, 2 * size))), high=limit)
        return _Steps(step, unit * np.hstack([eye, -eye]))
    step = program.columns(q.lo, q.hi)
    opened = np.eye(q.pixel.max() + 1)[q.pixel]
    number = opened.shape[1]
    pixels = program.columns(np.zeros(number), np.ones(number), cost=1, integer=True)
    program.require((step, eye), (pixels, -q.hi[:, None] * opened), high=0)
    program.require((step, eye), (pixels, -q.lo[:, None] * opened), low=0)
    program.require((pixels, np.ones((1, number))), high=limit)
    return _Steps(step, eye, pixels)


@dataclass(frozen=True)
class _Encoding:
    """The program for a target, and where delta and the states of the ReLUs stand in it."""

    program: _Program
    steps: _Steps
    relus: list[slice]

    def delta(self, solution: Array) -> Array:
        return np.asarray(self.steps.spread @ solution[self.steps.where])

    def opened(self, solution: Array) -> Array | None:
        """L0: which pixels may change; the solver may move others by its tolerance."""
        return None if self.steps.pixels is None else solution[self.steps.pixels] > 0.5

    def states(self, solution: Array) -> list[Array]:
        return [solution[part] > 0.5 for part in self.relus]

    def binaries(self, solution: Array) -> Array:
        return np.asarray(solution[self.program.integer > 0] > 0.5)

    def exclude(self, on: Array) -> None:
        """Cut these values of the binaries off: one of them at least must differ."""
        row = np.zeros((1, len(self.program.cost)))
        row[0, self.program.integer > 0] = np.where(on, -1.0, 1.0)
        self.program.require((slice(None), row), low=1.0 - on.sum())


def _encode(
    q: _Question, target: int, radius: float, unit: float, bounds: list[tuple[Array, Array]]
) -> _Encoding:
    r"""The program for one target within a radius, lengths in multiples of ``unit``.

    Each ReLU $a=\max(h,0)$ with $l\le h\le u$ becomes $a\ge h$, $a\ge0$, $a\le uz$ and
    $a\le h-l(1-z)$ with a binary $z$, which is fixed where the sign of $h$ is.
    """
    program = _Program()
    steps = _steps(program, q, radius, unit)
    (W, b), relus = q.layers[0], []
    where, block, shift = steps.where, W @ steps.spread, W @ q.x + b
    for (low, high), (W, b) in zip(bounds, q.layers[1:], strict=True):
        on, low, high = low >= 0, np.minimum(low, 0), np.maximum(high, 0)
        eye = np.eye(len(low))
        a = program.columns(0 * high, high)
        z = program.columns(1.0 * on, 1.0 * (on | (high > 0)), integer=True)
        program.require((a, eye), (where, -block), low=shift)
        program.require((a, eye), (where, -block), (z, np.diag(-low)), high=shift - low)
        program.require((a, eye), (z, np.diag(-high)), high=0)
        relus.append(z)
        where, block, shift = a, W, b
    wins = block[target] - np.delete(block, target, axis=0)
    least = np.delete(shift, target) - shift[target]
    scale = np.abs(wins).max(axis=1)
    scale[scale == 0] = 1.0
    program.require((where, wins / scale[:, None]), low=least / scale - SAFETY)
    return _Encoding(program, steps, relus)


# ------------------------------------------------------------------- one pattern, open or complete

Fixed = dict[tuple[int, int], int]
"""States of ReLUs (layer, unit) that branch and bound has fixed."""

OPEN = -1
"""State of a ReLU that is not decided; 1 passes its input on, 0 does not."""


@dataclass(frozen=True)
class _Region:
    r"""Rows $G(\delta,a)\ge h$ where ReLUs have given states and the target wins.

    Args:
        G: (n, d + m) rows; column d + k is the output $a_k$ of the k-th ReLU that is open.
        h: (n,) right-hand sides.
        open: m pairs (layer, ReLU).
        ceiling: (m,) largest values of the outputs; 0 is the smallest.
        wins: rows of the target, the last ones.
    """

    G: Array
    h: Array
    open: list[tuple[int, int]]
    ceiling: Array
    wins: int


def _region(
    q: _Question, target: int, states: list[Array], bounds: list[tuple[Array, Array]]
) -> _Region:
    r"""The linear relaxation: an open ReLU lies in the triangle over its interval.

    $a\ge h$, $a\ge0$, $a\le u(h-l)/(u-l)$ with $l<0<u$.
    """
    opened = [(k, int(i)) for k, state in enumerate(states) for i in np.flatnonzero(state == OPEN)]
    size, used = len(q.x), len(q.x)
    slope, value = np.eye(size, size + len(opened)), q.x
    G, h, ceiling = [], [], [np.zeros(0)]
    for (W, b), state, (low, high) in zip(q.layers, states, bounds, strict=False):
        slope, value = W @ slope, W @ value + b
        sign = np.where(state == 1, 1.0, -1.0)[state != OPEN]
        G.append(sign[:, None] * slope[state != OPEN])
        h.append(-sign * value[state != OPEN])
        at = np.flatnonzero(state == OPEN)
        a = np.eye(len(at), slope.shape[1], used)
        rate = high[at] / (high[at] - low[at])
        G += [a, a - slope[at], rate[:, None] * slope[at] - a]
        h += [0 * rate, value[at], rate * (low[at] - value[at])]
        ceiling.append(high[at])
        slope, value = slope * (state == 1)[:, None], value * (state == 1)
        slope[at] = a
        used += len(at)
    W, b = q.layers[-1]
    slope, value = W @ slope, W @ value + b
    G.append(slope[target] - np.delete(slope, target, axis=0))
    h.append(np.delete(value, target) - value[target])
    return _Region(
        np.concatenate(G), np.concatenate(h), opened, np.concatenate(ceiling), len(value) - 1
    )


def _shortest(q: _Question, region: _Region, unit: float) -> tuple[float, Array | None]:
    """Least l1 or linf norm in a region without open ReLUs, and where; infinite if it is empty."""
    program = _Program()
    steps = _steps(program, q, math.inf, unit)
    program.require((steps.where, region.G @ steps.spread), low=region.h)
    result = program.solve(60.0)
    if result.x is None:
        return (math.inf if result.status == 2 else 0.0), None
    return unit * (result.fun - SAFETY), np.clip(steps.spread @ result.x[steps.where], q.lo, q.hi)


def _within(q: _Question, region: _Region, support: Array) -> tuple[float, Array | None]:
    """L0: the target's largest lead in a region by changes of these values only."""
    program = _Program()
    step = program.columns(q.lo * support, q.hi * support)
    lead = program.columns(np.zeros(1), np.full(1, np.abs(region.h).max() + 1), cost=-1)
    wins = -1.0 * (np.arange(len(region.h)) >= len(region.h) - region.wins)
    program.require((step, region.G), (lead, wins[:, None]), low=region.h)
    result = program.solve(60.0)
    if result.x is None:
        return (math.inf if result.status == 2 else 0.0), None
    delta = np.clip(result.x[step], q.lo, q.hi)
    return q.measure(delta), delta


def _nearest(q: _Question, region: _Region, unit: float) -> tuple[float, Array]:
    r"""Least l2 norm in a region or relaxation, proven by duality, and the point that has it.

    Any $u\ge0$ proves, from $\langle h,u\rangle\le\langle G_\delta^\top u,\delta\rangle+
    \langle G_a^\top u,a\rangle$ and $0\le a\le c$,

    $$\|\delta\|_2\ge\frac{\langle h,u\rangle-\langle c,(G_a^\top u)_+\rangle}
    {\|G_\delta^\top u\|_2}.$$

    Non-negative least squares finds a good one: the least distance program in $\delta$ and, with
    a small weight, $a$.

    Returns:
        The bound, and the point (d + m,), which is right to that weight.

    Source: Lawson and Hanson (1974), *Solving Least Squares Problems*, chapter 23.
    """
    size, ceiling = len(q.x), region.ceiling
    box = np.zeros((2 * size, region.G.shape[1]))
    box[:, :size] = np.vstack([np.eye(size), -np.eye(size)])
    G, h = np.concatenate([region.G, box]), np.concatenate([region.h, q.lo, -q.hi])
    weight = np.concatenate([np.full(size, unit), ceiling / 1e-3])
    E = G * weight
    scale = np.linalg.norm(E, axis=1)
    scale[scale == 0] = 1.0
    try:
        u, _ = nnls(np.vstack([E.T, h]) / scale, np.eye(len(weight) + 1)[-1])
    except RuntimeError:  # too many iterations: nothing is proved
        return 0.0, np.zeros(len(weight))
    u = u / scale
    rest = 1 - h @ u
    point = weight * (E.T @ u) / rest if rest > 0 else np.zeros(len(weight))
    pull = G.T @ u
    gain = h @ u - ceiling @ np.maximum(pull[size:], 0)
    length = np.linalg.norm(pull[:size])
    # What rounding can have done to sums of so many terms counts against the bound.
    gain -= 1e-12 * (np.abs(h) @ u + ceiling @ (np.abs(G[:, size:]).T @ u))
    length += 1e-12 * np.linalg.norm(np.abs(G[:, :size]).T @ u)
    if gain <= 0:
        return 0.0, point
    return (math.inf if gain > q.reach * length else float(gain / length)), point


# -------------------------------------------------------------------------------------- the search


class _Search:
    """The best point so far, and what is proved of the rest."""

    def __init__(self, q: _Question, limit: float, gap: float, deadline: float) -> None:
        self.q, self.limit, self.gap, self.deadline = q, limit, gap, deadline
        self.upper = math.inf
        self.point: Tensor | None = None
        self.label: int | None = None
        self.nodes = 0
        self.seen: set[tuple[int, bytes]] = set()
        self.wide = _bounds(q, q.reach)
        self.within = math.inf, self.wide

    @property
    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.perf_counter()

    @property
    def radius(self) -> float:
        """What is still to be searched: a point beyond is no better than the best, to the gap."""
        if self.q.norm == "l0":
            return min(self.limit, self.upper - 1)
        return min(self.limit, self.upper * (1 - self.gap))

    def bounds(self, radius: float) -> list[tuple[Array, Array]]:
        """Of the ReLUs' inputs; those of the last radius are kept."""
        if self.within[0] != radius:
            self.within = radius, _bounds(self.q, radius)
        return self.within[1]

    def closed(self, lower: float) -> bool:
        """Whether a lower bound leaves nothing to search."""
        return lower > self.radius if self.q.norm == "l0" else lower >= self.radius

    def unit(self, radius: float) -> float:
        """The length in which programs measure; HiGHS's tolerances are absolute."""
        return 1.0 if self.q.norm == "l0" else max(min(radius, self.q.reach), 1e-3)

    def beyond(self, radius: float) -> float:
        """The bound where there is nothing within a radius."""
        if radius >= self.q.reach:
            return math.inf
        return radius + 1 if self.q.norm == "l0" else radius

    def run(self, targets: list[int]) -> float:
        """Search the targets, the most promising first; returns the lower bound."""
        for target in targets:
            self.offer(np.zeros_like(self.q.x), target)
        if self.upper == 0:
            return 0.0
        near = self.approach(targets)
        targets = sorted(targets, key=near.__getitem__)
        if self.q.norm == "l2":
            return self.branch(targets)
        lower = {target: self.relax(target) for target in targets}
        for target in sorted(targets, key=lambda t: (near[t], lower[t])):
            lower[target] = self.prove(target, lower[target])
        return min(lower.values())

    # ------------------------------------------------------------------------------------ points

    def offer(self, delta: Array, target: int) -> bool:
        """Keep a point if the network itself lets the target win there, and it is nearer."""
        point = self.q.place(delta)
        logits = self.q.logits(point)
        if not logits[target] >= np.delete(logits, target).max():
            return False
        distance = self.q.measure(point.numpy().ravel() - self.q.x)
        if distance < self.upper:
            self.upper, self.point, self.label = distance, point, target
        return True

    def polish(
        self, target: int, states: list[Array], delta: Array, opened: Array | None = None
    ) -> tuple[float, Array | None]:
        """Solve one complete pattern for itself, and offer what is found.

        A solution lies on the boundary, where rounding decides; it is asked again for a little
        more than that until the network agrees.

        Args:
            target: the class to win.
            states: of all ReLUs.
            delta: a point nearby.
            opened: l0 only: the pixels that may change; by default those that ``delta`` changes.

        Returns:
            The least norm there, proven, infinite where the pattern's region has no such point;
            and the point.
        """
        q, least, found = self.q, math.inf, None
        # In wide bounds the radius is no measure of a solution's length until a point is known.
        unit = self.unit(min(self.radius, q.measure(delta)))
        scale = np.abs(_run(q, delta)[0]).max()
        support = np.isin(q.pixel, q.pixel[delta != 0]) if opened is None else opened[q.pixel]
        for lead in LEADS[:1] if q.norm == "l0" else LEADS:
            region = _region(q, target, states, self.wide)
            region.h[-region.wins :] += lead * scale
            if q.norm == "l2":
                value, found = _nearest(q, region, unit)
            elif q.norm == "l0":
                value, found = _within(q, region, support)
            else:
                value, found = _shortest(q, region, unit)
            least = min(least, value)
            if found is None or self.offer(found, target):
                break
        return least, found

    def approach(self, targets: list[int]) -> dict[int, float]:
        """First points, by DeepFool's steps within the box, and how far they are."""
        near = {}
        for target in targets:
            delta = np.zeros_like(self.q.x)
            for _ in range(APPROACH):
                logits, inputs = _run(self.q, delta)
                rival = np.argmax(np.where(np.arange(len(logits)) == target, -np.inf, logits))
                if logits[target] >= logits[rival]:
                    break
                slopes = _slopes(self.q, inputs)
                g = slopes[target] - slopes[rival]
                delta = self.toward(g, g @ delta + 1.01 * (logits[rival] - logits[target]))
            near[target] = self.walk(target, delta)
        return near

    def toward(self, g: Array, wanted: float) -> Array:
        """The shortest step in the box with <g, step> >= wanted, or the corner; radii by grids."""
        low, high, rows = 0.0, self.q.reach, np.tile(g, (32, 1))
        for _ in range(4):
            radii = np.linspace(low, high, 33)
            steps = _farthest(self.q, rows, radii[1:])
            first = int(np.argmax(np.append(steps[:-1] @ g >= wanted, True)))
            low, high = radii[first], radii[first + 1]
        return np.asarray(steps[first])

    def walk(self, target: int, delta: Array) -> float:
        """Polish, then the pattern just beyond, as long as the points come nearer."""
        distance = math.inf
        while self.left > 0:
            states = [h > 0 for h in _run(self.q, delta)[1]]
            _, found = self.polish(target, states, delta)
            length = math.inf if found is None else self.q.measure(found)
            if found is None or length >= distance * (1 - 1e-6):
                break
            distance, delta = length, np.clip(1.001 * found, self.q.lo, self.q.hi)
        return distance

    # ---------------------------------------------------------------------------- linf, l1 and l0

    def relax(self, target: int) -> float:
        """A lower bound by the linear relaxation."""
        radius, unit = self.radius, self.unit(self.radius)
        result = _encode(self.q, target, radius, unit, self.bounds(radius)).program.solve(
            self.left, relaxed=True
        )
        return self.bound(result, radius, unit)

    def bound(self, result: OptimizeResult, radius: float, unit: float) -> float:
        """What HiGHS proved, in the norm's own unit; never beyond what was searched."""
        if result.status == 2:
            return self.beyond(radius)
        value = result.mip_dual_bound
        if value is None and result.status == 0:
            value = result.fun
        if value is None or not math.isfinite(value):
            return 0.0
        if self.q.norm == "l0":
            return float(max(math.ceil(value - 1e-4), 0))
        return min(unit * max(value - SAFETY, 0.0), self.beyond(radius))

    def prove(self, target: int, lower: float) -> float:
        """Raise one target's lower bound until nothing is left, finding nearer points on the way.

        Patterns that HiGHS proposes are solved for themselves and excluded; ``settled`` is the
        least norm among them.
        """
        excluded: list[Array] = []
        settled = math.inf
        while not self.closed(lower) and self.left > 0:
            radius, unit = self.radius, self.unit(self.radius)
            encoding = _encode(self.q, target, radius, unit, self.bounds(radius))
            for on in excluded:
                encoding.exclude(on)
            result = encoding.program.solve(self.left, gap=self.gap / 2)
            self.nodes += int(result.mip_node_count or 0)
            lower = max(lower, min(self.bound(result, radius, unit), settled))
            if result.x is None:
                break
            solution = result.x
            states, delta = encoding.states(solution), encoding.delta(solution)
            value, _ = self.polish(target, states, delta, encoding.opened(solution))
            settled = min(settled, value)
            excluded.append(encoding.binaries(solution))
        return lower

    # ------------------------------------------------------------------------------------------ l2

    def branch(self, targets: list[int]) -> float:
        """Best first over all targets; splits the ReLU that the relaxation gets most wrong."""
        order, settled = count(), math.inf
        heap: list[tuple[float, int, int, Fixed]] = [(0.0, next(order), t, {}) for t in targets]
        while heap and not self.closed(heap[0][0]) and self.left > 0:
            lower, _, target, fixed = heapq.heappop(heap)
            lower, worst = self.explore(target, fixed, lower)
            if worst is None or self.closed(lower):
                settled = min(settled, lower)
                continue
            for on in (0, 1):
                heapq.heappush(heap, (lower, next(order), target, fixed | {worst: on}))
        return min([settled, *(node[0] for node in heap[:1])])

    def explore(
        self, target: int, fixed: Fixed, lower: float
    ) -> tuple[float, tuple[int, int] | None]:
        """A node's bound, and the ReLU to split; None where all are decided."""
        q, radius = self.q, self.radius
        self.nodes += 1
        bounds = self.bounds(radius)
        states = [np.where(low >= 0, 1, np.where(high <= 0, 0, OPEN)) for low, high in bounds]
        for (k, i), on in fixed.items():
            states[k][i] = on
        region = _region(q, target, states, bounds)
        value, point = _nearest(q, region, self.unit(radius))
        lower = max(lower, min(value, self.beyond(radius)))
        if self.closed(lower):
            return lower, None
        size = len(q.x)
        delta = np.clip(point[:size], q.lo, q.hi)
        _, inputs = _run(q, delta)
        pattern = [h > 0 for h in inputs] if region.open else states
        mark = (target, np.concatenate([[], *pattern]).astype(bool).tobytes())
        if mark not in self.seen:
            self.seen.add(mark)
            self.polish(target, pattern, delta)
        if not region.open:
            return lower, None
        error = [
            abs(a - max(inputs[k][i], 0))
            for a, (k, i) in zip(point[size:], region.open, strict=True)
        ]
        return lower, region.open[int(np.argmax(error))]


# ------------------------------------------------------------------------------------------ checks


def _check_settings(norm: Kind, time_limit: float, bounds: tuple[float, float], gap: float) -> None:
    if norm not in get_args(Kind):
        raise ValueError(f"norm is one of {', '.join(map(repr, get_args(Kind)))}, not {norm!r}")
    for name, value, high in (("time_limit", time_limit, math.inf), ("gap", gap, 1.0)):
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name} is a number, not {value!r}")
        if not 0 < value < high:
            raise ValueError(f"{name} lies between 0 and {high:g}, not at {value!r}")
    if len(bounds) != 2 or not -math.inf < bounds[0] < bounds[1] < math.inf:
        raise ValueError(f"bounds are two increasing numbers (low, high), not {bounds!r}")


def _check_layers(q: _Question) -> None:
    """Raise where the layers, one after the other, aren't what the model computes."""
    draws = np.random.default_rng(0).uniform(0, 1, (3, len(q.x)))
    for delta in [np.zeros_like(q.x), *(q.lo + draws * (q.hi - q.lo))]:
        try:
            logits = q.logits(q.place(delta))
        except RuntimeError as error:
            raise ValueError(
                f"the model does not take an input of shape {tuple(q.shape)}"
            ) from error
        ours, _ = _run(q, delta)
        if not np.isfinite(logits).all():
            raise ValueError("the model's logits are not finite")
        if logits.shape != ours.shape or len(ours) < 2:
            hint = "; a batch takes y as a tensor (B,)" if logits.ndim == 2 else ""
            raise ValueError(
                f"the model returns logits (B, K) with K >= 2, not {logits.shape}{hint}"
            )
        if not np.allclose(ours, logits, rtol=1e-9, atol=1e-9 * np.abs(logits).max()):
            raise ValueError(
                "the model is not the sequence of its Linear and ReLU layers; write normalization "
                "as a Linear layer, or fold it into the first, and ReLUs as modules"
            )


def _targets(q: _Question, y: int | Tensor, target: int | Tensor | None) -> list[int]:
    classes = len(q.layers[-1][1])
    label = _class("y", y, classes)
    if target is None:
        return [k for k in range(classes) if k != label]
    wanted = _class("target", target, classes)
    if wanted == label:
        raise ValueError(f"target is the class to reach, {wanted}, which y is already")
    return [wanted]


def _class(name: str, value: int | Tensor, classes: int) -> int:
    if isinstance(value, Tensor) and value.ndim == 0 and value.dtype == torch.int64:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} is an integer, or an int64 tensor (B,), not {value!r}")
    if not 0 <= value < classes:
        raise ValueError(f"{name} lies in 0..{classes - 1}, not {value}")
    return int(value)


def _radius(upper: float | Tensor, norm: Kind) -> float:
    """The radius searched: a little more, that an attack's rounding doesn't lose its point."""
    value = float(upper) if isinstance(upper, Tensor) and upper.ndim == 0 else upper
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"upper is a number, or a tensor (B,), not {upper!r}")
    if not value >= 0:
        raise ValueError(f"upper is a radius >= 0, not {value!r}")
    if norm == "l0":
        return math.floor(value + 1e-6) if value < math.inf else math.inf
    return float(value * (1 + 1e-6))


def _column(name: str, part: Any, x: Tensor) -> list[Any]:
    """One entry for each input of a batch."""
    if part is None:
        return [None] * len(x)
    if not isinstance(part, Tensor) or part.ndim != 1:
        raise TypeError(f"for a batch, {name} is a tensor (B,), not {part!r}")
    if part.shape != x.shape[:1]:
        raise ValueError(
            f"{name} has shape ({len(x)},), one for each input, not {tuple(part.shape)}"
        )
    return list(part.unbind())
