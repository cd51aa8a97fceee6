r"""Attacks along the data manifold: perturb the code of an image, not its pixels.

$$\max_{\|\zeta\|_p\le\epsilon_z}\ \ell\big(f(G(z_0+\zeta,y)),y\big),\qquad z_0=E(x,y),$$

where an encoder $E$ and a decoder $G$, told the label, stand for the manifold of class $y$. What
comes back is a decoded image: at $\epsilon_z=0$ it is the reconstruction of $x$, not $x$, so that
an accuracy under these attacks means little without the accuracy on reconstructions beside it.
"""

import math
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from adv.attacks.common import (
    Best,
    Bounds,
    GradientWatch,
    Model,
    Objective,
    Observe,
    check_inputs,
    check_labels,
    check_number,
    check_range,
    check_seed,
    eval_mode,
    generator,
    is_adversarial,
    loss_gradient,
    margin,
    objective,
    plain,
)
from adv.attacks.gradient import Noise, noise
from adv.geometry import Norm, exponent, project, steepest

__all__ = ["Manifold", "latent_fgsm", "latent_noise", "latent_pgd", "reconstruct"]


class Manifold(Protocol):
    """An encoder and a decoder, both told the label (one that isn't conditional ignores it).

    Their parameters have the dtype and device of the inputs: convert one of them, or PyTorch raises
    a ``RuntimeError`` of its own.
    """

    def encode(self, x: Float[Tensor, "B ..."], y: Int[Tensor, " B"]) -> Float[Tensor, "B k"]:
        """Codes of inputs, without random draws: of a variational encoder the posterior's mean."""

    def decode(self, z: Float[Tensor, "B k"], y: Int[Tensor, " B"]) -> Float[Tensor, "B ..."]:
        """Inputs of codes, differentiable in ``z``; the attacks clip them to the bounds."""


def reconstruct(
    x: Float[Tensor, "B ..."],
    y: Int[Tensor, " B"],
    *,
    manifold: Manifold,
    bounds: Bounds = (0.0, 1.0),
) -> Float[Tensor, "B ..."]:
    r"""Encode and decode: the attack with $\epsilon_z=0$, and the baseline of the others.

    Args:
        x: (B, ...) inputs inside ``bounds``.
        y: (B,) labels that encoder and decoder are told.
        manifold: encoder and decoder.
        bounds: smallest and largest value of an input.

    Returns:
        (B, ...) $G(E(x,y),y)$, clipped to the bounds.

    Raises:
        TypeError, ValueError: inputs outside the bounds, bad labels; codes or images of another
            shape, or not finite.

    Source: "Disentangling Adversarial Robustness", (7), whose second term it measures; chapter
    ``manifold``.
    """
    check_range(x, bounds)
    check_labels(x, y)
    with torch.no_grad(), eval_mode(manifold):  # type: ignore[arg-type]
        z = _encode(manifold, x.detach(), y)
        return _image(manifold, z, y, bounds)


def latent_fgsm(
    model: Model,
    x: Float[Tensor, "B ..."],
    y: Int[Tensor, " B"],
    *,
    manifold: Manifold,
    eps: float,
    norm: Norm = "linf",
    loss: Objective = "ce",
    bounds: Bounds = (0.0, 1.0),
    seed: int = 0,
    observe: Observe | None = None,
) -> Float[Tensor, "B ..."]:
    r"""One steepest step of length ``eps`` from the code of ``x``, then decoded.

    $x_{adv}=\operatorname{clip}G(z_0+\epsilon_z\,v_p(\nabla_z\ell),y)$ with $z_0=E(x,y)$ and the
    steepest unit step $v_p$; under linf $v_p=\operatorname{sign}$. There is no targeted form: the
    decoder is told the true label, which the image is meant to keep.

    Args:
        model: ``(B, ...) -> (B, K)`` logits.
        x: (B, ...) inputs inside ``bounds``.
        y: (B,) true labels.
        manifold: encoder and decoder.
        eps: radius $\epsilon_z\ge0$, in the units of the code.
        norm: of the latent ball: ``"linf"``, ``"l2"`` or any number $p\ge1$.
        loss: what grows as images stop looking like ``y``: ``"ce"``, ``"margin"``, ``"score"``
            (minus the label's logit) or a function.
        bounds: smallest and largest value of an input.
        seed: not used, since nothing is drawn; every attack takes one.
        observe: ``(step, state)``, called once with the step 0 and ``z``, ``x_adv``, ``logits``,
            ``gradient``.

    Returns:
        (B, ...) decoded images inside ``bounds``; their distance from ``x`` is not bounded.

    Raises:
        TypeError, ValueError: bad input, as ``check_inputs`` says; codes or images of another
            shape, or not finite.

    Source: "Disentangling Adversarial Robustness", section 3 and appendix B; chapter ``manifold``.
    """
    check_seed(seed)
    check_inputs(model, x, y, bounds=bounds, eps=eps)
    exponent(norm)
    climb, watch = objective(loss), GradientWatch(x)
    with eval_mode(model), eval_mode(manifold):  # type: ignore[arg-type]
        z = _encode(manifold, x.detach(), y)
        logits, gradient = loss_gradient(_through(model, manifold, y, bounds), z, y, climb)
        gradient = watch.see(gradient, is_adversarial(logits, y))
        x_adv = _decode(manifold, z + eps * steepest(gradient, norm), y, bounds)
    if observe is not None:
        observe(0, {"z": z, "x_adv": x_adv, "logits": logits, "gradient": gradient})
    watch.report("latent_fgsm()")
    return x_adv


