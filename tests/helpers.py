"""What several test files need: affine models, on which attacks have closed forms."""

import math

import numpy as np
import torch
from torch import nn

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
