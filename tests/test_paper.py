"""The published numbers: one schema, spot checks from the sources, and their arithmetic."""

import itertools
import math
import re
from numbers import Real
from pathlib import Path

import pytest
import yaml

FOLDER = Path(__file__).parents[1] / "reproduce" / "paper"
BIBLIOGRAPHY = FOLDER.parents[1] / "book" / "references.bib"
# How many items the errata section of each source's formula sheet has.
ERRATA = {
    "autoencoders": 21,
    "convex": 24,
    "generative": 21,
    "manifold": 23,
    "margin-critic": 29,
    "pdpgd": 21,
}
TOP = {"source", "tables", "figures", "settings", "errata"}
SOURCE = {"title", "authors", "year", "venue", "doi", "arxiv", "bibtex", "chapters"}
TABLE = {"id", "caption", "spread_meaning", "confidence", "columns", "rows"}
ROW = {"id", "label", "values"}
LEVELS = {"high", "medium", "low"}
PAPERS = {name: yaml.safe_load((FOLDER / f"{name}.yaml").read_text("utf-8")) for name in ERRATA}
TABLES = [
    pytest.param(table, id=f"{name}/{table['id']}")
    for name, paper in PAPERS.items()
    for table in paper["tables"]
]


def keys(entry, required, optional=frozenset()):
    """Fail where a key is missing or unknown."""
    assert required <= set(entry) <= required | set(optional), entry


def unique(entries):
    names = [entry["id"] for entry in entries]
    assert all(isinstance(name, str) for name in names)
    assert len(names) == len(set(names)), names


def table(paper, name):
    return next(entry for entry in PAPERS[paper]["tables"] if entry["id"] == name)


def cell(paper, name, row, column):
    return next(r for r in table(paper, name)["rows"] if r["id"] == row)["values"][column]


def curve(name, column):
    """Budgets in the pixel range and accuracies in percent, of a table of ``pdpgd``."""
    block = table("pdpgd", name)
    unit = 1 / 255 if block["parameter"]["unit"] == "1/255" else 1
    return [row["at"] * unit for row in block["rows"]], [
        row["values"][column] for row in block["rows"]
    ]


def test_every_file_is_known():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(ERRATA)


@pytest.mark.parametrize("name", ERRATA)
def test_source_and_errata_have_the_schema(name):
    paper = PAPERS[name]
    assert set(paper) == TOP
    keys(paper["source"], SOURCE, {"also", "note"})
    assert isinstance(paper["source"]["authors"], list)
    assert paper["source"]["year"] in range(2017, 2022)
    assert paper["source"]["chapters"]
    for entries in (paper["tables"], paper["figures"], paper["errata"]):
        unique(entries)
    for figure in paper["figures"]:
        keys(figure, {"id", "shows"}, {"axes", "series", "curves", "points", "note"})
    assert [erratum["id"] for erratum in paper["errata"]] == [
        f"E{number}" for number in range(1, ERRATA[name] + 1)
    ]
    for erratum in paper["errata"]:
        keys(erratum, {"id", "where", "kind", "text"})
        assert erratum["kind"] in {"paper", "extraction", "unclear", "code"}
        for field in ("where", "text"):
            assert erratum[field].count("$") % 2 == 0, erratum
        assert 40 < len(erratum["text"]) < 420, erratum
        assert erratum["text"].endswith("."), erratum


@pytest.mark.parametrize("block", TABLES)
def test_table_has_the_schema(block):
    keys(block, TABLE, {"note", "parameter"})
    assert block["confidence"] in LEVELS
    unique(block["columns"])
    unique(block["rows"])
    assert len({column["label"] for column in block["columns"]}) == len(block["columns"])
    columns = [column["id"] for column in block["columns"]]
    for column in block["columns"]:
        assert set(column) == {"id", "label", "unit", "better"}
        assert column["better"] in {"high", "low", None}
    for row in block["rows"]:
        keys(row, ROW, {"spread", "note", "at", "confidence", "unassigned"})
        assert list(row["values"]) == columns
        assert set(row.get("spread", {})) <= set(columns)
        assert row.get("confidence", "high") in LEVELS
        assert ("at" in row) == ("parameter" in block)
        for column in block["columns"]:
            value = row["values"][column["id"]]
            if column["better"] is not None:
                assert value is None or isinstance(value, Real), (row["id"], column["id"])
                assert value is None or (math.isfinite(value) and value >= 0)
                if column["unit"] == "percent":
                    assert value is None or value <= 100
        lost = sum(value is None for value in row["values"].values())
        assert len(row.get("unassigned", [])) <= lost
    incomplete = [row for row in block["rows"] if None in row["values"].values()]
    assert block.get("note") or all(row.get("note") for row in incomplete)
    assert bool(block["spread_meaning"]) <= any(row.get("spread") for row in block["rows"])


