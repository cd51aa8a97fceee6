"""Execute the chapters, store their outputs, and build the site.

    python tools/book.py build                  execute what changed, then build _build/html
    python tools/book.py notebooks [NAME ...]   execute afresh and store the outputs in book/*.ipynb
    python tools/book.py site [FOLDER]          build from the stored outputs, executing nothing

A chapter is ``book/NAME.md``; ``book/NAME.ipynb`` is the same chapter with its outputs. Neither
jupyter-cache nor Sphinx notices a change of the module, the weights or the installed versions, so
the executed notebooks are kept here, under ``_build/executed``, each with a fingerprint of all that
its outputs depend on. Sphinx then finds them in a jupyter-cache and executes nothing itself.
"""

import argparse
import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jupytext
import nbformat
import yaml
from jupyter_cache import get_cache
from jupyter_cache.base import CacheBundleIn
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode

from adv.lab.files import replacing

ROOT = Path(__file__).resolve().parent.parent
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
CELL_TIMEOUT = 600  # seconds
# The networks are small: two threads gain a tenth of the time on a quiet machine, and take seven
# times as long where they wait for each other: another program keeps a core busy, or a container
# has few of the cores that it sees. Whoever sets the variable gets what it says.
THREADS = {"OMP_NUM_THREADS": "1"}
LAUNCH_TAG = "launch"  # the cell that installs adv on Colab and Binder; only in stored notebooks

# What a chapter's outputs depend on beside its own cells.
INPUTS = ("adv", "reproduce/paper", "reproduce/results")
RECORDS = re.compile(r"[\w./-]+/seed-\d+")  # folders of single runs: those that chapters name


class BookError(Exception):
    """The book could not be made; the message says why."""


class ChapterFailedError(BookError):
    """A cell of a chapter raised; the message names chapter, cell, line and error."""


def toc_files(root: Path) -> list[Path]:
    """The book's pages, in the order of the table of contents."""

    def walk(node: object) -> Iterator[str]:
        if isinstance(node, dict):
            for key, value in node.items():
                if key in ("root", "file"):
                    yield str(value)
                else:
                    yield from walk(value)
        elif isinstance(node, list):
            for item in node:
                yield from walk(item)

    toc = yaml.safe_load((root / "_toc.yml").read_text("utf-8"))
    return [root / f"{name}.md" for name in walk(toc)]


def chapters(root: Path) -> list[Path]:
    """Those pages that have code cells."""
    return [p for p in toc_files(root) if p.exists() and "{code-cell}" in p.read_text("utf-8")]


def read_chapter(path: Path) -> NotebookNode:
    """A chapter's source as a notebook without outputs; ids and metadata are reproducible."""
    notebook = jupytext.read(path, fmt="md:myst")
    for number, cell in enumerate(notebook.cells):
        digest = hashlib.sha256(cell.source.encode()).hexdigest()[:8]
        cell.id = f"{number:03d}-{digest}"
    notebook.metadata = nbformat.from_dict(
        {"jupytext": {"formats": "ipynb,md:myst"}, "kernelspec": KERNEL}
    )
    notebook.nbformat_minor = 5
    return notebook


def fingerprint(root: Path) -> str:
    """Hash of everything outside a chapter that its outputs depend on."""
    digest = hashlib.sha256(sys.version.encode())
    installed = {f"{one.name}=={one.version}" for one in importlib.metadata.distributions()}
    digest.update("\0".join(sorted(installed)).encode())
    named = set().union(*(RECORDS.findall(p.read_text("utf-8")) for p in chapters(root)))
    for name in INPUTS:
        top = root / name
        files = sorted(top.rglob("*")) if top.is_dir() else [top]
        for file in files:
            folder = file.parent.as_posix()
            if RECORDS.search(folder) and not folder.endswith(tuple(named)):
                continue
            if file.is_file() and "__pycache__" not in file.parts:
                digest.update(f"{file.relative_to(root)}\0".encode())
                digest.update(file.read_bytes())
    return digest.hexdigest()


