"""Tables and figures from the stored records, and from nothing else: mean and spread over seeds.

``python -m reproduce.summary [NAME ...]`` writes them; the Snakefile's last two rules call it.
"""

import argparse
import base64
import io
import math
import statistics
from collections.abc import Sequence
from typing import Any

from adv.lab.files import replacing
from reproduce.files import read, write_json
from reproduce.items import Cell, Item, Run
from reproduce.options import friendly
from reproduce.plan import Plan

__all__ = ["draw", "figure", "main", "show", "strip", "table"]

Content = dict[str, Any]


def table(plan: Plan, item: Item) -> Content:
    """A published table's cells as we have them, in the form ``adv.lab.claims.compare`` takes.

    Each row tells for every column the number of seeds and of images, and the data sets; what has
    no number is listed under ``missing`` with the reason.
    """
    rows: dict[str, Content] = {}
    missing = []
    for (row, column), cell in item.cells.items():
        entry = rows.setdefault(
            row, {"id": row, "values": {}, "spread": {}, "seeds": {}, "images": {}, "scale": []}
        )
        records = _records(plan, cell)
        values = [_value(record, cell) for record in records]
        known = [value for value in values if value is not None]
        whole = bool(known) and len(known) == len(values)
        entry["values"][column] = statistics.mean(known) if whole else None
        if not whole:
            missing.append({"row": row, "column": column, "why": _why(plan, cell, records)})
            continue
        if (spread := _spread(known)) is not None:
            entry["spread"][column] = spread
        entry["seeds"][column], entry["images"][column] = len(known), records[0]["images"]
        entry["scale"] = sorted({*entry["scale"], *_scales(plan, cell)})
    head = {"paper": item.paper, "table": item.id}
    head |= {"spread_meaning": "standard deviation over seeds"}
    return head | {"rows": list(rows.values()), "missing": missing}


def figure(plan: Plan, item: Item) -> Content:
    """A figure's curves: mean and spread over seeds at each place of the x axis; or its images."""
    settings = plan.paper(item.paper)["figures"][item.id]
    if "images" in settings:
        return _pictures(plan, item)
    curves: dict[str, Content] = {}
    missing = []
    for (label,), cell in item.cells.items():
        records = _records(plan, cell)
        if not _have(records, settings["x"], cell.value):
            why = _why(plan, cell, records, settings["x"], cell.value)
            missing.append({"curve": label, "why": why})
            continue
        x, y = (
            [[_finite(v) * scale for v in record["values"][name]] for record in records]
            for name, scale in ((settings["x"], 1.0), (cell.value, cell.scale))
        )
        curves[label] = {
            "x": [statistics.mean(values) for values in zip(*x, strict=True)],
            "y": [statistics.mean(values) for values in zip(*y, strict=True)],
            "spread": [_spread(values) for values in zip(*y, strict=True)],
            "seeds": len(records),
            "images": records[0]["images"],
            "scale": _scales(plan, cell),
        }
    head = {"paper": item.paper, "figure": item.id, "axes": settings["axes"]}
    head |= {
        "clean": _clean(plan, item.clean),
        "spread_meaning": "standard deviation over seeds",
    }
    return head | {"curves": curves, "missing": missing}


def _pictures(plan: Plan, item: Item) -> Content:
    """The images of the first seed: for each row a PNG file in base64, images side by side.

    ``said`` are the classes that they are taken for, where the measure tells them.
    """
    rows: list[Content] = []
    missing = []
    for (label,), cell in item.cells.items():
        records = _records(plan, cell)
        if not _have(records, cell.value):
            missing.append({"curve": label, "why": _why(plan, cell, records)})
            continue
        row = {"label": label, "seed": records[0]["seed"], "scale": _scales(plan, cell)}
        values = records[0]["values"]
        told = {"said": values[said].split()} if (said := f"{cell.value}-said") in values else {}
        rows.append(row | {"png": values[cell.value]} | told)
    return {"paper": item.paper, "figure": item.id, "rows": rows, "missing": missing}


