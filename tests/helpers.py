"""What several test files need: affine models with closed forms, and a way to call any attack."""

import importlib
import inspect
import math
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import adv.attacks

WIDE = (-50.0, 50.0)
EXPONENTS = {"linf": math.inf, "l2": 2.0, "l1": 1.0}


def affine(classes, d, seed=0, *, weight=None, bias=None):
    """A float64 affine model with normal weights, or with those given."""
    g = torch.Generator().manual_seed(seed)
    model = nn.Linear(d, classes).double()
    with torch.no_grad():
        model.weight.copy_(torch.randn(classes, d, generator=g) if weight is None else weight)
        model.bias.copy_(torch.randn(classes, generator=g) if bias is None else bias)
    return model.requires_grad_(False)


def inputs(count, d, seed=1):
    """Uniform points of the unit cube, float64."""
    g = torch.Generator().manual_seed(seed)
    return torch.rand(count, d, dtype=torch.float64, generator=g)


def lengths(delta, norm):
    """NumPy's norms of the samples."""
    return np.linalg.norm(delta.flatten(1).numpy(), EXPONENTS.get(norm, norm), axis=1)


class Stretch(nn.Module):
    """A layer that may work in place, and not idempotent: to apply it twice shows."""

    def __init__(self, in_place):
        super().__init__()
        self.in_place = in_place

    def forward(self, x):
        return x.sub_(0.4).mul_(2.0) if self.in_place else (x - 0.4) * 2.0


# ------------------------------------------------------------------------------------ all attacks


def attacks():
    """Public functions of the families that take a model, inputs and what to aim at.

    A function of the inputs alone is noise, not an attack.
    """
    for info in pkgutil.iter_modules(adv.attacks.__path__):
        module = importlib.import_module(f"adv.attacks.{info.name}")
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if name.startswith("_") or function.__module__ != module.__name__:
                continue
            given = list(inspect.signature(function).parameters)
            if {"bounds", "seed"} <= set(given) and given[0] != "x":
                yield pytest.param(function, id=f"{info.name}.{name}")


class Plane(nn.Module):
    """Codes of images on a plane, behind layers that do something else in training mode."""

    def __init__(self, shape, dimensions=3):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        basis = torch.randn(math.prod(shape), dimensions, generator=g)
        self.register_buffer("basis", torch.linalg.qr(basis)[0])
        self.shape, self.norm, self.drop = shape, nn.BatchNorm1d(dimensions), nn.Dropout(0.5)

    def encode(self, x, y=None):
        return self.drop(self.norm(0.3 * self.code(x)))

    def decode(self, z, y=None):
        return (0.5 + self.drop(z) @ self.basis.T).unflatten(1, self.shape)

    def code(self, x):
        """The code of an image that ``decode`` has made."""
        return (x.flatten(1) - 0.5) @ self.basis


@dataclass
class Scene:
    """A network in training mode with every kind of state that an attack could disturb.

    ``model``, ``manifold`` and ``objective`` are how attacks see the two ``networks``.
    """

    networks: nn.ModuleDict
    model: Callable
    manifold: Any
    x: torch.Tensor
    y: torch.Tensor

    def objective(self, x):
        return self.model(x)[:, 0]

    def explain(self, x):
        codes = self.manifold.encode(x, self.y)
        images = [self.manifold.decode(codes + 0.5 * k, self.y) for k in range(3)]
        return self.model(x), torch.stack(images, dim=1)


def make_scene(form="module", device="cpu", dtype=torch.float32):
    """Networks, five images and their classes; as a ``"function"`` nothing shown is a module."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = (nn.Linear(16, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.5))
        net, plane = nn.Sequential(nn.Flatten(), *layers, nn.Linear(12, 3)), Plane((1, 4, 4))
        x = torch.rand(5, 1, 4, 4)
        with torch.no_grad():  # running statistics unlike the defaults
            net.train()(torch.rand(64, 1, 4, 4))
    both = nn.ModuleDict({"net": net, "plane": plane}).to(device, dtype)
    x = x.to(device, dtype)
    for parameter in both.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    net[1].weight.requires_grad_(False)
    y = net.eval()(x).argmax(dim=1)
    net.train()
    net[4].eval()
    if form == "module":
        return Scene(both, net, plane, x, y)
    manifold = SimpleNamespace(
        encode=lambda x, y: plane.encode(x, y), decode=lambda z, y: plane.decode(z, y)
    )
    return Scene(both, lambda x: net(x), manifold, x, y)


MANIFOLD = lambda s: {"manifold": s.manifold}  # noqa: E731
# What an attack needs besides a model, inputs, a goal and a radius.
MORE = {
    "latent_fgsm": MANIFOLD,
    "latent_noise": MANIFOLD,
    "latent_pgd": MANIFOLD,
    "latent_walk": lambda s: {"explain": s.explain},
    "surface_search": lambda s: {
        "encode": lambda x: s.manifold.encode(x, s.y),
        "decode": lambda z: s.manifold.decode(z, s.y),
        "classifier": s.model,
    },
}
OUTPUTS = ("linear", "match", "quadratic", "subset")
"""Attacks that aim at outputs, not at labels."""
EPS = 0.3


def has_goal(attack):
    """Whether an attack has a third positional argument."""
    return (
        list(inspect.signature(attack).parameters.values())[2].kind
        != inspect.Parameter.KEYWORD_ONLY
    )


def call(attack, scene, change=lambda x, y: (x, y), **settings):
    """An attack on a scene, in three steps and of radius ``EPS`` where none are given.

    Args:
        attack: one of ``attacks()``.
        scene: as made by ``make_scene``.
        change: of the inputs and the goal before the call.
        settings: further arguments.
    """
    name, taken = attack.__name__, inspect.signature(attack).parameters
    goal = nn.functional.one_hot(scene.y, 3).to(scene.x) if name in OUTPUTS else scene.y
    x, goal = change(scene.x, goal)
    own = {key: value for key, value in {"eps": EPS, "steps": 3}.items() if key in taken}
    own |= MORE.get(name, lambda s: {})(scene)
    if has_goal(attack):
        return attack(scene.model, x, goal, **own | settings)
    return attack(scene.objective, x, **own | settings)
