"""Images of Table 4.2 for people: ``python -m reproduce.judging margin-critic-4.2b images.npz``.

The networks of the table's rows are attacked as for the table, as far as their weights are here.
``adv annotate answers.sqlite --images images.npz`` then asks which digits the images show.
"""

import argparse
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from adv.lab import data, models
from adv.lab.annotate import Collection, collect
from reproduce.items import Item, Run
from reproduce.options import friendly
from reproduce.plan import Plan
from reproduce.steps import chosen, perturbed

__all__ = ["images", "main"]


def images(plan: Plan, item: Item, samples: int, *, seed: int = 0) -> Collection:
    """Attack the same test images on every network of a table, and keep those that fooled it.

    Args:
        plan: settings and folders.
        item: a table, each of whose rows is of one minimal-norm attack.
        samples: how many test images, evenly spaced.
        seed: of the networks.

    Returns:
        The images; their defenses are the names of the rows. A row whose network was not fooled is
        left out, and named on stderr.

    Raises:
        ValueError: a figure, the weights of no row are here, or all rows were left out.
    """
    if item.kind != "table":
        raise ValueError(f"{item.name} is no table")
    runs = {
        row: run
        for (row, _), cell in item.cells.items()
        for run in plan.runs(cell)
        if run.network.seed == seed
    }
    here = {row: run for row, run in runs.items() if plan.whole(run.network)}
    if not here:
        raise ValueError(f"no weights of {item.name}'s networks here; make the table first")
    parts = []
    for row, run in here.items():
        try:
            parts.append(_row(plan, run, row, samples))
        except ValueError as error:
            print(f"{row} is left out: {error}", file=sys.stderr)
    if not parts:
        raise ValueError(f"no row of {item.name} has images to ask about")
    return Collection(
        torch.cat([part.images for part in parts]),
        torch.cat([part.y for part in parts]),
        torch.cat([part.target for part in parts]),
        tuple(chain.from_iterable(part.defense for part in parts)),
    )


def _row(plan: Plan, run: Run, name: str, samples: int) -> Collection:
    recipe, settings = plan.recipe(run.network), plan.attack(run) | {"images": samples}
    model = models.build(**recipe["model"], seed=0)
    model.load_state_dict(load_file(plan.weights(run.network)))
    some = chosen(data.load(run.network.dataset).test, settings, recipe)

    def attack(model: nn.Module, x: Tensor, y: Tensor, **given: Any) -> Tensor:
        return perturbed(model, x, y, None, settings, given["seed"])

    return collect({name: model.eval()}, some.x, some.y, attack, norm=settings["norm"])


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m reproduce.judging", description=__doc__)
    parser.add_argument("name", help="a table, such as margin-critic-4.2b")
    parser.add_argument("out", type=Path, help="file to write, .npz")
    parser.add_argument("--samples", type=int, default=100, help="test images for each network")
    Plan.options(parser)
    given = parser.parse_args(arguments)
    with friendly("reproduce.judging"):
        if not given.out.parent.is_dir():  # said before the attacks, which take long
            raise ValueError(f"no folder {given.out.parent} for {given.out.name}; make it first")
        plan = Plan.given(given)
        found = images(plan, plan.item(given.name), given.samples)
        found.save(given.out)
    counts = {name: found.defense.count(name) for name in dict.fromkeys(found.defense)}
    print(f"{len(found.defense)} images: " + ", ".join(f"{n} of {d}" for d, n in counts.items()))


if __name__ == "__main__":
    main()