def chapter_key(notebook: NotebookNode, outside: str) -> str:
    """Hash of a chapter's code and of what it depends on; prose and captions don't count."""
    digest = hashlib.sha256(outside.encode())
    for cell in notebook.cells:
        if cell.cell_type == "code":
            digest.update(f"{cell.source}\0".encode())
    return digest.hexdigest()


def failure(path: Path, notebook: NotebookNode, error: Exception) -> ChapterFailedError:
    """Say which chapter, cell and line failed, with the error and the cell's source."""
    failed = next(
        (
            (number, cell)
            for number, cell in enumerate(notebook.cells, 1)
            if cell.cell_type == "code" and any(o.output_type == "error" for o in cell.outputs)
        ),
        None,
    )
    if failed is None:  # a time-out or a dead kernel leaves no error output
        return ChapterFailedError(f"{path.name}: {type(error).__name__}: {error}")
    number, cell = failed
    output = next(o for o in cell.outputs if o.output_type == "error")
    before, found, _ = path.read_text("utf-8").partition(cell.source)
    line = before.count("\n") + 1 if found else 0
    code = "\n".join(f"    {text}" for text in cell.source.splitlines())
    return ChapterFailedError(
        f"{path.name}, cell {number}, line {line}: {output.ename}: {output.evalue}\n\n{code}\n"
    )


def execute(path: Path, *, workdir: Path | None = None) -> tuple[NotebookNode, float]:
    """Run a chapter from its first cell to its last.

    Args:
        path: the chapter's source.
        workdir: where the kernel starts; the chapter's folder unless told.

    Returns:
        The executed notebook and the seconds it took, the kernel's start included.

    Raises:
        ChapterFailedError: a cell raised, ran out of time, or the kernel died.
    """
    notebook = read_chapter(path)
    client = NotebookClient(
        notebook,
        timeout=CELL_TIMEOUT,
        kernel_name=KERNEL["name"],
        record_timing=False,
        extra_arguments=["--log-level=ERROR"],  # or each kernel warns that TCP is not encrypted
        resources={"metadata": {"path": str(workdir or path.parent)}},
    )
    start = time.perf_counter()
    try:
        client.execute(env={**THREADS, **os.environ, "TQDM_DISABLE": "1", "PYTHONHASHSEED": "0"})
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        raise failure(path, notebook, error) from None
    seconds = time.perf_counter() - start
    notebook.metadata.pop("language_info", None)  # the interpreter's patch version would churn
    merge_streams(notebook)
    return notebook, seconds


def merge_streams(notebook: NotebookNode) -> None:
    """Put together what a kernel printed in pieces, whose borders hang on the machine's load."""
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        merged: list[NotebookNode] = []
        for output in cell.outputs:
            before = merged[-1] if merged else {}
            if output.output_type == "stream" and before.get("name") == output.name:
                before["text"] += output.text
            else:
                merged.append(output)
        cell.outputs = merged


def repository(root: Path) -> dict[str, str]:
    """The ``repository`` setting of ``_config.yml``: url and branch."""
    return yaml.safe_load((root / "_config.yml").read_text("utf-8")).get("repository") or {}


def launch_cell(root: Path) -> list[NotebookNode]:
    """The cell that installs adv where a notebook is opened without it; none without an address."""
    url = repository(root).get("url")
    if not url:
        return []
    branch = repository(root).get("branch", "main")
    source = (
        "# On Colab or Binder: install the book's module first.\n"
        "import importlib.util\n\n"
        'if importlib.util.find_spec("adv") is None:\n'
        f'    %pip install -q "adv[book] @ git+{url}@{branch}"'
    )
    cell = nbformat.v4.new_code_cell(source, id="launch", metadata={"tags": [LAUNCH_TAG]})
    return [cell]


