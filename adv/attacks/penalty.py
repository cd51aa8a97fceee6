r"""Attacks that weigh the distance against a loss: L-BFGS and Carlini-Wagner.

For every weight $c$ the problem $\min\|\delta\|_2^2+c\,\ell(x+\delta)$ is solved anew, and the
smallest $c$ that still fools the model gives the nearest point. ``pdpgd`` does without this outer
search.
"""

import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import Bounds as Limits
from scipy.optimize import minimize
from torch import Tensor

from adv.attacks.common import (
    Best,
    Bounds,
    GradientWatch,
    Model,
    Observe,
    check_inputs,
    check_number,
    check_seed,
    eval_mode,
    expand,
    is_adversarial,
    loss_gradient,
    margin,
)
from adv.geometry import norm as norm_of

__all__ = ["carlini_wagner", "lbfgs"]

INSIDE = 0.999999
"""Share of the range in which the tanh variable may start, lest it be infinite."""
GROWTH = 10.0
"""Factor of a weight that has failed, as long as none has succeeded."""
HEAVIEST = 1e15
"""Where weights stop growing: squares of gradients so much larger would overflow in float32."""


def lbfgs(
    model: Model,
    x: Float[Tensor, "B ..."],
    y: Int[Tensor, " B"],
    *,
    steps: int = 500,
    searches: int = 10,
    weight: float | None = None,
    targeted: bool = False,
    bounds: Bounds = (0.0, 1.0),
    seed: int = 0,
    observe: Observe | None = None,
) -> Float[Tensor, "B ..."]:
    r"""L-BFGS: $\min\|\delta\|_2^2+c\,\ell$ in the box by L-BFGS-B, and a search for the least $c$.

    Toward a target $\ell=-\log p_t$, the cross-entropy; away from a label $\ell=-\log(1-p_y)$,
    which is bounded below as $-\mathrm{CE}$ is not. The source has $\|\delta\|$, which has no
    gradient where the search starts; its square trades distance for loss along the same points. A
    weight that fails grows tenfold until one succeeds; the logarithm of the weight is then
    bisected. Samples are solved one after another, in float64, on the CPU as far as scipy goes.

    Args:
        model: ``(B, ...) -> (B, K)`` logits.
        x: (B, ...) inputs inside ``bounds``.
        y: (B,) true labels, or targets where ``targeted``.
        steps: forward and backward passes of each sample at most, over all weights.
        searches: weights tried. Each may take an equal share of the steps, and what those before it
            have left of theirs.
        weight: the first $c$ in (0, 1e15], in squared units of ``x``; by default 0.01 times the
            squared range of the bounds. It grows to 1e15 at most.
        targeted: whether ``y`` is the class wanted.
        bounds: smallest and largest value of an input.
        seed: not used, since nothing is drawn.
        observe: ``(step, state)``, called at each pass with ``x_adv`` (1, ...), ``logits``,
            ``weight`` and ``index``, the sample's.

    Returns:
        (B, ...) the nearest adversarial inputs seen, inside ``bounds``; ``x`` itself where it is
        adversarial already or nothing was found.

    Raises:
        TypeError, ValueError: bad input, as ``check_inputs`` says; a weight that is not positive.

    Source: Szegedy et al. (2014), section 4.1; Matyasko (2020), (2.14); chapter ``benchmark``.
    """
    check_seed(seed)
    check_inputs(
        model, x, y, targeted=targeted, nearest=True, bounds=bounds, steps=steps, searches=searches
    )
    weight = 0.01 * (bounds[1] - bounds[0]) ** 2 if weight is None else weight
    _check_positive("weight", weight, x)
    check_number("weight", weight, HEAVIEST)
    x, watch, parts = x.detach(), GradientWatch(x), []
    with eval_mode(model):
        for i in range(len(x)):
            one = _Passes(model, x[i : i + 1], y[i : i + 1], targeted, bounds, i, observe)
            one.steps_before = i * steps
            _search_weight(one, steps, min(searches, steps), weight)
            watch.stuck[i], watch.broken[i] = one.watch.stuck[0], one.watch.broken[0]
            parts.append(one.best.x_adv)
    watch.report("lbfgs()")
    return torch.cat(parts)


class _SpentError(Exception):
    """A solver has used up its passes."""


