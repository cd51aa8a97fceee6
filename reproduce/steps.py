"""The steps that compute: train, attack, measure. Each is a command line, called by the Snakefile.

``python -m reproduce.steps train PAPER DATASET MODEL DEFENSE SEED``; the other two take the name of
an attack at the end.
"""

import argparse
import importlib
import inspect
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from adv.lab import data, device, models, peers
from adv.lab.checkpoints import save_weights
from adv.lab.committee import Committee, assemble
from adv.lab.duel import Duel, fit_critic, new_critic
from adv.lab.evaluation import counting, perturb, success
from adv.lab.files import replacing, sha256
from adv.lab.generative import VAEManifold, fit_wgan, with_manifold
from adv.lab.training import History, cross_entropy, fit, mixed
from reproduce import defended, pairs, versions
from reproduce.files import digest, read, write_json
from reproduce.items import Network, Run
from reproduce.measures import MEASURES, Sample
from reproduce.origin import provenance
from reproduce.plan import Plan

__all__ = [
    "attack",
    "chosen",
    "compared",
    "generated",
    "main",
    "measure",
    "perturbed",
    "radii",
    "train",
    "vulnerable",
    "write_record",
]

Settings = Mapping[str, Any]

# Added to the seed of the initial weights of a network that is trained on another one's pairs.
FRESH = 1000
# Entries of an attack's settings that are for the workflow, not for the attack.
OWN = {"call", "target", "eps", "norm", "images", "measures", "measured_at", "ball", "chunk"}
OWN |= {"every", "nested", "judges", "uses"}
# Measures that need no image that was attacked: a network may get nothing right.
OF_ALL = ("error", "correct", "single_step", "portraits")
# The code of measuring; the other names in a record are of the attack.
OF_MEASURES = ("reproduce.measures.", "adv.lab.committee.")


# -------------------------------------------------------------------------------------- the steps


def train(plan: Plan, network: Network) -> None:
    """Train a network, going on where a killed training stopped; write weights and record."""
    recipe, made = plan.recipe(network), _made(plan, network)
    source, place = data.load(recipe["data"]), device()
    # A new encoder must not start from the weights from which the one that was attacked did.
    start = recipe["seed"] + (FRESH if "pairs" in recipe else 0)
    model = models.build(**recipe["model"], seed=start).to(place)
    used, images, targets = _used(plan, network), source.train, {}
    if "pairs" in recipe:
        of = recipe["pairs"]
        folder = _parts(plan, network, of.get("attack", {}), of["count"])
        images, wanted = pairs.training(used, images, of, network.seed, folder)
        targets = {"targets": wanted}
    loss = _loss(recipe["loss"] | targets, used)
    # Its name tells apart what fit() does not know: the recipe, and all the code that a loss calls.
    whole = digest([recipe, made["code"], _which(plan, network)])
    checkpoint = plan.weights(network).with_name(f"checkpoint-{whole}.pt")
    val = source.val if recipe["training"].get("best") else None
    history = (
        _duel(model, images, recipe, checkpoint)
        if "critic" in recipe
        else _game(model, images, recipe, checkpoint)
        if isinstance(model, models.WGAN)
        else _fit(model, images, recipe, loss, checkpoint, val)
    )
    save_weights(model, plan.weights(network))
    record = {
        "values": {"loss": history.loss[-1], "epochs": len(history.loss)} | _verdict(history),
        "images": len(images),
        "complete": source.complete,
        "settings": {"training": recipe},
        "weights": sha256(plan.weights(network)),
    }
    record |= _which(plan, network)
    record |= {"parameters": sum(p.numel() for p in model.parameters())}
    write_record(plan, network, record, sum(history.seconds), made)
    for old in checkpoint.parent.glob("checkpoint-*.pt"):
        old.unlink()


def _fit(
    model: nn.Module,
    train: data.Split,
    recipe: Settings,
    loss: Callable[..., Tensor],
    checkpoint: Path,
    val: data.Split | None,
) -> History:
    """Train by a recipe; the first ``warmup`` of its epochs are of the cross-entropy alone."""
    settings = dict(recipe["training"])
    warmup, decay, augment, half = (
        settings.pop(name, 0) for name in ("warmup", "weight_decay", "augment", "mixed")
    )
    settings.pop("best", None)
    if decay:
        if settings.get("optimizer", "adam") != "adam":
            raise ValueError("weight_decay is Adam's here; leave optimizer out")
        settings["optimizer"] = partial(torch.optim.Adam, weight_decay=decay)
    given = {"seed": recipe["seed"], "progress": sys.stderr.isatty(), **settings}
    history = History()
    early = checkpoint.with_stem(f"{checkpoint.stem}-warmup")
    stages: list[tuple[int, Callable[..., Tensor], Path]] = [(warmup, cross_entropy, early)]
    stages += [(settings["epochs"] - warmup, loss, checkpoint)]
    for epochs, value, file in stages:
        if epochs:
            value = mixed(value) if half else value
            value = _augmented(value) if augment else value
            one = fit(
                model, train, val=val, checkpoint=file, **given | {"epochs": epochs, "loss": value}
            )
            history.loss += one.loss
            history.seconds += one.seconds
    return history


