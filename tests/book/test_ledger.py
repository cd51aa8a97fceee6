"""The ledger of a small made-up book, and of the stored one."""

import importlib.util
import json
from pathlib import Path

import pandas as pd
import pytest
import yaml

from adv.lab.claims import compare

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("adv_ledger", ROOT / "tools" / "ledger.py")
ledger = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ledger)

PAPER = {
    "source": {"title": "A [paper] on $x_1$", "bibtex": "someone2020"},
    "tables": [
        {
            "id": "1-linf",
            "caption": "Accuracy under $\\ell_\\infty$",
            "columns": [
                {"id": "df", "label": "DF", "unit": "percent", "better": "low"},
                {"id": "rho", "label": r"$\rho<1$ & more", "unit": "", "better": None},
            ],
            "rows": [
                {"id": "a", "label": "first", "values": {"df": 1.5, "rho": 2}},
                {"id": "b", "label": r"$\varepsilon=2$", "values": {"df": None, "rho": 3}},
            ],
        },
        {
            "id": "1-l2",
            "caption": "Methods",
            "columns": [{"id": "name", "label": "name", "unit": "", "better": None}],
            "rows": [{"id": "a", "label": "first", "values": {"name": "word"}}],
        },
    ],
    "errata": [
        {"id": "E1", "where": "(2)", "kind": "paper", "text": "Printed $<$, right is $\\le_*$."},
        {"id": "E2", "where": "§3", "kind": "code", "text": "A | b, 100 $ and `x` *y* {z}."},
    ],
}


def code(source, *, text="", html=""):
    outputs = []
    if text:
        outputs.append({"output_type": "stream", "name": "stdout", "text": text.splitlines(True)})
    if html:
        outputs.append({"output_type": "display_data", "data": {"text/html": [html]}})
    return {"cell_type": "code", "source": [source], "outputs": outputs}


def comparison(ours):
    """A table as ``adv.lab.claims.compare`` shows it."""
    columns = [("DF (percent)", "paper"), ("DF (percent)", "ours")]
    columns += [(r"$\rho<1$ & more", "paper"), (r"$\rho<1$ & more", "ours")]
    rows = [["1.5", ours[0], "2", ours[1]], ["—", ours[2], "3", ours[3]]]
    index = ["first", r"$\varepsilon=2$"]
    return pd.DataFrame(rows, index, pd.MultiIndex.from_tuples(columns)).to_html()


@pytest.fixture
def book(tmp_path):
    """Write a book of two chapters, one of them not in the table of contents."""

    def write(**chapters):
        for folder in ("book", "reproduce/paper", "reproduce/results"):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / "_toc.yml").write_text("root: book/index\nchapters:\n  - file: book/zeta\n")
        paper = tmp_path / "reproduce" / "paper" / "someone.yaml"
        paper.write_text(yaml.safe_dump(PAPER, allow_unicode=True), "utf-8")
        for name, cells in chapters.items():
            title = {"cell_type": "markdown", "source": [f"# The {name}\n", "\n", "Text."]}
            (tmp_path / "book" / f"{name}.ipynb").write_text(json.dumps({"cells": [title, *cells]}))
        return tmp_path

    return write


def line(text, start):
    return next(entry for entry in text.splitlines() if entry.startswith(start))


def test_claims_are_grouped_by_chapter_in_the_book_s_order(book):
    root = book(
        alpha=[code("claim(...)", text="✓ alpha/x: $a_1$ and b_2 < c\nother\n")],
        zeta=[
            code("claim(...)", text="✓ zeta/1: first: part\n✓ zeta/2: error 1*2 below {x}\n"),
            code("print()", text="not a ✓ zeta/3: claim\n"),
        ],
    )
    text = ledger.write(root).read_text("utf-8")
    assert "3 claims in 2 chapters." in text
    assert text.index(":::{dropdown} The zeta: 2 claims") < text.index("The alpha: 1 claim\n")
    assert "From {doc}`zeta`." in text
    assert "{doc}`alpha`" not in text  # not in the table of contents: a link would be broken
    assert line(text, "- `zeta/1`") == "- `zeta/1`: first: part"
    assert line(text, "- `zeta/2`") == r"- `zeta/2`: error 1\*2 below \{x\}"
    assert line(text, "- `alpha/x`") == r"- `alpha/x`: $a_1$ and b\_2 \< c"
    assert "zeta/3" not in text


