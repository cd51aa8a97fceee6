"""The book's own Sphinx extension: what Jupyter Book and its theme don't do by themselves.

* The ledger is written before the build.
* ``$...$`` in docstrings is mathematics on the API page, and pipe tables are tables.
* Each chapter's page offers its executed notebook for download.
* Each theorem lists the places that refer to it, so that the links go both ways.
* Launch buttons appear only where the repository's address is set; no script is loaded in vain.
"""

import re
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.environment import BuildEnvironment
from sphinx.util.nodes import make_refnode

import ledger

ROOT = Path(__file__).resolve().parent.parent
# Code in double back quotes, where a dollar is a dollar, or a formula.
MATH = re.compile(r"(``[^`]+``)|\$\$(.+?)\$\$|\$([^$]+)\$", re.DOTALL)

# --- before the build -----------------------------------------------------------------------------


def write_ledger(_app: Sphinx, _config: Config) -> None:
    """Generate the appendix that lists every claim and erratum."""
    ledger.write(ROOT)


def adjust_theme(_app: Sphinx, config: Config) -> None:
    """Drop the second search field, and launch buttons that would lead nowhere."""
    options = config.html_theme_options
    options["navbar_persistent"] = []
    if not options.get("repository_url"):
        for option in ("repository_url", "launch_buttons"):
            options.pop(option, None)


# --- the API page ---------------------------------------------------------------------------------


def render_math(_app: Sphinx, *args: Any) -> None:
    """Turn ``$...$`` and ``$$...$$`` of a docstring into reStructuredText's mathematics."""
    lines: list[str] = args[-1]
    lines[:] = MATH.sub(as_role, "\n".join(lines)).split("\n")


def as_role(found: re.Match[str]) -> str:
    """A formula as reStructuredText has it; code stays as it is."""
    code, displayed, inline = found.groups()
    return code or f":math:`{one_line(displayed or inline)}`"


def render_tables(_app: Sphinx, *args: Any) -> None:
    """Turn a docstring's pipe tables into reStructuredText's list tables."""
    lines: list[str] = args[-1]
    done: list[str] = []
    for row, line in enumerate(lines):
        text = line.strip()
        if not text.startswith("|"):
            done.append(line)
            continue
        indent = " " * (len(line) - len(line.lstrip()))
        cells = [cell.strip() for cell in text.strip("|").split("|")]
        if set(text) <= set("|-: "):
            continue
        if row == 0 or not lines[row - 1].strip().startswith("|"):
            done += ["", f"{indent}.. list-table::", f"{indent}   :header-rows: 1", ""]
        marks = ["* -"] + ["  -"] * (len(cells) - 1)
        done += [f"{indent}   {mark} {cell}" for mark, cell in zip(marks, cells, strict=True)]
    lines[:] = done


def one_line(text: str) -> str:
    """Join lines: a role's text must not break an indented block."""
    return " ".join(text.split())


# --- the executed notebook ------------------------------------------------------------------------


def offer_notebook(
    app: Sphinx, page: str, _template: str, context: dict[str, Any], _doctree: Any
) -> None:
    """Put the executed notebook first among a chapter's downloads (tools/book.py lays it there)."""
    if "kernelspec" not in app.env.metadata.get(page, {}):
        return
    button = {
        "type": "link",
        "url": context["pathto"](f"_downloads/{Path(page).name}.ipynb", 1),
        "text": ".ipynb",
        "icon": "fas fa-code",
        "tooltip": "Download the executed notebook",
        "label": "download-notebook-button",
    }
    for group in context["header_buttons"]:
        if group.get("label") == "download-buttons":
            others = [b for b in group["buttons"] if b["label"] != button["label"]]
            group["buttons"] = [button, *others]


def drop_thebe(
    _app: Sphinx, _page: str, _template: str, context: dict[str, Any], _doctree: Any
) -> None:
    """Jupyter Book loads thebe's scripts unasked (and twice, an error); nothing here uses them."""
    context["script_files"] = [
        script
        for script in context["script_files"]
        if "thebe" not in f"{script.filename} {script.attributes.get('body', '')}".lower()
    ]


# --- theorems: links back -------------------------------------------------------------------------


def uses(env: BuildEnvironment) -> dict[str, list[tuple[str, str, str]]]:
    """Per page: (label of the theorem, anchor of the place that refers to it, its title)."""
    if not hasattr(env, "adv_theorem_uses"):
        env.adv_theorem_uses = {}  # type: ignore[attr-defined]
    return env.adv_theorem_uses  # type: ignore[attr-defined]


def titled_section(node: nodes.Node) -> nodes.section | None:
    """The innermost section with a title around a node (exercises are sections without one)."""
    while node is not None:
        if isinstance(node, nodes.section) and isinstance(node[0], nodes.title):
            return node
        node = node.parent
    return None


def collect_uses(app: Sphinx, doctree: nodes.document) -> None:
    """Note every reference to a theorem on the page just read, with the section it stands in."""
    found = []
    for reference in doctree.findall(addnodes.pending_xref):
        if reference.get("refdomain") != "prf":
            continue
        place = titled_section(reference)
        if place is not None:
            found.append((reference["reftarget"], place["ids"][0], place[0].astext()))
    uses(app.env)[app.env.docname] = list(dict.fromkeys(found))


def purge_uses(_app: Sphinx, env: BuildEnvironment, page: str) -> None:
    """Forget a page that is about to be read again."""
    uses(env).pop(page, None)


def pages_with_theorems(_app: Sphinx, env: BuildEnvironment) -> list[str]:
    """Write these pages again: the places that refer to their theorems may have changed."""
    return sorted({entry["docname"] for entry in getattr(env, "proof_list", {}).values()})


def link_back(app: Sphinx, doctree: nodes.document, page: str) -> None:
    """Add "Used in" under each theorem that is referred to from other sections."""
    for node in doctree.findall(lambda n: isinstance(n, nodes.Element) and "realtype" in n):
        label = node["label"]
        home = titled_section(node.parent)
        own = home["ids"][0] if home is not None else None
        links = [
            make_refnode(app.builder, page, place, anchor, nodes.Text(title))
            for place, entries in sorted(uses(app.env).items())
            for target, anchor, title in entries
            if target == label and (place, anchor) != (page, own)
        ]
        if links:
            line = nodes.paragraph("", "Used in: ", classes=["theorem-uses"])
            for number, link in enumerate(links):
                line += [nodes.Text(", "), link] if number else [link]
            node += line


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the handlers."""
    app.connect("config-inited", write_ledger, priority=1)
    app.connect("config-inited", adjust_theme, priority=1)
    app.connect("autodoc-process-docstring", render_math)
    app.connect("autodoc-process-docstring", render_tables)
    app.connect("doctree-read", collect_uses)
    app.connect("env-purge-doc", purge_uses)
    app.connect("env-updated", pages_with_theorems)
    app.connect("doctree-resolved", link_back)
    app.connect("html-page-context", offer_notebook, priority=600)
    app.connect("html-page-context", drop_thebe, priority=600)
    return {"parallel_read_safe": False, "parallel_write_safe": True}
