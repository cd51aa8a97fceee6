"""Proven minimal perturbations of test images: ``python -m reproduce.optima digits/mlp-24``.

They take seconds to minutes an image, so the book's chapters read them from
``results/exact/NAME.json``: for each norm a list with one row for each of the first test images, in
their order. A row whose network, settings and code are those of today is kept, and after each new
one the file is written, so that a run that was stopped goes on where it was.
"""

import argparse
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import torch

from adv.lab import data, zoo
from adv.lab.files import held
from adv.theory.exact import Kind, minimal_perturbation
from reproduce.files import read, write_json
from reproduce.options import friendly, listed, refuse_unknown
from reproduce.origin import provenance
from reproduce.plan import ROOT
from reproduce.versions import digest, files, same

__all__ = ["main", "path", "solve"]

RESULTS = ROOT / "reproduce" / "results"
CODE = "adv.theory.exact.minimal_perturbation"


def path(name: str, results: Path = RESULTS) -> Path:
    """Where the rows of a network of the zoo are."""
    return results / "exact" / f"{name.replace('/', '-')}.json"


def solve(
    name: str,
    samples: int,
    *,
    norms: tuple[Kind, ...] = get_args(Kind),
    time_limit: float = 120.0,
    gap: float = 1e-5,
    trust: bool = False,
    results: Path = RESULTS,
) -> dict[str, Any]:
    """Solve the first test images of a network's data, or those that are missing.

    Args:
        name: a network of the zoo of Linear and ReLU layers.
        samples: how many images, from the first; stored rows beyond stay.
        norms: which norms.
        time_limit: seconds for an image; what is proved by then is stored.
        gap: relative difference of the bounds at which the search ends.
        trust: keep rows that other code computed; they were proved as well. The file goes on
            naming that code.
        results: the folder of results.

    Returns:
        The file's content: ``norms`` maps each norm to its rows ``index, label, reached, lower,
        upper, optimal, seconds, nodes``. ``seconds`` are processor time; an infinite bound is null.

    Raises:
        ValueError: an unknown norm, or a network that the zoo lacks or whose layers are others.
    """
    refuse_unknown(norms, get_args(Kind), "norm")
    wanted = zoo.entry(name)
    settings = {"time_limit": time_limit, "gap": gap, "bounds": [0.0, 1.0]}
    origin = {
        "network": name,
        "weights": wanted.record["sha256"],
        "data": wanted.data,
        "split": "test",
        "settings": settings,
        "code": {CODE: digest(CODE)},
    }
    made = provenance(sorted(files(CODE)), packages=("scipy",), place=torch.device("cpu"))
    file = path(name, results)
    rows = _stored(file, origin, trust)
    if trust and rows:
        origin["code"] = (read(file) or {})["code"]
    model, test = zoo.load(name), data.load(wanted.data).test
    content: dict[str, Any] = {}
    for norm in norms:
        found = rows.setdefault(norm, [])
        for index in range(len(found), min(samples, len(test))):
            start = time.process_time()
            proved = minimal_perturbation(
                model, test.x[index], int(test.y[index]), norm=norm, time_limit=time_limit, gap=gap
            )
            found.append(
                {
                    "index": index,
                    "label": int(test.y[index]),
                    "reached": proved.label,
                    "lower": proved.lower,
                    "upper": proved.upper,
                    "optimal": proved.optimal,
                    "seconds": round(time.process_time() - start, 2),
                    "nodes": proved.nodes,
                }
            )
            with held(file.parent):  # other processes may solve other norms
                theirs = _stored(file, origin, trust).items()
                rows |= {k: v for k, v in theirs if k != norm and len(v) > len(rows.get(k, ()))}
                content = origin | made | {"norms": rows}
                write_json(file, content)
            print(f"{norm} {index}: {proved.lower:.6g} to {proved.upper:.6g}", flush=True)
    return content or read(file) or {}


def _stored(file: Path, origin: Mapping[str, Any], trust: bool) -> dict[str, list[dict[str, Any]]]:
    """The rows that still hold: of this network, these settings and, unless trusted, this code."""
    content = read(file) or {}
    asked = all(content.get(key) == origin[key] for key in origin if key != "code")
    current = trust or same(CODE, (content.get("code") or {}).get(CODE))
    return content["norms"] if asked and current else {}


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m reproduce.optima", description=__doc__)
    parser.add_argument("name", help="a network of the zoo, such as digits/mlp-24")
    parser.add_argument("--samples", type=int, default=40, help="test images, from the first")
    parser.add_argument("--norms", default=",".join(get_args(Kind)), help="separated by commas")
    parser.add_argument("--time-limit", type=float, default=120.0, help="seconds for an image")
    parser.add_argument("--gap", type=float, default=1e-5, help="relative gap to close")
    parser.add_argument("--trust", action="store_true", help="keep rows of older code")
    given = parser.parse_args(arguments)
    settings: dict[str, Any] = {"norms": listed(given.norms), "time_limit": given.time_limit}
    settings |= {"gap": given.gap, "trust": given.trust}
    with friendly("reproduce.optima"):
        solve(given.name, given.samples, **settings)


if __name__ == "__main__":
    main()