def test_errata_tell_where_they_are_checked(book):
    root = book(zeta=[code("erratum(...)", text="✓ erratum someone/E1 ((2)): text\n")])
    text = ledger.page(root)
    assert "2 items, 1 checked in a chapter." in text
    assert line(text, "- **E1**").endswith(
        r"Printed $<$, right is $\le_*$. Checked in {doc}`zeta`."
    )
    assert line(text, "- **E2**").endswith(
        r"A \| b, 100 \$ and \`x\` \*y\* \{z\}. *Read, not computed.*"
    )
    assert "0 claims in 1 chapter." in text  # a checked erratum is no claim
    assert r"A \[paper\] on $x_1$ {cite}`someone2020`." in text


def test_an_erratum_shown_with_formulas_counts(book):
    said = "✓ erratum someone/E1, (2): $x$"
    shown = {"data": {"text/plain": [said], "text/markdown": [said]}}
    other = {"data": {"text/plain": ["✓ erratum someone/E2, (2): a value, not shown"]}}
    root = book(zeta=[code("erratum(...)") | {"outputs": [shown, other]}])
    assert "2 items, 1 checked in a chapter." in ledger.page(root)


def test_an_erratum_that_no_file_has_is_refused(book):
    root = book(zeta=[code("erratum(...)", text="✓ erratum someone/E9 ((2)): text\n")])
    with pytest.raises(ValueError, match=r"zeta\.ipynb.*E9"):
        ledger.page(root)


@pytest.mark.parametrize(
    "source",
    [
        'compare("someone", "1-linf", ours=rows)',
        "for norm in norms:\n    display(compare('someone', f'1-{norm}', ours[norm]))",
    ],
)
def test_tables_count_our_cells(book, source):
    root = book(zeta=[code(source, html=comparison(["1.40 ± 0.1", "—", "7", "—"]))])
    text = ledger.page(root)
    assert line(text, "- **1-linf**") == (
        r"- **1-linf**, Accuracy under $\ell_\infty$. Shown in {doc}`zeta`; "
        "ours for 1 of 3 numbers, 2 missing, 1 lost in the source, ours for 1 of these."
    )
    assert line(text, "- **1-l2**") == "- **1-l2**, Methods. *Not shown*; no numbers."


def test_what_compare_shows_is_recognized():
    papers = {"pdpgd": yaml.safe_load((ROOT / "reproduce/paper/pdpgd.yaml").read_text("utf-8"))}
    ours = {"2.5": {"fab-1": 80.0}, "10": {"fab-1": 30.0, "pdpgd-100": (1.0, 0.5)}}
    shown = [{"data": {"text/html": [compare("pdpgd", "5.3-l1", ours).to_html()]}}]
    source = 'compare("pdpgd", "5.3-l1", ours)'
    assert dict(ledger.compared(source, shown, papers)) == {
        ("pdpgd", "5.3-l1"): {("2.5", "fab-1"), ("10", "fab-1"), ("10", "pdpgd-100")}
    }


def test_an_f_string_elsewhere_in_the_cell_does_not_hide_which_table_is_meant():
    """Two tables of one paper have the same rows and columns."""
    papers = {"manifold": yaml.safe_load((ROOT / "reproduce/paper/manifold.yaml").read_text())}
    ours = {"clean": {"std": 68.5}}
    shown = [{"data": {"text/html": [compare("manifold", "1-cifar10", ours).to_html()]}}]
    source = 'glue("x", f"{value}")\ncompare("manifold", "1-cifar10", ours)'
    assert dict(ledger.compared(source, shown, papers)) == {
        ("manifold", "1-cifar10"): {("clean", "std")}
    }