def _duel(model: nn.Module, train: data.Split, recipe: Settings, checkpoint: Path) -> Duel:
    """Train against an adversary critic; epochs and batch are those of ``training``.

    ``products`` is torch's precision of float32 matrix products, for this training alone:
    ``"medium"`` lets them be made of bfloat16 factors, or on CUDA of TF32 ones, where the processor
    has these.
    """
    settings = dict(recipe["critic"])
    critic = new_critic(recipe["seed"], sizes=settings.pop("sizes"))
    products = settings.pop("products", "highest")
    settings |= {name: recipe["training"][name] for name in ("epochs", "batch_size")}
    given = {"seed": recipe["seed"], "checkpoint": checkpoint, "progress": sys.stderr.isatty()}
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(products)
    try:
        return fit_critic(model, critic, train, **settings, **given)
    finally:
        torch.set_float32_matmul_precision(before)


def _game(model: models.WGAN, train: data.Split, recipe: Settings, checkpoint: Path) -> History:
    """Train generator and critic; what counts as the loss is the distance between the two laws."""
    given = {"seed": recipe["seed"], "checkpoint": checkpoint, "progress": sys.stderr.isatty()}
    game = fit_wgan(model, train, **recipe["training"], **given)
    return History(loss=game.distance, seconds=game.seconds)


def _verdict(history: History | Duel) -> dict[str, str]:
    return {"verdict": history.verdict} if isinstance(history, Duel) else {}


def attack(plan: Plan, run: Run) -> None:
    """Perturb test images of the run's data set and write the points."""
    settings, place, code = plan.attack(run), device(), plan.versions(run)
    _check_options(settings)
    model, source = _target(plan, run, 0), data.load(run.network.dataset)
    some = chosen(source.test, settings, plan.recipe(run.network)).to(place)
    start = time.perf_counter()
    attacked = vulnerable(model, some, settings)
    x, y = some.x[attacked], some.y[attacked]
    grid, seed = radii(settings, some.x), run.network.seed
    used = _used(plan, run) if "uses" in settings else None
    with counting(model) as counts:
        if settings.get("target") == "pair":
            wanted = x[pairs.partners(len(x))]
            folder = _parts(plan, run, settings, len(x))
            points = [pairs.attacked(used or model, x, wanted, settings, seed, folder)]
        elif not len(x):  # the network gets nothing right
            points = [x.clone() for _ in grid or (None,)]
        else:
            points = _points(model, x, y, grid, settings, seed, used)
    content = _origin(plan, run) | {
        "code": code,
        "attacked": attacked.cpu(),
        "passes": {name: count / max(1, len(x)) for name, count in asdict(counts).items()},
        "points": [p.cpu() for p in points],
        "eps": grid,
        "seconds": time.perf_counter() - start,
    }
    with replacing(plan.points(run)) as path:
        torch.save(content, path)


def _check_options(settings: Settings) -> None:
    """Refuse what an attack has no argument for, which ``perturbed`` would leave out in silence."""
    call = settings.get("call", "")
    whole = "defense" in settings or settings.get("target") == "pair"  # these pass on everything
    if not call or call.startswith("peers.") or whole:
        return
    taken = inspect.signature(_resolve(f"adv.attacks.{call}")).parameters
    if unknown := settings.keys() - taken.keys() - OWN:
        raise ValueError(f"{call} has no {', '.join(sorted(unknown))}")


