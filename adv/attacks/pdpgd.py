r"""PDGD and PDPGD: the smallest perturbation as a game between $\delta$ and a multiplier.

$\min\|\delta\|$ subject to $m(x+\delta)<0$, the margin, in a box. Two players: $\delta$ descends
$\lambda\|\delta\|+\phi(m(x+\delta))$ with a smooth $\phi$, by a gradient step on $\phi$ and the
proximal operator of the norm; $\lambda$ falls while $m>0$ and grows while $m<0$. Both move on every
forward and backward pass, so that no search over $\lambda$ is needed. What decides the result is
the basin: the budget is first spent on finding the class whose boundary is nearest, and where
slopes turn out to mislead, on games from random points with large steps.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from adv.attacks._search import Search
from adv.attacks._size import Regularizer, Size, crossing, size_of
from adv.attacks.common import (
    Bounds,
    Model,
    Observe,
    check_inputs,
    check_number,
    check_positive,
    check_seed,
    check_whole,
    eval_mode,
    expand,
    generator,
)
from adv.geometry import Box, Norm, Penalty

__all__ = ["RECOMMENDED", "THESIS", "Regularizer", "Settings", "crossing", "pdpgd"]

DECAY, EPSILON = 0.999, 1e-8
"""Of Adam's second moment."""
ROUNDS = 3
"""Linearizations by which the boundary of a class that passed the first round is located."""
AMPLE, WARY = 200, 60
"""Passes from which on trials and exploration pay; from which on slopes are doubted."""
TRIAL, EXCURSION = 1 / 12, 1 / 32
"""Shares of the passes for a trial, against a class or all, and for an exploring game."""
EXPLORE, FARTHEST, NEAREST = 0.2, 0.8, 1 / 8
"""Share of the passes for games from random points; their first radius; the last to the first."""
LANDING = 4
"""Projections at the end of a short game."""
FARTHER = 4
"""Linearizations may mislead where what was found is this many times farther than promised ..."""
KEPT = 0.5
"""... and do where their landing keeps more than this share of the margin, instead of none."""
WIDE = {"linf": 0.1, "l2": 0.2, "l1": 3.0}
"""For misled samples: units of the step sizes, in shares of the range; 1 under other penalties."""
SCATTER = 0.3
"""For misled samples: radius of the random starts, as a share of the range."""
ROAM = 0.55
"""For misled samples: of the passes left after the first trial, the share for further trials."""
ALONG, BISECT = 4, 8
"""For misled samples, before the last game: gradients along the way to the nearest found, by which
entries are dropped from it; bisections of their number, and of the way."""
SPARSE = ("l1", "l0", "group_l0", "l1/2", "l2/3")
"""Penalties whose solutions leave most entries alone: relaxed games are an alternative."""
RELAX, RELAXED_SHARE = 1 / 7, 0.9
"""Share of the passes for a relaxed game; of what is left then, the share for further ones."""
CUT = 0.3
"""Where entries are counted, a relaxed game drops those below this share of the range."""
POLISH = 8
"""Projections onto the linearized boundary at the end, at most."""
PRUNE, ATTEMPTS = 40, 4
"""Where entries are counted: passes at the very end, at most, for giving up some of them; passes
without success after which one counts as vital."""


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
        multiplier: first $\lambda$; ``None``: the equilibrium's, $\frac12\gamma\|\nabla m\|_q$ at
            the first point, where $\gamma$ is the factor of the margin and $q=\infty$ under l1,
            counts and powers. A number is per unit of the penalty: under bounds (0, 255) it weighs
            a norm 255 times as much as under (0, 1).
        inner: 0: the proximal operator in Adam's metric (under linf five Newton steps toward its
            level, from the last one); else steps of the author's inner loop.
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
                check_positive(name, value)
        for name in ("gain", "multiplier"):
            if getattr(self, name) is not None:
                check_positive(name, getattr(self, name))
        check_number("momentum", self.momentum, math.nextafter(1, 0))
        check_number("radius", self.radius)
        check_whole("inner", self.inner)
        for name, known in (("decay", ("exponential", "linear")), ("feedback", ("sign", "tanh"))):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} is {known[0]!r} or {known[1]!r}, not {getattr(self, name)!r}"
                )


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
"""The settings of the thesis, filled in from its author's code where the text is silent. Finetuning
begins at the equilibrium's multiplier, the author's at the one recorded with the best point."""


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
    projections onto their linearizations; from 200 steps on, a game is played against each of the
    nearest, and some short ones from random points; the rest goes into a game against the class
    found nearest, and projections at its end. Where, from 60 steps on, linearizations turn out to
    mislead, as on networks with saturated units, games are against all classes at once, from random
    points, with steps of the order of the range; under sparse penalties a relaxed game is tried
    too, and goes on where it came nearer. Before their last game they go back to the boundary from
    the nearest point found. Counted entries are given up at the very end where that is possible. A
    targeted attack plays one game, with the same end, and as it does not search it may end far
    above the optimum; without scouting there is no such end.

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
        observe: ``(step, state)``, called at each pass with ``x_adv``, ``logits``, ``margin``,
            ``gradient`` (of the margin), ``distance`` (best so far), ``phase`` (``"scout"``,
            ``"trial"``, ``"explore"``, ``"relaxed"``, ``"retreat"``, ``"game"``, ``"finetune"``,
            ``"polish"`` or ``"prune"``), ``index`` (the samples of the pass) and, in a game, the
            multiplier ``lam`` and the factor ``gain`` of the margin. Samples whose boundary is not
            where linearizations put it are batches of their own after the scouting: step numbers
            then repeat, once for each batch.

    Returns:
        (B, ...) the nearest adversarial inputs seen, inside ``bounds``; ``x`` itself where it is
        adversarial already or nothing was found.

    Raises:
        TypeError, ValueError: bad input, as ``check_inputs`` says; an unknown norm or settings;
            logits that are not finite.

    Source: Matyasko (2020), section 5.3, Algorithms 2 and 3 as corrected by E1 to E15; chapter
    ``pdpgd``.
    """
    check_inputs(model, x, y, targeted=targeted, nearest=True, bounds=bounds, steps=steps)
    check_whole("restarts", restarts)
    check_seed(seed)  # so that a bad seed is told before the first pass
    h = size_of(norm, x)
    rules = _settings(settings, h)
    inside = x.detach().clamp(*bounds)  # a rounding beyond the bounds is no change of a value
    with eval_mode(model):
        search = Search(model, inside, y, h, targeted, bounds, steps, observe)
        search.begin()
        if observe is None:
            search = search.part(~search.best.found)
        if len(search.x):  # otherwise all are adversarial already
            _attack(search, rules, restarts, seed)
    found = search.finish()
    return torch.where(found == inside, x.detach(), found)


# --------------------------------------------------------------------------------------- the game


def _play(
    search: Search,
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
    metric $\psi/a$ (under linf nearly, see ``_prox_linf``), and $\log\lambda$ moves against $m$.
    """
    h, adam = search.h, _Adam(delta, rules.momentum, search.h.isotropic)
    reached = torch.full_like(distance, math.inf)
    unit = search.unit(distance, rules.adapt)
    for k in range(passes):
        seen = search.look(delta, rival)
        m, g = seen.margin, seen.gradient
        reached = torch.minimum(reached, seen.reached)
        if k == 0:
            gain = search.gain(rules.gain, rival)
            log_lam = h.equilibrium(m, g, gain, rules.multiplier, search.width).log()
            weights = _simplex(log_lam)
        weights = weights.lerp(_simplex(log_lam), 0.1)
        lam = weights[0] / weights[1]
        search.tell(seen, phase, lam=lam, gain=gain)
        a, b = _schedules(rules, k, passes)
        slope = gain * torch.sigmoid(gain * m)  # phi'(m)
        if h.smooth:  # Algorithm 2: the norm's own gradient joins in
            pull = weights[0] / torch.where(seen.size > 0, seen.size, 1.0)
            u, _ = adam.step(
                delta, expand(weights[1] * slope, g) * g + expand(pull, g) * delta, a * unit
            )
            delta = torch.clamp(u, *search.box)
        else:
            u, metric = adam.step(delta, expand(slope, g) * g, a * unit)
            delta = _backward(h, rules.inner, u, lam, search.box, metric, seen.size)
        log_lam = log_lam - b * (m.sign() if rules.feedback == "sign" else torch.tanh(gain * m))
    return reached, delta


