r"""Attacks on regression: there is no label to flip, so the output is moved as far as it goes.

Linearizing the *model* turns $\|f(x+\delta)-y\|_2^2$ into the quadratic
$\|r+J\delta\|_2^2$, $r=f(x)-y$, maximized over a norm ball (``quadratic``); linearizing the *loss*
gives a linear problem (``linear``); both can be confined to a few groups of values (``subset``).
"""

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from adv.attacks.common import (
    Best,
    Bounds,
    GradientWatch,
    Loss,
    Model,
    Objective,
    Observe,
    check_count,
    check_inputs,
    check_number,
    check_outputs,
    check_range,
    check_seed,
    drawn,
    eval_mode,
    expand,
    generator,
    input_gradient,
    objective,
)
from adv.attacks.convex import dithered_ascent, linearized
from adv.attacks.gradient import noise
from adv.attacks.jacobian import (
    Jacobian,
    ascend,
    best_signs,
    flip_search,
    greedy_signs,
    singular,
)
from adv.geometry import Box, Norm, exponent, linear_oracle, room

__all__ = ["linear", "quadratic", "random_perturbation", "subset"]

Rule = Literal["greedy", "search", "iterate"]
BOXED = (1.0, 2.0, math.inf)
"""The exponents for which the linear problem is solved inside a box."""
GREEDY = 4096
"""Inputs of more values get the sign iteration by default: greedy needs every column."""
ENUMERATED = 12
"""Groups up to this size are solved by trying every vertex."""


