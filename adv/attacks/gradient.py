"""Attacks inside a norm ball that follow the loss gradient, and the noise to compare them with.

FGSM takes one step, PGD many with a projection after each; random noise takes none.
"""

import math
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.special import gammaincinv
from torch import Tensor

from adv.attacks.common import (
    Best,
    Bounds,
    GradientWatch,
    Model,
    Objective,
    Observe,
    check_inputs,
    check_number,
    check_seed,
    eval_mode,
    expand,
    generator,
    is_adversarial,
    loss_gradient,
    margin,
    objective,
)
from adv.geometry import Box, Norm, exponent, linear_oracle, project, room, steepest
from adv.geometry import norm as norm_of

__all__ = ["Noise", "fgsm", "noise", "pgd", "random_noise", "sparse_step"]

Noise = Literal["ball", "sphere", "sign"]
EXACT = (1.0, 2.0, math.inf)
"""The exponents whose balls can be projected onto."""


def fgsm(
    model: Model,
    x: Float[Tensor, "B ..."],
    y: Int[Tensor, " B"],
    *,
    eps: float,
    norm: Norm = "linf",
    loss: Objective = "ce",
    targeted: bool = False,
    bounds: Bounds = (0.0, 1.0),
    seed: int = 0,
    observe: Observe | None = None,
) -> Float[Tensor, "B ..."]:
    r"""Fast gradient (sign) method: one steepest step of length ``eps``, clipped to the bounds.

    $x_{adv}=\operatorname{clip}(x+\varepsilon\,v_p(\nabla_x\ell))$, with $v_p$ the steepest unit
    step; under linf $v_p=\operatorname{sign}$. Exact on affine models with two classes as long as
    no bound is active (under linf, in any box).

    Args:
        model: ``(B, ...) -> (B, K)`` logits.
        x: (B, ...) inputs inside ``bounds``.
        y: (B,) true labels, or targets where ``targeted``.
        eps: radius of the ball, >= 0, in the units of ``x``.
        norm: the ball: ``"linf"``, ``"l2"``, ``"l1"`` or any number $p\ge1$.
        loss: what grows as samples stop looking like ``y``: ``"ce"``, ``"margin"``, ``"score"``
            (minus the label's logit) or a function.
        targeted: descend the loss of the targets instead.
        bounds: smallest and largest value of an input.
        seed: not used, since nothing is drawn; every attack takes one.
        observe: ``(step, state)``, called once with the step 0 and ``x_adv``, ``logits``,
            ``gradient``.

    Returns:
        (B, ...) perturbed inputs, at most ``eps`` away and inside ``bounds``.

    Raises:
        TypeError, ValueError: bad input, as ``check_inputs`` says.

    Source: Goodfellow et al. (2015); Matyasko (2020), (2.16)-(2.17); chapter ``first_example``.
    """
    check_seed(seed)
    check_inputs(model, x, y, targeted=targeted, bounds=bounds, eps=eps)
    climb, watch = objective(loss, targeted), GradientWatch(x)
    exponent(norm)
    with eval_mode(model):
        logits, gradient = loss_gradient(model, x, y, climb)
    gradient = watch.see(gradient, is_adversarial(logits, y, targeted))
    x_adv = (x.detach() + eps * steepest(gradient, norm)).clamp(*bounds)
    if observe is not None:
        observe(0, {"x_adv": x_adv, "logits": logits, "gradient": gradient})
    watch.report("fgsm()")
    return x_adv


