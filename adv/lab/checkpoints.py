"""A training's files, written whole or not at all: its checkpoint, and the weights at its end.

In a checkpoint ``fit``, ``fit_wgan`` and ``fit_critic`` keep what an epoch leaves behind for the
next; only the training that wrote it reads it.
"""

import copy
import re
import zlib
from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from adv.lab.files import replacing

__all__ = ["checksums", "described", "load", "save", "save_weights"]

LONGEST = 80
"""Characters of a setting that an error shows."""


def save(path: Path | str, settings: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Write a training's state: a kill leaves the old file or the new one, never half of one.

    Args:
        path: the file; its folder is made where there is none.
        settings: what makes it this training and no other: numbers, strings, None, and lists of
            them.
        state: tensors, numbers and strings in dictionaries and lists; NumPy's numbers become
            Python's, as only those are read again.
    """
    with replacing(path) as draft, draft.open("wb") as file:
        torch.save(_plain({"settings": dict(settings), "state": dict(state)}), file)


def save_weights(model: nn.Module, path: Path | str) -> None:
    """Write a network's parameters and buffers as safetensors that everyone may read.

    Args:
        model: on any device.
        path: the file; its folder is made where there is none.
    """
    tensors = {name: value.cpu().contiguous() for name, value in model.state_dict().items()}
    with replacing(Path(path).resolve()) as draft:
        save_file(tensors, draft)
        draft.chmod(0o644)  # safetensors writes files that only their owner can read


def load(path: Path | str, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The state that ``save`` kept, its tensors on the CPU, or None where there is no file.

    Args:
        path: the file.
        settings: those of the training that wants to go on; they must be the file's.

    Raises:
        ValueError: a damaged file, one that ``save`` did not write, or another training's; the
            message names the settings that differ.
    """
    path = Path(path)
    if not path.exists():
        return None
    try:
        kept = torch.load(path, map_location="cpu", weights_only=True)
        theirs, state = dict(kept["settings"]), dict(kept["state"])
    except Exception as error:  # a damaged pickle may raise anything
        advice = f"name another file, or delete it ({error})"
        raise ValueError(f"{path} is no checkpoint of a training: {advice}") from error
    ours = _plain(dict(settings))
    if other := [_difference(n, theirs, ours) for n in ours | theirs if _other(n, theirs, ours)]:
        raise ValueError(f"{path} is the checkpoint of another run ({', '.join(other)}); delete it")
    return state


def checksums(*tensors: Tensor) -> list[int]:
    """One of each tensor's bytes, by which ``settings`` tell data apart."""
    plain = (t.detach().to_dense().cpu().contiguous().flatten() for t in tensors)
    # As bytes, since NumPy has no bfloat16.
    return [zlib.crc32(t.view(torch.uint8).numpy().data) for t in plain]


def described(model: nn.Module) -> str:
    """A network as text: its layers, then the name, shape and type of each tensor in it.

    Values and device are left out, and of parameters it is said whether they are trained.
    """
    layers = re.sub(r" at 0x[0-9a-f]+", "", repr(model))  # of functions: new in each process
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    tensors = [
        f"{name}: {tuple(value.shape)} {value.dtype}{' trained' if name in trained else ''}"
        for name, value in model.state_dict().items()
        if isinstance(value, Tensor)
    ]
    return "\n".join([layers, *tensors])


def _plain(value: Any) -> Any:
    """The same without NumPy's numbers, which torch refuses to read."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        plain = copy.copy(value)  # a module's state has attributes of its own
        plain.update((name, _plain(item)) for name, item in value.items())
        return plain
    if type(value) in (list, tuple):
        return type(value)(_plain(item) for item in value)
    return value


def _other(name: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> bool:
    return name not in theirs or name not in ours or theirs[name] != ours[name]


def _difference(name: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """``lr = 0.1 there, 0.2 here``; of texts of several lines, the first that differs."""
    there, here = (str(told[name]) if name in told else "nothing" for told in (theirs, ours))
    lines = zip_longest(there.splitlines(), here.splitlines(), fillvalue="nothing")
    there, here = next(((a.strip(), b.strip()) for a, b in lines if a != b), (there, here))
    return f"{name} = {there[:LONGEST]} there, {here[:LONGEST]} here"
