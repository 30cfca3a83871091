"""EnvPool: two rows become one, nothing waits for ever, and spaces are what pools promise."""

import subprocess
import sys
from collections import namedtuple
from types import ModuleType
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from headrace import tree
from headrace.envs.envpool import ENVPOOL, EnvpoolConfig
from headrace.envs.envpool_spaces import actions, observations
from headrace.envs.envpool_vector import EnvpoolVector
from headrace.errors import ConfigError
from headrace.pools.native import NativePool
from headrace.specs import EnvSpec
from headrace.steps import EnvStep

Array = np.ndarray[Any, Any]


class Engine:
    """EnvPool's rules, as measured, with scripted lengths of episodes and an adversary's order.

    An observation is [environment, episode, step within it]; the reward is the action plus 1.
    """

    def __init__(self, lengths: list[int], batch_size: int, order: str, seed: int = 0) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.order = order
        self.rng = np.random.default_rng(seed)
        self.clock = np.zeros((len(lengths), 2), np.int64)
        self.over = np.zeros(len(lengths), bool)
        self.ready: list[tuple[int, float, bool, bool]] = []
        self.ignored = 0

    def async_reset(self) -> None:
        self.ready = [(env, 0.0, False, False) for env in range(len(self.lengths))]

    def send(self, action: Array, env_id: Array) -> None:
        on_their_way = {row[0] for row in self.ready}
        assert not on_their_way & set(env_id.tolist()), "answered twice"
        if self.batch_size == len(self.lengths):
            assert len(env_id) == self.batch_size, "a second send would overwrite rows"
        for env, push in zip(env_id.tolist(), action, strict=True):
            if self.over[env]:
                self.ignored += 1
                self.over[env], self.clock[env] = False, (self.clock[env, 0] + 1, 0)
                self.ready.append((env, 0.0, False, False))
                continue
            self.clock[env, 1] += 1
            self.over[env] = self.clock[env, 1] == self.lengths[env]
            by_clock = bool(self.over[env] and self.clock[env, 0] % 2)
            self.ready.append(
                (env, float(push) + 1, bool(self.over[env]) and not by_clock, by_clock)
            )

    def recv(self) -> tuple[Any, ...]:
        assert len(self.ready) >= self.batch_size, "this recv would wait for ever"
        if self.order == "newest first":
            self.ready.reverse()
        elif self.order == "any":
            self.rng.shuffle(self.ready)
        rows, self.ready = self.ready[: self.batch_size], self.ready[self.batch_size :]
        env, reward, terminated, truncated = (
            np.array(column) for column in zip(*rows, strict=True)
        )
        info = {
            "env_id": env.astype(np.int32),
            "elapsed_step": self.clock[env, 1].astype(np.int32),
            "x_position": self.clock[env, 1] * 0.5,
            "ram": np.zeros((len(env), 3)),
            "players": {"env_id": env},
        }
        observation = np.concatenate([env[:, None], self.clock[env]], axis=1).astype(np.float64)
        return observation, reward.astype(np.float32), terminated, truncated, info


SPEC = EnvSpec(
    name="scripted",
    observation_space=gym.spaces.Box(-np.inf, np.inf, (3,), np.float32),
    action_space=gym.spaces.Discrete(5),
)


def vector(engine: Engine) -> EnvpoolVector:
    return EnvpoolVector(
        engine,
        SPEC,
        num_envs=len(engine.lengths),
        batch_size=engine.batch_size,
        observation=lambda value: value.astype(np.float32),
        action=lambda action: action,
    )


@pytest.mark.parametrize("order", ["first come", "newest first", "any"])
@pytest.mark.parametrize(
    ("lengths", "batch_size"),
    [
        pytest.param([3, 4, 5, 7, 2, 9], 3, id="half"),
        pytest.param([3, 4, 5, 7, 2, 9], 6, id="in step"),
        pytest.param([4] * 6, 6, id="all end at once in step"),
        pytest.param([1] * 6, 3, id="all end at every step"),
        pytest.param([1] * 5, 5, id="all end at every step in step"),
        pytest.param([1, 100, 1], 1, id="one by one"),
        pytest.param([2], 1, id="alone"),
    ],
)
def test_every_environment_has_a_story_without_gaps(
    lengths: list[int], batch_size: int, order: str
) -> None:
    engine = Engine(lengths, batch_size, order)
    env, rng = vector(engine), np.random.default_rng(1)
    pool = NativePool(env, batch_size=batch_size)
    place: dict[int, tuple[int, int]] = {}
    acted = dict.fromkeys(range(len(lengths)), 0)
    ends = 0
    for _ in range(200):
        step = pool.receive(1.0)
        assert step is not None
        assert 1 <= len(step.env_id) <= batch_size
        assert len(set(step.env_id.tolist())) == len(step.env_id)
        ends += check_rows(step, lengths, place, acted)
        action = rng.integers(0, 5, len(step.env_id))
        acted |= dict(zip(step.env_id.tolist(), action.tolist(), strict=True))
        pool.reply(action)
    assert len(place) == len(lengths) or order == "newest first"
    assert ends > 10
    assert engine.ignored - ends in range(len(lengths) + 1)


