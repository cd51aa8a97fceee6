"""One training loop for any loss ``(model, x, y) -> scalar``: seeded, resumable, and watched."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from numbers import Real
from pathlib import Path
from types import FunctionType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from adv.attacks.common import check_count, closed_over
from adv.lab import checkpoints
from adv.lab.data import Split
from adv.lab.evaluation import accuracy
from adv.lab.models import split_color

__all__ = [
    "DivergenceError",
    "History",
    "Loss",
    "Score",
    "colorization",
    "cross_entropy",
    "fit",
    "mixed",
    "reconstruction",
]

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
Score = Callable[[nn.Module, Tensor, Tensor], float]
Optimizer = Literal["adam", "sgd"] | Callable[..., torch.optim.Optimizer]
Schedule = Literal["cosine"] | float | Callable[[int], float] | None

# Reading the loss stops the device's queue, so that it is looked at only now and then.
WATCH_EVERY = 50


@dataclass
class History:
    """What happened in each epoch: mean training loss, validation score, wall-clock seconds.

    ``best`` is the epoch (from 0) whose weights the model holds at the end: the one with the
    highest validation score, the latest of equal ones; the last epoch without validation. A score
    that is NaN is the lowest.
    """

    loss: list[float] = field(default_factory=list)
    score: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    best: int = -1


class DivergenceError(ArithmeticError):
    """The training loss became infinite or NaN."""


def cross_entropy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    r"""Mean cross-entropy $-\log p_y(x)$ in nats, the default loss: (B, ...), (B,) -> scalar."""
    return F.cross_entropy(model(x), y)


def reconstruction(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:  # noqa: ARG001
    r"""Mean squared error of an autoencoder, $\mathrm{mean}\,(f(x)-x)^2$; labels are ignored."""
    return F.mse_loss(model(x.clone()), x)  # a layer may change its input in place


def colorization(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:  # noqa: ARG001
    r"""Mean squared error of the chroma that a network predicts from the luminance.

    ``x`` are color images (B, 3, H, W), divided by ``models.split_color``; labels are ignored.
    """
    luminance, chroma = split_color(x)
    return F.mse_loss(model(luminance), chroma)


def mixed(loss: Loss) -> Loss:
    """The same loss in mixed precision, for ``fit``: bfloat16 factors, float32 weights and sums.

    Matrix products and convolutions are made of bfloat16 factors, as ``torch.autocast`` chooses,
    and images are laid out with their channels last. Weights, their gradients and steps stay in
    float32; inputs, activations and logits are rounded to 8 binary digits (steps of 1/256 near 1),
    in attacks inside the loss too. Finite differences do not survive that: ``vat`` needs float32,
    or ``xi`` of 0.1 or more. Processors with such units train large convolutional networks in a
    third of the time or less (``make bench``); on others it is no gain.

    Args:
        loss: ``(model, x, y) -> scalar``.

    Returns:
        ``(model, x, y) -> scalar`` in float32.

    Source: Micikevicius et al. (2018), with bfloat16, whose range needs no scaling of the loss.
    """

    def value(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        if x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        # Without the cache: up to torch 2.10 a weight that was cast under no_grad, as attacks and
        # constant predictions do, comes from it without a graph, and stays without a gradient.
        with torch.autocast(x.device.type, torch.bfloat16, cache_enabled=False):
            return loss(model, x, y).float()

    return value


def fit(
    model: nn.Module,
    train: Split,
    *,
    loss: Loss = cross_entropy,
    epochs: int,
    batch_size: int = 100,
    lr: float = 1e-3,
    optimizer: Optimizer = "adam",
    schedule: Schedule = None,
    val: Split | None = None,
    score: Score = accuracy,
    seed: int = 0,
    checkpoint: Path | str | None = None,
    observe: Callable[[int, nn.Module], None] | None = None,
    progress: bool = True,
) -> History:
    r"""Train ``model`` in place by minibatch descent and leave it in evaluation mode.

    All randomness of epoch $e$ is a function of ``(seed, e)``: the order of the samples has a
    generator of its own, and torch's global generators, from which dropout and the losses of
    ``adv.defenses`` draw, are seeded at the start of each epoch and put back at the end. A run
    that is killed and called again with the same ``checkpoint`` therefore ends with the same
    weights, to the last bit, as one that was not.

    Args:
        model: trained on the device that holds its parameters; only those that require gradients.
        train: the training set, ``data.Split(x, y)`` with ``x`` (N, C, H, W) and ``y`` (N,).
        loss: ``(model, x, y) -> scalar``, a mean over the batch; called in training mode.
        epochs: passes through the training set, at least 1.
        batch_size: samples a step; the last batch of an epoch may be smaller.
        lr: learning rate at the start, positive.
        optimizer: ``"adam"``, ``"sgd"`` (momentum 0.9), or a callable ``(parameters, lr=...)``.
        schedule: factor of ``lr`` by epoch: None (1), ``"cosine"`` (1 to 0 over all epochs), a
            float $\gamma\ge0$ ($\gamma^e$), or a callable ``epoch -> factor``.
        val: held-out samples; with them, the model ends with the best epoch's weights.
        score: ``(model, x, y) -> float`` on ``val`` in evaluation mode, higher is better.
        seed: of the order, dropout and attacks. The initial weights are the caller's.
        checkpoint: file written after each epoch, and resumed from where it exists. It is kept.
            Functions are recognized by their names and the settings bound in them, the model by its
            layers and the shapes of its tensors (not by its first weights: a file is for one run).
        observe: called as ``observe(epoch, model)`` after each epoch, in evaluation mode.
        progress: show a bar on stderr; the environment variable ``TQDM_DISABLE=1`` also hides it.

    Returns:
        Mean loss, score and seconds of each epoch, those before a resume included.

    Raises:
        TypeError: ``epochs`` or ``batch_size`` is no integer, a set is no ``Split``.
        ValueError: on an empty set, settings out of range, nothing to train, or a checkpoint that
            is damaged or another run's.
        DivergenceError: where the loss is not finite.

    Source: chapter ``defending``.
    """
    _check(train, val, epochs, batch_size, lr, schedule)
    epochs, batch_size, lr = int(epochs), int(batch_size), float(lr)
    steps = _optimizer(optimizer, [p for p in model.parameters() if p.requires_grad], lr)
    place = next(model.parameters()).device
    train, val = train.to(place), None if val is None else val.to(place)
    history, best = History(), None
    run: dict[str, Any] = {}
    if checkpoint is not None:
        run = {"model": model, "data": train, "val": val, "loss": loss, "score": score}
        run |= {"epochs": epochs, "batch_size": batch_size, "lr": lr, "seed": seed}
        run = _told(run | {"optimizer": optimizer, "schedule": schedule})
        if (state := checkpoints.load(checkpoint, run)) is not None:
            model.load_state_dict(state["model"])
            steps.load_state_dict(state["optimizer"])
            history, best = History(**state["history"]), state["best"]
    hide: dict[str, bool] = {} if progress else {"disable": True}
    size = math.ceil(len(train) / batch_size)
    done = len(history.loss)
    with (
        _random_state(),
        _resting(model, steps),
        tqdm(total=epochs * size, initial=done * size, **hide) as bar,
    ):
        for epoch in range(done, epochs):
            start = time.perf_counter()
            for group in steps.param_groups:
                group["lr"] = lr * _factor(schedule, epoch, epochs)
            order = _seed_epoch(seed, epoch, len(train)).to(place)
            batches = (train[index] for index in order.split(batch_size))
            history.loss.append(_epoch(model.train(), steps, loss, batches, bar))
            model.eval()
            history.best = epoch
            if val is not None:
                history.score.append(float(score(model, val.x, val.y)))
                history.best = _best(history.score)
                best = _copy(model) if history.best == epoch else best
            history.seconds.append(time.perf_counter() - start)
            if observe is not None:
                observe(epoch, model)
            if checkpoint is not None:
                state = {"model": model.state_dict(), "optimizer": steps.state_dict()}
                state |= {"history": asdict(history), "best": best}
                checkpoints.save(checkpoint, run, state)
            bar.set_postfix(epoch=epoch + 1, loss=f"{history.loss[-1]:.3g}")
    if best is not None:
        model.load_state_dict(best)
    return history


def _check(
    train: Split,
    val: Split | None,
    epochs: int,
    batch_size: int,
    lr: float,
    schedule: Schedule,
) -> None:
    for name, split in (("train", train), ("val", val)):
        if not isinstance(split, Split | None):
            raise TypeError(f"{name} is a data.Split(x, y), not {type(split).__name__}")
    if len(train) == 0:
        raise ValueError("the training set is empty")
    if val is not None and len(val) == 0:
        raise ValueError("the validation set is empty")
    check_count("epochs", epochs)
    check_count("batch_size", batch_size)
    if not (lr > 0 and math.isfinite(lr)):
        raise ValueError(f"lr={lr} must be positive and finite")
    # To the power of 0 even NaN is 1: an epoch would pass before anyone noticed.
    if isinstance(schedule, Real) and not 0 <= schedule < math.inf:
        raise ValueError(f"schedule={schedule} must be finite and not negative")


def _optimizer(kind: Optimizer, parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    if not parameters:
        raise ValueError("the model has no parameter that requires gradients")
    if callable(kind):
        return kind(parameters, lr=lr)
    if kind == "adam":
        return torch.optim.Adam(parameters, lr=lr)
    if kind == "sgd":
        return torch.optim.SGD(parameters, lr=lr, momentum=0.9)
    raise ValueError(f"optimizer={kind!r}: give 'adam', 'sgd' or a callable (parameters, lr=...)")


def _factor(schedule: Schedule, epoch: int, epochs: int) -> float:
    if schedule is None:
        return 1.0
    if callable(schedule):
        factor = float(schedule(epoch))
        if not 0 <= factor < math.inf:
            raise ValueError(f"schedule({epoch}) = {factor} must be finite and not negative")
        return factor
    if schedule == "cosine":
        return (1 + math.cos(math.pi * epoch / epochs)) / 2
    if isinstance(schedule, Real):
        return float(schedule) ** epoch
    raise ValueError(f"schedule={schedule!r}: give None, 'cosine', a float or a callable")


@contextmanager
def _random_state() -> Iterator[None]:
    """Put back the global generators of the CPU and of all CUDA devices: one seed is for all."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        yield


