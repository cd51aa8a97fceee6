r"""The high-confidence attack: Newton-like steps on $\log p_t$ until class $t$ has a confidence.

``high_confidence`` finds adversarial points, as every attack does. ``unrolled`` makes the same walk
with a fixed number of steps as a differentiable function of the model's weights, for training.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from adv.attacks.boundary import boundary_step
from adv.attacks.common import (
    ONE_LOGIT,
    TOLERANCE,
    Best,
    Bounds,
    GradientWatch,
    Model,
    Observe,
    check_count,
    check_inputs,
    check_labels,
    check_number,
    check_range,
    check_seed,
    class_gradients,
    eval_mode,
    expand,
    input_gradient,
    is_adversarial,
    plain,
    recording,
    settled,
)
from adv.attacks.jacobian import FINITE
from adv.geometry import Norm, dual_norm, exponent, room, steepest
from adv.geometry import norm as norm_of

__all__ = ["confidence_step", "high_confidence", "nearest_class", "unrolled"]

Stop = Literal["straight-through", "hard", "smooth"]


def high_confidence(
    model: Model,
    x: Float[Tensor, "B ..."],
    y: Int[Tensor, " B"],
    *,
    confidence: float | Float[Tensor, " B"] | None = 0.95,
    norm: Norm = "l2",
    steps: int = 50,
    overshoot: float = 0.02,
    max_step: float | None = None,
    targeted: bool = False,
    bounds: Bounds = (0.0, 1.0),
    seed: int = 0,
    observe: Observe | None = None,
) -> Float[Tensor, "B ..."]:
    r"""The nearest point to which the model gives a class with confidence: $p_t(x+\delta)\ge c$.

    Each step solves $\min\|r\|_p$ subject to $\log p_t+w^\top r\ge\log c$, with
    $w=\nabla\log p_t$ at the iterate (``confidence_step``), and clips the sum to the bounds; for
    $p<2$, where a step is spent on few entries, without those that are at their wall already. The
    search of a sample ends with the first of the points $x+(1+\eta)\delta$, one after each step, at
    which $p_t\ge c$. The iterates $x+\delta$ themselves are looked at with $\eta=0$ only. Without a
    target, $t$ is the class of the nearest linearized boundary at ``x`` (``nearest_class``), or
    what the model says where it errs already.

    Args:
        model: ``(B, ...) -> (B, K)`` logits.
        x: (B, ...) inputs inside ``bounds``.
        y: (B,) true labels, or targets where ``targeted``.
        confidence: $c$ in (0, 1], one number or one for each sample; None for the confidence that
            the model has in its prediction at ``x``.
        norm: ``"linf"``, ``"l2"``, ``"l1"`` or any number $p\ge1$.
        steps: linearizations at most; each costs two forward passes and one backward pass. Without
            targets K gradients come first.
        overshoot: $\eta\ge0$. Where $\log p_t$ is concave the steps end short of $c$ without it.
        max_step: longest step, in the norm; None for no limit.
        targeted: whether ``y`` is the class wanted.
        bounds: smallest and largest value of an input.
        seed: not used, since nothing is drawn; every attack takes one.
        observe: ``(step, state)``, called at each step with ``x_adv`` (the iterate), ``log_p`` (of
            the target) and ``target``.

    Returns:
        (B, ...) points inside ``bounds`` that are classified as $t$, with $p_t\ge c$ (to 1e-6 in
        $\log p_t$); ``x`` itself where it is such a point, or none was found.

    Raises:
        TypeError, ValueError: bad input, as ``check_inputs`` says; a confidence outside (0, 1];
            a negative overshoot; a step limit that is not positive.

    Source: Matyasko (2020), (4.6)-(4.8) as corrected by errata 16 and Algorithm 1; chapter
    ``critic``.
    """
    check_seed(seed)
    check_inputs(model, x, y, targeted=targeted, nearest=True, bounds=bounds, steps=steps)
    check_number("overshoot", overshoot)
    limit, x, watch = _limit(max_step), x.detach().clone(), GradientWatch(x)
    x_adv = x
    exponent(norm)
    best = Best(x)

    with torch.no_grad(), eval_mode(model):
        log_c = _log_confidence(model, x, confidence)
        target = y if targeted else _way_out(model, x, y, norm)

        def keep(point: Tensor) -> None:
            logits = model(point.clone())  # which a layer may change in place
            reached = _log_p(logits, target) >= log_c - TOLERANCE
            reached &= is_adversarial(logits, target, targeted=True)
            best.update(point, norm_of(point - x, norm), reached & ~best.found)

        keep(x)
        for step in range(steps):
            log_p, w = input_gradient(lambda z: _log_p(model(z), plain(target)), x_adv)
            w = watch.see(w, best.found)
            if exponent(norm) < 2:  # a step is of few entries: not of those that cannot move
                w = _movable(w, log_p < log_c, x_adv, bounds)
            if observe is not None:
                observe(step, {"x_adv": x_adv, "log_p": log_p, "target": target})
            x_adv = (x_adv + confidence_step(log_p, w, log_c, norm, limit)).clamp(*bounds)
            keep((x + (1 + overshoot) * (x_adv - x)).clamp(*bounds))
            if settled(best.found, step):
                break
    watch.report("high_confidence()")
    return best.x_adv


def confidence_step(
    log_p: Float[Tensor, " B"],
    w: Float[Tensor, "B ..."],
    log_c: Float[Tensor, " B"],
    norm: Norm = "l2",
    max_step: float = math.inf,
) -> Float[Tensor, "B ..."]:
    r"""The shortest $r$ with $\log p_t+w^\top r=\log c$, differentiable in ``log_p`` and ``w``.

    $r=\frac{\log c-\log p_t}{\|w\|_q}\,v_p(w)$ with the steepest unit step $v_p$; for $p=2$ that is
    $(\log c-\log p_t)\,w/\|w\|_2^2$. Beyond the confidence the step leads back.

    Args:
        log_p: (B,) $\log p_t$ at the points of linearization.
        w: (B, ...) gradients of $\log p_t$ there.
        log_c: (B,) logarithms of the confidences wanted.
        norm: ``"linf"``, ``"l2"``, ``"l1"`` or any number $p\ge1$.
        max_step: longest step, in the norm.

    Returns:
        (B, ...) steps, zero where ``w`` is.

    Source: Matyasko (2020), Algorithm 1, line 7, and (4.8) as corrected by errata 16; chapter
    ``critic``.
    """
    slope = dual_norm(w, norm)
    length = torch.where(slope > 0, (log_c - log_p) / torch.where(slope > 0, slope, 1.0), 0.0)
    return expand(length.clamp(-max_step, max_step).to(w.dtype), w) * steepest(w, norm)


def nearest_class(
    model: Model,
    x: Float[Tensor, "B ..."],
    y: Int[Tensor, " B"],
    norm: Norm = "l2",
) -> Int[Tensor, " B"]:
    r"""The class behind the nearest linearized boundary: $\arg\min_{j\ne y}|F_j|/\|\nabla F_j\|_q$.

    $F_j=f_j-f_y$. Where every gradient vanishes it is the class with the next largest logit.

    Args:
        model: ``(B, ...) -> (B, K)`` logits.
        x: (B, ...) inputs.
        y: (B,) the classes to leave: labels, or predictions.
        norm: of the distance, ``"linf"``, ``"l2"``, ``"l1"`` or any number $p\ge1$.

    Returns:
        (B,) classes other than ``y``.

    Raises:
        TypeError, ValueError: inputs that are no finite floating-point batch, labels that don't
            fit, a single class.

    Source: Moosavi-Dezfooli et al. (2016); Matyasko (2020), section 4.3; chapter ``critic``.
    """
    check_range(x, FINITE)
    check_labels(x, y)
    with eval_mode(model):
        logits, jacobian = class_gradients(model, x)
    _check_classes(logits, y)
    _, distance = boundary_step(logits, jacobian, y, norm)
    second = logits.scatter(1, y[:, None], -math.inf).argmax(dim=1)
    return torch.where(distance.isfinite().any(dim=1), distance.argmin(dim=1), second)


def unrolled(
    model: Model,
    x: Float[Tensor, "B ..."],
    target: Int[Tensor, " B"],
    *,
    confidence: float | Float[Tensor, " B"] | None = 0.95,
    norm: Norm = "l2",
    steps: int = 5,
    overshoot: float = 0.05,
    stop: Stop = "straight-through",
    detached: bool = True,
) -> Float[Tensor, "B ..."]:
    r"""The attack as a differentiable function of the weights, for training.

    $$x_{adv}=x+(1+\eta)\sum_{i=1}^N\Big(\prod_{l\le i}I_l\Big)r_i,$$

    with the steps $r_i$ of ``confidence_step`` and $I_l=1$ while $p_t<c$ before step $l$, else 0.
    An indicator has no useful derivative. Written as $I=\mathrm{round}(\sigma(c-p_t))$, it gets
    that of $\sigma(c-p_t)$, as if nothing had been rounded ("straight-through"). Nothing is
    clipped to a box, and the last point is returned whether it has reached $c$ or not. In float32
    a sample that the model takes for ``target`` by a margin of about 50 or more has a $w$ so short
    that the gradient is not finite; near a margin of 100 the point is not either.

    Args:
        model: ``(B, ...) -> (B, K)`` logits; used in evaluation mode.
        x: (B, ...) inputs.
        target: (B,) classes to reach.
        confidence: $c$ in (0, 1], one number or one for each sample, a constant of the gradient;
            None for the model's own at ``x``.
        norm: of the steps.
        steps: $N$, each with one forward and one backward pass, recorded.
        overshoot: $\eta\ge0$.
        stop: ``"straight-through"``; ``"hard"`` for an indicator without derivative; ``"smooth"``
            for $\sigma(c-p_t)$ in its place, which is what straight-through differentiates.
        detached: treat each iterate as a constant when its step is differentiated, as the author's
            program does: the weights act through $w$ and $\log p_t$ of each step, not through
            where earlier steps have led.

    Returns:
        (B, ...) points with a graph to the model's weights.

    Raises:
        TypeError, ValueError: inputs that are no finite floating-point batch; targets, confidence,
            overshoot, steps or stop that make no sense; a single class.

    Source: Matyasko (2020), Algorithm 1 and section 4.3, as corrected by errata 17; chapter
    ``critic``.
    """
    check_range(x, FINITE)
    check_labels(x, target)
    check_number("overshoot", overshoot)
    check_count("steps", steps)
    indicator = _indicator(stop)
    with recording(), eval_mode(model):
        start, target = plain(x), plain(target)
        c = _log_confidence(model, start, confidence).exp()
        delta, going = torch.zeros_like(start), torch.ones_like(c)
        for step in range(steps):
            z = start + (delta.detach() if detached else delta)
            if not z.requires_grad:
                z.requires_grad_()
            logits = model(z.clone())  # which a layer may change in place
            if step == 0:
                _check_classes(logits, target)
            log_p = _log_p(logits, target)
            (w,) = torch.autograd.grad(log_p.sum(), z, create_graph=True)
            going = going * indicator(log_p.exp(), c)
            delta = delta + expand(going.to(w.dtype), w) * confidence_step(log_p, w, c.log(), norm)
        return start + (1 + overshoot) * delta


def _indicator(stop: Stop) -> Callable[[Tensor, Tensor], Tensor]:
    def hard(p: Tensor, c: Tensor) -> Tensor:
        return (p < c).to(p)

    def smooth(p: Tensor, c: Tensor) -> Tensor:
        return torch.sigmoid(c - p)

    def straight_through(p: Tensor, c: Tensor) -> Tensor:
        soft = smooth(p, c)
        return hard(p, c) + (soft - soft.detach())

    known = {"straight-through": straight_through, "hard": hard, "smooth": smooth}
    if stop not in known:
        raise ValueError(f"stop is one of {', '.join(known)}, not {stop!r}")
    return known[stop]


def _movable(w: Tensor, uphill: Tensor, x_adv: Tensor, bounds: Bounds) -> Tensor:
    """The gradient without the entries that are at their wall, in the direction of the step."""
    low, high = room(x_adv, bounds)
    ahead = torch.where(expand(uphill, w), w, -w)
    return torch.where(torch.where(ahead > 0, high, -low) > 0, w, 0.0)


def _log_p(logits: Tensor, target: Tensor) -> Float[Tensor, " B"]:
    return logits.log_softmax(dim=1).gather(1, target[:, None]).squeeze(1)


def _check_classes(logits: Tensor, y: Tensor) -> None:
    """Raise unless there are two classes at least, and the labels are among them."""
    classes = logits.shape[1]
    if classes < 2:
        raise ValueError(f"the model must return at least two classes; {ONE_LOGIT}")
    first, last = (int(value) for value in torch.aminmax(y))
    if first < 0 or last >= classes:
        raise ValueError(f"labels lie in 0..{classes - 1}, but they span {first}..{last}")


def _way_out(model: Model, x: Tensor, y: Tensor, norm: Norm) -> Int[Tensor, " B"]:
    """The nearest other class, or the prediction where that is not ``y``."""
    said = model(x.clone()).argmax(dim=1)
    return torch.where(said == y, nearest_class(model, x, y, norm), said)


def _log_confidence(
    model: Model, x: Tensor, confidence: float | Tensor | None
) -> Float[Tensor, " B"]:
    """Logarithms of the confidences wanted, one for each sample."""
    if confidence is None:
        with torch.no_grad():
            return model(x.clone()).log_softmax(dim=1).amax(dim=1)
    if not isinstance(confidence, Tensor):
        check_number("confidence", confidence, high=1)
        confidence = x.new_full((len(x),), float(confidence))
    if confidence.shape != x.shape[:1]:
        raise ValueError(
            f"confidence is a number or of shape ({len(x)},), not {tuple(confidence.shape)}"
        )
    if not bool(((confidence > 0) & (confidence <= 1 + TOLERANCE)).all()):
        raise ValueError("confidence lies in (0, 1]: a probability that the target is to reach")
    return confidence.detach().to(x).log().clamp_max(0.0)


def _limit(max_step: float | None) -> float:
    if max_step is None:
        return math.inf
    check_number("max_step", max_step)
    if max_step == 0:
        raise ValueError("max_step is a length > 0, not 0")
    return max_step
