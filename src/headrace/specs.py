"""What an environment says of itself before the first step."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from headrace.errors import ConfigError

ActionSpace = gym.spaces.Discrete | gym.spaces.MultiDiscrete | gym.spaces.Box


@dataclass(frozen=True, kw_only=True, slots=True)
class EnvSpec:
    """Shapes and units of one environment, the same for every copy of it."""

    name: str
    """The name that a user types, such as ALE/Pong-v5."""
    observation_space: gym.spaces.Box
    """One observation as the pool delivers it: a single frame, never a stack."""
    action_space: ActionSpace
    """Actions as the pool takes them: Discrete from 0, a vector of such choices (MultiDiscrete,
    also for MultiBinary), or a vector of float32 with finite bounds (Box)."""
    action_repeat: int = 1
    """env_frames per agent step."""
    frame_stack: int = 1
    """Newest observations that the policy sees at once; stacked where the policy runs."""
    structure: gym.Space[object] | None = None
    """The environment's own observation space, if `observation_space` is its bytes (`tree`)."""
    has_action_mask: bool = False
    """Whether every step says which actions are allowed."""
    own_action_space: gym.Space[object] | None = None
    """The environment's own action space, if `action_space` is another; see `envs.spaces`."""
    vector_envs: int | None = None
    """Environments that a user's own vector has, which only step together: pools never cut it. 0
    where it is made with as many as a pool wants; None where each environment steps by itself."""

    def __post_init__(self) -> None:
        space = self.action_space
        if not isinstance(space, gym.spaces.Discrete | gym.spaces.MultiDiscrete | gym.spaces.Box):
            raise ConfigError(f"{self.name}: actions of {type(space).__name__} are not supported")
        if isinstance(space, gym.spaces.Box):
            bounded = np.isfinite(space.low).all() and np.isfinite(space.high).all()
            if space.dtype != np.float32 or len(space.shape) != 1 or not bounded:
                raise ConfigError(
                    f"{self.name}: continuous actions must have finite bounds, not {space}: give "
                    "them some with gymnasium.wrappers.RescaleAction or ClipAction"
                )
        elif np.any(space.start != 0):
            raise ConfigError(f"{self.name}: actions must start at 0, not {space.start}")
        if self.frame_stack < 1 or self.action_repeat < 1:
            raise ConfigError(f"{self.name}: frame_stack and action_repeat must be at least 1")

    @property
    def action_choices(self) -> tuple[int, ...]:
        """Number of choices of each discrete component; empty where actions are continuous."""
        space = self.action_space
        if isinstance(space, gym.spaces.Discrete):
            return (int(space.n),)
        if isinstance(space, gym.spaces.MultiDiscrete):
            return tuple(int(count) for count in space.nvec)
        return ()

    @property
    def envs_together(self) -> int:
        """Environments in whose multiples a pool cuts."""
        return self.vector_envs or 1

    def whole_vectors(self, count: int) -> int:
        """Returns at least `count` environments, the fewest that are whole vectors."""
        return -(-count // self.envs_together) * self.envs_together

    @property
    def env_action_space(self) -> gym.Space[object]:
        """The action space that the environment itself has."""
        own = self.own_action_space  # compared with None: spaces have lengths, which may be 0
        return self.action_space if own is None else own

    @property
    def num_actions(self) -> int:
        """Number of actions.

        Raises:
            ConfigError: they are not one discrete choice.
        """
        if not isinstance(self.action_space, gym.spaces.Discrete):
            raise ConfigError(f"{self.name}: needs discrete actions, not {self.action_space}")
        return int(self.action_space.n)

    @property
    def action_shape(self) -> tuple[int, ...]:
        """Shape of one action: () for Discrete, [D] else."""
        return tuple(self.action_space.shape or ())

    @property
    def action_dtype(self) -> type[np.int64] | type[np.float32]:
        """Of actions on their way to a pool: int64, or float32 where they are continuous."""
        return np.float32 if isinstance(self.action_space, gym.spaces.Box) else np.int64

    @property
    def action_mask_size(self) -> int:
        """A of an action mask: choices of all components; 0 where steps have none."""
        return sum(self.action_choices) if self.has_action_mask else 0

    @property
    def stacked_shape(self) -> tuple[int, ...]:
        """Shape [K, ...] of what the policy sees, K = frame_stack.

        What follows K is one observation as the environment lays it: `pictures` says where a
        picture has its height, width and channels.
        """
        return (self.frame_stack, *self.observation_space.shape)


def vectors_of(num_envs: int, *, most: int, unit: int = 1) -> list[tuple[int, int]]:
    """Cuts environments into vectors, or whole vectors into groups, as even as possible.

    Args:
        num_envs: Of all, a multiple of `unit`.
        most: Of one, at least `unit`.
        unit: Environments that are not cut.

    Returns:
        The first of each and the one behind its last.
    """
    units = num_envs // unit
    count = -(-units // (most // unit))
    bounds = [unit * (units * number // count) for number in range(count + 1)]
    return list(itertools.pairwise(bounds))


def check_action(action: NDArray[Any], rows: int, space: ActionSpace) -> None:
    """Refuses what no environment can take; ALE waits for ever on an action outside the space.

    Args:
        action: the reply: int64 [N] for Discrete, int64 [N, D] for MultiDiscrete, float32 [N, D]
            for Box.
        rows: N, rows of the last `receive`.
        space: of one action.

    Raises:
        ValueError: wrong count, wrong dtype, or an action outside the space.
    """
    dtype = np.float32 if isinstance(space, gym.spaces.Box) else np.int64
    shape = (rows, *(space.shape or ()))
    if action.shape != shape or action.dtype != dtype:
        raise ValueError(
            f"expected {rows} actions of {np.dtype(dtype)} {shape}, got {action.dtype} "
            f"{action.shape}"
        )
    low, high = _bounds(space)
    if not ((action >= low) & (action <= high)).all():  # so that NaN is outside
        raise ValueError(
            f"actions must be in {low}..{high}, got {action.min(axis=0)}..{action.max(axis=0)}"
        )


def _bounds(space: ActionSpace) -> tuple[Any, Any]:
    if isinstance(space, gym.spaces.Box):
        return space.low, space.high
    return 0, (space.n if isinstance(space, gym.spaces.Discrete) else space.nvec) - 1