def quadratic(
    model: Model,
    x: Float[Tensor, "B ..."],
    y: Float[Tensor, "B ..."] | None = None,
    *,
    eps: float,
    norm: Norm = "l2",
    steps: int = 200,
    tol: float = 1e-3,
    restarts: int = 1,
    rule: Rule | None = None,
    residual: bool = True,
    bounds: Bounds = (0.0, 1.0),
    seed: int = 0,
    observe: Observe | None = None,
) -> Float[Tensor, "B ..."]:
    r"""Quadratic attack: linearize the model once, maximize $\|r+J\delta\|_2^2$, $r=f(x)-y$.

    - l2: $\delta\leftarrow\varepsilon v_2\big(J^\top(r+J\delta)\big)$, which for $r=0$ is power
      iteration, started at $\pm\varepsilon v$, $v$ the leading singular vector; converges to the
      maximum, but for the box. The starts are tried as well: far from $x$, where the linear model
      fails, either may have the larger error.
    - l1: the best single value, from the norms of the columns and $J^\top r$.
    - linf: a vertex of the box: by greedy signs (``"greedy"``); by ``"search"``, the better of
      greedy and $\operatorname{sign}v$, each improved by single flips; or by ``"iterate"``,
      $\delta\leftarrow\varepsilon\operatorname{sign}(J^\top(r+J\delta))$ from $\pm v$, which needs
      no columns.
    - any other $p$: the same iteration with $v_p$.

    Every solution is tried with both signs, and the one with the larger *actual* error is kept. The
    box is part of the problem and not clipped to afterwards: exactly so under linf, where it
    changes the vertices. Under l1 the best single value may leave a part of ``eps`` unused; under
    any other $p$ steps are clipped to it.

    Args:
        model: ``(B, ...) -> (B, ...)``, of any output shape.
        x: (B, ...) inputs inside ``bounds``.
        y: targets shaped like the output; by default $f(x)$, so that $r=0$.
        eps: radius of the ball, >= 0, in the units of ``x``.
        norm: ``"l2"``, ``"l1"``, ``"linf"`` or any number $p\ge1$.
        steps: of each iteration at most, one product with $J^\top J$ each.
        tol: an iteration ends where no $\delta$ moves by more than this share of its length.
        restarts: the iteration is run from this many minus one random directions, too.
        rule: linf only; by default ``"greedy"`` up to 4096 values, else ``"iterate"``.
        residual: False drops $r$ from the quadratic, as the source does: $y$ then only chooses
            between the signs.
        bounds: smallest and largest value of an input.
        seed: of the random directions.
        observe: ``(step, state)``, called at each step of an iteration and for each solution with
            ``x_adv`` and, in an iteration, ``moved`` (B,), the share of its length by which
            $\delta$ changed, or the solution's ``error`` (B,).

    Returns:
        (B, ...) perturbed inputs, at most ``eps`` away and inside ``bounds``.

    Raises:
        TypeError, ValueError: bad input; a rule without linf.
        RuntimeError: a layer that cannot be differentiated twice, as ``Jacobian`` says.

    Source: Balda et al. (2018), (12)-(15) and (20); chapter ``regression``.
    """
    check_outputs(model, x, y, bounds, eps, steps=steps, restarts=restarts)
    check_number("tol", tol)
    p = exponent(norm)
    check_seed(seed)
    if rule is not None and (p != math.inf or rule not in get_args(Rule)):
        raise ValueError(f"rule is 'greedy', 'search' or 'iterate', under linf; not {rule!r}")
    x, best, watch, count = x.detach(), Best(x), GradientWatch(x), itertools.count()
    box = room(x, bounds)

    def oracle(g: Tensor) -> Tensor:
        if p == math.inf:
            return g.sign()
        return linear_oracle(g, p, eps, box=box if p in BOXED else None)

    def tell(s: Tensor, known: dict[str, Tensor]) -> None:
        if observe is not None:
            observe(next(count), {"x_adv": frame.point(s), **known})

    with torch.no_grad(), eval_mode(model):
        frame = _Frame(model, x, eps, bounds, corners=p == math.inf)
        J = frame.jacobian
        y = J.value if y is None else y
        offset = frame.offset(J.value - y if residual else torch.zeros_like(y))

        def climb(direction: Tensor) -> Tensor:
            run: Any = {"steps": steps, "tol": tol}
            run["observe"] = lambda _, state: tell(state["delta"], {"moved": state["moved"]})
            return ascend(J, offset, oracle(direction), oracle, **run)

        if p == 1:
            own = _both(_best_entry(J, offset, eps, box))
        elif p == math.inf and (rule or _default(x)) != "iterate":
            own = _both(_corner_signs(J, offset, rule == "search", steps, tol, seed))
        else:
            v = singular(J, steps=steps, tol=tol, seed=seed).vector
            own = itertools.chain(map(oracle, (v, -v)), map(climb, (v, -v)))
        random = (_random_like(x, seed, k) for k in range(1, restarts))
        for s in itertools.chain(own, map(climb, random)):
            x_adv = frame.point(s)
            error = _error(model(x_adv.clone()), y)
            best.update(x_adv, -error)
            tell(s, {"error": error})
        if eps:  # a product with a random vector is zero where the Jacobian is
            watch.see(J.vjp(_random_like(J.value, seed)), torch.zeros_like(watch.stuck))
    watch.report("quadratic()")
    return best.x_adv