def check_rows(
    step: EnvStep, lengths: list[int], place: dict[int, tuple[int, int]], acted: dict[int, int]
) -> int:
    """Follows each environment: `place` is its episode and step there. Returns the ends."""
    told = step.episode_info or {}
    ends = 0
    for row, env in enumerate(step.env_id.tolist()):
        shown = tuple(int(value) for value in step.observation[row, 1:])
        assert int(step.observation[row, 0]) == env
        if env not in place:
            assert shown == (0, 0)
            assert step.reset[row]
            assert step.reward[row] == 0.0
            assert not step.terminated[row] | step.truncated[row]
        else:
            episode, steps = place[env]
            assert step.reward[row] == acted[env] + 1
            over = steps + 1 == lengths[env]
            assert shown == ((episode + 1, 0) if over else (episode, steps + 1))
            assert bool(step.reset[row]) == over
            assert bool(step.terminated[row]) == (over and episode % 2 == 0)
            assert bool(step.truncated[row]) == (over and episode % 2 == 1)
            assert (row in told) == over
            if over:
                ends += 1
                assert step.final_observation is not None
                assert step.final_observation[row].tolist() == [env, episode, lengths[env]]
                assert told[row] == {"x_position": lengths[env] * 0.5}
        place[env] = (shown[0], shown[1])
    return ends


def test_rows_in_step_come_in_order_also_after_ends() -> None:
    env = vector(Engine([3, 9, 9, 9], 4, "first come"))
    step = env.reset()
    for _ in range(20):
        assert step.env_id.tolist() == sorted(step.env_id.tolist())
        env.send(np.zeros(len(step.env_id), np.int64))
        step = env.recv()


def test_images_become_frames_or_channels_last() -> None:
    def image(*shape: int) -> gym.spaces.Box:
        return gym.spaces.Box(0, 255, shape, np.uint8)

    value = np.arange(2 * 3 * 8 * 9, dtype=np.uint8).reshape(2, 3, 8, 9)
    colours = observations(image(3, 8, 9))
    assert colours.space == image(8, 9, 3)
    np.testing.assert_array_equal(colours.convert(value)[1, 4, 5], value[1, :, 4, 5])
    frame = observations(image(1, 8, 9))
    assert frame.space == image(8, 9)
    np.testing.assert_array_equal(frame.convert(value[:, :1]), value[:, 0])
    for as_it_is in (image(72, 96, 4), image(7, 7, 3), image(96)):
        assert observations(as_it_is).space == as_it_is


def test_float64_becomes_float32_and_bounds_nobody_knows_are_infinite() -> None:
    limits = np.finfo(np.float64)
    odd = gym.spaces.Box(limits.tiny, limits.max, (3,), np.float64)
    found = observations(odd)
    assert found.space == gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
    assert found.convert(np.ones((2, 3))).dtype == np.float32
    with pytest.raises(ConfigError, match="finite"):
        EnvSpec(name="odd", observation_space=found.space, action_space=actions("odd", odd).space)


def test_nested_observations_are_packed_by_the_batch() -> None:
    space = gym.spaces.Dict(
        {
            "height": gym.spaces.Box(-np.inf, np.inf, (), np.float64),
            "joint": gym.spaces.Dict({"angle": gym.spaces.Box(-1.0, 1.0, (2, 2), np.float64)}),
            "turn": gym.spaces.Discrete(4, start=-1),
        }
    )
    found = observations(space)
    rng = np.random.default_rng(0)
    value = {
        "height": rng.normal(size=3),
        "joint": {"angle": rng.uniform(-1, 1, (3, 2, 2))},
        "turn": np.array([-1, 0, 2], np.int32),
    }
    rows = found.convert(value)
    assert found.structure == space
    assert all(found.space.contains(row) for row in rows)
    for index in range(3):
        alone = np.zeros(found.space.shape, np.uint8)
        one = {
            "height": value["height"][index],
            "joint": {"angle": value["joint"]["angle"][index]},
            "turn": value["turn"][index],
        }
        tree.pack(tree.leaves(space), one, alone)
        np.testing.assert_array_equal(rows[index], alone)
    single = observations(gym.spaces.Discrete(16))
    np.testing.assert_array_equal(single.convert(np.array([3, 15])).view(np.int64)[:, 0], [3, 15])


