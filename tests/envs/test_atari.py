"""Atari: that every setting has its effect, and that every row says what the emulator did."""

import subprocess
import sys
from dataclasses import fields, replace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from headrace.envs import atari
from headrace.envs.atari import ATARI, AtariConfig, games
from headrace.envs.atari_vector import AtariVector
from headrace.errors import ConfigError
from headrace.specs import EnvSpec
from headrace.steps import EnvStep

pytest.importorskip("ale_py")

BREAKOUT = "ALE/Breakout-v5"


def run(
    name: str,
    config: AtariConfig,
    steps: int,
    *,
    num_envs: int = 2,
    seed: int = 1,
    same: bool = False,
) -> list[EnvStep]:
    """Random play in lockstep; `same` gives all copies the same actions."""
    env = ATARI.make(name, config, num_envs=num_envs, batch_size=num_envs, threads=2, seed=seed)
    rng = np.random.default_rng(0)
    rows = [env.reset()]
    for _ in range(steps):
        action = rng.integers(0, env.spec.num_actions, num_envs)
        env.send(np.full(num_envs, action[0]) if same else action)
        rows.append(env.recv())
    return rows


def column(rows: list[EnvStep], name: str) -> np.ndarray:
    return np.stack([getattr(row, name) for row in rows])


@pytest.fixture(scope="module")
def with_lives() -> list[EnvStep]:
    return run(BREAKOUT, AtariConfig(), 260)


@pytest.fixture(scope="module")
def without_lives() -> list[EnvStep]:
    return run(BREAKOUT, ATARI.evaluation(AtariConfig()), 260)


def test_a_lost_life_is_told_and_leaves_the_emulator_alone(
    with_lives: list[EnvStep], without_lives: list[EnvStep]
) -> None:
    lost = column(with_lives, "terminated") & ~column(with_lives, "reset")
    assert lost.sum() >= 6
    for name in ("observation", "reward", "reset", "truncated"):
        np.testing.assert_array_equal(column(with_lives, name), column(without_lives, name))
    np.testing.assert_array_equal(
        column(with_lives, "terminated") & ~lost, column(without_lives, "terminated")
    )


def test_a_game_over_is_reset_and_terminated_and_keeps_its_last_frame(
    with_lives: list[EnvStep],
) -> None:
    over = column(with_lives, "reset") & column(with_lives, "terminated")
    assert over.sum() >= 1
    assert not column(with_lives, "truncated").any()
    for before, row, ended in zip(with_lives, with_lives[1:], over[1:], strict=False):
        assert (row.final_observation is not None) == ended.any()
        if row.final_observation is None:
            continue
        last = row.final_observation[ended].astype(int)
        to_before = np.abs(last - before.observation[ended]).sum(axis=(1, 2))
        to_next = np.abs(last - row.observation[ended]).sum(axis=(1, 2))
        assert (to_before < to_next).all()


def test_the_clock_truncates_and_does_not_terminate() -> None:
    rows = run("ALE/Pong-v5", AtariConfig(max_episode_frames=40), 35)
    truncated = column(rows, "truncated")
    assert np.flatnonzero(truncated[:, 0]).tolist() == [10, 20, 30]
    np.testing.assert_array_equal(column(rows, "reset")[1:], truncated[1:])
    assert not column(rows, "terminated").any()
    assert all((row.final_observation is not None) == row.truncated.any() for row in rows)


def test_the_clock_counts_env_frames() -> None:
    rows = run("ALE/Pong-v5", AtariConfig(max_episode_frames=40, frame_skip=2), 35)
    assert np.flatnonzero(column(rows, "truncated")[:, 0]).tolist() == [20]


def test_rewards_are_raw() -> None:
    reward = column(run("ALE/SpaceInvaders-v5", AtariConfig(), 120), "reward")
    assert reward.dtype == np.float32
    assert reward.max() >= 5.0


def test_sticky_actions_and_no_op_starts_are_the_only_chance() -> None:
    still = AtariConfig(noop_max=0)
    looks = column(run("ALE/Pong-v5", still, 60, same=True), "observation")
    np.testing.assert_array_equal(looks[:, 0], looks[:, 1])
    sticky = replace(still, sticky_probability=0.25)
    looks = column(run("ALE/Pong-v5", sticky, 60, same=True), "observation")
    assert (looks[:, 0] != looks[:, 1]).any()
    looks = column(run("ALE/Pong-v5", AtariConfig(), 60, same=True), "observation")
    assert (looks[:, 0] != looks[:, 1]).any()


