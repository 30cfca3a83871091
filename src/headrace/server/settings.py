"""The server's settings."""

from __future__ import annotations

from dataclasses import dataclass

from headrace.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerConfig:
    """How many environments, and how their steps become batches."""

    num_envs: int = 64
    """Environments that train."""
    inference_batch: int = 0
    """Environments answered at once; 0 for half of num_envs, so that the other half steps."""
    queue_unrolls: int = 0
    """Full unrolls that may wait before the server waits; 0 for one learner batch, or, with a
    replay, for two of each environment."""
    spread_unrolls: bool = True
    """Whether environments end their unrolls at different steps, where a batch takes fewer unrolls
    than there are environments: then server and learner need not wait for each other in turn. The
    first unroll of each starts up to unroll_steps later for it. Not where they take turns anyway,
    nor with a replay, nor for environments in torch, which keep a whole round in the queue."""
    eval_envs: int = 0
    """Environments that play greedily beside training, in a pool of their own, and never train."""

    def __post_init__(self) -> None:
        if self.num_envs < 1:
            raise ConfigError(f"num_envs must be at least 1, not {self.num_envs}")
        if not 0 <= self.inference_batch <= self.num_envs:
            raise ConfigError(
                f"inference_batch={self.inference_batch} can never fill from "
                f"num_envs={self.num_envs} environments: lower it, or raise --num-envs"
            )
        if self.queue_unrolls < 0 or self.eval_envs < 0:
            raise ConfigError("queue_unrolls and eval_envs must not be negative")