@pytest.mark.parametrize("beside", [True, False])
def test_a_table_that_a_function_of_another_cell_shows_counts(book, beside):
    helper = code('def show(table):\n    display(compare("someone", table, rows))')
    html = comparison(["1", "—", "3", "—"]) if beside else "<table><tr><td>1</td></tr></table>"
    line_above = {"data": {"text/markdown": ["Table 1-linf. Accuracy. Ours: none."]}}
    unrelated = {"data": {"text/markdown": ["Table 1-l2. Methods. Its cells are lost."]}}
    table = {"data": {"text/html": [html]}}
    shown = code("for table in tables: show(table)") | {"outputs": [unrelated, line_above, table]}
    text = ledger.page(book(zeta=[helper, shown]))
    ours = "ours for 1 of 3" if beside else "ours for 0 of 3"
    assert f"Shown in {{doc}}`zeta`; {ours}" in line(text, "- **1-linf**")
    assert "*Not shown*" in line(text, "- **1-l2**")  # a line without a table
    text = ledger.page(book(zeta=[shown]))
    assert "*Not shown*" in line(text, "- **1-linf**")  # nothing is compared with this paper


def test_results_count_too_and_files_of_other_kinds_are_passed_over(book):
    root = book()
    results = root / "reproduce" / "results"
    rows = [{"id": "a", "values": {"df": 1.0, "rho": None}}, {"id": "b", "values": {"rho": 2.5}}]
    block = {"paper": "someone", "table": "1-linf", "rows": rows}
    (results / "one.json").write_text(json.dumps({"seed": 0, "tables": [block, {"x": 1}]}))
    (results / "two.json").write_text(json.dumps([1, 2]))
    text = ledger.page(root)
    assert "*Not shown*; ours for 2 of 3 numbers, 1 missing, 1 lost" in line(text, "- **1-linf**")


def test_results_of_older_code_are_listed(book):
    root = book()
    results = root / "reproduce" / "results"
    assert "## Results of older code" not in ledger.page(root)
    rows = [{"id": "a", "scale": ["mnist"]}, {"id": "b_1", "scale": ["mnist, by older code"]}]
    (results / "z-1.json").write_text(json.dumps({"rows": rows}))
    curves = {"PGD": {"scale": ["x, by older code"]}, "FGSM": {"scale": []}}
    (results / "z-figure-2.json").write_text(json.dumps({"curves": curves}))
    text = ledger.page(root)
    assert "dropdown} 2 tables and figures" in text
    assert line(text, "- `z-1`") == "- `z-1`: b\\_1 (of 2)"
    assert line(text, "- `z-figure-2`") == "- `z-figure-2`: PGD (of 2)"


def test_a_table_of_other_rows_is_not_taken_for_it(book):
    html = comparison(["1", "2", "3", "4"]).replace("first", "elsewhere")
    root = book(zeta=[code('compare("someone", "1-linf")', html=html)])
    assert "*Not shown*; ours for 0 of 3" in line(ledger.page(root), "- **1-linf**")


def test_an_unchanged_page_is_not_written_again(book):
    path = ledger.write(book())
    before = path.stat().st_mtime_ns
    assert ledger.write(path.parents[1]).stat().st_mtime_ns == before


def test_ledger_of_this_book():
    text = ledger.page(ROOT)
    papers = {
        file.stem: yaml.safe_load(file.read_text("utf-8"))
        for file in (ROOT / "reproduce" / "paper").glob("*.yaml")
    }
    for name, paper in papers.items():
        assert f":::{{dropdown}} {name}: {len(paper['errata'])} items, " in text
    entries = sum(len(paper["errata"]) + len(paper["tables"]) for paper in papers.values())
    assert text.count("\n- **") == entries
    for file in (ROOT / "book").glob("*.ipynb"):
        for cell in json.loads(file.read_text("utf-8"))["cells"]:
            for output in cell.get("outputs", []):
                for printed in "".join(output.get("text", "")).splitlines():
                    if printed.startswith("✓ ") and not printed.startswith("✓ erratum "):
                        assert f"- `{printed[2:].split(':')[0]}`: " in text