@contextmanager
def _resting(model: nn.Module, steps: torch.optim.Optimizer) -> Iterator[None]:
    """Leave evaluation mode and no gradients, also where the training diverged or was stopped."""
    try:
        yield
    finally:
        model.eval()
        steps.zero_grad(set_to_none=True)


def _seed_epoch(seed: int, epoch: int, size: int) -> Tensor:
    """Seed the global generators for this epoch and return its order of the samples."""
    ours, theirs = np.random.SeedSequence([seed, epoch]).generate_state(2, np.uint64).tolist()
    torch.manual_seed(theirs)
    return torch.randperm(size, generator=torch.Generator().manual_seed(ours))


def _epoch(
    model: nn.Module,
    steps: torch.optim.Optimizer,
    loss: Loss,
    batches: Iterable[Split],
    bar: "tqdm[Any]",
) -> float:
    """One pass; the mean loss over the samples."""
    total: Tensor | float = 0.0
    count = 0
    for number, batch in enumerate(batches, start=1):
        value = loss(model, batch.x, batch.y)
        steps.zero_grad(set_to_none=True)
        value.backward()
        steps.step()
        total = total + value.detach() * len(batch)
        count += len(batch)
        bar.update()
        if number % WATCH_EVERY == 0:
            _finite(total)
    steps.zero_grad(set_to_none=True)
    _finite(total)
    return float(total) / count


