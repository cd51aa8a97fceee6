"""Attacks that walk to the nearest decision boundary: DeepFool."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from adv.attacks.common import (
    TOLERANCE,
    Best,
    Bounds,
    GradientWatch,
    Model,
    Observe,
    check_inputs,
    class_gradients,
    eval_mode,
    generator,
    is_adversarial,
    settled,
)
from adv.geometry import Box, Norm, dual_norm, exponent, room, steepest
from adv.geometry import norm as length

__all__ = ["deepfool", "hyperplane_step"]


def deepfool(
    model: Model,
    x: Float[Tensor, "B ..."],
    y: Int[Tensor, " B"],
    *,
    norm: Norm = "l2",
    steps: int = 50,
    overshoot: float = 0.02,
    targeted: bool = False,
    bounds: Bounds = (0.0, 1.0),
    seed: int = 0,
    observe: Observe | None = None,
) -> Float[Tensor, "B ..."]:
    r"""DeepFool: step to the nearest boundary of the linearized model, until the label changes.

    With $w_j=\nabla f_j-\nabla f_y$ and $F_j=f_j-f_y$, the boundary with class $j$ is the
    hyperplane $F_j+w_j^\top r=0$, at distance $|F_j|/\|w_j\|_q$; the nearest one is stepped onto,
    $r=\frac{|F_j|}{\|w_j\|_q^q}\operatorname{sign}(w_j)\odot|w_j|^{q-1}$. Distances and steps
    respect the bounds (``hyperplane_step``). The search of a sample ends at the first adversarial
    point among the iterates $x+r$ and the points $x+(1+\eta)r$. On an affine model the first step
    finds the exact minimum.

    Toward a target $t$ the same is done with the halfspaces $f_t>f_j$, stepping onto the farthest
    of those that are violated; this finds the target's region but not its nearest point.

    Args:
        model: ``(B, ...) -> (B, K)`` logits.
        x: (B, ...) inputs inside ``bounds``.
        y: (B,) true labels, or targets where ``targeted``.
        norm: ``"l2"``, ``"linf"``, or any number $p>1$.
        steps: linearizations at most, each with K backward passes (batched).
        overshoot: $\eta\ge0$, how far beyond the boundary to look.
        targeted: whether ``y`` is the class wanted.
        bounds: smallest and largest value of an input.
        seed: not used, since nothing is drawn; every attack takes one.
        observe: called at each step with ``x_adv`` (the iterate), ``logits`` and ``distance``, the
            (B, K) linearized distances.

    Returns:
        (B, ...) adversarial inputs inside ``bounds``; ``x`` itself where it is adversarial already
        or nothing was found.

    Raises:
        TypeError, ValueError: bad input, as ``check_inputs`` says; p = 1; a negative overshoot.

    Source: Moosavi-Dezfooli et al. (2016); Matyasko (2020), (2.18) as corrected by errata 10;
    chapter ``first_example``.
    """
    generator(seed)
    check_inputs(model, x, y, bounds=bounds, steps=steps)
    if exponent(norm) == 1:
        raise ValueError("deepfool() needs p > 1: the closed form's powers end there")
    if not (math.isfinite(overshoot) and overshoot >= 0):
        raise ValueError(f"overshoot is a finite number >= 0, not {overshoot!r}")
    x, watch, x_adv = x.detach(), GradientWatch(x), x.detach()
    best = Best(x)

    def keep(point: Tensor, logits: Tensor) -> None:
        adversarial = is_adversarial(logits, y, targeted)
        best.update(point, length(point - x, norm), adversarial & ~best.found)

    with torch.no_grad(), eval_mode(model):
        for step in range(steps):
            logits, jacobian = class_gradients(model, x_adv)
            keep(x_adv, logits)
            jacobian = watch.see(jacobian, best.found)
            r, distance = _nearest(logits, jacobian, y, norm, room(x_adv, bounds), targeted)
            if observe is not None:
                observe(step, {"x_adv": x_adv, "logits": logits, "distance": distance})
            x_adv = (x_adv + r).clamp(*bounds)
            beyond = (x + (1 + overshoot) * (x_adv - x)).clamp(*bounds)
            keep(beyond, model(beyond))
            if settled(best.found, step):
                break
    watch.report("deepfool()")
    return best.x_adv


def hyperplane_step(
    w: Float[Tensor, "N d"], gap: Float[Tensor, " N"], norm: Norm, box: Box
) -> tuple[Float[Tensor, "N d"], Float[Tensor, " N"]]:
    r"""The smallest step onto a hyperplane inside a box: $\min\|\delta\|_p$, $w^\top\delta=c$.

    $\delta_i=\operatorname{sign}(w_i)\min(\lambda|w_i|^{q-1},c_i)$, where $c_i$ is the room in the
    direction of $w_i$: all entries grow together, each until it meets its face. $w^\top\delta$ is
    concave and piecewise linear in $\lambda$, which is found by sorting the faces. While none is
    met, $\lambda=c/\|w\|_q^q$: the closed form without a box.

    Args:
        w: (N, d) normals.
        gap: (N,) what the step must gain, $c\ge0$.
        norm: any $p>1$, ``"l2"`` or ``"linf"``.
        box: its limits $lo\le0\le hi$, each (N, d).

    Returns:
        Steps (N, d) and their norms (N,). Where the box ends too early: the corner that gains most,
        and an infinite norm.

    Source: Moosavi-Dezfooli et al. (2016); Croce and Hein (2020) for the box; chapter
    ``first_example``.
    """
    v = steepest(w, norm)
    speed, cap = v.abs(), torch.where(w > 0, box[1], -box[0])
    meets = torch.where(speed > 0, cap / speed, math.inf)
    meets, order = meets.sort(dim=1)
    start = torch.zeros_like(gap)[:, None]
    weight = w.abs().gather(1, order)
    # Before the k-th face is met, the first k entries stand still and the others still move.
    gained = torch.cat([start, (weight * cap.gather(1, order)).cumsum(dim=1)], dim=1)
    rates = (weight * speed.gather(1, order)).flip(1).cumsum(dim=1).flip(1)
    rates = torch.cat([rates, start], dim=1)
    reached = gained[:, :-1] + torch.where(rates[:, :-1] > 0, meets * rates[:, :-1], 0.0)
    met = (reached < gap[:, None]).sum(dim=1, keepdim=True)
    enough = met < w.shape[1]
    level = (gap[:, None] - gained.gather(1, met)).clamp_min(0) / rates.gather(1, met)
    level = torch.where(enough, level, math.inf)
    delta = v.sign() * torch.where(speed > 0, torch.minimum(level * speed, cap), 0.0)
    return delta, torch.where(enough.squeeze(1), length(delta, norm), math.inf)


def _nearest(
    logits: Tensor, jacobian: Tensor, y: Tensor, norm: Norm, box: Box, targeted: bool
) -> tuple[Tensor, Tensor]:
    """The step to one linearized boundary (B, ...), and the distances to all of them (B, K)."""
    count, classes = logits.shape
    own, rows = y[:, None], jacobian.flatten(2)
    w = rows - rows.gather(1, own[:, :, None].expand(-1, -1, rows.shape[2]))
    score = logits - logits.gather(1, own)
    beyond = 2 * TOLERANCE * logits.abs().amax(dim=1, keepdim=True)  # ties do not count
    gap = (score + beyond).clamp_min(0) if targeted else score.abs() + beyond
    w = (-w if targeted else w).flatten(0, 1)
    limits = [side.flatten(1).repeat_interleave(classes, dim=0) for side in box]
    step, distance = hyperplane_step(w, gap.flatten(), norm, (limits[0], limits[1]))
    # Boundaries out of the box's reach come after all others, by their distance without a box.
    reach = length(box[1] - box[0], norm)[:, None]
    free = gap / dual_norm(w, norm).view_as(gap)
    distance = distance.view_as(gap)
    rank = torch.where(distance < math.inf, distance, reach + free)
    rank = rank.scatter(1, own, -math.inf if targeted else math.inf)
    chosen = rank.argmax(dim=1) if targeted else rank.argmin(dim=1)
    picked = step.view(count, classes, -1)[torch.arange(count, device=y.device), chosen]
    return picked.view_as(box[0]), distance