def test_max_pool_shows_what_flickers() -> None:
    config = AtariConfig(noop_max=0)
    pooled = column(run("ALE/SpaceInvaders-v5", config, 80), "observation")
    newest = column(run("ALE/SpaceInvaders-v5", replace(config, max_pool=False), 80), "observation")
    assert (pooled >= newest).mean() > 0.99
    assert (pooled > newest).any()


def test_frame_size_is_that_of_the_frames() -> None:
    config = AtariConfig(frame_size=42, frame_stack=2)
    rows = run("ALE/Pong-v5", config, 1)
    assert rows[1].observation.shape == (2, 42, 42)
    assert ATARI.spec("ALE/Pong-v5", config).stacked_shape == (2, 42, 42)


@pytest.mark.parametrize(
    ("name", "num_actions"), [("ALE/Pong-v5", 6), (BREAKOUT, 4), ("ALE/Boxing-v5", 18)]
)
def test_actions_are_the_games_own_or_all(name: str, num_actions: int) -> None:
    assert ATARI.spec(name, AtariConfig()).num_actions == num_actions
    assert ATARI.spec(name, AtariConfig(full_action_space=True)).num_actions == 18


def test_all_18_actions_are_taken() -> None:
    config = AtariConfig(full_action_space=True)
    env = ATARI.make("ALE/Pong-v5", config, num_envs=1, batch_size=1, threads=1, seed=0)
    env.reset()
    env.send(np.array([17], dtype=np.int64))
    assert env.recv().env_id.tolist() == [0]


def test_every_argument_of_the_emulators_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    from ale_py import vector_env  # noqa: PLC0415  # optional

    given: dict[str, Any] = {}

    class Recorder:
        def __init__(self, game: str, num_envs: int, **settings: Any) -> None:
            given.update(settings, game=game, num_envs=num_envs)
            self.num_envs, self.batch_size = num_envs, settings["batch_size"]

    real = vector_env.AtariVectorEnv.__init__.__code__
    # The threshold is for continuous actions, which are off.
    arguments = set(real.co_varnames[1 : real.co_argcount + real.co_kwonlyargcount])
    monkeypatch.setattr(vector_env, "AtariVectorEnv", Recorder)
    config = AtariConfig(
        frame_skip=3,
        max_pool=False,
        frame_size=42,
        frame_stack=2,
        noop_max=7,
        sticky_probability=0.25,
        life_loss_ends_episode=False,
        full_action_space=True,
        max_episode_frames=1000,
    )
    assert all(
        getattr(config, field.name) != getattr(AtariConfig(), field.name)
        for field in fields(AtariConfig)
    )
    ATARI.make("ALE/MsPacman-v5", config, num_envs=8, batch_size=4, threads=3, seed=0)
    assert arguments - set(given) == {"continuous_action_threshold"}
    assert given == {
        "game": "ms_pacman",
        "num_envs": 8,
        "batch_size": 4,
        "num_threads": 3,
        "thread_affinity_offset": -1,
        "max_num_frames_per_episode": 1000,
        "repeat_action_probability": 0.25,
        "full_action_space": True,
        "continuous": False,
        "autoreset_mode": "SameStep",
        "img_height": 42,
        "img_width": 42,
        "grayscale": True,
        "stack_num": 1,
        "frameskip": 3,
        "maxpool": False,
        "noop_max": 7,
        "episodic_life": False,
        "life_loss_info": False,
        "reward_clipping": False,
        "use_fire_reset": False,
    }


def test_the_defaults_are_the_impala_papers() -> None:
    assert AtariConfig() == AtariConfig(
        frame_skip=4,
        max_pool=True,
        frame_size=84,
        frame_stack=4,
        noop_max=30,
        sticky_probability=0.0,
        life_loss_ends_episode=True,
        full_action_space=False,
        max_episode_frames=108_000,
    )


def test_evaluation_changes_lives_only() -> None:
    config = AtariConfig(sticky_probability=0.25, full_action_space=True)
    assert ATARI.evaluation(config) == replace(config, life_loss_ends_episode=False)


