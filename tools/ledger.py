"""Write ``book/ledger.md``: all claims, all errata, all published tables and what we have of them.

No kernel is needed. Claims and checked errata are read from the outputs stored in ``book/*.ipynb``,
errata and tables from ``reproduce/paper/*.yaml``, our numbers from the comparisons shown in the
notebooks and from ``reproduce/results/*.json``.
"""

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from numbers import Real
from pathlib import Path
from typing import Any

import yaml

from adv.lab.claims import escape

CLAIM = re.compile(r"^✓ (?!erratum )(.+?): (.+)$", re.MULTILINE)
ERRATUM = re.compile(r"^✓ erratum ([\w-]+)/(E\d+)\b", re.MULTILINE)
COMPARED = re.compile(r"compare\(\s*[\"']([\w-]+)[\"']")
ANNOUNCED = re.compile(r"Table ([\w.-]+?)\. ")
STRING = re.compile(r"(f?)\"([^\"\n]+)\"|(f?)'([^'\n]+)'")
KINDS = {
    "paper": "in the source",
    "extraction": "in the text version read",
    "unclear": "in the source or the text version",
    "code": "between text and program",
}
OLDER = "by older code"  # as reproduce.summary marks a run
Cell = tuple[str, str]


@dataclass
class Chapter:
    """What the stored outputs of one notebook say."""

    name: str
    title: str
    linked: bool
    claims: list[Cell] = field(default_factory=list)
    errata: set[Cell] = field(default_factory=set)
    tables: dict[Cell, set[Cell]] = field(default_factory=dict)

    @property
    def link(self) -> str:
        """A link to the chapter, or its title where the book doesn't list it."""
        return f"{{doc}}`{self.name}`" if self.linked else escape(self.title)


class Comparisons(HTMLParser):
    """Collect the tables of an output as lists of rows of cells, spans repeated."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.span = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Open a table, a row or a cell."""
        if tag == "table":
            self.tables.append([])
        elif tag == "tr" and self.tables:
            self.tables[-1].append([])
        elif tag in ("td", "th") and self.tables and self.tables[-1]:
            self.span = int(dict(attrs).get("colspan") or 1)
            self.tables[-1][-1] += [""] * self.span

    def handle_endtag(self, tag: str) -> None:
        """Close a cell."""
        if tag in ("td", "th"):
            self.span = 0

    def handle_data(self, data: str) -> None:
        """Add text to the open cell and the columns it spans."""
        for back in range(1, self.span + 1):
            self.tables[-1][-1][-back] += data


def write(root: Path) -> Path:
    """Write the ledger of the book under ``root``; return the file's path."""
    path = root / "book" / "ledger.md"
    text = page(root)
    if not path.is_file() or path.read_text("utf-8") != text:  # an unchanged page isn't rebuilt
        path.write_text(text, "utf-8")
    return path


def page(root: Path) -> str:
    """The ledger's text."""
    papers = {
        file.stem: yaml.safe_load(file.read_text("utf-8"))
        for file in sorted((root / "reproduce" / "paper").glob("*.yaml"))
    }
    chapters = read_chapters(root, papers)
    known = {(name, erratum["id"]) for name, paper in papers.items() for erratum in paper["errata"]}
    for chapter in chapters:
        if unknown := chapter.errata - known:
            raise ValueError(
                f"book/{chapter.name}.ipynb checks errata that no file has: {sorted(unknown)}"
            )
    ours = read_results(root)
    lines = [
        "# Ledger",
        "",
        "Made by every build, without running anything, from the outputs stored in the notebooks",
        "and the files of published numbers. A claim stands here because its check passed when the",
        "chapter was executed.",
        "",
        *claim_lines(chapters),
        *erratum_lines(papers, chapters),
        *table_lines(papers, chapters, ours),
        *age_lines(root),
    ]
    return "\n".join(lines).rstrip() + "\n"


# --- reading --------------------------------------------------------------------------------------


