"""The book as files: chapters and their executed twins, stored outputs, mutations, environments."""

import json
import re
import shutil
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import yaml
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import book  # noqa: E402

CHAPTERS = book.chapters(ROOT)
IDS = [p.stem for p in CHAPTERS]
PNG_LIMIT = 40_000  # bytes, as stored


def outputs(path: Path):
    for cell in book.read_stored(path).cells:
        if cell.cell_type == "code":
            yield from ((cell, output) for output in cell.outputs)


def test_the_table_of_contents_names_files_that_exist():
    generated = {"ledger.md"}
    missing = [p for p in book.toc_files(ROOT) if not p.exists() and p.name not in generated]
    assert not missing
    assert CHAPTERS


@pytest.mark.parametrize("path", CHAPTERS, ids=IDS)
class TestChapter:
    def test_the_stored_notebook_is_in_step_with_its_source(self, path):
        assert book.in_step(path), f"run `make notebooks ONLY={path.stem}`"

    def test_every_code_cell_was_executed_in_order_without_error(self, path):
        cells = [c for c in book.read_stored(path).cells if c.cell_type == "code"]
        assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1))
        assert not [o for _, o in outputs(path) if o.output_type == "error"]

    def test_outputs_hold_no_stderr_and_no_path_of_a_machine(self, path):
        for _, output in outputs(path):
            assert output.get("name") != "stderr", output.text
            # PNG data is base64, in which anything may occur.
            data = {k: v for k, v in output.get("data", {}).items() if "image" not in k}
            text = json.dumps(data) + output.get("text", "")
            assert not re.search(r"/(home|root|tmp|Users|work)/", text), text

    def test_figures_are_small_and_have_alt_text_and_a_caption(self, path):
        for cell, output in outputs(path):
            if "image/png" in output.get("data", {}):
                assert len(output.data["image/png"]) * 3 / 4 < PNG_LIMIT
                described = cell.metadata.get("mystnb", {})
                assert described.get("image", {}).get("alt"), cell.source
                assert described.get("figure", {}).get("caption"), cell.source

    def test_code_fits_its_column(self, path):
        for cell in book.read_chapter(path).cells:
            if cell.cell_type == "code":
                assert max(map(len, cell.source.splitlines()), default=0) <= 88, cell.source

    def test_no_line_of_text_begins_as_a_comment_does(self, path):
        lines = [
            c.source.splitlines()
            for c in book.read_chapter(path).cells
            if c.cell_type == "markdown"
        ]
        assert not [line for cell in lines for line in cell if line.lstrip().startswith("%")]

    def test_labels_of_claims_are_unique_and_name_the_chapter(self, path):
        if path.stem == "index":
            return
        text = "".join(o.get("text", "") for _, o in outputs(path))
        labels = re.findall(r"^✓ (?!erratum )(.+?): ", text, flags=re.M)
        assert labels
        assert len(labels) == len(set(labels))
        assert all(label.startswith(f"{path.stem}/") for label in labels)

    def test_has_three_exercises_with_solutions(self, path):
        if path.stem == "index":
            return
        text = path.read_text()
        exercises = re.findall(r"\{exercise\}[^\n]*\n:label: (\S+)", text)
        solutions = re.findall(r"\{solution-start\} (\S+)", text)
        assert len(exercises) >= 3
        assert sorted(solutions) == sorted(exercises)

    def test_mutations_apply(self, path):
        if path.stem == "index":
            return
        mutations = yaml.safe_load((ROOT / "tests/book/mutations.yaml").read_text())[path.stem]
        assert len(mutations) >= 3
        for mutation in mutations:
            text = (ROOT / mutation["file"]).read_text()
            assert text.count(mutation["find"]) == 1, mutation
            assert mutation["find"] != mutation["replace"]
            assert mutation["why"]


@pytest.fixture
def small_book(tmp_path):
    """A copy of the book's frame with one tiny chapter, for tests of the commands."""
    for name in ("tools", "adv", "_config.yml"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, tmp_path / name)
    (tmp_path / "book").mkdir()
    (tmp_path / "_toc.yml").write_text("format: jb-book\nroot: book/tiny\n")
    header = (ROOT / "book/geometry.md").read_text().split("---")[1]
    (tmp_path / "book/tiny.md").write_text(
        f"---{header}---\n\n# Tiny\n\n```{{code-cell}} ipython3\nvalue = 2\nprint(value + 2)\n```\n"
    )
    return tmp_path


