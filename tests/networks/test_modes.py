"""Training mode and eval mode: what is frozen, and what gets back the mode it had."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from headrace.networks.modes import frozen, in_eval_mode


class Silent(nn.Dropout):
    """Its `train` returns nothing, as one of a user's may."""

    def train(self, mode: bool = True) -> Any:
        super().train(mode)


class HeldStill(nn.BatchNorm1d):
    """A part that never learns its statistics, whatever the network does."""

    def train(self, mode: bool = True) -> Any:
        return super().train(False)


def a_network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), HeldStill(4), Silent(), nn.Sequential(nn.Dropout()))


def modes_of(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def test_what_is_frozen_neither_learns_nor_drops() -> None:
    for model in (a_network(), Silent()):
        assert frozen(model) is model
        assert not any(modes_of(model))
        assert not any(parameter.requires_grad for parameter in model.parameters())
    x = torch.randn(1, 3)
    model = frozen(a_network())
    assert torch.equal(model(x), model(x))


def test_every_part_gets_back_the_mode_it_had() -> None:
    model = a_network()
    model.train()
    model[3][0].eval()
    before = modes_of(model)
    assert before == [True, True, False, True, True, False]
    with in_eval_mode(model):
        assert not any(modes_of(model))
    assert modes_of(model) == before