def read_chapters(root: Path, papers: dict[str, Any]) -> list[Chapter]:
    """The stored notebooks, in the order of the table of contents."""
    listed = contents(root)
    files = {file.stem: file for file in sorted((root / "book").glob("*.ipynb"))}
    order = [name for name in listed if name in files]
    order += [name for name in files if name not in listed]
    return [read_chapter(files[name], name in listed, papers) for name in order]


def contents(root: Path) -> list[str]:
    """The pages of ``book`` that the table of contents lists."""
    file = root / "_toc.yml"
    text = file.read_text("utf-8") if file.is_file() else ""
    return re.findall(r"(?:file|root):\s*book/([\w-]+)", text)


def read_chapter(file: Path, linked: bool, papers: dict[str, Any]) -> Chapter:
    """Claims, errata and comparisons in a notebook's outputs."""
    cells = json.loads(file.read_text("utf-8"))["cells"]
    texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    title = next((m[1] for text in texts if (m := re.search(r"^# (.+)$", text, re.M))), file.stem)
    chapter = Chapter(file.stem, title, linked)
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    names = dict.fromkeys(COMPARED.findall("\n".join(sources)))
    for cell in cells:
        if cell["cell_type"] != "code":
            continue
        outputs = cell.get("outputs", [])
        printed = "\n".join(said(output) for output in outputs)
        chapter.claims += CLAIM.findall(printed)
        chapter.errata |= set(ERRATUM.findall(printed))
        shown = list(compared("".join(cell["source"]), outputs, papers))
        shown += announced(outputs, {name: papers[name] for name in names if name in papers})
        for key, cells_of_ours in shown:
            chapter.tables.setdefault(key, set()).update(cells_of_ours)
    return chapter


def said(output: dict[str, Any]) -> str:
    """What an output says as plain text: printed, or displayed with formulas."""
    if output.get("name") == "stdout":
        return "".join(output["text"])
    data = output.get("data", {})
    return "".join(data.get("text/plain", "")) if "text/markdown" in data else ""


def compared(
    source: str, outputs: list[Any], papers: dict[str, Any]
) -> Iterator[tuple[Cell, set[Cell]]]:
    """The published tables that a cell sets beside ours, and the cells that have ours."""
    named = list(mentioned(source, papers))
    parser = Comparisons()
    for output in outputs:
        parser.feed("".join(output.get("data", {}).get("text/html", "")))
    shown = [table for table in parser.tables if any({"paper", "ours"} <= set(r) for r in table)]
    left = list(named)
    for table in shown:
        for key in left:
            cells = cells_of_ours(table, published(papers, key))
            if cells is not None:
                left.remove(key)
                yield key, cells
                break
    if not shown:  # compared without a table, such as in a figure
        yield from ((key, set()) for key in named)


def announced(outputs: list[Any], papers: dict[str, Any]) -> Iterator[tuple[Cell, set[Cell]]]:
    """The published tables of these papers that follow a line "Table 5.1-l2. ...".

    The call of ``compare`` may stand in a function of another cell.
    """
    keys: list[Cell] = []
    for output in outputs:
        data = output.get("data", {})
        if line := ANNOUNCED.match("".join(data.get("text/markdown", ""))):
            known = [(name, table["id"]) for name in papers for table in papers[name]["tables"]]
            keys = [key for key in known if key[1] == line[1]]
        elif "text/html" in data:
            parser = Comparisons()
            parser.feed("".join(data["text/html"]))
            for key in keys if parser.tables else ():
                beside = any({"paper", "ours"} <= set(row) for row in parser.tables[0])
                cells = cells_of_ours(parser.tables[0], published(papers, key)) if beside else None
                yield key, cells or set()
            keys = []