def pgd(
    model: Model,
    x: Float[Tensor, "B ..."],
    y: Int[Tensor, " B"],
    *,
    eps: float,
    norm: Norm = "linf",
    steps: int = 40,
    step_size: float | None = None,
    restarts: int = 1,
    random_start: bool = True,
    momentum: float = 0.0,
    sparsity: float = 0.99,
    loss: Objective = "ce",
    targeted: bool = False,
    bounds: Bounds = (0.0, 1.0),
    seed: int = 0,
    observe: Observe | None = None,
) -> Float[Tensor, "B ..."]:
    r"""Projected gradient: steepest steps, each followed by the exact projection onto ball and box.

    $x^{t+1}=\Pi_{B_p(x,\varepsilon)\cap box}\big(x^t+\alpha\,v_p(g^t)\big)$ with
    $g^t=\mu g^{t-1}+\nabla\ell/\|\nabla\ell\|_1$. Under l1 the step spreads over the largest
    entries of $g$ that have room to move. The worst point seen is returned: of all starts and
    steps, the one with the smallest margin (targeted: the largest margin of the target).

    Args:
        model: ``(B, ...) -> (B, K)`` logits.
        x: (B, ...) inputs inside ``bounds``.
        y: (B,) true labels, or targets where ``targeted``.
        eps: radius of the ball, >= 0, in the units of ``x``.
        norm: the ball: ``"linf"``, ``"l2"`` or ``"l1"``.
        steps: gradient steps of each start.
        step_size: $\alpha$ in the units of ``x``; by default ``2.5 * eps / steps``.
        restarts: random starts. Start ``k`` draws from a stream of its own, so that ten restarts
            visit what one restart visits, and more.
        random_start: start at a uniform point of the ball, projected onto ball and box; else at
            ``x`` (BIM).
        momentum: $\mu\ge0$; 1 with ``step_size=eps / steps`` and no random start is MI-FGSM.
        sparsity: l1 only: the share of entries that a step leaves alone, in [0, 1).
        loss: what grows as samples stop looking like ``y``: ``"ce"``, ``"margin"``, ``"score"``
            (minus the label's logit) or a function.
        targeted: descend the loss of the targets instead.
        bounds: smallest and largest value of an input.
        seed: of the random starts; under l2 and l1 a sample's depends on how many there are.
        observe: ``(step, state)``, called at each step (counted through all starts) with ``x_adv``,
            ``logits``, ``gradient`` at the point, and ``restart``.

    Returns:
        (B, ...) perturbed inputs, at most ``eps`` away and inside ``bounds``.

    Raises:
        TypeError, ValueError: bad input, as ``check_inputs`` says; another norm; several restarts
            without a random start; a step size, momentum or sparsity out of range.

    Source: Madry et al. (2018); Dong et al. (2018) for momentum; Tramer and Boneh (2019) for the l1
    step; Matyasko (2020), section 2.4; chapter ``first_example``.
    """
    check_inputs(
        model, x, y, targeted=targeted, bounds=bounds, eps=eps, steps=steps, restarts=restarts
    )
    alpha = 2.5 * eps / steps if step_size is None else step_size
    _check_settings(norm, alpha, momentum, sparsity, restarts if not random_start else 1)
    x = x.detach()
    box, climb, best, watch = room(x, bounds), objective(loss, targeted), Best(x), GradientWatch(x)
    with eval_mode(model):
        for restart in range(restarts):
            delta, g = torch.zeros_like(x), torch.zeros_like(x)
            draws = generator(seed, restart)
            if random_start:
                delta = project(noise(x, eps, norm, generator=draws), norm, eps, box=box)
            for step in range(steps):
                x_adv = (x + delta).clamp(*bounds)
                logits, gradient = loss_gradient(model, x_adv, y, climb)
                best.update(x_adv, _score(logits, y, targeted))
                gradient = watch.see(gradient, is_adversarial(logits, y, targeted))
                if observe is not None:
                    state = {"x_adv": x_adv, "logits": logits, "gradient": gradient}
                    observe(restart * steps + step, {**state, "restart": restart})
                g = momentum * g + _unit_l1(gradient) if momentum else gradient
                delta = delta + _step(g, delta, alpha, norm, box, sparsity)
                delta = project(delta, norm, eps, box=box)
            x_adv = (x + delta).clamp(*bounds)
            with torch.no_grad():
                best.update(x_adv, _score(model(x_adv.clone()), y, targeted))
    watch.report("pgd()")
    return best.x_adv


