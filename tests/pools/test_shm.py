"""How environments are cut into blocks; all else of the pool is in the contract and the faults."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from headrace import catalog
from headrace.pools.settings import WorkerConfig
from headrace.pools.shm import ShmPool, WorkerEnvs, blocks_of


@given(
    num_envs=st.integers(1, 300),
    workers=st.integers(1, 40),
    groups=st.integers(1, 9),
    max_envs=st.integers(1, 300),
)
def test_blocks_are_whole_even_and_never_too_large(
    num_envs: int, workers: int, groups: int, max_envs: int
) -> None:
    workers, max_envs = min(workers, num_envs), min(max_envs, num_envs)
    of_workers = blocks_of(num_envs, workers=workers, groups=groups, max_envs=max_envs)
    counts = [len(blocks) for blocks in of_workers]
    assert len(counts) == workers
    assert 1 <= min(counts) <= max(counts) <= min(counts) + 1
    blocks = [block for blocks in of_workers for block in blocks]
    sizes = [end - first for first, end in blocks]
    assert [first for first, _ in blocks] == [0, *np.cumsum(sizes)[:-1].tolist()]
    assert sum(sizes) == num_envs
    assert 1 <= min(sizes) <= max(sizes) <= min(min(sizes) + 1, max_envs)
    if workers * groups * max_envs >= num_envs:
        assert len(blocks) <= workers * groups


def test_the_groups_of_a_worker_are_one_stretch() -> None:
    halves = [[(0, 16), (16, 32)], [(32, 48), (48, 64)]]
    assert blocks_of(64, workers=2, groups=2, max_envs=32) == halves


def test_batches_of_one_from_workers_with_unequal_shares() -> None:
    family = catalog.environment_family("catch")
    spec = family.spec("catch", family.config_type())
    recipe = WorkerEnvs(env="catch", settings={}, spec=spec, num_envs=5, seed=0)
    pool = ShmPool(recipe, batch_size=1, workers=WorkerConfig(num_workers=2))
    seen = set()
    for _ in range(100_000):  # one worker may be ready a second before the other
        step = pool.receive(30.0)
        assert step is not None
        seen.add(int(step.env_id[0]))
        pool.reply(np.zeros(1, dtype=np.int64))
        if len(seen) == 5:
            break
    pool.close()
    assert seen == {0, 1, 2, 3, 4}


def test_how_environments_are_spread_does_not_change_what_they_do() -> None:
    family = catalog.environment_family("catch")
    spec = family.spec("catch", family.config_type())
    recipe = WorkerEnvs(env="catch", settings={}, spec=spec, num_envs=6, seed=4)
    played = []
    for workers, groups in ((1, 1), (2, 2), (3, 1)):
        config = WorkerConfig(num_workers=workers, groups_per_worker=groups)
        pool = ShmPool(recipe, batch_size=6, workers=config, full_batches=True)
        rows = []
        for _ in range(25):
            step = pool.receive(30.0)
            assert step is not None
            rows.append(step.observation.copy())
            pool.reply(step.env_id.astype(np.int64) % 3)
        pool.close()
        played.append(np.stack(rows))
    np.testing.assert_array_equal(played[0], played[1])
    np.testing.assert_array_equal(played[0], played[2])
