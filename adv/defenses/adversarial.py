r"""Training against an adversary: adversarial training, joint training, VAT and TRADES.

Each factory returns a loss ``(model, x, y) -> scalar`` for ``adv.lab.training.fit``. The inner
maximization runs with the model in evaluation mode, and its maximizer is a constant of the outer
gradient (Danskin's theorem). Random starts are drawn from torch's global generator, as dropout is,
so that the training loop's seed decides them.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from adv.attacks.common import (
    Bounds,
    GradientMaskingWarning,
    Objective,
    check_count,
    check_number,
    check_range,
    eval_mode,
    expand,
    generator,
    input_gradient,
    objective,
)
from adv.attacks.gradient import fgsm, noise, pgd
from adv.attacks.latent import latent_fgsm, latent_pgd
from adv.geometry import Norm, project, room, steepest
from adv.geometry import norm as length

__all__ = ["adversarial_loss", "ascend", "joint", "kl", "trades", "vat", "virtual_direction"]

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
Attack = Callable[..., Tensor]
NAMED: dict[str, Attack] = {
    "fgsm": fgsm,
    "pgd": pgd,
    "latent_fgsm": latent_fgsm,
    "latent_pgd": latent_pgd,
}


# --------------------------------------------------------------------------- adversarial training


def adversarial_loss(
    attack: Attack | str, *, mix: float = 0.0, loss: Objective = "ce", **settings: Any
) -> Loss:
    r"""Adversarial training: $\alpha\,\ell(f(x),y)+(1-\alpha)\,\ell(f(x+\delta),y)$.

    $\delta$ is what the attack finds for this batch and these weights. ``mix`` $=\alpha=0$ with PGD
    is the min-max problem $\min_\theta\mathbb E\max_\delta\ell$ of Madry et al.; $\alpha=1/2$ with
    FGSM is the loss of Goodfellow et al. A weight $\lambda$ on the second term of
    $\ell+\lambda\ell_{adv}$ is $\alpha=1/(1+\lambda)$, the whole divided by $1+\lambda$.

    Args:
        attack: ``"pgd"``, ``"fgsm"``, ``"latent_pgd"``, ``"latent_fgsm"``, or a function
            ``(model, x, y, *, seed, ...) -> x_adv``.
        mix: weight of the clean loss, in [0, 1].
        loss: ``"ce"``, ``"margin"`` or a function ``(logits, y) -> (B,)``; averaged over the batch.
        settings: of the attack, such as ``eps=0.2, steps=7``, but no ``seed``: each batch draws
            its own. The attack keeps its own loss.

    Returns:
        ``(model, x, y) -> scalar``.

    Raises:
        TypeError, ValueError: unknown attack, a ``seed``, or ``mix`` outside [0, 1].

    Source: Goodfellow et al. (2015); Madry et al. (2018); Matyasko (2020), (2.20)-(2.22); chapter
    ``defending``.
    """
    check_number("mix", mix, high=1)
    find, value = _bind(attack, **settings), objective(loss)

    def total(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        hard = value(model(_perturb(find, model, x, y)), y).mean()
        return hard if mix == 0 else mix * value(model(x), y).mean() + (1 - mix) * hard

    return total


def joint(
    attacks: Sequence[Attack | str | Mapping[str, Any]],
    *,
    rule: Literal["average", "worst"] = "average",
    loss: Objective = "ce",
) -> Loss:
    r"""Joint training against several adversaries: the mean or the largest of their losses.

    ``"average"`` is $\frac1A\sum_a\ell(f(x+\delta_a),y)$, ``"worst"`` takes the maximum over $a$
    for each sample, which is adversarial training against the union of the attacks' sets.

    Args:
        attacks: functions, names, or mappings such as ``{"attack": "pgd", "eps": 0.2}``.
        rule: how the losses of a sample are joined.
        loss: ``"ce"``, ``"margin"`` or a function ``(logits, y) -> (B,)``.

    Returns:
        ``(model, x, y) -> scalar``.

    Raises:
        TypeError, ValueError: no attacks, an unknown attack or rule, a ``seed``.

    Source: Tramer and Boneh (2019); chapters ``defending`` and ``manifold``.
    """
    if not attacks:
        raise ValueError("joint() needs at least one attack")
    if rule not in ("average", "worst"):
        raise ValueError(f"rule is 'average' or 'worst', not {rule!r}")
    value = objective(loss)
    specs = [a if isinstance(a, Mapping) else {"attack": a} for a in attacks]
    found = [_bind(**spec) for spec in specs]

    def total(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        losses = torch.stack([value(model(_perturb(find, model, x, y)), y) for find in found])
        return (losses if rule == "average" else losses.amax(dim=0)).mean()

    return total


def _bind(attack: Attack | str | None = None, **settings: Any) -> Attack:
    if isinstance(attack, str):
        if attack not in NAMED:
            raise ValueError(f"no attack {attack!r}; give a function or one of {', '.join(NAMED)}")
        attack = NAMED[attack]
    if not callable(attack):
        raise TypeError(f"an attack is a function or one of {', '.join(NAMED)}, not {attack!r}")
    if "seed" in settings:
        raise ValueError("an attack in training takes no seed: every batch draws its own")
    return partial(attack, **settings)


def _perturb(attack: Attack, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The attack's points, as constants. A saturated sample is no finding while training.

    A copy: an attack may return ``x`` itself, and a layer may work in place.
    """
    with warnings.catch_warnings(), eval_mode(model):
        warnings.simplefilter("ignore", GradientMaskingWarning)
        return attack(model, x, y, seed=_draw_seed()).detach().clone()


