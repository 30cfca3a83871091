"""From Gymnasium's spaces to ours, and actions back.

Three kinds of actions leave the policy: one choice, a vector of choices, a vector of float32
(`specs.EnvSpec`). Observations are a Box of what torch can hold, or the bytes of several (`tree`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from headrace import tree
from headrace.errors import ConfigError
from headrace.specs import ActionSpace

Actions = Callable[[NDArray[Any]], NDArray[Any]]


def action_space(space: gym.Space[Any]) -> ActionSpace:
    """Returns the space from which the policy chooses.

    Raises:
        ConfigError: actions of a kind that is not supported.
    """
    if isinstance(space, gym.spaces.Discrete):
        return gym.spaces.Discrete(int(space.n))
    if isinstance(space, gym.spaces.MultiDiscrete):
        return gym.spaces.MultiDiscrete(space.nvec.flatten())
    if isinstance(space, gym.spaces.MultiBinary):
        return gym.spaces.MultiDiscrete(np.full(math.prod(space.shape), 2))
    if isinstance(space, gym.spaces.Box):
        return gym.spaces.Box(_float32(space.low).flatten(), _float32(space.high).flatten())
    raise ConfigError(
        f"actions of {type(space).__name__} are not supported; wrap the environment so that it "
        "takes Discrete, MultiDiscrete, MultiBinary or Box"
    )


def action_converter(space: gym.Space[Any]) -> Callable[[NDArray[Any]], list[Any]]:
    """Returns what makes one action for each environment of the policy's [N] or [N, D].

    The actions are new: an environment may keep or change them.
    """
    convert = actions_converter(space)
    return lambda action: list(convert(action))


def actions_converter(space: gym.Space[Any]) -> Actions:
    """Returns what makes the policy's [N] or [N, D] actions of the space in one array.

    It is new, but for choices that are as the policy has them.
    """
    shape, dtype = (space.shape or ()), space.dtype
    if isinstance(space, gym.spaces.Discrete):
        start = int(space.start)
        if start == 0 and dtype == np.int64:
            return lambda action: action
        return lambda action: (action + start).astype(dtype, copy=False)
    if isinstance(space, gym.spaces.MultiDiscrete):
        first = np.asarray(space.start)
        return lambda action: (action.reshape(-1, *shape) + first).astype(dtype, copy=False)
    if isinstance(space, gym.spaces.Box) and dtype != np.float32:
        return lambda action: _into(space, action.reshape(-1, *shape))
    return lambda action: action.reshape(-1, *shape).astype(dtype)


def pool_action(space: gym.Space[Any], action: Any) -> NDArray[Any]:
    """Returns one action of the environment's own space as the policy has it, [] or [D]."""
    if isinstance(space, gym.spaces.Box):
        return tree.as_dtype(action, np.dtype(np.float32), "the action").flatten()
    start = getattr(space, "start", 0)  # a MultiBinary has none
    chosen = tree.as_dtype(action, np.dtype(np.int64), "the action")
    counted: NDArray[Any] = chosen - np.asarray(start)
    return counted.reshape(() if isinstance(space, gym.spaces.Discrete) else -1)


def _into(space: gym.spaces.Box, action: NDArray[Any]) -> NDArray[Any]:
    """Makes actions of a Box's own dtype, which may not have the rounding of float32."""
    if space.dtype.kind != "f":
        action = np.rint(action)
    return np.clip(action.astype(np.float64), space.low, space.high).astype(space.dtype)


def observation_space(
    space: gym.Space[Any],
) -> tuple[gym.spaces.Box, gym.Space[Any] | None]:
    """Returns the space of what travels, and the space that is packed in it, if one is.

    Raises:
        ConfigError: observations of a kind that is not supported.
    """
    if isinstance(space, gym.spaces.Box) and tree.is_plain(space):
        if space.dtype.name == "float64":
            return gym.spaces.Box(_float32(space.low), _float32(space.high)), None
        return space, None
    numbers, _ = without_text(space)
    return tree.packed_space(numbers), numbers


def without_text(space: gym.Space[Any]) -> tuple[gym.Space[Any], list[str]]:
    """Returns a space less the texts that its Dicts have, and their names: networks cannot read."""
    if not isinstance(space, gym.spaces.Dict):
        return space, []
    kept, dropped = {}, []
    for key, part in space.spaces.items():
        if part.dtype is not None and np.dtype(part.dtype).kind == "U":  # MiniGrid has its own
            dropped.append(str(key))
            continue
        kept[key], inner = without_text(part)
        dropped += [f"{key}/{name}" for name in inner]
    return (gym.spaces.Dict(kept) if dropped else space), dropped


def _float32(bound: NDArray[Any]) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):  # the greatest float64 stands for no bound
        return np.asarray(bound, np.float32)