def _backward(
    h: Size,
    inner: int,
    u: Tensor,
    lam: Tensor,
    box: Box,
    metric: Tensor,
    size: Tensor,
) -> Tensor:
    r"""The proximal step $\arg\min_z\lambda h(z)+\frac12\sum_iw_i(z_i-u_i)^2$ within the box."""
    if not inner:
        return h.prox(u, lam, box, metric, size)
    # The author's way: a few proximal gradient steps on this problem, in its coarsest metric.
    top = metric.flatten(1).amax(dim=1)
    z, contraction = u, metric / expand(top, metric)
    for _ in range(inner):
        z = h.prox(z - contraction * (z - u), lam / top, None, None, size)
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


class _Task(NamedTuple):
    """What the plans share; classes by the distance of their boundaries, nearest first.

    The landing is where the last linearization put the nearest boundary; nobody has looked there.
    """

    rules: Settings
    rivals: Int[Tensor, "B C"]
    distances: Float[Tensor, "B C"]
    landing: Float[Tensor, "B ..."]
    restarts: int
    seed: int


def _attack(search: Search, rules: Settings, restarts: int, seed: int) -> None:
    """Spend the budget: scout, then by one plan or the other; or all of it on the games."""
    if search.targeted or not rules.scout:
        landing, distance = search.first_landing()
        task = _Task(rules, search.rivals(), distance[:, None], landing, restarts, seed)
        _games(search, task, None, distance, generator(seed))
        return
    task = _Task(rules, *_scout(search), restarts, seed)
    doubtful = _broken(search, task.distances)
    for plan, chosen in ((_trust, ~doubtful), (_doubt, doubtful)):
        _follow(plan, search, task, chosen)


