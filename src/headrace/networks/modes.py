"""Training mode and eval mode: in which of the two a network runs, where.

A pass that a gradient goes through runs in training mode, and so does what else is made of it, such
as V-trace's targets. Every other pass, to act, to score or to give targets, runs in eval mode:
dropout drops nothing, and batch norm sees every row by its running statistics, which stay as they
are. Networks of headrace have neither of the two; a user's may.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch import nn

AnyModule = TypeVar("AnyModule", bound=nn.Module)


def frozen(model: AnyModule) -> AnyModule:
    """Makes of a network, in place, one that acts or gives targets and never learns; returns it."""
    model.requires_grad_(False)
    model.eval()  # not chained: a `train` of the user's may return nothing
    return model


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Has a network that learns run as those do that act; each part gets back the mode it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:  # from the outside in, as `train` goes
            if module.training != training:
                module.train(training)
