"""Strength against cost: ``python -m benchmarks strength --store``, or ``make bench STORE=1``.

Each attack gets the same budgets of passes. What it spent is counted and timed from outside, in
units of the bare forward and backward pass of the same batch, timed right before and after; what it
found is kept image by image. The rows are stored in ``reproduce/results/benchmark/NAME.json``,
after each one, and those of today's code and settings are kept, so that a stopped run goes on.
"""

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from adv.attacks.boundary import deepfool
from adv.attacks.common import input_gradient, margin
from adv.attacks.pdpgd import pdpgd
from adv.attacks.penalty import carlini_wagner
from adv.lab import data, device, peers, zoo
from adv.lab.evaluation import counting, minimal_norms
from adv.lab.files import held
from reproduce.files import read, write_json
from reproduce.options import refuse_unknown
from reproduce.origin import provenance
from reproduce.plan import ROOT
from reproduce.versions import digest, files, same

__all__ = ["NETWORKS", "NORMS", "contest", "current", "networks", "path", "scene", "table"]

RESULTS = ROOT / "reproduce" / "results"
NORMS = ("linf", "l2", "l1", "l0")
BUDGETS = (20, 100, 500, 2000)
SEED = 0
LONG = 5.0
"""Seconds from which on a run is timed only once."""


@dataclass(frozen=True)
class Network:
    """A network of the zoo and how many test images are attacked, the first or evenly spaced."""

    name: str
    samples: int
    first: bool = False


NETWORKS = (
    Network("digits/mlp-24", 40, first=True),  # those whose optima are proven
    Network("mnist/lenet5", 100),
    Network("digits/cnn-at", 100),
)
WITHOUT_MNIST = Network("digits/cnn", 100)


@dataclass(frozen=True)
class Entry:
    """An attack: its function, the definitions whose code says when a row is old, its budgets."""

    attack: Callable[..., Tensor]
    code: tuple[str, ...]
    budgets: tuple[int, ...] = BUDGETS

    def made(self) -> dict[str, Any]:
        """Where a row is computed, with which versions, and from which state of the files."""
        ours = set().union(*map(files, self.code))
        return {"made": provenance(sorted(ours), packages=peers.LIBRARIES)}


def entries(norm: str) -> dict[str, Entry]:
    """The attacks that minimize a norm: ours and those of the libraries."""
    code: tuple[str, ...] = ("adv.attacks.pdpgd.pdpgd",)
    found = {"pdpgd": Entry(pdpgd, code)}
    found["pdpgd.thesis"] = Entry(partial(pdpgd, settings="thesis"), code)
    if norm in ("linf", "l2"):
        found["deepfool"] = Entry(deepfool, ("adv.attacks.boundary.deepfool",), (20,))
    if norm == "l2":
        code = ("adv.attacks.penalty.carlini_wagner",)
        tuned = partial(carlini_wagner, variable="clip", searches=5, weight=0.1, lr=0.05)
        found["carlini_wagner"] = Entry(carlini_wagner, code)
        found["carlini_wagner.tuned"] = Entry(tuned, code)
    limits = {"bb": (20, 100, 500), "jsma": (500, 2000), "deepfool": (20,)}
    for name in peers.names(norm):
        call, code = partial(peers.attack, name), ("attack", f"PEERS[{name}]")
        code = tuple(f"adv.lab.peers.{part}" for part in code)
        found[f"peers.{name}"] = Entry(call, code, limits.get(name, BUDGETS))
    return found


def networks() -> list[Network]:
    """The networks that this machine has the data for."""
    there = {row.name for row in data.found() if row.state in ("found", "built in")}
    chosen = [one if zoo.entry(one.name).data in there else WITHOUT_MNIST for one in NETWORKS]
    return list(dict.fromkeys(chosen))


def path(name: str, results: Path = RESULTS) -> Path:
    """Where the rows of a network are."""
    return results / "benchmark" / f"{name.replace('/', '-')}.json"


