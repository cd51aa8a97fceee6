"""A small trained network for the tests of all attacks."""

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
