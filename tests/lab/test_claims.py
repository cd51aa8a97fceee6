"""Claims and errata print or stop; tables of the papers stand beside ours, gaps shown."""

import io
import sys
import tomllib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

from adv.lab import claims
from adv.lab.claims import abridged, claim, compare, erratum, escape, paper, stored

PAPER = {
    "tables": [
        {
            "id": "1",
            "caption": "Errors",
            "note": "a cell is lost",
            "columns": [
                {"id": "err", "label": "error", "unit": "percent"},
                {"id": "rho", "label": "rho", "unit": "1"},
                {"id": "how", "label": "how", "unit": None},
                {"id": "n", "label": "images", "unit": "1"},
            ],
            "rows": [
                {
                    "id": "a",
                    "label": "net A",
                    "values": {"err": 1.5, "rho": 0.114, "how": "exact", "n": 500},
                    "spread": {"err": 0.08},
                },
                {"id": "b", "values": {"err": 20, "rho": None, "how": None}, "spread": {}},
            ],
        },
        {"id": "2", "columns": [], "rows": []},
    ],
    "errata": [
        {"id": "E1", "where": "(3.2)", "kind": "paper", "text": "The sign\n  is wrong."},
        {"id": "E2", "where": "section 4", "kind": "unclear", "text": "Not said."},
    ],
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(PAPER), encoding="utf-8")
    monkeypatch.setattr(claims, "FOLDERS", (tmp_path / "absent", tmp_path))
    claims._read.cache_clear()
    yield tmp_path
    claims._read.cache_clear()


@pytest.mark.parametrize("kind", [bool, np.bool_, torch.tensor])
def test_claim_prints_or_stops(capsys, kind):
    claim("geometry/duality", "Hölder's bound is attained to 1e-12", kind(True))
    assert capsys.readouterr().out == "✓ geometry/duality: Hölder's bound is attained to 1e-12\n"
    with pytest.raises(AssertionError, match=r"^x/y: it holds \(does not hold\)\nIt held for"):
        claim("x/y", "it holds", kind(False))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "holds",
    [1, 0, 1.0, None, "yes", [], np.array([True]), torch.tensor([True]), torch.tensor(1.0), max],
    ids=repr,
)
def test_only_bools_are_truth(holds, folder):
    with pytest.raises(TypeError, match="one bool"):
        claim("a/b", "c", holds)
    with pytest.raises(TypeError, match="one bool"):
        erratum("toy/E1", holds)


def test_a_terminal_without_check_marks(folder, monkeypatch):
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", file)
    claim("geometry/duality", "Hölder's bound", True)
    erratum("toy/E1", True)
    monkeypatch.undo()
    file.seek(0)
    assert file.read().splitlines() == [
        "ok: geometry/duality: H\\xf6lder's bound",
        "ok: erratum toy/E1, (3.2): The sign is wrong.",
    ]


def test_erratum_typesets_its_formulas_in_a_notebook(folder, capsys, monkeypatch):
    shown = []
    display = SimpleNamespace(display=shown.append)
    notebook = SimpleNamespace(get_ipython=lambda: "a kernel", display=display)
    monkeypatch.setitem(sys.modules, "IPython", notebook)
    erratum("toy/E1", True)
    line = "✓ erratum toy/E1, (3.2): The sign is wrong."
    assert repr(shown[0]) == shown[0]._repr_markdown_() == line
    assert escape("a_b * $c_d * e$ {f}") == r"a\_b \* $c_d * e$ \{f\}"
    assert escape("5 $ a_b") == r"5 \$ a\_b"
    assert not capsys.readouterr().out


def test_erratum(folder, capsys):
    erratum("toy/E1", np.bool_(True))
    assert capsys.readouterr().out == "✓ erratum toy/E1, (3.2): The sign is wrong.\n"
    with pytest.raises(AssertionError, match=r"toy/E2, section 4: Not said\. \(does not hold\)"):
        erratum("toy/E2", False)
    with pytest.raises(KeyError, match="E1, E2"):
        erratum("toy/E3", True)
    with pytest.raises(KeyError, match="known: toy"):
        erratum("play/E1", True)


def test_compare_formats_both_sides(folder):
    table = compare("toy", "1", ours={"a": {"err": (1.44, 0.1), "rho": 0.1}, "b": {"err": None}})
    assert list(table.index) == ["net A", "b"]
    assert list(table.columns)[:3] == [
        ("error (percent)", "paper"),
        ("error (percent)", "ours"),
        ("rho", "paper"),
    ]
    assert table["error (percent)"].to_numpy().tolist() == [
        ["1.50 ± 0.08", "1.44 ± 0.10"],
        ["20.00", "—"],
    ]
    assert table["rho"].to_numpy().tolist() == [["0.114", "0.100"], ["—", "—"]]
    assert table["how", "paper"].tolist() == ["exact", "—"]
    assert table["images", "paper"].tolist() == ["500", "—"]
    assert table.attrs == {"caption": "Errors", "note": "a cell is lost"}


