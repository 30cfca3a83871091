"""What every pool refuses before it begins."""

from __future__ import annotations

from headrace.errors import ConfigError


def check_batch(batch_size: int, num_envs: int, *, full: bool = False, unit: int = 1) -> None:
    """Refuses batches that no pool of `num_envs` environments can give.

    Raises:
        ConfigError: none or more than there are; or, where all are given at once, not all; or they
            cut `unit` environments that only step together.
    """
    if not 1 <= batch_size <= num_envs:
        raise ConfigError(f"batch_size must be in [1, num_envs={num_envs}], not {batch_size}")
    if num_envs % unit or batch_size < unit:
        raise ConfigError(
            f"num_envs={num_envs} must be a multiple of the {unit} environments of a vector, and "
            f"batch_size={batch_size} hold one"
        )
    if full and batch_size != num_envs:
        raise ConfigError(f"full batches need batch_size = num_envs = {num_envs}")