def nbval(notebook: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "--nbval", "--nbval-current-env", "-q"]
    command += [str(notebook), "-p", "no:cacheprovider", f"--rootdir={notebook.parent}"]
    return subprocess.run(command, capture_output=True, text=True, cwd=notebook.parent)


def test_nbval_notices_an_altered_output(small_book):
    book.notebooks(small_book, [])
    stored = small_book / "book/tiny.ipynb"
    run = nbval(stored)
    assert run.returncode == 0, run.stdout
    notebook = nbformat.read(stored, as_version=4)
    notebook.cells[-1].outputs[0].text = "5\n"
    nbformat.write(notebook, stored)
    run = nbval(stored)
    assert run.returncode == 1
    assert "Cell outputs differ" in run.stdout


def test_a_failing_cell_is_named(small_book):
    chapter = small_book / "book/tiny.md"
    text = chapter.read_text() + "\n```{code-cell} ipython3\nvalue = 2\nvalue / 0\n```\n"
    chapter.write_text(text)  # two cells begin with the same line
    line = text.splitlines().index("value / 0")
    with pytest.raises(
        book.ChapterFailedError, match=rf"tiny.md, cell 3, line {line}: ZeroDivisionError: division"
    ):
        book.execute(chapter)


def test_a_chapter_is_executed_again_exactly_when_its_outputs_could_change(small_book):
    chapter = small_book / "book/tiny.md"

    def key():
        return book.chapter_key(book.read_chapter(chapter), book.fingerprint(small_book))

    first = key()
    chapter.write_text(chapter.read_text() + "\nMore prose.\n")
    assert key() == first
    for name in ("adv/__init__.py", "book/tiny.md"):
        before, text = key(), (small_book / name).read_text()
        (small_book / name).write_text(
            text.replace("value", "number") + "# changed\n" * ("adv" in name)
        )
        assert key() != before, name
    read = ("adv/weights/new.safetensors", "reproduce/paper/p.yaml", "reproduce/results/p-1.json")
    for name in (*read, "reproduce/results/exact/net.json", "reproduce/results/benchmark/net.json"):
        before = key()
        (small_book / name).parent.mkdir(parents=True, exist_ok=True)
        (small_book / name).write_bytes(b"x")
        assert key() != before, name
    record = small_book / "reproduce/results/p/digits/mlp/none/seed-1/train.json"
    record.parent.mkdir(parents=True)
    for named in (False, True):
        if named:
            text = chapter.read_text() + "\n`p/digits/mlp/none/seed-1` and `x/seed-0`\n"
            chapter.write_text(text)
        before = key()
        record.write_bytes(b"xy" if named else b"x")
        assert (key() != before) == named, "a single run's record counts where a chapter names it"


def test_chapters_name_the_records_of_single_runs_in_one_piece():
    for path in CHAPTERS:
        for line in filter(lambda line: "seed-" in line, path.read_text().splitlines()):
            (folder,) = book.RECORDS.findall(line)
            assert (ROOT / "reproduce/results" / folder).is_dir(), line


def test_a_chapter_is_executed_again_where_other_versions_are_installed(small_book, monkeypatch):
    def installed(*pairs):
        some = [SimpleNamespace(name=name, version=version) for name, version in pairs]
        monkeypatch.setattr("importlib.metadata.distributions", lambda: some)
        return book.fingerprint(small_book)

    first = installed(("torch", "2.6"), ("numpy", "2.0"))
    assert installed(("numpy", "2.0"), ("torch", "2.6")) == first
    assert installed(("torch", "2.7"), ("numpy", "2.0")) != first


def test_prose_that_changed_is_shown_with_the_outputs_of_the_same_code(small_book):
    chapter = small_book / "book/tiny.md"
    ran, _ = book.up_to_date(small_book, chapter, "outside")
    chapter.write_text("A new beginning.\n\n" + chapter.read_text())
    shown, _ = book.up_to_date(small_book, chapter, "outside")
    assert shown.cells[0].source.startswith("A new beginning.")
    assert [c.source for c in shown.cells] == [c.source for c in book.read_chapter(chapter).cells]
    outputs = [[c.outputs for c in one.cells if c.cell_type == "code"] for one in (ran, shown)]
    assert outputs[0] == outputs[1]
    assert any(outputs[0])


