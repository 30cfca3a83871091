"""In which order SAC's two sides learn, and where: one graph, or two sides that exchange little.

```
time ──▶    actor side    │ propose 1 │           │ learn 1 │ propose 2 │         │ learn 2 │
            critic side               │ judge 1 │ learn 1 ············· │ judge 2 │ learn 2 ···
```
The critic side runs in another thread if one is lent, else in its turn; what comes out is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from headrace.algorithms.base import Beside, Capture, in_turn
from headrace.algorithms.sac_update import (
    ActorLearned,
    ActorSide,
    CriticSide,
    CriticsLearned,
    Draws,
    Inputs,
    Judged,
    Learned,
    Proposed,
    learn_in_sequence,
)


class Order(Protocol):
    """How updates are taken."""

    def compile(self, capture: Capture | None) -> None:
        """Makes graphs of them; `capture` records a whole call."""

    def run(self, inputs: Inputs, count: int, beside: Beside) -> list[Learned]:
        """Takes `count` updates. What it returns holds until the next call."""


class Sequential:
    """Critics, then the actor by the critics that are new: on one device."""

    def __init__(self, actor: ActorSide, critics: CriticSide) -> None:
        self._actor, self._critics = actor, critics
        self._learn: Callable[..., Learned] = learn_in_sequence
        self._recorded: Recorded | None = None

    def compile(self, capture: Capture | None) -> None:
        """Makes an update one graph."""
        self._learn = one_graph(learn_in_sequence, self._actor.device)
        self._recorded = None if capture is None else Recorded(self._all, capture)

    def run(self, inputs: Inputs, count: int, beside: Beside) -> list[Learned]:
        """See `Order`; needs no second thread."""
        return (self._recorded or self._all)(inputs, count)

    def _all(self, inputs: Inputs, count: int) -> list[Learned]:
        parts = (share(inputs, index, count) for index in range(count))
        return [self._learn(self._actor, self._critics, part) for part in parts]


class Simultaneous:
    """Both sides learn from the critics of before."""

    def __init__(self, actor: ActorSide, critics: CriticSide) -> None:
        self._actor_device, self._critic_device = actor.device, critics.device
        self._propose: Callable[..., Proposed] = actor.propose
        self._learn_actor: Callable[..., ActorLearned] = actor.learn_by_slope
        self._judge: Callable[..., Judged] = critics.judge
        self._learn_critics: Callable[..., CriticsLearned] = critics.learn
        self._recorded: Recorded | None = None

    def compile(self, capture: Capture | None) -> None:
        """Makes a graph of each part."""
        self._propose = one_graph(self._propose, self._actor_device)
        self._learn_actor = one_graph(self._learn_actor, self._actor_device)
        self._judge = one_graph(self._judge, self._critic_device)
        self._learn_critics = one_graph(self._learn_critics, self._critic_device)
        self._recorded = None if capture is None else Recorded(self._in_turn, capture)

    def run(self, inputs: Inputs, count: int, beside: Beside) -> list[Learned]:
        """See `Order`."""
        if self._recorded is not None:
            return self._recorded(inputs, count)
        return self._all(inputs, count, beside)

    def _in_turn(self, inputs: Inputs, count: int) -> list[Learned]:
        return self._all(inputs, count, in_turn)

    def _all(self, inputs: Inputs, count: int, beside: Beside) -> list[Learned]:
        here, there = to(inputs, self._actor_device), to(inputs, self._critic_device)
        results: list[Learned] = []
        finish: Callable[[], Learned] | None = None
        for index in range(count):
            mine, theirs = share(here, index, count), share(there, index, count)
            proposed = self._propose(mine)
            if finish is not None:  # the critics' step, which went on meanwhile
                results.append(finish())
            judged: Future[Judged] = Future()
            of_critics = beside(
                partial(self._critics_turn, theirs, to(proposed, self._critic_device), judged)
            )
            of_actor = self._learn_actor(mine, to(judged.result(), self._actor_device))
            finish = partial(_joined, of_critics, of_actor)
        if finish is not None:
            results.append(finish())
        return results

    @torch.no_grad()  # of whichever thread this runs in
    def _critics_turn(
        self, inputs: Inputs, proposed: Proposed, judged: Future[Judged]
    ) -> CriticsLearned:
        try:
            judged.set_result(self._judge(inputs, proposed.here.action))
        except BaseException as error:  # whoever waits for it must hear
            judged.set_exception(error)
            raise
        return self._learn_critics(inputs, proposed.behind, proposed.alpha)


class Recorded:
    """A call of fixed shapes that is done again as it was recorded, on tensors that stay.

    The first call records, and does it more than once: `Sac.warm_up` takes that back.
    """

    def __init__(self, function: Callable[[Inputs, int], list[Learned]], capture: Capture) -> None:
        self._function, self._capture = function, capture
        self._replay: Callable[[], None] | None = None
        self._into: list[Tensor] = []
        self._outputs: list[Learned] = []

    def __call__(self, inputs: Inputs, count: int) -> list[Learned]:
        """Does it with the numbers of `inputs`; what it returns holds until the next call."""
        if self._replay is None:
            static = _mapped(torch.clone, inputs)
            self._into = _leaves(static)
            self._replay, self._outputs = self._capture(lambda: self._function(static, count))
        torch._foreach_copy_(self._into, _leaves(inputs))
        self._replay()
        return self._outputs


def share(inputs: Inputs, index: int, count: int) -> Inputs:
    """Returns what update `index` of `count` learns from: views."""

    def rows(tensor: Tensor) -> Tensor:
        size = len(tensor) // count
        return tensor.narrow(0, index * size, size)

    def columns(masks: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        sizes = (mask.shape[1] // count for mask in masks)
        parts = zip(masks, sizes, strict=True)
        return tuple(mask.narrow(1, index * size, size) for mask, size in parts)

    draws = inputs.draws
    return Inputs(
        _mapped(rows, inputs.transition),
        Draws(
            rows(draws.next_noise),
            rows(draws.noise),
            columns(draws.target_masks),
            columns(draws.masks),
            columns(draws.actor_masks),
        ),
        rows(inputs.weight),
        inputs.scale[index],
    )


def to(tensors: Any, device: torch.device) -> Any:
    """Copies nested tensors to a device, unless they lie there.

    Only a GPU may be sent them without waiting: its stream keeps the order. A processor would read
    a copy that has not come yet.
    """
    in_order = device.type == "cuda"
    return _mapped(lambda tensor: tensor.to(device, non_blocking=in_order), tensors)


def one_graph(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """Makes one graph of a function, gradients and all.

    On a CPU what calls its kernels is C++ too, so that other threads have Python meanwhile; on a
    GPU a capture does away with that.
    """
    from torch._dynamo import config  # noqa: PLC0415 - importing it takes seconds

    with suppress(AttributeError):  # torch 2.11 to 2.13 must be told; others know no such switch
        config.trace_autograd_ops = True
    options: Any = {"cpp_wrapper": True} if device.type == "cpu" else None
    return torch.compile(function, fullgraph=True, dynamic=False, options=options)


def _joined(of_critics: Callable[[], CriticsLearned], of_actor: ActorLearned) -> Learned:
    return Learned(of_critics(), of_actor)


def _mapped(function: Callable[[Tensor], Tensor], tensors: Any) -> Any:
    if isinstance(tensors, Tensor):
        return function(tensors)
    parts = (_mapped(function, part) for part in tensors)
    return type(tensors)(*parts) if hasattr(tensors, "_fields") else tuple(parts)


def _leaves(tensors: Any) -> list[Tensor]:
    if isinstance(tensors, Tensor):
        return [tensors]
    return [leaf for part in tensors for leaf in _leaves(part)]
