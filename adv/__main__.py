"""The command line: ``adv info``, ``data``, ``train``, ``evaluate``, ``annotate``.

Exit codes: 0 done, 1 something is missing or does not fit, 2 a wrong argument.
"""

import importlib
import importlib.metadata
import json
import platform
import sqlite3
import sys
import warnings
import webbrowser
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import safetensors.torch
import torch
import typer
from safetensors import SafetensorError
from torch import Tensor, nn

import adv.lab
from adv.attacks.boundary import deepfool
from adv.attacks.confidence import high_confidence
from adv.attacks.gradient import fgsm, pgd
from adv.lab import annotate, data, evaluation, zoo

app = typer.Typer(
    help="Adversarial examples, derived, implemented and checked.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
# Whose images ``annotate`` asks about, if nothing else is said: one network, trained in five ways.
JUDGED = tuple(f"digits/{n}" for n in ("margin-ce", "margin-at", "margin-vat", "margin-l2-1e-1"))
JUDGED += ("digits/critic",)
PACKAGES = ("torch", "torchvision", "numpy", "scipy", "scikit-learn", "matplotlib", "pandas")
# What a wrong file, model or number may raise; anything else is a fault of this program.
EXPECTED: tuple[type[Exception], ...] = (ValueError, TypeError, OSError, RuntimeError, KeyError)
EXPECTED += (ArithmeticError, ImportError, EOFError, MemoryError, sqlite3.Error, SafetensorError)


class AttackName(StrEnum):
    """Attacks that the command line offers."""

    pgd = "pgd"
    fgsm = "fgsm"
    deepfool = "deepfool"


ATTACKS: dict[AttackName, Callable[..., Tensor]] = {
    AttackName.pgd: pgd,
    AttackName.fgsm: fgsm,
    AttackName.deepfool: deepfool,
}


class NormName(StrEnum):
    """Norms that the command line offers."""

    linf = "linf"
    l2 = "l2"
    l1 = "l1"


def _radius(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise typer.BadParameter(
            f"{text!r} is not a number; several take one --eps each: --eps 0.1 --eps 0.2"
        ) from error


@app.callback()
def start() -> None:
    """What comes before every command."""
    with suppress(AttributeError):  # a terminal may lack characters of the tables
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


@app.command()
def info() -> None:
    """Show versions, the device, the data sets and the weights at hand."""
    typer.echo(f"adv {importlib.metadata.version('adv')}, Python {platform.python_version()}")
    for package in PACKAGES:
        typer.echo(f"  {package} {importlib.metadata.version(package)}")
    typer.echo(f"device: {_describe(adv.lab.device())}")
    fault = ""
    with _friendly():
        typer.echo("data:")
        try:
            _echo_rows((each.name, each.state) for each in data.found())
        except (ValueError, OSError) as error:  # of ADV_DATA; the weights are elsewhere
            fault = str(error)
            typer.echo(f"  {fault}")
        typer.echo("weights:")
        paths = {name: zoo.entry(name).path for name in zoo.names()}
        _echo_rows((n, "found" if p.is_file() else "not trained") for n, p in paths.items())
    if fault:
        raise typer.Exit(1)


@app.command("data")
def show_data(
    name: Annotated[str | None, typer.Argument(help="A data set; a list, if left out.")] = None,
    download: Annotated[bool, typer.Option("--download", help="Fetch missing files.")] = False,
) -> None:
    """List the data sets and what is wrong with them, or load one and describe it."""
    with _friendly():
        if name is None:
            if download:
                raise typer.BadParameter("say which data set to download")
            _echo_rows((row.name, f"{row.state:<12}{row.note}") for row in data.found(check=True))
            return
        loaded = data.load(_known(name, data.names(), "data set"), download=download)
        sizes = [f"{len(split):,}" for split in (loaded.train, loaded.val, loaded.test)]
        shape = "x".join(map(str, loaded.test.x.shape[1:]))
        typer.echo(f"{name}: {sizes[0]} train, {sizes[1]} val, {sizes[2]} test; {shape}")
        typer.echo(f"{len(loaded.classes)} classes: {', '.join(loaded.classes)}")
        typer.echo(loaded.note)


@app.command()
def train(
    name: Annotated[str, typer.Argument(help="A network of the zoo, such as digits/cnn.")],
    out: Annotated[Path | None, typer.Option(help="File to write the weights to.")] = None,
    store: Annotated[
        bool, typer.Option("--store", help="Make them the package's own, with their record.")
    ] = False,
) -> None:
    """Train a network of the zoo again and compare it with the stored weights."""
    with _friendly():
        _known(name, zoo.names(), "network")
        if store and out is not None:
            raise typer.BadParameter("--store has its own place; leave --out out")
        typer.echo(str(zoo.store(name) if store else zoo.train(name, out)))


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="A network of the zoo, or package.module:factory.")],
    data_name: Annotated[str, typer.Option("--data", help="Data set; its test part is used.")],
    norm: Annotated[NormName, typer.Option(help="Norm of the perturbation.")] = NormName.linf,
    eps: Annotated[
        list[float] | None,
        typer.Option(
            parser=_radius, metavar="<float>", help="Radius in pixel units [0, 1]; may be repeated."
        ),
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="safetensors file or PyTorch state dict for the factory.")
    ] = None,
    attack: Annotated[AttackName, typer.Option(help="The attack.")] = AttackName.pgd,
    steps: Annotated[int | None, typer.Option(help="Steps of pgd or deepfool.")] = None,
    samples: Annotated[int | None, typer.Option(help="First samples of the test part.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the attack.")] = 0,
    memory: Annotated[
        int | None,
        typer.Option(help="Bytes for a chunk of samples; left out, chunks have a fixed size."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps; the best by default.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON.")] = False,
) -> None:
    """Measure a classifier's accuracy on clean and on attacked test images."""
    with _friendly():
        radii = _radii(eps, attack, norm)
        place = _device(device)
        source = data.load(_known(data_name, data.names(), "data set"))
        split = (source.test if samples is None else source.test.take(samples)).to(place)
        network = _network(model, weights, place)
        _check_fit(network, split.x, model, data_name, len(source.classes))
        run = _attack(attack, norm, steps)
        with evaluation.counting(network) as counts:
            result = _measure(network, split, run, radii, seed=seed, memory=memory)
        result = {
            "model": model,
            "weights": None if weights is None else str(weights),
            "data": data_name,
            "samples": len(split),
            "attack": attack.value,
            "steps": steps,
            "norm": norm.value,
            "seed": seed,
            "memory": memory,
            "device": _describe(place),
            "torch": torch.__version__,
            **result,
            "forward_passes": counts.forward,
            "backward_passes": counts.backward,
        }
    typer.echo(json.dumps(result, indent=2) if as_json else _table(result))


@app.command("annotate")
def ask(
    store: Annotated[Path, typer.Argument(help="SQLite file of images and answers.")],
    images: Annotated[
        Path | None, typer.Option(help="Images to ask about (.npz of annotate.Collection).")
    ] = None,
    network: Annotated[
        list[str] | None,
        typer.Option(
            help="Network of the zoo whose images to ask about; may be repeated. "
            f"Left out: {', '.join(JUDGED)}."
        ),
    ] = None,
    samples: Annotated[
        int,
        typer.Option(
            help="First test images attacked on each network, but for those it gets wrong."
        ),
    ] = 50,
    seed: Annotated[int, typer.Option(help="Seed of the order of the images.")] = 0,
    table: Annotated[bool, typer.Option("--table", help="Show the shares and end.")] = False,
    csv: Annotated[Path | None, typer.Option(help="Write the answers here and end.")] = None,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port of the page; 0 for a free one.")
    ] = 8015,
    browser: Annotated[bool, typer.Option(help="Open the page in a browser.")] = True,
) -> None:
    """Ask people which digit adversarial images show: a page for this machine's browsers.

    A STORE that exists goes on; a new one gets the images, by default of digits that an attack
    carried to the nearest class, with the confidence that the network had before.
    """
    with _friendly():
        make = _study(store, images, network or [], samples, seed, new=not (table or csv))
        if table or csv is not None:
            study = make()
        if csv is not None:
            csv.write_text(study.csv(), encoding="utf-8")
        if table:
            rows = study.table().round(1)
            typer.echo(rows.to_string() if len(rows) else "no answers yet")
        if table or csv is not None:
            return
        with annotate.serve(make, port=port) as server:
            address, study = f"http://127.0.0.1:{server.server_port}/", server.study
            typer.echo(f"{study.total} images in {study.forms} forms at {address} (Ctrl+C ends)")
            if browser:
                webbrowser.open(address)
            with suppress(KeyboardInterrupt):
                server.serve_forever()


