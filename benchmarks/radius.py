"""Strength against cost at one radius: ``python -m benchmarks radius --store``.

How many images an attack leaves, of those that the network reads correctly. Attacks that minimize a
norm count as successful up to the radius. Passes are counted from outside. The rows are stored in
``reproduce/results/benchmark/NAME-radius.json``; those of today's code and settings are kept.
"""

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor, nn

from adv.attacks.gradient import pgd
from adv.attacks.pdpgd import pdpgd
from adv.lab import peers
from adv.lab.evaluation import counting, minimal_norms, perturb, success
from adv.lab.files import held
from benchmarks import strength
from benchmarks.strength import RESULTS, SEED, Entry, Network, current, scene
from reproduce.files import read, write_json
from reproduce.versions import digest

__all__ = ["NETWORK", "contest", "path", "table"]

NETWORK = Network("digits/cnn-at", 100)
NORM, EPS = "linf", 0.2
BUDGETS = (20, 100, 240, 500, 2000)
RUN = 100
"""Steps of a run of PGD: more passes go into restarts."""


def entries() -> dict[str, Entry]:
    """The attacks, within the radius or for the smallest norm."""
    found = {}
    for loss in ("ce", "margin"):
        found[f"pgd.{loss}"] = Entry(partial(_pgd, loss=loss), ("benchmarks.radius._pgd",), BUDGETS)
    code: tuple[str, ...]
    for name in peers.BOUNDED:
        code = ("adv.lab.peers.bounded", f"adv.lab.peers.BOUNDED[{name}]")
        found[name] = Entry(partial(peers.bounded, name), code, BUDGETS)
    code = ("adv.attacks.pdpgd.pdpgd",)
    found["pdpgd"] = Entry(pdpgd, code, (20, 100, 199, 200, 240, 500, 2000))
    found["pdpgd.thesis"] = Entry(partial(pdpgd, settings="thesis"), code, BUDGETS)
    for name in ("pdpgd", "fab"):
        code = ("adv.lab.peers.attack", f"adv.lab.peers.PEERS[{name}]")
        found[f"peers.{name}"] = Entry(partial(peers.attack, name), code, BUDGETS)
    return found


def path(name: str = NETWORK.name, results: Path = RESULTS) -> Path:
    """Where the rows of a network are."""
    return strength.path(f"{name}-radius", results)


def contest(
    network: Network = NETWORK,
    *,
    budgets: tuple[int, ...] = (),
    attacks: tuple[str, ...] = (),
    results: Path = RESULTS,
    show: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Run what is not stored yet, the small budgets first.

    Args:
        network: which, and on how many images.
        budgets: passes for each image; empty for those of each attack.
        attacks: names as ``entries`` has them; empty for all.
        results: the folder of results.
        show: gets a line for each new row.

    Returns:
        The file's content: ``norm``, ``eps`` and ``rows``, each with ``attack``, ``steps``,
        ``left`` (for each image whether the network still reads it correctly), the ``forward``
        and ``backward`` passes for an attacked image, and ``made`` as in ``benchmarks.strength``.
    """
    model, some, origin = scene(network)
    origin |= {"norm": NORM, "eps": EPS}
    file, content = path(network.name, results), dict[str, Any]()
    for steps, name, entry in _wanted(budgets, attacks):
        code, kept = "-".join(map(digest, entry.code)), _stored(file, origin)
        if (steps, name) in kept and current(entry.code, kept[steps, name]["code"]):
            continue
        row: dict[str, Any] = {"steps": steps, "attack": name, "code": code} | entry.made()
        row |= _measure(model, some.x, some.y, entry.attack, steps)
        with held(file.parent):  # another process may have added rows meanwhile
            rows = list((_stored(file, origin) | {(steps, name): row}).values())
            content = origin | {"rows": rows}
            write_json(file, content)
        show(f"{name:<14} {steps:>5} steps  {sum(row['left']):>4} left")
    return content or read(file) or {}


def table(content: dict[str, Any]) -> pd.DataFrame:
    """Images left, by attack and budget."""
    rows = [
        {"attack": row["attack"], "steps": row["steps"], "left": sum(row["left"])}
        for row in content["rows"]
    ]
    return pd.DataFrame(rows).pivot_table("left", "attack", "steps")


# ---------------------------------------------------------------------------------------- helpers


def _pgd(
    model: nn.Module, x: Tensor, y: Tensor, *, eps: float, steps: int, **options: Any
) -> Tensor:
    """Runs of a hundred steps or a little more, or one shorter one."""
    restarts = max(1, steps // RUN)
    return pgd(model, x, y, eps=eps, steps=steps // restarts, restarts=restarts, **options)


def _stored(file: Path, origin: dict[str, Any]) -> dict[tuple[int, str], dict[str, Any]]:
    """The stored rows of this network, these images and this radius."""
    content = read(file) or {}
    same = all(content.get(key) == value for key, value in origin.items())
    return {(row["steps"], row["attack"]): row for row in content["rows"]} if same else {}


def _wanted(budgets: tuple[int, ...], attacks: tuple[str, ...]) -> Iterator[tuple[int, str, Entry]]:
    known = entries()
    for steps in sorted({steps for entry in known.values() for steps in entry.budgets}):
        for name, entry in known.items():
            wanted = steps in (budgets or (steps,)) and name in (attacks or (name,))
            if wanted and steps in entry.budgets:
                yield steps, name, entry


def _measure(
    model: nn.Module, x: Tensor, y: Tensor, attack: Callable[..., Tensor], steps: int
) -> dict[str, Any]:
    """Which images an attack leaves, and what it costs for each that it attacks."""
    right = ~success(model, x, y)
    left, x, y = right.clone(), x[right], y[right]
    given: dict[str, Any] = {"norm": NORM, "steps": steps, "seed": SEED}
    with counting(model) as counts:
        if "eps" in inspect.signature(attack).parameters:
            points = perturb(model, x, y, attack, eps=EPS, **given)
            left[right] = ~success(model, points, y)
        else:
            left[right] = minimal_norms(model, x, y, attack, **given) > EPS
    return {
        "forward": round(counts.forward / len(x), 1),
        "backward": round(counts.backward / len(x), 1),
        "left": left.tolist(),
    }
