"""What there is to compute for the settings' tables and figures: which runs, which of them anew.

Nothing is computed here: the Snakefile is read anew by every job.
"""

import argparse
import itertools
import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import yaml

from adv.lab.files import sha256
from reproduce import versions
from reproduce.code_of import GAMES, Code, of_attack, of_training
from reproduce.files import read
from reproduce.items import Cell, Item, Network, Run, Settings, of_paper
from reproduce.options import listed, refuse_unknown

__all__ = ["Plan", "Task"]

ROOT = Path(__file__).resolve().parents[1]
# Entries of ``training`` that are no arguments of ``lab.training.fit``: steps.py makes something of
# them.
OF_STEPS = ("augment", "best", "mixed", "warmup", "weight_decay")


@dataclass(frozen=True)
class Task:
    """A step that will run: why, and for how long by what is known (seconds, NaN: unknown)."""

    step: str
    subject: Network | Run
    reason: str
    seconds: float

    def __str__(self) -> str:
        name = self.subject.folder if isinstance(self.subject, Network) else str(self.subject)
        return f"{self.step:<8}{name}  ({self.reason})"


@dataclass(frozen=True)
class Plan:
    """The settings of all papers, and where results and work are kept.

    Args:
        settings: folder of ``PAPER.yaml``.
        results: folder of the results' JSON files.
        work: folder of weights, checkpoints and perturbed images, safe to delete.
        only: networks (names in the settings) to run; empty for all. Others' stored results count.
        skip: attacks (names in the settings) not to run. Their stored results count.
        trust: whether results of older code stand.
        datasets: those at hand; None to look for them, which takes seconds.
    """

    settings: Path = ROOT / "reproduce" / "settings"
    results: Path = ROOT / "reproduce" / "results"
    work: Path = ROOT / "reproduce" / "work"
    only: tuple[str, ...] = ()
    trust: bool = False
    datasets: frozenset[str] | None = None
    skip: tuple[str, ...] = ()

    # ------------------------------------------------------------------------------- command line

    @staticmethod
    def options(parser: argparse.ArgumentParser) -> None:
        """Add the options that ``given`` reads."""
        for folder in ("settings", "results", "work"):
            told = f"folder of {folder}; default: reproduce/{folder}"
            parser.add_argument(f"--{folder}", type=Path, default=getattr(Plan, folder), help=told)
        parser.add_argument("--only", default="", help="networks to run, separated by commas")
        parser.add_argument("--skip", default="", help="attacks not to run, separated by commas")
        parser.add_argument(
            "--datasets",
            default="",
            help="data sets to count as there, separated by commas, instead of looking",
        )
        parser.add_argument("--trust", action="store_true", help="keep results of older code")

    @staticmethod
    def given(options: argparse.Namespace) -> "Plan":
        """The plan that a command line means.

        Raises:
            ValueError: a data set that no settings name.
        """
        only, datasets, skip = map(listed, (options.only, options.datasets, options.skip))
        settings, results, work = (
            path.resolve() for path in (options.settings, options.results, options.work)
        )
        data = frozenset(datasets) or None
        plan = Plan(settings, results, work, only, options.trust, data, skip)
        if datasets:
            refuse_unknown(datasets, plan.mentioned(), "data set")
        return plan

    # ------------------------------------------------------------------------------------ settings

    def paper(self, name: str) -> Settings:
        """A paper's settings.

        Raises:
            ValueError: there is no such file.
        """
        path = self.settings / f"{name}.yaml"
        if not path.is_file():
            known = ", ".join(sorted(p.stem for p in self.settings.glob("*.yaml")))
            raise ValueError(f"no settings {path}; there are {known or 'none'}")
        return _read_yaml(path, path.stat().st_mtime_ns)

    @cached_property
    def items(self) -> dict[str, Item]:
        """All tables and figures by name."""
        found = (
            item
            for path in sorted(self.settings.glob("*.yaml"))
            for item in of_paper(path.stem, self.paper(path.stem))
        )
        return {item.name: item for item in found}

    def check(self) -> None:
        """Say at once what would come out after hours of computing: something mistyped.

        Raises:
            ValueError: a cell is of a network, a defense, an attack or a radius that there isn't.
        """
        for item in self.items.values():
            for key, cell in [*item.cells.items(), (("clean",), item.clean)]:
                if cell is not None and not cell.missing:
                    self._check(f"{item.name}, {', '.join(map(str, key))}", cell)

    def item(self, name: str) -> Item:
        """A table or a figure.

        Raises:
            ValueError: there is none of this name.
        """
        where = "python -m reproduce --list"
        refuse_unknown([name], self.items, "table or figure", where=where)
        return self.items[name]

    def _check(self, where: str, cell: Cell) -> None:
        paper = self.paper(cell.paper)
        try:
            own = _entry(paper, "networks", cell.model)
            _entry(paper, "defenses", cell.defense)
            network = Network(cell.paper, own["data"][0], cell.model, cell.defense, 0)
            run = Run(network, cell.attack)
            attack = self.attack(run)
            if not attack.get("measures"):
                raise ValueError(f"{cell.attack} has no measures")
            self.versions(run)  # all functions that are named exist
            for trained in filter(None, (network, self.used(network), self.used(run))):
                self.versions(trained)
                self._check_training(trained)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        grid = attack.get("eps") or attack.get("measured_at") or [0.0]
        if cell.at is not None and not isinstance(grid, Mapping) and cell.at not in grid:
            known = ", ".join(map(str, grid))
            raise ValueError(f"{where}: no radius {cell.at} of {cell.attack}; there are {known}")
        if attack.get("nested") and not isinstance(grid, Mapping) and list(grid) != sorted(grid):
            raise ValueError(f"{where}: the radii of {cell.attack}, which is nested, must rise")

    def _check_training(self, network: Network) -> None:
        recipe = self.recipe(network)
        game = recipe["model"]["name"] in GAMES
        function = "adv.lab.generative.fit_wgan" if game else "adv.lab.training.fit"
        known = {*versions.arguments(function), *(() if game else OF_STEPS)}
        if unknown := recipe["training"].keys() - known:
            raise ValueError(f"the training of {network.model} has no {', '.join(sorted(unknown))}")

    def names(self, kind: str) -> list[str]:
        """The names of all tables or of all figures."""
        return [name for name, item in self.items.items() if item.kind == kind]

    def recipe(self, network: Network) -> Settings:
        """All that a network's training depends on, as its record keeps it.

        Where the training ``uses`` another network, that one's recipe is part of it; where it is on
        ``pairs``, so is the attack that makes them.
        """
        paper = self.paper(network.paper)
        own = _entry(paper, "networks", network.model)
        defense = _entry(paper, "defenses", network.defense)
        loss = defense.get("loss") or own.get("loss") or {}
        shown = {"input": own["input"]} if "input" in own else {}
        if critic := defense.get("critic"):
            shown |= {"critic": critic}
        if used := self.used(network):
            shown |= {"uses": {used.model: self.recipe(used)}}
        if pairs := defense.get("pairs"):
            shown |= {"pairs": dict(pairs)}
            if "attack" in pairs:
                attack = _entry(paper, "attacks", pairs["attack"]).items()
                own_of_tests = ("uses", "images", "measures")
                shown["pairs"]["attack"] = {k: v for k, v in attack if k not in own_of_tests}
        training = own["training"] | defense.get("training", {})
        if critic:  # has rates and options of its own
            training = {name: training[name] for name in ("epochs", "batch_size")}
        return shown | {
            "data": network.dataset,
            "model": own["model"] | defense.get("model", {}),
            "loss": loss,
            "training": training,
            "seed": network.seed,
        }

    def attack(self, run: Run) -> Settings:
        """All that an attack and its measures depend on, beside the network.

        A value ``network`` in the settings stands for the network's own grid of radii; where that
        is a mapping, for its entry of this defense, and in that for the one of the attack's norm.
        """
        paper = self.paper(run.network.paper)
        own = _entry(paper, "networks", run.network.model)
        attack = dict(_entry(paper, "attacks", run.attack))
        if "network" in attack.values():
            grid = own["eps"]
            for key in (run.network.defense, attack.get("norm")):
                grid = grid[key] if isinstance(grid, Mapping) else grid
            attack = {key: grid if v == "network" else v for key, v in attack.items()}
        if used := self.used(run):
            part = "judges" if "judges" in attack else "uses"
            attack[part] = {used.model: self.recipe(used)}
        return {"images": own.get("images")} | attack

    def used(self, subject: Network | Run) -> Network | None:
        """The other network that a training or an attack uses: of the same data and seed, plain.

        Such as the generative model that an attack moves along, the encoder that was attacked, or
        a member of the committee that ``judges`` what an attack has made.
        """
        network = subject if isinstance(subject, Network) else subject.network
        paper = self.paper(network.paper)
        if isinstance(subject, Network):
            name = _entry(paper, "defenses", network.defense).get("uses")
        else:
            attack = _entry(paper, "attacks", subject.attack)
            name = attack.get("uses") or attack.get("judges")
        return replace(network, model=name, defense="none") if name else None

    # --------------------------------------------------------------------------------------- files

    def record(self, subject: Network | Run) -> Path:
        """The JSON file of a training or a measurement."""
        if isinstance(subject, Network):
            return self.results / subject.folder / "train.json"
        return self.results / subject.network.folder / f"{subject.attack}.json"

    def stored(self, subject: Network | Run) -> Settings | None:
        """What that file holds, or None where there is none.

        Raises:
            ValueError: it is no record, without settings or weights.
        """
        path = self.record(subject)
        content = read(path)
        for name in ("settings", "weights"):
            if content is not None and (not isinstance(content, dict) or name not in content):
                raise ValueError(f"{path} is no record: it has no {name}; delete it")
        return content

    def weights(self, network: Network) -> Path:
        """The file of a network's weights."""
        return self.work / network.folder / "weights.safetensors"

    def points(self, run: Run) -> Path:
        """The file of the perturbed images."""
        return self.work / run.network.folder / f"{run.attack}.pt"

    def output(self, item: Item) -> Path:
        """The JSON file of a table or a figure."""
        return self.results / f"{item.name}.json"

    def picture(self, item: Item) -> Path:
        """The PNG file of a figure."""
        return self.work / "figures" / f"{item.name}.png"

    # ---------------------------------------------------------------------------------------- runs

    def runs(self, cell: Cell) -> list[Run]:
        """The runs of a cell, one for each seed, on the first data set that there is.

        One whose data are here counts if the cell may be run; one that has results, in any case.
        """
        if cell.missing:
            return []
        own = _entry(self.paper(cell.paper), "networks", cell.model)
        for dataset in own["data"]:
            runs = [
                Run(Network(cell.paper, dataset, cell.model, cell.defense, seed), cell.attack)
                for seed in range(own["seeds"])
            ]
            if any(self._makes(cell, run) or self.record(run).is_file() for run in runs):
                break
        return runs

    def mentioned(self) -> list[str]:
        """The data sets that the settings name."""
        papers = [self.paper(path.stem) for path in sorted(self.settings.glob("*.yaml"))]
        named = (own["data"] for paper in papers for own in paper["networks"].values())
        return sorted(set(itertools.chain.from_iterable(named)))

    def available(self, dataset: str) -> bool:
        """Whether this machine has the data set."""
        return dataset in (_datasets() if self.datasets is None else self.datasets)

    def wanted(self, cell: Cell) -> list[Run]:
        """The runs of a cell that this machine can make, or has."""
        return [run for run in self.runs(cell) if self._makes(cell, run) or self.current(run)]

    def _makes(self, cell: Cell, run: Run) -> bool:
        """Whether a run of a cell is asked for, and this machine has its data."""
        asked = (not self.only or cell.model in self.only) and cell.attack not in self.skip
        return asked and self.available(run.network.dataset)

    def inputs(self, item: Item) -> list[Path]:
        """The records that a table or figure is built from."""
        runs = itertools.chain.from_iterable(map(self.wanted, item.needed))
        return list(dict.fromkeys(map(self.record, runs)))

    # --------------------------------------------------------------------------------- what to run

    def fault(self, subject: Network | Run) -> str | None:
        """Why a stored record can't stand for what the settings ask for; None if it can."""
        record = self.stored(subject)
        if record is None:
            return "new"
        return self._changed(subject, record) or (None if self.trust else self.older(subject))

    def older(self, subject: Network | Run) -> str | None:
        """Which code has changed since a stored record was made; None if none has."""
        stored, code = (self.stored(subject) or {}).get("code", {}), self.code(subject)
        unlisted = set(code.around) - stored.keys()
        listed = (name for name in code.names if name not in unlisted)
        names = [name for name in listed if not versions.same(name, stored.get(name))]
        return f"code of {', '.join(names)} changed" if names else None

    def current(self, run: Run) -> bool:
        """Whether the stored result is of these settings, whatever the code was."""
        record = self.stored(run)
        return record is not None and self._changed(run, record) is None

    def _changed(self, subject: Network | Run, record: Settings) -> str | None:
        if isinstance(subject, Network):
            planned = {"training": self.recipe(subject)}
        else:
            planned = {"training": self.recipe(subject.network), "attack": self.attack(subject)}
        if path := _difference(record["settings"], json.loads(json.dumps(planned))):
            return f"{path} changed"
        if isinstance(subject, Run):
            trained = self.stored(subject.network)
            if trained is not None and trained["weights"] != record["weights"]:
                return "of other weights"
        if used := self.used(subject):
            other = self.stored(used)
            if other is not None and other["weights"] != record.get("used"):
                return f"of another {used.model}"
        return None

    def code(self, subject: Network | Run) -> Code:
        """The code that makes a record."""
        if isinstance(subject, Network):
            return of_training(self.recipe(subject))
        return of_attack(self.attack(subject), subject.network.dataset)

    def versions(self, subject: Network | Run) -> dict[str, str]:
        """Digests of that code, by name."""
        return {name: versions.digest(name) for name in self.code(subject).names}

    def files(self, subject: Network | Run) -> list[Path]:
        """The files of that code."""
        return sorted(set().union(*map(versions.files, self.versions(subject))))

    def tasks(self, items: list[Item]) -> list[Task]:
        """The trainings and attacks that will run for some tables and figures."""
        cells = [cell for item in items for cell in item.needed]
        runs = [run for cell in cells for run in self.runs(cell) if self._makes(cell, run)]
        runs = list(dict.fromkeys(runs))
        serving = (self.used(one) for run in runs for one in (run.network, run))
        by_network: dict[Network, list[Run]] = {used: [] for used in filter(None, serving)}
        for run in runs:
            by_network.setdefault(run.network, []).append(run)
        why = self._reasons(by_network)
        return [
            Task(
                "train" if isinstance(one, Network) else "attack", one, why[one], self.estimate(one)
            )
            for network in by_network
            for one in (network, *by_network[network])
            if one in why
        ]

    def _reasons(self, by_network: Mapping[Network, list[Run]]) -> dict[Network | Run, str]:
        """Why trainings and attacks will run: for themselves, or for what they use or serve."""
        subjects: list[Network | Run] = [*by_network, *itertools.chain(*by_network.values())]
        why = {one: fault for one in subjects if (fault := self.fault(one))}
        absent = {network for network in by_network if not self.whole(network)}
        while True:
            before = len(why)
            served: set[Network | None] = {self.used(one) for one in why}
            served |= {one.network for one in why if isinstance(one, Run)}
            for one in subjects:
                used = self.used(one)
                if isinstance(one, Run) and one.network in why:
                    why.setdefault(one, "trained anew")
                elif used is not None and used in why:
                    why.setdefault(one, f"{used.model} trained anew")
                elif one in served and one in absent:
                    why.setdefault(one, "the weights aren't here")
            if len(why) == before:
                return why

    def whole(self, network: Network) -> bool:
        """Whether the weights at hand are those of the record."""
        path, record = self.weights(network), self.stored(network)
        return record is not None and path.is_file() and sha256(path) == record["weights"]

    def estimate(self, subject: Network | Run) -> float:
        """Seconds by an earlier record, by those of other seeds, or by the settings; else NaN."""
        network = subject if isinstance(subject, Network) else subject.network
        others = (
            replace(network, seed=seed)
            if isinstance(subject, Network)
            else replace(subject, network=replace(network, seed=seed))
            for seed in range(_entry(self.paper(network.paper), "networks", network.model)["seeds"])
        )
        records = [self.stored(one) for one in (subject, *others)]
        if records[0] is not None:
            return float(records[0].get("seconds", math.nan))
        seconds = [r["seconds"] for r in records[1:] if r is not None and "seconds" in r]
        if seconds:
            return statistics.mean(seconds)
        if isinstance(subject, Network):
            return float(
                self.paper(network.paper)["networks"][network.model].get("seconds", math.nan)
            )
        return math.nan


# ----------------------------------------------------------------------------------------- reading


@cache
def _read_yaml(path: Path, _changed: int) -> Settings:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}") from error


@cache
def _datasets() -> frozenset[str]:
    from adv.lab import data  # takes seconds: PyTorch

    return frozenset(row.name for row in data.found() if row.state in ("found", "built in"))


def _entry(paper: Settings, part: str, name: str) -> Settings:
    entries = paper.get(part) or {}
    if name not in entries:
        raise ValueError(f"no {name!r} in {part} of the settings; there are {', '.join(entries)}")
    return entries[name] or {}


def _difference(stored: Any, planned: Any, path: str = "") -> str | None:
    """Where two settings differ first, as a dotted path; None if nowhere."""
    if isinstance(stored, dict) and isinstance(planned, dict):
        for key in stored.keys() | planned.keys():
            inner = f"{path}.{key}".lstrip(".")
            if key not in stored or key not in planned:
                return inner
            if found := _difference(stored[key], planned[key], inner):
                return found
        return None
    return None if stored == planned else path or "settings"