def _study(
    store: Path, images: Path | None, networks: list[str], samples: int, seed: int, *, new: bool
) -> Callable[[], annotate.Study]:
    """What opens the study of a file, or makes a new one in its place, of arguments that fit."""
    if images is not None and networks:
        raise typer.BadParameter("--images brings its own networks; leave --network out")
    if store.exists() or not new:
        if images is not None or networks:
            raise typer.BadParameter(f"{store} has its images already; give another name")
        return partial(annotate.Study, store)
    if not store.parent.is_dir():
        raise UnusableError(f"no folder {store.parent} for {store.name}; make it first")
    if images is not None:
        return partial(annotate.Study.create, store, annotate.Collection.load(images), seed=seed)
    names = networks or list(JUDGED)
    for name in names:
        _known(name, zoo.names(), "network")
    (source, *others) = {zoo.entry(name).data for name in names}
    if others:
        raise typer.BadParameter("the networks must be of one data set")
    test = data.load(source).test.take(samples)
    loaded = {name: zoo.load(name) for name in names}

    def make() -> annotate.Study:
        settings: dict[str, Any] = {"confidence": None, "steps": 200}
        found = annotate.collect(loaded, test.x, test.y, high_confidence, **settings)
        return annotate.Study.create(store, found, seed=seed)

    return make