def read_stored(path: Path) -> NotebookNode:
    """The stored twin of a chapter, without the launch cell."""
    notebook = nbformat.read(path.with_suffix(".ipynb"), as_version=4)
    notebook.cells = [c for c in notebook.cells if LAUNCH_TAG not in c.metadata.get("tags", [])]
    return notebook


def in_step(path: Path) -> bool:
    """Whether the stored notebook has the chapter's cells, in order."""
    if not path.with_suffix(".ipynb").exists():
        return False
    source, stored = read_chapter(path), read_stored(path)
    return [(c.cell_type, c.source) for c in source.cells] == [
        (c.cell_type, c.source) for c in stored.cells
    ]


def store(root: Path, path: Path, notebook: NotebookNode) -> None:
    """Write the executed notebook beside its chapter, with the launch cell where there is one."""
    notebook.cells = launch_cell(root) + notebook.cells
    write(notebook, path.with_suffix(".ipynb"))


def write(notebook: NotebookNode, file: Path) -> None:
    """Write a notebook that is whole or not there, however the program ends."""
    with replacing(file) as draft:
        nbformat.write(notebook, draft)


def seed_cache(folder: Path, notebooks: dict[Path, NotebookNode]) -> None:
    """Make a jupyter-cache that holds exactly these executed notebooks."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    cache = get_cache(str(folder))
    for path, notebook in notebooks.items():
        cache.cache_notebook_bundle(
            CacheBundleIn(notebook, str(path)), check_validity=False, overwrite=True
        )


def sphinx(root: Path, out: Path, config: Path | None = None) -> Path:
    """Build the site under ``out/_build/html``; any warning fails the build."""
    log = out / "_build" / "sphinx.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [str(Path(sys.executable).with_name("jupyter-book")), "build", str(root)]
    command += ["--path-output", str(out), "-n", "-W", "--keep-going", "-q"]
    if config is not None:
        command += ["--config", str(config)]
    with log.open("w", encoding="utf-8") as stream:
        run = subprocess.run(command, cwd=root, stdout=stream, stderr=subprocess.STDOUT)
    text = log.read_text("utf-8", errors="replace")
    if run.returncode or "Executing notebook" in text:
        raise BookError(f"{text}\nThe site could not be built (exit code {run.returncode}).")
    return out / "_build" / "html"


def publish(root: Path, out: Path, notebooks: dict[Path, NotebookNode], **kwargs: Path) -> Path:
    """Build the site from executed notebooks, which readers can download beside each page."""
    seed_cache(out / "_build" / ".jupyter_cache", notebooks)
    forget_pages_of_other_tools(out)
    html = sphinx(root, out, **kwargs)
    downloads = html / "_downloads"
    downloads.mkdir(exist_ok=True)
    for path, notebook in notebooks.items():
        nbformat.write(notebook, downloads / f"{path.stem}.ipynb")
    return html


def forget_page(out: Path, path: Path) -> None:
    """Make Sphinx read a page again whose outputs changed while its source did not."""
    (out / "_build" / ".doctrees" / path.parent.name / f"{path.stem}.doctree").unlink(
        missing_ok=True
    )


def forget_pages_of_other_tools(out: Path) -> None:
    """Make Sphinx read all pages again where our extension changed, which it does not notice."""
    code = [Path(__file__).with_name(name).read_bytes() for name in ("adv_book.py", "ledger.py")]
    digest, mark = hashlib.sha256(b"".join(code)).hexdigest(), out / "_build" / ".tools"
    if not mark.exists() or mark.read_text("utf-8") != digest:
        shutil.rmtree(out / "_build" / ".doctrees", ignore_errors=True)
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.write_text(digest, "utf-8")


def read_executed(file: Path, key: str, page: NotebookNode) -> tuple[NotebookNode, float] | None:
    """A chapter with the outputs of its execution, and its seconds; None if none has this key.

    The key is of the code; prose and captions are the page's, and may have changed since.
    """
    try:
        notebook = nbformat.read(file, as_version=4)
        mark = notebook.metadata.pop("adv")
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, nbformat.ValidationError):  # damaged: executed again
        file.unlink()
        return None
    if mark["key"] != key:
        return None
    ran = (cell for cell in notebook.cells if cell.cell_type == "code")
    for cell in page.cells:
        if cell.cell_type == "code":
            done = next(ran)
            cell.outputs, cell.execution_count = done.outputs, done.execution_count
    notebook.cells = page.cells
    return notebook, mark["seconds"]


def up_to_date(
    root: Path, path: Path, outside: str, *, afresh: bool = False
) -> tuple[NotebookNode, float]:
    """The executed chapter and its seconds; executed now where its fingerprint has changed."""
    file = root / "_build" / "executed" / f"{path.stem}.ipynb"
    page = read_chapter(path)
    key = chapter_key(page, outside)
    if not afresh and (executed := read_executed(file, key, page)) is not None:
        print("unchanged", flush=True)
        return executed
    notebook, seconds = execute(path)
    print(f"executed in {seconds:5.1f} s", flush=True)
    notebook.metadata["adv"] = {"key": key, "seconds": round(seconds, 1)}
    write(notebook, file)
    notebook.metadata.pop("adv")
    forget_page(root, path)
    return notebook, seconds


def build(root: Path) -> None:
    """``make book``: execute what changed, build the site, print times and the page to open."""
    outside, notebooks, rows = fingerprint(root), {}, []
    pages = chapters(root)
    for number, path in enumerate(pages, 1):
        print(f"[{number}/{len(pages)}] {path.stem:<20}", end=" ", flush=True)
        notebooks[path], seconds = up_to_date(root, path, outside)
        rows.append((path.stem, seconds))
    print("building the site ...", flush=True)
    html = publish(root, root, notebooks)
    print("\nchapter               seconds")
    for name, seconds in rows:
        print(f"{name:<20} {seconds:8.1f}")
    total = sum(seconds for _, seconds in rows)
    print(f"{'all':<20} {total:8.1f}   ({total / max(len(rows), 1):.1f} on average)")
    print(f"\nOpen {html / 'book' / 'index.html'}")


def notebooks(root: Path, names: list[str]) -> None:
    """``make notebooks``: execute chapters afresh and store their outputs."""
    pages = [p for p in chapters(root) if not names or p.stem in names]
    unknown = set(names) - {p.stem for p in pages}
    if unknown:
        raise BookError(f"no chapter named {', '.join(sorted(unknown))}")
    outside = fingerprint(root)
    for number, path in enumerate(pages, 1):
        print(f"[{number}/{len(pages)}] {path.stem:<20}", end=" ", flush=True)
        notebook, _ = up_to_date(root, path, outside, afresh=True)
        store(root, path, notebook)


def site(root: Path, out: Path, config: Path | None = None) -> Path:
    """Build the site from the stored notebooks into ``out``, executing nothing."""
    pages = chapters(root)
    stale = [p.stem for p in pages if not in_step(p)]
    if stale:
        raise BookError(f"run `make notebooks`: out of step with its .md: {', '.join(stale)}")
    for path in pages:
        forget_page(out, path)
    extra = {} if config is None else {"config": config}
    return publish(root, out, {p: read_stored(p) for p in pages}, **extra)


def main() -> None:
    """Run one of the commands above."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("build", help="execute what changed, then build _build/html")
    stored = commands.add_parser("notebooks", help="execute afresh and store the outputs")
    stored.add_argument("names", nargs="*", metavar="NAME", help="chapters; all unless named")
    page = commands.add_parser("site", help="build from the stored outputs")
    page.add_argument("folder", nargs="?", type=Path, default=ROOT / "_build" / "stored")
    arguments = parser.parse_args()
    try:
        if arguments.command == "build":
            build(ROOT)
        elif arguments.command == "notebooks":
            notebooks(ROOT, arguments.names)
        else:
            print(site(ROOT, arguments.folder.resolve()))
    except BookError as error:
        sys.exit(f"\nFAILED {error}")


if __name__ == "__main__":
    main()