def _finite(total: Tensor | float) -> None:
    if not math.isfinite(total):
        raise DivergenceError(
            f"the training loss became {float(total)}: lower the learning rate or clip gradients"
        )


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def _best(scores: list[float]) -> int:
    """The epoch of the highest score, the latest of equal ones."""
    keys = [
        (-math.inf if math.isnan(score) else score, epoch) for epoch, score in enumerate(scores)
    ]
    return max(keys)[1]


def _told(run: dict[str, Any]) -> dict[str, Any]:
    """A run's settings as a file can hold them: data by checksums, callables as text."""

    def told(value: Any) -> Any:
        if isinstance(value, Split):
            return checkpoints.checksums(value.x, value.y)
        if isinstance(value, nn.Module):
            return checkpoints.described(value)
        return _text(value) if callable(value) else value

    return {name: told(value) for name, value in run.items()}


def _text(value: Any, depth: int = 4) -> str:
    """A setting as text: numbers and names, and callables with what is bound in them.

    Of other things, and of what is nested deeper, the kind alone: text must be the same in each
    process.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    if isinstance(value, nn.Module) or not depth:
        return type(value).__name__
    inner = partial(_text, depth=depth - 1)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(inner, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{name}: {inner(one)}' for name, one in value.items())}}}"
    if isinstance(value, partial):
        bound: dict[str, Any] = {"args": value.args} | value.keywords
        name = f"partial {inner(value.func)}"
    elif isinstance(value, FunctionType):
        name = value.__qualname__
        bound = closed_over(value)
        bound |= {"defaults": value.__defaults__, **(value.__kwdefaults__ or {})}
        if name.endswith("<lambda>"):
            bound["constants"] = [c for c in value.__code__.co_consts if isinstance(c, Real | str)]
    else:
        return getattr(value, "__qualname__", type(value).__name__)
    told = [f"{key}={inner(one)}" for key, one in bound.items() if one is not None]
    return f"{name}({', '.join(told)})" if told else name
