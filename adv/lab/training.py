"""One training loop for any loss ``(model, x, y) -> scalar``: seeded, resumable, and watched."""

import inspect
import math
import time
import zlib
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from numbers import Real
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
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
DEPTH = 8
"""How deep in a loss its settings are looked for."""


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
    weights, to the last bit, as one that was not; on a GPU only where its kernels are
    deterministic.

    Args:
        model: trained on the device that holds its parameters; only those that require gradients.
        train: the training set, ``data.Split(x, y)`` with ``x`` (N, C, H, W) and ``y`` (N,).
        loss: ``(model, x, y) -> scalar``, a mean over the batch; called in training mode.
        epochs: passes through the training set, at least 1.
        batch_size: samples a step; the last batch of an epoch may be smaller. A last batch of one
            sample stops a network with ``BatchNorm1d``, which needs two; take another size then.
        lr: learning rate at the start, positive.
        optimizer: ``"adam"``, ``"sgd"`` (momentum 0.9), or a callable ``(parameters, lr=...)``,
            which may give groups of parameters rates of their own.
        schedule: factor of all rates by epoch: None (1), ``"cosine"`` (1 to 0 over all epochs), a
            float $\gamma\ge0$ ($\gamma^e$), or a callable ``epoch -> factor``.
        val: held-out samples; with them, the model ends with the best epoch's weights.
        score: ``(model, x, y) -> float`` on ``val`` in evaluation mode, higher is better.
        seed: of the order, dropout and attacks. The initial weights are the caller's.
        checkpoint: file written after each epoch, and resumed from where it exists. It is kept.
            Functions are recognized by their names, their code and what is bound in them (numbers,
            texts, tensors, networks, other objects' attributes; not by what else they call), the
            model by its layers and the shapes of its tensors (not by its first weights: a file is
            for one run).
        observe: called as ``observe(epoch, model)`` after each epoch, in evaluation mode.
        progress: show a bar on stderr; the environment variable ``TQDM_DISABLE=1`` also hides it.

    Returns:
        Mean loss, score and seconds of each epoch, those before a resume included.

    Raises:
        TypeError: ``epochs`` or ``batch_size`` is no integer, a set is no ``Split``, the model no
            module, the loss no function of model, inputs and labels.
        ValueError: on an empty set, settings out of range, nothing to train, or a checkpoint that
            is damaged or another run's; PyTorch's, on a batch of one sample for ``BatchNorm1d``.
        DivergenceError: where the loss is not finite.

    Source: chapter ``defending``.
    """
    _check_parts(model, loss)
    _check(train, val, epochs, batch_size, lr, schedule)
    epochs, batch_size, lr = int(epochs), int(batch_size), float(lr)
    steps = _optimizer(optimizer, [p for p in model.parameters() if p.requires_grad], lr)
    rates = [group["lr"] for group in steps.param_groups]
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
        resting([model], [steps]),
        tqdm(total=epochs * size, initial=done * size, **hide) as bar,
    ):
        for epoch in range(done, epochs):
            start = time.perf_counter()
            factor = _factor(schedule, epoch, epochs)
            for group, rate in zip(steps.param_groups, rates, strict=True):
                group["lr"] = rate * factor
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


def _check_parts(model: nn.Module, loss: Loss) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a torch module, not {type(model).__name__}")
    if not callable(loss) or isinstance(loss, nn.modules.loss._Loss):
        told = "loss is a function (model, x, y) -> scalar; for cross-entropy leave it out"
        raise TypeError(f"{told}, not {loss!r}")


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
def resting(
    models: Iterable[nn.Module], optimizers: Iterable[torch.optim.Optimizer]
) -> Iterator[None]:
    """Leave evaluation mode and no gradients, also where the training diverged or was stopped.

    Args:
        models: what is trained inside.
        optimizers: of all the parameters that get gradients.
    """
    try:
        yield
    finally:
        for model in models:
            model.eval()
        for steps in optimizers:
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
    model = run["model"]
    # A loss or an optimizer may name what is trained, whose values are no setting.
    trained = {id(part) for part in (*model.modules(), *model.parameters(), *model.buffers())}

    def told(value: Any) -> Any:
        if isinstance(value, Split):
            return checkpoints.checksums(value.x, value.y)
        if value is model:
            return checkpoints.described(value)
        return _text(value, trained) if callable(value) else value

    return {name: told(value) for name, value in run.items()}


def _text(value: Any, trained: Container[int] = (), depth: int = DEPTH) -> str:
    """A setting as text: the same in each process, and for other settings another.

    Numbers and names stand for themselves; tensors, code and networks become checksums; of other
    objects it is told what they hold. Of what is nested deeper only the kind is told, as of what is
    ``trained``, given by ``id``.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return repr(value)
    if isinstance(value, Path | torch.dtype | torch.device):
        return str(value)
    if isinstance(value, type | ModuleType | BuiltinFunctionType):
        return getattr(value, "__qualname__", value.__name__)
    if id(value) in trained or not depth:
        return type(value).__name__
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {value.dtype}#{checkpoints.checksums(value)[0]:08x}"
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        return f"{value.shape} {value.dtype}#{_checksum(value.tobytes())}"
    inner = partial(_text, trained=trained, depth=depth - 1)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(inner, value))}]"
    if isinstance(value, Set):
        return f"{{{', '.join(sorted(map(inner, value)))}}}"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{inner(name)}: {inner(one)}' for name, one in value.items())}}}"
    name, held = _network(value) if isinstance(value, nn.Module) else _contents(value)
    told = [f"{key}={inner(one)}" for key, one in held.items() if one is not None]
    text = f"{name}({', '.join(told)})" if told else name
    return f"{name}#{_checksum(text.encode())}" if isinstance(value, nn.Module) else text


