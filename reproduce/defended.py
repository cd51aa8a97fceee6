"""Defenses that ask a generative model first: put together, attacked and judged as settings say.

An attack's settings with ``defense`` are of such a defense instead of the network itself; with
``gradient`` they say what the attack takes for its gradient.
"""

import copy
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adv.attacks.adaptive import backtracking, bpda, implicit, nes
from adv.attacks.argmin import WarmStart
from adv.attacks.common import Model, expand, is_adversarial
from adv.defenses.generative import AnalysisBySynthesis, DefenseGAN
from adv.geometry import norm as length
from adv.lab.evaluation import perturb
from adv.lab.models import WGAN, VAEs

__all__ = ["adapted", "built", "stretched", "surrogate"]

Settings = Mapping[str, Any]
Defense = DefenseGAN | AnalysisBySynthesis

# What is added to the seed of the defense that is attacked, for the one that an attack asks whether
# it has succeeded, and for the one that is measured: all three start elsewhere.
VERIFY, MEASURE = 1000, 2000
# How much farther than an attack's point one may have to go for a defense with other starts.
STRETCH = (1.0, 1.01, 1.03, 1.06, 1.1, 1.2)
OWN = ("call", "images", "measures", "measured_at", "chunk", "norm", "defense", "gradient", "uses")


def built(model: nn.Module, used: nn.Module | None, settings: Settings, seed: int) -> nn.Module:
    """The network that is attacked: the defense of the settings, or the model itself.

    Args:
        model: the classifier behind DefenseGAN, or the ``VAEs`` of analysis by synthesis.
        used: DefenseGAN's generator.
        settings: of the attack: ``defense``, a ``name`` and the arguments of that class.
        seed: of the defense's draws.

    Raises:
        TypeError: the networks aren't those that the defense is made of.
        ValueError: another name.
    """
    if "defense" not in settings:
        return model
    own = dict(settings["defense"])
    name = own.pop("name")
    if name == "DefenseGAN":
        if not isinstance(used, WGAN):
            raise TypeError(f"DefenseGAN uses a WGAN, not a {type(used).__name__}")
        return DefenseGAN(used, model, seed=seed, **own)
    if name == "AnalysisBySynthesis":
        if not isinstance(model, VAEs):
            raise TypeError(f"AnalysisBySynthesis is of VAEs, not of a {type(model).__name__}")
        return AnalysisBySynthesis(model.parts, seed=seed, **own)
    raise ValueError(f"{name!r} is no generative defense")


def surrogate(defense: nn.Module, settings: Settings, seed: int) -> Model:
    """What an attack differentiates in place of a defense.

    Args:
        defense: whose inner problem it is; without ``gradient`` it is returned itself.
        settings: of the attack. ``gradient`` has a ``name``: ``backtracking``, ``implicit``,
            ``bpda`` or ``nes`` (of ``attacks.adaptive``, the other entries are theirs), or
            ``oblivious``, the classifier alone. ``warm``: the solver goes so many steps from its
            last answer; ``solver``: or is another one, by attributes of the defense.
        seed: of random estimates.

    Returns:
        A function from inputs to logits.
    """
    own = dict(settings.get("gradient", {}))
    name, warm, other = own.pop("name", None), own.pop("warm", 0), own.pop("solver", {})
    if name is None:
        return defense
    if not isinstance(defense, DefenseGAN | AnalysisBySynthesis):
        raise TypeError(f"{name!r} is a gradient of a generative defense")
    solve = _solver(defense, warm, other)
    if name in ("bpda", "oblivious"):
        if not isinstance(defense, DefenseGAN):
            raise TypeError(f"{name!r} is a gradient of DefenseGAN")
        bare, purify = defense.classifier, defense.decode
        return bare if name == "oblivious" else bpda(lambda x: purify(solve(x)), bare)
    if name == "nes":
        return nes(lambda x: defense.logits(solve(x), x), seed=seed, **own)
    known: dict[str, Callable[..., Model]] = {"backtracking": backtracking, "implicit": implicit}
    if name not in known:
        raise ValueError(f"{name!r} is no gradient")
    return known[name](solve, defense.inner, defense.logits, **own)