def test_actions_are_cut_into_what_the_environment_takes() -> None:
    shifted = actions("x", gym.spaces.Discrete(3, start=2))
    assert shifted.space == gym.spaces.Discrete(3)
    assert shifted.convert(np.array([0, 2])).tolist() == [2, 4]
    board = actions("x", gym.spaces.Box(np.array([[0, -1]]), np.array([[3, 1]]), dtype=np.int32))
    assert board.space == gym.spaces.MultiDiscrete([4, 3])
    assert board.convert(np.array([[3, 0], [0, 2]])).tolist() == [[[3, -1]], [[0, 1]]]
    pushes = actions("x", gym.spaces.Box(-2.0, 1.0, (2, 3), np.float64))
    assert pushes.space == gym.spaces.Box(-2.0, 1.0, (6,), np.float32)
    assert pushes.convert(np.zeros((5, 6), np.float32)).shape == (5, 2, 3)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"frame_stack": -1}, "frame_stack"),
        ({"max_episode_steps": -1}, "max_episode_steps"),
        ({"env_kwargs": "{"}, "JSON"),
        ({"env_kwargs": "[" * 100_000}, "JSON"),
        ({"env_kwargs": '{"a": ' + "9" * 5000 + "}"}, "JSON"),
        ({"env_kwargs": "[1]"}, "JSON object"),
        ({"env_kwargs": '{"episodic_life": true}'}, "ALE/"),
        ({"env_kwargs": '{"reward_clip": true}'}, "reward_transform"),
        ({"env_kwargs": '{"base_path": "/"}'}, "base_path"),
    ],
)
def test_settings_that_cannot_be_are_refused(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        EnvpoolConfig(**wrong)


def test_without_envpool_one_learns_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "envpool", None)
    with pytest.raises(ConfigError, match=r"pip install 'headrace\[envpool\]'"):
        ENVPOOL.spec("envpool:Hopper-v5", EnvpoolConfig())


def test_the_family_can_be_imported_without_envpool_and_torch() -> None:
    code = (
        "import sys, headrace.envs.envpool; sys.exit(bool({'envpool', 'torch'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A package of one game, with the defaults that must be changed."""
    package = ModuleType("envpool")
    names = namedtuple("Config", ("stack_num", "frame_skip", "max_num_players", "task"))
    asked: list[dict[str, Any]] = []

    class Spec:
        def __init__(self, **kwargs: Any) -> None:
            defaults = {"stack_num": 4, "frame_skip": 4, "max_num_players": 1, "task": ""}
            self.config = names(**defaults | kwargs)
            self.observation_space = gym.spaces.Box(
                0, 255, (self.config.stack_num, 84, 84), np.uint8
            )
            self.action_space = gym.spaces.Discrete(6)

    def make_spec(task: str, **kwargs: Any) -> Spec:
        asked.append(kwargs)
        return Spec(**kwargs)

    package.__dict__.update(
        list_all_envs=lambda: ["Pong-v5", "MsPacman-v5"], make_spec=make_spec, asked=asked
    )
    monkeypatch.setitem(sys.modules, "envpool", package)
    return package


def test_an_image_is_a_single_frame_that_the_policy_stacks(fake: ModuleType) -> None:
    spec = ENVPOOL.spec("envpool:Pong-v5", EnvpoolConfig())
    assert fake.asked[-1]["stack_num"] == 1
    assert spec.stacked_shape == (4, 84, 84)
    assert spec.action_repeat == 4
    config = EnvpoolConfig(frame_stack=2, env_kwargs='{"frame_skip": 3}')
    spec = ENVPOOL.spec("envpool:Pong-v5", config)
    assert (spec.frame_stack, spec.action_repeat) == (2, 3)


@pytest.mark.parametrize("typed", ["envpool:Pong-v4", "envpool:ALE/Pong-v5", "envpool:pong"])
def test_an_unknown_name_names_the_nearest(fake: ModuleType, typed: str) -> None:
    with pytest.raises(ConfigError, match="nearest: envpool:Pong-v5"):
        ENVPOOL.spec(typed, EnvpoolConfig())


def test_settings_that_it_does_not_have_are_refused(fake: ModuleType) -> None:
    with pytest.raises(ConfigError, match="colour"):
        ENVPOOL.spec("envpool:Pong-v5", EnvpoolConfig(env_kwargs='{"colour": 1}'))


def test_several_players_are_refused(fake: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    make_spec = fake.make_spec
    monkeypatch.setattr(fake, "make_spec", lambda *a, **k: make_spec(*a, max_num_players=2, **k))
    with pytest.raises(ConfigError, match="several players"):
        ENVPOOL.spec("envpool:Pong-v5", EnvpoolConfig())