def linear(
    model: Model,
    x: Float[Tensor, "B ..."],
    y: Float[Tensor, "B ..."] | None = None,
    *,
    eps: float,
    norm: Norm = "linf",
    steps: int = 1,
    dither: float | None = None,
    accumulate: bool = True,
    bounds: Bounds = (0.0, 1.0),
    seed: int = 0,
    observe: Observe | None = None,
) -> Float[Tensor, "B ..."]:
    r"""Linear attack: linearize the error $\|f(x+\delta)-y\|_2^2$, step as far as the ball allows.

    Algorithm 1 adds up steps of length $\varepsilon/T$. The other way, ``accumulate=False``, is
    $\delta\leftarrow\varepsilon v_p(\nabla L(x+\delta))$, a step of full length that may change its
    mind. For $y=f(x)$ the gradient at $x$ is zero; at a random offset $\xi$ it is
    $2J^\top J\xi+O(\|\xi\|^2)$, so that the steps of full length are power iteration on
    $J^\top J$, while Algorithm 1 spends a part of its budget on the first random direction.

    Args:
        model: ``(B, ...) -> (B, ...)``, of any output shape.
        x: (B, ...) inputs inside ``bounds``.
        y: targets shaped like the output; by default $f(x)$.
        eps: radius of the ball, >= 0, in the units of ``x``.
        norm: ``"linf"``, ``"l2"``, ``"l1"`` or any number $p\ge1$.
        steps: $T$, each one forward and one backward pass.
        dither: radius of the offset of the first point of linearization; by default ``eps``. In
            float32 the difference of outputs drowns in rounding below about 1e-3.
        accumulate: add up short steps (Algorithm 1), or replace one full step by the next.
        bounds: smallest and largest value of an input; a step is the best one within them under
            linf, l2 and l1, and clipped to them under any other norm.
        seed: of the offset.
        observe: ``(step, state)``, called at each step with ``x_adv`` (before the step), ``point``
            (where the error was linearized), ``value`` and ``gradient`` there.

    Returns:
        (B, ...) the last point, at most ``eps`` away and inside ``bounds``.

    Raises:
        TypeError, ValueError: bad input.

    Source: Balda et al. (2018), (16) and Algorithm 1; E14 for the steps of full length; chapter
    ``regression``.
    """
    check_outputs(model, x, y, bounds, eps, steps=steps)
    radius = eps if dither is None else dither
    check_number("dither", radius)
    with eval_mode(model):
        with torch.no_grad():
            goal = model(x.clone()) if y is None else y
        error = _at(model, goal, _error)
        if accumulate:
            tangent, name = linearized(error), "linear()"
            return dithered_ascent(
                x, tangent, name, eps, norm, steps, radius, bounds, seed, observe
            )
        x = x.detach()
        box = room(x, bounds) if exponent(norm) in BOXED else None
        x_adv, watch = x, GradientWatch(x)
        for step in range(steps):
            point = x_adv
            if step == 0:
                offset = noise(x, radius, norm, generator=generator(seed))
                point = (x + offset).clamp(*bounds)
            value, gradient = input_gradient(error, point)
            gradient = watch.see(gradient, torch.zeros_like(watch.stuck))
            if observe is not None:
                state = {"x_adv": x_adv, "point": point, "value": value, "gradient": gradient}
                observe(step, state)
            x_adv = (x + linear_oracle(gradient, norm, eps, box=box)).clamp(*bounds)
    if eps:  # else there was nowhere to go
        watch.report("linear()")
    return x_adv


