"""Toy environments whose rules are written once: numpy steps them in workers, torch on a device.

Rules are functions of arrays; where these come from, they do not know. What numpy and torch do
alike is an operator or a method (`+`, `==`, `.sum(axis=-1)`), and the rest stands in `Arrays`,
which is handed to them. `ToyEnv` makes an environment in numpy of them, and needs no torch;
`device_toys.DeviceToy` makes one in torch. Both go the same way, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from headrace.envs.base import first_rows
from headrace.envs.draws import draw, stream_keys
from headrace.specs import EnvSpec
from headrace.steps import EnvStep

Array = Any
"""An array of numpy, or a tensor of torch."""
State = dict[str, Array]
"""What is kept of N environments: arrays [N, ...] by name, `key` and `episode` of their random
streams among them."""


class Arrays(NamedTuple):
    """The array module that rules are handed, under numpy's names. None changes what it is given.

    Integers are int64, numbers float32 or wider; whoever runs the rules narrows them.
    """

    where: Callable[[Array, Array, Array], Array]
    clip: Callable[[Array, float, float], Array]
    sqrt: Callable[[Array], Array]  # of float32, correctly rounded
    stack: Callable[[list[Array], int], Array]  # along a new axis
    zeros_like: Callable[[Array], Array]
    copy: Callable[[Array], Array]
    take: Callable[[Array, Array], Array]  # rows of a table, by their numbers [N]
    table: Callable[[NDArray[Any]], Array]  # what is given as an array of numpy
    draw: Callable[[Array, Array, int], Array]  # as `draws.draw`


NUMPY = Arrays(
    where=np.where,
    clip=np.clip,
    sqrt=np.sqrt,
    stack=np.stack,
    zeros_like=np.zeros_like,
    copy=np.copy,
    take=lambda table, index: table.take(index, axis=0),
    table=np.asarray,
    draw=draw,
)


class Moved(NamedTuple):
    """What a step has made of N environments, before any of them starts anew."""

    state: State  # what has not changed is the same array as before
    reward: Array  # [N] raw
    terminated: Array  # [N] bool: the step ended the MDP
    truncated: Array  # [N] bool: the step met the clock; not looked at where terminated


class Rules(Protocol):
    """What a toy is. No function changes what it is given, or branches on the values in it."""

    xp: Arrays
    truncates: bool
    """Whether a clock can end episodes."""

    def start(self, key: Array, episode: Array) -> State:
        """Returns how these episodes start, all but `key` and `episode`.

        Args:
            key: [N] of the environments' random streams.
            episode: [N] int64, number of the episode, from 0; the draws depend on both alone.
        """

    def step(self, state: State, action: Array) -> Moved:
        """Makes a step with `action` [N, ...], int64 or float32, which lies in the space."""

    def observe(self, state: State) -> Array:
        """Returns observations [N, ...] float32, as arrays that nothing else has."""


def started(rules: Rules, key: Array, episode: Array) -> State:
    """Returns the state of environments at the start of episodes of these numbers."""
    return {"key": key, "episode": episode, **rules.start(key, episode)}


def restarted(rules: Rules, state: State, ended: Array) -> State:
    """Returns the state with the next episode begun where `ended` [N] is set."""
    after = {**state, "episode": state["episode"] + ended}
    for name, new in rules.start(state["key"], after["episode"]).items():
        rows = ended.reshape(ended.shape + (1,) * (new.ndim - 1))
        after[name] = rules.xp.where(rows, new, state[name])
    return after


class ToyEnv:
    """N copies of a toy in numpy, a `base.RestorableEnv`.

    What a copy does depends only on the seed, its number and its actions.
    """

    def __init__(
        self, spec: EnvSpec, rules: Rules, *, num_envs: int, seed: int, first_env: int = 0
    ) -> None:
        """Makes copies that have yet to be reset; `rules` are over `NUMPY`."""
        self.spec = spec
        self.num_envs = num_envs
        self._rules = rules
        key = stream_keys(seed, first_env + num_envs)[first_env:]
        # The first reset makes it episode 0.
        self._state = started(rules, key, np.full(num_envs, -1, dtype=np.int64))

    def reset(self) -> EnvStep:
        """Starts a new episode in every copy."""
        self._state = restarted(self._rules, self._state, np.ones(self.num_envs, np.bool_))
        return first_rows(self._rules.observe(self._state))

    def step(self, env_id: NDArray[np.int32], action: NDArray[Any]) -> EnvStep:
        """Steps the named copies; those that end start anew in the same step."""
        before = {name: value[env_id] for name, value in self._state.items()}
        state, reward, terminated, truncated = self._rules.step(before, action)
        ended = terminated | truncated
        observation, final_observation = self._rules.observe(state), None
        if ended.any():
            final_observation = observation
            state = restarted(self._rules, state, ended)
            observation = self._rules.observe(state)
        for name, value in state.items():
            if value is not before[name]:
                self._state[name][env_id] = value
        return EnvStep(
            env_id=env_id,
            run_id=np.zeros(len(env_id), dtype=np.int64),
            observation=observation,
            reward=reward.astype(np.float32, copy=False),
            reset=ended,
            terminated=terminated,
            truncated=truncated & ~terminated,
            final_observation=final_observation,
        )

    def snapshot(self) -> dict[str, NDArray[np.generic]]:
        """Returns the state of all copies and of their random streams."""
        return {name: value.copy() for name, value in self._state.items()}

    def restore(self, state: dict[str, NDArray[np.generic]]) -> None:
        """Puts back what `snapshot` gave."""
        for name, value in self._state.items():
            value[:] = state[name]


class ToyFamily(Protocol):
    """What the functions below need of a family: as its methods they make it a whole one."""

    def spec(self, name: str, config: Any) -> EnvSpec:
        """Returns the spec."""

    def rules(self, config: Any, xp: Arrays) -> Rules:
        """Returns the rules, over the arrays that are handed in."""


def make(
    self: ToyFamily,
    name: str,
    config: Any,
    *,
    num_envs: int,
    batch_size: int,
    threads: int,
    seed: int,
    first_env: int = 0,
) -> ToyEnv:
    """Starts `num_envs` copies; the pool cuts batches, and steps them in its own thread."""
    spec, rules = self.spec(name, config), self.rules(config, NUMPY)
    return ToyEnv(spec, rules, num_envs=num_envs, seed=seed, first_env=first_env)


def make_device(
    self: ToyFamily,
    name: str,
    config: Any,
    *,
    num_envs: int,
    seed: int,
    first_env: int = 0,
    device: str = "cpu",
) -> Any:
    """Makes the same copies in torch: an `envs.device.DeviceEnv`."""
    # Here: workers step the numpy ones, and need no torch.
    from headrace.envs.device_toys import DeviceToy, torch_arrays  # noqa: PLC0415

    return DeviceToy(
        self.spec(name, config),
        self.rules(config, torch_arrays(device)),
        num_envs=num_envs,
        seed=seed,
        first_env=first_env,
        device=device,
    )


def make_view(self: ToyFamily, name: str, config: Any, *, seed: int) -> None:
    """A person sees what the agent sees."""
