"""Trained networks by name: how each was made, what it is worth, and making it again.

``adv/weights/manifest.toml`` holds an entry for each: the recipe (network, data, loss, training,
seed, and the attack under which its accuracy is stated), written by people, and the record (hash,
accuracies or PSNR, time, device), written by ``store``.
"""

import copy
import importlib
import json
import os
import tempfile
import time
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import adv.lab
from adv.defenses.generative import AnalysisBySynthesis
from adv.lab import data, models
from adv.lab.checkpoints import save_weights
from adv.lab.duel import fit_critic, new_critic
from adv.lab.evaluation import accuracy, psnr, robust_accuracy
from adv.lab.files import held, replacing, sha256
from adv.lab.generative import elbo, fit_wgan, with_manifold
from adv.lab.training import Loss, Score, colorization, cross_entropy, fit, reconstruction

__all__ = ["Comparison", "Entry", "entry", "load", "names", "store", "train"]

WEIGHTS = Path(__file__).resolve().parents[1] / "weights"
MANIFEST = "manifest.toml"
CHUNK = 500


class Task(NamedTuple):
    """What a network that does not classify learns: a loss, and pairs (input, target) of images."""

    loss: Loss
    pairs: Callable[[Tensor], tuple[Tensor, Tensor]]


TASKS = {
    "reconstruction": Task(reconstruction, lambda x: (x, x)),
    "colorization": Task(colorization, models.split_color),
    "generation": Task(elbo(), lambda x: (x, x)),
}


@dataclass(frozen=True)
class Entry:
    """One network of the manifest.

    Args:
        name: such as ``"digits/cnn"``.
        data: name of its data set, for ``lab.data.load``.
        model: ``name`` and settings, for ``lab.models.build``.
        training: settings of ``lab.training.fit``; ``best = true`` keeps the best epoch on ``val``.
        loss: ``name`` such as ``"adversarial.trades"`` (a factory in ``adv.defenses``, or with
            ``lab.`` in front in ``adv.lab``) and its settings, in which ``manifold`` names a VAE of
            the zoo; where empty, the task's, or cross-entropy.
        task: ``"reconstruction"`` (image to the same image), ``"colorization"`` (luminance to
            chroma), ``"generation"`` (a VAE) or ``"game"`` (a WGAN, trained by ``fit_wgan``);
            empty for a network that classifies, or has another purpose.
        attack: ``name`` such as ``"gradient.pgd"`` (in ``adv.attacks``), ``eps``, ``norm`` and
            settings, under which the robust accuracy is stated; ``samples`` limits the test images.
            Empty for a network that does not classify, which then has no accuracies.
        critic: settings of ``defenses.critic.Critic``; with them the network is trained against an
            adversary critic, by ``lab.duel.fit_critic``, to which ``training`` then belongs.
        defense: for ``VAEs``: the settings with which ``AnalysisBySynthesis`` of
            ``defenses.generative`` classifies by them, for the accuracies.
        seed: of the initial weights and of the training.
        record: written by ``store``: ``command``, ``sha256``, ``parameters``, ``clean``, ``robust``
            (fractions of 1, on the test set) or, of a task, ``psnr`` (in dB, the mean over the test
            set) or the game's last ``distance``, ``seconds``, ``device``, ``threads``, ``torch``.
    """

    name: str
    data: str
    model: Mapping[str, Any]
    training: Mapping[str, Any]
    loss: Mapping[str, Any] = field(default_factory=dict)
    task: str = ""
    attack: Mapping[str, Any] = field(default_factory=dict)
    critic: Mapping[str, Any] = field(default_factory=dict)
    defense: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    record: Mapping[str, Any] = field(default_factory=dict)

    @property
    def command(self) -> str:
        """The command line that makes these weights again."""
        return f"adv train {self.name}"

    @property
    def path(self) -> Path:
        """The file of its weights in the package."""
        return WEIGHTS / f"{self.name}.safetensors"


@dataclass(frozen=True)
class Comparison:
    """A network trained again, beside the stored one.

    Args:
        name: the network.
        made: record of the new weights.
        stored: record of the stored ones; empty where there are none.
        difference: largest absolute difference of a weight; None without stored weights.
        agreement: share of the test set that both put into the same class; None without stored
            weights, or for a network that does not classify.
        path: where the new weights were written; None where nowhere.
    """

    name: str
    made: Mapping[str, Any]
    stored: Mapping[str, Any]
    difference: float | None
    agreement: float | None
    path: Path | None

    def __str__(self) -> str:
        """A few lines for a terminal."""
        lines = [f"{self.name}: {self.made['parameters']:,} parameters"]
        lines[0] += f", {self.made['seconds']:.0f} s on {self.made['device']}"
        for key, what in (("clean", "test accuracy"), ("robust", "under attack")):
            if key in self.made:
                before = f" (stored: {self.stored[key]:.2%})" if key in self.stored else ""
                lines.append(f"  {what:<24}{self.made[key]:.2%}{before}")
        if "psnr" in self.made:
            before = f" (stored: {self.stored['psnr']:.2f} dB)" if "psnr" in self.stored else ""
            lines.append(f"  {'test PSNR':<24}{self.made['psnr']:.2f} dB{before}")
        if "distance" in self.made:
            before = (
                f" (stored: {self.stored['distance']:.4f})" if "distance" in self.stored else ""
            )
            lines.append(f"  {'critic finds apart':<24}{self.made['distance']:.4f}{before}")
        if self.difference is None:
            lines.append("  nothing stored to compare with")
        else:
            lines.append(f"  {'largest difference':<24}{self.difference:.3g}")
        if self.agreement is not None:
            lines.append(f"  {'same predictions':<24}{self.agreement:.2%}")
        if self.path is not None:
            lines.append(f"  written to {self.path}")
        return "\n".join(lines)