def subset(
    model: Model,
    x: Float[Tensor, "B ..."],
    y: Float[Tensor, "B ..."] | Int[Tensor, " B"] | None = None,
    *,
    eps: float,
    count: int = 1,
    groups: Literal["pixels"] | Int[Tensor, " d"] = "pixels",
    kind: Literal["linear", "quadratic"] = "linear",
    loss: Objective | None = None,
    dither: float | None = None,
    bounds: Bounds = (0.0, 1.0),
    seed: int = 0,
    observe: Observe | None = None,
) -> Float[Tensor, "B ..."]:
    r"""Single- and multiple-subset attacks: change a few groups of values, each by at most ``eps``.

    Each step linearizes at the current point, solves the problem inside every group, and moves the
    group that gains most. A group is moved once, without which a constant gradient would choose the
    same one at every step and leave the ball. The linear problem's step is its solution,
    $\arg\max_s\sum_{i\in S_s}|h_i\delta_i|$ with every $\delta_i$ at the end of its room; the
    quadratic problem, at a vertex of the group's box, is solved by trying all of them up to 12
    values (so for RGB pixels), by greedy signs beyond, and the vertex or its opposite is taken by
    the actual error.

    Args:
        model: ``(B, ...) -> (B, ...)``, of any output shape; logits where a ``loss`` is given.
        x: (B, ...) inputs inside ``bounds``.
        y: targets shaped like the output, by default $f(x)$; labels where a ``loss`` is given.
        eps: the largest change of a value, >= 0.
        count: groups to change, one a step.
        groups: ``"pixels"``: all channels of a pixel of (B, C, H, W), single values in other
            shapes; or the number of each value's group, (d,) integers for a flattened sample.
        kind: what is linearized, the loss or the model; a ``"quadratic"`` step needs all columns
            of the Jacobian, in blocks.
        loss: for classifiers, ``"margin"``, ``"ce"``, ``"score"`` or a function
            ``(logits, y) -> (B,)`` to climb; by default the squared error.
        dither: linear only: radius of the random linf offset of each point of linearization; by
            default 0, but ``eps`` without a ``y``: where the output has not moved, neither has the
            gradient of its error.
        bounds: smallest and largest value of an input; part of the problem.
        seed: of the offset.
        observe: ``(step, state)``, called at each step with ``x_adv`` (after it), ``gain`` (B, S)
            of all groups (minus infinity for those used before) and the chosen ``group`` (B,).

    Returns:
        (B, ...) perturbed inputs inside ``bounds``, at most ``eps`` away under linf, with at most
        ``count`` groups changed.

    Raises:
        TypeError, ValueError: bad input; more steps than groups; groups that are not one integer
            for each value; a quadratic attack on a ``loss``.

    Source: Balda et al. (2018), (17)-(23), inside a box; chapter ``regression``.
    """
    if kind not in ("linear", "quadratic") or (kind == "quadratic" and loss is not None):
        raise ValueError(f"kind is 'linear', or 'quadratic' without a loss, not {kind!r}")
    if loss is None:
        check_outputs(model, x, y, bounds, eps, count=count)
    else:
        labels: Any = y
        check_inputs(model, x, labels, bounds=bounds, eps=eps, count=count)
    ids, table = _groups(x, groups)
    if count > len(table):
        raise ValueError(f"count is at most the number of groups, {len(table)}, not {count}")
    radius = (eps if y is None else 0.0) if dither is None else dither
    check_number("dither", radius)
    x, draws = x.detach(), generator(seed)
    watch, none = GradientWatch(x), torch.zeros(len(x), dtype=torch.bool, device=x.device)
    used = torch.zeros(len(x), len(table), dtype=torch.bool, device=x.device)
    x_adv = x.clone()
    with torch.no_grad(), eval_mode(model):
        goal = model(x.clone()) if y is None else y
        value = _at(model, goal, _error if loss is None else objective(loss))
        for step in range(count):
            if kind == "linear":
                offset = noise(x, radius, "linf", generator=draws)
                _, h = input_gradient(value, (x_adv + offset).clamp(*bounds))
                h = watch.see(h, none)
                move = linear_oracle(h, "linf", eps, box=room(x_adv, bounds))
                gain = torch.zeros_like(used, dtype=x.dtype)
                gain = gain.index_add(1, ids, (h * move).flatten(1))
            else:
                move, other, gain, slopes = _best_corners(model, x_adv, goal, eps, bounds, table)
                watch.see(slopes, none)
            gain = gain.nan_to_num(0.0, 0.0, 0.0).masked_fill(used, -math.inf)
            group = gain.argmax(dim=1, keepdim=True)
            used = used.scatter(1, group, True)
            mine = (ids == group).view_as(x)
            ahead = torch.where(mine, (x_adv + move).clamp(*bounds), x_adv)
            if kind == "quadratic":
                back = torch.where(mine, (x_adv + other).clamp(*bounds), x_adv)
                ahead = torch.where(
                    expand(value(back.clone()) > value(ahead.clone()), x), back, ahead
                )
            x_adv = ahead
            if observe is not None:
                observe(step, {"x_adv": x_adv, "gain": gain, "group": group.squeeze(1)})
    if eps:  # else there was nowhere to go
        watch.report("subset()")
    return x_adv