class _Passes:
    """The penalized objective of one sample, as scipy wants it; keeps the nearest success."""

    def __init__(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        targeted: bool,
        bounds: Bounds,
        index: int,
        observe: Observe | None,
    ) -> None:
        self.model, self.x, self.y, self.targeted, self.bounds = model, x, y, targeted, bounds
        self.index, self.observe, self.best, self.watch = index, observe, Best(x), GradientWatch(x)
        self.steps_before, self.count, self.limit, self.weight = 0, 0, 0, 0.0
        self.success = False

    def __call__(self, z: np.ndarray[Any, Any]) -> tuple[float, np.ndarray[Any, Any]]:
        if self.count == self.limit:
            raise _SpentError
        x_adv = torch.from_numpy(z).to(self.x).reshape(self.x.shape).clamp(*self.bounds)
        loss: list[Tensor] = []

        def value(logits: Tensor, y: Tensor) -> Tensor:
            loss.append(_reluctance(logits, y, self.targeted))
            return loss[0]

        logits, gradient = loss_gradient(self.model, x_adv, self.y, value)
        hit = is_adversarial(logits, self.y, self.targeted)
        gradient = self.watch.see(gradient, hit)
        delta = x_adv - self.x
        self.best.update(x_adv, norm_of(delta, "l2"), hit)
        self.success |= bool(hit)
        if self.observe is not None:
            state = {"x_adv": x_adv, "logits": logits}
            known = {"weight": torch.tensor(self.weight), "index": torch.tensor(self.index)}
            self.observe(self.steps_before + self.count, state | known)
        self.count += 1
        total = delta.square().sum() + self.weight * loss[0].detach().sum()
        slope = 2 * delta + self.weight * gradient
        return float(total), slope.flatten().cpu().double().numpy()


def _search_weight(one: _Passes, steps: int, searches: int, weight: float) -> None:
    """Solve for one weight after another, closing in on the smallest that succeeds."""
    low, high, start = 0.0, math.inf, one.x.flatten().cpu().double().numpy()
    for search in range(searches):
        one.weight, one.success = weight, False
        one.limit = (search + 1) * steps // searches
        with suppress(_SpentError):
            minimize(
                one,
                start,
                jac=True,
                method="L-BFGS-B",
                bounds=Limits(*one.bounds),
                options={"maxfun": steps, "maxiter": steps},
            )
        if float(one.best.distance) == 0:
            return
        low, high = (low, weight) if one.success else (weight, high)
        weight = GROWTH * weight if math.isinf(high) else math.sqrt(max(low, high / 100) * high)
        weight = min(weight, HEAVIEST)


def _reluctance(logits: Tensor, y: Tensor, targeted: bool) -> Tensor:
    """(B,) minus the log-probability of what the attacker wants: the target, or not the label."""
    log_p = logits.log_softmax(dim=1)
    if targeted:
        return -log_p.gather(1, y[:, None]).squeeze(1)
    return -log_p.scatter(1, y[:, None], -math.inf).logsumexp(dim=1)