def contest(
    network: Network,
    *,
    norms: tuple[str, ...] = NORMS,
    budgets: tuple[int, ...] = BUDGETS,
    attacks: tuple[str, ...] = (),
    trust: bool = False,
    results: Path = RESULTS,
    show: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Run what is not stored yet, the small budgets first.

    Args:
        network: which, and on how many images.
        norms: the norms.
        budgets: passes for each image.
        attacks: names as ``entries`` has them; empty for all.
        trust: keep rows of older code.
        results: the folder of results.
        show: gets a line for each new row.

    Returns:
        The file's content: ``rows``, each with ``attack``, ``norm``, ``steps``, what was found
        (``norms``: a distance for each image, 0 where it is misclassified as it is, null where the
        attack failed) and what it cost for an attacked image: ``forward`` and ``backward`` passes,
        and ``cost``, its time in units of a bare forward and backward pass; ``made`` tells where
        and with what it was computed. Older rows lack it.

    Raises:
        ValueError: a norm or a budget that there isn't.
    """
    refuse_unknown(norms, NORMS, "norm")
    refuse_unknown(map(str, budgets), map(str, BUDGETS), "budget")
    model, some, origin = scene(network)
    file, content = path(network.name, results), dict[str, Any]()
    for key, entry in _wanted(norms, budgets, attacks):
        code, kept = "-".join(map(digest, entry.code)), _stored(file, origin)
        if key in kept and (trust or current(entry.code, kept[key]["code"])):
            continue
        row = dict(zip(("norm", "steps", "attack"), key, strict=True))
        row |= {"code": code} | entry.made()  # before it is used: files may change meanwhile
        row |= _measure(model, some.x, some.y, entry.attack, key[0], key[1])
        with held(file.parent):  # another process may have added rows meanwhile
            rows = list((_stored(file, origin) | {key: row}).values())
            content = origin | {"rows": rows}
            write_json(file, content)
        show(_line(network.name, row))
    return content or read(file) or {}


def current(names: tuple[str, ...], stored: str) -> bool:
    """Whether a row's digests are those of today's code, or of code with the same results."""
    return all(map(same, names, stored.split("-")))


def scene(network: Network) -> tuple[nn.Module, data.Split, dict[str, Any]]:
    """A network of the zoo, the test images for it, and what a file says of both."""
    source = zoo.entry(network.name)
    test = data.load(source.data).test
    count = min(network.samples, len(test))
    index = torch.arange(count) if network.first else torch.arange(count) * len(test) // count
    origin = {
        "network": network.name,
        "weights": source.record["sha256"],
        "data": source.data,
        "images": index.tolist(),
        "seed": SEED,
    }
    return zoo.load(network.name, device=device()), test[index].to(device()), origin


def table(content: Mapping[str, Any], optima: Mapping[str, Any] | None = None) -> pd.DataFrame:
    """Mean distance of the fooled, median of all attacked, the cost, and the gap to the optima.

    Args:
        content: what ``contest`` returned.
        optima: what ``reproduce.optima`` stored for the same network, of some of its images. The
            gap is the mean over those of them that were fooled.
    """
    rows = []
    for row in content["rows"]:
        norms = torch.tensor([math.inf if n is None else n for n in row["norms"]])
        attacked, found = norms > 0, (norms > 0) & (norms < math.inf)
        line = {name: row[name] for name in ("norm", "attack", "steps")}
        line |= {"mean": float(norms[found].mean()), "median": float(norms[attacked].median())}
        line |= {"found": int(found.sum()) / int(attacked.sum())}
        line |= {name: row[name] for name in ("forward", "backward", "cost")}
        if optima is not None:
            known = {one["index"]: one["upper"] for one in optima["norms"].get(row["norm"], ())}
            best = torch.tensor([known.get(index) or math.nan for index in content["images"]])
            line["gap"] = float((norms / best - 1)[found].nanmean())
        rows.append(line)
    return pd.DataFrame(rows).sort_values(["norm", "steps", "mean"]).set_index(["norm", "attack"])


# ---------------------------------------------------------------------------------------- helpers


def _wanted(
    norms: tuple[str, ...], budgets: tuple[int, ...], attacks: tuple[str, ...]
) -> Iterator[tuple[tuple[str, int, str], Entry]]:
    for steps in sorted(budgets):
        for norm in norms:
            for name, entry in entries(norm).items():
                if steps in entry.budgets and name in (attacks or (name,)):
                    yield (norm, steps, name), entry


def _measure(
    model: nn.Module, x: Tensor, y: Tensor, attack: Callable[..., Tensor], norm: str, steps: int
) -> dict[str, Any]:
    """What an attack finds, and what that costs for each image that it attacks."""
    attacked = (margin(model(x).detach(), y) > 0).sum().item()
    bare, seconds = _bare(model, x, y), math.inf
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        minimal_norms(model, x[:9], y[:9], attack, norm=norm, steps=2, seed=SEED)  # may compile
        for run in range(2):  # a short first run's time is that of loading and compiling as well
            if run and seconds > LONG:
                break
            with counting(model) as counts:
                start = now()
                norms = minimal_norms(model, x, y, attack, norm=norm, steps=steps, seed=SEED)
                seconds = min(seconds, now() - start)
    bare = (bare + _bare(model, x, y)) / 2
    return {
        "forward": round(counts.forward / attacked, 1),
        "backward": round(counts.backward / attacked, 1),
        "cost": round(seconds / (bare * attacked / len(x)), 1),
        "norms": [None if math.isinf(n) else float(f"{n:.5g}") for n in norms.tolist()],
    }


def _bare(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Seconds of a forward and a backward pass of the batch: the least of some."""
    times = []
    for _ in range(8):
        start = now()
        input_gradient(lambda z: margin(model(z), y), x)
        times.append(now() - start)
    return min(times[1:])


def now() -> float:
    """Processor time, which other programs on the machine don't stretch; on a GPU, the clock."""
    if device().type == "cuda":
        torch.cuda.synchronize()
    return time.process_time() if device().type == "cpu" else time.perf_counter()


def _stored(file: Path, origin: Mapping[str, Any]) -> dict[tuple[str, int, str], dict[str, Any]]:
    content = read(file) or {}
    if any(content.get(key) != value for key, value in origin.items()):
        return {}
    return {(row["norm"], row["steps"], row["attack"]): row for row in content["rows"]}


def _line(network: str, row: Mapping[str, Any]) -> str:
    norms = [n for n in row["norms"] if n]
    mean = sum(norms) / max(1, len(norms))
    text = f"{network:<14} {row['norm']:<4} {row['attack']:<15} {row['steps']:>5} steps"
    return f"{text}  mean {mean:8.4f} of {len(norms):>3}  cost {row['cost']:8.1f}"