def latent_pgd(
    model: Model,
    x: Float[Tensor, "B ..."],
    y: Int[Tensor, " B"],
    *,
    manifold: Manifold,
    eps: float,
    norm: Norm = "linf",
    steps: int = 40,
    step_size: float | None = None,
    restarts: int = 1,
    random_start: bool = True,
    loss: Objective = "ce",
    bounds: Bounds = (0.0, 1.0),
    seed: int = 0,
    observe: Observe | None = None,
) -> Float[Tensor, "B ..."]:
    r"""Projected gradient in the latent ball; the worst decoded image of all starts and steps.

    $\zeta^{t+1}=\Pi_{B_p(\epsilon_z)}\big(\zeta^t+\alpha\,v_p(\nabla_\zeta\ell)\big)$, the loss
    being that of $G(z_0+\zeta^t,y)$. The image with the smallest margin is kept.

    Args:
        model: ``(B, ...) -> (B, K)`` logits.
        x: (B, ...) inputs inside ``bounds``.
        y: (B,) true labels.
        manifold: encoder and decoder.
        eps: radius $\epsilon_z\ge0$, in the units of the code.
        norm: of the latent ball: ``"linf"`` or ``"l2"``.
        steps: gradient steps of each start.
        step_size: $\alpha$ in the units of the code; by default ``2.5 * eps / steps``.
        restarts: random starts; more are never worse.
        random_start: start at a uniform point of the ball; else at the code of ``x``.
        loss: what grows as images stop looking like ``y``: ``"ce"``, ``"margin"``, ``"score"``
            (minus the label's logit) or a function.
        bounds: smallest and largest value of an input.
        seed: of the random starts.
        observe: ``(step, state)``, called at each step (counted through all starts) with ``z``,
            ``x_adv``, ``logits``, ``gradient`` with respect to ``z``, and ``restart``.

    Returns:
        (B, ...) decoded images inside ``bounds``; their distance from ``x`` is not bounded.

    Raises:
        TypeError, ValueError: bad input, as ``check_inputs`` says; another norm; several restarts
            without a random start; codes or images of another shape, or not finite.

    Source: "Disentangling Adversarial Robustness", (2); chapter ``manifold``.
    """
    check_inputs(model, x, y, bounds=bounds, eps=eps, steps=steps, restarts=restarts)
    alpha = 2.5 * eps / steps if step_size is None else step_size
    check_number("step_size", alpha)
    if exponent(norm) not in (2.0, math.inf):
        raise ValueError(f"norm is 'linf' or 'l2', not {norm!r}")
    if restarts > 1 and not random_start:
        raise ValueError("restarts > 1 without a random start would repeat one path")
    climb, watch, through = objective(loss), GradientWatch(x), _through(model, manifold, y, bounds)
    with eval_mode(model), eval_mode(manifold):  # type: ignore[arg-type]
        center = _encode(manifold, x.detach(), y)
        best = Best(center)
        for restart in range(restarts):
            draws = generator(seed, restart)
            zeta = torch.zeros_like(center)
            if random_start:
                zeta = noise(center, eps, norm, generator=draws)
            for step in range(steps):
                z = center + zeta
                logits, gradient = loss_gradient(through, z, y, climb)
                best.update(z, margin(logits, y))
                gradient = watch.see(gradient, is_adversarial(logits, y))
                if observe is not None:
                    x_adv = _decode(manifold, z, y, bounds)
                    state = {"z": z, "x_adv": x_adv, "logits": logits, "gradient": gradient}
                    observe(restart * steps + step, {**state, "restart": restart})
                zeta = project(zeta + alpha * steepest(gradient, norm), norm, eps)
            with torch.no_grad():
                best.update(center + zeta, margin(through(center + zeta), y))
        x_adv = _decode(manifold, best.x_adv, y, bounds)
    watch.report("latent_pgd()")
    return x_adv


