r"""PDGD and PDPGD: the smallest perturbation as a game between $\delta$ and a multiplier.

$\min\|\delta\|$ subject to $m(x+\delta)<0$, the margin, in a box. Two players: $\delta$ descends
$\lambda\|\delta\|+\phi(m(x+\delta))$ with a smooth $\phi$, by a gradient step on $\phi$ and the
proximal operator of the norm; $\lambda$ falls while $m>0$ and grows while $m<0$. Both move on every
forward and backward pass, so that no search over $\lambda$ is needed. What decides the result is
the basin: the budget is first spent on finding the class whose boundary is nearest, and where
slopes turn out to mislead, on games from random points with large steps.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int
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
    eval_mode,
    expand,
    generator,
    is_adversarial,
    loss_gradient,
    margin,
)
from adv.geometry import Box, Norm, Penalty, dual_norm, exponent, pixels, prox, room

__all__ = ["RECOMMENDED", "THESIS", "Regularizer", "Settings", "crossing", "pdpgd"]

NAMES = {math.inf: "linf", 2.0: "l2", 1.0: "l1"}
DECAY, EPSILON = 0.999, 1e-8
"""Of Adam's second moment."""
CLASSES = 9
"""Classes to scout at most: those with the largest logits."""
ROUNDS = 3
"""Linearizations by which the boundary of a class that passed the first round is located."""
NEWTON = 5
"""Newton steps for the level of a proximal operator, twice as many for a crossing."""
TOP = 64
"""Entries that a crossing sorts at first, on a CPU; all of them where these do not reach."""
POWERS = {"l1/2": 1 / 2, "l2/3": 2 / 3}
AMPLE = 240
"""Passes from which on trials and exploration pay."""
TRIAL, EXCURSION = 1 / 12, 1 / 32
"""Shares of the passes for a trial, against a class or all, and for an exploring game."""
EXPLORE, FARTHEST, NEAREST = 0.2, 0.8, 1 / 8
"""Share of the passes for games from random points; their first radius; the last to the first."""
LANDING = 4
"""Projections at the end of a short game."""
MISLED = 4
"""Linearizations mislead where a landing is this many times farther than they promised."""
WIDE = {"linf": 0.1, "l2": 0.2, "l1": 3.0}
"""For misled samples: units of the step sizes, in shares of the range; 1 under other penalties."""
SCATTER = 0.3
"""For misled samples: radius of the random starts, as a share of the range."""
ROAM = 0.55
"""For misled samples: of the passes left after the first trial, the share for further trials."""
SPARSE = ("l1", "l0", "group_l0", "l1/2", "l2/3")
"""Penalties whose solutions leave most entries alone: relaxed games are an alternative."""
RELAX, RELAXED_SHARE = 1 / 7, 0.9
"""Share of the passes for a relaxed game; of what is left then, the share for further ones."""
CUT = 0.3
"""Where entries are counted, a relaxed game drops those below this share of the range."""
POLISH = 8
"""Projections onto the linearized boundary at the end, at most."""
BEYOND = 4 * TOLERANCE
"""How far beyond the boundary to aim, relative to the largest logit."""


@dataclass(frozen=True)
class Regularizer:
    """Any penalty with a proximal operator, to minimize instead of a norm.

    Args:
        value: perturbations (B, ...) to their penalties (B,), 0 at 0.
        prox: points (B, ...) and weights (B,) to the minimizers of
            ``weight * value(z) + 0.5 * ||z - u||^2``; it is clipped to the bounds afterwards.

    Raises:
        TypeError: one of them is no function.
    """

    value: Callable[[Tensor], Tensor]
    prox: Callable[[Tensor, Tensor], Tensor]

    def __post_init__(self) -> None:
        if not (callable(self.value) and callable(self.prox)):
            raise TypeError("a Regularizer is made of two functions, value(delta) and prox(u, lam)")


@dataclass(frozen=True)
class Settings:
    r"""How the game is played.

    Args:
        step: first and last step size $a$ of Adam; with ``adapt`` in units of the distance to the
            linearized boundary, otherwise of the range of the bounds.
        rate: first and last step size $b$ of the multiplier's logarithm.
        decay: how $a$ goes from first to last; $b$ always goes linearly.
        momentum: $\beta_1$ of Adam.
        feedback: what moves the multiplier: the margin's ``"sign"`` or its ``"tanh"``.
        gain: margins are divided by the one at ``x`` and multiplied by this; ``None``: left alone.
        multiplier: first $\lambda$; ``None``: the equilibrium's,
            $\frac12\|\nabla m\|_q$ at the first point.
        inner: 0: the exact proximal operator in Adam's metric; else steps of the author's inner
            loop.
        scout: look for the nearest class first.
        adapt: see ``step``.
        radius: of the uniform first perturbation, as a share of the range of the bounds; 0 starts
            at ``x``. Restarts use it too, or the distance to the linearized boundary where it is 0.
        finetune: spend a last run on the best point, with steps 100 times smaller.

    Raises:
        TypeError, ValueError: step sizes, a gain or a multiplier that are not positive numbers; a
            momentum not in [0, 1); a negative radius or number of inner steps; unknown names.
    """

    step: tuple[float, float]
    rate: tuple[float, float] = (0.1, 0.01)
    decay: Literal["exponential", "linear"] = "exponential"
    momentum: float = 0.9
    feedback: Literal["sign", "tanh"] = "tanh"
    gain: float | None = 30.0
    multiplier: float | None = None
    inner: int = 0
    scout: bool = True
    adapt: bool = True
    radius: float = 0.0
    finetune: bool = False

    def __post_init__(self) -> None:
        for name in ("step", "rate"):
            pair = getattr(self, name)
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise TypeError(f"{name} is a pair of numbers, the first and the last, not {pair}")
            for value in pair:
                _check_positive(name, value)
        for name in ("gain", "multiplier"):
            if getattr(self, name) is not None:
                _check_positive(name, getattr(self, name))
        check_number("momentum", self.momentum, math.nextafter(1, 0))
        check_number("radius", self.radius)
        _check_whole("inner", self.inner)
        for name, known in (("decay", ("exponential", "linear")), ("feedback", ("sign", "tanh"))):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} is {known[0]!r} or {known[1]!r}, not {getattr(self, name)!r}"
                )


