"""Settings of worker processes."""

from __future__ import annotations

from dataclasses import dataclass

from headrace.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerConfig:
    """How environments are spread over worker processes, and when a worker is given up."""

    num_workers: int = 0
    """Worker processes; 0 for one per core. Never more than there are environments."""
    groups_per_worker: int = 2
    """Groups of environments in a worker: it steps one while the others wait for actions."""
    batch_wait_ms: float = 2.0
    """Longest that a row waits for others before a batch smaller than wanted is answered."""
    step_timeout_s: float = 60.0
    """Seconds that one step of a group may take before its worker is killed as hanging."""
    start_timeout_s: float = 120.0
    """Seconds that a worker may take to start and to reset its environments."""
    max_worker_deaths: int = 5
    """Deaths in a row, none of them after a long healthy life, at which the run ends."""

    def __post_init__(self) -> None:
        if self.num_workers < 0:
            raise ConfigError(
                f"num_workers must be 0 (one per core) or more, not {self.num_workers}"
            )
        for name in ("groups_per_worker", "max_worker_deaths"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("batch_wait_ms", "step_timeout_s", "start_timeout_s"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be positive, not {getattr(self, name)}")
