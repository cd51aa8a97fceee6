r"""Attacks on defenses that hide their gradient, above all behind an argmin.

A defense that first solves $z^*(x)=\arg\min_zl(z;x)$ and then classifies by
$h(z^*(x),x)$ shows no gradient: its solver is run, not differentiated. The functions of the first
part make a *model* of it, with the same output and a gradient of their own: ``bpda`` pretends that
the solver is the identity, ``nes`` asks the defense at random points, ``backtracking`` unrolls
$T'$ steps of plain gradient descent from the solution, ``implicit`` solves the linear system of the
implicit function theorem (the derivatives of both are in ``argmin``). Every attack that asks for
gradients can be run on such a model. Those that ask for products $Ju$ as well (``jacobian``,
``regression.quadratic``), and training through an attack, differentiate the gradient itself:
``bpda`` and ``backtracking`` with a recorded graph allow that, and the others raise. Solver, inner
loss $l$ and readout $h$ are callables, so that nothing here knows a particular defense; inner
losses of different samples must not interact, and networks inside these callables are in evaluation
mode.

The second part are attacks: ``distortion_search``, the common outer loop, and two that never look
through the solver, ``surface_search`` and ``latent_walk``.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from adv.attacks.argmin import Inner, Solver, implicit_gradient, neumann_gradient, unroll
from adv.attacks.common import (
    Best,
    Bounds,
    GradientWatch,
    Model,
    Observe,
    check_count,
    check_inputs,
    check_number,
    check_positive,
    check_seed,
    check_whole,
    eval_mode,
    expand,
    generator,
    input_gradient,
    is_adversarial,
    loss_gradient,
    margin,
    plain,
    settled,
)
from adv.attacks.penalty import GROWTH, HEAVIEST
from adv.geometry import norm as norm_of

__all__ = [
    "Guessed",
    "backtracking",
    "bpda",
    "distortion_search",
    "implicit",
    "latent_walk",
    "nes",
    "nes_gradient",
    "surface_search",
]

Readout = Callable[[Tensor, Tensor], Tensor]
"""$h$: codes and inputs to (B, K) logits."""
Explain = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Inputs to the logits (B, K) and to what each class makes of them, (B, K, ...)."""
Decode = Callable[[Tensor], Tensor]
"""Codes to the inputs that a generator makes of them."""

AT_ONCE = 2**21
"""How many values of random points a guess of a gradient sends through a model at once."""


# -------------------------------------------------------------- models with a gradient of their own


def bpda(purify: Model, classifier: Model) -> Model:
    r"""The defended model $f(r(x))$, with the gradient of $f$ at $r(x)$, as if $r$ were $x$.

    Backward pass differentiable approximation: right to first order where $r$ projects onto a
    surface and the gradient lies in it, but what sticks out of the surface is spent in vain.

    Args:
        purify: $r$, inputs to inputs; run without a graph. Modules, here and as the classifier, are
            run in evaluation mode.
        classifier: $f$, inputs to (B, K) logits.

    Returns:
        A model (B, ...) to (B, K), for any attack.

    Source: Athalye, Carlini and Wagner (2018), section 4.1; Chen, Xie and Zhu (2020), (21) as
    corrected by E10; chapter ``generative``.
    """

    def model(x: Tensor) -> Tensor:
        with eval_mode(purify), eval_mode(classifier):
            with torch.no_grad():
                shift = purify(x.detach().clone()) - x.detach()
            return classifier(x + shift)

    return model