def mentioned(source: str, papers: dict[str, Any]) -> Iterator[Cell]:
    """The tables that calls of ``compare`` can mean: ids quoted in the cell, also by f-strings.

    Those quoted as they are come first: an f-string of one name matches every id.
    """
    strings = [(m[1] or m[3], m[2] or m[4]) for m in STRING.finditer(source)]
    plain = [re.escape(text) for prefix, text in strings if not prefix]
    formed = [re.sub(r"\\\{.*?\\\}", ".+", re.escape(text)) for prefix, text in strings if prefix]
    found = [
        (name, table["id"])
        for patterns in (plain, formed)
        for name in dict.fromkeys(COMPARED.findall(source))
        for table in papers.get(name, {}).get("tables", [])
        if any(re.fullmatch(pattern, table["id"]) for pattern in patterns)
    ]
    yield from dict.fromkeys(found)


def published(papers: dict[str, Any], key: Cell) -> dict[str, Any]:
    """A table of a source."""
    return next(table for table in papers[key[0]]["tables"] if table["id"] == key[1])


def cells_of_ours(shown: list[list[str]], table: dict[str, Any]) -> set[Cell] | None:
    """Row and column ids where a shown comparison has ours; None if it isn't of this table."""
    at = next(i for i, row in enumerate(shown) if {"paper", "ours"} <= set(row))
    if at == 0:
        return None
    labels, kinds = shown[at - 1], shown[at]
    columns = {}
    for column in table["columns"]:  # ``compare`` adds the unit to the label, where there is one
        columns[clean(column["label"])] = column["id"]
        columns[clean(f"{column['label']} ({column['unit']})")] = column["id"]
    rows = {clean(row["label"]): row["id"] for row in table["rows"]}
    found = set()
    for row in shown[at + 1 :]:
        if clean(row[0]) not in rows:
            return None
        for label, kind, value in zip(labels, kinds, row, strict=False):
            if kind in ("paper", "ours") and clean(label) not in columns:
                return None
            if kind == "ours" and re.search(r"\d", value):
                found.add((rows[clean(row[0])], columns[clean(label)]))
    return found


def clean(text: str) -> str:
    """Text without differences of white space."""
    return " ".join(str(text).split())


def read_results(root: Path) -> dict[Cell, set[Cell]]:
    """The cells of published tables for which a results file holds a number.

    A file, or each entry of its list ``tables``, names ``paper`` and ``table`` and has ``rows`` of
    ``{"id": ..., "values": {column: number}}``; anything else is passed over.
    """
    ours: dict[Cell, set[Cell]] = {}
    for file in sorted((root / "reproduce" / "results").glob("*.json")):
        content = json.loads(file.read_text("utf-8"))
        entries = content.get("tables", [content]) if isinstance(content, dict) else []
        for entry in entries:
            if isinstance(entry, dict) and {"paper", "table", "rows"} <= set(entry):
                ours.setdefault((entry["paper"], entry["table"]), set()).update(
                    (row["id"], column)
                    for row in entry["rows"]
                    for column, value in row["values"].items()
                    if isinstance(value, Real)
                )
    return ours


# --- writing --------------------------------------------------------------------------------------


def claim_lines(chapters: list[Chapter]) -> list[str]:
    """One collapsible list of claims for each chapter."""
    count = sum(len(chapter.claims) for chapter in chapters)
    lines = [
        "## Claims",
        "",
        f"{number(count, 'claim')} in {number(len(chapters), 'chapter')}.",
        "",
    ]
    for chapter in chapters:
        claims = [f"- `{label}`: {escape(statement)}" for label, statement in chapter.claims]
        lines += dropdown(
            f"{escape(chapter.title)}: {number(len(claims), 'claim')}",
            [f"From {chapter.link}.", "", *claims],
        )
    return lines


def erratum_lines(papers: dict[str, Any], chapters: list[Chapter]) -> list[str]:
    """One collapsible list of errata for each source, with the chapters that check them."""
    count = sum(len(paper["errata"]) for paper in papers.values())
    checked = len(set().union(*(chapter.errata for chapter in chapters)))
    lines = ["## Errata", "", f"{number(count, 'item')}, {checked} checked in a chapter.", ""]
    for name, paper in papers.items():
        items = []
        for erratum in paper["errata"]:
            where = [c.link for c in chapters if (name, erratum["id"]) in c.errata]
            status = f"Checked in {', '.join(where)}." if where else "*Read, not computed.*"
            items.append(
                f"- **{erratum['id']}**, {escape(erratum['where'])}, {KINDS[erratum['kind']]}: "
                f"{escape(erratum['text'])} {status}"
            )
        done = sum(any((name, e["id"]) in c.errata for c in chapters) for e in paper["errata"])
        title = f"{name}: {number(len(items), 'item')}, {done} checked"
        lines += dropdown(title, [about(paper["source"]), "", *items])
    return lines


