"""A budget of passes for a batch, spent by ``pdpgd``: where it looks, and the nearest found."""

import copy
import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from adv.attacks._size import Size, crossing
from adv.attacks.common import (
    TOLERANCE,
    Best,
    Bounds,
    GradientWatch,
    Model,
    Observe,
    drawn,
    expand,
    is_adversarial,
    loss_gradient,
    margin,
)
from adv.geometry import room

CLASSES = 9
"""Classes to scout at most: those with the largest logits."""
BEYOND = 4 * TOLERANCE
"""How far beyond the boundary to aim, relative to the largest logit."""


class Seen(NamedTuple):
    """What a pass at ``x_adv`` tells; ``reached``: its size where it is adversarial, else inf."""

    x_adv: Tensor
    logits: Tensor
    margin: Tensor
    gradient: Tensor
    size: Tensor
    reached: Tensor


class Search:
    """A budget of passes for a batch: looks at points, keeps the nearest adversarial ones.

    A ``part`` goes on with some of the samples: with those that aren't adversarial as they are, and
    with those that follow one plan.
    """

    def __init__(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        h: Size,
        targeted: bool,
        bounds: Bounds,
        steps: int,
        observe: Observe | None,
    ) -> None:
        self.model, self.x, self.y, self.targeted = model, x, y, targeted
        self.h = h
        self.bounds, self.steps, self.left, self.observe = bounds, steps, steps, observe
        self.given, self.width = x, bounds[1] - bounds[0]
        self.rows: Tensor | None = None  # of the inputs, where not all are searched for
        self.box, self.best, self.watch = room(x, bounds), Best(x), GradientWatch(x)
        self.finite = torch.ones((), dtype=torch.bool, device=x.device)

    def begin(self) -> None:
        """Look at ``x``."""
        self.first = self.look(torch.zeros_like(self.x), None)
        self.tell(self.first, "scout")
        self.check()

    def rivals(self) -> Int[Tensor, "B C"]:
        """The most likely other classes, in order."""
        logits = self.first.logits
        count = max(1, min(logits.shape[1] - 1, CLASSES, self.steps // 10))
        order = logits.scatter(1, self.y[:, None], -math.inf).argsort(dim=1, descending=True)
        return order[:, :count]

    def part(self, chosen: Bool[Tensor, " B"]) -> "Search":
        """The search for some of the samples, with the same passes left."""
        if bool(chosen.all()):
            return self
        part, rows = copy.copy(self), chosen.nonzero().squeeze(1)
        part.rows = rows if self.rows is None else self.rows[rows]
        part.x, part.y = self.x[rows], self.y[rows]
        part.first = Seen(*(value[rows] for value in self.first))
        part.box = room(part.x, self.bounds)
        part.best, part.watch = Best(part.x), GradientWatch(part.x)
        part.best.update(self.best.x_adv[rows], self.best.distance[rows])
        watch = self.watch
        part.watch.stuck, part.watch.done = watch.stuck[rows], watch.done[rows]
        part.watch.broken = watch.broken[rows]
        return part

    def take(self, part: "Search", chosen: Bool[Tensor, " B"]) -> None:
        """Take over what a part has found; ``chosen`` are its samples."""
        if part is self:
            return
        # New tensors: an observer may have kept the old ones.
        self.best.x_adv = self.best.x_adv.index_put((chosen,), part.best.x_adv)
        self.best.distance = self.best.distance.index_put((chosen,), part.best.distance)
        self.watch.stuck[chosen], self.watch.broken[chosen] = part.watch.stuck, part.watch.broken

    def look(self, delta: Tensor, rival: Tensor | None) -> Seen:
        """One forward and one backward pass at ``x + delta``; ``rival``: the class, None all."""
        x_adv = (self.x + delta).clamp_(*self.bounds)
        m: list[Tensor] = []

        def climb(logits: Tensor, y: Tensor) -> Tensor:
            m.append(_margin(logits, y, rival, self.targeted))
            return m[0]

        logits, gradient = loss_gradient(self.model, x_adv, self.y, climb)
        self.left -= 1
        self.finite &= logits.isfinite().all()
        size = self.h.value(delta)
        hit = is_adversarial(logits, self.y, self.targeted)
        self.best.update(x_adv, size, hit)
        gradient = self.watch.see(gradient, hit)
        reached = torch.where(hit, size, math.inf)
        # Steps are taken in the precision of x, whatever that of the logits.
        logits, value = (part.to(x_adv.dtype) for part in (logits, m[0].detach()))
        return Seen(x_adv, logits, value, gradient, size, reached)

    def tell(self, seen: Seen, phase: str, **known: Tensor) -> None:
        """Report the pass just made."""
        if self.observe is not None:
            state = {
                name: getattr(seen, name) for name in ("x_adv", "logits", "margin", "gradient")
            }
            index = torch.arange(len(self.given)) if self.rows is None else self.rows.cpu()
            state |= {"distance": self.best.distance, "phase": phase, "index": index, **known}
            self.observe(self.steps - self.left - 1, state)

    def locate(
        self, delta: Tensor, rival: Tensor | None, phase: str = "scout"
    ) -> tuple[Tensor, Tensor]:
        """The nearest point of the boundary as linearized at ``delta``, and its distance."""
        seen = self.look(delta, rival)
        self.tell(seen, phase)
        return self.project(seen, delta)

    def project(self, seen: Seen, delta: Tensor) -> tuple[Tensor, Tensor]:
        """The same from a pass made before."""
        g = seen.gradient
        beyond = BEYOND * seen.logits.abs().amax(dim=1)
        gap = seen.margin - (g * delta).flatten(1).sum(dim=1) + beyond
        delta = crossing(g, gap, self.h.shape, box=self.box)
        distance = self.h.value(delta)
        if self.h.counts:  # equal counts are told apart by the l1 distance
            distance = distance + 1e-3 / self.width * delta.flatten(1).abs().sum(dim=1)
        stuck = (g == 0).flatten(1).all(dim=1)
        return delta, torch.where(stuck, math.inf, distance)

    def first_landing(self) -> tuple[Tensor, Tensor]:
        """The nearest point of the boundary as linearized at ``x``, and its distance."""
        return self.project(self.first, torch.zeros_like(self.x))

    def first_margin(self, rival: Tensor | None) -> Tensor:
        """The margin at ``x``."""
        return _margin(self.first.logits, self.y, rival, self.targeted)

    def gain(self, gain: float | None, rival: Tensor | None) -> Tensor:
        r"""$\gamma$, the factor of the margins: ``gain`` over the margin at ``x``."""
        m = self.first_margin(rival)
        if gain is None:
            return torch.ones_like(m)
        scale = self.first.logits.abs().amax(dim=1)
        return gain / torch.maximum(m, 1e-4 * scale).clamp_min(torch.finfo(m.dtype).tiny)

    def unit(self, distance: Tensor, adapt: bool) -> Tensor:
        """(B,) what step sizes are multiples of: a solution's largest or typical entry."""
        if not adapt:
            return torch.full_like(distance, self.width)
        distance = torch.where(distance < math.inf, distance, self.width).clamp_min(1e-6)
        return distance / math.sqrt(self.x[0].numel()) if self.h.kind == "l2" else distance

    def nearest(self) -> Tensor:
        """The best perturbation so far, 0 where there is none."""
        return self.best.x_adv - self.x

    def start(self, radius: float | None, distance: Tensor, draws: torch.Generator) -> Tensor:
        """Uniform perturbations of a radius in shares of the range, or as large as a solution's."""
        if radius == 0:
            return torch.zeros_like(self.x)
        uniform = drawn(torch.rand, self.given.shape, self.x, draws) * 2 - 1
        if self.rows is not None:
            uniform = uniform[self.rows]
        if radius is not None:
            scale = torch.full_like(distance, radius * self.width)
        else:
            scale = self.h.entry(distance, self.x[0].numel(), self.width)
        return torch.clamp(expand(scale, uniform) * uniform, *self.box)

    def check(self) -> None:
        if not bool(self.finite):
            raise ValueError("the model's logits are not finite on some of the points")

    def finish(self) -> Tensor:
        """The nearest adversarial points, in the order of the inputs."""
        self.check()
        self.watch.report("pdpgd()", 4)
        if self.rows is None:
            return self.best.x_adv
        x_adv = self.given.clone()
        x_adv[self.rows] = self.best.x_adv
        return x_adv


def _margin(logits: Tensor, y: Tensor, rival: Tensor | None, targeted: bool) -> Tensor:
    """What must become negative: f_y - f_rival, or the margin; of a target, minus its margin."""
    if targeted:
        return -margin(logits, y)
    if rival is None:
        return margin(logits, y)
    pair = logits.gather(1, torch.stack([y, rival], dim=1))
    return pair[:, 0] - pair[:, 1]
