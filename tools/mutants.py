"""Break the code on purpose: does each chapter notice?

    python tools/mutants.py [CHAPTER ...]

``tests/book/mutations.yaml`` lists, for each chapter, one-line changes of its own code or of
``adv``. Each is applied to a copy of the project, the chapter is executed there, and must stop
with a claim that does not hold. A change that the chapter survives is a claim that cannot fail.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

import book

COPIED = ("adv", "book", "reproduce", "tools", "_config.yml", "_toc.yml", "constraints.txt")


def copy_project(target: Path) -> None:
    """Lay out what a chapter needs to run."""
    for name in COPIED:
        source = book.ROOT / name
        if source.is_dir():
            shutil.copytree(
                source, target / name, ignore=shutil.ignore_patterns("__pycache__", "*.ipynb")
            )
        elif source.exists():
            shutil.copy(source, target / name)


def outcome(chapter: str, mutation: dict[str, str]) -> tuple[bool, str]:
    """Apply one change and run the chapter: whether a claim caught it, and what was said."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder)
        copy_project(target)
        file = target / mutation["file"]
        text = file.read_text()
        if text.count(mutation["find"]) != 1:
            return False, f"the text to change occurs {text.count(mutation['find'])} times"
        file.write_text(text.replace(mutation["find"], mutation["replace"]))
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


def main() -> None:
    """Run all mutations of the chapters named, two at a time."""
    names = sys.argv[1:]
    mutations = yaml.safe_load((book.ROOT / "tests/book/mutations.yaml").read_text())
    jobs = [(c, m) for c, ms in mutations.items() for m in ms if not names or c in names]
    with ThreadPoolExecutor(max_workers=2) as pool:
        results = list(pool.map(lambda job: outcome(*job), jobs))
    failed = 0
    for (chapter, mutation), (caught, said) in zip(jobs, results, strict=True):
        failed += not caught
        print(f"{'caught ' if caught else 'MISSED '} {chapter}: {mutation['why']}\n         {said}")
    print(f"{len(jobs) - failed} of {len(jobs)} mutations caught by a claim")
    sys.exit(failed > 0 or not jobs)


if __name__ == "__main__":
    main()