def chosen(test: data.Split, settings: Settings, recipe: Settings) -> data.Split:
    """The test images that are considered, as the network takes them.

    Args:
        test: all of them.
        settings: of the attack: ``images``, how many, evenly spaced; None for all.
        recipe: of the network: with ``input: luminance`` it takes that of color images.
    """
    count = min(settings["images"] or len(test), len(test))
    some = test[torch.arange(count) * len(test) // count]
    if recipe.get("input") == "luminance":
        return data.Split(models.split_color(some.x)[0], some.y)
    return some


def vulnerable(model: nn.Module, some: data.Split, settings: Settings) -> Tensor:
    """Which images are attacked: the correctly classified ones.

    All, where an attack has no labels to miss, and with ``every: true``.
    """
    if settings.get("target", "labels") == "labels" and not settings.get("every"):
        return success(model, some.x, some.y, targeted=True)
    return torch.ones(len(some), dtype=torch.bool, device=some.x.device)


def radii(settings: Settings, x: Tensor) -> list[float] | None:
    r"""An attack's radii; None for a minimal-norm attack.

    ``eps: {psnr: [...]}`` means the radii at which perturbations that fill the ball have these
    PSNRs in dB: under linf $10^{-\mathrm{PSNR}/20}$, under l2 $\sqrt d$ times that.
    """
    grid = settings.get("eps")
    if not isinstance(grid, Mapping):
        return None if grid is None else [float(eps) for eps in grid]
    size = math.sqrt(x[0].numel()) if settings["norm"] == "l2" else 1.0
    return [size * 10 ** (-level / 20) for level in grid["psnr"]]


def perturbed(
    model: nn.Module, x: Tensor, y: Tensor, eps: float | None, settings: Settings, seed: int
) -> Tensor:
    """The points that an attack named in the settings finds for some images, checked.

    Args:
        model: in evaluation mode.
        x: (N, C, H, W) images.
        y: (N,) their labels.
        eps: radius; None for a minimal-norm attack.
        settings: ``call``, such as ``"convex.gnm"`` (in ``adv.attacks``; without it, the images
            stay as they are), ``target``: what the attack gets as ``y``, the ``labels``, the
            ``input`` itself, or the ``output`` (None); all else but the workflow's own entries is
            passed on. A value ``"eps"`` stands for the radius.
        seed: of the attack.

    Returns:
        (N, C, H, W) perturbed images.
    """
    if "call" not in settings:
        return x.clone()
    function = _resolve(f"adv.attacks.{settings['call']}")
    own = ("call", "target", "eps", "images", "measures", "measured_at", "ball", "chunk")
    options = {name: value for name, value in settings.items() if name not in own}
    options = {name: eps if value == "eps" else value for name, value in options.items()}
    target = settings.get("target", "labels")

    def call(model: nn.Module, x: Tensor, y: Tensor, **given: Any) -> Tensor:
        given |= options  # also a norm that isn't one, such as random pixels
        given |= {"model": model, "y": {"labels": y, "input": x, "output": None}[target]}
        taken = inspect.signature(function).parameters
        return function(x=x, **{name: value for name, value in given.items() if name in taken})

    ball = settings.get("ball", settings.get("norm", "linf"))
    chunk = {"chunk": settings["chunk"]} if "chunk" in settings else {}
    return perturb(model, x, y, call, eps=eps, norm=ball, seed=seed, **chunk)


def compared(model: nn.Module, x: Tensor, y: Tensor, settings: Settings, seed: int) -> Tensor:
    """The points that another library's minimal-norm attack finds, checked.

    Args:
        model: in evaluation mode.
        x: (N, C, H, W) images.
        y: (N,) their labels.
        settings: ``call``, such as ``"peers.fmn"`` (a name of ``adv.lab.peers``), ``norm``,
            ``steps``, and as ``settings`` the attack's own.
        seed: of the attack.

    Returns:
        (N, C, H, W) perturbed images.
    """
    peer = partial(peers.attack, settings["call"].removeprefix("peers."))
    given = {name: settings[name] for name in ("steps", "settings", "chunk") if name in settings}
    return perturb(model, x, y, peer, norm=settings["norm"], seed=seed, **given)


def generated(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float | None,
    settings: Settings,
    seed: int,
    used: nn.Module,
) -> Tensor:
    """The points that an attack finds on the manifold of a generative model.

    Args:
        model: in evaluation mode.
        x: (N, C, H, W) images.
        y: (N,) their labels, which the generative model is told.
        eps: radius in the units of the code; None for the plain reconstructions.
        settings: ``call``, such as ``"latent.latent_fgsm"``; all else but the workflow's own
            entries is passed on.
        seed: of the attack.
        used: the generative model, a ``VAE``.

    Returns:
        (N, C, H, W) decoded images, as far away as they are.
    """
    function = _resolve(f"adv.attacks.{settings['call']}")
    own = ("call", "target", "eps", "images", "measures", "norm", "uses", "every")
    options = {name: value for name, value in settings.items() if name not in own}
    options["manifold"] = _manifold(used)
    if eps is not None:
        options |= {"eps": eps, "norm": settings["norm"]}

    def call(model: nn.Module, x: Tensor, y: Tensor, **given: Any) -> Tensor:
        given |= options | {"model": model}
        taken = inspect.signature(function).parameters
        return function(x=x, y=y, **{name: v for name, v in given.items() if name in taken})

    return perturb(model, x, y, call, norm="linf", seed=seed)


def _points(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    grid: Sequence[float] | None,
    settings: Settings,
    seed: int,
    used: nn.Module | None = None,
) -> list[Tensor]:
    """The points of every radius; ``nested``: only of images that stood all smaller ones."""
    if "defense" in settings:
        whole = "call" in settings
        return [defended.adapted(model, x, y, settings, seed) if whole else x.clone()]
    if used is not None:
        return [generated(model, x, y, eps, settings, seed, used) for eps in (grid or (None,))]
    if settings.get("call", "").startswith("peers."):
        return [compared(model, x, y, settings, seed)]
    if not settings.get("nested"):
        return [perturbed(model, x, y, eps, settings, seed) for eps in (grid or (None,))]
    points, standing, latest = [], torch.ones_like(y, dtype=torch.bool), x
    for eps in sorted(grid or ()):
        if standing.any():
            latest = latest.clone()
            latest[standing] = perturbed(model, x[standing], y[standing], eps, settings, seed)
            standing = ~success(model, latest, y)
        points.append(latest)
    return points


def measure(plan: Plan, run: Run) -> None:
    """Measure the points of a run and write its record."""
    settings, place, made = plan.attack(run), device(), _made(plan, run)
    model, source = _target(plan, run, defended.MEASURE), data.load(run.network.dataset)
    content = torch.load(plan.points(run), map_location=place, weights_only=True)
    origin = _origin(plan, run)
    if any(content.get(name) != value for name, value in origin.items()):
        raise ValueError(f"{plan.points(run)} is of other settings or weights; delete it")
    attack_code = {
        k: v for k, v in content.get("code", {}).items() if not k.startswith(OF_MEASURES)
    }
    made["code"] |= attack_code  # the attack's may have changed since, which its record must show
    some = chosen(source.test, settings, plan.recipe(run.network)).to(place)
    start = time.perf_counter()
    told = settings | _committee(plan, run, source)
    sample = Sample(
        model, some.x, some.y, content["attacked"], content["points"], content["eps"], told
    )
    values: dict[str, Any] = {}
    for name in settings["measures"]:
        if sample.attacked.any() or name in OF_ALL:
            values |= MEASURES[name](sample)
    record = {
        "values": values,
        "images": len(some),
        "attacked": int(sample.attacked.sum()),
        "of": len(source.test),
        "complete": source.complete,
    }
    if "defense" not in settings:  # what is differentiated in its place doesn't pass through it
        record["passes"] = content["passes"]
    seconds = content["seconds"] + time.perf_counter() - start
    write_record(plan, run, record | origin, seconds, made)


# ------------------------------------------------------------------------------------------ files


def write_record(
    plan: Plan,
    subject: Network | Run,
    content: dict[str, Any],
    seconds: float,
    made: dict[str, Any],
) -> None:
    """Write a record with all that tells where its numbers come from.

    ``made`` is what ``_made`` returned before the work began.
    """
    network = subject if isinstance(subject, Network) else subject.network
    names = {"paper": network.paper, "dataset": network.dataset, "model": network.model}
    names |= {"defense": network.defense}
    names |= {"attack": subject.attack} if isinstance(subject, Run) else {}
    told = {"seed": network.seed, "seconds": round(seconds, 2)}
    write_json(plan.record(subject), names | content | told | made)


def _made(plan: Plan, subject: Network | Run) -> dict[str, Any]:
    """The code that runs, device and versions: asked for first, as files may change meanwhile."""
    peer = isinstance(subject, Run) and plan.attack(subject).get("call", "").startswith("peers.")
    packages = peers.LIBRARIES if peer else ()
    code = {"code": plan.versions(subject)}
    return code | provenance(plan.files(subject), packages=packages)


def _origin(plan: Plan, run: Run) -> dict[str, Any]:
    """What a run's points and values depend on, beside the code."""
    return {
        "settings": {"training": plan.recipe(run.network), "attack": plan.attack(run)},
        "weights": sha256(plan.weights(run.network)),
    } | _which(plan, run)


def _parts(plan: Plan, subject: Network | Run, settings: Settings, count: int) -> Path:
    """Where pairs are kept that several networks are trained or measured on."""
    own = ("uses", "images", "measures")
    attack = {name: value for name, value in settings.items() if name not in own}
    code = versions.digest("reproduce.pairs.attacked")
    network = subject if isinstance(subject, Network) else subject.network
    part = "train" if isinstance(subject, Network) else "test"
    used = plan.used(subject) or network  # whose pairs they are
    weights = {"used": sha256(plan.weights(used))}
    content = [part, network.dataset, network.seed, count, attack, code, weights]
    return plan.work / "pairs" / digest(content)


def _which(plan: Plan, subject: Network | Run) -> dict[str, str]:
    """The weights of the other network that a training or an attack uses, if it does."""
    used = plan.used(subject)
    return {} if used is None else {"used": sha256(plan.weights(used))}


def _used(plan: Plan, subject: Network | Run) -> nn.Module | None:
    used = plan.used(subject)
    return None if used is None else _network(plan, used)


def _committee(plan: Plan, run: Run, source: data.Data) -> dict[str, Committee]:
    """The judges of an attack that says ``judges``: two of scikit-learn and the network named."""
    network = _used(plan, run) if "judges" in plan.attack(run) else None
    return (
        {}
        if network is None
        else {"committee": assemble(source.train, {"robust network": network})}
    )


def _target(plan: Plan, run: Run, draws: int) -> nn.Module:
    """What is attacked: the network, or a defense made of it with draws of its own."""
    model, settings = _network(plan, run.network), plan.attack(run)
    if "defense" not in settings:
        return model
    return defended.built(model, _used(plan, run), settings, draws + run.network.seed)


def _network(plan: Plan, network: Network) -> nn.Module:
    path, record = plan.weights(network), read(plan.record(network)) or {}
    if sha256(path) != record.get("weights"):
        raise ValueError(f"{path} aren't the weights of {plan.record(network)}; delete them")
    model = models.build(**plan.recipe(network)["model"], seed=0)
    model.load_state_dict(load_file(path))
    return model.to(device()).eval()


# ---------------------------------------------------------------------------------------- helpers


def _loss(recipe: Settings, used: nn.Module | None = None) -> Callable[..., Tensor]:
    """Cross-entropy, a loss ``(model, x, y)`` of ``adv``, or what a factory of one returns.

    ``manifold: used`` in its settings stands for the generative model that is used.
    """
    settings = dict(recipe)
    if not settings:
        return cross_entropy
    if isinstance(used, models.VAE):
        settings = with_manifold(settings, lambda _: used)
    function = _resolve(f"adv.{settings.pop('name')}")
    is_loss = next(iter(inspect.signature(function).parameters), "") == "model"
    return function if is_loss else function(**settings)


def _manifold(used: nn.Module) -> VAEManifold:
    if not isinstance(used, models.VAE):
        raise ValueError(f"images lie on the manifold of a VAE, not of a {type(used).__name__}")
    return VAEManifold(used).eval()


def _augmented(loss: Callable[..., Tensor], pad: int = 4) -> Callable[..., Tensor]:
    """A loss of images that are randomly mirrored and shifted by up to ``pad`` pixels."""

    def augmented(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        mirrored = (torch.rand(len(x)) < 0.5).to(x.device)
        x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
        height, width = x.shape[2:]
        down, right = torch.randint(2 * pad + 1, (2, len(x), 1), device="cpu").to(x.device)
        rows = (down + torch.arange(height, device=x.device))[:, :, None]
        columns = (right + torch.arange(width, device=x.device))[:, None, :]
        padded = functional.pad(x, (pad,) * 4).permute(0, 2, 3, 1)
        which = torch.arange(len(x), device=x.device)[:, None, None]
        return loss(model, padded[which, rows, columns].permute(0, 3, 1, 2).contiguous(), y)

    return augmented


def _resolve(name: str) -> Callable[..., Any]:
    module, _, function = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{name!r} is no function of adv") from error


# ----------------------------------------------------------------------------------- command line


def main(arguments: list[str] | None = None) -> None:
    """Run one step."""
    parser = argparse.ArgumentParser(prog="python -m reproduce.steps", description=__doc__)
    parser.add_argument("step", choices=("train", "attack", "measure"))
    for name in ("paper", "dataset", "model", "defense"):
        parser.add_argument(name)
    parser.add_argument("seed", type=int)
    parser.add_argument("attack", nargs="?", help="but for train")
    Plan.options(parser)
    given = parser.parse_args(arguments)
    plan = Plan.given(given)
    network = Network(given.paper, given.dataset, given.model, given.defense, given.seed)
    if (given.step == "train") != (given.attack is None):
        parser.error("train takes no attack, attack and measure take one")
    if given.step == "train":
        train(plan, network)
    else:
        step = attack if given.step == "attack" else measure
        step(plan, Run(network, given.attack))


if __name__ == "__main__":
    main()
