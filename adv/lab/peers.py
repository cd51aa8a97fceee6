"""Other libraries' attacks, called as ours are, to be compared with them.

Those that minimize a norm, and, in ``bounded``, the gradient attacks of AutoAttack.

The libraries are imported where an attack is called, so that nothing else needs them. Passes are
counted from outside, by ``evaluation.counting``, as for every attack.
"""

import importlib
import importlib.util
import itertools
import math
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from adv.attacks.common import (
    Bounds,
    check_inputs,
    check_seed,
    eval_mode,
    expand,
    is_adversarial,
)
from adv.geometry import norm as length
from adv.geometry import project

__all__ = ["LIBRARIES", "attack", "bounded", "names"]

LIBRARIES = ("adv-lib", "adversarial-robustness-toolbox", "foolbox")
"""The packages that the attacks come from."""
NORMS = ("linf", "l2", "l1", "l0")
"""The norms that attacks minimize."""
EXPONENT = {"linf": math.inf, "l2": 2, "l1": 1, "l0": 0}
SEARCHES = 9
"""Weights that Carlini-Wagner and EAD try, as their authors do."""
SHORT = 200
"""Steps up to which ALMA averages over few of them, as its authors do."""
OVERSHOOT = (0.0, 1e-4, 1e-3, 1e-2)
"""By what shares a point is pushed on that is adversarial for its library, but not beyond ties."""

Settings = Mapping[str, Any]
Project = Callable[..., Any]


@dataclass(frozen=True)
class _Call:
    """What an attack is run with: the inputs that it may change, and how long."""

    model: nn.Module
    x: Tensor
    y: Tensor
    norm: str
    steps: int
    bounds: Bounds
    settings: Settings


# ----------------------------------------------------------------------------------- the attacks


def _fmn(call: _Call) -> Tensor:
    kind = {"linf": "LInf", "l2": "L2", "l1": "L1", "l0": "L0"}[call.norm]
    mend = {"l2": _project_l2, "l0": _project_l0}.get(call.norm)
    return _foolbox(call, f"{kind}FMNAttack", mend=mend, steps=call.steps)


def _project_l2(_own: Project, x: Any, x0: Any, epsilon: Any) -> Any:
    """Onto the ball. Foolbox 3.3.4 divides a norm by itself there, and so never projects."""
    delta = project(x.raw - x0.raw, "l2", epsilon.raw)
    return type(x)(x0.raw + delta)


def _project_l0(own: Project, x: Any, x0: Any, epsilon: Any) -> Any:
    """Its own, which fails where as many values may change as there are."""
    return own(x=x, x0=x0, epsilon=epsilon.minimum(x.raw[0].numel() - 1))


