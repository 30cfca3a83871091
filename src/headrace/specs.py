"""What an environment says of itself before the first step."""

from __future__ import annotations

from dataclasses import dataclass

import gymnasium as gym

from headrace.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class EnvSpec:
    """Shapes and units of one environment, the same for every copy of it."""

    name: str
    """The name that a user types, such as ALE/Pong-v5."""
    observation_space: gym.spaces.Box
    """One observation as the pool delivers it: a single frame, never a stack."""
    action_space: gym.spaces.Discrete
    """Actions as the pool takes them; the first is 0."""
    action_repeat: int = 1
    """env_frames per agent step."""
    frame_stack: int = 1
    """Newest observations that the policy sees at once; stacked where the policy runs."""

    def __post_init__(self) -> None:
        if self.action_space.start != 0:
            raise ConfigError(
                f"{self.name}: actions must start at 0, not {self.action_space.start}"
            )
        if self.frame_stack < 1 or self.action_repeat < 1:
            raise ConfigError(f"{self.name}: frame_stack and action_repeat must be at least 1")

    @property
    def num_actions(self) -> int:
        """Number of discrete actions."""
        return int(self.action_space.n)

    @property
    def stacked_shape(self) -> tuple[int, ...]:
        """Shape [K, ...] of what the policy sees, K = frame_stack."""
        return (self.frame_stack, *self.observation_space.shape)