def strip(png: str) -> list[Any]:
    """The images of a row of a figure: arrays (H, W) or (H, W, 3) of bytes, H = W."""
    import numpy as np
    from PIL import Image

    row = np.asarray(Image.open(io.BytesIO(base64.b64decode(png))))
    return np.split(row, row.shape[1] // row.shape[0], axis=1)


def draw(content: Content) -> bytes:
    """A figure's curves, or its images, as a PNG file."""
    import matplotlib as mpl
    import matplotlib.pyplot as plt

    from adv.lab import figures

    figures.style()
    mpl.use("agg")
    if "rows" in content:
        return _draw_pictures(content)
    drawing, ax = plt.subplots(figsize=(figures.WIDTH, 4.5))
    size = len(figures.COLORS)
    for i, (label, curve) in enumerate(content["curves"].items()):
        line = figures.LINES[i // size % len(figures.LINES)]
        look = {"color": figures.COLORS[i % size], "linestyle": line}
        ax.errorbar(
            curve["x"],
            curve["y"],
            yerr=[spread or 0.0 for spread in curve["spread"]],
            marker=figures.MARKERS[i % size],
            label=label,
            **look,
        )
    ax.set(xlabel=content["axes"]["x"], ylabel=content["axes"]["y"])
    ax.set_title(f"{content['paper']}, figure {content['figure']}")
    if content["curves"]:
        ax.legend()
    file = figures.png(drawing)
    plt.close(drawing)
    return file


def _draw_pictures(content: Content) -> bytes:
    import matplotlib.pyplot as plt
    import numpy as np

    from adv.lab import figures

    rows = [np.stack(strip(row["png"])) / 255 for row in content["rows"]]
    if not rows:
        drawing, _ = plt.subplots()
    else:
        batches = [row if row.ndim == 3 else row.transpose(0, 3, 1, 2) for row in rows]
        labels = [row["label"] for row in content["rows"]]
        said = [
            row.get("said", [""] * len(batch))
            for row, batch in zip(content["rows"], batches, strict=True)
        ]
        drawing = figures.images(batches, titles=said, row_labels=labels)[0, 0].figure
    file = figures.png(drawing)
    plt.close(drawing)
    return file


def show(content: Content) -> str:
    """A table beside the paper's, or a figure's last values, as text, with what is missing."""
    lines = []
    if "table" in content:
        lines += _shown(content)
        scales = {row["id"]: "; ".join(row["scale"]) for row in content["rows"] if row["scale"]}
    else:
        parts = content.get("curves") or {row["label"]: row for row in content.get("rows", [])}
        kind = "curves" if "curves" in content else "rows of images"
        lines += [f"{content['paper']}, figure {content['figure']}: {len(parts)} {kind}"]
        scales = {label: "; ".join(part["scale"]) for label, part in parts.items()}
    lines += [f"  {name}: {scale}" for name, scale in scales.items()]
    for gap in content["missing"]:
        where = gap.get("curve") or f"{gap['row']}, {gap['column']}"
        lines.append(f"  missing: {where}: {gap['why']}")
    return "\n".join(lines)


def _shown(content: Content) -> list[str]:
    """A table's numbers beside the paper's, or alone where the paper prints no such table."""
    from adv.lab.claims import compare, paper

    printed = [table["id"] for table in paper(content["paper"]).get("tables") or []]
    if content["table"] in printed:
        frame = compare(content["paper"], content["table"], ours=content["rows"])
        caption = frame.attrs["caption"]
    else:
        import pandas as pd

        frame = pd.DataFrame({row["id"]: row["values"] for row in content["rows"]}).T.round(4)
        caption = "ours alone"
    return [f"{content['paper']}, table {content['table']}: {caption}", frame.to_string()]


def _records(plan: Plan, cell: Cell) -> list[Content]:
    """The records of a cell that are of today's settings, one for each seed."""
    records = [read(plan.record(run)) for run in plan.runs(cell) if plan.current(run)]
    return [record for record in records if record is not None]


def _scales(plan: Plan, cell: Cell) -> list[str]:
    """What a reader must know of the scale of a cell's records."""
    scales = set()
    for run in filter(plan.current, plan.runs(cell)):
        record = read(plan.record(run)) or {}
        of, images = record["of"], record["images"]
        part = "all" if images == of else f"{images:,} of"
        whole = "" if record["complete"] else ", not the whole data set"
        epochs = record["settings"]["training"]["training"]["epochs"]
        text = f"{record['dataset']}{whole}: {part} {of:,} test images, trained for {epochs} epochs"
        if "defense" in (attack := record["settings"]["attack"]):
            for name, used in attack.get("uses", {}).items():
                text += f", {name} for {used['training']['epochs']}"
        if pairs := record["settings"]["training"].get("pairs"):
            text += f" on {pairs['count']:,} pairs"
        scales.add(text + ", by older code" * (plan.older(run) is not None))
    return sorted(scales)


def _value(record: Content, cell: Cell) -> float | None:
    value = record["values"].get(cell.value)
    if cell.at is not None and value is not None:
        value = value[record["values"]["eps"].index(cell.at)]
    return None if value is None else value * cell.scale


def _finite(value: float | None) -> float:
    return math.nan if value is None else value


def _clean(plan: Plan, cell: Cell | None) -> Content | None:
    """What the networks of a figure are worth without an attack."""
    if cell is None:
        return None
    records = _records(plan, cell)
    values = [value for record in records if (value := _value(record, cell)) is not None]
    if not values:
        return None
    return {"value": cell.value, "mean": statistics.mean(values), "spread": _spread(values)}


def _spread(values: Sequence[float]) -> float | None:
    """Their standard deviation; None of a single one, or where one is not finite."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return None
    return statistics.stdev(values)


def _have(records: list[Content], *names: str) -> bool:
    """Whether there are records, and all have these values."""
    return bool(records) and all(name in record["values"] for record in records for name in names)


def _why(plan: Plan, cell: Cell, records: list[Content], *names: str) -> str:
    """Why a cell has no number, or a curve not the values of these names."""
    if cell.missing:
        return cell.missing
    if any(record.get("attacked") == 0 for record in records):
        return "the network gets no image right"
    for name in names or (cell.value,):
        if records and not _have(records, name):
            known = set.intersection(*(set(record["values"]) for record in records))
            return f"no value {name!r}; there are {', '.join(sorted(known))}"
    if records:
        return "no finite value for every seed"
    runs: list[Run] = plan.runs(cell)
    dataset = runs[0].network.dataset
    if not plan.available(dataset):
        return f"no data: {dataset}"
    return f"not run, on {dataset}"


# ----------------------------------------------------------------------------------- command line


def main(arguments: list[str] | None = None) -> None:
    """Write tables and figures."""
    parser = argparse.ArgumentParser(prog="python -m reproduce.summary", description=__doc__)
    told = "such as convex-figure-3a; default: all that are stored"
    parser.add_argument("names", nargs="*", metavar="NAME", help=told)
    Plan.options(parser)
    options = parser.parse_args(arguments)
    with friendly("reproduce.summary"):
        plan = Plan.given(options)
        stored = [name for name, item in plan.items.items() if plan.output(item).is_file()]
        for item in map(plan.item, options.names or stored):
            content = table(plan, item) if item.kind == "table" else figure(plan, item)
            write_json(plan.output(item), content)
            if item.kind == "figure":
                with replacing(plan.picture(item)) as path:
                    path.write_bytes(draw(content))


if __name__ == "__main__":
    main()
