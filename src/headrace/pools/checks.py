"""What every pool refuses before it begins."""

from __future__ import annotations

from headrace.errors import ConfigError


def check_batch(batch_size: int, num_envs: int, *, full: bool = False) -> None:
    """Refuses batches that no pool of `num_envs` environments can give.

    Raises:
        ConfigError: none or more than there are; or, where all are given at once, not all.
    """
    if not 1 <= batch_size <= num_envs:
        raise ConfigError(f"batch_size must be in [1, num_envs={num_envs}], not {batch_size}")
    if full and batch_size != num_envs:
        raise ConfigError(f"full batches need batch_size = num_envs = {num_envs}")
