"""The edge of what the theory's functions accept: weights as they come from a network, bad input.

What is here raised an error of PyTorch's or SciPy's, or one that sent the reader the wrong way.
"""

import pytest
import torch
from torch import nn

from adv.theory.exact import minimal_perturbation
from adv.theory.relu_encoder import hidden_attack, input_attack
from adv.theory.sensing import smallest_l1, sparsest


@pytest.fixture
def encoder():
    """Atoms, second layer, source and target."""
    g = torch.Generator().manual_seed(5)
    shapes = ((8, 5), (4, 5), (8,), (8,))
    return [torch.randn(*shape, generator=g, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("attack", [hidden_attack, input_attack])
def test_an_encoder_may_have_parameters(attack, encoder):
    plain = attack(*encoder, lam=0.1)
    found = attack(*(nn.Parameter(t) for t in encoder), lam=0.1)
    for one, two in zip(found, plain, strict=True):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(two))
    assert not found.delta.requires_grad


@pytest.mark.parametrize("attack", [hidden_attack, input_attack])
@pytest.mark.parametrize("index", range(4))
def test_a_mixture_of_types_is_refused(attack, encoder, index):
    encoder[index] = encoder[index].float()
    with pytest.raises(ValueError, match=r"must have one dtype and one device, not torch\.float"):
        attack(*encoder, lam=0.1)


def test_a_source_at_all_kinks_is_told(encoder):
    d, phi, zero = torch.eye(4).double(), torch.ones(3, 4).double(), torch.zeros(4).double()
    with pytest.raises(RuntimeError, match="or inputs that do not leave all units at their kinks"):
        input_attack(d, phi, zero, zero, lam=0.1)


def test_codes_may_be_of_parameters():
    phi = torch.randn(6, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.zeros(12, dtype=torch.float64)
    x[3] = 1
    layer = nn.Parameter(phi)
    assert torch.allclose(smallest_l1(layer, layer @ x), x, atol=1e-6)
    assert torch.allclose(sparsest(layer, layer @ x, bound=2.0), x, atol=1e-6)


def test_a_batch_with_one_label_is_told_how_to_give_them():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3))
    with pytest.raises(ValueError, match=r"a batch takes y as a tensor \(B,\)"):
        minimal_perturbation(net, torch.rand(1, 3), 0)