def _draw_seed() -> int:
    return int(torch.randint(2**31, ()))


# ------------------------------------------------------------------------------ divergence-based


def kl(logits: Float[Tensor, "B K"], others: Float[Tensor, "B K"]) -> Float[Tensor, " B"]:
    r"""$\mathrm{KL}(p\,\|\,q)=\sum_k p_k\log(p_k/q_k)$ of two softmax distributions, in nats.

    Args:
        logits: (B, K) of $p$.
        others: (B, K) of $q$.

    Returns:
        (B,) divergences, >= 0 up to rounding.
    """
    log_p, log_q = logits.log_softmax(1), others.log_softmax(1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=1)


def virtual_direction(
    model: nn.Module,
    x: Float[Tensor, "B ..."],
    *,
    xi: float = 1e-3,
    power_steps: int = 1,
    seed: int = 0,
) -> Float[Tensor, "B ..."]:
    r"""Unit l2 direction along which the predictions change most, without looking at a label.

    $\mathrm{KL}(p(x)\|p(x+r))\approx\frac12 r^\top Hr$ with
    $H=J^\top(\mathrm{diag}\,p-pp^\top)J$. Since $\nabla_r\mathrm{KL}|_{r=\xi d}\approx\xi Hd$,
    normalizing that gradient is a step of power iteration for the top eigenvector of $H$, one
    forward and one backward pass each, without forming $H$.

    Args:
        model: ``(B, ...) -> (B, K)`` logits; used in evaluation mode.
        x: (B, ...) inputs; points around them may leave [0, 1].
        xi: length of the finite difference, in the units of ``x``; below 1e-4 float32 rounds it
            away.
        power_steps: power iterations from a Gaussian direction, >= 1.
        seed: of that direction.

    Returns:
        (B, ...) directions of l2 norm 1, whose sign is arbitrary.

    Raises:
        TypeError, ValueError: ``xi`` not positive, no steps.

    Source: Miyato et al. (2019), sec. 3.3; Matyasko (2020), (2.23)-(2.24); chapter ``defending``.
    """
    check_number("xi", xi)
    if xi == 0:
        raise ValueError("xi is a number > 0, not 0")
    check_count("power_steps", power_steps)
    with eval_mode(model):
        with torch.no_grad():
            clean = model(x.clone())  # which a layer may change in place
        d = noise(x, 1.0, "l2", "sphere", generator=generator(seed))
        for _ in range(power_steps):
            _, gradient = input_gradient(lambda z: kl(clean, model(z)), x + xi * d)
            size = expand(length(gradient, "l2"), gradient)
            d = torch.where(size > 0, gradient / size, d)
    return d