def carlini_wagner(
    model: Model,
    x: Float[Tensor, "B ..."],
    y: Int[Tensor, " B"],
    *,
    steps: int = 9000,
    searches: int = 9,
    weight: float | None = None,
    lr: float = 0.01,
    confidence: float = 0.0,
    variable: Literal["tanh", "clip"] = "tanh",
    targeted: bool = False,
    bounds: Bounds = (0.0, 1.0),
    seed: int = 0,
    observe: Observe | None = None,
) -> Float[Tensor, "B ..."]:
    r"""Carlini-Wagner in l2: $\min\|\delta\|_2^2+c\max(m+\kappa,0)$ by Adam, and a search for $c$.

    $m$ is the margin of the label (of a target: minus its margin). The box is kept by
    $x'=\frac{hi+lo}2+\frac{hi-lo}2\tanh w$, or by clipping. All samples move together, each with
    its own $c$: tenfold until it succeeds, then the middle between the largest that failed and the
    smallest that succeeded. Every search starts from ``x``.

    Args:
        model: ``(B, ...) -> (B, K)`` logits.
        x: (B, ...) inputs inside ``bounds``.
        y: (B,) true labels, or targets where ``targeted``.
        steps: forward and backward passes of each sample, over all weights; the first is at ``x``.
        searches: weights tried, each with an equal share of the other steps.
        weight: the first $c$ in (0, 1e15], in squared units of ``x``; by default 0.001 times the
            squared range of the bounds. It grows to 1e15 at most.
        lr: Adam's step size, in units of $w$, or of the half range with ``"clip"``.
        confidence: $\kappa\ge0$, in units of the logits; only points with $m<-\kappa$ count.
        variable: how the box is kept, ``"tanh"`` or ``"clip"``.
        targeted: whether ``y`` is the class wanted.
        bounds: smallest and largest value of an input.
        seed: not used, since nothing is drawn.
        observe: ``(step, state)``, called at each pass with ``x_adv``, ``logits``, ``weight`` (B,)
            and ``distance``, the best so far.

    Returns:
        (B, ...) the nearest adversarial inputs seen, inside ``bounds``; ``x`` itself where it is
        adversarial already or nothing was found.

    Raises:
        TypeError, ValueError: bad input, as ``check_inputs`` says; an unknown variable; a weight
            or ``lr`` that is not positive.

    Source: Carlini and Wagner (2017), section VI; Matyasko (2020), section 2.4; chapter
    ``benchmark``.
    """
    check_seed(seed)
    check_inputs(
        model, x, y, targeted=targeted, nearest=True, bounds=bounds, steps=steps, searches=searches
    )
    check_number("confidence", confidence)
    weight = 1e-3 * (bounds[1] - bounds[0]) ** 2 if weight is None else weight
    _check_positive("weight", weight, x)
    check_number("weight", weight, HEAVIEST)
    _check_positive("lr", lr, x)
    box = _Box(x.detach(), bounds, variable)
    x, best, watch, count = x.detach(), Best(x), GradientWatch(x), 0
    c, low = x.new_full((len(x),), weight), x.new_zeros(len(x))
    high = torch.full_like(c, math.inf)

    def look(x_adv: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal count
        logits, gradient = loss_gradient(model, x_adv, y, hinge)
        m = -margin(logits, y) if targeted else margin(logits, y)
        hit = is_adversarial(logits, y, targeted) & (m < -confidence if confidence else True)
        best.update(x_adv, norm_of(x_adv - x, "l2"), hit)
        if observe is not None:
            known = {"weight": c, "distance": best.distance}
            observe(count, {"x_adv": x_adv, "logits": logits, **known})
        count += 1
        return watch.see(gradient, hit), hit

    def hinge(logits: Tensor, y: Tensor) -> Tensor:
        m = -margin(logits, y) if targeted else margin(logits, y)
        return (m + confidence).clamp_min(0)

    with eval_mode(model):
        look(x)
        searches = min(searches, steps - 1)
        for search in range(searches):
            passes = (steps - 1) * (search + 1) // searches - (steps - 1) * search // searches
            success = _descend(box, look, c, passes, lr)
            low, high = torch.where(success, low, c), torch.where(success, c, high)
            c = torch.where(high < math.inf, (low + high) / 2, GROWTH * c)
            c = c.clamp_max(HEAVIEST)
    watch.report("carlini_wagner()")
    return best.x_adv


def _descend(
    box: "_Box",
    look: Callable[[Tensor], tuple[Tensor, Tensor]],
    c: Tensor,
    passes: int,
    lr: float,
) -> Tensor:
    """Adam on the penalized distance from ``x``; (B,) whether a success was seen."""
    w = box.start
    mean, square = torch.zeros_like(w), torch.zeros_like(w)
    success = torch.zeros_like(c, dtype=torch.bool)
    for k in range(1, passes + 1):
        x_adv, slope = box.point(w)
        gradient, hit = look(x_adv)
        success = success | hit
        g = (2 * (x_adv - box.x) + expand(c, gradient) * gradient) * slope
        mean, square = mean.lerp(g, 0.1), square.lerp(g * g, 0.001)
        step = mean / (1 - 0.9**k) / ((square / (1 - 0.999**k)).sqrt() + 1e-8)
        w = box.inside(w - lr * step)
    return success


class _Box:
    """The variable of the descent and the point it stands for."""

    def __init__(self, x: Tensor, bounds: Bounds, variable: str) -> None:
        if variable not in ("tanh", "clip"):
            raise ValueError(f"variable is 'tanh' or 'clip', not {variable!r}")
        self.x, self.bounds, self.tanh = x, bounds, variable == "tanh"
        self.center, self.half = (bounds[1] + bounds[0]) / 2, (bounds[1] - bounds[0]) / 2
        share = ((x - self.center) / self.half).clamp(-1, 1)
        self.start = torch.atanh(INSIDE * share) if self.tanh else share

    def point(self, w: Tensor) -> tuple[Tensor, Tensor | float]:
        """The point and its derivative by ``w``."""
        share = torch.tanh(w) if self.tanh else w
        slope = self.half * (1 - share.square()) if self.tanh else self.half
        return (self.center + self.half * share).clamp(*self.bounds), slope

    def inside(self, w: Tensor) -> Tensor:
        return w if self.tanh else w.clamp(-1, 1)


def _check_positive(name: str, value: float, x: Tensor) -> None:
    """Raise unless a number is positive, also as rounded to the inputs' type."""
    check_number(name, value)
    if not x.new_tensor(value) > 0:
        raise ValueError(f"{name} must be positive in {x.dtype}, or nothing moves; {value!r} is 0")
