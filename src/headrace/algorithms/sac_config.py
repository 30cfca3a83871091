"""Settings of SAC, with published values as defaults (Haarnoja et al. 2018, arXiv:1812.05905)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from headrace.algorithms.base import ReplayConfig
from headrace.algorithms.optimizers import OptimizerConfig, check_no_kl
from headrace.errors import ConfigError


def plain_adam() -> OptimizerConfig:
    """Adam as published: no schedule, no clip."""
    return OptimizerConfig(
        optimizer="adam",
        learning_rate=3e-4,
        learning_rate_schedule="constant",
        optimizer_eps=1e-8,
        max_gradient_norm=0.0,
    )


def uniform_replay() -> ReplayConfig:
    """A million transitions, all sampled alike, and an update for each."""
    return ReplayConfig(
        replay_capacity=1_000_000,
        replay_min=1_000,
        samples_per_insert=256.0,
        priority_exponent=0.0,
        importance_exponent=0.0,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class SacConfig:
    """The learning rule's settings."""

    batch_unrolls: int = 256
    """B: transitions per update. Updates per agent step are replay.samples_per_insert / B."""
    updates_per_call: int = 1
    """Updates that are taken in one go, on transitions sampled at once: as many as before, with
    less work between them; the acting policy is renewed after all of them."""
    update_order: Literal["auto", "sequential", "simultaneous"] = "auto"
    """sequential: critics, then the actor by the new ones, as published. simultaneous: both by
    those of before, as it must be on two devices. auto: sequential unless there are two."""
    discount: float = 0.99
    """gamma, per agent step."""
    n_steps: int = 1
    """n: rewards in a target, before the value behind them; not corrected for the policy's age."""
    target_tau: float = 0.005
    """Share of the weights that learn in what the target critics move to, at every update; 1: they
    are the same."""
    temperature: float | None = None
    """alpha, the weight of entropy beside rewards, for the whole run; None to fit it to
    target_entropy."""
    initial_temperature: float = 1.0
    """alpha at the start, where it is fitted."""
    target_entropy: float | None = None
    """Mean entropy of the policy that alpha is fitted to, in nats, of actions in [-1, 1]; None for
    minus the number of their components."""
    reward_transform: Literal["none", "clip", "soft_asymmetric"] = "none"
    """none, clip (to [-1, 1]), or soft_asymmetric (the DMLab-30 code of the IMPALA authors)."""
    reward_scale: float = 1.0
    """Factor on raw rewards, before `reward_transform`: a clip bites on what it makes."""
    optimizer: OptimizerConfig = field(default_factory=plain_adam)
    """How gradients become steps: for critics, actor and temperature, each on its own."""
    replay: ReplayConfig = field(default_factory=uniform_replay)
    """What is kept, and how it is sampled; a sequence is one transition."""

    def __post_init__(self) -> None:
        numbers = (self.discount, self.target_tau, self.initial_temperature, self.reward_scale)
        optional = (self.temperature or 0.0, self.target_entropy or 0.0)
        if not all(map(math.isfinite, (*numbers, *optional))):
            raise ConfigError("settings of sac must be finite numbers")
        if min(self.batch_unrolls, self.n_steps, self.updates_per_call) < 1:
            raise ConfigError("batch_unrolls, n_steps and updates_per_call must be at least 1")
        if self.optimizer.optimizer != "adam":
            raise ConfigError(f"sac learns with adam, not {self.optimizer.optimizer}")
        check_no_kl(self.optimizer, "sac")
        if not 0 <= self.discount <= 1 or not 0 < self.target_tau <= 1:
            raise ConfigError("discount must be in [0, 1], and target_tau above 0 and at most 1")
        if self.initial_temperature <= 0 or (self.temperature or 0.0) < 0:
            raise ConfigError("initial_temperature must be positive, and temperature not negative")
        if self.temperature is not None and self.target_entropy is not None:
            raise ConfigError(
                "temperature is fixed, and target_entropy would fit it: leave one of them out"
            )