def _solver(defense: Defense, warm: int, other: Settings) -> Callable[[Tensor], Tensor]:
    light = copy.copy(defense)
    for name, value in other.items():
        if not hasattr(light, name):
            raise ValueError(f"{type(defense).__name__} has no {name!r}")
        setattr(light, name, value)
    full = _solve(light)
    if not warm:
        return full
    return WarmStart(full, lambda z, x: full(x, start=z, steps=warm), defense.inner)


def _solve(defense: Defense) -> Callable[..., Tensor]:
    return defense.project if isinstance(defense, DefenseGAN) else defense.infer


def adapted(defense: nn.Module, x: Tensor, y: Tensor, settings: Settings, seed: int) -> Tensor:
    """The points that a minimal-norm attack finds on a defense, checked.

    Success is judged by the same defense with other draws: by the attack, where it takes
    ``verify``, else by ``stretched``.

    Args:
        defense: as ``built``, in evaluation mode.
        x: (N, C, H, W) images.
        y: (N,) their labels.
        settings: ``call``, such as ``"adaptive.distortion_search"`` (in ``adv.attacks``),
            ``gradient`` (see ``surrogate``), ``chunk``, images at a time, ``verify``, how many
            defenses with other draws ``surface_search`` must fool (one), and the attack's own.
        seed: of the attack.

    Returns:
        (N, C, H, W) perturbed images, as they were where nothing was found.

    Raises:
        ValueError: so many images that the draws of a judge would be those that are measured.
    """
    count = settings.get("verify", 1)
    most = MEASURE - VERIFY - 10 * (count - 1) - 1
    if len(x) > most:
        raise ValueError(f"{len(x)} images: of more than {most}, judge and measure share draws")
    module, _, name = settings["call"].rpartition(".")
    function = getattr(importlib.import_module(f"adv.attacks.{module}"), name)
    taken = inspect.signature(function).parameters
    own = {key: value for key, value in settings.items() if key not in OWN}
    if "norm" in taken:
        own["norm"] = settings["norm"]

    def call(_: nn.Module, x: Tensor, y: Tensor, *, seed: int, **given: Any) -> Tensor:
        judges = [defense]
        if isinstance(defense, DefenseGAN | AnalysisBySynthesis):
            judges = [defense.reseeded(VERIFY + seed + 10 * k) for k in range(count)]
        model = surrogate(defense, settings, seed)
        options = {"bounds": given["bounds"], "seed": seed, **own}
        if "explain" in taken:
            options["explain"] = _explain(defense)
        if "encode" in taken:
            options |= _on_surface(defense)
        if "verify" in taken:
            options["verify"] = judges if len(judges) > 1 else judges[0]
            return function(model, x, y, **options)
        return stretched(judges[0], x, y, function(model, x, y, **options))

    return perturb(defense, x, y, call, norm="l2", seed=seed, chunk=settings.get("chunk", 100))


def _explain(defense: nn.Module) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    if not isinstance(defense, AnalysisBySynthesis):
        raise TypeError("only analysis by synthesis explains an image by each class")

    def explain(x: Tensor) -> tuple[Tensor, Tensor]:
        z = defense.infer(x)
        return defense.logits(z, x), defense.decode(z)

    return explain


def _on_surface(defense: nn.Module) -> dict[str, Callable[[Tensor], Tensor]]:
    if not isinstance(defense, DefenseGAN):
        raise TypeError(f"a {type(defense).__name__} doesn't decide by what one generator makes")
    return {
        "encode": defense.project,
        "decode": defense.decode,
        "classifier": defense.classifier,
    }


@torch.no_grad()
def stretched(judge: Model, x: Tensor, y: Tensor, x_adv: Tensor) -> Tensor:
    """The nearest point a little beyond an attack's that still fools a defense with other draws.

    Args:
        judge: the defense that decides.
        x: (B, ...) images.
        y: (B,) their labels.
        x_adv: (B, ...) an attack's points.

    Returns:
        (B, ...) the first of the points ``x + t (x_adv - x)``, clipped to [0, 1], that is
        misclassified, for the factors t of ``STRETCH``; ``x`` itself where none is.
    """
    best, done = x.clone(), length(x_adv - x, "l2") == 0
    for factor in STRETCH:
        point = x_adv if factor == 1 else (x + factor * (x_adv - x)).clamp(0, 1)
        hit = is_adversarial(judge(point), y) & ~done
        best, done = torch.where(expand(hit, x), point, best), done | hit
    return best