# --------------------------------------------------------------------------------------- reading


def names() -> tuple[str, ...]:
    """The networks of the manifest, in its order."""
    return tuple(_manifest())


def entry(name: str) -> Entry:
    """A network's recipe and record.

    Raises:
        ValueError: unknown name; the message names the closest.
    """
    entries = _manifest()
    if name not in entries:
        there = adv.lab.known(name, entries, "adv.lab.zoo.names()")
        raise ValueError(f"no network {name!r} in the zoo; {there}")
    return Entry(name, **entries[name])


def load(name: str, device: torch.device | str | None = None) -> nn.Module:
    """A trained network, in evaluation mode.

    Args:
        name: one of ``names()``, such as ``"digits/cnn"``.
        device: where to put it; by default the CPU.

    Returns:
        The network; its parameters can be trained further.

    Raises:
        ValueError: unknown name, or a file that is not the one of the record or of the recipe.
        FileNotFoundError: no weights yet; the message says how to make them.
    """
    wanted = entry(name)
    remedy = f"{wanted.command} --store"
    if not wanted.path.is_file():
        raise FileNotFoundError(f"no weights at {wanted.path}; make them with: {remedy}")
    recorded, found = wanted.record.get("sha256"), sha256(wanted.path)
    if found != recorded:
        raise ValueError(
            f"{wanted.path} has sha256 {found}, its record says {recorded}: the file was changed "
            f"or cut short; restore it, or make it again with: {remedy}"
        )
    model = models.build(**wanted.model, seed=0)  # the global random state stays
    try:
        model.load_state_dict(load_file(wanted.path))
    except RuntimeError as error:
        raise ValueError(
            f"{wanted.path} does not fit its recipe; make it again with: {remedy}"
        ) from error
    return model.to(device or "cpu").eval()


# ---------------------------------------------------------------------------------------- making


def train(name: str, out: Path | str | None = None, *, progress: bool = True) -> Comparison:
    """Make a network again by its recipe and say how far it differs from the stored one.

    On the machine and with the number of threads of the record the weights come out the same to
    the last bit; elsewhere sums are rounded in another order, and training carries that on.

    Args:
        name: one of ``names()``.
        out: file to write the new weights to, in a folder that is made if need be. By default
            nothing is written.
        progress: show the progress bar.

    Raises:
        ValueError: unknown name, an ``out`` that is there and no file, or what the recipe's parts
            refuse.
        OSError: no file can be written at ``out``; before the training, not after it.
    """
    wanted = entry(name)
    if out is not None:
        _check_writable(Path(out))
    stored = _stored(name)
    model, made = _make(wanted, progress)
    if out is not None:
        save_weights(model, out)
        made |= {"sha256": sha256(out)}
    return Comparison(
        name=name,
        made=made,
        stored={} if stored is None else wanted.record,
        difference=None if stored is None else _difference(model, stored),
        agreement=None if stored is None else _agreement(wanted, model, stored),
        path=None if out is None else Path(out),
    )


def store(name: str, *, progress: bool = True) -> Comparison:
    """Train a network of the package and make the result its stored weights and record.

    For those who add or change a recipe; a reader wants ``train``. Each file is replaced as a
    whole, and several processes may store at once.

    Args:
        name: one of ``names()``.
        progress: show the progress bar.

    Returns:
        The comparison with what was stored before.
    """
    wanted = entry(name)
    with tempfile.TemporaryDirectory(dir=WEIGHTS, prefix=".") as folder:
        weights = Path(folder) / wanted.path.name
        told = replace(train(name, weights, progress=progress), path=wanted.path)
        with held(WEIGHTS), replacing(WEIGHTS / MANIFEST) as manifest:
            # Read again: another recipe may have been stored while this one was training.
            entries = _manifest()
            entries[name]["record"] = dict(told.made)
            manifest.write_text(_toml(entries), encoding="utf-8")
            wanted.path.parent.mkdir(parents=True, exist_ok=True)
            weights.replace(wanted.path)
    return told


def _stored(name: str) -> nn.Module | None:
    """None where there is no file that fits record and recipe: it is to be made anew."""
    try:
        return load(name)
    except (FileNotFoundError, ValueError):
        return None