@pytest.mark.parametrize("name", ERRATA)
def test_bibliography_has_the_source(name):
    known = set(re.findall(r"^@\w+\{([^,]+),", BIBLIOGRAPHY.read_text("utf-8"), re.MULTILINE))
    source = PAPERS[name]["source"]
    assert {source["bibtex"], *source.get("also", [])} <= known


@pytest.mark.parametrize(
    ("paper", "name", "row", "column", "value"),
    [
        ("autoencoders", "1", "psi", "c1", 3.08),
        ("autoencoders", "1", "psi", "c2", 5.33),
        ("autoencoders", "1", "psi", "c3", 3.1),
        ("autoencoders", "1", "psi", "c4", 1.27),
        ("autoencoders", "1", "psi", "c5", 7),
        ("manifold", "1-mnist", "pgd", "std", 3.9),
        ("manifold", "1-mnist", "vae", "vae-adv", 96.66),
        ("manifold", "1-cifar10", "clean", "std", 92.14),
        ("manifold", "1-cifar10", "fgsm", "pgd-adv", 77.34),
        ("manifold", "2-mnist-l1-linf", "l1", "joint", 54.24),
        ("manifold", "2-mnist-pgd-vae", "pgd", "joint", 89.5),
        ("manifold", "2-cifar10-l1-linf", "linf", "l1-adv", 52.8),
        ("manifold", "2-cifar10-pgd-vae", "vae", "joint", 42.47),
        ("generative", "1", "1", "maps", 256),
        ("generative", "1", "3", "maps", 1024),
        ("generative", "1", "4", "maps", 128),
        ("generative", "2", "1", "maps", 1024),
        ("generative", "2", "4", "kernel", 4),
        ("convex", "3", "fcnn", "test-error", 1.7),
        ("convex", "3", "fcnn", "eps99", 0.076),
        ("convex", "3", "lenet5", "rho1", 0.077),
        ("convex", "3", "nin", "rho2", 0.004),
        ("convex", "3", "densenet", "eps99", 0.01),
        ("convex", "2", "pgd", "dithering", "yes"),
        ("margin-critic", "3.1a", "none", "rho", 0.114),
        ("margin-critic", "3.1a", "margin-l1", "rho", 0.273),
        ("margin-critic", "3.1a", "vat", "adv-error", 24.33),
        ("margin-critic", "3.1b", "dropout", "error", 0.58),
        ("margin-critic", "3.1b", "vat", "error", None),
        ("margin-critic", "3.2", "plain-l2-0.01", "rho", 0.0683),
        ("margin-critic", "4.1a", "critic", "rho-own", 0.575),
        ("margin-critic", "4.1b", "margin-l2", "rho-cw", 0.225),
        ("margin-critic", "4.2b", "critic", "change", 92.29),
        ("pdpgd", "5.1-linf", "plain", "bb", 0.068),
        ("pdpgd", "5.1-l1", "linf-at", "fab", 3.45),
        ("pdpgd", "5.1-l1", "linf-at", "pdpgd", 2.31),
        ("pdpgd", "5.3-l1", "5", "pdpgd-100", 3.4),
        ("pdpgd", "5.3-linf", "0.35", "daa-50", 9.4),
        ("pdpgd", "5.5-linf", "plain", "pdpgd", 0.0054),
        ("pdpgd", "5.5-l2", "linf-at", "cw", 0.728),
        ("pdpgd", "5.5-l0", "plain", "bb", 9.8),
        ("pdpgd", "5.5-l0", "l2-at", "pdpgd", 5.64),
        ("pdpgd", "5.7-linf", "2/255", "pgd-1", 65.5),
        ("pdpgd", "5.7-l0", "8", "pixel", 46),
        ("pdpgd", "5.8-l1", "6", "pdpgd-100", None),
        ("pdpgd", "clean", "cifar10-plain", "full", 88.38),
        ("pdpgd", "clean", "mnist-linf-at", "first-1000", 98.5),
    ],
)
def test_spot_checks(paper, name, row, column, value):
    assert cell(paper, name, row, column) == value