def table_lines(
    papers: dict[str, Any], chapters: list[Chapter], results: dict[Cell, set[Cell]]
) -> list[str]:
    """For each published table: where it is shown, how many cells have ours, what is missing."""
    lines = [
        "## The papers' tables and ours",
        "",
        "Counted are the cells with a number in print. One that the source leaves empty, or that",
        "the text version has lost, is counted as lost.",
        "",
    ]
    for name, paper in papers.items():
        items = []
        for table in paper["tables"]:
            key = (name, table["id"])
            where = [chapter.link for chapter in chapters if key in chapter.tables]
            ours = set(results.get(key, ()))
            ours.update(*(chapter.tables.get(key, ()) for chapter in chapters))
            place = f"Shown in {', '.join(where)}" if where else "*Not shown*"
            items.append(
                f"- **{table['id']}**, {escape(table['caption'])}. {place}; {tally(table, ours)}."
            )
        lines += dropdown(
            f"{name}: {number(len(items), 'table')}", [about(paper["source"]), "", *items]
        )
    return lines


def age_lines(root: Path) -> list[str]:
    """The stored tables and figures with results that were computed before their code changed."""
    aged = {}
    for file in sorted((root / "reproduce" / "results").glob("*.json")):
        content = json.loads(file.read_text("utf-8"))
        if not isinstance(content, dict):
            continue
        parts = {row["id"]: row for row in content.get("rows", ()) if "id" in row}
        parts |= content.get("curves", {})
        names = [name for name, part in parts.items() if OLDER in str(part.get("scale"))]
        if names:
            aged[file.stem] = f"{'; '.join(names)} (of {len(parts)})"
    if not aged:
        return []
    items = [f"- `{name}`: {escape(rows)}" for name, rows in aged.items()]
    return [
        "## Results of older code",
        "",
        "A stored result keeps digests of the code that made it. In these tables and figures of",
        "`reproduce/results` the named rows or curves rest, in part at least, on code that has",
        "changed since. That need not change their numbers; it has not been tried.",
        "",
        *dropdown(number(len(items), "table or figure", "tables and figures"), items),
    ]


def tally(table: dict[str, Any], ours: set[Cell]) -> str:
    """How many of a table's numbers have ours, and how many are lost."""
    cells = {(r["id"], c): value for r in table["rows"] for c, value in r["values"].items()}
    printed = {key for key, value in cells.items() if isinstance(value, Real)}
    lost = sum(value is None for value in cells.values())
    if not printed and not lost:
        return "no numbers"
    parts = [f"ours for {len(ours & printed)} of {number(len(printed), 'number')}"]
    if missing := len(printed - ours):
        parts.append(f"{missing} missing")
    if lost:
        parts.append(f"{lost} lost in the source")
    if extra := len((ours & set(cells)) - printed):
        parts.append(f"ours for {extra} of these")
    return ", ".join(parts)


def about(source: dict[str, Any]) -> str:
    """The source's title and reference."""
    return f"{escape(source['title'])} {{cite}}`{source['bibtex']}`."


def dropdown(title: str, body: list[str]) -> list[str]:
    """A collapsible section."""
    return [f":::{{dropdown}} {title}", "", *body, "", ":::", ""]


def number(count: int, noun: str, plural: str = "") -> str:
    """A count with its noun."""
    return f"{count} {noun if count == 1 else plural or noun + 's'}"


if __name__ == "__main__":
    sys.stdout.write(f"{write(Path(__file__).resolve().parent.parent)}\n")
