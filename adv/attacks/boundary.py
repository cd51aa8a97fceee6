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
    check_number,
    check_seed,
    class_gradients,
    eval_mode,
    expand,
    is_adversarial,
    settled,
)
from adv.geometry import Norm, dual_norm, exponent, steepest
from adv.geometry import norm as norm_of

__all__ = ["boundary_step", "deepfool"]


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
    $r=\frac{|F_j|}{\|w_j\|_q^q}\operatorname{sign}(w_j)\odot|w_j|^{q-1}$, clipped to the bounds,
    and the model linearized anew. The search of a sample ends at the first adversarial point among
    the iterates $x+r$ and the points $x+(1+\eta)r$; of the last step only the second is looked at.
    On an affine model one step is exact, as long as the bounds stay away.

    Toward a target $t$ the same is done with the halfspaces $f_t>f_j$, stepping onto the farthest
    boundary of those that are violated; this reaches the target's region, not its nearest point.

    Args:
        model: ``(B, ...) -> (B, K)`` logits.
        x: (B, ...) inputs inside ``bounds``.
        y: (B,) true labels, or targets where ``targeted``.
        norm: ``"l2"``, ``"linf"``, or any number $p>1$.
        steps: linearizations at most, each with two forward passes and K backward passes (batched).
        overshoot: $\eta\ge0$, how far beyond the boundary to look.
        targeted: whether ``y`` is the class wanted.
        bounds: smallest and largest value of an input.
        seed: not used, since nothing is drawn; every attack takes one.
        observe: ``(step, state)``, called at each step with ``x_adv`` (the iterate), ``logits`` and
            ``distance``, the (B, K) linearized distances.

    Returns:
        (B, ...) adversarial inputs inside ``bounds``; ``x`` itself where it is adversarial already
        or nothing was found.

    Raises:
        TypeError, ValueError: bad input, as ``check_inputs`` says; p = 1; a negative overshoot.

    Source: Moosavi-Dezfooli et al. (2016); Matyasko (2020), (2.18) as corrected by errata 10;
    chapter ``first_example``.
    """
    check_seed(seed)
    check_inputs(model, x, y, targeted=targeted, nearest=True, bounds=bounds, steps=steps)
    if exponent(norm) == 1:
        raise ValueError("deepfool() needs p > 1: the closed form's powers end there")
    check_number("overshoot", overshoot)
    x, watch, x_adv = x.detach(), GradientWatch(x), x.detach()
    best = Best(x)

    def keep(point: Tensor, logits: Tensor) -> None:
        adversarial = is_adversarial(logits, y, targeted)
        best.update(point, norm_of(point - x, norm), adversarial & ~best.found)

    with torch.no_grad(), eval_mode(model):
        for step in range(steps):
            logits, jacobian = class_gradients(model, x_adv)
            keep(x_adv, logits)
            jacobian = watch.see(jacobian, best.found)
            r, distance = boundary_step(logits, jacobian, y, norm, targeted)
            if observe is not None:
                observe(step, {"x_adv": x_adv, "logits": logits, "distance": distance})
            x_adv = (x_adv + r).clamp(*bounds)
            beyond = (x + (1 + overshoot) * (x_adv - x)).clamp(*bounds)
            keep(beyond, model(beyond.clone()))
            if settled(best.found, step):
                break
    watch.report("deepfool()")
    return best.x_adv


def boundary_step(
    logits: Float[Tensor, "B K"],
    jacobian: Float[Tensor, "B K ..."],
    y: Int[Tensor, " B"],
    norm: Norm,
    targeted: bool = False,
) -> tuple[Float[Tensor, "B ..."], Float[Tensor, "B K"]]:
    r"""The smallest step onto a boundary of the linearized model, and the distances to all of them.

    The boundary with class $j$ is the hyperplane $F_j+w_j^\top\delta=0$; the step onto it is its
    distance $|F_j|/\|w_j\|_q$ times the steepest unit direction of $w_j$. It aims beyond the
    boundary by the tolerance below which a margin does not count.

    Args:
        logits: (B, K) at the point of linearization.
        jacobian: (B, K, ...) class gradients there.
        y: (B,) true labels, or targets where ``targeted``.
        norm: ``"l2"``, ``"linf"``, or any number $p>1$.
        targeted: step onto the farthest boundary that parts the point from class ``y``.

    Returns:
        Steps (B, ...), zero where every $w_j=0$, and distances (B, K), infinite where $w_j=0$.

    Source: Matyasko (2020), (2.18) as corrected by errata 10; chapter ``first_example``.
    """
    own, rows = y[:, None], torch.arange(len(y), device=y.device)
    score = logits - logits.gather(1, own)
    w = jacobian - jacobian[rows, y][:, None]
    beyond = 2 * TOLERANCE * logits.abs().amax(dim=1, keepdim=True)
    gap = (score + beyond).clamp_min(0) if targeted else score.abs() + beyond
    slope = dual_norm(w.flatten(0, 1), norm).view_as(gap)
    distance = torch.where(slope > 0, gap / slope, math.inf).scatter(1, own, math.inf)
    reachable = torch.where(distance < math.inf, distance, 0.0)
    chosen = reachable.argmax(dim=1) if targeted else distance.argmin(dim=1)
    direction = steepest(w[rows, chosen], norm)
    length = reachable[rows, chosen].to(direction.dtype)
    return expand(-length if targeted else length, direction) * direction, distance