def random_perturbation(
    x: Float[Tensor, "B ..."],
    *,
    eps: float,
    norm: Literal["l2", "linf", "pixels"] = "linf",
    count: int = 1,
    bounds: Bounds = (0.0, 1.0),
    seed: int = 0,
) -> Float[Tensor, "B ..."]:
    r"""The baselines: noise of length ``eps``, or of size ``eps`` at every value or a few pixels.

    Args:
        x: (B, ...) inputs inside ``bounds``.
        eps: length under l2; else the size of each changed value, >= 0.
        norm: ``"l2"``: $\varepsilon w/\|w\|_2$, $w$ normal; ``"linf"``: $\pm\varepsilon$ at random;
            ``"pixels"``: the same at ``count`` random pixels, all channels of each.
        count: pixels changed, under ``"pixels"``.
        bounds: smallest and largest value of an input; the result is clipped to them.
        seed: of the noise.

    Returns:
        (B, ...) noisy inputs inside ``bounds``.

    Raises:
        TypeError, ValueError: bad input; another norm; more pixels than there are.

    Source: Balda et al. (2018), section 6.2; chapter ``regression``.
    """
    check_range(x, bounds)
    check_number("eps", eps)
    check_count("count", count)
    if norm not in ("l2", "linf", "pixels"):
        raise ValueError(f"norm is 'l2', 'linf' or 'pixels', not {norm!r}")
    draws, x = generator(seed), x.detach()
    if norm == "l2":
        return (x + noise(x, eps, "l2", "sphere", generator=draws)).clamp(*bounds)
    delta = noise(x, eps, "linf", "sign", generator=draws)
    if norm == "pixels":
        ids, table = _groups(x, "pixels")
        if count > len(table):
            raise ValueError(f"count is at most the number of pixels, {len(table)}, not {count}")
        keys = torch.rand(len(x), len(table), generator=draws, device="cpu")
        rank = keys.argsort(dim=1).argsort(dim=1)
        delta = torch.where((rank.to(x.device) < count)[:, ids].view_as(x), delta, 0.0)
    return torch.where(delta == 0, x, (x + delta).clamp(*bounds))


# ---------------------------------------------------------------------------------- shared steps


class _Frame:
    r"""The model as a function of $s$, $\delta=m+h\odot s$.

    With ``corners`` the part of the box within ``eps`` is $s\in[-1,1]^d$. A convex function on it
    is largest at a vertex: a quadratic problem in a box is one of signs like the problem without
    the box, with scaled columns and another offset. Otherwise $\delta=s$.
    """

    def __init__(
        self, model: Model, x: Tensor, eps: float, bounds: Bounds, *, corners: bool
    ) -> None:
        low, high = room(x, bounds)
        low, high = low.clamp_min(-eps), high.clamp_max(eps)
        self.half = (high - low) / 2 if corners else torch.ones_like(x)
        self.middle = (high + low) / 2 if corners else torch.zeros_like(x)
        self.shift = self.middle / torch.where(self.half > 0, self.half, 1.0)
        self.x, self.bounds = x, bounds
        self.jacobian = Jacobian(
            lambda s: model(x.clone() + self.half.clone() * s), torch.zeros_like(x)
        )

    def point(self, s: Tensor) -> Tensor:
        return (self.x + self.middle + self.half * s).clamp(*self.bounds)

    def offset(self, residual: Tensor) -> Tensor:
        """What a product of the Jacobian with ``s`` is added to: residual and middle."""
        return residual + self.jacobian.jvp(self.shift)


def _both(s: Tensor) -> Iterable[Tensor]:
    return s, -s


def _default(x: Tensor) -> Rule:
    return "greedy" if x[0].numel() <= GREEDY else "iterate"


def _random_like(x: Tensor, seed: int, *stream: int) -> Tensor:
    return drawn(torch.randn, x.shape, x, generator(seed, *stream))


def _error(out: Tensor, y: Tensor) -> Float[Tensor, " B"]:
    return (out - y).flatten(1).square().sum(dim=1)


def _at(model: Model, y: Tensor, loss: Loss) -> Callable[[Tensor], Tensor]:
    """The loss as a function of the input."""
    return lambda z: loss(model(z), y.clone())  # no inference tensor may enter the graph


