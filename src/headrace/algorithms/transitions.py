"""Transitions from short sequences: one action, the rewards of n steps, and where they led.

A return stops at the first end of an episode. Where that was the clock, the observation that it led
to is the final one, not the first of the next episode; so networks need no rows of their own for
final observations.

Shape suffixes: T = n steps, B = sequences, K = stacked frames, D = components of an action, F =
final observations.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import gymnasium as gym
import torch
from torch import Tensor, nn

from headrace.algorithms.base import ExperienceSpec, ReplayConfig, ReplaySpec
from headrace.errors import ConfigError
from headrace.networks.actor_critics import ActorCriticsNet
from headrace.ops.rewards import RewardTransform, transform_reward
from headrace.ops.squashed_normal import SquashedNormal
from headrace.records import Batch
from headrace.specs import EnvSpec

_PIECE_STEPS = 16  # a piece of experience costs as much to hand over as ten steps
LEAST_PRIORITY = 1e-6
"""Added to all priorities: a transition without an error must not be lost for good."""


class Transition(NamedTuple):
    """What a rule of one action and one value behind it learns from."""

    observation: Tensor  # [B, K, ...]
    action: Tensor  # [B, D] as in PolicyStep
    reward: Tensor  # [B] float32 discounted sum up to `next_observation`
    surprise: Tensor  # [B] float32 so of -log_prob, the first action's left out; 0 if n is 1
    discount: Tensor  # [B] float32 of the value behind: 0 where the episode terminated
    next_observation: Tensor  # [B, K, ...]
    known: Tensor  # [B] bool: False where the clock ended it and the final observation is lacking


class Settings(Protocol):
    """Settings that rules of transitions share."""

    @property
    def batch_unrolls(self) -> int:
        """B."""

    @property
    def discount(self) -> float:
        """Gamma."""

    @property
    def reward_transform(self) -> RewardTransform:
        """What is done to a scaled reward."""

    @property
    def reward_scale(self) -> float:
        """Factor on raw rewards."""

    @property
    def replay(self) -> ReplayConfig:
        """What is kept."""


def sides_of(rule: str, model: nn.Module, spec: EnvSpec) -> tuple[ActorCriticsNet, SquashedNormal]:
    """Returns the network of an actor and critics, and the policy that its actor says.

    Raises:
        ConfigError: actions are not continuous, or the model has no critics.
    """
    space = spec.action_space
    if not isinstance(space, gym.spaces.Box):
        raise ConfigError(
            f"{spec.name}: {rule} needs continuous actions, not {space}: use --algorithm r2d2, "
            "impala or ppo"
        )
    if not isinstance(model, ActorCriticsNet):
        raise ConfigError(
            f"{rule} needs a headrace.networks.actor_critics.ActorCriticsNet, not a "
            f"{type(model).__name__}: leave out --heads, and build networks of your own with "
            "headrace.networks.models.assemble"
        )
    return model, SquashedNormal(tuple(space.low.tolist()), tuple(space.high.tolist()))


def experience_of(config: Settings, *, steps: int, updates_per_call: int = 1) -> ExperienceSpec:
    """Says that transitions of so many steps are wanted, from every step."""
    return ExperienceSpec(
        unroll_steps=_PIECE_STEPS,
        batch_unrolls=config.batch_unrolls,
        replay=ReplaySpec(
            sequence_steps=steps,
            stride_steps=1,
            burn_in_steps=0,
            learned_steps=1,
            settings=config.replay,
        ),
        updates_per_call=updates_per_call,
    )


def seen_by(model: ActorCriticsNet, batch: Batch, config: Settings) -> Transition:
    """Makes transitions of a batch, with observations as the networks see them."""
    reward_TB = transform_reward(config.reward_scale * batch.reward, config.reward_transform)
    raw = transitions(batch, reward_TB, discount=config.discount)
    return raw._replace(
        observation=model.rows(raw.observation), next_observation=model.rows(raw.next_observation)
    )


def transitions(batch: Batch, reward_TB: Tensor, *, discount: float) -> Transition:
    """Makes transitions of sequences, as many steps long as those are.

    Args:
        batch: T steps and the row behind them.
        reward_TB: transformed rewards.
        discount: gamma.
    """
    ended_TB = batch.terminated | batch.truncated
    # Whether the first episode still lasts when the step is made.
    lasts_TB = torch.cat((torch.ones_like(ended_TB[:1]), (~ended_TB[:-1]).cumprod(dim=0).bool()))
    steps = len(ended_TB)
    power_T1 = discount ** torch.arange(steps, device=reward_TB.device).unsqueeze(1)
    share_TB = power_T1 * lasts_TB
    terminated_B = (lasts_TB & batch.terminated).any(dim=0)
    cut_TB = lasts_TB & batch.truncated & ~batch.terminated
    next_observation, has_final_B = _with_finals(batch, cut_TB)
    return Transition(
        observation=batch.inputs.observation[0],
        action=batch.action[0],
        reward=(share_TB * reward_TB).sum(dim=0),
        surprise=-(share_TB[1:] * batch.log_prob[1:]).sum(dim=0),
        discount=torch.where(terminated_B, 0.0, discount ** lasts_TB.sum(dim=0)),
        next_observation=next_observation,
        known=has_final_B | ~cut_TB.any(dim=0),
    )


def _with_finals(batch: Batch, cut_TB: Tensor) -> tuple[Tensor, Tensor]:
    """Last rows, final observations in the place of those behind `cut_TB`, and where these are."""
    last, finals = batch.inputs.observation[-1], batch.finals
    if finals is None:
        return last, torch.zeros_like(cut_TB[0])
    fits_F = finals.valid & cut_TB[finals.step, finals.column]
    count = len(last)
    place_F = torch.arange(count, count + len(fits_F), device=fits_F.device)
    source_B = torch.arange(count, device=fits_F.device)
    # The largest, not the last: padding shares its place with column 0.
    source_B.scatter_reduce_(0, finals.column, torch.where(fits_F, place_F, 0), "amax")
    return torch.cat((last, finals.observation)).index_select(0, source_B), source_B >= count
