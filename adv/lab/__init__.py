"""What an experiment needs around a method: data, models, training, measurement, figures."""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["device", "known"]

FEW = 12
"""Names of which a message lists all."""


def device() -> "torch.device":
    """The fastest device at hand: CUDA, then Apple's MPS, then the CPU."""
    import torch  # here, so that reproduce's plans, which compute nothing, start at once

    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def known(given: str, names: Iterable[str], where: str) -> str:
    """What to say after "no network x; ": all names where they are few, else the closest.

    Args:
        given: what was asked for.
        names: those that there are.
        where: what lists them all, such as ``"adv info"``.
    """
    names = list(names)
    if len(names) <= FEW:
        return f"there are {', '.join(names)}"
    close = get_close_matches(given.lower(), names, n=5, cutoff=0.4)
    nearest = f"closest: {', '.join(close)}; " if close else ""
    return f"{nearest}{where} lists all {len(names)}"