def _contents(value: Any) -> tuple[str, dict[str, Any]]:
    """What an object is called, and what it holds."""
    if isinstance(value, partial):
        return f"partial {_name(value.func)}", {"": value.func, "args": value.args} | value.keywords
    if isinstance(value, MethodType):
        return f"method {_name(value)}", {"": value.__func__, "self": value.__self__}
    if isinstance(value, FunctionType):
        held = closed_over(value) | {"defaults": value.__defaults__}
        return f"{value.__qualname__}#{_code(value)}", held | (value.__kwdefaults__ or {})
    state = object.__getstate__(value)  # its dictionary, or that and a dictionary of its slots
    held = {}
    for part in state if isinstance(state, tuple) else (state,):
        held |= part or {}
    call = inspect.getattr_static(type(value), "__call__", None)
    return _name(value), held | ({"": call} if isinstance(call, FunctionType) else {})


def _network(network: nn.Module) -> tuple[str, dict[str, Any]]:
    """A network's class; its tensors, and all layers' classes, code and settings."""
    held: dict[str, Any] = dict(network.named_parameters()) | dict(network.named_buffers())
    for path, part in network.named_modules():
        held[f"{path}:"] = type(part), type(part).forward
        settings = vars(part).keys() - vars(nn.Module()).keys()
        held |= {f"{path}:{key}": vars(part)[key] for key in sorted(settings)}
    return type(network).__qualname__, held


def _name(value: Any) -> str:
    return getattr(value, "__qualname__", type(value).__qualname__)


def _code(function: FunctionType) -> str:
    """A checksum of a function's instructions, without its docstring and its place in the file."""

    def told(constant: Any) -> Any:
        if isinstance(constant, CodeType):
            own = [None if one == function.__doc__ else one for one in constant.co_consts]
            return constant.co_code.hex(), constant.co_names, [told(one) for one in own]
        if isinstance(constant, frozenset):  # whose order changes from process to process
            return sorted(repr(told(one)) for one in constant)
        return [told(one) for one in constant] if isinstance(constant, tuple) else repr(constant)

    return _checksum(repr(told(function.__code__)).encode())


def _checksum(content: bytes) -> str:
    return f"{zlib.crc32(content):08x}"