def test_abridged_shows_what_has_a_number_of_ours_and_names_the_rest(folder, capsys):
    part = abridged(compare("toy", "1", ours={"a": {"rho": 0.1}}))
    assert list(part.index) == ["net A"]
    assert list(part.columns) == [("rho", "paper"), ("rho", "ours")]
    assert capsys.readouterr().out == "without a number of ours: b\n"
    whole = compare("toy", "1", ours={"a": {"rho": 0.1}, "b": {"err": 20}})
    assert list(abridged(whole).index) == list(whole.index)
    assert not capsys.readouterr().out
    printed = abridged(compare("toy", "1"))
    assert printed["rho"].tolist() == ["0.114", "—"]
    assert capsys.readouterr().out == "the published numbers; ours have not been computed\n"


def test_a_unit_that_all_columns_share_is_named_once(root):
    table = compare("autoencoders", "1")
    assert table.columns.names == ["(code amplitude)", None]
    labels = [column["label"] for column in paper("autoencoders")["tables"][0]["columns"]]
    assert list(table.columns.unique(0)) == labels
    assert table.to_html().count("code amplitude") == 1
    assert compare("convex", "2").columns.names == [None, None]  # columns without units


def test_compare_takes_rows_of_a_results_file(folder):
    rows = [{"id": "b", "values": {"err": 19.0, "rho": float("nan")}, "spread": {"err": 1.25}}]
    table = compare("toy", "1", ours=rows, digits=1)
    assert table["error (percent)", "ours"].tolist() == ["—", "19.0 ± 1.2"]
    assert table["rho", "ours"].tolist() == ["—", "—"]
    assert (compare("toy", "1")["rho", "ours"] == "—").all()
    assert compare("toy", "1", ours={"a": {"how": 1 / 3}})["how", "ours"].iloc[0] == "0.33"
    assert compare("toy", "1", ours={"a": {"how": "bound"}})["how", "ours"].iloc[0] == "bound"


def test_compare_names_what_is_unknown(folder):
    for ours, known in (({"c": {"err": 1}}, "a, b"), ({"a": {"eror": 1}}, "err, rho, how, n")):
        with pytest.raises(KeyError, match=known):
            compare("toy", "1", ours=ours)
    with pytest.raises(KeyError, match="known: 1, 2"):
        compare("toy", "3")


@pytest.mark.parametrize("cell", [(1.0, 2.0, 3.0), (1.0,), []])
def test_compare_names_a_cell_that_is_no_pair(folder, cell):
    with pytest.raises(ValueError, match="a pair"):
        compare("toy", "1", ours={"a": {"err": cell}})
    assert compare("toy", "1", ours={"a": {"err": [1, 2]}}).iloc[0, 1] == "1.00 ± 2.00"


def test_a_papers_name_is_no_path(folder):
    (folder.parent / "elsewhere.yaml").write_text("tables: []")
    (folder / "below").mkdir()
    (folder / "below" / "other.yaml").write_text("tables: []")
    for name in ("../elsewhere", "below/other", str(folder / "toy"), "./toy", ""):
        with pytest.raises(KeyError, match="known: toy"):
            paper(name)


def test_the_first_folder_counts(folder, monkeypatch):
    (folder / "first").mkdir()
    (folder / "first" / "toy.yaml").write_text("tables: []")
    monkeypatch.setattr(claims, "FOLDERS", (folder / "first", folder))
    assert paper("toy") == {"tables": []}


def test_paper_gives_a_copy(folder):
    paper("toy")["errata"].clear()
    assert paper("toy") == PAPER


def test_the_repository_files_are_found(root):
    names = sorted(path.stem for path in (root / "reproduce" / "paper").glob("*.yaml"))
    assert {"pdpgd", "convex"} <= set(names)
    for name in names:
        source = paper(name)
        for table in source.get("tables", []):
            shown = compare(name, table["id"])
            assert shown.shape == (len(table["rows"]), 2 * len(table["columns"]))


def test_stored_results_are_read_from_a_checkout_or_a_wheel(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "RESULTS", (tmp_path / "absent", tmp_path))
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "one.json").write_text('{"rows": ["ä", 2.5]}', encoding="utf-8")
    assert stored("deep/one") == {"rows": ["ä", 2.5]}
    with pytest.raises(KeyError, match="no stored result 'other'"):
        stored("other")
    assert stored("other", {"rows": []}) == {"rows": []}


def test_a_wheel_holds_what_the_chapters_read():
    """The launch button of a page installs one, and has no checkout."""
    settings = tomllib.loads((claims.PACKAGE.parent / "pyproject.toml").read_text())
    given = settings["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    for checkout, package in (claims.FOLDERS, claims.RESULTS):
        there = checkout.relative_to(claims.PACKAGE.parent).as_posix()
        assert given[there] == package.relative_to(claims.PACKAGE.parent).as_posix()