def _follow(
    plan: Callable[[Search, _Task], None], search: Search, task: _Task, chosen: Bool[Tensor, " B"]
) -> None:
    """Follow a plan for some of the samples, and take over what it finds."""
    if not bool(chosen.any()):
        return
    part = search.part(chosen)
    rows = {name: getattr(task, name)[chosen] for name in ("rivals", "distances", "landing")}
    plan(part, task._replace(**rows))
    search.take(part, chosen)


def _scout(
    search: Search,
) -> tuple[Int[Tensor, "B C"], Float[Tensor, "B C"], Float[Tensor, "B ..."]]:
    """Classes by the distance of their boundaries, these distances, and the nearest's landing.

    First each boundary is linearized at ``x``; then, for as many of the nearest classes as a fourth
    of the budget allows, three times more where the last linearization put it.
    """
    rivals = search.rivals()
    count = rivals.shape[1]
    if count == 1:
        landing, distance = search.first_landing()
        return rivals, distance[:, None], landing
    zero = torch.zeros_like(search.x)
    pairs = [search.project(search.first, zero)]
    pairs += [search.locate(zero, rivals[:, i]) for i in range(1, count)]
    deltas = torch.stack([delta for delta, _ in pairs], dim=1)
    distances = torch.stack([distance for _, distance in pairs], dim=1)
    rivals, deltas, distances = _sorted(distances, rivals, deltas, distances)
    keep = min(count, (search.steps // 4 - count) // ROUNDS)
    if keep < 2:
        return rivals, distances, deltas[:, 0]
    for i in range(keep):
        for _ in range(ROUNDS):
            deltas[:, i], distances[:, i] = search.locate(deltas[:, i], rivals[:, i])
    kept = (rivals[:, :keep], deltas[:, :keep], distances[:, :keep])
    rivals, deltas, distances = _sorted(distances[:, :keep], *kept)
    return rivals, distances, deltas[:, 0]


def _trust(search: Search, task: _Task) -> None:
    """The plan after scouting: the class against which a short game ends nearest gets the rest."""
    rivals, distances, draws = task.rivals, task.distances, generator(task.seed)
    games = min(rivals.shape[1], round(search.left / 80))
    if games >= 2 and search.steps >= AMPLE:
        zero = torch.zeros_like(search.x)
        for i in range(games):
            near = _short(search, task.rules, rivals[:, i], TRIAL, zero, distances[:, i], "trial")
            distances[:, i] = torch.where(near < math.inf, near, distances[:, i])
        rivals, distances = _sorted(distances[:, :games], rivals[:, :games], distances[:, :games])
    _explore(search, task.rules, distances[:, 0], draws)
    _games(search, task, rivals[:, 0], distances[:, 0], draws)


def _doubt(search: Search, task: _Task) -> None:
    """The plan where a promise was broken: look at the landing, then trust slopes or do not.

    A landing that falls short of a curved boundary keeps little of the margin: slopes tell the way,
    only not how far. Where they mislead, it keeps nearly all.
    """
    nearest = task.rivals[:, 0]
    seen = search.look(task.landing, nearest)
    search.tell(seen, "scout")
    whole = search.first_margin(nearest)
    misled = _broken(search, task.distances) & (seen.margin > KEPT * whole)
    for plan, chosen in ((_trust, ~misled), (_distrust, misled)):
        _follow(plan, search, task, chosen)


def _distrust(search: Search, task: _Task) -> None:
    """The plan where linearizations mislead: a game against all classes, with large steps.

    Under sparse penalties one game of each kind decides how a sample goes on.
    """
    zero, wide = torch.zeros_like(search.x), _wide(search)
    near = _short(search, task.rules, None, TRIAL, zero, wide, "trial")
    nearer = torch.zeros_like(search.best.found)
    if search.h.kind in SPARSE:
        nearer = _relax(search, zero) < near
    for relaxed, chosen in ((False, ~nearer), (True, nearer)):
        _follow(partial(_roam, relaxed=relaxed), search, task, chosen)


def _roam(search: Search, task: _Task, *, relaxed: bool) -> None:
    """Relaxed games, or trials and explorations, from random points against all classes."""
    wide, draws = _wide(search), generator(task.seed)
    share, length = (RELAXED_SHARE, RELAX) if relaxed else (ROAM, TRIAL)
    passes, reserve = _passes(search, length), _retreat_passes(search.h) + 1
    for _ in range(min(int(share * search.left), search.left - reserve) // passes):
        start = search.start(SCATTER, wide, draws)
        if relaxed:
            _relax(search, start)
        else:
            _short(search, task.rules, None, TRIAL, start, wide, "trial")
    if not relaxed:
        _explore(search, task.rules, wide, draws)
    _retreat(search)
    _games(search, task, None, task.distances[:, 0], draws, misled=True)


def _retreat_passes(h: Size) -> int:
    """What ``_retreat`` spends."""
    return (ALONG + BISECT) * (h.kind in SPARSE) + BISECT * (not h.counts)


def _retreat(search: Search) -> None:
    """From the nearest point found back to the boundary, where slopes tell again.

    Under sparse penalties first with fewer of its entries: those that lower the margin most. Only
    if a pass is left for the last game.
    """
    if search.left <= _retreat_passes(search.h):
        return
    if search.h.kind in SPARSE:
        way = search.nearest()
        rank, total = _ranks(search, way)
        _bisect(search, lambda share: torch.where(rank < expand(share * total, way), way, 0.0))
    if not search.h.counts:  # a shorter way counts as much
        way = search.nearest()
        _bisect(search, lambda share: expand(share, way) * way)


def _bisect(search: Search, point: Callable[[Tensor], Tensor]) -> None:
    """Look for the smallest share (B,) whose point is across, from all of it down."""
    far = torch.ones_like(search.best.distance)
    near = torch.zeros_like(far)
    for _ in range(BISECT):
        share = (near + far) / 2
        seen = search.look(point(share), None)
        search.tell(seen, "retreat")
        across = seen.reached < math.inf
        near, far = torch.where(across, near, share), torch.where(across, share, far)


def _ranks(search: Search, way: Float[Tensor, "B ..."]) -> tuple[Tensor, Float[Tensor, " B"]]:
    r"""Entries, or pixels, by what each does to the margin, and how many there are.

    $m(0)-m(\delta)=-\sum_i\delta_i\int_0^1\nabla_im(t\delta)\,dt$, by the midpoint rule.
    """
    fall = torch.zeros_like(way)
    for i in range(ALONG):
        seen = search.look(way * ((i + 0.5) / ALONG), None)
        search.tell(seen, "retreat")
        fall -= way * seen.gradient
    fall, used = search.h.sums(fall), search.h.used(way)
    order = torch.where(used, fall, -math.inf).flatten(1).argsort(dim=1, descending=True)
    return order.argsort(dim=1).view_as(fall), used.flatten(1).sum(dim=1)


def _broken(search: Search, distances: Float[Tensor, "B C"]) -> Bool[Tensor, " B"]:
    """Whether nothing near what linearizations promised is across; never if none was tried.

    With few passes a sample counts only if something was found, farther: finding a first point
    from afar is too dear then.
    """
    best = search.best
    if search.steps < WARY or distances.shape[1] == 1:
        return torch.zeros_like(best.found)
    broken = (best.distance > FARTHER * distances[:, 0]) | ~best.found
    return broken if search.steps >= AMPLE else broken & best.found


def _wide(search: Search) -> Float[Tensor, " B"]:
    """The unit of steps that leave a plateau, of the order of the range, as a distance."""
    share = WIDE.get(search.h.kind, 1.0) * search.width
    unit = share * math.sqrt(search.x[0].numel()) if search.h.kind == "l2" else share
    return torch.full_like(search.best.distance, unit)


def _relax(search: Search, delta: Tensor) -> Tensor:
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
        delta = search.h.relaxed(u, lam * step, search.box, CUT * search.width)
        log_lam = log_lam - b * torch.tanh(gain * m)
    return reached


def _explore(search: Search, rules: Settings, distance: Tensor, draws: torch.Generator) -> None:
    """Look for other basins of any class: short games from random points, ever nearer to ``x``."""
    if search.steps < AMPLE:
        return
    games = int(EXPLORE * search.steps) // _passes(search, EXCURSION)
    for i in range(games):
        radius = FARTHEST * NEAREST ** (i / max(1, games - 1))
        start = search.start(radius, distance, draws)
        _short(search, rules, None, EXCURSION, start, distance, "explore")


def _short(
    search: Search,
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


def _land(search: Search, rival: Tensor | None, delta: Tensor, phase: str) -> Tensor:
    """Projections onto the boundary as linearized at ``delta``: the nearest that was across."""
    reached = torch.full_like(search.best.distance, math.inf)
    for _ in range(LANDING):
        seen = search.look(delta, rival)
        search.tell(seen, phase)
        delta, _ = search.project(seen, delta)
        reached = torch.minimum(reached, seen.reached)
    return reached


def _passes(search: Search, share: float) -> int:
    return max(4 * LANDING, int(share * search.steps))


def _sorted(keys: Tensor, *tensors: Tensor) -> list[Tensor]:
    """Tensors (B, C, ...) in the order of increasing keys (B, C), along axis 1."""
    order = keys.argsort(dim=1, stable=True)
    rows = torch.arange(len(keys), device=keys.device)[:, None]
    return [tensor[rows, order] for tensor in tensors]


def _games(
    search: Search,
    task: _Task,
    rival: Tensor | None,
    distance: Tensor,
    draws: torch.Generator,
    *,
    misled: bool = False,
) -> None:
    """Spend what is left: games from ``x`` and random points, finetuning, polishing, pruning.

    Where exploration came nearer than the class of the game, this starts there, with steps in units
    of a tenth of that distance (where the settings adapt them); so it does where linearizations
    mislead, as these would say how to start.
    """
    rules = task.rules
    polish = min(POLISH, search.left // 10) if rules.scout else 0
    prune = 0
    if rules.scout and search.h.counts:  # after games with large steps there is more to give up
        prune = min(PRUNE, search.left // (2 if misled else 10))
        prune = prune if prune > 1 else 0  # the first only looks at the nearest point found
    reserve = polish + prune
    runs = 1 + task.restarts + rules.finetune
    passes = max(1, (search.left - reserve) // runs)
    nearer = search.best.distance < 0.999 * distance
    if misled:
        nearer |= search.best.found
    nearer &= search.left < search.steps // 2  # otherwise it was no exploration
    for run in range(runs):
        count = min(search.left - reserve, passes if run < runs - 1 else search.left)
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
    _prune(search, prune)


def _prune(search: Search, passes: int) -> None:
    r"""Give up entries, or pixels, of the nearest point found, one after another.

    The next is the one that does least, by $-\delta_i\nabla_im$. Where the point without it is not
    across, the others go halfway to the walls at which the margin is lower (where it has no slope,
    to the upper ones), up to three times; if that is in vain, it is vital. Where all are, or
    nothing was found, passes repeat.
    """
    if not passes:
        return
    low, high = search.box
    way = search.nearest()
    seen = search.look(way, None)
    search.tell(seen, "prune")
    slope, vital = seen.gradient, torch.zeros_like(search.h.used(way))
    attempts = torch.zeros_like(search.y)
    drop = _idle(search, way, slope, vital)
    delta = torch.where(drop, 0.0, way)
    for _ in range(passes - 1):
        seen = search.look(delta, None)
        search.tell(seen, "prune")
        won, attempts = seen.reached < math.inf, attempts + 1
        vital = vital | (expand(~won & (attempts == ATTEMPTS), drop) & drop)
        way = torch.where(expand(won, way), delta, way)
        slope = torch.where(expand(won, way), seen.gradient, slope)
        moved = (delta + torch.where(seen.gradient > 0, low, high)) / 2
        moved = torch.where(search.h.used(way) & ~drop, moved, 0.0)
        over = won | (attempts == ATTEMPTS)
        drop = torch.where(expand(over, drop), _idle(search, way, slope, vital), drop)
        delta = torch.where(expand(over, way), torch.where(drop, 0.0, way), moved)
        attempts = torch.where(over, 0, attempts)


def _idle(search: Search, way: Tensor, slope: Tensor, vital: Tensor) -> Tensor:
    """Where the entry, or pixel, is that does least, of those not known as vital; or nowhere."""
    fall, free = search.h.sums(-way * slope), search.h.used(way) & ~vital
    least = torch.where(free, fall, math.inf).flatten(1).argmin(dim=1, keepdim=True)
    return torch.zeros_like(free).flatten(1).scatter(1, least, True).view_as(free) & free


def _settings(settings: Any, h: Size) -> Settings:
    if isinstance(settings, Settings):
        return settings
    if settings == "thesis":
        return THESIS
    if settings == "recommended":
        return RECOMMENDED.get(h.kind, RECOMMENDED["l0"])  # group_l0
    raise ValueError(f"settings are 'recommended', 'thesis' or Settings(...), not {settings!r}")