def backtracking(
    solve: Solver,
    inner: Inner,
    readout: Readout,
    *,
    steps: int = 5,
    step_size: float = 0.1,
    memory: Literal["graph", "constant"] = "graph",
) -> Model:
    r"""The defended model $h(z^*(x),x)$, differentiated through $T'$ unrolled steps from $z^*$.

    With ``"graph"`` the steps are recorded and read off at $z^{T'}$; with ``"constant"`` the
    Neumann iteration takes their place and the readout is at $z^*$ itself. At an exact minimizer
    both are the same. Without steps what is left is the explicit dependence of $h$ on $x$, the
    *envelope* gradient: exact where $h$ is the minimum of the inner loss itself.

    Args:
        solve: inputs to codes $z^*$; run without a graph. An attack puts the networks that it
            finds here and in the other two functions into evaluation mode, as
            ``common.networks`` says; a call of the model alone does not.
        inner: $l(z;x)$, codes and inputs to (B,), twice differentiable.
        readout: $h(z,x)$, codes and inputs to (B, K) logits.
        steps: $T'$, at least 0.
        step_size: $\eta'>0$, best near $1/\lambda_{\max}$ of the inner Hessian.
        memory: ``"graph"`` or ``"constant"``, whose gradient cannot be differentiated again.

    Returns:
        A model (B, ...) to (B, K), for any attack, with ``"constant"`` any that asks for gradients
        alone.

    Raises:
        TypeError, ValueError: a negative number of steps, a step size that isn't positive, an
            unknown ``memory``.

    Source: Chen, Xie and Zhu (2020), Theorem 1; chapter ``generative``.
    """
    check_whole("steps", steps)
    check_positive("step_size", step_size)
    if memory not in ("graph", "constant"):
        raise ValueError(f"memory is 'graph' or 'constant', not {memory!r}")

    def pull(z: Tensor, x: Tensor, v: Tensor) -> Tensor:
        return neumann_gradient(inner, z, x, v, steps=steps, step_size=step_size)

    def model(x: Tensor) -> Tensor:
        z = _solved(solve, x)
        if memory == "constant":
            return readout(_Answer.apply(x, z, pull), x)
        return readout(unroll(inner, z, x, steps=steps, step_size=step_size), x)

    return model


def implicit(
    solve: Solver,
    inner: Inner,
    readout: Readout,
    *,
    iterations: int = 50,
    tolerance: float = 1e-3,
    damping: float = 1e-4,
) -> Model:
    r"""The defended model $h(z^*(x),x)$, differentiated by the implicit function theorem.

    Args:
        solve: inputs to codes $z^*$; run without a graph. An attack puts the networks that it
            finds here and in the other two functions into evaluation mode, as
            ``common.networks`` says; a call of the model alone does not.
        inner: $l(z;x)$, codes and inputs to (B,), twice differentiable.
        readout: $h(z,x)$, codes and inputs to (B, K) logits.
        iterations: of conjugate gradients at most, as in ``implicit_gradient``.
        tolerance: of their residual.
        damping: $\tau\ge0$.

    Returns:
        A model (B, ...) to (B, K), for any attack that asks for gradients alone.

    Raises:
        TypeError, ValueError: no iterations, a negative tolerance or damping.

    Source: Chen, Xie and Zhu (2020), (1); chapter ``generative``.
    """
    check_count("iterations", iterations)
    check_number("tolerance", tolerance)
    check_number("damping", damping)
    rule: dict[str, Any] = {"iterations": iterations, "tolerance": tolerance, "damping": damping}

    def pull(z: Tensor, x: Tensor, v: Tensor) -> Tensor:
        return implicit_gradient(inner, z, x, v, **rule).gradient

    def model(x: Tensor) -> Tensor:
        return readout(_Answer.apply(x, _solved(solve, x), pull), x)

    return model


