"""Puts the server's side of environments in torch together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headrace.algorithms.base import Algorithm
from headrace.config import RunConfig
from headrace.errors import ConfigError
from headrace.experience.device_unrolls import DeviceUnrolls
from headrace.experience.fifo import SlotQueue
from headrace.pools.device import DevicePool
from headrace.run.device_pool import check_family
from headrace.run.experience import queue_capacity
from headrace.server.acting import Acting, initial_state
from headrace.server.device_seat import DeviceSeat
from headrace.server.server import OnEpisodes


def check_device_pool(config: RunConfig, family: Any) -> None:
    """Refuses what environments in torch do not go with.

    Raises:
        ConfigError: names what to leave out.
    """
    check_family(config.env, family)
    num_envs = config.server.num_envs
    if config.inference == "worker":
        raise ConfigError(
            "--pool device has no workers: leave out --inference worker, or --pool device"
        )
    if config.server.inference_batch not in (0, num_envs):
        raise ConfigError(
            "--pool device answers all environments at once: leave out --inference-batch"
        )


def make_device_seat(
    config: RunConfig,
    algorithm: Algorithm,
    *,
    pool: DevicePool,
    model: Any,
    actor: Acting,
    exploration: Tensor | None,
    on_episodes: OnEpisodes,
    reader: torch.device,
) -> DeviceSeat:
    """Takes a pool, and allocates its unrolls in whole blocks.

    These are for what is under construction, waiting, and read on the device `reader`.
    """
    num_envs, experience = pool.num_envs, algorithm.experience
    capacity = queue_capacity(config, algorithm)
    # The next block is taken before the last row of the one before it is written.
    blocks = -(-(2 * num_envs + capacity + experience.batch_unrolls) // num_envs)
    unrolls = DeviceUnrolls(
        pool.spec,
        num_envs=num_envs,
        experience=experience,
        blocks=blocks,
        recurrent=model.initial_state(1),
        device=pool.device,
        queue=SlotQueue(blocks * num_envs, capacity=capacity),
        reader=reader,
    )
    return DeviceSeat(
        pool,
        actor,
        initial_state(pool.spec, model, 1, pool.device),
        unrolls=unrolls,
        on_episodes=on_episodes,
        exploration=exploration,
    )