def _fab(call: _Call) -> Tensor:
    starts = call.settings.get("restarts", 1)
    rounds = max(1, call.steps // ((_classes(call) - 1) * starts))
    p = {"linf": math.inf, "l2": 2.0, "l1": 1.0}[call.norm]
    return _adv_lib(call, "fab", norm=p, n_iter=rounds)


def _fmn_adv_lib(call: _Call) -> Tensor:
    return _adv_lib(call, "fmn", norm=EXPONENT[call.norm], steps=call.steps)


def _pdgd(call: _Call) -> Tensor:
    return _adv_lib(call, "pdgd", num_steps=max(2, call.steps))


def _pdpgd(call: _Call) -> Tensor:
    """Under l0 with the operator of l2/3: adv-lib prefers it, and the source's program has it."""
    rules = {"proximal_operator": 23} if call.norm == "l0" else {}
    steps = max(2, call.steps)
    return _adv_lib(call, "pdpgd", norm=EXPONENT[call.norm], num_steps=steps, **rules)


def _alma(call: _Call) -> Tensor:
    if _classes(call) < 3:
        raise ValueError("ALMA's loss, the ratio of differences of three logits, needs 3 classes")
    first = {"l2": 0.1, "l1": 0.5}[call.norm]
    rules = {"init_lr_distance": first, "α": 0.5 if call.steps <= SHORT else 0.9}
    return _adv_lib(call, "alma", distance=call.norm, num_steps=call.steps, **rules)


def _sigma_zero(call: _Call) -> Tensor:
    return _adv_lib(call, "sigma_zero", num_steps=call.steps)


def _ddn(call: _Call) -> Tensor:
    return _foolbox(call, "DDNAttack", steps=call.steps)


def _carlini_wagner(call: _Call) -> Tensor:
    searches = min(SEARCHES, call.steps)
    rules: dict[str, Any] = {"binary_search_steps": searches, "abort_early": False}
    return _adv_lib(call, "carlini_wagner_l2", max_iterations=call.steps // searches, **rules)


def _ead(call: _Call) -> Tensor:
    searches = min(SEARCHES, call.steps)
    rules: dict[str, Any] = {"binary_search_steps": searches, "abort_early": False}
    steps = call.steps // searches
    return _foolbox(call, "EADAttack", steps=steps, decision_rule="L1", **rules)


def _deepfool(call: _Call) -> Tensor:
    kind = {"linf": "Linf", "l2": "L2"}[call.norm]
    return _foolbox(call, f"{kind}DeepFoolAttack", steps=call.steps)


def _brendel_bethge(call: _Call) -> Tensor:
    """From the nearest input of the batch with another label; inputs without one stay."""
    kind = {"linf": "Linfinity", "l2": "L2", "l1": "L1", "l0": "L0"}[call.norm]
    with torch.no_grad():
        other = call.model(call.x).argmax(dim=1)[None, :] != call.y[:, None]
    apart = torch.cdist(call.x.flatten(1), call.x.flatten(1)).masked_fill(~other, torch.inf)
    begun = other.any(dim=1)
    result = call.x.clone()
    if begun.any():
        part = replace(call, x=call.x[begun], y=call.y[begun])
        start = call.x[apart.argmin(dim=1)[begun]]
        # Its trust region is the product of lr and of the size of the whole batch.
        lr = call.settings.get("lr", 1.0) / len(start)
        name = f"{kind}BrendelBethgeAttack"
        result[begun] = _foolbox(part, name, {"starting_points": start}, steps=call.steps, lr=lr)
    return result


def _jsma(call: _Call) -> Tensor:
    """For each target and both signs, at most ``steps`` gradients in all; the fewest changes."""
    evasion, classifier = _art(call)
    targets, features = classifier.nb_classes - 1, call.x[0].numel()
    share = min(1.0, max(1, call.steps // (2 * targets) - 1) * 2 / features)
    best, fewest = call.x.clone(), torch.full_like(call.x.flatten(1)[:, 0], torch.inf)
    width = call.bounds[1] - call.bounds[0]
    for theta, shift in itertools.product((width, -width), range(1, targets + 1)):
        jsma = evasion.SaliencyMapMethod(
            classifier, theta=theta, gamma=share, batch_size=len(call.x), verbose=False
        )
        wanted = ((call.y + shift) % (targets + 1)).cpu().numpy()
        found = torch.as_tensor(jsma.generate(call.x.cpu().numpy(), wanted)).to(call.x)
        with torch.no_grad():
            hit = is_adversarial(call.model(found), call.y)
        count = torch.where(hit, length(found - call.x, "l0"), torch.inf)
        better = count < fewest
        best = torch.where(expand(better, best), found, best)
        fewest = torch.where(better, count, fewest)
    return best


@dataclass(frozen=True)
class _Peer:
    run: Callable[[_Call], Tensor]
    norms: tuple[str, ...]


PEERS = {
    "fmn": _Peer(_fmn, ("linf", "l2", "l1", "l0")),
    "fab": _Peer(_fab, ("linf", "l2", "l1")),
    "bb": _Peer(_brendel_bethge, ("linf", "l2", "l1", "l0")),
    "alma": _Peer(_alma, ("l2", "l1")),
    "ddn": _Peer(_ddn, ("l2",)),
    "cw": _Peer(_carlini_wagner, ("l2",)),
    "deepfool": _Peer(_deepfool, ("linf", "l2")),
    "ead": _Peer(_ead, ("l1",)),
    "sigma_zero": _Peer(_sigma_zero, ("l0",)),
    "jsma": _Peer(_jsma, ("l0",)),
    "pdgd": _Peer(_pdgd, ("l2",)),
    "pdpgd": _Peer(_pdpgd, ("linf", "l2", "l1", "l0")),
    # Its program for l0 fails where all radii of a batch are 0.
    "fmn_adv_lib": _Peer(_fmn_adv_lib, ("linf", "l2", "l1")),
}


# --------------------------------------------------------------------------------- what is public


def names(norm: str | None = None) -> tuple[str, ...]:
    """The attacks there are, or those that minimize a norm.

    Args:
        norm: ``"linf"``, ``"l2"``, ``"l1"``, ``"l0"``, or None for all.

    Raises:
        ValueError: another norm.
    """
    if norm is not None and norm not in NORMS:
        raise ValueError(f"norm is one of {', '.join(map(repr, NORMS))}, not {norm!r}")
    return tuple(name for name, peer in PEERS.items() if norm is None or norm in peer.norms)


def attack(
    name: str,
    model: nn.Module,
    x: Float[Tensor, "B ..."],
    y: Int[Tensor, " B"],
    *,
    norm: str = "l2",
    steps: int = 100,
    settings: Settings | None = None,
    bounds: Bounds = (0.0, 1.0),
    seed: int = 0,
) -> Float[Tensor, "B ..."]:
    r"""An attack of another library: the nearest adversarial point that it finds.

    | name | attack | library | norms | passes for ``steps`` |
    |---|---|---|---|---|
    | ``fmn`` | fast minimum norm, Pintor et al. (2021) | Foolbox | all four | steps |
    | ``fab`` | adaptive boundary, Croce, Hein (2020) | adv-lib | linf, l2, l1 | steps, K-1 each |
    | ``bb`` | Brendel et al. (2019) | Foolbox | all four | steps, and some to begin |
    | ``alma`` | augmented Lagrangian, Rony et al. (2021) | adv-lib | l2, l1 | steps |
    | ``ddn`` | decoupled direction and norm, Rony et al. (2019) | Foolbox | l2 | steps |
    | ``cw`` | Carlini and Wagner (2017) | adv-lib | l2 | steps over 9 weights |
    | ``deepfool`` | Moosavi-Dezfooli et al. (2016) | Foolbox | linf, l2 | K gradients a step |
    | ``ead`` | elastic net, Chen et al. (2018) | Foolbox | l1 | steps over 9 weights, 2 forward |
    | ``sigma_zero`` | smoothed count, Cina et al. (2025) | adv-lib | l0 | steps |
    | ``jsma`` | saliency map, Papernot et al. (2016) | ART | l0 | at most steps over all targets |
    | ``pdgd`` | primal-dual, Matyasko, Chau (2021) | adv-lib | l2 | steps, 2 at least |
    | ``pdpgd`` | the same, proximal | adv-lib | all four | steps, 2 at least |
    | ``fmn_adv_lib`` | ``fmn`` as programmed there | adv-lib | linf, l2, l1 | steps |

    What these passes come to is measured by ``evaluation.counting(model)`` around the call. While a
    library works, the parameters take no gradients, which would cost it time that our attacks don't
    spend. A point that its library calls adversarial and that ties within the tolerance of
    ``attacks.common.is_adversarial`` is pushed on by up to 1 %.

    ``fmn`` finds nothing for many inputs under l2 and l1, and more steps don't help: chapter
    ``benchmark`` says why. ``cw`` needs hundreds of steps, as each of its 9 weights gets only a
    ninth of them. ``bb`` starts from the nearest other input of the batch that the model gives
    another label: its result depends on the batch, and where there is none (a single input, for
    instance) ``x`` is returned. The first call of ``bb`` under a norm compiles for up to a minute.

    Under l0 values are counted, while ``attacks.pdpgd.pdpgd`` and ``lab.evaluation.minimal_norms``
    count pixels of images. On color images compare with flat inputs, of which all count values:
    ``x.flatten(1)``, and ``nn.Sequential(nn.Unflatten(1, x.shape[1:]), model)`` in evaluation mode.

    Args:
        name: one of ``names()``.
        model: ``torch.nn.Module``, (B, ...) -> (B, K); its flags, parameters and gradients stay.
        x: (B, ...) inputs inside ``bounds``; images (B, C, H, W) for ART.
        y: (B,) true labels.
        norm: one of the attack's norms; under l0 values are counted.
        steps: the budget, as the table says.
        settings: the library's own options of the attack, over those set here.
        bounds: smallest and largest value of an input.
        seed: of the libraries' random draws; the global random states are left as they were.

    Returns:
        (B, ...) perturbed inputs inside ``bounds``; ``x`` itself where it is adversarial already
        or nothing was found.

    Raises:
        ImportError: the library is not installed.
        TypeError: a model that is no ``torch.nn.Module``, or bad input.
        ValueError: bad input, an unknown name, a norm that the attack does not have.

    Source: chapter ``benchmark``.
    """
    peer = _look_up(name, norm)
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"other libraries need a torch.nn.Module, not a {type(model).__name__}; "
            "make it the forward of one"
        )
    check_inputs(model, x, y, bounds=bounds, steps=steps)
    check_seed(seed)
    x = x.detach()
    with eval_mode(model), _frozen(model), _seeded(seed):
        shown = _Shown(model, x.dtype).eval()
        with torch.no_grad():
            open_ = ~is_adversarial(shown(x), y)
        x_adv = x.clone()
        if open_.any():
            call = _Call(shown, x[open_].clone(), y[open_], norm, steps, bounds, settings or {})
            with warnings.catch_warnings(), torch.enable_grad():
                warnings.simplefilter("ignore")
                found = peer.run(call).detach().to(x)
            x_adv[open_] = _kept(shown, x[open_], y[open_], found, bounds)
    return x_adv


def bounded(
    name: str,
    model: nn.Module,
    x: Float[Tensor, "B ..."],
    y: Int[Tensor, " B"],
    *,
    eps: float,
    norm: Literal["linf", "l2"] = "linf",
    steps: int = 100,
    settings: Settings | None = None,
    bounds: Bounds = (0.0, 1.0),
    seed: int = 0,
) -> Float[Tensor, "B ..."]:
    r"""An attack of another library within a radius: the gradient attacks of AutoAttack.

    | name | attack | library | norms | passes for ``steps`` |
    |---|---|---|---|---|
    | ``apgd_ce`` | APGD on the cross-entropy, Croce, Hein (2020) | adv-lib | linf, l2 | steps |
    | ``apgd_t`` | APGD on the targeted DLR, each class | adv-lib | linf, l2 | steps, K-1 runs |

    A run takes one step at least, and a pass more than it has steps. ``apgd_t`` leaves an input
    alone as soon as one class is reached, and so mostly spends less.

    Args:
        name: ``"apgd_ce"`` or ``"apgd_t"``.
        model: ``torch.nn.Module``, (B, ...) -> (B, K); its flags, parameters and gradients stay.
        x: (B, ...) inputs inside ``bounds``.
        y: (B,) true labels.
        eps: radius of the ball, >= 0, in the units of ``x``.
        norm: the ball: ``"linf"`` or ``"l2"``.
        steps: the budget of passes, over all runs.
        settings: the library's own options of the attack, over those set here.
        bounds: smallest and largest value of an input.
        seed: of the libraries' random draws; the global random states are left as they were.

    Returns:
        (B, ...) perturbed inputs, at most ``eps`` away and inside ``bounds``; ``x`` itself where it
        is adversarial already or nothing was found.

    Raises:
        ImportError: the library is not installed.
        TypeError: a model that is no ``torch.nn.Module``, or bad input.
        ValueError: bad input, an unknown name, a norm that the attack does not have, or too few
            classes for ``apgd_t``, whose loss compares four logits.

    Source: chapter ``benchmark``.
    """
    if name not in BOUNDED or norm not in ("linf", "l2"):
        raise ValueError(f"{name!r} is not one of {', '.join(BOUNDED)}, or has no norm={norm!r}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"other libraries need a torch.nn.Module, not a {type(model).__name__}")
    check_inputs(model, x, y, bounds=bounds, steps=steps, eps=eps)
    check_seed(seed)
    x_adv = x.detach().clone()
    with eval_mode(model), _frozen(model), _seeded(seed):
        shown = _Shown(model, x.dtype).eval()
        with torch.no_grad():
            open_ = ~is_adversarial(shown(x_adv), y)
        if open_.any():
            call = _Call(shown, x_adv[open_], y[open_], norm, steps, bounds, settings or {})
            with warnings.catch_warnings(), torch.enable_grad():
                warnings.simplefilter("ignore")
                found = BOUNDED[name](call, eps / (bounds[1] - bounds[0])).detach()
            # Single precision may end a rounding outside.
            delta = project(found - call.x, norm, eps)
            found = (call.x + delta).clamp(*bounds)
            with torch.no_grad():
                hit = is_adversarial(shown(found), call.y)
            x_adv[open_] = torch.where(expand(hit, found), found, call.x)
    return x_adv


# ---------------------------------------------------------------------------------------- helpers


def _apgd_ce(call: _Call, eps: float) -> Tensor:
    rules = {"loss_function": "ce", "n_iter": max(1, call.steps - 1)}
    return _adv_lib(call, "apgd", eps=eps, norm=EXPONENT[call.norm], **rules)


def _apgd_t(call: _Call, eps: float) -> Tensor:
    if _classes(call) < 4:
        raise ValueError("apgd_t's loss compares four logits: it needs 4 classes")
    rounds = max(1, call.steps // (_classes(call) - 1) - 1)
    return _adv_lib(call, "apgd_targeted", eps=eps, norm=EXPONENT[call.norm], n_iter=rounds)


BOUNDED = {"apgd_ce": _apgd_ce, "apgd_t": _apgd_t}


def _look_up(name: str, norm: str) -> _Peer:
    if name not in PEERS:
        raise ValueError(f"no peer {name!r}; there are {', '.join(names())}")
    if norm not in PEERS[name].norms:
        raise ValueError(f"{name} minimizes {' or '.join(PEERS[name].norms)}, not norm={norm!r}")
    return PEERS[name]


def _kept(model: nn.Module, x: Tensor, y: Tensor, found: Tensor, bounds: Bounds) -> Tensor:
    """The points found, where they are adversarial or become it a little further on; else x."""
    result, waiting = x.clone(), torch.ones_like(y, dtype=torch.bool)
    found = torch.where(found.isfinite(), found, x)
    with torch.no_grad():
        for share in OVERSHOOT:
            further = (found + share * (found - x)).clamp(*bounds)
            hit = waiting & is_adversarial(model(further), y)
            result = torch.where(expand(hit, x), further, result)
            waiting &= ~hit
            if not waiting.any():
                break
    return result


def _foolbox(
    call: _Call,
    name: str,
    given: Mapping[str, Tensor] | None = None,
    *,
    mend: Callable[..., Any] | None = None,
    **rules: Any,
) -> Tensor:
    """What an attack of Foolbox, with these rules or the caller's settings, returns."""
    foolbox = _library("foolbox")
    shown = foolbox.PyTorchModel(call.model, bounds=call.bounds, device=call.x.device)
    found = getattr(foolbox.attacks, name)(**{**rules, **call.settings, **_own(rules)})
    if mend is not None:
        found.project = partial(mend, found.project)
    return found.run(shown, call.x, foolbox.criteria.Misclassification(call.y), **(given or {}))


def _own(rules: Mapping[str, Any]) -> dict[str, Any]:
    """The rules that settings can't overrule: what the budget and the batch decide."""
    budget = ("steps", "num_steps", "n_iter", "max_iterations", "lr")
    return {key: rules[key] for key in budget if key in rules}


def _adv_lib(call: _Call, name: str, **rules: Any) -> Tensor:
    """What an attack of adv-lib returns, which takes single precision between 0 and 1."""
    low, high = call.bounds
    found = getattr(_library("adv_lib.attacks"), name)
    scaled = ((call.x.float() - low) / (high - low)).clamp(0, 1)
    theirs = found(
        lambda z: call.model(low + (high - low) * z).float(),
        scaled.clone(),
        call.y,
        **{**rules, **call.settings, **_own(rules)},
    )
    # Where a value was left alone, so is ours: rounding is not a change.
    return torch.where(theirs == scaled, call.x, (low + (high - low) * theirs).to(call.x))


def _art(call: _Call) -> tuple[Any, Any]:
    """The attacks of ART, and the model as one of its classifiers."""
    evasion = _library("art.attacks.evasion")
    estimators = _library("art.estimators.classification")
    classifier = estimators.PyTorchClassifier(
        model=call.model,
        loss=nn.CrossEntropyLoss(),
        input_shape=tuple(call.x.shape[1:]),
        nb_classes=_classes(call),
        clip_values=call.bounds,
        device_type="gpu" if call.x.device.type == "cuda" else "cpu",
    )
    return evasion, classifier


def _classes(call: _Call) -> int:
    with torch.no_grad():
        return int(call.model(call.x[:1]).shape[1])


def _library(module: str) -> Any:
    try:
        with _without_visdom():
            return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"the attacks of other libraries need {', '.join(LIBRARIES)}: pip install adv[peers], "
            "then pip install --no-deps adv-lib"
        ) from error


@contextmanager
def _without_visdom() -> Iterator[None]:
    """Let adv-lib be imported without visdom, a server of plots that its attacks need not."""
    absent = importlib.util.find_spec("visdom") is None
    if absent:
        sys.modules["visdom"] = ModuleType("visdom")
    try:
        yield
    finally:
        if absent:
            del sys.modules["visdom"]


class _Shown(nn.Module):
    """The model as the libraries see it: a module of its own that takes single precision too."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.to(self.dtype))


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No gradients for the parameters inside, and those they had put back at the end."""
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    try:
        for p, _, _ in before:
            p.requires_grad_(False)
            p.grad = None
        yield
    finally:
        for p, wanted, gradient in before:
            p.requires_grad_(wanted)
            p.grad = gradient


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The global random states seeded, and put back at the end."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    devices = range(torch.cuda.device_count())
    try:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
