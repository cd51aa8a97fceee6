"""What every attack shares: margins, objectives, input gradients, checks, best-so-far.

An attack is a function ``(model, x, y, *, ...) -> x_adv``. Axis 0 is the batch. Loops read a flag
back from the device at most every 50th step (``settled``); nothing here touches a parameter's
``.grad`` or the global random state.
"""

import dis
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from numbers import Real
from types import CodeType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from adv.geometry import bounds_slack

Bounds = tuple[float, float]
Model = Callable[[Tensor], Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]
Objective = Literal["ce", "margin", "score"] | Loss
Observe = Callable[[int, dict[str, Any]], None]
"""``observe(step, state)``: a step's number, and by name the tensors that an attack tells."""

TOLERANCE = 1e-6
"""A margin counts as negative below ``-TOLERANCE`` times the sample's largest absolute logit."""
LIKE_PROBABILITIES = 1e-5
"""How near to 1 the sum of outputs that are not negative is if they are a softmax's."""
DEPTH = 3
"""How deep in a function its networks are looked for."""
MANY = 1000
"""Collections of more entries are data, in which no networks are looked for."""
AT_ONCE = 2**20
"""How many entries of class gradients one backward pass takes; more cost memory, and CPUs time."""
ONE_LOGIT = "write one logit f (B,) as torch.stack([torch.zeros_like(f), f], 1)"
"""As its softmax is then the sigmoid of f; of (-f, f) it would be that of 2f."""


class GradientMaskingWarning(UserWarning):
    """The attack met zero gradients where it had not succeeded: its result is no evidence."""


# --------------------------------------------------------------------------------------- margins


