"""Attacks that solve a convex program: linearize an objective, step as far as a norm ball allows.

The linear problem over the ball is solved in closed form (``geometry``); here are the two programs
on a margin, the iteration of the first one (Algorithms 1, 1-T and 2 of the source), what it takes
for granted (the radius of a margin), and surrogates for models that cannot be differentiated.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from numbers import Real
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from adv.attacks.common import (
    Bounds,
    GradientWatch,
    Model,
    Objective,
    Observe,
    check_count,
    check_inputs,
    check_number,
    check_range,
    class_gradients,
    eval_mode,
    expand,
    generator,
    input_gradient,
    is_adversarial,
    loss_gradient,
    margin,
    objective,
)
from adv.attacks.gradient import noise
from adv.geometry import Norm, dual_norm, exponent, linear_oracle, room, steepest

__all__ = ["ensemble", "gnm", "margin_radius", "margin_step", "successive_linearization"]

Radii = float | Sequence[float]
Tangent = Callable[[Tensor], tuple[dict[str, Tensor], Tensor, Tensor]]
"""A point (B, ...) to what is known there, the gradient (B, ...), and who is done (B,)."""


# ------------------------------------------------------------------------------ the two programs


def gnm(
    model: Model,
    x: Float[Tensor, "B ..."],
    y: Int[Tensor, " B"],
    *,
    eps: float,
    norm: Norm = "linf",
    steps: int = 1,
    loss: Objective = "margin",
    dither: Radii = 0.0,
    targeted: bool = False,
    bounds: Bounds = (0.0, 1.0),
    seed: int = 0,
    observe: Observe | None = None,
) -> Float[Tensor, "B ..."]:
    r"""Gradient-based norm-constrained method: Algorithm 1 (``steps=1``), 1-T and 2 of the source.

    Each step maximizes the linearized loss over a ball of radius $\varepsilon/T$:
    $\delta^{t+1}=\delta^t+\frac{\varepsilon}{T}v_p(\nabla L(x+\delta^t+\xi^t))$, $\xi^t$ a random
    offset of the expansion point. By the triangle inequality $\|\delta^T\|_p\le\varepsilon$ without
    a projection, whatever the offsets. The last point is returned, not the worst one seen.

    Args:
        model: ``(B, ...) -> (B, K)`` logits.
        x: (B, ...) inputs inside ``bounds``.
        y: (B,) true (or predicted) labels, or targets where ``targeted``.
        eps: radius of the ball, >= 0, in the units of ``x``.
        norm: the ball: ``"linf"``, ``"l2"``, ``"l1"`` or any number $p\ge1$.
        steps: $T$, each one forward and one backward pass.
        loss: what is linearized: ``"margin"`` (Algorithms 1 and 1-T), ``"score"`` (minus the
            label's logit, Algorithm 2), ``"ce"`` (FGSM, BIM), or a function ``(logits, y)``.
        dither: radii of the offsets, uniform in the ball of ``norm``, at the first steps; a number
            is the first step's alone. 0 where none is given.
        targeted: climb toward the targets instead: ``"margin"`` then is
            $f_t-\max_{j\ne t}f_j$, not the pairwise difference of the source (E8).
        bounds: smallest and largest value of an input; a step is the best one within them under
            linf, l2 and l1, and clipped to them under any other norm.
        seed: of the offsets.
        observe: ``(step, state)``, called at each step with ``x_adv`` (before the step), ``point``
            (where the loss was linearized), ``logits`` and ``gradient`` there.

    Returns:
        (B, ...) perturbed inputs, at most ``eps`` away and inside ``bounds``.

    Raises:
        TypeError, ValueError: bad input, as ``check_inputs`` says; more radii than steps.

    Source: Balda et al. (2018), (5)-(7), (10) and Algorithm 1 as corrected by E5; chapter
    ``convex``.
    """
    check_inputs(model, x, y, bounds=bounds, eps=eps, steps=steps)
    climb = objective(loss, targeted)

    def tangent(z: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        logits, gradient = loss_gradient(model, z, y, climb)
        return {"logits": logits}, gradient, is_adversarial(logits, y, targeted)

    with eval_mode(model):
        return dithered_ascent(x, tangent, "gnm()", eps, norm, steps, dither, bounds, seed, observe)


def successive_linearization(
    objective: Callable[[Tensor], Tensor],
    x: Float[Tensor, "B ..."],
    *,
    eps: float,
    norm: Norm = "linf",
    steps: int = 1,
    dither: Radii = 0.0,
    bounds: Bounds = (0.0, 1.0),
    seed: int = 0,
    observe: Observe | None = None,
) -> Float[Tensor, "B ..."]:
    r"""The iteration of ``gnm`` for any objective to maximize, a regression error for one.

    Args:
        objective: ``x (B, ...) -> (B,)``, value ``i`` depending on sample ``i`` only; networks in
            it are run in evaluation mode.
        x: (B, ...) inputs inside ``bounds``.
        eps: radius of the ball, >= 0, in the units of ``x``.
        norm: ``"linf"``, ``"l2"``, ``"l1"`` or any number $p\ge1$.
        steps: $T$.
        dither: radii of the random offsets at the first steps, as in ``gnm``.
        bounds: smallest and largest value of an input.
        seed: of the offsets.
        observe: ``(step, state)``, called at each step with ``x_adv``, ``point``, ``value`` and
            ``gradient``.

    Returns:
        (B, ...) the last point, at most ``eps`` away and inside ``bounds``.

    Raises:
        TypeError, ValueError: bad input; more radii than steps; an objective without one value for
            each sample.

    Source: Balda et al. (2018), (16) and Algorithm 1; chapters ``convex`` and ``regression``.
    """
    check_range(x, bounds)
    check_number("eps", eps)
    check_count("steps", steps)
    tangent, name = linearized(objective), "successive_linearization()"
    with eval_mode(objective):
        return dithered_ascent(x, tangent, name, eps, norm, steps, dither, bounds, seed, observe)


def margin_step(
    value: Float[Tensor, " B"], gradient: Float[Tensor, "B ..."], norm: Norm
) -> Float[Tensor, "B ..."]:
    r"""Smallest step onto the boundary of the linearized margin: (8) and (9), corrected.

    $\min\|\delta\|_p$ subject to $L+g^\top\delta\le0$ has the solution
    $\delta=-\frac{L}{\|g\|_q}v_p(g)$, of norm $L/\|g\|_q$, where $L>0$, and 0 elsewhere.

    Args:
        value: (B,) margins $L$.
        gradient: (B, ...) their gradients $g$.
        norm: ``"linf"``, ``"l2"``, ``"l1"`` or any number $p\ge1$.

    Returns:
        (B, ...) steps; 0 where the margin is not positive, or where $g=0$ and no step helps.

    Raises:
        ValueError: not one margin for each gradient; an unknown norm.

    Source: Balda et al. (2018), Proposition 1 with the exponent of E1; chapter ``convex``.
    """
    slope = dual_norm(gradient, norm)
    if value.shape != slope.shape:
        raise ValueError(f"margins are of shape {tuple(slope.shape)}, not {tuple(value.shape)}")
    length = torch.where(slope > 0, value.clamp_min(0) / slope, 0.0)
    return -expand(length, gradient) * steepest(gradient, norm)


def margin_radius(
    model: Model,
    x: Float[Tensor, "B ..."],
    y: Int[Tensor, " B"],
    *,
    norm: Norm = "linf",
    nearest: bool = False,
    bounds: Bounds = (0.0, 1.0),
) -> Float[Tensor, " B"]:
    r"""Distance to the boundary of the linearized margin, $L/\|\nabla L\|_q$ with $L=m_y(x)$.

    Below this radius the linearized program has no solution (Theorem 1). Its mean over predicted
    labels is the source's $\hat\rho_2$. The margin's gradient knows the runner-up only, so that
    another class may be nearer (E2): ``nearest`` takes the smallest
    $(f_y-f_j)/\|\nabla(f_y-f_j)\|_q$ over all classes $j$.

    Args:
        model: ``(B, ...) -> (B, K)`` logits; scores of another scale give another value (E4).
        x: (B, ...) inputs inside ``bounds``.
        y: (B,) labels, usually the predicted ones.
        norm: ``"linf"``, ``"l2"``, ``"l1"`` or any number $p\ge1$.
        nearest: consider every class instead of the runner-up; K backward passes in one.
        bounds: smallest and largest value of an input; they are checked, not used.

    Returns:
        (B,) radii in the units of ``x``; negative where the margin is, infinite where the gradient
        vanishes, NaN where it is.

    Raises:
        TypeError, ValueError: bad input, as ``check_inputs`` says.

    Source: Balda et al. (2018), Theorem 1 and $\hat\rho_2$; chapter ``convex``.
    """
    check_inputs(model, x, y, bounds=bounds)
    with eval_mode(model):
        if not nearest:
            logits, gradient = loss_gradient(model, x, y, margin)
            gap, slope = margin(logits, y)[:, None], dual_norm(gradient, norm)[:, None]
        else:
            logits, jacobian = class_gradients(model, x)
            rows = torch.arange(len(y), device=y.device)
            gap = logits[rows, y][:, None] - logits
            w = jacobian[rows, y][:, None] - jacobian
            slope = dual_norm(w.flatten(0, 1), norm).view_as(gap)
    radius = torch.where(slope == 0, math.inf, gap / slope)
    if nearest:
        radius = radius.scatter(1, y[:, None], math.inf)
    return radius.amin(dim=1)


# ------------------------------------------------------------------------------------ surrogates


def ensemble(models: Sequence[Model], weights: Sequence[float] | None = None) -> Model:
    r"""One model out of several: $\log\sum_i\alpha_i\operatorname{softmax}f_i(x)$.

    An attack on it needs no gradient of the model it is meant for, only of these.

    Args:
        models: each ``(B, ...) -> (B, K)`` logits, with the same K.
        weights: $\alpha_i>0$, finite; they are scaled to sum to 1. Equal by default.

    Returns:
        ``(B, ...) -> (B, K)`` logits. Modules among the models are run in evaluation mode, and have
        their own mode back afterwards.

    Raises:
        TypeError: one model instead of a sequence of them.
        ValueError: no models, weights that are not positive numbers or not one for each model.

    Source: Balda et al. (2018), Table 2, "ensemble"; Liu et al. (2017); chapter ``convex``.
    """
    if not isinstance(models, Sequence | nn.ModuleList):
        raise TypeError(f"models is a sequence of models, not {type(models).__name__}")
    share = torch.ones(len(models)) if weights is None else torch.as_tensor(weights)
    fit = share.shape == (len(models),) and bool(((share > 0) & share.isfinite()).all())
    if not models or not fit:
        raise ValueError("ensemble() needs models and one positive weight for each of them")
    logs = (share / share.sum()).log().tolist()

    def together(x: Tensor) -> Tensor:
        with ExitStack() as stack:
            for model in models:
                stack.enter_context(eval_mode(model))
            parts = [
                model(x.clone()).log_softmax(1) + log
                for model, log in zip(models, logs, strict=True)
            ]
        return torch.stack(parts).logsumexp(dim=0)

    return together


# ----------------------------------------------------------------------------------- the iteration


def linearized(objective: Callable[[Tensor], Tensor]) -> Tangent:
    """The linearization of an objective to maximize, for which no sample is ever done.

    Args:
        objective: ``x (B, ...) -> (B,)``, value ``i`` depending on sample ``i`` only.

    Returns:
        What ``dithered_ascent`` takes; it tells an observer the ``value`` (B,).
    """

    def tangent(z: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        value, gradient = input_gradient(objective, z)
        return {"value": value}, gradient, torch.zeros_like(value, dtype=torch.bool)

    return tangent


def dithered_ascent(
    x: Float[Tensor, "B ..."],
    tangent: Tangent,
    name: str,
    eps: float,
    norm: Norm,
    steps: int,
    dither: Radii,
    bounds: Bounds,
    seed: int,
    observe: Observe | None,
) -> Float[Tensor, "B ..."]:
    """Steps of length ``eps / steps``, each the best one for the tangent at a dithered point.

    What ``gnm``, ``successive_linearization`` and ``regression.linear`` have in common; they check
    the input and choose the modes.

    Args:
        x: (B, ...) inputs inside ``bounds``.
        tangent: a point (B, ...) to what an observer is told of it, the gradient (B, ...) there,
            and which samples (B,) are done.
        name: the public function that calls this one; warnings point at that function's caller.
        eps: radius of the ball, >= 0, in the units of ``x``.
        norm: ``"linf"``, ``"l2"``, ``"l1"`` or any number >= 1.
        steps: number of steps.
        dither: radii of the random offsets at the first steps.
        bounds: smallest and largest value of an input.
        seed: of the offsets.
        observe: ``(step, state)``, called at each step with ``x_adv``, ``point``, ``gradient`` and
            what the tangent tells.

    Returns:
        (B, ...) the last point, at most ``eps`` away and inside ``bounds``.

    Raises:
        TypeError, ValueError: a bad norm or seed, bad radii or more of them than steps.
    """
    radii, draws, watch = _radii(dither, steps), generator(seed), GradientWatch(x)
    boxed, x = exponent(norm) in (1.0, 2.0, math.inf), x.detach()
    x_adv = x
    for step in range(steps):
        point = x_adv
        if radii[step]:
            offset = noise(x, radii[step], norm, generator=draws)
            point = (x_adv + offset).clamp(*bounds)
        known, gradient, done = tangent(point)
        gradient = watch.see(gradient, done)
        if observe is not None:
            observe(step, {"x_adv": x_adv, "point": point, "gradient": gradient, **known})
        box = room(x_adv, bounds) if boxed else None
        move = linear_oracle(gradient, norm, eps / steps, box=box)
        x_adv = (x_adv + move).clamp(*bounds)
    if eps:  # else there was nowhere to go
        watch.report(name, 4)
    return x_adv


def _radii(dither: Any, steps: int) -> list[float]:
    """One radius for each step; 0 for those that are not named."""
    if isinstance(dither, str) or not isinstance(dither, Real | Sequence):
        raise TypeError(f"dither is a radius or a sequence of radii, not {dither!r}")
    radii: list[Any] = [dither] if isinstance(dither, Real) else list(dither)
    if len(radii) > steps:
        raise ValueError(f"dither has {len(radii)} radii for {steps} steps")
    for radius in radii:
        check_number("dither", radius)
    return [float(radius) for radius in radii] + [0.0] * (steps - len(radii))
