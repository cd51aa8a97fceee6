"""What several tests of attacks share: a small trained network, and a smooth argmin."""

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn


@pytest.fixture(scope="module")
def digits():
    """A small network on real digits, and 60 of them."""
    data = load_digits()
    x = torch.tensor(data.images / 16, dtype=torch.float32)[:, None]
    y = torch.tensor(data.target, dtype=torch.int64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[:1500]), y[:1500]).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model.eval(), x[1500:1560], y[1500:1560]


class Smooth:
    """A tanh generator, its inner loss, and a solver that ends with Newton steps."""

    def __init__(self, d=3, hidden=8, size=6, seed=0):
        g = torch.Generator().manual_seed(seed)
        make = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
        self.d, self.A, self.a, self.B = d, make(hidden, d), make(hidden), make(size, hidden) / 2

    def G(self, z):  # noqa: N802
        return torch.tanh(z @ self.A.T + self.a) @ self.B.T

    def inner(self, z, x):
        return (self.G(z) - x).square().sum(dim=1)

    def hessian(self, z, x):
        one = lambda code: self.inner(code[None], x[None])[0]  # noqa: E731
        return torch.autograd.functional.hessian(one, z)

    def solve(self, x, start=None):
        z = torch.zeros(len(x), self.d, dtype=x.dtype) if start is None else start.clone()
        for _ in range(60 if start is None else 0):
            z = z - 0.03 * self.slope(z, x)
        for _ in range(12):
            H = torch.stack([self.hessian(*pair) for pair in zip(z, x, strict=True)])
            z = z - torch.linalg.solve(H, self.slope(z, x))
        return z

    def slope(self, z, x):
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            return torch.autograd.grad(self.inner(z, x).sum(), z)[0]

    def jacobians(self, z, x):
        """H and M of one sample."""
        H = self.hessian(z, x)
        both = lambda z, x: self.inner(z[None], x[None])[0]  # noqa: E731
        M = torch.autograd.functional.hessian(both, (z, x))[0][1]
        return H, M


@pytest.fixture(scope="module")
def scene():
    """A generator, two inputs near its range, their minimizers, and gradients to pull back."""
    world = Smooth()
    g = torch.Generator().manual_seed(3)
    codes = 0.5 * torch.randn(2, 3, generator=g, dtype=torch.float64)
    x = world.G(codes) + 0.1 * torch.randn(2, 6, generator=g, dtype=torch.float64)
    z = world.solve(x, codes)
    assert world.slope(z, x).abs().max() < 1e-12
    v = torch.randn(2, 3, generator=g, dtype=torch.float64)
    return world, z, x, v