def _check_positive(name: str, value: float) -> None:
    check_number(name, value)
    if value == 0:
        raise ValueError(f"{name} must be positive, not 0")


def _check_whole(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is an integer >= 0, not {value!r}")
    if value < 0:
        raise ValueError(f"{name} is an integer >= 0, not {value}")


RECOMMENDED = {
    "linf": Settings(step=(4.0, 0.04), momentum=0.5, feedback="sign"),
    "l2": Settings(step=(2.2, 0.022)),
    "l1": Settings(step=(1.0, 0.01), decay="linear"),
    "l0": Settings(step=(10.0, 0.3), feedback="sign", gain=None, adapt=False),
    "l1/2": Settings(step=(1.0, 0.01), feedback="sign", gain=None, adapt=False),
    "l2/3": Settings(step=(1.0, 0.01), feedback="sign", gain=None, adapt=False),
    "own": Settings(step=(0.1, 0.001), adapt=False),
}
"""Settings for each norm and for a ``Regularizer``; group_l0 takes those of l0."""

RELAXED = Settings(step=(1.0, 0.3), momentum=0.7, adapt=False)
"""Of the relaxed game, under any penalty and whatever settings are given: step, rate, momentum."""

THESIS = Settings(
    step=(1.0, 0.01),
    feedback="sign",
    gain=None,
    multiplier=0.01,
    inner=5,
    scout=False,
    adapt=False,
    radius=0.5,
    finetune=True,
)
"""The settings of the thesis, filled in from its author's code where the text is silent."""


def pdpgd(
    model: Model,
    x: Float[Tensor, "B ..."],
    y: Int[Tensor, " B"],
    *,
    norm: Norm | Penalty | Regularizer = "linf",
    steps: int = 500,
    restarts: int = 0,
    settings: Settings | Literal["recommended", "thesis"] = "recommended",
    targeted: bool = False,
    bounds: Bounds = (0.0, 1.0),
    seed: int = 0,
    observe: Observe | None = None,
) -> Float[Tensor, "B ..."]:
    r"""Primal-dual (proximal) gradient descent: a minimal-norm attack with one pass for each step.

    The plan of an untargeted attack: the boundaries of the most likely classes are located by
    projections onto their linearizations; from 240 steps on, a game is played against each of the
    nearest, and some short ones from random points; the rest goes into a game against the class
    found nearest, and projections at its end. Where the linearizations turn out to mislead, as on
    networks with saturated units, games are against all classes at once, from random points, with
    steps of the order of the range; under sparse penalties a relaxed game is tried too, and goes on
    where it came nearer. A targeted attack plays one game.

    Args:
        model: ``(B, ...) -> (B, K)`` logits, samples not interacting.
        x: (B, ...) inputs inside ``bounds``.
        y: (B,) true labels, or targets where ``targeted``.
        norm: what to minimize: ``"linf"``, ``"l2"``, ``"l1"``, ``"l0"`` or ``"group_l0"`` (both the
            number of pixels, as ``geometry.pixels`` counts them: to count the values of color
            images give them flat, (B, d)), ``"l1/2"``, ``"l2/3"``, or a ``Regularizer``.
        steps: forward passes of each sample, and as many backward passes, all phases together.
        restarts: games from random points, which share the last phase with the one from ``x``.
        settings: ``"recommended"``, ``"thesis"`` (random start, no scouting, finetuning within the
            budget), or ``Settings``; relaxed games have their own.
        targeted: whether ``y`` is the class wanted.
        bounds: smallest and largest value of an input.
        seed: of the random points.
        observe: called at each pass with ``x_adv``, ``logits``, ``margin``, ``gradient`` (of the
            margin), ``distance`` (best so far), ``phase`` (``"scout"``, ``"trial"``, ``"explore"``,
            ``"relaxed"``, ``"game"``, ``"finetune"`` or ``"polish"``), ``index`` (the samples of
            the pass) and, in a game, the multiplier ``lam`` and the factor ``gain`` of the margin.
            Samples where linearizations mislead are a batch or two of their own after the
            scouting: step numbers then repeat, once for each batch.

    Returns:
        (B, ...) the nearest adversarial inputs seen, inside ``bounds``; ``x`` itself where it is
        adversarial already or nothing was found.

    Raises:
        TypeError, ValueError: bad input, as ``check_inputs`` says; an unknown norm or settings;
            logits that are not finite.

    Source: Matyasko (2020), section 5.3, Algorithms 2 and 3 as corrected by E1 to E15; chapter
    ``pdpgd``.
    """
    check_inputs(model, x, y, bounds=bounds, steps=steps)
    _check_whole("restarts", restarts)
    generator(seed)  # so that a bad seed is told before the first pass
    penalty = _penalty(norm, x)
    rules = _settings(settings, penalty)
    with eval_mode(model):
        search = _Search(model, x.detach(), y, penalty, targeted, bounds, steps, observe)
        search.begin()
        if observe is None:
            search = search.part(~search.best.found)
        if not len(search.x):  # all are adversarial already
            return search.finish()
        if targeted or not rules.scout:
            _games(search, rules, None, search.first_distance(), restarts, generator(seed))
            return search.finish()
        rivals, distances = _scout(search)
        misled = search.judge(distances)
        for plan, rows in ((_trust, ~misled), (_distrust, misled)):
            search.split(plan, rows, rules, rivals, distances, restarts, seed)
    return search.finish()


# --------------------------------------------------------------------------------------- the game


def _play(
    search: "_Search",
    rules: Settings,
    rival: Tensor | None,
    passes: int,
    delta: Tensor,
    distance: Tensor,
    phase: str,
) -> tuple[Tensor, Tensor]:
    r"""Algorithm 3, or Algorithm 2 under l2; the distances it reached, and where it ended.

    One pass at $x+\delta$ gives $m$ and $\nabla m$ to both players: Adam steps on
    $\phi(m)=\log(1+e^{\gamma m})$ alone, the proximal operator of $\lambda h$ is taken in Adam's
    metric $\psi/a$, and $\log\lambda$ moves against $m$.
    """
    penalty, adam = search.penalty, _Adam(delta, rules.momentum, search.penalty.isotropic)
    reached = torch.full_like(distance, math.inf)
    unit = search.unit(distance, rules.adapt)
    for k in range(passes):
        seen = search.look(delta, rival)
        m, g = seen.margin, seen.gradient
        reached = torch.minimum(reached, seen.reached)
        if k == 0:
            gain = search.gain(rules.gain, rival)
            log_lam = penalty.equilibrium(m, g, gain, rules.multiplier).log()
            weights = _simplex(log_lam)
        weights = weights.lerp(_simplex(log_lam), 0.1)
        lam = weights[0] / weights[1]
        search.tell(seen, phase, lam=lam, gain=gain)
        a, b = _schedules(rules, k, passes)
        slope = gain * torch.sigmoid(gain * m)  # phi'(m)
        if penalty.smooth:  # Algorithm 2: the norm's own gradient joins in
            pull = weights[0] / torch.where(seen.size > 0, seen.size, 1.0)
            u, _ = adam.step(
                delta, expand(weights[1] * slope, g) * g + expand(pull, g) * delta, a * unit
            )
            delta = torch.clamp(u, *search.box)
        else:
            u, metric = adam.step(delta, expand(slope, g) * g, a * unit)
            delta = _backward(penalty, rules.inner, u, lam, search.box, metric, seen.size)
        log_lam = log_lam - b * (m.sign() if rules.feedback == "sign" else torch.tanh(gain * m))
    return reached, delta


def _backward(
    penalty: "_Penalty",
    inner: int,
    u: Tensor,
    lam: Tensor,
    box: Box,
    metric: Tensor,
    size: Tensor,
) -> Tensor:
    r"""The proximal step $\arg\min_z\lambda h(z)+\frac12\sum_iw_i(z_i-u_i)^2$ within the box."""
    if not inner:
        return penalty.prox(u, lam, box, metric, size)
    # The author's way: a few proximal gradient steps on this problem, in its coarsest metric.
    top = metric.flatten(1).amax(dim=1)
    z, contraction = u, metric / expand(top, metric)
    for _ in range(inner):
        z = penalty.prox(z - contraction * (z - u), lam / top, None, None, size)
        z = torch.clamp(z, *box)
    return z


def _simplex(log_lam: Tensor) -> Tensor:
    r"""(2, B) weights of norm and loss, $w_0+w_1=1$ and $w_0/w_1=\lambda$: what is averaged."""
    return torch.stack([log_lam, torch.zeros_like(log_lam)]).softmax(dim=0)


def _schedules(rules: Settings, k: int, passes: int) -> tuple[float, float]:
    """Step sizes of both players at pass ``k``."""
    share = k / max(1, passes - 1)
    (first, last), (begin, end) = rules.step, rules.rate
    linear = first + (last - first) * share
    a = linear if rules.decay == "linear" else first * (last / first) ** share
    return a, begin + (end - begin) * share


class _Adam:
    """Adam, which also says in what metric its step was taken."""

    def __init__(self, like: Tensor, momentum: float, isotropic: bool) -> None:
        self.mean, self.square, self.count = torch.zeros_like(like), torch.zeros_like(like), 0
        self.momentum, self.isotropic = momentum, isotropic

    def step(self, delta: Tensor, g: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        r"""$u=\delta-a\hat m/\psi$ with $\psi=\sqrt{\hat v}+\epsilon$, and the metric $\psi/a$."""
        self.count += 1
        self.mean.lerp_(g, 1 - self.momentum)
        if self.isotropic:
            g = expand(g.flatten(1).square().mean(dim=1).sqrt(), g).expand_as(g)
        self.square.mul_(DECAY).addcmul_(g, g, value=1 - DECAY)
        psi = (self.square / (1 - DECAY**self.count)).sqrt_().add_(EPSILON)
        metric = psi.div_(expand(a, psi))
        return torch.addcdiv(
            delta, self.mean, metric, value=-1 / (1 - self.momentum**self.count)
        ), metric


# ----------------------------------------------------------------------------- the plan of passes


def _scout(search: "_Search") -> tuple[Int[Tensor, "B C"], Float[Tensor, "B C"]]:
    """Classes by the distance of their boundaries, nearest first, and these distances.

    First each boundary is linearized at ``x``; then, for as many of the nearest classes as a fourth
    of the budget allows, three times more where the last linearization put it.
    """
    rivals = search.rivals()
    count = rivals.shape[1]
    if count == 1:
        return rivals, search.first_distance()[:, None]
    zero = torch.zeros_like(search.x)
    pairs = [search.project(search.first, zero)]
    pairs += [search.locate(zero, rivals[:, i]) for i in range(1, count)]
    deltas = torch.stack([delta for delta, _ in pairs], dim=1)
    distances = torch.stack([distance for _, distance in pairs], dim=1)
    rivals, deltas, distances = _sorted(distances, rivals, deltas, distances)
    keep = min(count, (search.steps // 4 - count) // ROUNDS)
    if keep < 2:
        return rivals, distances
    for i in range(keep):
        for _ in range(ROUNDS):
            deltas[:, i], distances[:, i] = search.locate(deltas[:, i], rivals[:, i])
    rivals, distances = _sorted(distances[:, :keep], rivals[:, :keep], distances[:, :keep])
    return rivals, distances


def _trust(
    search: "_Search",
    rules: Settings,
    rivals: Int[Tensor, "B C"],
    distances: Float[Tensor, "B C"],
    restarts: int,
    seed: int,
) -> None:
    """The plan after scouting: the class against which a short game ends nearest gets the rest."""
    games = min(rivals.shape[1], round(search.left / 80))
    draws = generator(seed)
    if games >= 2 and search.steps >= AMPLE:
        zero = torch.zeros_like(search.x)
        for i in range(games):
            near = _short(search, rules, rivals[:, i], TRIAL, zero, distances[:, i], "trial")
            distances[:, i] = torch.where(near < math.inf, near, distances[:, i])
        rivals, distances = _sorted(distances[:, :games], rivals[:, :games], distances[:, :games])
    _explore(search, rules, distances[:, 0], draws)
    _games(search, rules, rivals[:, 0], distances[:, 0], restarts, draws)


def _distrust(
    search: "_Search",
    rules: Settings,
    rivals: Int[Tensor, "B C"],
    distances: Float[Tensor, "B C"],
    restarts: int,
    seed: int,
) -> None:
    """The plan where linearizations mislead: a game against all classes, with large steps.

    Under sparse penalties one game of each kind decides how a sample goes on.
    """
    search.misled, zero = True, torch.zeros_like(search.x)
    wide = torch.full_like(search.best.distance, search.wide())
    near = _short(search, rules, None, TRIAL, zero, wide, "trial")
    nearer = torch.zeros_like(search.best.found)
    if search.penalty.kind in SPARSE:
        nearer = _relax(search, zero) < near
    for relaxed, rows in ((False, ~nearer), (True, nearer)):
        plan = partial(_roam, relaxed=relaxed)
        search.split(plan, rows, rules, rivals, distances, restarts, seed)


def _roam(
    search: "_Search",
    rules: Settings,
    _rivals: Int[Tensor, "B C"],
    distances: Float[Tensor, "B C"],
    restarts: int,
    seed: int,
    *,
    relaxed: bool,
) -> None:
    """Relaxed games, or trials and explorations, from random points against all classes."""
    wide, draws = torch.full_like(search.best.distance, search.wide()), generator(seed)
    share, length = (RELAXED_SHARE, RELAX) if relaxed else (ROAM, TRIAL)
    for _ in range(int(share * search.left) // _passes(search, length)):
        start = search.start(SCATTER, wide, draws)
        if relaxed:
            _relax(search, start)
        else:
            _short(search, rules, None, TRIAL, start, wide, "trial")
    if not relaxed:
        _explore(search, rules, wide, draws)
    _games(search, rules, None, distances[:, 0], restarts, draws)


def _relax(search: "_Search", delta: Tensor) -> Tensor:
    r"""A game for sparse solutions where most slopes are hidden; the distances it reached.

    The l1 norm (of pixels' lengths, where these are counted) stands for the penalty: within
    $\|\delta\|_\infty\le w$, $\|\delta\|_1/w$ is the largest convex function below the count. The
    gradient, of unit l-infinity norm, steers Adam, under which all entries move alike. The
    threshold is the same for all as well, and not in Adam's metric, where an entry with a small
    slope cannot leave 0. The game begins at $\lambda=\frac12$, as the equilibrium law has it for
    slopes of at most 1.
    """
    adam, gain = _Adam(delta, RELAXED.momentum, isotropic=False), search.gain(RELAXED.gain, None)
    passes = _passes(search, RELAX)
    log_lam = torch.full_like(gain, math.log(0.5))
    reached = torch.full_like(gain, math.inf)
    for k in range(passes):
        seen = search.look(delta, None)
        reached = torch.minimum(reached, seen.reached)
        m, g, lam = seen.margin, seen.gradient, log_lam.exp()
        search.tell(seen, "relaxed", lam=lam, gain=gain)
        a, b = _schedules(RELAXED, k, passes)
        top = g.flatten(1).abs().amax(dim=1)
        slope = torch.sigmoid(gain * m) / torch.where(top > 0, top, 1.0)
        step = torch.full_like(m, a * search.width)
        u, _ = adam.step(delta, expand(slope, g) * g, step)
        delta = search.penalty.relaxed(u, lam * step, search.box, CUT * search.width)
        log_lam = log_lam - b * torch.tanh(gain * m)
    return reached


def _explore(search: "_Search", rules: Settings, distance: Tensor, draws: torch.Generator) -> None:
    """Look for other basins of any class: short games from random points, ever nearer to ``x``."""
    if search.steps < AMPLE:
        return
    games = int(EXPLORE * search.steps) // _passes(search, EXCURSION)
    for i in range(games):
        radius = FARTHEST * NEAREST ** (i / max(1, games - 1))
        start = search.start(radius, distance, draws)
        _short(search, rules, None, EXCURSION, start, distance, "explore")


def _short(
    search: "_Search",
    rules: Settings,
    rival: Tensor | None,
    share: float,
    delta: Tensor,
    distance: Tensor,
    phase: str,
) -> Tensor:
    """A game long enough to find its basin, and projections onto the boundary found there."""
    passes = _passes(search, share)
    reached, delta = _play(search, rules, rival, passes - LANDING, delta, distance, phase)
    return torch.minimum(reached, _land(search, rival, delta, phase))


def _land(search: "_Search", rival: Tensor | None, delta: Tensor, phase: str) -> Tensor:
    """Projections onto the boundary as linearized at ``delta``: the nearest that was across."""
    reached = torch.full_like(search.best.distance, math.inf)
    for _ in range(LANDING):
        seen = search.look(delta, rival)
        search.tell(seen, phase)
        delta, _ = search.project(seen, delta)
        reached = torch.minimum(reached, seen.reached)
    return reached


def _passes(search: "_Search", share: float) -> int:
    return max(4 * LANDING, int(share * search.steps))


def _sorted(keys: Tensor, *tensors: Tensor) -> list[Tensor]:
    """Tensors (B, C, ...) in the order of increasing keys (B, C), along axis 1."""
    order = keys.argsort(dim=1, stable=True)
    rows = torch.arange(len(keys), device=keys.device)[:, None]
    return [tensor[rows, order] for tensor in tensors]


def _games(
    search: "_Search",
    rules: Settings,
    rival: Tensor | None,
    distance: Tensor,
    restarts: int,
    draws: torch.Generator,
) -> None:
    """Spend what is left: the game from ``x``, those from random points, finetuning, polishing.

    Where exploration came nearer than the class of the game, this starts there, with steps in units
    of a tenth of that distance (where the settings adapt them); so it does where linearizations
    mislead, as these would say how to start.
    """
    polish = min(POLISH, search.left // 10) if rules.scout else 0
    runs = 1 + restarts + rules.finetune
    passes = max(1, (search.left - polish) // runs)
    nearer = search.best.distance < 0.999 * distance
    if search.misled:
        nearer |= search.best.found
    nearer &= search.left < search.steps // 2  # otherwise it was no exploration
    for run in range(runs):
        count = min(search.left - polish, passes if run < runs - 1 else search.left)
        if rules.finetune and run == runs - 1:
            (a, b), (c, d) = rules.step, rules.rate
            gentle = replace(rules, step=(a / 100, b / 100), rate=(c / 10, d / 10), multiplier=None)
            _play(search, gentle, rival, count, search.nearest(), distance, "finetune")
            continue
        start = search.start(rules.radius if run == 0 or rules.radius else None, distance, draws)
        scale = distance
        if run == 0:
            start = torch.where(expand(nearer, start), search.nearest(), start)
            scale = torch.where(nearer, search.best.distance / 10, distance)
        _play(search, rules, rival, count, start, scale, "game")
    delta = search.nearest()
    for _ in range(polish):
        delta, _ = search.locate(delta, rival, "polish")


class _Search:
    """A budget of passes for a batch: looks at points, keeps the nearest adversarial ones.

    A ``part`` goes on with some of the samples: with those that aren't adversarial as they are, and
    with those that follow one plan.
    """

    def __init__(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        penalty: "_Penalty",
        targeted: bool,
        bounds: Bounds,
        steps: int,
        observe: Observe | None,
    ) -> None:
        self.model, self.x, self.y, self.targeted = model, x, y, targeted
        self.penalty = penalty
        self.bounds, self.steps, self.left, self.observe = bounds, steps, steps, observe
        self.given, self.width = x, bounds[1] - bounds[0]
        self.rows: Tensor | None = None  # of the inputs, where not all are searched for
        self.box, self.best, self.watch = room(x, bounds), Best(x), GradientWatch(x)
        self.finite = torch.ones((), dtype=torch.bool, device=x.device)
        self.misled = False  # by linearizations

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

    def part(self, chosen: Tensor) -> "_Search":
        """The search for some of the samples, with the same passes left."""
        if bool(chosen.all()):
            return self
        part, rows = copy.copy(self), chosen.nonzero().squeeze(1)
        part.rows = rows if self.rows is None else self.rows[rows]
        part.x, part.y = self.x[rows], self.y[rows]
        part.first = _Seen(*(value[rows] for value in self.first))
        part.box = room(part.x, self.bounds)
        part.best, part.watch = Best(part.x), GradientWatch(part.x)
        part.best.update(self.best.x_adv[rows], self.best.distance[rows])
        part.watch.stuck, part.watch.done = self.watch.stuck[rows], self.watch.done[rows]
        return part

    def split(
        self,
        plan: Callable[..., None],
        chosen: Tensor,
        rules: Settings,
        rivals: Tensor,
        distances: Tensor,
        restarts: int,
        seed: int,
    ) -> None:
        """Follow a plan for some of the samples, and take over what it finds."""
        if not bool(chosen.any()):
            return
        part = self.part(chosen)
        plan(part, rules, rivals[chosen], distances[chosen], restarts, seed)
        if part is not self:
            # New tensors: an observer may have kept the old ones.
            self.best.x_adv = self.best.x_adv.index_put((chosen,), part.best.x_adv)
            self.best.distance = self.best.distance.index_put((chosen,), part.best.distance)
            self.watch.stuck[chosen] = part.watch.stuck

    def look(self, delta: Tensor, rival: Tensor | None) -> "_Seen":
        """One forward and one backward pass at ``x + delta``; ``rival``: the class, None all."""
        x_adv = (self.x + delta).clamp_(*self.bounds)
        m: list[Tensor] = []

        def value(logits: Tensor, y: Tensor) -> Tensor:
            m.append(_margin(logits, y, rival, self.targeted))
            return m[0]

        logits, gradient = loss_gradient(self.model, x_adv, self.y, value)
        self.left -= 1
        self.finite &= logits.isfinite().all()
        size = self.penalty.value(delta)
        hit = is_adversarial(logits, self.y, self.targeted)
        self.best.update(x_adv, size, hit)
        gradient = self.watch.see(gradient, hit)
        reached = torch.where(hit, size, math.inf)
        return _Seen(x_adv, logits, m[0].detach(), gradient, size, reached)

    def tell(self, seen: "_Seen", phase: str, **known: Tensor) -> None:
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

    def project(self, seen: "_Seen", delta: Tensor) -> tuple[Tensor, Tensor]:
        """The same from a pass made before."""
        g = seen.gradient
        beyond = BEYOND * seen.logits.abs().amax(dim=1)
        gap = seen.margin - (g * delta).flatten(1).sum(dim=1) + beyond
        delta = crossing(g, gap, self.penalty.shape, box=self.box)
        distance = self.penalty.value(delta)
        if self.penalty.counts:  # equal counts are told apart by the l1 distance
            distance = distance + 1e-3 * delta.flatten(1).abs().sum(dim=1)
        stuck = (g == 0).flatten(1).all(dim=1)
        return delta, torch.where(stuck, math.inf, distance)

    def first_distance(self) -> Tensor:
        """The distance to the boundary linearized at ``x``."""
        return self.project(self.first, torch.zeros_like(self.x))[1]

    def gain(self, gain: float | None, rival: Tensor | None) -> Tensor:
        r"""$\gamma$, the factor of the margins: ``gain`` over the margin at ``x``."""
        m = _margin(self.first.logits, self.y, rival, self.targeted)
        if gain is None:
            return torch.ones_like(m)
        scale = self.first.logits.abs().amax(dim=1)
        return gain / torch.maximum(m, 1e-4 * scale).clamp_min(torch.finfo(m.dtype).tiny)

    def unit(self, distance: Tensor, adapt: bool) -> Tensor:
        """(B,) what step sizes are multiples of: a solution's largest or typical entry."""
        if not adapt:
            return torch.full_like(distance, self.width)
        distance = torch.where(distance < math.inf, distance, self.width).clamp_min(1e-6)
        return distance / math.sqrt(self.x[0].numel()) if self.penalty.kind == "l2" else distance

    def judge(self, distances: Float[Tensor, "B C"]) -> Bool[Tensor, " B"]:
        """Whether nothing near what linearizations promised is across; never if none was tried."""
        if self.steps < AMPLE or distances.shape[1] == 1:
            return torch.zeros_like(self.best.found)
        return (self.best.distance > MISLED * distances[:, 0]) | ~self.best.found

    def wide(self) -> float:
        """The unit of steps that leave a plateau, of the order of the range, as a distance."""
        share = WIDE.get(self.penalty.kind, 1.0) * self.width
        return share * math.sqrt(self.x[0].numel()) if self.penalty.kind == "l2" else share

    def nearest(self) -> Tensor:
        """The best perturbation so far, 0 where there is none."""
        return self.best.x_adv - self.x

    def start(self, radius: float | None, distance: Tensor, draws: torch.Generator) -> Tensor:
        """Uniform perturbations of a radius in shares of the range, or as large as a solution's."""
        if radius == 0:
            return torch.zeros_like(self.x)
        uniform = torch.rand(self.given.shape, dtype=self.x.dtype, generator=draws) * 2 - 1
        uniform = uniform.to(self.x.device)
        if self.rows is not None:
            uniform = uniform[self.rows]
        if radius is not None:
            scale = torch.full_like(distance, radius * self.width)
        else:
            scale = self.penalty.entry(distance, self.x[0].numel(), self.width)
        return torch.clamp(expand(scale, uniform) * uniform, *self.box)

    def check(self) -> None:
        if not bool(self.finite):
            raise ValueError("the model's logits are not finite on some of the points")

    def finish(self) -> Tensor:
        """The nearest adversarial points, in the order of the inputs."""
        self.check()
        self.watch.report("pdpgd()")
        if self.rows is None:
            return self.best.x_adv
        x_adv = self.given.clone()
        x_adv[self.rows] = self.best.x_adv
        return x_adv


class _Seen(NamedTuple):
    """What a pass at ``x_adv`` tells; ``reached``: its size where it is adversarial, else inf."""

    x_adv: Tensor
    logits: Tensor
    margin: Tensor
    gradient: Tensor
    size: Tensor
    reached: Tensor


def _margin(logits: Tensor, y: Tensor, rival: Tensor | None, targeted: bool) -> Tensor:
    """What must become negative: f_y - f_rival, or the margin; of a target, minus its margin."""
    if targeted:
        return -margin(logits, y)
    if rival is None:
        return margin(logits, y)
    pair = logits.gather(1, torch.stack([y, rival], dim=1))
    return pair[:, 0] - pair[:, 1]


# -------------------------------------------------------------------------- norms and penalties


def crossing(
    g: Float[Tensor, "B ..."],
    gap: Float[Tensor, " B"],
    kind: Norm | Penalty,
    *,
    box: Box,
) -> Float[Tensor, "B ..."]:
    r"""The smallest perturbation across a linear boundary: $\min h(\delta)$, $g^\top\delta\le-c$.

    Under linf and l2 $\delta_i=-\operatorname{sign}(g_i)\min(t\,r_i,c_i)$ with $c_i$ the room and
    $r_i=1$ or $|g_i|$, $t$ found by Newton's method on the gain, which is piecewise linear.
    Under l1 the entries with the largest $|g_i|$ move as far as they can until the gap is closed,
    under l0 those with the largest $|g_i|c_i$ (pixels: the largest sum over channels).

    Args:
        g: (B, ...) gradients of the function that is to fall below 0.
        gap: (B,) its values $c$ at $\delta=0$; nothing moves where they are not positive.
        kind: ``"linf"``, ``"l2"``, ``"l1"`` (or $p=\infty$, 2, 1), ``"l0"`` (values) or
            ``"group_l0"`` (pixels).
        box: ``(lo, hi)`` shaped like ``g``, as ``geometry.room`` makes it.

    Returns:
        (B, ...) perturbations in the box; the corner of the box that gains most where the boundary
        is out of reach.

    Raises:
        TypeError, ValueError: another kind; no floating-point tensors of these shapes.

    Source: Croce and Hein (2020), section 3, extended to counts; chapter ``pdpgd``.
    """
    name = _check_crossing(g, gap, kind, box)
    flat, c = g.flatten(1), gap.clamp_min(0)[:, None]
    size = flat.abs()
    cap = torch.where(flat < 0, box[1].flatten(1), -box[0].flatten(1)) * (flat != 0)
    if name in ("linf", "l2"):
        move = _ray(size, torch.ones_like(size) if name == "linf" else size, cap, c)
    elif name == "group_l0" and g.ndim == 4:
        gains = (size * cap).reshape(g.flatten(2).shape).sum(dim=1)
        taken = _greedy(gains, torch.ones_like(gains), c) > 0
        move = cap * taken.repeat(1, g.shape[1])
    elif name == "l1":
        move = _greedy(size, cap, c)
    else:
        move = cap * (_greedy(size * cap, torch.ones_like(cap), c) > 0)
    return (-flat.sign() * move).reshape(g.shape)


def _check_crossing(g: Any, gap: Any, kind: Any, box: Any) -> str:
    """The name of the kind, where everything fits."""
    name = kind if isinstance(kind, str) else NAMES.get(exponent(kind), kind)
    if name not in (*NAMES.values(), "l0", "group_l0"):
        raise ValueError(f"kind is 'linf', 'l2', 'l1', 'l0' or 'group_l0', not {kind!r}")
    if not all(isinstance(part, Tensor) and part.is_floating_point() for part in (g, gap, *box)):
        raise TypeError("g, gap and both sides of the box are floating-point tensors")
    if g.ndim < 2 or gap.shape != g.shape[:1] or any(side.shape != g.shape for side in box):
        shapes = ", ".join(str(tuple(part.shape)) for part in (g, gap, *box))
        raise ValueError(f"g and both sides of the box are (B, ...) and gap is (B,), not {shapes}")
    return str(name)


def _ray(size: Tensor, rate: Tensor, cap: Tensor, c: Tensor) -> Tensor:
    """min(t * rate, cap) with the smallest t for which the sum weighted by ``size`` reaches c.

    Newton's method from t = 0: the sum is concave and piecewise linear, so that the iterates
    increase to the root and meet it when they come to its piece.
    """
    t = torch.zeros_like(c)
    speed = size * rate
    for _ in range(2 * NEWTON):
        left = cap - t * rate
        missing = c - torch.linalg.vecdot(size, cap - left.clamp_min(0))[:, None]
        slope = torch.linalg.vecdot(speed, left.sign().clamp_min(0))[:, None]
        t = torch.where(slope > 0, t + missing.clamp_min(0) / slope, math.inf)
    return torch.minimum(torch.where(rate > 0, t * rate, 0.0), cap)


def _greedy(key: Tensor, cap: Tensor, c: Tensor) -> Tensor:
    """How much of ``cap`` to take in the order of ``key`` until the sum weighted by it is c."""
    few = min(key.shape[1], TOP) if key.device.type == "cpu" else key.shape[1]
    for count in (few, key.shape[1]):  # all of them are sorted only where the first do not do
        key_, order = key.topk(count, dim=1)
        cap_ = cap.gather(1, order)
        total = (key_ * cap_).cumsum(dim=1)
        if count == key.shape[1] or bool((total[:, -1:] >= c).all()):
            break
    left = (c - total + key_ * cap_).clamp_min(0)
    taken = torch.minimum(left / torch.where(key_ > 0, key_, 1.0), cap_)
    return torch.zeros_like(key).scatter(1, order, taken)


class _Penalty:
    """What the search needs to know of a norm or a penalty."""

    def __init__(self, kind: Any, own: Regularizer | None = None) -> None:
        self.kind, self.own = kind, own
        self.smooth, self.isotropic = kind == "l2", own is not None
        self.counts = kind in ("l0", "group_l0")
        self.shape: Any = "l2" if own else "l1" if kind in ("l1/2", "l2/3") else kind

    def value(self, delta: Tensor) -> Tensor:
        """(B,) the penalty itself."""
        if self.own is not None:
            return _fitting("value", self.own.value(delta), delta.shape[:1])
        flat = delta.flatten(1)
        if self.kind == "l0":
            return flat.count_nonzero(dim=1).to(delta.dtype)
        if self.kind == "group_l0":
            return pixels(delta)
        if self.kind in POWERS:
            return flat.abs().pow(POWERS[self.kind]).sum(dim=1)
        if self.kind == "linf":
            return flat.abs().amax(dim=1)
        return torch.linalg.vector_norm(flat, exponent(self.kind), dim=1)

    def prox(
        self, u: Tensor, lam: Tensor, box: Box | None, metric: Tensor | None, size: Tensor
    ) -> Tensor:
        r"""The proximal operator of $\lambda h$ in a metric and a box."""
        if self.own is not None:
            weight = lam if metric is None else lam / metric.flatten(1)[:, 0]
            z = _fitting("prox", self.own.prox(u, weight), u.shape)
            return z if box is None else torch.clamp(z, *box)
        if self.kind == "linf":
            return _prox_linf(u, lam, box, metric, size)
        return prox(u, lam, self.kind, box=box, metric=metric)

    def relaxed(self, u: Tensor, weight: Tensor, box: Box, cut: float) -> Tensor:
        """A soft threshold for entries, or pixels; where they are counted, small ones are cut."""
        colors = self.kind == "group_l0"
        size = torch.linalg.vector_norm(u, dim=1, keepdim=True) if colors else u.abs()
        shrunk = (size - expand(weight, u)).clamp_min(0) / torch.where(size > 0, size, 1.0)
        z = torch.clamp(shrunk * u, *box)
        if not self.counts:
            return z
        largest = z.abs().amax(dim=1, keepdim=True) if colors else z.abs()
        return torch.where(largest < cut, 0.0, z)

    def equilibrium(self, m: Tensor, g: Tensor, gain: Tensor, multiplier: float | None) -> Tensor:
        r"""(B,) the first $\lambda$: by the law $\lambda=\frac12\gamma\|\nabla m\|_q$ unless given.

        A penalty without a dual norm: $\lambda h(\delta)=\frac12\gamma|g^\top\delta|$, which is the
        same for a norm, at the nearest point of the linearized boundary.
        """
        tiny = torch.finfo(m.dtype).tiny
        if multiplier is not None:
            return torch.full_like(m, multiplier)
        if self.own is None:
            dual: Norm = self.kind if self.kind in ("linf", "l2") else "l1"
            return (gain / 2 * dual_norm(g, dual)).clamp_min(tiny)
        slope = g.flatten(1).square().sum(dim=1).clamp_min(tiny)
        size = self.own.value(-expand(m / slope, g) * g)
        return (gain / 2 * m.abs() / torch.where(size > 0, size, 1.0)).clamp_min(tiny)

    def entry(self, distance: Tensor, d: int, width: float) -> Tensor:
        """(B,) how large an entry is when all d share the distance; half the range for counts."""
        if self.kind not in NAMES.values():
            return torch.full_like(distance, width / 2)
        return distance * d ** (-1 / exponent(self.kind))


def _prox_linf(
    u: Tensor, lam: Tensor, box: Box | None, metric: Tensor | None, level: Tensor
) -> Tensor:
    r"""Clip to $\pm t$ with $\sum_iw_i(|u_i|-t)_+=\lambda$, then to the box.

    Newton's method from the last level: the sum is convex and decreasing in t, so the iterates
    increase to the root from the second on (from 0, where the last level was above every entry).
    The box after the level and not along with it, as ``geometry.prox_linf`` has it, changes results
    by nothing measurable and needs no sorting.
    """
    size = u.flatten(1).abs()
    w = torch.ones_like(size) if metric is None else metric.flatten(1)
    t = level[:, None]
    for _ in range(NEWTON):
        over = (size - t).clamp_min(0)
        excess = torch.linalg.vecdot(w, over)[:, None] - lam[:, None]
        slope = torch.linalg.vecdot(w, over.sign())[:, None]
        t = torch.where(slope > 0, t + excess / slope, 0.0).clamp_min(0)
    t = expand(t, u)
    z = torch.clamp(u, -t, t)
    return z if box is None else torch.clamp(z, *box)


def _fitting(name: str, result: Tensor, shape: torch.Size) -> Tensor:
    if result.shape != shape:
        raise ValueError(
            f"the Regularizer's {name} returns shape {tuple(shape)} here, not {tuple(result.shape)}"
        )
    return result


def _penalty(norm: Any, x: Tensor) -> _Penalty:
    """What a norm's name stands for; the counts are of pixels where ``x`` has channels."""
    if isinstance(norm, Regularizer):
        return _Penalty("own", norm)
    if norm in ("l0", "group_l0"):
        return _Penalty("group_l0" if x.ndim == 4 and x.shape[1] > 1 else "l0")
    if isinstance(norm, str) and norm in get_args(Penalty):
        return _Penalty(norm)
    if isinstance(norm, str):
        raise ValueError(
            f"norm is one of {', '.join(map(repr, get_args(Penalty)))} or a Regularizer, "
            f"not {norm!r}"
        )
    p = exponent(norm)
    if p not in NAMES:
        raise ValueError(f"norm has no proximal operator here for p = {norm!r}: give a Regularizer")
    return _Penalty(NAMES[p])


def _settings(settings: Any, penalty: _Penalty) -> Settings:
    if isinstance(settings, Settings):
        return settings
    if settings == "thesis":
        return THESIS
    if settings == "recommended":
        return RECOMMENDED.get(penalty.kind, RECOMMENDED["l0" if penalty.own is None else "own"])
    raise ValueError(f"settings are 'recommended', 'thesis' or Settings(...), not {settings!r}")
