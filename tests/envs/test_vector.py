"""Vectors of the user's: each row goes the same way as the environment alone."""

import itertools
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers.vector import RecordEpisodeStatistics

from headrace import catalog
from headrace.envs.gymnasium import GYMNASIUM
from headrace.envs.gymnasium_batch import GymnasiumBatch
from headrace.envs.gymnasium_vector import FirstOf, VectorBatch
from headrace.envs.wrappers import GymnasiumConfig
from headrace.errors import ConfigError, EnvironmentFault
from headrace.pools.inline import InlinePool
from headrace.steps import EnvStep

sys.path.append(str(Path(__file__).parents[1] / "pools"))
from counters import Counter, Counters

MODES = list(AutoresetMode)
KINDS = [("plain", ""), ("plain", "info"), ("dict", ""), ("dict", "part"), ("tuple", "info")]
STEPS = 40


def chosen(step: EnvStep, row: int, count: int) -> int:
    """The action of an environment after `count` rows."""
    if step.action_mask is None:
        return count % 4
    allowed = np.flatnonzero(step.action_mask[row])
    return int(allowed[count % len(allowed)])


def streams(pool: InlinePool, steps: int = STEPS) -> list[list[tuple[Any, ...]]]:
    """All that each environment shows, in its order, at least `steps` rows of each."""
    rows: list[list[tuple[Any, ...]]] = [[] for _ in range(pool.num_envs)]
    while min(map(len, rows)) < steps:
        step = pool.receive(1.0)
        assert step is not None
        actions = []
        for row, env in enumerate(step.env_id.tolist()):
            ended = bool(step.terminated[row] or step.truncated[row])
            assert not (step.terminated[row] and step.truncated[row])
            final = mask = final_mask = None
            if ended:
                assert step.final_observation is not None
                final = step.final_observation[row].tobytes()
            if step.action_mask is not None:
                mask = step.action_mask[row].tolist()
            if step.truncated[row] and step.final_action_mask is not None:
                final_mask = step.final_action_mask[row].tolist()
            rows[env].append(
                (
                    step.observation[row].tobytes(),
                    float(step.reward[row]),
                    (bool(step.reset[row]), bool(step.terminated[row]), bool(step.truncated[row])),
                    (final, mask, final_mask),
                    (step.episode_info or {}).get(row),
                )
            )
            actions.append(chosen(step, row, len(rows[env])))
        pool.reply(np.array(actions))
    pool.close()
    return [row[:steps] for row in rows]


def alone(count: int, *, seed: int = 1, **settings: Any) -> list[list[tuple[Any, ...]]]:
    batch = GymnasiumBatch([Counter(row, **settings) for row in range(count)], name="c", seed=seed)
    return streams(InlinePool(batch, batch_size=count))


def batch_of(*vectors: Any, first_env: int = 0, strictness: Any = "strict") -> VectorBatch:
    return VectorBatch(
        vectors, name="c", seed=1, fixed=False, first_env=first_env, strictness=strictness
    )


def pool_of(batch: VectorBatch) -> InlinePool:
    return InlinePool(batch, batch_size=batch.num_envs, groups=[(0, batch.num_envs)])


