"""Starts environments in torch."""

from __future__ import annotations

from typing import Any

import torch

from headrace import catalog
from headrace.config import RunConfig
from headrace.envs.device import DeviceEnv
from headrace.errors import ConfigError
from headrace.pools.device import DevicePool


def make_device_pool(
    config: RunConfig,
    *,
    num_envs: int,
    batch_size: int,
    seed: int,
    device: torch.device,
    evaluation: bool = False,
    first_env: int = 0,
) -> DevicePool:
    """Starts `num_envs` of the config's environment on `device`; the rest is as for `make_pool`.

    Raises:
        ConfigError: nobody has written that environment in torch.
    """
    family = catalog.environment_family(config.env)
    check_family(config.env, family)
    settings = family.evaluation(config.environment) if evaluation else config.environment
    env: DeviceEnv = family.make_device(
        config.env,
        settings,
        num_envs=num_envs,
        seed=seed,
        first_env=first_env,
        device=str(device),
    )
    return DevicePool(env, batch_size=batch_size)


def check_family(env: str, family: Any) -> None:
    """Refuses environments that are not written in torch.

    Raises:
        ConfigError: names one that is.
    """
    if not hasattr(family, "make_device"):
        raise ConfigError(
            f"{env} is not written in torch, as catch, pointmass and recall are: leave out "
            "--pool device, or give its family a make_device (headrace.envs.device)"
        )