def test_spot_checks_of_spreads_and_settings():
    assert table("autoencoders", "1")["rows"][0]["spread"]["c5"] == 0.2
    assert table("margin-critic", "3.1b")["rows"][2]["spread"] == {
        "error": 0.05,
        "adv-error": 1.26,
        "rho": 0.003,
    }
    assert PAPERS["autoencoders"]["settings"]["vae"]["celeba"]["steps"] == 1000
    assert PAPERS["generative"]["settings"]["nes"]["sigma"] == {"defensegan": 0.5, "abs": 0.1}
    assert PAPERS["manifold"]["settings"]["cifar10"]["cvae"]["latent"] == 128
    assert PAPERS["pdpgd"]["settings"]["attacks"]["ddn"]["gamma"] == 0.05


def test_autoencoder_ratio_that_an_erratum_quotes():
    ratio = cell("autoencoders", "1", "psi", "c1") / cell("autoencoders", "1", "psi", "c2")
    assert round(ratio, 2) == 0.58


@pytest.mark.parametrize("data", ["mnist", "cifar10"])
def test_manifold_tables_repeat_each_other(data):
    for row, column in itertools.product(["pgd", "vae"], ["pgd-adv", "vae-adv"]):
        assert cell("manifold", f"2-{data}-pgd-vae", row, column) == cell(
            "manifold", f"1-{data}", row, column
        )
    # The cost of joint training in percentage points, from the sheet.
    costs = {"mnist": (24.26, 16.70, 6.01, 6.38), "cifar10": (5.99, 10.67, 1.56, -2.29)}
    pairs = [("l1-linf", "l1"), ("l1-linf", "linf"), ("pgd-vae", "pgd"), ("pgd-vae", "vae")]
    for (block, attack), cost in zip(pairs, costs[data], strict=True):
        single = cell("manifold", f"2-{data}-{block}", attack, f"{attack}-adv")
        joint = cell("manifold", f"2-{data}-{block}", attack, "joint")
        assert single - joint == pytest.approx(cost, abs=1e-9)


def test_generative_layers_close_at_32_pixels():
    size = 32
    for row in table("generative", "1")["rows"][:4]:
        layer = row["values"]
        size = (size + 2 * layer["padding"] - layer["kernel"]) // layer["stride"] + 1
    assert size == 1
    for row in table("generative", "2")["rows"][:4]:
        layer = row["values"]
        size = (size - 1) * layer["stride"] - 2 * layer["padding"] + layer["kernel"]
    assert size == 32


def test_convex_ratios():
    ratios = [
        (
            row["values"]["rho1"] / row["values"]["rho2"],
            row["values"]["eps99"] / row["values"]["rho1"],
        )
        for row in table("convex", "3")["rows"]
    ]
    expected = [(1.06, 2.11), (1.26, 2.13), (3.0, 1.50), (3.0, 1.67)]
    assert [(round(a, 2), round(b, 2)) for a, b in ratios] == expected


def test_margin_critic_orders_and_shares():
    for block in ("4.1a", "4.1b"):
        rows = [row["values"] for row in table("margin-critic", block)["rows"]]
        assert all(row["rho-cw"] < row["rho-deepfool"] < row["rho-own"] for row in rows)
        for column in ("rho-cw", "rho-deepfool", "rho-own"):
            assert [row[column] for row in rows] == sorted(row[column] for row in rows)
    shares = {"4.2a": (0.69, 3.77, 5.24, 5.01, 2.15), "4.2b": (0.93, 4.96, 5.47, 5.08, 1.20)}
    for block, rest in shares.items():
        left = [100 - sum(row["values"].values()) for row in table("margin-critic", block)["rows"]]
        assert left == pytest.approx(rest, abs=1e-9)


@pytest.mark.parametrize(
    ("name", "lowest", "highest_rho"),
    [("3.4", (1e-2, 0.4667), (1.0, 0.2517)), ("3.5", (1e-1, 0.8067), (1.3895e-3, 0.4373))],
)
def test_margin_figures(name, lowest, highest_rho):
    figure = next(f for f in PAPERS["margin-critic"]["figures"] if f["id"] == name)
    curves = figure["curves"]
    assert {len(values) for values in curves.values()} == {43}
    steps = [math.log10(b / a) for a, b in itertools.pairwise(curves["C"])]
    assert steps == pytest.approx([1 / 7] * 42, abs=2e-4)
    for column in ("error", "rho"):
        assert all(
            low <= middle <= high
            for low, middle, high in zip(
                curves[f"{column}_lo"], curves[column], curves[f"{column}_hi"], strict=True
            )
        )
    # Three runs of 10000 images: every mean error is a multiple of 1/300 percent.
    assert all(abs(300 * value - round(300 * value)) < 0.02 for value in curves["error"])
    at = curves["error"].index(min(curves["error"]))
    assert (curves["C"][at], curves["error"][at]) == lowest
    at = curves["rho"].index(max(curves["rho"]))
    assert (curves["C"][at], curves["rho"][at]) == highest_rho