def _make(wanted: Entry, progress: bool) -> tuple[nn.Module, dict[str, Any]]:
    """Train by the recipe and measure."""
    place = adv.lab.device()
    source = data.load(wanted.data)
    model = models.build(**wanted.model, seed=wanted.seed).to(place)
    settings = dict(wanted.training)
    val = source.val if settings.pop("best", False) else None
    start = time.perf_counter()
    common: dict[str, Any] = {"seed": wanted.seed, "progress": progress}
    worth: dict[str, float] = {}
    if isinstance(model, models.WGAN):
        game = fit_wgan(model, source.train, **common, **settings)
        worth["distance"] = round(game.distance[-1], 4)
    elif wanted.critic:
        rival = new_critic(wanted.seed, **wanted.critic)
        fit_critic(model, rival, source.train, **common, **settings)
    else:
        score = _score(wanted.task)
        fit(model, source.train, val=val, score=score, loss=_loss(wanted), **common, **settings)
    seconds = time.perf_counter() - start
    worth = worth or _worth(wanted, model, source.test.to(place))
    return model.cpu(), {
        "command": wanted.command,
        "parameters": sum(p.numel() for p in model.parameters()),
        **worth,
        "seconds": round(seconds, 1),
        "device": place.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _worth(wanted: Entry, model: nn.Module, test: data.Split) -> dict[str, float]:
    if wanted.task:
        return {"psnr": round(_score(wanted.task)(model, test.x, test.y), 4)}
    if isinstance(model, models.VAEs):
        model = AnalysisBySynthesis(model.parts, **wanted.defense)
    if not wanted.attack:
        return {}
    settings = dict(wanted.attack)
    attack = _resolve("adv.attacks", settings.pop("name"))
    some = test.take(settings.pop("samples", len(test)))
    return {
        "clean": accuracy(model, test.x, test.y),
        "robust": robust_accuracy(model, some.x, some.y, attack, **settings),
    }


def _score(task: str) -> Score:
    """Higher is better: accuracy, or for a task the mean PSNR of its outputs in dB."""
    if not task:
        return accuracy
    pairs = _task(task).pairs

    @torch.no_grad()
    def quality(model: nn.Module, x: Tensor, y: Tensor) -> float:
        values = []
        for images, labels in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
            given, wanted = pairs(images)
            told = (labels,) if getattr(model, "classes", 0) else ()
            values.append(psnr(model(given, *told), wanted))
        return float(torch.cat(values).mean())

    return quality


def _difference(model: nn.Module, stored: nn.Module) -> float:
    pairs = zip(model.state_dict().values(), stored.state_dict().values(), strict=True)
    return max(float((a.double() - b.double()).abs().max()) for a, b in pairs)


@torch.no_grad()
def _agreement(wanted: Entry, model: nn.Module, stored: nn.Module) -> float | None:
    if not wanted.attack or wanted.defense:
        return None
    chunks = data.load(wanted.data).test.x.split(1000)
    same = [model(x.clone()).argmax(1) == stored(x.clone()).argmax(1) for x in chunks]
    return float(torch.cat(same).double().mean())


def _task(name: str) -> Task:
    if name not in TASKS:
        raise ValueError(f"no task {name!r}; there are {', '.join(TASKS)}")
    return TASKS[name]


def _loss(wanted: Entry) -> Loss:
    settings = with_manifold(wanted.loss, lambda name: load(name, adv.lab.device()))
    if not settings:
        return _task(wanted.task).loss if wanted.task else cross_entropy
    name = settings.pop("name")
    return _resolve("adv" if name.startswith("lab.") else "adv.defenses", name)(**settings)


def _resolve(package: str, name: str) -> Callable[..., Any]:
    """``"adversarial.trades"`` to the function of that module of the package."""
    module, _, function = name.rpartition(".")
    try:
        return getattr(importlib.import_module(f"{package}.{module}"), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{name!r} is no MODULE.FUNCTION in {package}") from error


# ----------------------------------------------------------------------------------------- files


def _manifest() -> dict[str, dict[str, Any]]:
    path = WEIGHTS / MANIFEST
    now = path.stat()
    return copy.deepcopy(_parsed(path, (now.st_ino, now.st_mtime_ns, now.st_size)))


@cache
def _parsed(path: Path, _state: tuple[int, ...]) -> dict[str, dict[str, Any]]:
    """Parsing takes as long as loading a network: once, until the file is another."""
    return tomllib.loads(path.read_text(encoding="utf-8"))


def _check_writable(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no file; give the name of one to write the weights to")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"no file can be written in {path.parent}")


HEADER = """\
# The networks of the zoo. People write the recipes (data, model, training, loss or task, attack);
# `record` is written by adv.lab.zoo.store, which trains by the recipe. `adv train NAME` makes any
# of them again and compares.
"""


def _toml(entries: Mapping[str, Mapping[str, Any]]) -> str:
    """The manifest, one key a line; JSON's strings, numbers and lists are TOML's as well."""
    blocks = [HEADER]
    for name, parts in entries.items():
        lines = [f"{key} = {_value(value)}" for key, value in parts.items()]
        blocks.append("\n".join([f"[{json.dumps(name)}]", *lines, ""]))
    return "\n".join(blocks)


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {_value(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    return json.dumps(value)
