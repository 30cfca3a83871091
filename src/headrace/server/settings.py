"""The server's settings."""

from __future__ import annotations

from dataclasses import dataclass

from headrace.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerConfig:
    """How many environments, and how their steps become batches."""

    num_envs: int = 64
    """Trains in so many environments, those of all workers and learners together."""
    inference_batch: int = 0
    """The server answers so many environments at once; 0 takes half of num_envs, so that the other
    half steps."""
    queue_unrolls: int = 0
    """Lets so many full unrolls wait before the server waits; 0 takes one learner batch or, with a
    replay, two for each environment."""
    spread_unrolls: bool = True
    """Lets environments end their unrolls at different steps, where a batch takes fewer unrolls
    than there are environments: then server and learner need not wait for each other in turn. The
    first unroll of each starts up to unroll_steps later for it. It does nothing where they take
    turns anyway, with a replay, or for environments in torch, which keep a whole round in the
    queue."""
    eval_envs: int = 0
    """Plays greedily in so many more environments beside training, in a pool of their own; they
    never train."""

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
