"""Settings of R2D2, with the paper's values as defaults (Kapturowski et al. 2019, appendix)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from headrace.algorithms.base import ReplayConfig
from headrace.algorithms.optimizers import OptimizerConfig, check_no_kl
from headrace.errors import ConfigError
from headrace.schedules import Schedule


def _default_optimizer() -> OptimizerConfig:
    """SEED RL's for Atari: eps 1e-3 and clip 80 of a sum over 80 steps."""
    return OptimizerConfig(
        optimizer="adam",
        learning_rate=1e-4,
        learning_rate_schedule="constant",
        optimizer_eps=1e-3 / 80,
        max_gradient_norm=80.0 / 80,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class R2d2Config:
    """The learning rule's settings."""

    unroll_steps: int = 80
    """Learns from so many agent steps of a sequence (T)."""
    burn_in_steps: int = 40
    """Begins a sequence with so many agent steps more, which only warm the recurrent state up."""
    overlap_steps: int = 0
    """Lets a sequence share so many learned agent steps with the next one of its environment: 40 of
    80 as published; 0 learns from every step in one sequence."""
    batch_unrolls: int = 64
    """Makes an update of so many sequences (B)."""
    discount: float = 0.997
    """Multiplies rewards one agent step later by this (gamma)."""
    n_steps: int = 5
    """Sums the rewards of so many agent steps in a target (n), before the value behind them."""
    full_returns: bool = False
    """Makes sequences n_steps - 1 agent steps longer, which are not learned from, so that the last
    targets need not make do with fewer rewards."""
    rescale_values: bool = True
    """Learns values as h(Q), which tames large returns without clipping rewards."""
    value_scale_epsilon: float = 1e-3
    """Sets the factor of the linear part of h (rescale_values)."""
    double_q: bool = True
    """Lets the network that learns choose the action whose value the target network gives (van
    Hasselt et al. 2016, arXiv:1509.06461); else the target network does both."""
    target_update_interval: int = 2500
    """Copies the weights into the target network every so many updates."""
    priority_eta: float = 0.9
    """Gives a sequence's largest error this share in its priority, and the mean the rest."""
    epsilon_base: float = 0.4
    """Sets the share of random actions of the environment that explores most."""
    epsilon_power: float = 7.0
    """Lets the last environment explore with epsilon_base to the power 1 + epsilon_power."""
    epsilon_schedule: Schedule = "constant"
    """Begins every environment with initial_epsilon and moves it to its own share after
    epsilon_decay of the run (linear, cosine), or begins with that share (constant)."""
    initial_epsilon: float = 1.0
    """Sets the share of random actions with which epsilon_schedule begins."""
    epsilon_decay: float = 0.1
    """Sets the share of the run, its first part, in which epsilon_schedule goes down."""
    eval_epsilon: float = 1e-3
    """Sets the share of random actions of the environments that play beside training."""
    reward_transform: Literal["none", "clip", "soft_asymmetric"] = "none"
    """Changes rewards before learning: none, clip (to [-1, 1]), or soft_asymmetric (the DMLab-30
    code of the IMPALA authors)."""
    reward_scale: float = 1.0
    """Multiplies raw rewards, before `reward_transform`: a clip bites on what it makes."""
    optimizer: OptimizerConfig = field(default_factory=_default_optimizer)
    """How gradients become steps."""
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    """What is kept, and how it is sampled."""

    def __post_init__(self) -> None:
        numbers = (
            *(self.discount, self.value_scale_epsilon, self.priority_eta, self.reward_scale),
            *(self.epsilon_base, self.epsilon_power, self.eval_epsilon),
            *(self.initial_epsilon, self.epsilon_decay),
        )
        if not all(map(math.isfinite, numbers)):
            raise ConfigError("settings of r2d2 must be finite numbers")
        counts = (self.unroll_steps, self.batch_unrolls, self.n_steps, self.target_update_interval)
        if min(counts) < 1:
            raise ConfigError(
                "unroll_steps, batch_unrolls, n_steps and target_update_interval must be at least 1"
            )
        if min(self.burn_in_steps, self.value_scale_epsilon, self.epsilon_power) < 0:
            raise ConfigError(
                "burn_in_steps, value_scale_epsilon and epsilon_power must not be negative"
            )
        check_no_kl(self.optimizer, "r2d2")
        if not 0 <= self.initial_epsilon <= 1 or not 0 < self.epsilon_decay <= 1:
            raise ConfigError(
                "initial_epsilon must be in [0, 1], and epsilon_decay in (0, 1]: say "
                "--initial-epsilon 1 --epsilon-decay 0.1"
            )
        is_given = (self.initial_epsilon, self.epsilon_decay) != (1.0, 0.1)
        if is_given and self.epsilon_schedule == "constant":
            raise ConfigError(
                "initial_epsilon and epsilon_decay are of a schedule: say --epsilon-schedule "
                "linear as well"
            )
        shares = (self.discount, self.priority_eta, self.epsilon_base, self.eval_epsilon)
        if min(shares) < 0 or max(shares) > 1:
            raise ConfigError(
                "discount, priority_eta, epsilon_base and eval_epsilon must be in [0, 1]"
            )
        if not 0 <= self.overlap_steps < self.unroll_steps:
            raise ConfigError(
                f"overlap_steps must be in [0, {self.unroll_steps - 1}], since unroll_steps="
                f"{self.unroll_steps} are learned from, not {self.overlap_steps}"
            )

    @property
    def sequence_steps(self) -> int:
        """Steps of a sampled sequence: burn-in, T, and what full returns need behind them."""
        behind = self.n_steps - 1 if self.full_returns else 0
        return self.burn_in_steps + self.unroll_steps + behind

    @property
    def stride_steps(self) -> int:
        """Steps from the start of one sequence to the start of the next."""
        return self.unroll_steps - self.overlap_steps
