"""Changes of code that leave every result as it was, so that records made before them stand.

A digest changes with any edit of the code, also with one that only refuses bad input or names a
thing better. ``unchanged.json`` lists such edits: what was done and how it was checked, and each
digest before and after; ``versions.same`` reads it. ``python -m reproduce.unchanged COMMIT "what,
and how checked"`` adds what has changed since a commit. First run all notebooks: where one gives
another text, the edit isn't of this kind.
"""

import argparse
import io
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from reproduce import versions
from reproduce.files import read, write_json
from reproduce.options import friendly
from reproduce.plan import Plan

__all__ = ["add", "main"]


def add(commit: str, reason: str, names: Iterable[str], file: Path = versions.UNCHANGED) -> int:
    """Vouch for what has changed in some definitions since a commit.

    Args:
        commit: as git names it.
        reason: what was done, and how it was checked that no result changes.
        names: as ``versions.digest`` takes them.
        file: to add to.

    Returns:
        How many of the definitions have changed.

    Raises:
        ValueError: no such commit, or none has.
    """
    names = sorted(set(names))
    now = _digests(names)
    with _checked_out(commit) as folder, versions.rooted(folder):
        then = _digests(names)
    digests = {n: [then[n], now[n]] for n in now if then.get(n, now[n]) != now[n]}
    if not digests:
        raise ValueError(f"no code of a record has changed since {commit}")
    changes = (read(file) or {"changes": []})["changes"]
    write_json(file, {"changes": [*changes, {"change": reason, "digests": digests}]})
    return len(digests)


def _digests(names: Iterable[str]) -> dict[str, str]:
    """Today's, of those that there are."""
    found = {}
    for name in names:
        try:
            found[name] = versions.digest(name)
        except ValueError:  # at an earlier commit
            continue
    return found


@contextmanager
def _checked_out(commit: str) -> Iterator[Path]:
    """The code as it was, in a folder of its own."""
    command = ["git", "archive", commit, *versions.PACKAGES]
    made = subprocess.run(command, cwd=versions.ROOT, capture_output=True, check=False)
    if made.returncode:
        raise ValueError(f"no code at {commit}: {made.stderr.decode().strip()}")
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(made.stdout)) as archive:
            archive.extractall(folder, filter="data")
        yield Path(folder)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    about = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m reproduce.unchanged", description=about)
    parser.add_argument("commit", help="before the change")
    parser.add_argument("reason", help="what was done, and how it was checked")
    given = parser.parse_args(arguments)
    with friendly("reproduce.unchanged"):
        records = (read(path) for path in Plan().results.rglob("*.json"))
        code = (record.get("code") for record in records if isinstance(record, dict))
        names = {name for one in code if isinstance(one, dict) for name in one}
        print(f"{add(given.commit, given.reason, names)} digests")


if __name__ == "__main__":
    main()
