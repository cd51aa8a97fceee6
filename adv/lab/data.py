"""Data sets as tensors: one loader, fixed splits, files checked before they are used."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

__all__ = ["Data", "Split", "load", "names"]


@dataclass(frozen=True)
class Split:
    """One part of a data set.

    ``split[index]`` selects by a slice, a mask or a tensor of indices, and is a ``Split`` again.

    Args:
        x: (N, C, H, W) images, float32 in [0, 1].
        y: (N,) labels.
        exact: (N,) False where a sample is a lossy copy of the original; None where all are exact.
    """

    x: Float[Tensor, "N C H W"]
    y: Int64[Tensor, " N"]
    exact: Bool[Tensor, " N"] | None = None

    def __post_init__(self) -> None:
        if self.x.ndim != 4 or self.y.shape != self.x.shape[:1]:
            raise ValueError(
                f"a split takes images (N, C, H, W) and labels (N,), not {tuple(self.x.shape)} "
                f"and {tuple(self.y.shape)}"
            )

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: slice | Tensor) -> "Split":
        if not isinstance(index, slice | Tensor) or (isinstance(index, Tensor) and not index.ndim):
            raise TypeError(f"a split is indexed by a slice or a 1-d tensor, not {index!r}")
        return Split(*(None if part is None else part[index] for part in self._parts()))  # type: ignore[arg-type]

    def take(self, n: int) -> "Split":
        """The first ``n`` samples; ``ValueError`` where there are fewer."""
        if not 1 <= n <= len(self):
            raise ValueError(
                f"take({n}) from a split of {len(self)} samples: 1 <= n <= {len(self)}"
            )
        return self[:n]

    def to(self, device: torch.device | str) -> "Split":
        """The same samples on ``device``."""
        return Split(*(None if part is None else part.to(device) for part in self._parts()))  # type: ignore[arg-type]

    def _parts(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.x, self.y, self.exact


@dataclass(frozen=True)
class Data:
    """A data set: three disjoint parts, and what it is.

    Args:
        name: the name it was loaded by.
        train: samples to fit on.
        val: samples to choose settings on.
        test: samples to report on.
        classes: name of each label.
        note: origin, split and whatever a reader of results must know.
        complete: whether this is the whole published data set.
    """

    name: str
    train: Split
    val: Split
    test: Split
    classes: tuple[str, ...]
    note: str
    complete: bool = True


def names() -> tuple[str, ...]:
    """The data sets ``load`` knows, those that need no file first."""
    return tuple(_LOADERS)


def load(name: str, *, download: bool = False) -> Data:
    """Load a data set with its fixed split.

    Args:
        name: one of ``names()``.
        download: fetch missing files.

    Returns:
        The data set, on the CPU.

    Raises:
        ValueError: unknown name.
    """
    if name not in _LOADERS:
        raise ValueError(f"no data set {name!r}; there are {', '.join(names())}")
    return _LOADERS[name]()


def _digits() -> Data:
    """1,797 handwritten digits of 8x8, values 0..16 divided by 16; stratified 1297/100/400."""
    bunch = load_digits()
    whole = Split(
        torch.from_numpy(bunch.images[:, None]).float() / 16, torch.from_numpy(bunch.target).long()
    )
    rest, test = _hold_out(whole, 400)
    train, val = _hold_out(rest, 100)
    note = "UCI optical digits (test part) as in scikit-learn; stratified split by fixed seed"
    return Data("digits", train, val, test, tuple("0123456789"), note)


def _hold_out(split: Split, size: int, *, stratify: bool = True) -> tuple[Split, Split]:
    """Divide by a fixed permutation; both parts keep the original order."""
    kept, held = train_test_split(
        np.arange(len(split)),
        test_size=size,
        random_state=0,
        stratify=split.y.numpy() if stratify else None,
    )
    return split[torch.from_numpy(np.sort(kept))], split[torch.from_numpy(np.sort(held))]


_LOADERS: dict[str, Callable[..., Data]] = {"digits": _digits}