def latent_noise(
    model: Model,
    x: Float[Tensor, "B ..."],
    y: Int[Tensor, " B"],
    *,
    manifold: Manifold,
    eps: float,
    norm: Norm = "linf",
    draws: int = 1,
    kind: Noise = "sign",
    bounds: Bounds = (0.0, 1.0),
    seed: int = 0,
    observe: Observe | None = None,
) -> Float[Tensor, "B ..."]:
    r"""The baseline that a latent attack must beat: the worst of some random codes, decoded.

    Args:
        model: ``(B, ...) -> (B, K)`` logits.
        x: (B, ...) inputs inside ``bounds``.
        y: (B,) true labels.
        manifold: encoder and decoder.
        eps: radius $\epsilon_z\ge0$, in the units of the code.
        norm: of the latent ball: ``"linf"``, ``"l2"``, ``"l1"`` or any number p >= 1.
        draws: perturbations tried for each image; draw ``k`` has a stream of its own.
        kind: law of the noise, as in ``gradient.noise``.
        bounds: smallest and largest value of an input.
        seed: of the draws.
        observe: ``(step, state)``, called at each draw with ``z``, ``x_adv`` and ``logits``.

    Returns:
        (B, ...) the decoded draw with the smallest margin, inside ``bounds``.

    Raises:
        TypeError, ValueError: bad input, as ``check_inputs`` says; an unknown norm or kind; codes
            or images of another shape, or not finite.

    Source: chapter ``manifold``.
    """
    check_inputs(model, x, y, bounds=bounds, eps=eps, draws=draws)
    with torch.no_grad(), eval_mode(model), eval_mode(manifold):  # type: ignore[arg-type]
        center = _encode(manifold, x.detach(), y)
        best = Best(_decode(manifold, center, y, bounds))
        for draw in range(draws):
            z = center + noise(center, eps, norm, kind, generator=generator(seed, draw))
            x_adv = _decode(manifold, z, y, bounds)
            logits = model(x_adv.clone())  # which a layer may change in place
            best.update(x_adv, margin(logits, y))
            if observe is not None:
                observe(draw, {"z": z, "x_adv": x_adv, "logits": logits})
    return best.x_adv


def _through(model: Model, manifold: Manifold, y: Tensor, bounds: Bounds) -> Model:
    """The classifier as a function of the code."""
    return lambda z: model(_image(manifold, z, plain(y), bounds))


def _decode(manifold: Manifold, z: Tensor, y: Tensor, bounds: Bounds) -> Tensor:
    with torch.no_grad():
        return _image(manifold, z, y, bounds)


def _image(manifold: Manifold, z: Tensor, y: Tensor, bounds: Bounds) -> Tensor:
    """The image of a code, in the code's precision: under ``torch.autocast`` it comes in less."""
    return manifold.decode(z, y).to(z.dtype).clamp(*bounds)


def _encode(manifold: Manifold, x: Tensor, y: Tensor) -> Tensor:
    """The codes, in the inputs' precision, after a look at what the manifold makes of them."""
    with torch.no_grad():
        z = manifold.encode(x.clone(), y)
        again = manifold.decode(z[:1], y[:1])
    if z.ndim != 2 or len(z) != len(x) or not z.is_floating_point():
        raise ValueError(f"encode() must return {len(x)} codes (B, k), not {tuple(z.shape)}")
    if again.shape != x[:1].shape or not again.is_floating_point():
        raise ValueError(
            f"decode() must return inputs, floats of shape {tuple(x[:1].shape)}, "
            f"not {again.dtype} of {tuple(again.shape)}"
        )
    if not bool(z.isfinite().all()) or not bool(again.isfinite().all()):
        raise ValueError("the manifold's codes or images are not finite")
    return z.to(x.dtype)
