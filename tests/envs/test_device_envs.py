"""Environments in torch go the way of their twins in numpy, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from headrace import catalog
from headrace.envs.device import DeviceEnv, DeviceRows, State, advance, device_draw, first_rows
from headrace.envs.draws import draw, stream_keys
from headrace.steps import EnvStep

NUM_ENVS = 7
CASES = [
    ("catch", {}),
    ("catch", {"truncate_after": 4}),
    ("catch", {"truncate_after": 9}),  # the ball is down then
    ("pointmass", {"episode_steps": 6}),
    ("pointmass", {"episode_steps": 1}),
    ("recall", {}),
    ("recall", {"delay_steps": 0, "num_cues": 5}),
]


def pair(name: str, settings: dict[str, Any], **which: int) -> tuple[Any, DeviceEnv]:
    family = catalog.environment_family(name)
    config = family.config_type(**settings)
    twin = family.make(name, config, num_envs=NUM_ENVS, batch_size=NUM_ENVS, threads=1, **which)
    return twin, family.make_device(name, config, num_envs=NUM_ENVS, **which)


def random_action(env: DeviceEnv, rng: np.random.Generator) -> np.ndarray:
    if env.spec.action_shape:
        return rng.uniform(-1, 1, (NUM_ENVS, *env.spec.action_shape)).astype(np.float32)
    return rng.integers(env.spec.num_actions, size=NUM_ENVS)


def assert_same(rows: DeviceRows, step: EnvStep) -> None:
    for name in ("observation", "reward", "reset", "terminated", "truncated"):
        ours, theirs = getattr(rows, name).numpy(), getattr(step, name)
        assert ours.dtype == theirs.dtype, name
        np.testing.assert_array_equal(ours, theirs, name)
    if step.final_observation is not None:
        assert rows.final_observation is not None
        final = rows.final_observation.numpy()[step.reset]
        np.testing.assert_array_equal(final, step.final_observation[step.reset])


@pytest.mark.parametrize(("name", "settings"), CASES)
@pytest.mark.parametrize("which", [{"seed": 1}, {"seed": 9, "first_env": 30}])
def test_they_show_what_the_numpy_ones_show(
    name: str, settings: dict[str, Any], which: dict[str, int]
) -> None:
    twin, env = pair(name, settings, **which)
    rng, ids = np.random.default_rng(0), np.arange(NUM_ENVS, dtype=np.int32)
    state = env.begin()
    assert_same(first_rows(env, state), twin.reset())
    ends = clocks = 0
    for _ in range(1000):
        action = random_action(env, rng)
        state, rows = advance(env, state, torch.from_numpy(action), finals=True)
        assert_same(rows, twin.step(ids, action))
        ends += int(rows.reset.sum())
        clocks += int(rows.truncated.sum())
    assert ends > 500
    assert (clocks > 0) == env.truncates


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_functions_leave_what_they_are_given_and_work_for_some(
    name: str, settings: dict[str, Any]
) -> None:
    _, env = pair(name, settings, seed=3)
    rng, some = np.random.default_rng(0), torch.tensor([5, 0, 2])
    state = env.begin()
    for _ in range(30):
        before = {key: value.clone() for key, value in state.items()}
        action = torch.from_numpy(random_action(env, rng))
        after, rows = advance(env, state, action, finals=True)
        part, part_rows = advance(env, of(state, some), action[some], finals=True)
        for key, value in before.items():
            assert torch.equal(value, state[key]), key
            assert torch.equal(after[key][some], part[key]), key
        for whole, few in zip(rows, part_rows, strict=True):
            assert torch.equal(whole[some], few)
        state = after


def of(state: State, some: torch.Tensor) -> State:
    return {key: value[some] for key, value in state.items()}


@pytest.mark.parametrize("num_values", [2, 5, 201, 2**31 - 1])
def test_random_numbers_are_those_of_the_numpy_streams(num_values: int) -> None:
    key = np.concatenate([stream_keys(7, 1000), np.array([0, 2**63, 2**64 - 1], np.uint64)])
    count = np.arange(len(key)) * 12345
    ours = device_draw(torch.from_numpy(key.view(np.int64)), torch.from_numpy(count), num_values)
    np.testing.assert_array_equal(ours.numpy(), draw(key, count, num_values))


def test_a_clock_that_never_bites_costs_no_second_look() -> None:
    for truncate_after, bites in ((0, False), (8, True), (9, False), (50, False)):
        assert pair("catch", {"truncate_after": truncate_after}, seed=0)[1].truncates is bites


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("name", "settings"), CASES)
def test_on_a_gpu_they_go_the_same_way_and_wait_for_nothing(
    name: str, settings: dict[str, Any]
) -> None:
    _, here = pair(name, settings, seed=1)
    family = catalog.environment_family(name)
    config = family.config_type(**settings)
    there = family.make_device(name, config, num_envs=NUM_ENVS, seed=1, device="cuda")
    rng = np.random.default_rng(0)
    actions = torch.from_numpy(np.stack([random_action(here, rng) for _ in range(50)]))
    state, far_state, seen = here.begin(), there.begin(), []
    moved = actions.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for action in moved:
            far_state, far_rows = advance(there, far_state, action, finals=True)
            seen.append(far_rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for action, far_rows in zip(actions, seen, strict=True):
        state, rows = advance(here, state, action, finals=True)
        for near, far in zip(rows, far_rows, strict=True):
            torch.testing.assert_close(far.cpu(), near)
