"""Losses of models that work in place: the same numbers, and the images stay as they are."""

import copy

import pytest
import torch
from helpers import Stretch
from torch import nn

from adv.defenses.adversarial import joint, trades, vat, virtual_direction
from adv.defenses.critic import critic_loss, cycle_loss, fooling_loss, slope_penalty
from adv.defenses.margin import (
    contractive,
    double_backpropagation,
    margin_loss,
    sensitivities,
    sensitivity,
)
from adv.lab.data import Split
from adv.lab.duel import fit_critic
from adv.lab.generative import gradient_penalty
from adv.lab.training import reconstruction


def itself(model, x, y, *, seed):
    """The attack that changes nothing."""
    return x


def network(in_place, outputs=3):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = nn.Linear(6, 12), nn.Softplus(), nn.Linear(12, outputs)
    return nn.Sequential(Stretch(in_place), *layers)


def opinion(critic, x):
    return gradient_penalty(lambda z: critic(z)[:, 0], x, x.flip(0), torch.full((5,), 0.3))


LOSSES = {
    "virtual direction": lambda model, x, y: virtual_direction(model, x),
    "vat": vat(0.5),
    "trades": trades(0.1, steps=2),
    "joint": joint([itself, itself]),
    "margin": margin_loss(0.1),
    "linear margin": margin_loss(0.1, form="linear"),
    "double backpropagation": double_backpropagation(0.1),
    "contractive": contractive(0.1),
    "sensitivity": sensitivity,
    "sensitivities": sensitivities,
    "slope penalty": slope_penalty,
    "critic": lambda model, x, y: critic_loss(model, x, y, x, (y + 1) % 3),
    "fooling": fooling_loss,
    "cycle": lambda model, x, y: cycle_loss(model, x, y, x.flip(0), confidence=0.9),
    "gradient penalty": lambda model, x, y: opinion(model, x),
    "reconstruction": lambda model, x, y: reconstruction(model, x, y),
}


@pytest.mark.parametrize("name", LOSSES)
def test_values_gradients_and_images_are_the_same(name):
    found = []
    for in_place in (False, True):
        torch.manual_seed(0)
        model, x = network(in_place, 6 if name == "reconstruction" else 3), torch.rand(5, 6)
        before, y = x.clone(), torch.arange(5) % 3
        value = LOSSES[name](model, x, y)
        assert torch.equal(x, before)
        if value.requires_grad:
            value.sum().backward()
        found.append([value.detach(), *(p.grad for p in model.parameters())])
    for plain, changed in zip(*found, strict=True):
        assert (plain is None) == (changed is None)
        assert plain is None or torch.equal(plain, changed)


def test_the_game_of_the_critic_is_the_same():
    torch.manual_seed(0)
    split, ends = Split(torch.rand(20, 1, 1, 6), torch.arange(20) % 3), []
    for in_place in (False, True):
        model = nn.Sequential(nn.Flatten(), network(in_place))
        critic = copy.deepcopy(model)
        told = fit_critic(
            model, critic, split, epochs=1, batch_size=10, cycle=0.1, lr=0.01, progress=False
        )
        weights = [p.detach().flatten() for part in (model, critic) for p in part.parameters()]
        ends.append((torch.cat(weights), told.loss, told.real, told.made))
    assert torch.equal(ends[0][0], ends[1][0])
    assert ends[0][1:] == ends[1][1:]