def margin(logits: Float[Tensor, "B K"], y: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
    r"""Margin $m_y = f_y - \max_{j\ne y} f_j$: positive where the prediction is ``y`` alone.

    Args:
        logits: (B, K) scores, K >= 2.
        y: (B,) labels in 0..K-1.

    Returns:
        (B,) margins, in units of the logits.

    Source: Balda et al. (2018), eq. (2); chapter ``first_example``.
    """
    others = logits.scatter(1, y[:, None], -math.inf)
    return logits.gather(1, y[:, None]).squeeze(1) - others.amax(dim=1)


def is_adversarial(
    logits: Float[Tensor, "B K"],
    y: Int[Tensor, " B"],
    targeted: bool = False,
    *,
    tolerance: float = TOLERANCE,
) -> Bool[Tensor, " B"]:
    r"""Whether a point fools the model: its margin is below minus a small tolerance.

    Untargeted: $m_y < -\tau\max_j|f_j|$. Targeted, at the target $t$: $m_t > \tau\max_j|f_j|$.
    The tolerance $\tau$ is relative to each sample's logits, so that scaling them changes nothing
    and rounding under another batch size does not turn a tie into a success.

    Args:
        logits: (B, K) scores at the perturbed points.
        y: (B,) true labels, or the targets where ``targeted``.
        targeted: whether ``y`` is the class wanted.
        tolerance: $\tau$; an attack keeps the default, a later evaluation may ask for 0.

    Returns:
        (B,) booleans, on the device of ``logits``; False where logits are NaN.
    """
    threshold = tolerance * logits.abs().amax(dim=1)
    m = margin(logits, y)
    return m > threshold if targeted else m < -threshold


# ------------------------------------------------------------------------------------ objectives


def _cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    return functional.cross_entropy(logits, y, reduction="none")


def _negative_margin(logits: Tensor, y: Tensor) -> Tensor:
    return -margin(logits, y)


def _negative_score(logits: Tensor, y: Tensor) -> Tensor:
    return -logits.gather(1, y[:, None]).squeeze(1)


def objective(loss: Objective, targeted: bool = False) -> Loss:
    """What the attacker climbs: the loss at the true label, or minus the loss at the target.

    Args:
        loss: ``"ce"`` (cross-entropy), ``"margin"`` (minus the margin), ``"score"`` (minus the
            logit of ``y``), or a function ``(logits (B, K), y (B,)) -> (B,)`` that grows as the
            samples look less like ``y``.
        targeted: whether ``y`` is the class wanted.

    Returns:
        A function ``(logits, y) -> (B,)`` to maximize.

    Raises:
        ValueError: another name.
        TypeError: neither a name nor a function.
    """
    if isinstance(loss, str):
        named: dict[str, Loss] = {
            "ce": _cross_entropy,
            "margin": _negative_margin,
            "score": _negative_score,
        }
        if loss not in named:
            raise ValueError(
                f"loss is 'ce', 'margin', 'score' or a function (logits, y), not {loss!r}"
            )
        chosen = named[loss]
    elif callable(loss):
        chosen = loss
    else:
        raise TypeError(f"loss is 'ce', 'margin', 'score' or a function (logits, y), not {loss!r}")
    return (lambda logits, y: -chosen(logits, y)) if targeted else chosen


# ------------------------------------------------------------------------------------- gradients


@contextmanager
def recording() -> Iterator[None]:
    """Record a graph inside a block, also under ``no_grad`` and ``inference_mode``."""
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        yield


def plain(x: Tensor) -> Tensor:
    """The values of ``x``, outside any graph (a copy where inference mode made ``x``)."""
    return x.clone() if x.is_inference() else x.detach()


def leaf(x: Float[Tensor, "B ..."]) -> tuple[Float[Tensor, "B ..."], Float[Tensor, "B ..."]]:
    """Points to differentiate by, and a copy of them to give to a model.

    A model's layers may work in place. Of a leaf autograd refuses that; of the copy it does not,
    and ``x`` stays as it is.

    Args:
        x: (B, ...) floating-point points.

    Returns:
        The leaf (B, ...), which shares the memory of ``x``, and its copy, with a graph to the leaf
        where gradients are recorded.
    """
    z = plain(x).requires_grad_()
    return z, z.clone()


def input_gradient(
    objective: Callable[[Tensor], Tensor], x: Float[Tensor, "B ..."]
) -> tuple[Float[Tensor, " B"], Float[Tensor, "B ..."]]:
    """Values and input gradients of an objective whose samples do not interact.

    Works under ``torch.no_grad()`` and ``torch.inference_mode()``. Leaves ``x``, the parameters and
    their ``.grad`` as they were. Where no graph leads back to ``x`` (a detached layer) the gradient
    is zero: see ``GradientWatch``.

    Args:
        objective: ``x (B, ...) -> (B,)``, value ``i`` depending on sample ``i`` only.
        x: (B, ...) points.

    Returns:
        The values (B,) and the gradients (B, ...), both detached.

    Raises:
        ValueError: the objective did not return one value for each sample.
    """
    with recording():
        z, given = leaf(x)
        value = objective(given)
        if value.shape != x.shape[:1]:
            raise ValueError(
                f"the objective must return shape ({len(x)},), one value for each sample, "
                f"not {tuple(value.shape)}"
            )
        gradient = None
        if value.requires_grad:
            (gradient,) = torch.autograd.grad(value.sum(), z, allow_unused=True)
    return value.detach(), torch.zeros_like(x) if gradient is None else gradient


def loss_gradient(
    model: Model, x: Float[Tensor, "B ..."], y: Int[Tensor, " B"], loss: Loss
) -> tuple[Float[Tensor, "B K"], Float[Tensor, "B ..."]]:
    """Logits and the input gradient of ``loss(model(x), y)``: one forward, one backward pass.

    Args:
        model: ``(B, ...) -> (B, K)`` logits.
        x: (B, ...) points.
        y: (B,) labels.
        loss: ``(logits, y) -> (B,)``, as made by ``objective``.

    Returns:
        Logits (B, K) and gradients (B, ...), both detached.
    """
    seen: list[Tensor] = []

    def value(z: Tensor) -> Tensor:
        seen.append(model(z))
        return loss(seen[0], plain(y))

    _, gradient = input_gradient(value, x)
    return seen[0].detach(), gradient


def class_gradients(
    model: Model, x: Float[Tensor, "B ..."]
) -> tuple[Float[Tensor, "B K"], Float[Tensor, "B K ..."]]:
    """Logits and the Jacobian: the K class gradients of all samples, as ``row_products`` has them.

    Args:
        model: ``(B, ...) -> (B, K)`` logits, samples not interacting.
        x: (B, ...) points.

    Returns:
        Logits (B, K) and Jacobian (B, K, ...), both detached; zero where no graph leads back to x.
    """
    with recording():
        z, given = leaf(x)
        logits = model(given)
        unit = torch.eye(logits.shape[1], dtype=logits.dtype, device=logits.device)
        rows = unit[:, None].expand(-1, len(z), -1)
        blocks = rows.split(max(1, AT_ONCE // max(1, z.numel())))
        jacobian = torch.cat([row_products(logits, z, some) for some in blocks])
    return logits.detach(), jacobian.transpose(0, 1)


def row_products(
    outputs: Float[Tensor, "*out"],
    inputs: Float[Tensor, "*in"],
    rows: Float[Tensor, "n *out"],
    *,
    create_graph: bool = False,
) -> Float[Tensor, "n *in"]:
    """Vector-Jacobian products with n vectors, in one vectorized backward pass.

    Layers that cannot be batched (some custom backward functions) get one pass for each vector.

    Args:
        outputs: what was computed from ``inputs``, its graph kept.
        inputs: a tensor that requires gradients.
        rows: n vectors shaped like ``outputs``.
        create_graph: whether the products are to be differentiated again.

    Returns:
        (n, ...) products shaped like ``inputs``; zero where no graph leads back to them.

    Raises:
        RuntimeError: out of memory.
    """
    zeros = rows.new_zeros(len(rows), *inputs.shape)
    if not outputs.requires_grad:
        return zeros

    def grad(vectors: Tensor, **batched: bool) -> Any:
        known = {"retain_graph": True, "create_graph": create_graph, "allow_unused": True}
        return torch.autograd.grad(outputs, inputs, vectors, **known, **batched)[0]

    if len(rows) > 1:
        # A layer that cannot be batched raises, or is slow and says so.
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*batching rule.*")
                products = grad(rows, is_grads_batched=True)
            return zeros if products is None else products
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
                error.add_note(
                    f"{len(rows)} backward passes at once took too much memory: "
                    "attack fewer samples at once, or lower adv.attacks.common.AT_ONCE"
                )
                raise
    single = [grad(row) for row in rows]
    return zeros if single[0] is None else torch.stack(single)


class GradientWatch:
    """Counts, on the device, the samples stuck on a zero gradient; warns once after the loop.

    A gradient that is zero (or zero but for entries that are not finite) before the attack has
    succeeded tells nothing about the model's robustness: saturated losses, rounding layers and dead
    units all produce it, and overflow.

    Args:
        x: (B, ...) the inputs, for their number and device.
    """

    def __init__(self, x: Tensor) -> None:
        self.stuck = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        self.done, self.broken = self.stuck.clone(), self.stuck.clone()

    def see(self, gradient: Tensor, adversarial: Tensor) -> Tensor:
        """Note the samples of a step; return the gradient with non-finite entries set to zero.

        Args:
            gradient: (B, ...) this step's gradients.
            adversarial: (B,) the samples that are adversarial at this step; what their gradients
                do from here on is of no account.
        """
        cleaned = gradient.nan_to_num(0.0, 0.0, 0.0)
        self.done |= adversarial
        if settled(self.done, 0):
            return cleaned
        zero = (cleaned.flatten(1).abs().amax(dim=1) == 0) & ~self.done
        self.stuck |= zero
        # The sum of zeros and entries that are not finite: finite only if there are none of these.
        self.broken |= zero & ~gradient.flatten(1).sum(dim=1).isfinite()
        return cleaned

    def report(self, attack: str, depth: int = 3) -> None:
        """Warn with a ``GradientMaskingWarning`` if any sample was ever stuck.

        Args:
            attack: what the warning calls it.
            depth: how many calls up the warning points: 3 for the caller of the attack that calls
                this.
        """
        broken = int(self.broken.sum())
        vanished = int(self.stuck.sum()) - broken
        if vanished or broken:
            happened = [f"vanished for {vanished}"] * bool(vanished)
            happened += [f"was not finite for {broken}"] * bool(broken)
            warnings.warn(
                f"{attack}: the input gradient {' and '.join(happened)} of {len(self.stuck)} "
                "samples that were not adversarial; its failures are no evidence of robustness "
                "(try float64, adv.attacks.adaptive or, of an attack with a loss, 'margin')",
                GradientMaskingWarning,
                stacklevel=depth,
            )


# ---------------------------------------------------------------------------------- best so far


class Best:
    """The best point seen for each sample: the one with the smallest score.

    Minimal-norm attacks score points by their distance and offer only adversarial ones;
    norm-bounded attacks score them by the margin.

    Args:
        x: (B, ...) returned where nothing was ever accepted.
    """

    def __init__(self, x: Float[Tensor, "B ..."]) -> None:
        self.x_adv = x.detach().clone()
        self.distance = torch.full((len(x),), math.inf, dtype=x.dtype, device=x.device)

    @property
    def found(self) -> Bool[Tensor, " B"]:
        """(B,) whether any point was accepted, on the device."""
        return self.distance < math.inf

    def update(self, x_adv: Tensor, distance: Tensor, allowed: Tensor | None = None) -> Tensor:
        """Take the points that beat what is kept.

        Args:
            x_adv: (B, ...) points.
            distance: (B,) their scores, smaller is better; NaN and infinities never win.
            allowed: (B,) booleans, the points that count (default all).

        Returns:
            (B,) booleans, the samples whose kept point changed.
        """
        better = distance.isfinite() & (distance < self.distance)
        if allowed is not None:
            better = better & allowed
        self.x_adv = torch.where(expand(better, x_adv), x_adv.detach(), self.x_adv)
        self.distance = torch.where(better, distance.detach(), self.distance)
        return better


def expand(values: Tensor, like: Tensor) -> Tensor:
    """Shape (B,) values as (B, 1, ..., 1), to broadcast against ``like`` (B, ...)."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def settled(flags: Bool[Tensor, " B"], step: int) -> bool:
    """Whether all flags are set, asked only where the answer is cheap.

    On the CPU at every step; elsewhere reading a flag stops the device, so every 50th step.

    Args:
        flags: (B,) booleans.
        step: the loop's counter, from 0.
    """
    return (flags.device.type == "cpu" or step % 50 == 49) and bool(flags.all())


# ------------------------------------------------------------------------ modes and random draws


def networks(model: Model) -> list[nn.Module]:
    """The networks that run where a model is called: itself, or those that a function holds.

    A function's are looked for in what it closes over, in the globals that it (or a function
    defined in it) names, in its default values, in the object of a bound method and in the
    arguments bound by ``functools.partial``; a callable object's in its attributes and in its
    ``__call__``; there again, and in lists and dictionaries of up to ``MANY`` entries, ``DEPTH``
    times over. One that a function makes or loads itself is not seen.

    Args:
        model: a module or any other callable.

    Returns:
        The modules, each once.
    """
    found: list[nn.Module] = []
    layer, seen = [model], {id(model)}
    for _ in range(DEPTH + 1):
        found += [one for one in layer if isinstance(one, nn.Module)]
        inside = [part for one in layer if not isinstance(one, nn.Module) for part in _inside(one)]
        layer = [part for part in inside if id(part) not in seen]
        layer = list({id(part): part for part in layer}.values())
        seen.update(map(id, layer))
    return found


def closed_over(function: FunctionType) -> dict[str, Any]:
    """The variables that a function closes over, but for those that have no value yet."""
    found = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):
            found[name] = cell.cell_contents
    return found


def _inside(value: Any) -> list[Any]:
    """What an object that can be called, or a collection, holds."""
    if isinstance(value, partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, FunctionType):
        parts = [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        names = _globals_named(value.__code__)
        named = [value.__globals__[name] for name in names if name in value.__globals__]
        return [*parts, *closed_over(value).values(), *named]
    if isinstance(value, list | tuple | dict):
        entries = value.values() if isinstance(value, dict) else value
        return list(entries) if len(value) <= MANY else []
    return [] if isinstance(value, type | ModuleType | Tensor) else _attributes(value)


def _globals_named(code: CodeType) -> list[str]:
    """The globals that a function's code names, also in the functions that it defines."""
    names = [one.argval for one in dis.get_instructions(code) if one.opname == "LOAD_GLOBAL"]
    inner = (part for part in code.co_consts if isinstance(part, CodeType))
    return [*names, *(name for part in inner for name in _globals_named(part))]


def _attributes(value: Any) -> list[Any]:
    """An object's own attributes, ``__call__``, and its class's networks and collections."""
    own = getattr(value, "__dict__", {})
    named: dict[str, Any] = {}
    for kind in reversed(type(value).__mro__):
        if kind.__module__ != "builtins":
            named |= vars(kind)
    found = list(own.values())
    for name, held in named.items():
        if isinstance(held, MemberDescriptorType):  # a slot
            with suppress(AttributeError):
                found.append(held.__get__(value))
        elif name == "__call__" or (
            name not in own and isinstance(held, nn.Module | list | tuple | dict)
        ):
            found.append(held)
    return found


@contextmanager
def eval_mode(model: Model) -> Iterator[None]:
    """Run a block with the model in evaluation mode; give each submodule its own flag back.

    Args:
        model: a module, or a function around ``networks``, which are all switched.
    """
    modules = [module for network in networks(model) for module in network.modules()]
    flags = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module, flag in zip(modules, flags, strict=True):
            module.training = flag


def generator(seed: int, *stream: int) -> torch.Generator:
    """A random generator of the call's own, on the CPU: every device sees the same draws.

    Args:
        seed: the attack's seed, >= 0.
        stream: further non-negative integers (the restart's index), each giving its own stream.

    Raises:
        TypeError: a seed that is no integer.
        ValueError: a negative seed.
    """
    for value in (seed, *stream):
        check_seed(value)
    state = np.random.SeedSequence(seed, spawn_key=stream).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def drawn(
    law: Callable[..., Tensor], shape: tuple[int, ...], like: Tensor, draws: torch.Generator
) -> Tensor:
    """Random numbers of a generator of the CPU, whatever torch's default device is.

    Args:
        law: ``torch.rand`` or ``torch.randn``.
        shape: of the result.
        like: a tensor of the type wanted, on the device wanted.
        draws: as ``generator`` makes it.
    """
    return law(shape, dtype=like.dtype, generator=draws, device="cpu").to(like.device)


# ----------------------------------------------------------------------------------------- checks


def check_inputs(
    model: Model,
    x: Float[Tensor, "B ..."],
    y: Int[Tensor, " B"],
    *,
    bounds: Bounds,
    eps: float = 0.0,
    targeted: bool = False,
    nearest: bool = False,
    **counts: int,
) -> None:
    """Raise on input that no attack can make sense of.

    The number of classes is read from one forward pass of the first sample. If that gives numbers
    like probabilities, not negative and with the sum 1, an attack that looks for the ``nearest``
    point warns with a ``UserWarning``: what the slopes of a softmax tell of distances misleads.

    Args:
        model: ``(B, ...) -> (B, K)`` logits.
        x: (B, ...) floating-point inputs inside ``bounds``, up to ``bounds_slack``.
        y: (B,) int64 labels in 0..K-1, on the device of ``x``.
        bounds: smallest and largest value of an input.
        eps: radius, >= 0.
        targeted: whether ``y`` is the class wanted.
        nearest: whether the attack minimizes the distance.
        counts: what is counted from 1, such as ``steps=40, restarts=1``.

    Raises:
        TypeError: a wrong type or dtype; targets in place of ``targeted``.
        ValueError: wrong shapes, devices, labels or ranges, NaN, negative ``eps``, no steps,
            logits that are not finite.
    """
    if not callable(model):
        raise TypeError(f"model is a function from inputs to logits, not {type(model).__name__}")
    check_range(x, bounds)
    check_labels(x, y)
    check_number("eps", eps)
    if not isinstance(targeted, bool | np.bool_):
        told = "targeted is True or False, and the classes wanted stand in the place of y"
        raise TypeError(f"{told}; {type(targeted).__name__} is neither")
    for name, value in counts.items():
        check_count(name, value)
    logits = _first(model, x)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != 1:
        given = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        hint = f"; {ONE_LOGIT}" if given in ((), (1,)) else ""
        raise ValueError(
            f"the model must return logits (B, K); for one sample it gave {given}{hint}"
        )
    if not logits.is_floating_point():
        raise TypeError(f"the model must return floating-point logits, not {logits.dtype}")
    if logits.shape[1] < 2:
        raise ValueError(f"the model must return at least two classes; {ONE_LOGIT}")
    if not bool(logits.isfinite().all()):
        raise ValueError("the model's logits are not finite on the first sample")
    first, last = int(y.min()), int(y.max())
    if first < 0 or last >= logits.shape[1]:
        raise ValueError(f"labels lie in 0..{logits.shape[1] - 1}, but y spans {first}..{last}")
    like = bool((logits >= 0).all()) and abs(float(logits.sum()) - 1) < LIKE_PROBABILITIES
    if nearest and like and float(logits.amax()) < 1:
        warnings.warn(
            "the model seems to return probabilities: give it without its softmax, or "
            "distances may be far too large",
            stacklevel=3,
        )


def check_outputs(
    model: Model,
    x: Float[Tensor, "B ..."],
    y: Float[Tensor, "B ..."] | None,
    bounds: Bounds,
    eps: float,
    **counts: int,
) -> None:
    """As ``check_inputs``, for a model of any output, and targets shaped like it.

    Args:
        model: ``(B, ...) -> (B, ...)``, of any output shape.
        x: (B, ...) floating-point inputs inside ``bounds``.
        y: targets shaped like the output, or None.
        bounds: smallest and largest value of an input.
        eps: radius, >= 0.
        counts: what is counted from 1.

    Raises:
        TypeError, ValueError: as ``check_inputs``.
    """
    if not callable(model):
        raise TypeError(f"model is a function from inputs to outputs, not {type(model).__name__}")
    check_range(x, bounds)
    check_number("eps", eps)
    for name, value in counts.items():
        check_count(name, value)
    out = _first(model, x)
    if not isinstance(out, Tensor) or not out.is_floating_point():
        given = out.dtype if isinstance(out, Tensor) else type(out).__name__
        raise TypeError(f"the model must return a floating-point tensor, not {given}")
    if out.ndim < 2 or len(out) != 1:
        raise ValueError(f"the model must return (B, ...), not {tuple(out.shape)} for one sample")
    if not bool(out.isfinite().all()):
        raise ValueError("the model's output is not finite on the first sample")
    if y is None:
        return
    if not isinstance(y, Tensor) or y.dtype != out.dtype:
        given = y.dtype if isinstance(y, Tensor) else type(y).__name__
        raise TypeError(f"y is a {out.dtype} tensor shaped like the output, or None, not {given}")
    if y.shape != (len(x), *out.shape[1:]) or y.device != out.device:
        raise ValueError(
            f"y is shaped like the output, {(len(x), *out.shape[1:])} on {out.device}, "
            f"not {tuple(y.shape)} on {y.device}"
        )
    if not bool(y.isfinite().all()):
        raise ValueError("y is not finite")


def check_range(x: Float[Tensor, "B ..."], bounds: Bounds) -> None:
    """Raise unless ``x`` is a floating-point batch inside ``bounds``, up to ``bounds_slack``.

    Raises:
        TypeError: not a tensor of float32 or float64, or bounds that are not two numbers.
        ValueError: no samples, no features, NaN, values outside the bounds, empty bounds.
    """
    if not isinstance(x, Tensor) or x.dtype not in (torch.float32, torch.float64):
        given = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x is a float32 or float64 tensor (B, ...), not {given}")
    if x.ndim < 2 or x.numel() == 0:
        raise ValueError(f"x has shape (B, ...) with samples and features, not {tuple(x.shape)}")
    try:
        low, high = bounds
        proper = math.isfinite(low) and math.isfinite(high) and low < high
    except (TypeError, ValueError) as error:
        raise TypeError(f"bounds are two numbers (low, high), not {bounds!r}") from error
    if not proper:
        raise ValueError(f"bounds are finite with low < high, not {bounds!r}")
    smallest, largest = (float(value) for value in torch.aminmax(x.detach()))
    if math.isnan(smallest) or math.isnan(largest):
        raise ValueError("x contains NaN")
    if max(low - smallest, largest - high) > bounds_slack(bounds, x.dtype):
        raise ValueError(
            f"x spans [{smallest:.9g}, {largest:.9g}], outside the bounds [{low:g}, {high:g}]; "
            "rescale x, or say bounds=..."
        )


def check_labels(x: Float[Tensor, "B ..."], y: Int[Tensor, " B"]) -> None:
    """Raise unless ``y`` is one int64 label for each sample of ``x``, on its device.

    Raises:
        TypeError: not an int64 tensor.
        ValueError: another shape or device.
    """
    if not isinstance(y, Tensor) or y.dtype != torch.int64:
        given = y.dtype if isinstance(y, Tensor) else type(y).__name__
        raise TypeError(f"y is an int64 tensor (B,) of labels, not {given}")
    if y.shape != x.shape[:1]:
        hint = "" if y.numel() != 1 else f"; x is {tuple(x.shape)}: one image is x[None], y[None]"
        raise ValueError(
            f"y has shape ({len(x)},), one label for each sample, not {tuple(y.shape)}{hint}"
        )
    if y.device != x.device:
        raise ValueError(f"x is on {x.device} but y on {y.device}")


def check_number(name: str, value: float, high: float = 1e30) -> None:
    """Raise unless ``value`` is a number in [0, high].

    Args:
        name: what the error calls it.
        value: the number.
        high: the largest allowed; beyond 1e30 float32 overflows on the way.

    Raises:
        TypeError: not a number.
        ValueError: negative, too large or NaN.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} is a number in [0, {high:g}], not {value!r}")
    if not 0 <= value <= high:
        raise ValueError(f"{name} is a number in [0, {high:g}], not {value!r}")


def check_count(name: str, value: int) -> None:
    """Raise unless ``value`` is an integer >= 1.

    Raises:
        TypeError: not an integer.
        ValueError: less than 1.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} is an integer >= 1, not {value!r}")
    if value < 1:
        raise ValueError(f"{name} is an integer >= 1, not {value}")


def check_whole(name: str, value: int) -> None:
    """Raise unless ``value`` is an integer >= 0.

    Raises:
        TypeError: not an integer.
        ValueError: negative.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} is an integer >= 0, not {value!r}")
    if value < 0:
        raise ValueError(f"{name} is an integer >= 0, not {value}")


def check_seed(seed: int) -> None:
    """Raise unless ``seed`` is an integer >= 0; for attacks that draw nothing, too.

    Raises:
        TypeError: not an integer.
        ValueError: negative.
    """
    check_whole("seed", seed)


def check_positive(name: str, value: float) -> None:
    """Raise unless ``value`` is a number in (0, 1e30].

    Raises:
        TypeError: not a number.
        ValueError: zero, or what ``check_number`` refuses.
    """
    check_number(name, value)
    if value == 0:
        raise ValueError(f"{name} must be positive, not 0")


def _first(model: Model, x: Tensor) -> Any:
    """What the model gives for the first sample.

    Raises:
        ValueError: it does not take it.
    """
    try:
        with torch.no_grad(), eval_mode(model):
            return model(x[:1].clone())  # which a layer may change in place
    except RuntimeError as error:
        told = f"{x.dtype} of shape {tuple(x[:1].shape)} on {x.device}"
        weight = next((p for network in networks(model) for p in network.parameters()), None)
        if weight is not None and (weight.dtype, weight.device) != (x.dtype, x.device):
            told += f" (its weights are {weight.dtype} on {weight.device})"
        raise ValueError(f"the model does not take x[:1], {told}: {error}") from error
