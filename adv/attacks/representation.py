r"""Attacks on a representation: make the code of one input that of another.

$$\min_\delta\ \|E(x+\delta)-c\|_2\quad\text{such that}\quad\|\delta\|_p\le\varepsilon,$$

where $E$ is an encoder, the mean of a variational autoencoder's posterior, or the first layers of a
classifier, and $c$ the code wanted, usually $E(x_t)$ of a target image. No label is involved.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from adv.attacks.common import (
    Best,
    Bounds,
    GradientWatch,
    Model,
    Observe,
    check_number,
    check_outputs,
    eval_mode,
    generator,
    input_gradient,
)
from adv.attacks.gradient import noise
from adv.geometry import Norm, exponent, project, room, steepest

__all__ = ["match"]


def match(
    encoder: Model,
    x: Float[Tensor, "B ..."],
    code: Float[Tensor, "B ..."],
    *,
    eps: float,
    norm: Norm = "l2",
    steps: int = 200,
    step_size: float | None = None,
    restarts: int = 1,
    random_start: bool = True,
    bounds: Bounds = (0.0, 1.0),
    seed: int = 0,
    observe: Observe | None = None,
) -> Float[Tensor, "B ..."]:
    r"""Bring the code of ``x`` as near to a wanted one as a norm ball allows, by PGD.

    $\delta\leftarrow\Pi_{B_p(\varepsilon)\cap box}\big(\delta-\alpha\,v_p(g)\big)$, with $g$ the
    gradient of $\|E(x+\delta)-c\|_2$ and $v_p$ the steepest direction, from a random point of the
    ball. The nearest code of all starts and steps is kept.

    Args:
        encoder: ``(B, ...) -> (B, ...)`` codes of any shape, samples not interacting, and not
            random: of a variational encoder the posterior's mean.
        x: (B, ...) sources inside ``bounds``.
        code: the codes wanted, shaped like the encoder's output.
        eps: radius of the ball, >= 0, in the units of ``x``.
        norm: the ball: ``"linf"`` or ``"l2"``.
        steps: gradient steps of each start, each one forward and one backward pass.
        step_size: $\alpha$ in the units of ``x``; by default ``2.5 * eps / steps``.
        restarts: random starts; more are never worse.
        random_start: start at a uniform point of the ball; else at ``x``.
        bounds: smallest and largest value of an input.
        seed: of the random starts.
        observe: ``(step, state)``, called at each step (counted through all starts) with ``x_adv``,
            ``distance`` (of its code), ``gradient``, and ``restart``.

    Returns:
        (B, ...) perturbed sources, at most ``eps`` away and inside ``bounds``.

    Raises:
        TypeError, ValueError: bad input, as ``check_outputs`` says; another norm; several restarts
            without a random start.

    Source: "Understanding Adversarial Attacks on Autoencoders", (1.2) and section 5; on a layer of
    a classifier it is the feature adversary of Sabour et al. (2016), Matyasko (2020), (2.19);
    chapter ``autoencoders``.
    """
    check_outputs(encoder, x, code, bounds, eps, steps=steps, restarts=restarts)
    if code is None:
        raise TypeError("code is a tensor shaped like the encoder's output, not None")
    alpha = 2.5 * eps / steps if step_size is None else step_size
    check_number("step_size", alpha)
    if exponent(norm) not in (2.0, math.inf):
        raise ValueError(f"norm is 'linf' or 'l2', not {norm!r}")
    if restarts > 1 and not random_start:
        raise ValueError("restarts from the same point find the same; allow random_start")
    x = x.detach()
    box, best, watch = room(x, bounds), Best(x), GradientWatch(x)

    def distance(z: Tensor) -> Tensor:
        # The square's gradient has the same direction; the root would have none at the goal.
        return (encoder(z) - code.clone()).flatten(1).square().sum(dim=1)

    with eval_mode(encoder):
        for restart in range(restarts):
            delta = torch.zeros_like(x)
            if random_start:
                draws = generator(seed, restart)
                delta = project(noise(x, eps, norm, generator=draws), norm, eps, box=box)
            for step in range(steps):
                x_adv = (x + delta).clamp(*bounds)
                value, gradient = input_gradient(distance, x_adv)
                best.update(x_adv, value)
                gradient = watch.see(gradient, value == 0)
                if observe is not None:
                    state = {"x_adv": x_adv, "distance": value.sqrt(), "gradient": gradient}
                    observe(restart * steps + step, {**state, "restart": restart})
                delta = project(delta - alpha * steepest(gradient, norm), norm, eps, box=box)
            x_adv = (x + delta).clamp(*bounds)
            with torch.no_grad():
                best.update(x_adv, distance(x_adv.clone()))
    watch.report("match()")
    return best.x_adv
