"""Time between passes: ``python -m benchmarks overhead --store``.

A pass costs more or less with the points that it is given, so an attack's time is set against that
of its own passes. A first run records at which points it calls the network; then the same passes,
forward and backward, are made with nothing between them, right before and after a timed run. The
rows are stored in ``reproduce/results/benchmark/NAME-overhead.json``; those of today's code are
kept.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor, nn

from adv.attacks.common import input_gradient
from adv.attacks.pdpgd import pdpgd
from adv.lab.evaluation import success
from adv.lab.files import held
from benchmarks import strength
from benchmarks.strength import NORMS, RESULTS, SEED, Entry, Network, current, now, scene
from reproduce.files import read, write_json
from reproduce.versions import digest

__all__ = ["contest", "network", "path", "table"]

STEPS, IMAGES = 500, 500
ENTRY = Entry(pdpgd, ("adv.attacks.pdpgd.pdpgd",))
SOME = 50
"""Passes at the images, by which one is timed."""


def network() -> Network:
    """The largest network of ``benchmarks.strength``, with a batch as in a paper's evaluation."""
    names = [one.name for one in strength.networks()]
    return Network("mnist/lenet5" if "mnist/lenet5" in names else "digits/cnn", IMAGES)


def path(name: str, results: Path = RESULTS) -> Path:
    """Where the rows of a network are."""
    return strength.path(f"{name}-overhead", results)


def contest(
    network: Network,
    *,
    steps: int = STEPS,
    results: Path = RESULTS,
    show: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Run what is not stored yet.

    Args:
        network: which, and on how many images; those that it misreads are left out.
        steps: the budget of passes.
        results: the folder of results.
        show: gets a line for each new row.

    Returns:
        The file's content: ``steps`` and ``rows``, each with ``norm``, the time that PDPGD takes
        over that of its own passes (``cost``), the time of these over that of as many passes at
        the images (``points``), and ``made`` as in ``benchmarks.strength``.
    """
    model, some, origin = scene(network)
    origin |= {"steps": steps}
    right = ~success(model, some.x, some.y)
    x, y = some.x[right], some.y[right]
    file, content = path(network.name, results), dict[str, Any]()
    for norm in NORMS:
        code, kept = digest(ENTRY.code[0]), _stored(file, origin)
        if norm in kept and current(ENTRY.code, kept[norm]["code"]):
            continue
        row: dict[str, Any] = {"norm": norm, "code": code} | ENTRY.made()
        row |= _measure(model, x, y, partial(ENTRY.attack, norm=norm, steps=steps, seed=SEED))
        with held(file.parent):  # another process may have added rows meanwhile
            rows = list((_stored(file, origin) | {norm: row}).values())
            content = origin | {"rows": rows}
            write_json(file, content)
        show(f"{norm:<5} {row['cost']:.2f} times its passes")
    return content or read(file) or {}


def table(content: dict[str, Any]) -> pd.DataFrame:
    """What the rows say of time, by norm."""
    rows = pd.DataFrame(content["rows"]).set_index("norm")
    return rows[["cost", "points"]].T.reindex(columns=list(NORMS))


# ---------------------------------------------------------------------------------------- helpers


class _Recorder(nn.Module):
    """A network that keeps the points it is called with."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.points = model, list[Tensor]()

    def forward(self, x: Tensor) -> Tensor:
        self.points.append(x.detach().clone())
        logits: Tensor = self.model(x)
        return logits


def _stored(file: Path, origin: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The stored rows of this network, these images and this budget."""
    content = read(file) or {}
    same = all(content.get(key) == value for key, value in origin.items())
    return {row["norm"]: row for row in content["rows"]} if same else {}


def _measure(
    model: nn.Module, x: Tensor, y: Tensor, attack: Callable[..., Tensor]
) -> dict[str, float]:
    """The time of an attack over that of its passes, and of these over passes at the images."""
    recorder = _Recorder(model)
    attack(recorder, x, y)
    points = recorder.points
    passes = sum(map(len, points)) / len(x)
    before = _passes(model, points)
    start = now()
    attack(model, x, y)
    seconds = now() - start
    own = (before + _passes(model, points)) / 2
    plain = _passes(model, [x] * SOME) / SOME
    return {"cost": round(seconds / own, 3), "points": round(own / (plain * passes), 3)}


def _passes(model: nn.Module, points: list[Tensor]) -> float:
    """Seconds for a forward and a backward pass of each batch."""
    start = now()
    for z in points:
        input_gradient(lambda inputs: model(inputs)[:, 0], z)
    return now() - start
