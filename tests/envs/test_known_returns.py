"""Catch and Recall: what they do at each step, and that the best return can be reached."""

import subprocess
import sys

import numpy as np
import pytest

from headrace.envs import catch, recall
from headrace.envs.catch import CATCH, CatchConfig
from headrace.envs.draws import draw, stream_keys
from headrace.envs.recall import RECALL, RecallConfig
from headrace.envs.toys import ToyEnv
from headrace.errors import ConfigError

ALL = np.arange(3, dtype=np.int32)


def make_catch(*, truncate_after: int = 0, seed: int = 0) -> ToyEnv:
    config = CatchConfig(truncate_after=truncate_after)
    return CATCH.make("catch", config, num_envs=3, batch_size=3, threads=1, seed=seed)


def make_recall(*, delay_steps: int, num_cues: int = 2) -> ToyEnv:
    config = RecallConfig(delay_steps=delay_steps, num_cues=num_cues)
    return RECALL.make("recall", config, num_envs=3, batch_size=3, threads=1, seed=0)


def follow_the_ball(board: np.ndarray) -> np.ndarray:
    """One step towards the ball, from the boards alone."""
    ball = board[:, :-1].any(axis=1).argmax(axis=1)
    paddle = board[:, -1].argmax(axis=1)
    return np.sign(ball - paddle) + 1


def test_whoever_follows_the_ball_catches_it() -> None:
    env = make_catch()
    step = env.reset()
    returns = []
    for _ in range(9 * 20):
        step = env.step(ALL, follow_the_ball(step.observation))
        assert (step.reward[~step.reset] == 0).all()
        returns += step.reward[step.reset].tolist()
    assert returns == [catch.BEST_RETURN] * 60


def test_whoever_stays_misses_most() -> None:
    env = make_catch()
    env.reset()
    rewards = [env.step(ALL, np.ones(3, dtype=np.int64)).reward for _ in range(9 * 100)]
    caught = np.mean(np.stack(rewards)[8::9] == 1.0)
    assert caught == pytest.approx(1 / catch.COLUMNS, abs=0.08)


def test_the_ball_falls_and_the_paddle_stops_at_the_wall() -> None:
    env = make_catch()
    first = env.reset().observation
    assert first.shape == (3, catch.ROWS, catch.COLUMNS)
    for row in range(1, 9):
        step = env.step(ALL, np.zeros(3, dtype=np.int64))
        np.testing.assert_array_equal(step.observation[:, row], first[:, 0])
        assert (step.observation[:, -1, max(0, 2 - row)] == 1.0).all()
        assert (step.observation.sum(axis=(1, 2)) == 2.0).all()


def test_an_ended_board_shows_the_next_episode_and_keeps_its_last() -> None:
    env = make_catch()
    first = env.reset().observation
    for _ in range(9):
        step = env.step(ALL, np.ones(3, dtype=np.int64))
    assert step.terminated.all()
    assert step.reset.all()
    assert step.final_observation is not None
    lowest = np.maximum(first[:, 0], np.eye(catch.COLUMNS, dtype=np.float32)[2])
    np.testing.assert_array_equal(step.final_observation[:, -1], lowest)
    assert (step.observation[:, 0].sum(axis=1) == 1.0).all()


@pytest.mark.parametrize(("truncate_after", "terminates"), [(1, False), (8, False), (9, True)])
def test_catch_is_truncated_by_its_clock_unless_it_ended(
    truncate_after: int, terminates: bool
) -> None:
    env = make_catch(truncate_after=truncate_after)
    env.reset()
    steps = [env.step(ALL, np.ones(3, dtype=np.int64)) for _ in range(3 * truncate_after)]
    for number, step in enumerate(steps, start=1):
        ended = number % truncate_after == 0
        assert step.terminated.all() == (ended and terminates)
        assert step.truncated.all() == (ended and not terminates)
        assert step.reset.all() == ended
        assert (step.final_observation is not None) == ended
        if step.final_observation is not None:
            assert step.final_observation[:, truncate_after].any(axis=1).all()


def test_boards_step_one_by_one_as_they_do_together() -> None:
    together, alone = make_catch(), make_catch()
    together.reset()
    alone.reset()
    rng = np.random.default_rng(0)
    action = rng.integers(0, 3, (40, 3))
    rows = [together.step(ALL, action[t]).observation for t in range(40)]
    for board in (2, 0, 1):
        env_id = ALL[[board]]
        mine = [alone.step(env_id, action[t, [board]]).observation[0] for t in range(40)]
        np.testing.assert_array_equal(np.stack(mine), np.stack(rows)[:, board])


@pytest.mark.parametrize("delay_steps", [0, 1, 5])
@pytest.mark.parametrize("num_cues", [2, 4])
def test_whoever_remembers_the_cue_answers_right(delay_steps: int, num_cues: int) -> None:
    env = make_recall(delay_steps=delay_steps, num_cues=num_cues)
    step = env.reset()
    for _ in range(30):
        cue = step.observation[:, :-1].argmax(axis=1)
        assert (step.observation.sum(axis=1) == 1.0).all()
        assert (step.observation[:, -1] == 0.0).all()
        for _ in range(delay_steps):
            step = env.step(ALL, cue)
            assert not step.observation.any()
            assert not step.reset.any()
        step = env.step(ALL, (cue + 1) % num_cues)
        assert (step.observation[:, -1] == 1.0).all()
        assert (step.observation.sum(axis=1) == 1.0).all()
        step = env.step(ALL, cue)
        assert step.reward.tolist() == [recall.BEST_RETURN] * 3
        assert step.terminated.all()
        assert step.reset.all()


def test_a_wrong_answer_costs_one() -> None:
    env = make_recall(delay_steps=0)
    cue = env.reset().observation[:, :-1].argmax(axis=1)
    env.step(ALL, cue)
    assert env.step(ALL, 1 - cue).reward.tolist() == [-1.0] * 3


def test_draws_are_uniform_and_do_not_depend_on_the_number_of_environments() -> None:
    np.testing.assert_array_equal(stream_keys(5, 7)[:3], stream_keys(5, 3))
    key = stream_keys(0, 100)
    value = np.stack([draw(key, np.full(100, count), 5) for count in range(200)])
    share = np.bincount(value.ravel(), minlength=5) / value.size
    np.testing.assert_allclose(share, 0.2, atol=0.015)
    neighbours = np.mean(value[1:] == value[:-1]), np.mean(value[:, 1:] == value[:, :-1])
    np.testing.assert_allclose(neighbours, 0.2, atol=0.015)


def test_draws_are_those_of_splitmix64() -> None:
    # First outputs of the reference implementation seeded with 1234567.
    first = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    key = np.full(3, 1234567, dtype=np.uint64)
    value = draw(key, np.arange(3), 2**62)
    assert value.tolist() == [word % 2**62 for word in first]


@pytest.mark.parametrize(
    ("config_type", "wrong"),
    [(CatchConfig, {"truncate_after": -1}), (RecallConfig, {"delay_steps": -1}),
     (RecallConfig, {"num_cues": 1})],
)  # fmt: skip
def test_settings_out_of_range_are_refused(config_type: type, wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        config_type(**wrong)


def test_workers_step_them_without_torch() -> None:
    code = """
import sys
from headrace import catalog
for name in ("catch", "pointmass", "recall"):
    family = catalog.environment_family(name)
    config = family.config_type()
    env = family.make(name, config, num_envs=3, batch_size=3, threads=1, seed=0)
    rows = env.reset()
    env.step(rows.env_id, rows.reward[:, None] if env.spec.action_shape else rows.run_id)
sys.exit("torch" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
