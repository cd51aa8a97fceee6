"""What the settings of a paper show: tables and figures, their cells, and the runs behind these."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

__all__ = ["Cell", "Item", "Network", "Run", "Settings", "of_paper"]

Settings = dict[str, Any]


@dataclass(frozen=True)
class Network:
    """One trained network: the wildcards of the rule ``train``."""

    paper: str
    dataset: str
    model: str
    defense: str
    seed: int

    @property
    def folder(self) -> str:
        """Where its files are, below the folders of results and of work."""
        return f"{self.paper}/{self.dataset}/{self.model}/{self.defense}/seed-{self.seed}"


@dataclass(frozen=True)
class Run:
    """A network under one attack: the wildcards of the rules ``attack`` and ``measure``."""

    network: Network
    attack: str

    def __str__(self) -> str:
        return f"{self.network.folder}/{self.attack}"


@dataclass(frozen=True)
class Cell:
    """One number, or one curve, before its seeds are averaged: which runs give it, and which value.

    Args:
        paper: the source's name.
        model: a network of its settings.
        defense: one of its defenses.
        attack: one of its attacks.
        value: the measured value's name.
        at: the radius at which a list of values is read; None for a number, or the whole list.
        scale: what a value is multiplied with, such as 100 for percent.
        missing: why there can be no number; nothing is run for it.
    """

    paper: str
    model: str
    attack: str = ""
    value: str = ""
    defense: str = "none"
    at: float | None = None
    scale: float = 1.0
    missing: str | None = None


@dataclass(frozen=True)
class Item:
    """A table or a figure, with the keys of its cells: (row, column) or (curve,)."""

    paper: str
    kind: str
    id: str
    cells: Mapping[tuple[str, ...], Cell]
    clean: Cell | None = None

    @property
    def needed(self) -> list[Cell]:
        """All cells, with what a figure's network is worth without an attack."""
        return [*self.cells.values(), *([] if self.clean is None else [self.clean])]

    @property
    def name(self) -> str:
        """What it is asked for by, and the name of its file."""
        return (
            f"{self.paper}-{self.id}" if self.kind == "table" else f"{self.paper}-figure-{self.id}"
        )


def of_paper(paper: str, settings: Settings) -> Iterator[Item]:
    """The tables and figures of a paper.

    Args:
        paper: its name.
        settings: the content of its file.

    Raises:
        ValueError: a cell says something that none can.
    """
    for name, table in (settings.get("tables") or {}).items():
        cells: dict[tuple[str, ...], Cell] = {
            (row, column): _cell(paper, _merged(table, of_row, of_column))
            for row, of_row in table["rows"].items()
            for column, of_column in table["columns"].items()
        }
        yield Item(paper, "table", str(name), cells)
    for name, figure in (settings.get("figures") or {}).items():
        cells = {
            (label,): _cell(paper, _merged(figure, curve))
            for label, curve in figure[_parts(figure)].items()
        }
        first = next(iter(cells.values()))
        clean = figure.get("clean") and Cell(
            paper, first.model, defense=first.defense, **figure["clean"]
        )
        yield Item(paper, "figure", str(name), cells, clean)


def _cell(paper: str, settings: Settings) -> Cell:
    known = [one.name for one in fields(Cell) if one.name != "paper"]
    if unknown := settings.keys() - set(known):
        names = ", ".join(sorted(unknown))
        raise ValueError(f"a cell of {paper} has no {names}; there are {', '.join(known)}")
    return Cell(paper, **settings)


def _parts(figure: Settings) -> str:
    """What a figure consists of: curves, or rows of images."""
    return "curves" if "curves" in figure else "images"


def _merged(item: Settings, *parts: Settings | None) -> Settings:
    """What a cell is: what all of the item's are, then what its row, column or curve says."""
    cell = dict(item.get("cell") or {})
    for part in parts:
        cell |= part or {}
    return cell