def random_noise(
    model: Model,
    x: Float[Tensor, "B ..."],
    y: Int[Tensor, " B"],
    *,
    eps: float,
    norm: Norm = "linf",
    draws: int = 1,
    kind: Noise = "sphere",
    targeted: bool = False,
    bounds: Bounds = (0.0, 1.0),
    seed: int = 0,
    observe: Observe | None = None,
) -> Float[Tensor, "B ..."]:
    """The baseline that every attack must beat: the worst of some random perturbations.

    Args:
        model: ``(B, ...) -> (B, K)`` logits.
        x: (B, ...) inputs inside ``bounds``.
        y: (B,) true labels, or targets where ``targeted``.
        eps: radius, >= 0, in the units of ``x``.
        norm: ``"linf"``, ``"l2"``, ``"l1"`` or any number p >= 1.
        draws: perturbations tried for each sample; draw ``k`` has a stream of its own.
        kind: law of the noise, as in ``noise``; then clipped to the bounds.
        targeted: keep the draw with the largest margin of the target.
        bounds: smallest and largest value of an input.
        seed: of the draws.
        observe: ``(step, state)``, called at each draw with ``x_adv`` and ``logits``.

    Returns:
        (B, ...) the draw with the smallest margin, inside ``bounds``.

    Raises:
        TypeError, ValueError: bad input, as ``check_inputs`` says; an unknown norm or kind.

    Source: chapter ``first_example``.
    """
    check_inputs(model, x, y, targeted=targeted, bounds=bounds, eps=eps, draws=draws)
    x, best = x.detach(), Best(x)
    with torch.no_grad(), eval_mode(model):
        for draw in range(draws):
            delta = noise(x, eps, norm, kind, generator=generator(seed, draw))
            x_adv = (x + delta).clamp(*bounds)
            logits = model(x_adv.clone())  # which a layer may change in place
            best.update(x_adv, _score(logits, y, targeted))
            if observe is not None:
                observe(draw, {"x_adv": x_adv, "logits": logits})
    return best.x_adv


def noise(
    x: Float[Tensor, "B ..."],
    eps: float,
    norm: Norm = "linf",
    kind: Noise = "ball",
    *,
    generator: torch.Generator,
) -> Float[Tensor, "B ..."]:
    r"""Random perturbations shaped like ``x``, drawn on the CPU and moved to its device.

    Args:
        x: (B, ...) only its shape, dtype and device matter.
        eps: radius in the units of ``x``.
        norm: ``"linf"``, ``"l2"``, ``"l1"`` or any number p >= 1.
        kind: ``"ball"``: uniform in the ball; ``"sphere"``: those scaled to length ``eps`` (under
            linf, one entry at least then reaches it); ``"sign"``: independent signs, all entries
            equally large, scaled to length ``eps``.
        generator: of the CPU, as ``common.generator`` makes it.

    Returns:
        (B, ...) with $\|\delta\|_p\le\varepsilon$, and equality unless ``kind="ball"``.

    Raises:
        ValueError: an unknown kind or norm.
    """
    p, d = exponent(norm), x.shape[1:].numel()
    if kind not in ("ball", "sphere", "sign"):
        raise ValueError(f"kind is 'ball', 'sphere' or 'sign', not {kind!r}")
    shape: Any = {"size": x.shape, "dtype": x.dtype, "generator": generator, "device": "cpu"}
    if kind == "sign":
        z = (torch.rand(**shape) < 0.5).to(x.dtype) * 2 - 1
    elif p == math.inf:
        z = torch.rand(**shape) * 2 - 1
    elif p == 2:
        z = torch.randn(**shape)
    else:
        u = torch.rand(**shape) * 2 - 1
        # -1 is among the numbers drawn, and infinite as a quantile: half a spacing inside
        z = u.sign() * _quantile(u.abs().clamp_max(1 - torch.finfo(x.dtype).eps / 2), p)
    if kind == "ball" and p == math.inf:
        return eps * z.to(x.device)
    radius = torch.ones(len(x), dtype=x.dtype, device="cpu")
    if kind == "ball":
        radius = torch.rand(**(shape | {"size": (len(x),)})) ** (1 / d)
    length = norm_of(z, norm).clamp_min(torch.finfo(x.dtype).tiny)  # of one entry, 0 may be drawn
    return eps * (z * expand(radius / length, z)).to(x.device)