def nes_gradient(
    value: Callable[[Tensor], Tensor],
    x: Float[Tensor, "B ..."],
    *,
    samples: int = 50,
    sigma: float = 0.1,
    seed: int = 0,
    call: int = 0,
    at_once: int = AT_ONCE,
) -> Float[Tensor, "B ..."]:
    r"""The gradient of a function, guessed from its values at random points around $x$.

    $\hat g=\frac1{n\sigma}\sum_iF(x+\sigma u_i)u_i$ with normal $u_i$ in opposite pairs. With $m$
    pairs in $D$ dimensions its cosine with the true gradient is about $\sqrt{m/(m+D+1)}$.

    Args:
        value: $F$, points (k B, ...) to (k B,); they are copies of the batch, one after the other,
            so that labels are ``y.repeat(len(points) // len(y))``.
        x: (B, ...) where; the points may leave the bounds.
        samples: $n$, an even number.
        sigma: standard deviation $\sigma>0$ of the points, in the units of $x$.
        seed: of the draws.
        call: a number that gives each of several calls its own draws.
        at_once: so many values of points (k B times the size of an input) are passed to ``value``
            in one go, but at least one pair of copies; the draws are the same, and wait on the CPU.

    Returns:
        (B, ...) estimates; another ``at_once`` changes them by rounding.

    Raises:
        TypeError, ValueError: an odd number of samples, a sigma that isn't positive, no values at
            once.

    Source: Ilyas et al. (2018), section 2; Chen, Xie and Zhu (2020), (20); chapter ``generative``.
    """
    _check_draws(samples, sigma, at_once)
    draws = generator(seed, call)
    halves = torch.randn(samples // 2, *x.shape, generator=draws, dtype=x.dtype, device="cpu")
    guess = torch.zeros_like(x)
    for part in halves.split(max(1, at_once // (2 * max(1, x.numel())))):
        half = part.to(x.device)
        u = torch.cat([half, -half])
        with torch.no_grad():
            values = value((x.detach() + sigma * u).flatten(0, 1))
        values = values.reshape(len(u), len(x), *[1] * (x.ndim - 1))
        # Each block's mean by its share: of a single block nothing is rounded.
        guess = guess + len(u) / samples * ((values * u).mean(dim=0) / sigma)
    return guess


class Guessed:
    """A model with a gradient guessed from its values, as ``nes`` makes it.

    Args:
        model: inputs to (B, K) logits.
        rule: ``samples``, ``sigma``, ``seed`` and ``at_once`` of ``nes_gradient``.

    Attributes:
        calls: how many gradients have been guessed; each has draws of its own.
    """

    def __init__(self, model: Model, **rule: Any) -> None:
        self.model, self.rule, self.calls = model, rule, 0

    def reset(self) -> None:
        """Go back to the first draws: the same attack then finds the same points again."""
        self.calls = 0

    def __call__(self, x: Float[Tensor, "B ..."]) -> Float[Tensor, "B K"]:
        """The logits; a backward pass through them asks for those of more points."""
        with eval_mode(self.model):
            return _Answer.apply(x, _solved(self.model, x), self._pull)

    def _pull(self, _logits: Tensor, x: Tensor, v: Tensor) -> Tensor:
        self.calls += 1

        def value(points: Tensor) -> Tensor:
            weights = v.repeat(len(points) // len(v), 1)
            return (self.model(points) * weights).sum(dim=1)

        with eval_mode(self.model):
            return nes_gradient(value, x, call=self.calls, **self.rule)


def nes(
    model: Model, *, samples: int = 50, sigma: float = 0.1, seed: int = 0, at_once: int = AT_ONCE
) -> Guessed:
    r"""The model itself, with a gradient guessed from its values by ``nes_gradient``.

    Each backward pass asks for the logits at ``samples`` new points, and estimates the gradient of
    the loss as linearized in the logits.

    Args:
        model: inputs to (B, K) logits; its own gradient is never used. A module is run in
            evaluation mode.
        samples: points of an estimate, an even number.
        sigma: their standard deviation, in the units of the inputs.
        seed: of the draws, which differ from one backward pass to the next: a second attack finds
            other points, unless ``reset()`` of the model that is returned is called before.
        at_once: how many values of points go through the model at once, as in ``nes_gradient``.

    Returns:
        A model (B, ...) to (B, K), for any attack that asks for gradients alone.

    Raises:
        TypeError, ValueError: an odd number of samples, a sigma that isn't positive, a bad seed,
            no values at once.

    Source: Chen, Xie and Zhu (2020), (20); chapter ``generative``.
    """
    _check_draws(samples, sigma, at_once)
    check_seed(seed)
    return Guessed(model, samples=samples, sigma=sigma, seed=seed, at_once=at_once)


class _Answer(torch.autograd.Function):
    """Returns ``z`` unchanged; in the backward pass ``pull(z, x, grad)`` is the gradient for x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, z: Tensor, pull: Callable[..., Tensor]) -> Tensor:
        ctx.save_for_backward(x, z)
        ctx.pull = pull
        return z.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        x, z = ctx.saved_tensors
        if torch.is_grad_enabled():  # the caller wants a graph of the gradient, and there is none
            return _Pulled.apply(z, x, grads[0], ctx.pull), None, None
        return ctx.pull(z, x, grads[0]), None, None


class _Pulled(torch.autograd.Function):
    """A gradient that refuses to be differentiated, where autograd would take it for a constant."""

    @staticmethod
    def forward(_ctx: Any, z: Tensor, x: Tensor, v: Tensor, pull: Callable[..., Tensor]) -> Tensor:
        return pull(z, x, v)

    @staticmethod
    def backward(_ctx: Any, *_grads: Tensor) -> tuple[None, ...]:
        raise ValueError(
            "this model's gradient cannot be differentiated again: it gives J^T w, but not J u; "
            "take backtracking(memory='graph'), or an attack that asks for gradients alone"
        )


# -------------------------------------------------------------------------------------- attacks


def distortion_search(
    model: Model,
    x: Float[Tensor, "B ..."],
    y: Int[Tensor, " B"],
    *,
    verify: Model | None = None,
    steps: int = 60,
    rounds: int = 5,
    weight: float = 1.0,
    lr: float = 0.02,
    confidence: float = 0.5,
    update: Literal["adam", "sign"] = "adam",
    bounds: Bounds = (0.0, 1.0),
    seed: int = 0,
    observe: Observe | None = None,
) -> Float[Tensor, "B ..."]:
    r"""Minimize $\|x'-x\|_2^2+\lambda\max(m_y(x')+\kappa,0)$, and find the least $\lambda$.

    Every round starts from ``x``. The nearest point that fools the model is its candidate, and the
    nearest with a margin below $-\kappa$ a second one; ``verify`` has the last word on both. A
    weight that fails grows tenfold until one succeeds, then the two are bisected.

    Args:
        model: what is differentiated, inputs to (B, K) logits: the defense with a gradient.
        x: (B, ...) inputs inside ``bounds``.
        y: (B,) true labels.
        verify: the defense itself, with restarts of its own; by default ``model``.
        steps: forward and backward passes of a round; two forward passes of ``verify`` follow.
        rounds: weights tried.
        weight: the first $\lambda>0$, at most 1e15, where it stops growing.
            Per squared unit of ``x``: under bounds (0, 255) it takes 255^2 times the weight it
            takes under (0, 1).
        lr: Adam's step size, or the last step of ``"sign"``, in the units of ``x``.
        confidence: $\kappa\ge0$, in units of the logits.
        update: ``"adam"``, or ``"sign"``: a sign step that grows linearly to ``lr``.
        bounds: smallest and largest value of an input.
        seed: not used, since nothing is drawn here.
        observe: ``(step, state)``, called at each pass with ``x_adv``, ``logits``, ``weight`` and
            the best distances so far, ``unverified`` and ``verified``, infinite where there is
            none.

    Returns:
        (B, ...) the nearest verified inputs, inside ``bounds``; ``x`` itself where none was found.

    Raises:
        TypeError, ValueError: bad input, as ``check_inputs`` says; a weight or ``lr`` that isn't
            positive, or too large; an unknown update.

    Source: Chen, Xie and Zhu (2020), (20) and (21); Carlini and Wagner (2017); chapter
    ``generative``.
    """
    check_seed(seed)
    check_inputs(model, x, y, nearest=True, bounds=bounds, steps=steps, rounds=rounds)
    check_positive("weight", weight)
    check_number("weight", weight, HEAVIEST)
    check_positive("lr", lr)
    check_number("confidence", confidence)
    if update not in ("adam", "sign"):
        raise ValueError(f"update is 'adam' or 'sign', not {update!r}")
    verify = model if verify is None else verify
    x, search = x.detach(), _Candidates(x.detach(), y, verify, confidence)
    lam, low = x.new_full((len(x),), weight), x.new_zeros(len(x))
    high, watch = torch.full_like(lam, math.inf), GradientWatch(x)
    with eval_mode(model), eval_mode(verify):
        for count in range(rounds):
            search.begin()
            x_adv, mover = x, _Mover(update, lr, steps, x)
            for step in range(steps):
                logits, g = loss_gradient(model, x_adv, y, search.hinge)
                g = watch.see(g, is_adversarial(logits, y))
                search.look(x_adv, logits)
                if observe is not None:
                    state = {"x_adv": x_adv, "logits": logits, "weight": lam}
                    observe(count * steps + step, state | search.distances())
                g = 2 * (x_adv - x) + expand(lam, g) * g
                x_adv = (x_adv - mover.step(g, step + 1)).clamp(*bounds)
            success = search.judge()
            lam, low, high = _reweighed(lam, low, high, success)
    watch.report("distortion_search()")
    return search.verified.x_adv


def _reweighed(
    lam: Tensor, low: Tensor, high: Tensor, success: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The next weights: tenfold until one has succeeded, then halfway between the two ends."""
    low, high = torch.where(success, low, lam), torch.where(success, lam, high)
    grown = (GROWTH * lam).clamp_max(HEAVIEST)
    return torch.where(high < math.inf, (low + high) / 2, grown), low, high


class _Mover:
    """Steps of Adam, or sign steps that grow."""

    def __init__(self, update: str, lr: float, steps: int, x: Tensor) -> None:
        self.adam, self.lr, self.steps = update == "adam", lr, steps
        self.mean, self.square = torch.zeros_like(x), torch.zeros_like(x)

    def step(self, g: Tensor, k: int) -> Tensor:
        if not self.adam:
            return self.lr * k / self.steps * g.sign()
        self.mean, self.square = self.mean.lerp(g, 0.1), self.square.lerp(g * g, 0.001)
        scale = (self.square / (1 - 0.999**k)).sqrt() + 1e-8
        return self.lr * self.mean / (1 - 0.9**k) / scale


class _Candidates:
    """The nearest successes: of a round, of all rounds, and of all rounds after verification."""

    def __init__(self, x: Tensor, y: Tensor, verify: Model, confidence: float) -> None:
        self.x, self.y, self.verify, self.confidence = x, y, verify, confidence
        self.unverified, self.verified = Best(x), Best(x)
        self.begin()

    def begin(self) -> None:
        self.near, self.sure = Best(self.x), Best(self.x)

    def hinge(self, logits: Tensor, y: Tensor) -> Tensor:
        return (margin(logits, y) + self.confidence).clamp_min(0)

    def look(self, x_adv: Tensor, logits: Tensor) -> None:
        hit, distance = is_adversarial(logits, self.y), norm_of(x_adv - self.x, "l2")
        self.near.update(x_adv, distance, hit)
        self.sure.update(x_adv, distance, hit & (margin(logits, self.y) < -self.confidence))
        self.unverified.update(x_adv, distance, hit)

    def judge(self) -> Tensor:
        """(B,) whether a candidate of the round stands the test."""
        success = torch.zeros_like(self.near.found)
        with torch.no_grad():
            for best in (self.near, self.sure):
                stands = best.found & is_adversarial(self.verify(best.x_adv.clone()), self.y)
                self.verified.update(best.x_adv, best.distance, stands)
                success |= stands
        return success

    def distances(self) -> dict[str, Tensor]:
        return {"unverified": self.unverified.distance, "verified": self.verified.distance}


def surface_search(
    model: Model,
    x: Float[Tensor, "B ..."],
    y: Int[Tensor, " B"],
    *,
    encode: Solver,
    decode: Decode,
    classifier: Model,
    verify: Model | Sequence[Model] | None = None,
    steps: int = 100,
    rounds: int = 5,
    weight: float = 1.0,
    lr: float = 0.05,
    confidence: float = 1.0,
    reach: float = 2.0,
    scales: int = 16,
    bounds: Bounds = (0.0, 1.0),
    seed: int = 0,
    observe: Observe | None = None,
) -> Float[Tensor, "B ..."]:
    r"""Move an input along a generator's surface, by as much as changes what is said there.

    For a defense that decides by $f(G(z^*(x)))$. From the code $z^*(x)$ on, with the solver left
    alone, look for the code $z$ that is nearest on the surface and confidently wrong,

    $$\min_z\|G(z)-G(z^*)\|_2^2+\lambda\max\big(m_y(f(G(z)))+\kappa,0\big),$$

    with the least $\lambda$ that succeeds (growing tenfold, then bisected), and carry the input
    along, $x'=x+t\,(G(z)-G(z^*))$. Where the surface is flat $x'$ has the code $z$ at $t=1$, and
    this is the nearest input that does. Elsewhere, and for a solver that gets stuck, $t$ is the
    least of an even grid from which on all points fool ``verify``: a solver's answer hangs on its
    restarts, and a first success may be a matter of luck. So nothing is found where the largest $t$
    fails.

    Args:
        model: the defense, inputs to (B, K) logits: the default of ``verify``. The attack itself
            goes through ``encode``, ``decode`` and ``classifier``.
        x: (B, ...) inputs inside ``bounds``.
        y: (B,) true labels.
        encode: $z^*$, inputs to (B, k) codes; asked once.
        decode: $G$, codes to inputs, differentiable, its samples not interacting.
        classifier: $f$, inputs to (B, K) logits.
        verify: the defense with restarts of its own, or several, which all must be fooled; by
            default ``model``.
        steps: forward and backward passes of a round, through $f$ and $G$.
        rounds: weights tried.
        weight: the first $\lambda>0$, at most 1e15, where it stops growing.
            Per squared unit of ``x``: under bounds (0, 255) it takes 255^2 times the weight it
            takes under (0, 1).
        lr: Adam's step size, in the units of a code.
        confidence: $\kappa\ge0$, in units of the logits.
        reach: the largest $t>0$.
        scales: in how many even steps $t$ goes from ``reach`` down to 0, the input itself.
        bounds: smallest and largest value of an input.
        seed: not used, since nothing is drawn here.
        observe: ``(step, state)``, called at each pass with ``codes``, ``x_adv`` at $t=1$,
            ``logits``, ``weight`` and ``distance``, the nearest wrong code's so far on the surface,
            infinite where none is.

    Returns:
        (B, ...) the inputs, inside ``bounds``; ``x`` itself where no $t$ stood the test.

    Raises:
        TypeError, ValueError: bad input, as ``check_inputs`` says; a weight, ``lr`` or reach that
            isn't positive, or too large; a generator of other shapes; nothing that verifies.

    Source: ours; chapter ``generative``.
    """
    check_seed(seed)
    check_inputs(model, x, y, bounds=bounds, steps=steps, rounds=rounds, scales=scales)
    check_positive("weight", weight)
    check_number("weight", weight, HEAVIEST)
    check_positive("lr", lr)
    check_number("confidence", confidence)
    check_positive("reach", reach)
    x, verify = x.detach(), model if verify is None else verify
    judges = verify if isinstance(verify, Sequence) else (verify,)
    if not judges:
        raise ValueError("verify is a defense or several, not none")
    with ExitStack() as stack:
        for network in (model, classifier, encode, decode, *judges):
            stack.enter_context(eval_mode(network))
        start = _solved(encode, x)
        surface = _Surface(decode, classifier, start, y, confidence)
        if surface.made.shape != x.shape:
            raise ValueError(
                f"decode makes {tuple(surface.made.shape)} of the codes, but x is {tuple(x.shape)}"
            )
        lam, low = x.new_full((len(x),), weight), x.new_zeros(len(x))
        high, watch = torch.full_like(lam, math.inf), GradientWatch(start)
        for count in range(rounds):
            z, mover = start, _Mover("adam", lr, steps, start)
            success = torch.zeros_like(y, dtype=torch.bool)
            for step in range(steps):
                shift, logits, g = surface.look(z, lam)
                wrong = is_adversarial(logits, y)
                sure = wrong & (margin(logits, y) <= -confidence)
                surface.nearest.update(z, norm_of(shift, "l2"), sure)
                success |= sure
                if observe is not None:
                    state = {"codes": z, "x_adv": (x + shift).clamp(*bounds), "logits": logits}
                    state |= {"weight": lam, "distance": surface.nearest.distance}
                    observe(count * steps + step, state)
                z = z - mover.step(watch.see(g, wrong), step + 1)
            lam, low, high = _reweighed(lam, low, high, success)
        watch.report("surface_search()")
        with torch.no_grad():
            shift = decode(surface.nearest.x_adv) - surface.made
        grid = [reach * k / scales for k in range(scales, -1, -1)]
        return _steadily(judges, x, shift, y, grid, bounds)


class _Surface:
    """What a generator can make, seen from one code for each sample, and the nearest wrong one."""

    def __init__(
        self, decode: Decode, classifier: Model, start: Tensor, y: Tensor, confidence: float
    ) -> None:
        self.decode, self.classifier, self.y, self.confidence = decode, classifier, y, confidence
        with torch.no_grad():
            self.made = decode(start)
        self.nearest = Best(start)

    def look(self, z: Tensor, lam: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The way to the images of codes, their logits, and the gradient of the price."""
        seen: list[Tensor] = []

        def price(codes: Tensor) -> Tensor:
            image = self.decode(codes)
            shift, logits = image - plain(self.made), self.classifier(image)
            seen.extend((shift.detach(), logits.detach()))
            excess = (margin(logits, plain(self.y)) + self.confidence).clamp_min(0)
            return shift.flatten(1).square().sum(dim=1) + plain(lam) * excess

        _, gradient = input_gradient(price, z)
        return seen[0], seen[1], gradient


@torch.no_grad()
def _steadily(
    judges: Sequence[Model],
    x: Tensor,
    shift: Tensor,
    y: Tensor,
    scales: Sequence[float],
    bounds: Bounds,
) -> Tensor:
    """Of falling scales of a shift the last up to which all fool the judges; ``x`` without one."""
    x_adv, standing = x.clone(), torch.arange(len(x), device=x.device)
    for scale in scales:
        points = (x + scale * shift).clamp(*bounds)
        for judge in judges:
            if len(standing) == 0:
                return x_adv
            standing = standing[is_adversarial(judge(points[standing]), y[standing])]
        x_adv[standing] = points[standing]
    return x_adv


def latent_walk(
    model: Model,
    x: Float[Tensor, "B ..."],
    y: Int[Tensor, " B"],
    *,
    explain: Explain,
    eta: float = 0.02,
    steps: int = 75,
    every: int = 25,
    growth: float = 2.0,
    halvings: int = 5,
    bounds: Bounds = (0.0, 1.0),
    seed: int = 0,
    observe: Observe | None = None,
) -> Float[Tensor, "B ..."]:
    r"""Walk toward what the best wrong class makes of the image, until the decision changes.

    $x'\leftarrow(1-\eta)x'+\eta\,G_c(z_c^*(x'))$ with the most likely wrong class $c$ of the
    moment, then bisect between $x$ and the point found. No gradient is taken.

    Args:
        model: the defense, inputs to (B, K) logits; it judges the points of the bisection.
        x: (B, ...) inputs inside ``bounds``.
        y: (B,) true labels.
        explain: inputs to the logits (B, K) and to what each class makes of them, (B, K, ...).
        eta: share of the way of a step.
        steps: of the walk at most.
        every: after so many steps the share grows.
        growth: by this factor, to 1 at most.
        halvings: of the segment between ``x`` and the point found; 0 for none.
        bounds: smallest and largest value of an input.
        seed: not used, since nothing is drawn here.
        observe: ``(step, state)``, called at each step with ``x_adv``, ``logits``, ``images`` (B,
            K, ...) and ``eta``.

    Returns:
        (B, ...) the last point that fooled the model, inside ``bounds``; ``x`` where none did.

    Raises:
        TypeError, ValueError: bad input, as ``check_inputs`` says; a share not in (0, 1], a factor
            below 1, a negative number of halvings.

    Source: Chen, Xie and Zhu (2020), (22); Schott et al. (2019); chapter ``generative``.
    """
    check_seed(seed)
    check_inputs(model, x, y, bounds=bounds, steps=steps, every=every)
    check_positive("eta", eta)
    check_number("eta", eta, 1.0)
    check_number("growth", growth)
    if growth < 1:
        raise ValueError(f"growth is a factor >= 1, not {growth!r}")
    check_whole("halvings", halvings)
    x, x_adv, share = x.detach(), x.detach(), float(eta)
    done = torch.zeros_like(y, dtype=torch.bool)
    with torch.no_grad(), eval_mode(model), eval_mode(explain):  # type: ignore[arg-type]
        for step in range(steps):
            if step and step % every == 0:
                share = min(1.0, growth * share)
            logits, made = explain(x_adv.clone())
            done = done | is_adversarial(logits, y)
            if observe is not None:
                state = {"x_adv": x_adv, "logits": logits, "images": made}
                observe(step, {**state, "eta": torch.tensor(share)})
            if settled(done, step):
                break
            wrong = logits.scatter(1, y[:, None], -math.inf).argmax(dim=1)
            goal = made[torch.arange(len(x), device=x.device), wrong]
            moved = x_adv + share * (goal - x_adv)
            x_adv = torch.where(expand(done, x), x_adv, moved).clamp(*bounds)
        return _bisect(model, x, x_adv, y, halvings)


def _bisect(model: Model, x: Tensor, x_adv: Tensor, y: Tensor, halvings: int) -> Tensor:
    """The last point of a bisection that fools the model, or ``x`` where the first doesn't."""
    found = is_adversarial(model(x_adv.clone()), y)
    low, high = x.new_zeros(len(x)), x.new_ones(len(x))
    for _ in range(halvings):
        middle = (low + high) / 2
        hit = is_adversarial(model(x + expand(middle, x) * (x_adv - x)), y)
        low, high = torch.where(hit, low, middle), torch.where(hit, middle, high)
    # At high = 1 the sum may be rounded away from the point that was judged.
    last = torch.where(expand(high < 1, x), x + expand(high, x) * (x_adv - x), x_adv)
    return torch.where(expand(found, x), last, x).clone()


# -------------------------------------------------------------------------------------- helpers


def _solved(solve: Solver, x: Tensor) -> Tensor:
    """An answer outside any graph; ``detach`` again, for a solver that turns recording on."""
    with torch.no_grad():
        return solve(x.detach().clone()).detach()


def _check_draws(samples: int, sigma: float, at_once: int) -> None:
    check_count("samples", samples)
    check_count("at_once", at_once)
    check_positive("sigma", sigma)
    if samples % 2:
        raise ValueError(f"samples come in pairs, so their number is even, not {samples}")
