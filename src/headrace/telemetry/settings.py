"""Settings of the roles that follow training in processes of their own."""

from __future__ import annotations

import math
from dataclasses import dataclass

from headrace.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluatorConfig:
    """The evaluator: how good the newest weights are, judged beside training."""

    evaluator: bool = False
    """Starts a process beside training that plays full episodes greedily, with the newest weights
    that it can keep up with."""
    eval_episodes: int = 5
    """Plays so many episodes in one evaluation."""
    eval_interval_s: float = 0.0
    """Leaves at least so many seconds between the starts of two evaluations; 0 starts one after the
    other."""

    def __post_init__(self) -> None:
        if self.eval_episodes < 1:
            raise ConfigError(f"eval_episodes must be at least 1, not {self.eval_episodes}")
        _check_interval("eval_interval_s", self.eval_interval_s)


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewerConfig:
    """The viewer: what the agent does, to be seen while it trains."""

    video_interval_s: float = 0.0
    """Films a clip into the run's videos/ every so many seconds; 0 films none."""
    watch: bool = False
    """Shows the newest frames on a page at 127.0.0.1, at the address that is printed."""
    watch_port: int = 0
    """Serves the page of `watch` at this port, up to 65535; 0 takes any that is free."""
    watch_fps: float = 30.0
    """Shows at most so many frames per second on the page of `watch`."""

    def __post_init__(self) -> None:
        _check_interval("video_interval_s", self.video_interval_s)
        if not 0 <= self.watch_port < 1 << 16:
            raise ConfigError(f"watch_port must be in 0..65535, not {self.watch_port}")
        if not 0 < self.watch_fps < math.inf:
            raise ConfigError(f"watch_fps must be positive, not {self.watch_fps}")

    @property
    def wanted(self) -> bool:
        """Whether there is anything to see."""
        return self.watch or self.video_interval_s > 0


def _check_interval(name: str, seconds: float) -> None:
    if not 0 <= seconds < math.inf:
        raise ConfigError(f"{name} must be 0 or more seconds, not {seconds}")
