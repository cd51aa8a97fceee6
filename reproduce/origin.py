"""Where and with what a result was computed: device, versions of packages, commit."""

import importlib.metadata
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from adv.lab import device
from reproduce.plan import ROOT

__all__ = ["provenance"]


def provenance(
    files: Iterable[Path] = (), *, packages: Iterable[str] = (), place: torch.device | None = None
) -> dict[str, Any]:
    """What to store beside a result.

    Args:
        files: the code that made it.
        packages: what it rests on beside Python, PyTorch, numpy and this module; None stands for
            the version of one that is not installed.
        place: the device; by default the one that ``lab.device`` chooses.

    Returns:
        ``device`` (type, name, threads), ``versions``, ``commit``, and ``modified``: which of the
        files differed from it, or weren't in it; None where none were asked about. The last two
        are None outside a repository, and where there is no git.
    """
    place = device() if place is None else place
    name = torch.cuda.get_device_name(place) if place.type == "cuda" else platform.machine()
    versions = {one: _version(one) for one in ("adv", "numpy", *packages)}
    return {
        "device": {"type": place.type, "name": name, "threads": torch.get_num_threads()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__, **versions},
        "commit": _git("rev-parse", "HEAD"),
        "modified": _modified(list(files)),
    }


def _modified(files: list[Path]) -> list[str] | None:
    if not files:
        return None
    changed = _git("diff", "--name-only", "HEAD", "--", *files)
    unknown = _git("ls-files", "--others", "--full-name", "--", *files)
    if changed is None or unknown is None:
        return None
    return [*changed.splitlines(), *unknown.splitlines()]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str | Path) -> str | None:
    try:
        done = subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True)
    except OSError:  # no git on this machine
        return None
    return done.stdout.strip() if done.returncode == 0 else None