def sparse_step(
    g: Float[Tensor, "B ..."],
    delta: Float[Tensor, "B ..."],
    length: float,
    box: Box,
    *,
    sparsity: float = 0.99,
) -> Float[Tensor, "B ..."]:
    r"""l1 step: as much as the box allows on the largest $|g_i|$, until ``length`` is spent.

    The steepest l1 step moves one entry. To need fewer steps no entry gets more than its share
    when the top $1-$``sparsity`` of them (at least one) share equally; what an entry cannot use,
    being close to its face, goes to the next. Without this rule the entries at their faces, lowered
    a little by each projection, would each take whole steps to return.

    Args:
        g: (B, ...) direction to climb.
        delta: (B, ...) perturbation at which to step.
        length: l1 norm of the step.
        box: the limits of ``delta``, as ``geometry.room`` makes them.
        sparsity: share of entries left alone, in [0, 1).

    Returns:
        (B, ...) steps $v$ with $\|v\|_1\le$ ``length`` (less where the box ends) that keep
        ``delta + v`` in the box.

    Source: Tramer and Boneh (2019), SLIDE, whose step has no spill-over; chapter ``first_example``.
    """
    share = length / max(1, math.ceil(g[0].numel() * (1 - sparsity) - 1e-9))
    low, high = (box[0] - delta).clamp(-share, 0), (box[1] - delta).clamp(0, share)
    return linear_oracle(g, "l1", length, box=(low, high))


def _score(logits: Tensor, y: Tensor, targeted: bool) -> Tensor:
    """What the worst point has least of: the margin of the label, or minus that of the target."""
    m = margin(logits, y)
    return -m if targeted else m


def _step(g: Tensor, delta: Tensor, alpha: float, norm: Norm, box: Box, sparsity: float) -> Tensor:
    if exponent(norm) == 1:
        return sparse_step(g, delta, alpha, box, sparsity=sparsity)
    return alpha * steepest(g, norm)


def _quantile(u: Tensor, p: float) -> Tensor:
    r"""Inverse distribution function of $|z|$ where $z$ has a density like $e^{-|z|^p}$."""
    if p == 1:
        return -torch.log1p(-u)
    share = u.double().numpy()  # |z|^p has the gamma law of shape 1/p, which begins like u^p
    power = gammaincinv(1 / p, share)
    start = share * math.gamma(1 + 1 / p)
    return torch.from_numpy(np.where(power > 1e-200, power ** (1 / p), start)).to(u.dtype)


def _unit_l1(g: Tensor) -> Tensor:
    """The gradient over its l1 norm (zero stays zero): momentum compares directions only."""
    size = norm_of(g, "l1")
    return g / expand(torch.where(size > 0, size, 1.0), g)


def _check_settings(
    norm: Norm, alpha: float, momentum: float, sparsity: float, restarts: int
) -> None:
    if exponent(norm) not in EXACT:
        raise ValueError(f"pgd() projects onto 'linf', 'l2' and 'l1' balls, not {norm!r}")
    check_number("step_size", alpha)
    check_number("momentum", momentum)
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity lies in [0, 1), not {sparsity!r}")
    if restarts > 1:
        raise ValueError("restarts > 1 without a random start would repeat one path")
