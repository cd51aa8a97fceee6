"""Files that programs share: whole or not there, changed by one at a time, known by a digest."""

import hashlib
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["held", "replacing", "sha256"]


@contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """A file beside ``path`` to write into, which takes its place when it is complete.

    Its name is its own: two processes that write the same file do not share the draft. Where the
    block raises, the draft is deleted and ``path`` is as it was.

    Args:
        path: the file; its folder is made where there is none.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        yield draft
        with draft.open("rb+") as file:
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def held(folder: Path | str) -> Iterator[None]:
    """Let no other process that asks for this too change the files of a folder meanwhile.

    For moments: what is there is read again, added to and written. Where the system or the folder
    has no locks, there is none.

    Args:
        folder: made where there is none.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network folders have no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def sha256(path: Path | str) -> str:
    """The SHA-256 digest of a file, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
