"""Break the code on purpose: does each chapter notice?

    python tools/mutants.py [CHAPTER ...]

``tests/book/mutations.yaml`` lists, for each chapter, one-line changes of its own code or of
``adv``. Each is applied to a copy of the project, the chapter is executed there, and must stop
with a claim that does not hold. A change that the chapter survives is a claim that cannot fail.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path

import yaml

import book

COPIED = ("adv", "book", "reproduce", "tools", "_config.yml", "_toc.yml")


def copy_project(target: Path) -> None:
    """Lay out what a chapter needs to run."""
    # The work of paper-scale runs may be large, and no chapter reads it.
    ignored = shutil.ignore_patterns("__pycache__", "*.ipynb", "work")
    for name in COPIED:
        source = book.ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=ignored)
        elif source.exists():
            shutil.copy(source, target / name)


def outcome(chapter: str, mutation: dict[str, str]) -> tuple[bool, str]:
    """Apply one change and run the chapter: whether a claim caught it, and what was said."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder)
        copy_project(target)
        file = target / mutation["file"]
        text = file.read_text("utf-8")
        if text.count(mutation["find"]) != 1:
            return False, f"the text to change occurs {text.count(mutation['find'])} times"
        file.write_text(text.replace(mutation["find"], mutation["replace"]), "utf-8")
        code = (
            "import sys; sys.path.insert(0, 'tools'); import book; from pathlib import Path; "
            f"book.execute(Path('book/{chapter}.md'))"
        )
        run = subprocess.run(
            [sys.executable, "-c", code],
            cwd=target,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(target), "OMP_NUM_THREADS": "1"},
        )
    if run.returncode == 0:
        return False, "survived: the chapter ran to its end"
    said = re.search(r"cell \d+, line \d+: (\w+): ([^\n]*)", run.stderr)
    if said is None:
        return False, run.stderr[-500:]
    caught = said[1] == "AssertionError" and said[2].endswith("(does not hold)")
    return caught, said[2] if caught else f"stopped by {said[1]}, not by a claim: {said[2]}"


@contextmanager
def cancelling(pool: ThreadPoolExecutor) -> Iterator[None]:
    """Where the block is left early, as by Ctrl+C, begin no more of what waits."""
    try:
        yield
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def main() -> None:
    """Run all mutations of the chapters named, two at a time."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="CHAPTER", help="all unless named")
    names = parser.parse_args().names
    mutations = yaml.safe_load((book.ROOT / "tests/book/mutations.yaml").read_text("utf-8"))
    if unknown := [name for name in names if name not in mutations]:
        sys.exit(f"no mutations of {', '.join(unknown)}; there are {', '.join(mutations)}")
    jobs = [(c, m) for c, ms in mutations.items() for m in ms if not names or c in names]
    failed = 0
    with ThreadPoolExecutor(max_workers=2) as pool, cancelling(pool):
        waiting = {pool.submit(outcome, *job): job for job in jobs}
        for one in as_completed(waiting):
            (chapter, mutation), (caught, said) = waiting[one], one.result()
            failed += not caught
            print(f"{'caught ' if caught else 'MISSED '} {chapter}: {mutation['why']}")
            print(f"         {said}", flush=True)
    print(f"{len(jobs) - failed} of {len(jobs)} mutations caught by a claim")
    sys.exit(failed > 0 or not jobs)


if __name__ == "__main__":
    main()
