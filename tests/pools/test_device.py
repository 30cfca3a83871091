"""Environments in torch behind the pool's seam; what every pool promises is in test_contract."""

from __future__ import annotations

import dataclasses
from functools import partial

import numpy as np
import pytest
import torch

from headrace.envs.catch import CATCH, CatchConfig
from headrace.envs.device import DeviceEnv, Moved, State
from headrace.envs.device_toys import DeviceToy, torch_arrays
from headrace.envs.gymnasium import GYMNASIUM
from headrace.errors import ConfigError
from headrace.pools.device import DevicePool, named
from headrace.pools.inline import InlinePool
from headrace.run.device_pool import check_family
from headrace.steps import EnvStep

NUM_ENVS, BATCH = 6, 4
CONFIG = CatchConfig(truncate_after=5)


def make_env(seed: int = 1) -> DeviceEnv:
    env: DeviceEnv = CATCH.make_device("catch", CONFIG, num_envs=NUM_ENVS, seed=seed)
    return env


def make_pool(batch_size: int = BATCH) -> DevicePool:
    return DevicePool(make_env(), batch_size=batch_size)


def play(pool: DevicePool | InlinePool, rounds: int, seed: int = 0) -> list[EnvStep]:
    rng, steps = np.random.default_rng(seed), []
    for _ in range(rounds):
        step = pool.receive(1.0)
        assert step is not None
        steps.append(step)
        pool.reply(rng.integers(3, size=len(step.env_id)))
    return steps


def assert_same(one: list[EnvStep], other: list[EnvStep]) -> None:
    for ours, theirs in zip(one, other, strict=True):
        for name in EnvStep._fields[:-4]:
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name), name)
        assert (ours.final_observation is None) == (theirs.final_observation is None)
        if ours.final_observation is not None and theirs.final_observation is not None:
            ended = ours.terminated | ours.truncated
            np.testing.assert_array_equal(
                ours.final_observation[ended], theirs.final_observation[ended]
            )


def test_it_gives_what_the_inline_pool_gives_of_the_numpy_ones() -> None:
    twin = CATCH.make("catch", CONFIG, num_envs=NUM_ENVS, batch_size=BATCH, threads=1, seed=1)
    assert_same(play(make_pool(), 200), play(InlinePool(twin, batch_size=BATCH), 200))


@pytest.mark.parametrize("lent", [False, True])
@pytest.mark.parametrize("rounds", [0, 21])
def test_a_restored_pool_goes_on_as_it_would_have(rounds: int, lent: bool) -> None:
    pool, other = make_pool(), DevicePool(make_env(seed=5), batch_size=BATCH)
    play(pool, rounds)
    if lent:
        pool.receive(1.0)
    saved = pool.snapshot()
    other.restore(saved)
    if lent:
        pool.restore(saved)
    assert_same(play(pool, 60, seed=2), play(other, 60, seed=2))


def test_a_snapshot_does_not_change_with_its_pool() -> None:
    pool = make_pool()
    pool.stay_in_place(finals=True)
    saved = pool.snapshot()
    before = {name: value.copy() for name, value in saved.items()}
    play(pool, 20)
    for name, value in before.items():
        np.testing.assert_array_equal(value, saved[name], name)


def test_the_face_on_the_device_steps_the_same_environments() -> None:
    rng = np.random.default_rng(0)
    pool, host = make_pool(NUM_ENVS), make_pool(NUM_ENVS)
    for _ in range(40):
        step = host.receive(1.0)
        assert step is not None
        np.testing.assert_array_equal(pool.rows.observation.numpy(), step.observation)
        np.testing.assert_array_equal(pool.rows.truncated.numpy(), step.truncated)
        action = rng.integers(3, size=NUM_ENVS)
        host.reply(action)
        pool.advance(torch.from_numpy(action), finals=False)


def test_compiled_it_does_the_same_and_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    # What is traced, and for which inputs; the code that a compiler makes of it is not ours.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager", fullgraph=True))
    rng = np.random.default_rng(0)
    pool, plain = make_pool(NUM_ENVS), make_pool(NUM_ENVS)
    pool.compile(True)
    for round_ in range(30):
        action = torch.from_numpy(rng.integers(3, size=NUM_ENVS))
        plain.advance(action, finals=True)
        with torch.compiler.set_stance("fail_on_recompile" if round_ else "default"):
            pool.advance(action, finals=True)
        for ours, theirs in zip(pool.rows, plain.rows, strict=True):
            assert torch.equal(ours, theirs)


class Careless(DeviceToy):
    """Shows one tensor under two names, and others that are views of little memory."""

    def begin(self) -> dict[str, torch.Tensor]:
        state = super().begin()
        return {**state, "ball_row": state["ball_row"][:1].expand(self.num_envs)}


def test_tensors_that_stay_in_place_are_nobody_elses() -> None:
    spec, rules = CATCH.spec("catch", CONFIG), CATCH.rules(CONFIG, torch_arrays("cpu"))
    pool, other = (
        DevicePool(Careless(spec, rules, num_envs=NUM_ENVS, seed=1), batch_size=BATCH)
        for _ in range(2)
    )
    pool.stay_in_place(finals=True)
    places = {name: value.data_ptr() for name, value in named(pool.state, pool.rows)}
    assert len(set(places.values())) == len(places)
    assert_same(play(pool, 60), play(other, 60))
    pool.restore(other.snapshot())
    assert {name: value.data_ptr() for name, value in named(pool.state, pool.rows)} == places


class Remembering(DeviceToy):
    """Keeps where the paddle was, in the tensor that had it then."""

    def begin(self) -> State:
        state = super().begin()
        return {**state, "before": state["paddle"].clone(), "long_before": state["paddle"].clone()}

    def step(self, state: State, action: torch.Tensor) -> Moved:
        moved = super().step(state, action)
        older = {"before": state["paddle"], "long_before": state["before"]}
        return moved._replace(state={**moved.state, **older})

    def restart(self, state: State, ended: torch.Tensor) -> State:
        kept = {name: state[name] for name in ("before", "long_before")}
        return {**super().restart(state, ended), **kept}


def test_in_place_a_tensor_may_move_from_name_to_name() -> None:
    spec, rules = CATCH.spec("catch", CONFIG), CATCH.rules(CONFIG, torch_arrays("cpu"))
    pool, other = (
        DevicePool(Remembering(spec, rules, num_envs=2, seed=1), batch_size=1) for _ in range(2)
    )
    pool.stay_in_place(finals=True)
    rng = np.random.default_rng(0)
    for _ in range(20):
        action = torch.from_numpy(rng.integers(3, size=2))
        for each in (pool, other):
            each.advance(action, finals=True)
        for name, value in other.state.items():
            assert torch.equal(pool.state[name], value), name


def test_environments_that_mask_actions_are_refused() -> None:
    env = make_env()
    env.spec = dataclasses.replace(env.spec, has_action_mask=True)
    with pytest.raises(ConfigError, match="mask"):
        DevicePool(env, batch_size=1)


def test_environments_that_nobody_wrote_in_torch_are_refused() -> None:
    check_family("catch", CATCH)
    with pytest.raises(ConfigError, match="make_device"):
        check_family("CartPole-v1", GYMNASIUM)