@pytest.mark.parametrize("batched", [False, True], ids=["", "batched"])
@pytest.mark.parametrize(("kind", "mask"), KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_each_row_goes_the_way_of_the_environment_alone(
    mode: AutoresetMode, kind: str, mask: str, batched: bool
) -> None:
    vector = Counters(7, mode, kind=kind, mask=mask, batched=batched)
    batch = batch_of(vector)
    wanted = alone(7, kind=kind, mask=mask)
    assert streams(pool_of(batch)) == wanted
    assert sum(bool(row[2][0]) for row in wanted[0]) > STEPS / 4  # many ends
    assert batch.notices == []
    assert all(env.closed for env in vector.envs)


@pytest.mark.parametrize(("lengths", "count"), [((1,), 3), ((2,), 3), ((1,), 1), ((3, 1), 1)])
@pytest.mark.parametrize("mode", MODES)
def test_all_rows_may_end_at_once(
    mode: AutoresetMode, lengths: tuple[int, ...], count: int
) -> None:
    batch = batch_of(Counters(count, mode, lengths=lengths))
    assert streams(pool_of(batch)) == alone(count, lengths=lengths)


@pytest.mark.parametrize("mode", MODES)
def test_vectors_of_gymnasium_have_a_seed_for_each_row(mode: AutoresetMode) -> None:
    def envs(count: int) -> list[Any]:
        return [lambda: gym.make("CartPole-v1")] * count

    vectors = [SyncVectorEnv(envs(count), autoreset_mode=mode) for count in (3, 2)]
    batch = VectorBatch(vectors, name="CartPole-v1", seed=5, fixed=False, first_env=2)
    got = streams_of_two(InlinePool(batch, batch_size=5, groups=[(0, 3), (3, 5)]))
    singles = [make() for make in envs(5)]
    single = GymnasiumBatch(singles, name="CartPole-v1", seed=5, first_env=2)
    assert got == streams_of_two(InlinePool(single, batch_size=5))


def streams_of_two(pool: InlinePool) -> list[list[tuple[Any, ...]]]:
    """With actions that CartPole has."""
    reply = pool.reply
    pool.reply = lambda action: reply(action % 2)  # type: ignore[method-assign]
    return streams(pool, 100)


@pytest.mark.parametrize("mode", MODES)
def test_wrappers_of_vectors_are_vectors(mode: AutoresetMode) -> None:
    batch = batch_of(RecordEpisodeStatistics(Counters(3, mode)), strictness="normal")
    got = streams(pool_of(batch))
    assert [[row[:4] for row in rows] for rows in got] == [
        [row[:4] for row in rows] for rows in alone(3)
    ]


@pytest.mark.parametrize("mode", MODES)
def test_a_part_of_a_vector_is_shown_alone(mode: AutoresetMode) -> None:
    pool = InlinePool(
        FirstOf(batch_of(Counters(5, mode, mask="info")), 1), batch_size=1, groups=[(0, 1)]
    )
    assert streams(pool) == alone(1, mask="info")


def test_what_a_worker_writes_is_what_a_step_returns() -> None:
    def made() -> VectorBatch:
        return batch_of(*(Counters(3, AutoresetMode.NEXT_STEP, mask="info") for _ in range(2)))

    one, other = made(), made()
    first = one.reset()
    other.reset()
    ids = np.arange(6, dtype=np.int32)
    out = other._rows(ids)
    for count in range(30):
        action = np.array([chosen(first, row, count) for row in range(6)])
        first = one.step(ids, action)
        ended, infos = other.step_into(out, action)
        assert (infos, ended) == (first.episode_info, first.final_observation is not None)
        for name in ("observation", "reward", "reset", "terminated", "truncated"):
            np.testing.assert_array_equal(getattr(first, name), getattr(out, name))
        present = ~out.absent
        np.testing.assert_array_equal(first.action_mask[present], out.action_mask[present])


class Broken(Counters):
    """Does what `how` says."""

    def __init__(self, mode: AutoresetMode, how: str) -> None:
        super().__init__(3, mode)
        self.how = how

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        if self.how == "resets all" and options:
            options = None
        result = super().reset(seed=seed, options=options)
        return {"no tuple": 3, "no rows": (np.zeros((2, 4), np.float32), {})}.get(self.how, result)

    def step(self, actions: Any) -> Any:
        observation, reward, terminated, truncated, info = super().step(actions)
        if self.how == "raises":
            raise ValueError("the moon")
        if self.how == "reward":
            reward = reward[:, None]
        if self.how == "nan":
            reward[1] = np.nan
        if self.how == "no final":
            info.pop("final_obs", None)
        if self.how == "observation":
            observation = observation[:, :3]
        if self.how == "ends twice":
            terminated[:] = True
        if self.how == "late mask":
            info["action_mask"] = np.ones((3, 4))
        return observation, reward, terminated, truncated, info


@pytest.mark.parametrize(
    ("mode", "how", "text"),
    [
        ("DISABLED", "resets all", "must reset those of the mask alone"),
        ("DISABLED", "no tuple", "reset must return .observations, infos., not 3"),
        ("DISABLED", "no rows", r"of shape \(2, 4\), which is not one for each of its 3"),
        ("NEXT_STEP", "raises", "step raised ValueError: the moon"),
        ("NEXT_STEP", "reward", r"rewards of shape \(3, 1\): return one for each of its 3"),
        ("NEXT_STEP", "nan", "environment 1 .c.: step returned the reward .*nan"),
        ("NEXT_STEP", "observation", r"shape \(3,\), but its space says \(4,\)"),
        ("NEXT_STEP", "ends twice", "only begins the next episode, ended that"),
        ("NEXT_STEP", "late mask", "put it in both"),
        ("SAME_STEP", "no final", "has no last observation of it"),
    ],
)
def test_a_broken_vector_is_named(mode: str, how: str, text: str) -> None:
    def play() -> None:
        streams(pool_of(batch_of(Broken(AutoresetMode[mode], how))))

    with pytest.raises(EnvironmentFault, match=text):
        play()


def make(name: str, num_envs: int, batch_size: int, **settings: Any) -> Any:
    return GYMNASIUM.make(
        f"counters:{name}",
        GymnasiumConfig(**settings),
        num_envs=num_envs,
        batch_size=batch_size,
        threads=1,
        seed=0,
    )


def test_a_factory_is_asked_for_what_a_batch_holds() -> None:
    batch = make("next_step", 8, 5)
    assert [stretch.env.num_envs for stretch in batch._stretches.values()] == [4, 4]
    assert batch.spec.vector_envs == 0
    batch = make("of_two", 8, 5)
    assert [stretch.env.num_envs for stretch in batch._stretches.values()] == [2, 2, 2, 2]
    assert batch.spec.vector_envs == 2
    batch = make("of_gymnasium", 6, 3, env_kwargs='{"num_envs": 3}')
    assert [stretch.env.num_envs for stretch in batch._stretches.values()] == [3, 3]


def test_an_environment_may_have_a_setting_of_that_name() -> None:
    batch = make("not_a_vector", 2, 1)
    assert isinstance(batch, GymnasiumBatch)
    assert batch.reset().observation[:, 0].tolist() == [7.0, 7.0]


@pytest.mark.parametrize(
    ("name", "settings", "text"),
    [
        ("next_step", {"frame_skip": 2}, "leave out --frame-skip"),
        ("next_step", {"time_limit": 9}, "leave out --time-limit"),
        ("next_step", {"grey": True}, "leave out --grey"),
        ("next_step", {"resize": 9}, "leave out --resize"),
        ("without_a_mode", {}, r'metadata\["autoreset_mode"\] is None; set it to NEXT_STEP'),
        ("too_few", {}, "gave a vector of 1 environments where one of 4 is needed"),
    ],
)
def test_what_a_vector_cannot_have_is_refused(
    name: str, settings: dict[str, Any], text: str
) -> None:
    with pytest.raises(ConfigError, match=text):
        make(name, 4, 4, **settings)


@pytest.mark.parametrize("name", ["next_step", "same_step", "disabled", "of_two"])
def test_the_spec_is_that_of_one_environment(name: str) -> None:
    spec = catalog.environment_family(f"counters:{name}").spec(
        f"counters:{name}", GymnasiumConfig(frame_stack=2)
    )
    assert spec.observation_space == Counter().observation_space
    assert spec.action_space == gym.spaces.Discrete(4)
    assert (spec.frame_stack, spec.has_action_mask) == (2, name != "of_two")
    assert spec.whole_vectors(3) == (4 if name == "of_two" else 3)


def test_episodes_end_where_they_are_counted() -> None:
    """Each step of an episode is one row: the sum of its rewards is what it gave."""
    rows = streams(pool_of(batch_of(Counters(4, AutoresetMode.NEXT_STEP))))
    for shown in rows:
        lengths, steps = [], 0
        for _, _, (reset, _, _), _, _ in itertools.islice(shown, 1, None):
            steps += 1
            if reset:
                lengths.append(steps)
                steps = 0
        assert set(lengths) <= {1, 2, 3, 4}
        assert len(lengths) > STEPS / 4
