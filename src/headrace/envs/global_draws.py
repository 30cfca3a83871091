"""The global random states of Python, numpy and torch, one set for each environment.

Environments that draw from them are equal in two runs only if nobody else draws in between, and
then still depend on which of them share a process. Here each has states of its own, which are those
of the process while its code runs. That costs about 4 us for a call, and 12 us where Python's own
are drawn from, so it is done where runs must be equal.

Not covered: `numpy.random.default_rng()` without a seed and what `__init__` samples from a space,
which ask the system; and GPUs.
"""

from __future__ import annotations

import contextvars
import copy
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np

_numpy: Any = np.random  # its types do not know that bit generators can be exchanged


class GlobalDraws:
    """The states of one environment."""

    def __init__(self, seed: int) -> None:
        """Begins at `seed`, and changes nothing yet."""
        begin = random.Random(seed)
        self.seed = seed
        self._python = begin.getstate()
        self._next_bits = begin.getrandbits(32)
        self._numpy: Any = np.random.MT19937(seed)  # numpy.random.seed takes no other kind
        self._torch: Any = None  # a worker may not know torch, or not yet

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Returns what calls `call` with these states. To be called within `put_back`."""

        def drawing(*args: Any, **keywords: Any) -> Any:
            self._begin()
            try:
                return call(*args, **keywords)
            finally:
                self._end()

        return drawing

    def _begin(self) -> None:
        random.setstate(self._python)
        _numpy.set_bit_generator(self._numpy)
        torch = sys.modules.get("torch")
        if torch is not None:
            if self._torch is None:
                self._torch = torch.Generator().manual_seed(self.seed).get_state()
            torch.default_generator.set_state(self._torch)

    def _end(self) -> None:
        # To read the state takes as long as two steps of a small environment; one draw does not.
        # A normal number that `random.gauss` holds back is given without a draw.
        if random.getrandbits(32) != self._next_bits or self._python[2] is not None:
            self._python = random.getstate()
            self._next_bits = random.getrandbits(32)
        self._numpy = _numpy.get_bit_generator()  # another one if it was set by the environment
        torch = sys.modules.get("torch")
        if torch is not None and self._torch is not None:
            self._torch = torch.default_generator.get_state()


def seed_spaces(envs: Sequence[gym.Env[Any, Any]], seeds: Sequence[int]) -> None:
    """Gives each environment spaces of its own, from which its code may sample, and seeds them.

    Those of a class would be shared by all copies in this process.
    """
    for env, seed in zip(envs, seeds, strict=True):
        bare = env.unwrapped
        for name in ("observation_space", "action_space"):
            with suppress(AttributeError):  # a property that makes one
                setattr(bare, name, copy.deepcopy(getattr(bare, name)))
            getattr(bare, name).seed(seed)
        with suppress(AttributeError):  # for those that pass no seed on in `reset`
            bare.np_random = np.random.Generator(np.random.PCG64(seed))


@contextmanager
def put_back() -> Iterator[None]:
    """Leaves the process's own states as they were, less a normal number that numpy held back."""
    python, numpy = random.getstate(), _numpy.get_bit_generator()
    torch = sys.modules.get("torch")
    state = None if torch is None else torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        _numpy.set_bit_generator(numpy)
        if torch is not None:
            torch.default_generator.set_state(state)


class Own(NamedTuple):
    """What is the environments' own while their code runs, and not the process's."""

    context: contextvars.Context
    """Where numpy keeps what is an error to it: theirs to choose for their code, not for ours."""
    draws: Sequence[GlobalDraws] = ()
    """Global random states of each copy, if they have their own."""

    @classmethod
    def of(cls, num_envs: int, *, first_env: int, draws_seed: int | None) -> Own:
        """Returns what copies begin with; without a seed they draw as the process does."""
        context = contextvars.copy_context()
        if draws_seed is None:
            return cls(context)
        words = np.random.SeedSequence(draws_seed).generate_state(first_env + num_envs)
        return cls(context, [GlobalDraws(int(word)) for word in words[first_env:]])

    def run(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Calls what runs code of the environments."""
        if not self.draws:
            return self.context.run(work, *arguments)
        with put_back():
            return self.context.run(work, *arguments)

    def around(self, calls: Sequence[Callable[..., Any]]) -> list[Callable[..., Any]]:
        """Returns what calls one for each copy, within `run`."""
        if not self.draws:
            return list(calls)
        return [own.around(call) for own, call in zip(self.draws, calls, strict=True)]
