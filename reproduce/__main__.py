"""Make tables and figures of the papers: ``python -m reproduce [NAME ...]``, or ``make reproduce``.

Says what is missing and what will run, and how long that may take; then lets Snakemake do it.
"""

import argparse
import fcntl
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import quote

from reproduce.files import read
from reproduce.items import Item, Run
from reproduce.options import friendly, refuse_unknown
from reproduce.plan import ROOT, Plan, Task

HERE = Path(__file__).resolve().parent


def main(arguments: list[str] | None = None) -> int:
    """Run the workflow; return Snakemake's exit status."""
    given = _parser().parse_args(arguments)
    with friendly("reproduce"):
        return make(given)


def make(given: argparse.Namespace) -> int:
    """What the command line asks for."""
    plan = Plan.given(given)
    if given.list:
        print("\n".join(plan.items))
        return 0
    plan.check()
    items = [plan.item(name) for name in dict.fromkeys(given.names or plan.items)]
    cells = [cell for item in items for cell in item.cells.values()]
    refuse_unknown(plan.only, sorted({cell.model for cell in cells}), "network")
    refuse_unknown(plan.skip, sorted({cell.attack for cell in cells}), "attack")
    tasks = plan.tasks(items)
    print(report(plan, items, tasks), flush=True)
    with place(plan.work, given.dry) as (folder, locks):
        if not given.dry:
            for task in tasks:  # points that a killed run left may be of other settings
                if isinstance(task.subject, Run):
                    plan.points(task.subject).unlink(missing_ok=True)
        line = command(plan, items, tasks, given, folder)
        status = launch(line, locks)
    if status == 0 and not given.dry:
        from reproduce.summary import show  # takes seconds: PyTorch

        for item in items:
            if (content := read(plan.output(item))) is not None:
                print("\n" + show(content))
    return status


def report(plan: Plan, items: list[Item], tasks: list[Task]) -> str:
    """What is missing, what will run and why, and an estimate of the time."""
    lines = []
    networks = {(item.paper, cell.model): cell for item in items for cell in item.cells.values()}
    for (paper, model), cell in networks.items():
        datasets = plan.paper(paper)["networks"][model]["data"]
        used = next((run.network.dataset for run in plan.runs(cell)), datasets[0])
        if not plan.available(used):
            lines.append(f"no data for {model} of {paper}: {' or '.join(datasets)}")
        elif used != datasets[0]:
            lines.append(f"no {datasets[0]} for {model} of {paper}: {used} instead")
    for task in tasks:
        seconds = "?" if math.isnan(task.seconds) else f"{task.seconds:.0f}"
        lines.append(f"{task!s:<90}  {seconds:>8} s")
    total = sum(task.seconds for task in tasks if not math.isnan(task.seconds))
    unknown = sum(math.isnan(task.seconds) for task in tasks)
    lines.append(
        f"{len(tasks)} trainings and attacks to run: about {duration(total)} one after the other"
        + (f", and {unknown} whose time isn't known yet" if unknown else "")
    )
    return "\n".join(lines)


def command(
    plan: Plan, items: list[Item], tasks: list[Task], given: argparse.Namespace, folder: Path
) -> list[str]:
    """Snakemake's command line; ``folder`` is where it keeps its own files."""
    profile = HERE / "profiles" / given.profile
    line = [sys.executable, "-m", "snakemake", "--snakefile", str(HERE / "Snakefile")]
    line += ["--profile", str(profile if profile.is_dir() else given.profile)]
    line += ["--directory", str(folder)]
    # The records tell what changed, also after a checkout, of which Snakemake knows nothing.
    line += ["--rerun-triggers", "input", "--rerun-incomplete", "--nolock"]
    there = [name for name in plan.mentioned() if plan.available(name)]
    forced = [plan.output(item) for item in items]
    forced += [plan.record(task.subject) for task in tasks]
    line += ["--forcerun", *(str(path) for path in forced if path.is_file())]
    # Snakemake reads a value as YAML, in which " #" and ": " mean something, and quotes it for the
    # shell of each step as Python does: so a folder goes without such characters.
    folders = {name: quote(str(getattr(plan, name))) for name in ("settings", "results", "work")}
    line += ["--config", *(f"{name}={folder}" for name, folder in folders.items())]
    line += [f"{key}={' '.join(getattr(plan, key))}" for key in ("only", "skip")]
    line += [f"datasets={' '.join(there)}"]
    line += ["--cores", given.cores] if given.cores else []
    # What would run has been said; its header and its two tables of jobs say no more.
    line += ["--dry-run", "--quiet", "rules", "progress", "host"] if given.dry else []
    return [*line, *given.snakemake, "--", *(str(plan.output(item)) for item in items)]


@contextmanager
def place(work: Path, dry: bool) -> Iterator[tuple[Path, list[int]]]:
    """Snakemake's folder and the locks it holds: a dry run needs none, and makes no folders."""
    if not dry:
        with alone(work) as lock:
            yield work, [lock]
    elif work.is_dir():
        yield work, []
    else:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder), []


@contextmanager
def alone(work: Path) -> Iterator[int]:
    """Hold the lock of a folder, which, unlike Snakemake's, ends with the processes that hold it.

    Yields the descriptor that a process started here needs to hold it as well.
    """
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(f"another run holds {work / 'lock'}; wait for it, or choose another --work")
        except OSError:  # some clusters' folders have no locks
            print(f"no locks in {work}: start no other run there", file=sys.stderr)
        yield file.fileno()


def launch(line: list[str], locks: list[int]) -> int:
    """Run Snakemake and return its status; Ctrl+C, which it gets too, leaves it time to end."""
    with subprocess.Popen(line, cwd=ROOT, pass_fds=locks) as process:
        while True:
            with suppress(KeyboardInterrupt):
                return process.wait()


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m reproduce", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="such as convex-3; default: all")
    parser.add_argument("--list", action="store_true", help="print all names, and end")
    parser.add_argument("--dry", action="store_true", help="only show what would run")
    parser.add_argument("--profile", default="local", help="local, slurm, or a profile's folder")
    parser.add_argument("--cores", default=os.environ.get("CORES", ""), help="jobs at a time")
    Plan.options(parser)
    parser.add_argument(
        "--snakemake", nargs=argparse.REMAINDER, default=[], help="all that follows goes to it"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