def test_a_build_that_was_stopped_does_not_break_the_next(small_book, monkeypatch):
    chapter, file = small_book / "book/tiny.md", small_book / "_build/executed/tiny.ipynb"
    executed = book.read_chapter(chapter)
    runs = []

    def execute(path):
        runs.append(path)
        return book.read_chapter(path), 1.0

    monkeypatch.setattr(book, "execute", execute)
    book.up_to_date(small_book, chapter, "outside")
    book.up_to_date(small_book, chapter, "outside")
    assert len(runs) == 1
    whole = file.read_bytes()
    for rest in (b"", whole[:200], b"{}"):
        file.write_bytes(rest)
        notebook, _ = book.up_to_date(small_book, chapter, "outside")
        assert notebook.cells == executed.cells
        assert file.read_bytes() == whole
    assert len(runs) == 4

    def stopped(notebook, partial):
        Path(partial).write_bytes(whole[:200])
        raise KeyboardInterrupt

    monkeypatch.setattr(book.nbformat, "write", stopped)
    with pytest.raises(KeyboardInterrupt):
        book.up_to_date(small_book, chapter, "elsewhere")
    with pytest.raises(KeyboardInterrupt):
        book.store(small_book, chapter, notebook)
    assert file.read_bytes() == whole
    assert not chapter.with_suffix(".ipynb").exists()


def test_the_launch_cell_follows_the_one_setting(small_book):
    assert book.launch_cell(small_book) == []
    config = small_book / "_config.yml"
    config.write_text(config.read_text().replace('url: ""', "url: https://github.com/some/where"))
    (cell,) = book.launch_cell(small_book)
    assert "adv[book] @ git+https://github.com/some/where@main" in cell.source
    book.notebooks(small_book, [])
    stored = nbformat.read(small_book / "book/tiny.ipynb", as_version=4)
    assert stored.cells[0].source == cell.source
    assert book.in_step(small_book / "book/tiny.md")
    assert nbval(small_book / "book/tiny.ipynb").returncode == 0


def test_what_is_printed_in_pieces_is_stored_whole():
    said = [("stdout", "a"), ("stdout", "b"), ("stderr", "c"), ("stdout", "d")]
    outputs = [nbformat.v4.new_output("stream", name=name, text=text) for name, text in said]
    outputs.insert(3, nbformat.v4.new_output("display_data", {"text/plain": "e"}))
    cells = [nbformat.v4.new_code_cell("", outputs=outputs), nbformat.v4.new_markdown_cell("")]
    notebook = nbformat.v4.new_notebook(cells=cells)
    book.merge_streams(notebook)
    texts = [output.get("text") for output in notebook.cells[0].outputs]
    assert texts == ["ab", "c", None, "d"]


def test_pages_made_by_another_extension_are_forgotten(tmp_path):
    page = tmp_path / "_build/.doctrees/book/tiny.doctree"

    def survives():
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_bytes(b"")
        book.forget_pages_of_other_tools(tmp_path)
        return page.exists()

    assert [survives(), survives()] == [False, True]
    (tmp_path / "_build/.tools").write_text("of another extension")
    assert not survives()


def test_conda_takes_its_versions_from_the_shared_files():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    (requirements,) = [d["pip"] for d in environment["dependencies"] if isinstance(d, dict)]
    assert requirements == ["-c constraints.txt", "-e .[book,test]"]


def test_constraints_pin_every_requirement_once():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line[0] != "#"]
    names = [re.sub(r"[-_.]+", "-", line.split("==")[0]).lower() for line in lines]
    assert len(names) == len(set(names))
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    text = (ROOT / "pyproject.toml").read_text()
    wanted = set(re.findall(r'^    "([\w-]+)[><=]', text, flags=re.M))
    assert wanted <= set(names), wanted - set(names)


def test_what_is_installed_admits_the_oldest_python():
    """The first 3.11, which some systems have: a pin may ask for a later patch."""
    asked = {d.metadata["Name"]: d.metadata.get("Requires-Python") for d in distributions()}
    late = {name: how for name, how in asked.items() if how and "3.11.0" not in SpecifierSet(how)}
    assert not late


def test_the_api_page_lists_every_module():
    named = set(re.findall(r"automodule:: (adv[\w.]*)", (ROOT / "book/api.md").read_text()))
    files = [p for p in (ROOT / "adv").rglob("*.py") if not p.stem.startswith("_")]
    modules = {".".join(p.relative_to(ROOT).with_suffix("").parts) for p in files}
    assert modules <= named
