"""A checkpoint's optimiser state goes back into the memory layout that its weights have."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from headrace.algorithms.impala import Impala, ImpalaConfig
from headrace.algorithms.optimizers import OptimizerConfig
from headrace.learner.flattening import flatten, unflatten
from headrace.networks.models import NetworkConfig, impala_shallow
from headrace.records import Batch, PolicyInput
from headrace.specs import EnvSpec

T, B, SIDE = 3, 2, 36
SPEC = EnvSpec(
    name="pixels",
    observation_space=gym.spaces.Box(0, 255, (SIDE, SIDE), np.uint8),
    action_space=gym.spaces.Discrete(3),
    frame_stack=4,
)


def make(optimizer: Any) -> Impala:
    torch.manual_seed(0)
    config = ImpalaConfig(optimizer=OptimizerConfig(optimizer=optimizer, learning_rate=1e-2))
    return Impala(impala_shallow(SPEC, NetworkConfig()), config, spec=SPEC)


def batch(seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    never = torch.zeros(T, B, dtype=torch.bool)
    return Batch(
        inputs=PolicyInput(
            observation=torch.randint(
                256, (T + 1, B, 4, SIDE, SIDE), generator=generator, dtype=torch.uint8
            ),
            reward=torch.zeros(T + 1, B),
            previous_action=torch.zeros(T + 1, B, dtype=torch.int64),
            reset=torch.zeros(T + 1, B, dtype=torch.bool),
        ),
        recurrent=(),
        action=torch.randint(3, (T, B), generator=generator),
        log_prob=torch.full((T, B), -1.0986),
        reward=torch.randn(T, B, generator=generator),
        terminated=never,
        truncated=never,
        bootstrap=torch.zeros(T, B),
        version=torch.zeros(T, B, dtype=torch.int64),
    )


@pytest.mark.parametrize("optimizer", ["adam", "muon", "rmsprop", "rmsprop_tf"])
def test_a_restored_optimiser_takes_the_step_that_it_would_have_taken(optimizer: str) -> None:
    straight = make(optimizer)
    for seed in range(2):
        straight.update(batch(seed), progress=0.0)
    tensors, skeleton = flatten(straight.state_dict())
    on_disk = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    resumed = make(optimizer)
    resumed.model.load_state_dict(straight.model.state_dict())
    resumed.load_state_dict(unflatten(on_disk, skeleton))
    for algorithm in (straight, resumed):
        algorithm.update(batch(2), progress=0.0)
    for (name, expected), have in zip(
        straight.model.state_dict().items(), resumed.model.state_dict().values(), strict=True
    ):
        assert torch.equal(expected, have), name