def vat(eps: float, *, xi: float = 1e-3, power_steps: int = 1, weight: float = 1.0) -> Loss:
    r"""Virtual adversarial training: $\mathrm{CE}+\lambda\,\mathrm{KL}(p(x)\,\|\,p(x+r))$.

    $r=\varepsilon d$ with the direction $d$ of ``virtual_direction``. $p(x)$ is a constant of the
    gradient, so that the perturbed prediction is pulled to the clean one and not the reverse.

    Args:
        eps: l2 length of $r$, >= 0, in the units of ``x``; $r$ is not clipped to a box.
        xi: finite difference of the power iteration.
        power_steps: power iterations, >= 1.
        weight: $\lambda\ge0$.

    Returns:
        ``(model, x, y) -> scalar``.

    Raises:
        TypeError, ValueError: ``eps`` or ``weight`` negative; the rest at the first call.

    Source: Miyato et al. (2019); Matyasko (2020), (2.23)-(2.24), whose weight is 1; chapter
    ``defending``.
    """
    check_number("eps", eps)
    check_number("weight", weight)

    def total(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        d = virtual_direction(model, x, xi=xi, power_steps=power_steps, seed=_draw_seed())
        logits = model(x.clone())  # which a layer may change in place
        change = kl(logits.detach(), model(x + eps * d))
        return functional.cross_entropy(logits, y) + weight * change.mean()

    return total


def trades(
    eps: float,
    *,
    beta: float = 6.0,
    norm: Norm = "linf",
    steps: int = 10,
    step_size: float | None = None,
    bounds: Bounds = (0.0, 1.0),
) -> Loss:
    r"""TRADES: cross-entropy and the largest divergence of the predictions in a ball, priced.

    $\mathrm{CE}(f(x),y)+\beta\max_{\|\delta\|_p\le\varepsilon}\mathrm{KL}(p(x)\|p(x+\delta))$.

    The first term is accuracy, the second the price of a boundary near the data. Both predictions
    in the divergence are differentiated.

    Args:
        eps: radius, >= 0, in the units of ``x``.
        beta: $\beta\ge0$, the price.
        norm: ``"linf"``, ``"l2"`` or ``"l1"``.
        steps: projected gradient steps on the divergence.
        step_size: of these, by default ``2.5 * eps / steps``.
        bounds: smallest and largest value of an input.

    Returns:
        ``(model, x, y) -> scalar``.

    Raises:
        TypeError, ValueError: negative ``eps`` or ``beta``, no steps; the rest at the first call.

    Source: Zhang et al. (2019), eq. (5); chapter ``defending``.
    """
    check_number("eps", eps)
    check_count("steps", steps)
    check_number("beta", beta)

    def total(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with eval_mode(model):
            with torch.no_grad():
                fixed = model(x.clone())  # which a layer may change in place
            x_adv = ascend(
                lambda z: kl(fixed, model(z)),
                x,
                eps=eps,
                norm=norm,
                steps=steps,
                step_size=step_size,
                bounds=bounds,
                seed=_draw_seed(),
            )
        logits = model(x.clone())
        return functional.cross_entropy(logits, y) + beta * kl(logits, model(x_adv)).mean()

    return total


def ascend(
    value: Callable[[Tensor], Tensor],
    x: Float[Tensor, "B ..."],
    *,
    eps: float,
    norm: Norm = "linf",
    steps: int = 10,
    step_size: float | None = None,
    bounds: Bounds = (0.0, 1.0),
    seed: int = 0,
) -> Float[Tensor, "B ..."]:
    r"""Climb any objective of the input inside ball and box; the last point counts.

    It starts at a uniform point of the ball, projected onto ball and box, since a divergence from
    the prediction at ``x`` has a zero gradient at ``x``.

    Args:
        value: ``(B, ...) -> (B,)``, sample ``i`` depending on input ``i`` only.
        x: (B, ...) inputs inside ``bounds``.
        eps: radius, >= 0.
        norm: ``"linf"``, ``"l2"`` or ``"l1"``.
        steps: steepest steps, each followed by the exact projection.
        step_size: by default ``2.5 * eps / steps``.
        bounds: smallest and largest value of an input.
        seed: of the start.

    Returns:
        (B, ...) points, at most ``eps`` away and inside ``bounds``.

    Raises:
        TypeError, ValueError: inputs outside the bounds, negative ``eps`` or step size, no steps.

    Source: Zhang et al. (2019), Algorithm 1; chapter ``defending``.
    """
    check_range(x, bounds)
    check_number("eps", eps)
    check_count("steps", steps)
    alpha = 2.5 * eps / steps if step_size is None else step_size
    check_number("step_size", alpha)
    x, box = x.detach(), room(x.detach(), bounds)
    delta = project(noise(x, eps, norm, generator=generator(seed)), norm, eps, box=box)
    for _ in range(steps):
        _, gradient = input_gradient(value, x + delta)
        delta = project(delta + alpha * steepest(gradient, norm), norm, eps, box=box)
    return (x + delta).clamp(*bounds)