class Scripted:
    """Emulators whose rows are written down: frame of the episode, terminated, truncated."""

    num_envs = batch_size = 1

    def __init__(self, *rows: tuple[int, bool, bool]) -> None:
        self._rows = iter(rows)
        self.seeds: list[int] = []

    def reset(self, *, seed: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
        self.seeds = seed.tolist()
        observation, _, _, _, info = self.recv()
        return observation, info

    def send(self, actions: np.ndarray) -> None:
        assert actions.dtype == np.int64

    def recv(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        frame, terminated, truncated = next(self._rows)
        info: dict[str, Any] = {
            "env_id": np.zeros(1, np.int32),
            "episode_frame_number": np.array([frame], np.int32),
        }
        if terminated or truncated:
            info["final_obs"] = np.full((1, 1, 2, 2), 9, np.uint8)
        looks = np.full((1, 1, 2, 2), 1, np.uint8)
        reward = np.array([300], np.int32)
        return looks, reward, np.array([terminated]), np.array([truncated]), info


@pytest.mark.parametrize(
    ("before", "frame", "ends", "flags"),
    [
        pytest.param(100, 104, (False, False), (False, False, False), id="goes on"),
        pytest.param(100, 104, (True, False), (False, True, False), id="life lost"),
        pytest.param(100, 7, (True, False), (True, True, False), id="game over"),
        pytest.param(8, 20, (True, False), (True, True, False), id="game over at once"),
        pytest.param(100, 7, (False, True), (True, False, True), id="clock"),
        pytest.param(8, 12, (False, True), (True, False, True), id="clock at once"),
        pytest.param(100, 7, (True, True), (True, True, False), id="both"),
    ],
)
def test_flags_say_what_the_emulator_did(
    before: int, frame: int, ends: tuple[bool, bool], flags: tuple[bool, bool, bool]
) -> None:
    spec = EnvSpec(
        name="scripted",
        observation_space=gym.spaces.Box(0, 255, (2, 2), np.uint8),
        action_space=gym.spaces.Discrete(2),
        action_repeat=4,
    )
    env = AtariVector(Scripted((before, False, False), (frame, *ends)), spec, seed=0)
    first = env.reset()
    assert (bool(first.reset[0]), float(first.reward[0])) == (True, 0.0)
    assert first.final_observation is None
    env.send(np.zeros(1, dtype=np.int64))
    row = env.recv()
    assert (bool(row.reset[0]), bool(row.terminated[0]), bool(row.truncated[0])) == flags
    assert float(row.reward[0]) == 300.0
    assert (row.final_observation is not None) == (flags[0] and any(ends))
    if row.final_observation is not None:
        np.testing.assert_array_equal(row.final_observation, np.full((1, 2, 2), 9))


def test_games_are_those_of_ale_py() -> None:
    known = games()
    assert len(known) >= 104
    assert known == sorted(known)
    assert {"ALE/Pong-v5", "ALE/MsPacman-v5", "ALE/TicTacToe3D-v5"} <= set(known)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("Pong", "ALE/Pong-v5"),
        ("pong", "ALE/Pong-v5"),
        ("PongNoFrameskip-v4", "ALE/Pong-v5"),
        ("ALE/pong-v5", "ALE/Pong-v5"),
        ("ms_pacman", "ALE/MsPacman-v5"),
        ("ALE/Brekout-v5", BREAKOUT),
    ],
)
def test_an_unknown_game_names_the_nearest(typed: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=f"nearest: {meant}"):
        ATARI.spec(typed, AtariConfig())


@pytest.mark.parametrize(
    "wrong",
    [
        {"frame_skip": 0},
        {"frame_size": 0},
        {"frame_stack": 0},
        {"noop_max": -1},
        {"sticky_probability": 1.5},
        {"max_episode_frames": 0},
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        AtariConfig(**wrong)


@pytest.mark.parametrize("batch_size", [0, 3])
def test_a_batch_that_cannot_be_is_refused(batch_size: int) -> None:
    with pytest.raises(ConfigError, match="batch_size"):
        ATARI.make(BREAKOUT, AtariConfig(), num_envs=2, batch_size=batch_size, threads=1, seed=0)


def test_without_ale_py_one_learns_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ale_py", None)
    atari._rom_of_game.cache_clear()
    try:
        with pytest.raises(ConfigError, match=r"pip install 'headrace\[atari\]'"):
            games()
    finally:
        atari._rom_of_game.cache_clear()


def test_the_family_can_be_imported_without_ale_py() -> None:
    code = "import sys, headrace.envs.atari; sys.exit('ale_py' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