# -------------------------------------------------------------------------------------- measuring


def _measure(
    network: nn.Module, split: data.Split, attack: Any, radii: list[float], **options: Any
) -> dict[str, Any]:
    measured = network, split.x, split.y, attack
    if radii:
        clean, *robust = evaluation.robust_accuracy(*measured, [0.0, *radii], **options)
        rows = [{"eps": e, "accuracy": r} for e, r in zip(radii, robust, strict=True)]
        return {"clean_accuracy": clean, "robust": rows}
    norms = evaluation.minimal_norms(*measured, **options)
    correct = norms[norms > 0]
    found = correct[correct.isfinite()]
    return {
        "clean_accuracy": len(correct) / len(norms),
        "found": len(found) / len(correct) if len(correct) else None,
        "median_norm": found.median().item() if len(found) else None,
        "mean_norm": found.mean().item() if len(found) else None,
    }


def _table(result: dict[str, Any]) -> str:
    untrained = ":" in result["model"] and result["weights"] is None
    note = " (no --weights: as it was made)" if untrained else ""
    lines = [
        f"{result['model']}{note} on the first {result['samples']} test images of {result['data']}",
        f"{result['attack']}, {result['norm']}, seed {result['seed']}, {result['device']}",
        "",
        f"{'clean accuracy':<28}{_percent(result['clean_accuracy'])}",
    ]
    for row in result.get("robust", []):
        label = f"accuracy at eps {row['eps']:g}"
        lines += [f"{label:<28}{_percent(row['accuracy'])}"]
    if "found" in result:
        lines.append(f"{'fooled, of the correct':<28}{_percent(result['found'])}")
        for key in ("median_norm", "mean_norm"):
            value = result[key]
            text = "     —" if value is None else f"{value:8.4f}"
            lines.append(f"{key.replace('_', ' ') + ', of the fooled':<28}{text}")
    passes = f"{result['forward_passes']} forward, {result['backward_passes']} backward"
    return "\n".join([*lines, f"{'passes of single images':<28}{passes}"])


def _echo_rows(rows: Iterable[tuple[str, str]]) -> None:
    shown = list(rows)
    width = max([24, *(len(name) + 2 for name, _ in shown)])
    for name, text in shown:
        typer.echo(f"  {name:<{width}}{text}")


def _percent(share: float | None) -> str:
    return "     —" if share is None else f"{100 * share:6.1f} %"


# ---------------------------------------------------------------------------------------- arguments


def _radii(eps: list[float] | None, attack: AttackName, norm: NormName) -> list[float]:
    if not eps and attack is not AttackName.deepfool:
        raise typer.BadParameter(f"{attack.value} needs a radius, such as --eps 0.1")
    if any(not 0 <= e < float("inf") for e in eps or []):
        raise typer.BadParameter(f"--eps is a finite number >= 0, not {eps}")
    if norm is NormName.linf and any(e >= 1 for e in eps or []):
        typer.echo("note: pixels are in [0, 1], and eps >= 1 allows any image", err=True)
    return list(eps or [])


def _attack(name: AttackName, norm: NormName, steps: int | None) -> Any:
    function = ATTACKS[name]
    if steps is None:
        return partial(function, norm=norm.value)
    if name is AttackName.fgsm:
        raise typer.BadParameter("fgsm takes one step; leave --steps out, or take pgd")
    return partial(function, norm=norm.value, steps=steps)


