"""PointMass: the return that is said to be best is, and the clock alone ends an episode."""

import numpy as np
import pytest

from headrace.envs import pointmass
from headrace.envs.pointmass import POINTMASS, PointMassConfig, best_return
from headrace.envs.toys import ToyEnv
from headrace.errors import ConfigError
from headrace.pools.inline import InlinePool


def make(num_envs: int = 3, *, steps: int = 50, seed: int = 0, first_env: int = 0) -> ToyEnv:
    return POINTMASS.make(
        "pointmass",
        PointMassConfig(episode_steps=steps),
        num_envs=num_envs,
        batch_size=num_envs,
        threads=1,
        seed=seed,
        first_env=first_env,
    )


def best_action(position: np.ndarray) -> np.ndarray:
    return np.clip(-position / pointmass.STEP, -1.0, 1.0).astype(np.float32)


def all_starts() -> np.ndarray:
    place = np.linspace(-1.0, 1.0, pointmass.START_PLACES)
    return np.stack(np.meshgrid(place, place), axis=-1).reshape(-1, 2)


@pytest.mark.parametrize("steps", [1, 7, 50])
def test_the_best_policy_has_the_best_return_from_every_start(steps: int) -> None:
    env = make(500, steps=steps)
    rows, ids = env.reset(), np.arange(500, dtype=np.int32)
    start, total = rows.observation.copy(), np.zeros(500)
    for _ in range(steps):
        rows = env.step(ids, best_action(rows.observation))
        total += rows.reward
    assert rows.truncated.all()
    np.testing.assert_allclose(total, best_return(start, steps), atol=1e-5)


def test_no_other_policy_does_better() -> None:
    # All that many other pushes reach on one axis.
    reachable, step = {0.34}, pointmass.STEP
    for made in range(1, 6):
        pushes = np.linspace(-1, 1, 21)
        reachable = {round(abs(x + step * push), 4) for x in reachable for push in pushes}
        assert min(reachable) == pytest.approx(max(0.0, 0.34 - step * made), abs=1e-9)


def test_the_constants_are_those_of_the_definition_and_random_is_far_from_best() -> None:
    assert best_return(all_starts(), 50).mean() == pytest.approx(pointmass.BEST_RETURN, abs=1e-5)
    num_envs = 4000
    env, rng = make(num_envs), np.random.default_rng(1)
    env.reset()
    ids, total = np.arange(num_envs, dtype=np.int32), np.zeros(num_envs)
    for _ in range(50):
        total += env.step(ids, rng.uniform(-1, 1, (num_envs, 2)).astype(np.float32)).reward
    # The standard deviation of one episode is about 1.5.
    assert total.mean() == pytest.approx(pointmass.RANDOM_RETURN, abs=5 * 1.5 / num_envs**0.5)
    assert total.mean() < 10 * pointmass.BEST_RETURN


def test_the_clock_truncates_and_shows_where_the_point_was() -> None:
    env, ids = make(steps=4), np.arange(3, dtype=np.int32)
    position = env.reset().observation
    push = np.full((3, 2), 0.5, np.float32)
    for made in range(1, 13):
        rows = env.step(ids, push)
        moved = np.minimum(position + 0.05, 1.0)
        ended = made % 4 == 0
        assert (rows.reset == ended).all()
        assert (rows.truncated == ended).all()
        assert not rows.terminated.any()
        np.testing.assert_allclose(rows.reward, -0.1 * np.linalg.norm(moved, axis=1), rtol=1e-5)
        shown = rows.final_observation if ended else rows.observation
        assert shown is not None
        np.testing.assert_allclose(shown, moved, atol=1e-6)
        assert (rows.final_observation is not None) == ended
        position = rows.observation


def test_a_subset_steps_alone() -> None:
    env = make()
    first = env.reset().observation
    two = np.array([2, 0], dtype=np.int32)
    rows = env.step(two, np.array([[1, 0], [0, -1]], np.float32))
    moved = np.clip(first[two] + [[0.1, 0.0], [0.0, -0.1]], -1, 1)
    np.testing.assert_allclose(rows.observation, moved, atol=1e-6)
    rows = env.step(np.array([1], dtype=np.int32), np.zeros((1, 2), np.float32))
    np.testing.assert_array_equal(rows.observation, first[[1]])


def test_starts_cover_the_square_and_hang_on_seed_number_and_episode() -> None:
    def starts(env: ToyEnv) -> np.ndarray:
        ids = np.arange(env.num_envs, dtype=np.int32)
        still = np.zeros((len(ids), 2), np.float32)
        shown = [env.reset().observation]
        shown += [env.step(ids, still).observation for _ in range(3)]
        return np.stack(shown, axis=1)

    whole = starts(make(2000, steps=1))
    assert np.abs(whole).max() <= 1.0
    assert (np.abs(whole).max(axis=0) > 0.98).all()
    np.testing.assert_allclose(whole.mean(axis=0), 0.0, atol=0.06)
    np.testing.assert_array_equal(starts(make(10, steps=1, first_env=20)), whole[20:30])
    assert (starts(make(10, steps=1, seed=1)) != whole[:10]).any()
    assert np.abs(np.corrcoef(whole.reshape(2000, -1).T) - np.eye(8)).max() < 0.12


def test_a_pool_takes_its_actions_and_goes_on_from_a_snapshot() -> None:
    def play(pool: InlinePool, rounds: int, seed: int) -> np.ndarray:
        rng, shown = np.random.default_rng(seed), []
        for _ in range(rounds):
            rows = pool.receive(1.0)
            assert rows is not None
            shown.append(np.concatenate([rows.observation, rows.reward[:, None]], axis=1))
            pool.reply(rng.uniform(-1, 1, (2, 2)).astype(np.float32))
        return np.stack(shown)

    pool, other = (InlinePool(make(4, steps=5), batch_size=2) for _ in range(2))
    play(pool, 13, seed=0)
    other.restore(pool.snapshot())
    np.testing.assert_array_equal(play(pool, 20, seed=1), play(other, 20, seed=1))


def test_what_is_wrong_is_refused() -> None:
    with pytest.raises(ConfigError, match="episode_steps"):
        PointMassConfig(episode_steps=0)
    with pytest.raises(ConfigError, match="did you mean 'pointmass'"):
        POINTMASS.spec("pointmas", PointMassConfig())