@pytest.mark.parametrize(
    ("curves", "means", "row", "column", "clean"),
    [
        ("5.3-l1", "5.1-l1", "linf-at", "pdpgd-100", 98.5),
        ("5.3-l1", "5.1-l1", "linf-at", "fab-100", 98.5),
        ("5.3-l2", "5.1-l2", "linf-at", "bb", 98.5),
        ("5.3-l2", "5.1-l2", "linf-at", "ddn", 98.5),
        ("5.7-l1", "5.5-l1", "linf-at", "ead", 80.4),
        ("5.7-l1", "5.5-l1", "linf-at", "bb", 80.4),
        ("5.7-l1", "5.5-l1", "linf-at", "fab-100", 80.4),
    ],
)
def test_area_under_the_curve_is_the_mean_norm(curves, means, row, column, clean):
    """Mean norm = area under accuracy over clean accuracy, where the last accuracy is near 0."""
    budgets, accuracies = curve(curves, column)
    assert accuracies[-1] < 5
    area = trapezoid([0, *budgets], [clean, *accuracies]) / clean
    mean = cell("pdpgd", means, row, column.split("-")[0])
    assert area == pytest.approx(mean, rel=0.03)


@pytest.mark.parametrize(
    ("curves", "means", "row", "clean"),
    [
        (f"{a}-{norm}", f"{b}-{norm}", row, clean)
        for a, b, row, clean in [
            ("5.3", "5.1", "linf-at", 98.5),
            ("5.7", "5.5", "linf-at", 80.4),
            ("5.8", "5.5", "l2-at", 80.7),
        ]
        for norm in ("linf", "l2", "l1")
    ],
)
def test_area_up_to_the_last_budget_is_at_most_the_mean_norm(curves, means, row, clean):
    """Single-run attacks, which have one mean norm: the part of the area that the table covers."""
    for column in {"df", "bb", "cw", "ddn", "ead", "sparsefool"}:
        if column not in table("pdpgd", curves)["rows"][-1]["values"]:
            continue
        budgets, accuracies = curve(curves, column)
        if None in accuracies:
            continue
        area = trapezoid([0, *budgets], [clean, *accuracies]) / clean
        assert area < 1.02 * cell("pdpgd", means, row, column), column


def trapezoid(x, y):
    return sum((b - a) * (c + d) / 2 for (a, b), (c, d) in zip(pairs(x), pairs(y), strict=True))


def pairs(values):
    return list(itertools.pairwise(values))


@pytest.mark.parametrize("block", [b for b in TABLES if "parameter" in b.values[0]])
def test_accuracy_falls_with_the_budget_and_with_restarts(block):
    columns = [column["id"] for column in block["columns"]]
    for column in columns:
        values = [row["values"][column] for row in block["rows"]]
        known = [value for value in values if value is not None]
        if column != "pixel":  # its runs at different budgets are not nested
            assert known == sorted(known, reverse=True), column
    for attack in ("pgd", "fab", "pdgd", "pdpgd"):
        restarts = [column for column in columns if re.fullmatch(rf"{attack}-\d+", column)]
        for row in block["rows"]:
            known = [row["values"][c] for c in restarts if row["values"][c] is not None]
            assert known == sorted(known, reverse=True), (row["id"], attack)


def test_every_budget_is_one_of_the_released_thresholds():
    thresholds = PAPERS["pdpgd"]["settings"]["thresholds"]
    blocks = {
        "5.2": ("mnist", "plain"),
        "5.3": ("mnist", "linf_at"),
        "5.4": ("mnist", "l2_at"),
        "5.6": ("cifar10", "plain"),
        "5.7": ("cifar10", "linf_at"),
        "5.8": ("cifar10", "l2_at"),
    }
    for name, (data, model) in blocks.items():
        for norm in ("linf", "l2", "l1", "l0"):
            block = table("pdpgd", f"{name}-{norm}")
            suffix = "_x255" if block["parameter"]["unit"] == "1/255" else ""
            assert [row["at"] for row in block["rows"]] == thresholds[data][model][norm + suffix]
