"""What the book's Sphinx extension makes of docstrings, and which scripts it drops."""

import sys
from pathlib import Path
from types import SimpleNamespace

import docutils.core
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import adv_book  # noqa: E402


def changed(handler, text):
    lines = text.split("\n")
    handler(None, "function", "adv.some", None, None, lines)
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (r"the norm $\|x\|_p$ of $x$.", r"the norm :math:`\|x\|_p` of :math:`x`."),
        ("$$\n  a\n  + b\n$$", ":math:`a + b`"),
        ("over\n    $a +\n    b$ lines", "over\n    :math:`a + b` lines"),
        ("``$...$`` is kept, $x$ is not", "``$...$`` is kept, :math:`x` is not"),
        ("``$HOME/a`` or ``$HOME/b``", "``$HOME/a`` or ``$HOME/b``"),
        ("5 $ and no more", "5 $ and no more"),
    ],
)
def test_formulas_become_roles_and_code_stays(text, shown):
    assert changed(adv_book.render_math, text) == shown


def test_pipe_tables_become_tables_of_the_same_cells():
    text = "Before.\n\n    | name | size |\n    |---|--:|\n    | a | 1 |\n    | b |  |\n\nAfter."
    shown = changed(adv_book.render_tables, text)
    page = docutils.core.publish_doctree(shown)
    (table,) = page.findall(lambda node: node.tagname == "table")
    rows = [
        [entry.astext() for entry in row.findall(lambda node: node.tagname == "entry")]
        for row in table.findall(lambda node: node.tagname == "row")
    ]
    assert rows == [["name", "size"], ["a", "1"], ["b", ""]]
    assert len(list(page.findall(lambda node: node.tagname == "thead"))) == 1
    assert changed(adv_book.render_tables, "no table\nat all") == "no table\nat all"


def test_only_thebes_scripts_are_dropped():
    scripts = [
        SimpleNamespace(filename=name, attributes={"body": body})
        for name, body in (("a.js", ""), ("sphinx-thebe.js", ""), (None, "const Thebe = 1"))
    ]
    context = {"script_files": scripts}
    adv_book.drop_thebe(None, "page", "", context, None)
    assert context["script_files"] == scripts[:1]