def _corner_signs(
    J: Jacobian, offset: Tensor, search: bool, steps: int, tol: float, seed: int
) -> Tensor:
    """Greedy signs; or the better of these and the singular vector's, both improved by flips."""
    signs = greedy_signs(J, offset)
    if search:
        v = singular(J, steps=steps, tol=tol, seed=seed).vector
        wrong = (J.jvp(v) * offset).flatten(1).sum(dim=1, keepdim=True) < 0
        other = torch.where((v.flatten(1) < 0) ^ wrong, -1.0, 1.0).to(signs.dtype)
        signs, other = flip_search(J, signs, offset), flip_search(J, other, offset)
        one, two = ((J.jvp(s) + offset).flatten(1).square().sum(1) for s in (signs, other))
        signs = torch.where((two > one)[:, None], other, signs)
    return signs.view_as(J.x)


def _best_entry(J: Jacobian, offset: Tensor, eps: float, box: Box) -> Tensor:
    r"""The single value $\delta_k$ with the largest $2b_k\delta_k+\delta_k^2\|J_k\|_2^2$."""
    b, squares = J.vjp(offset).flatten(1), J.column_squares
    ends = [side.flatten(1).clamp(-eps, eps) for side in reversed(box)]
    gain = torch.cat([2 * b * end + squares * end.square() for end in ends], dim=1)
    index = gain.argmax(dim=1, keepdim=True)
    end = torch.cat(ends, dim=1).gather(1, index)
    return torch.zeros_like(b).scatter(1, index % b.shape[1], end).view_as(box[0])


def _groups(x: Tensor, groups: Any) -> tuple[Int[Tensor, " d"], Int[Tensor, "S Z"]]:
    """The group of each value, numbered from 0, and the values of each group, padded with -1."""
    d = x[0].numel()
    if isinstance(groups, str) and groups == "pixels":
        ids = torch.arange(d, device=x.device) % (x[0, 0].numel() if x.ndim == 4 else d)
    elif isinstance(groups, Tensor) and groups.dtype == torch.int64 and groups.shape == (d,):
        ids = groups.to(x.device).unique(return_inverse=True)[1]
    else:
        raise ValueError(f"groups is 'pixels' or an int64 tensor of shape ({d},), not {groups!r}")
    sizes = ids.bincount()
    order = ids.argsort(stable=True)
    place = torch.arange(d, device=x.device) - (sizes.cumsum(0) - sizes)[ids[order]]
    table = torch.full((len(sizes), int(sizes.max())), -1, device=x.device)
    table[ids[order], place] = order
    return ids, table


def _best_corners(
    model: Model, x: Tensor, y: Tensor, eps: float, bounds: Bounds, table: Int[Tensor, "S Z"]
) -> tuple[Tensor, Tensor, Float[Tensor, "B S"], Float[Tensor, "B S"]]:
    """The best vertex of each group's box and its opposite, (B, ...), and what each alone gains.

    And of each group the largest derivative of an output, by which a flat model is told from one
    whose best vertex is where it stands.
    """
    frame = _Frame(model, x, eps, bounds, corners=True)
    J, shift = frame.jacobian, frame.shift.flatten(1)
    solve = best_signs if table.shape[1] <= ENUMERATED else greedy_signs
    residual = (J.value - y).flatten(1)[:, None]
    s, gains, slopes = torch.zeros_like(shift), [], []
    for block in table.split(max(1, J.chunk // table.shape[1])):
        there, index = block >= 0, block.clamp_min(0)
        columns = J.columns(index.flatten()).unflatten(2, index.shape).transpose(1, 2)
        columns, shifts = columns * there[:, None], shift[:, index] * there
        moved = torch.einsum("bgkz,bgz->bgk", columns, shifts)
        signs = solve(columns.flatten(0, 1), (residual + moved).flatten(0, 1)).view_as(shifts)
        image = moved + torch.einsum("bgkz,bgz->bgk", columns, signs)
        gains.append((2 * residual * image + image.square()).sum(2))
        slopes.append(columns.abs().amax(dim=(2, 3)))
        s[:, index[there]] = signs[:, there]
    ahead = frame.half * s.view_as(x)
    vertices = frame.middle + ahead, frame.middle - ahead
    return *vertices, torch.cat(gains, dim=1), torch.cat(slopes, dim=1)
