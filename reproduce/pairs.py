"""Pairs of images for the autoencoders' paper: a source that an encoder takes for its target.

A network of the settings whose defense says ``pairs`` is trained on such pairs, in place of images.
They are made in parts, which are kept in the folder of work, so that a run that was killed goes on.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adv.attacks.common import generator
from adv.attacks.representation import match
from adv.lab.data import Split
from adv.lab.files import replacing
from adv.lab.models import VAE

__all__ = ["attacked", "partners", "training"]

Settings = Mapping[str, Any]
PART = 500


def partners(count: int, of: int | None = None, seed: int = 0) -> Tensor:
    """For each source a random target that is another image.

    Args:
        count: sources; they are the images 0, 1, ..., and from the first again after the last.
        of: how many images there are; by default ``count``.
        seed: of the draws.

    Returns:
        (count,) numbers of the targets.

    Raises:
        ValueError: there are fewer than two images.
    """
    of = count if of is None else of
    if of < 2:
        raise ValueError("pairs need two images")
    away = torch.randint(1, of, (count,), generator=generator(seed))
    return (torch.arange(count) + away) % of


def attacked(
    vae: nn.Module | None, x: Tensor, wanted: Tensor, settings: Settings, seed: int, folder: Path
) -> Tensor:
    """Sources whose codes an attack brought as near to those of targets as the radius allows.

    Args:
        vae: the model that is attacked, in evaluation mode: the mean of its posterior.
        x: (N, C, H, W) sources; with ``start: zero`` in the settings they count as black images.
        wanted: (N, C, H, W) targets.
        settings: of ``attacks.representation.match``: eps (a list of one), norm, steps, step_size,
            bounds.
        seed: of the random starts.
        folder: for the parts that are done, of these arguments only.

    Returns:
        (N, C, H, W) adversarial inputs, on the CPU.
    """
    if not isinstance(vae, VAE):
        raise TypeError(f"pairs are made for a VAE, not for a {type(vae).__name__}")
    given = {name: settings[name] for name in ("norm", "steps", "step_size", "bounds")}
    (eps,), place, parts = settings["eps"], next(vae.parameters()).device, []
    for start in range(0, len(x), PART):
        file, part = folder / f"{start}.pt", slice(start, start + PART)
        if not file.is_file():
            source, target = x[part].to(place), wanted[part].to(place)
            if settings.get("start") == "zero":
                source = torch.zeros_like(source)
            with torch.no_grad():
                code = encode(vae, target)
            points = match(partial(encode, vae), source, code, eps=eps, seed=seed + start, **given)
            with replacing(file) as path:
                torch.save(points.cpu(), path)
        parts.append(torch.load(file, weights_only=True))
    return torch.cat(parts)


def encode(vae: VAE, x: Tensor) -> Tensor:
    """The mean of the posterior of the latent vector."""
    return vae.posterior(x)[0]


def training(
    vae: nn.Module | None, train: Split, settings: Settings, seed: int, folder: Path
) -> tuple[Split, Tensor]:
    """What a new network is trained on: inputs, and what it is to make of them.

    Args:
        vae: the model that was attacked; None for settings without an attack.
        train: the images from which sources and targets are taken.
        settings: ``count``, how many pairs; ``attack``, the settings of ``attacked``, or none: then
            images are their own targets; ``shuffled``: whether each input gets the target of
            another one, from which nothing can be learned.
        seed: of the targets' choice and of the attack.
        folder: for the parts that are done, of these arguments only.

    Returns:
        The inputs, with numbers of targets for labels, and the targets.
    """
    count, order = settings["count"], torch.arange(settings["count"])
    sources = train.x[order % len(train)]
    if "attack" not in settings:
        return Split(sources, order), sources
    wanted = train.x[partners(count, len(train), seed)]
    points = attacked(vae, sources, wanted, settings["attack"], seed, folder)
    told = (
        torch.randperm(count, generator=generator(seed, 1)) if settings.get("shuffled") else order
    )
    return Split(points, told), wanted
