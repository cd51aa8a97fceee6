"""What command lines have in common: names separated by commas, and errors in one line."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress

__all__ = ["friendly", "listed", "refuse_unknown"]


def listed(text: str) -> tuple[str, ...]:
    """Names separated by commas; none of an empty text."""
    return tuple(filter(None, (name.strip() for name in text.split(","))))


def refuse_unknown(
    given: Iterable[str], names: Iterable[str], what: str, *, where: str = ""
) -> None:
    """Check names.

    Args:
        given: the names that a command line has.
        names: those that there are.
        what: what they are names of, such as ``"norm"``.
        where: what lists them, if they are too many for a message.

    Raises:
        ValueError: a name that there isn't; the message tells those that there are, or of many
            only the closest.
    """
    names = list(names)
    if unknown := [name for name in given if name not in names]:
        there = f"there are {', '.join(names)}"
        if where:
            from adv.lab import known  # takes seconds: PyTorch

            there = known(unknown[0], names, where)
        raise ValueError(f"no {what} {', '.join(unknown)}; {there}")


@contextmanager
def friendly(program: str) -> Iterator[None]:
    """End the program with a line, not a traceback, where settings, data or folders are wrong."""
    with suppress(AttributeError):  # a terminal may lack characters of the tables
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        yield
    except (ValueError, OSError) as error:
        sys.exit(f"{program}: {error}")