def _device(name: str | None) -> torch.device:
    if name is None:
        return adv.lab.device()
    try:
        chosen = torch.device(name)
        torch.zeros(1, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise typer.BadParameter(
            f"no device {name!r} here; the best is {adv.lab.device()}"
        ) from error
    return chosen


def _known(name: str, known: Sequence[str], what: str, *, note: str = "") -> str:
    if name not in known:
        there = adv.lab.known(name, known, "adv info")
        raise typer.BadParameter(f"no {what} {name!r}{note}; {there}")
    return name


def _describe(device: torch.device) -> str:
    name = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    return f"{device}{name}"


# ----------------------------------------------------------------------------------------- models


class UnusableError(ValueError):
    """Something is missing or does not fit; the message is for the user."""


def _network(model: str, weights: Path | None, device: torch.device) -> nn.Module:
    """A network of the zoo, or what the factory makes with the weights loaded into it."""
    if ":" not in model:
        note = " (nor is it an import path package.module:factory)"
        _known(model, zoo.names(), "network", note=note)
        if weights is not None:
            raise typer.BadParameter(f"{model!r} brings its own weights; leave --weights out")
        return zoo.load(model, device=device)
    network = _made(model)
    if weights is not None:
        state = _state(weights)
        try:
            network.load_state_dict(state)
        except RuntimeError as error:
            raise UnusableError(f"{weights} does not fit {model}: {error}") from error
    return network.to(device).eval()


def _made(path: str) -> nn.Module:
    module_name, _, attribute = path.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # an installed command does not search where it runs
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # the module is the user's and may raise anything
        reason = f"{type(error).__name__}: {error}"
        hint = f"; write {module_name[:-3]}:{attribute}" if module_name.endswith(".py") else ""
        raise UnusableError(f"cannot import {module_name!r}: {reason}{hint}") from error
    try:
        factory = getattr(module, attribute)
    except AttributeError as error:
        raise UnusableError(f"module {module_name!r} has no {attribute!r}") from error
    if isinstance(factory, nn.Module):
        return factory
    if not callable(factory):
        raise UnusableError(f"{path} is no factory but a {type(factory).__name__}")
    try:
        network = factory()
    except (Exception, SystemExit) as error:
        raise UnusableError(f"{path}() failed: {type(error).__name__}: {error}") from error
    if not isinstance(network, nn.Module):
        raise UnusableError(f"{path}() returned a {type(network).__name__}, not a torch module")
    return network


def _state(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UnusableError(f"no weights at {path}")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle may raise anything
        raise UnusableError(
            f"cannot read {path}: it must be a safetensors file or a PyTorch state dict "
            "(torch.save(network.state_dict(), file)), and nothing that runs code when it is loaded"
        ) from error
    told = f"{path} holds no state dict (a mapping from names to tensors)"
    if not isinstance(state, dict):
        raise UnusableError(f"{told} but a {type(state).__name__}")
    if others := [str(name) for name, value in state.items() if not isinstance(value, Tensor)]:
        raise UnusableError(f"{told}: {', '.join(others)}; save the state dict alone")
    return state


def _check_fit(network: nn.Module, x: Tensor, model: str, data_name: str, classes: int) -> None:
    shape = tuple(x.shape[1:])
    try:
        with torch.no_grad():
            logits = network(x[:2].clone())  # which a layer may change in place
    except Exception as error:  # the model is the user's and may raise anything
        raise UnusableError(
            f"{model} does not take {data_name}'s images {shape}: {error}"
        ) from error
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[1] < classes:
        given = tuple(getattr(logits, "shape", ()))
        raise UnusableError(
            f"{model} must return (B, {classes}) logits for {data_name}, not {given}"
        )
    if not logits.isfinite().all():
        raise UnusableError(f"{model} returns logits that are not finite; look at its weights")


@contextmanager
def _friendly() -> Iterator[None]:
    """One line for the user instead of a traceback; warnings as one line each."""
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default", UserWarning)
            try:
                yield
            finally:  # before an error, too, which they may explain
                for warning in caught:
                    typer.echo(f"warning: {warning.message}", err=True)
    except EXPECTED as error:
        text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        typer.echo(f"adv: {text or type(error).__name__}", err=True)
        raise typer.Exit(1) from error


if __name__ == "__main__":
    app()
