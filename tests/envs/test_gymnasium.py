"""The family: environments by id and by factory, and what is said when there is none."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from headrace.envs import packages
from headrace.envs.gymnasium import GYMNASIUM, random_action
from headrace.envs.wrappers import GymnasiumConfig
from headrace.errors import ConfigError
from headrace.steps import EnvStep

IDS = {
    "CartPole-v1": "gymnasium",
    "HalfCheetah-v5": "mujoco",
    "LunarLander-v3": "Box2D",
    "MiniGrid-Empty-5x5-v0": "minigrid",
    "FrozenLake-v1": "gymnasium",
    "Blackjack-v1": "gymnasium",
    "Taxi-v4": "gymnasium",
}

MODULE = '''
import gymnasium as gym
import numpy as np

class Own(gym.Env):
    """Draws its frames from the same random numbers that decide what happens."""
    metadata = {"render_modes": ["rgb_array"]}
    observation_space = gym.spaces.Box(0, 9, (2,), np.float32)
    action_space = gym.spaces.Discrete(3)

    def __init__(self, start=0.0, render_mode=None):
        print("hello from the constructor")
        self.start, self.render_mode = start, render_mode

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.at, self.steps = self.np_random.integers(3), 0
        return self._show(), {}

    def step(self, action):
        self.steps += 1
        self.at = (self.at + action + self.np_random.integers(2)) % 3
        return self._show(), float(self.at), self.steps == 3, False, {"at": self.at}

    def _show(self):
        return np.array([self.start, self.at], np.float32)

    def render(self):
        return np.full((4, 6, 3), self.at, np.uint8)

def nan():
    env = Own()
    env._show = lambda: np.array([0.0, np.nan], np.float32)
    return env

def blind(start=0.0):
    return Own(start)

def raises():
    raise RuntimeError("no level file")

def drunk():
    import a_module_that_nobody_has

def number():
    return 3

class Undrawable(Own):
    def render(self):
        raise RuntimeError("no display")

NOT_A_FUNCTION = 3
gym.register("Registered-v0", entry_point=Own, max_episode_steps=2)
'''


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Any:
    """A module of the user's, under a name of its own: specs are kept by name."""
    name = f"own_{abs(hash(request.node.nodeid))}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    sys.modules.pop(name, None)
    gym.registry.pop("Registered-v0", None)


def play(
    batch: Any, rounds: int = 30, seed: int = 0, every: np.ndarray | None = None
) -> list[EnvStep]:
    rngs = [np.random.default_rng((seed, env)) for env in range(64)]
    steps = [batch.reset()]
    ids = np.arange(batch.num_envs, dtype=np.int32) if every is None else every
    first = batch._first_env
    for _ in range(rounds):
        mask = steps[-1].action_mask
        actions = [
            random_action(
                batch.spec, None if mask is None else mask[env : env + 1], rngs[first + env]
            )
            for env in ids
        ]
        steps.append(batch.step(ids, np.concatenate(actions)))
    return steps


def make(
    name: str, num_envs: int = 2, *, seed: int = 0, first_env: int = 0, **settings: Any
) -> Any:
    with packages.quietly():
        return GYMNASIUM.make(
            name, GymnasiumConfig(**settings), num_envs=num_envs, batch_size=num_envs, threads=1,
            seed=seed, first_env=first_env,
        )  # fmt: skip


@pytest.mark.parametrize("name", IDS)
def test_known_ids(name: str) -> None:
    pytest.importorskip(IDS[name])
    config = GymnasiumConfig(strictness="strict")
    spec = GYMNASIUM.spec(name, config)
    batch = make(name, 4, strictness="strict")
    assert batch.spec == spec
    assert spec.name == name
    first, *later = play(batch, 60)
    assert first.reset.all()
    for step in later:
        assert all(spec.observation_space.contains(row) for row in step.observation)
        assert (step.reset == (step.terminated | step.truncated)).all()
        assert not (step.terminated & step.truncated).any()
        assert (step.final_observation is not None) == bool(step.reset.any())
    again = play(make(name, 2, first_env=2), 60)
    for one, other in zip([first, *later], again, strict=True):
        np.testing.assert_array_equal(one.observation[2:], other.observation)
        np.testing.assert_array_equal(one.reward[2:], other.reward)
    batch.close()


def test_the_steps_are_those_of_the_environment_itself() -> None:
    batch = make("CartPole-v1", 1, seed=3)
    words = np.random.SeedSequence(3).generate_state(1)
    env = gym.make("CartPole-v1")
    observation, _ = env.reset(seed=int(words[0] >> 1))
    step = batch.reset()
    rng = np.random.default_rng(0)
    ends = 0
    for _ in range(200):
        np.testing.assert_array_equal(step.observation[0], observation)
        action = rng.integers(2, size=1)
        step = batch.step(step.env_id, action)
        observation, reward, terminated, truncated, _ = env.step(action[0])
        assert (step.reward[0], step.terminated[0], step.truncated[0]) == (
            reward, terminated, truncated,
        )  # fmt: skip
        if terminated or truncated:
            ends += 1
            assert step.final_observation is not None
            np.testing.assert_array_equal(step.final_observation[0], observation)
            observation, _ = env.reset()
    assert ends > 3


def test_the_own_time_limit_holds_unless_another_is_set() -> None:
    ends = {}
    for limit in (0, 50, 300):
        steps = play(make("Pendulum-v1", 1, time_limit=limit), 301)
        ends[limit] = [row for row, step in enumerate(steps) if step.truncated[0]]
    assert ends == {0: [200], 50: [50, 100, 150, 200, 250, 300], 300: [300]}


def test_settings_reach_the_spec() -> None:
    spec = GYMNASIUM.spec("CartPole-v1", GymnasiumConfig(frame_stack=3, frame_skip=2))
    assert (spec.frame_stack, spec.action_repeat) == (3, 2)
    kwargs = '{"map_name": "8x8"}'
    spec = GYMNASIUM.spec("FrozenLake-v1", GymnasiumConfig(env_kwargs=kwargs))
    assert spec.structure == gym.spaces.Discrete(64)


def test_pictures_by_id() -> None:
    pytest.importorskip("Box2D")
    config = GymnasiumConfig(grey=True, resize=32, frame_stack=4, frame_skip=4)
    spec = GYMNASIUM.spec("CarRacing-v3", config)
    assert spec.observation_space == gym.spaces.Box(0, 255, (32, 32), np.uint8)
    assert spec.stacked_shape == (4, 32, 32)


def test_a_spec_is_made_once_and_in_silence(own: str, capfd: pytest.CaptureFixture[str]) -> None:
    config = GymnasiumConfig(env_kwargs='{"start": 4}')
    spec = GYMNASIUM.spec(f"{own}:Own", config)
    assert GYMNASIUM.spec(f"{own}:Own", GymnasiumConfig(env_kwargs='{"start": 4}')) is spec
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
    assert GYMNASIUM.notices(f"{own}:Own", config) == []
    assert make(f"{own}:Own", env_kwargs='{"start": 4}').reset().observation[0, 0] == 4


def test_what_is_odd_can_be_asked_for() -> None:
    pytest.importorskip("minigrid")
    (notice,) = GYMNASIUM.notices("MiniGrid-Empty-5x5-v0", GymnasiumConfig())
    assert "'mission'" in notice


def test_an_id_of_the_users_own_module(own: str) -> None:
    name = f"{own}:Registered-v0"
    assert GYMNASIUM.spec(name, GymnasiumConfig()).name == name
    assert [bool(s.truncated[0]) for s in play(make(name, 1), 3)] == [False, False, True, False]


@pytest.mark.parametrize(
    ("what", "complaint"),
    [
        ("nan", r"environment 0 \(own_\d+:nan\): reset returned an observation with nan at index"),
        ("raises", r"own_\d+:raises cannot be made: RuntimeError: no level file"),
        ("drunk", r"own_\d+:drunk needs a package that is missing: No module named 'a_module_t"),
        ("number", r"own_\d+:number gave a builtins.int, which is not a gymnasium.Env"),
        ("NOT_A_FUNCTION", r"own_\d+:NOT_A_FUNCTION is not a function or class"),
        ("nowhere", r"cannot import the environment 'own_\d+:nowhere'"),
    ],
)
def test_a_bad_factory_is_one_sentence(own: str, what: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        GYMNASIUM.spec(f"{own}:{what}", GymnasiumConfig())


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("CartPole", "no environment named 'CartPole'; did you mean CartPole-v1"),
        ("CartPole-v7", "no environment named 'CartPole-v7'; did you mean CartPole-v1"),
        ("xyzzy", "no environment named 'xyzzy'; `headrace envs` lists packages"),
        ("nowhere_at_all:Env-v0", "needs a package that is missing"),
    ],
)
def test_an_unknown_name_is_one_sentence(name: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        GYMNASIUM.spec(name, GymnasiumConfig())


def test_wrong_keywords_are_one_sentence() -> None:
    with pytest.raises(ConfigError, match="CartPole-v1 cannot be made: TypeError"):
        GYMNASIUM.spec("CartPole-v1", GymnasiumConfig(env_kwargs='{"wheels": 4}'))


@pytest.mark.parametrize(
    ("name", "module", "sentence"),
    [
        ("HalfCheetah-v5", "mujoco", "HalfCheetah-v5 needs mujoco: pip install 'headrace[mujoco]'"),
        ("LunarLander-v3", "Box2D", "LunarLander-v3 needs box2d: pip install 'headrace[box2d]'"),
        (
            "MiniGrid-Empty-6x6-v0",
            "minigrid",
            "MiniGrid-Empty-6x6-v0 needs minigrid: pip install minigrid",
        ),
    ],
)
def test_a_missing_package_is_named(name: str, module: str, sentence: str) -> None:
    """In a process of its own, as a module that was imported cannot be missing any more."""
    code = f"""
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {module!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hidden())
from headrace.envs import packages
from headrace.envs.gymnasium import GYMNASIUM
from headrace.envs.wrappers import GymnasiumConfig
from headrace.errors import ConfigError
import importlib.util
packages.is_installed = lambda package: package.module != {module!r}
try:
    GYMNASIUM.spec({name!r}, GymnasiumConfig())
except ConfigError as error:
    print(error)
assert "torch" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.strip() == sentence, done.stderr


def test_a_view_goes_the_same_way_and_shows_frames(own: str) -> None:
    name, config = f"{own}:Own", GymnasiumConfig()
    batch = make(name, 1, seed=5)
    view = GYMNASIUM.make_view(name, config, seed=5)
    assert view is not None
    assert view.spec.observation_space == gym.spaces.Box(0, 255, (4, 6, 3), np.uint8)
    for step, seen in zip(play(batch), play(view), strict=True):
        np.testing.assert_array_equal(step.reward, seen.reward)
        np.testing.assert_array_equal(step.reset, seen.reset)
        assert (seen.observation[0] == step.observation[0, 1]).all()


@pytest.mark.parametrize("name", ["CartPole-v1", "MiniGrid-Empty-5x5-v0"])
def test_views_by_id(name: str) -> None:
    pytest.importorskip("pygame")
    pytest.importorskip(IDS[name])
    with packages.quietly():
        view = GYMNASIUM.make_view(name, GymnasiumConfig(frame_skip=2), seed=0)
    assert view is not None
    steps = play(view, 5)
    assert steps[0].observation.shape[3:] == (3,)
    assert (steps[0].observation != steps[5].observation).any()
    view.close()


def test_there_is_no_view_where_nothing_can_be_drawn(own: str) -> None:
    assert GYMNASIUM.make_view(f"{own}:blind", GymnasiumConfig(), seed=0) is None


def test_a_view_that_cannot_be_drawn_here_is_one_sentence(own: str) -> None:
    with pytest.raises(ConfigError, match="Undrawable cannot be drawn here: RuntimeError: no disp"):
        GYMNASIUM.make_view(f"{own}:Undrawable", GymnasiumConfig(), seed=0)


def test_agents_are_judged_as_they_were_trained() -> None:
    config = GymnasiumConfig(time_limit=7, frame_skip=2)
    assert GYMNASIUM.evaluation(config) == config


def test_packages_are_listed_with_version_or_advice() -> None:
    rows = {name: (example, state) for name, example, state in packages.available()}
    assert rows["Classic control"] == ("CartPole-v1", f"installed {gym.__version__}")
    assert len(rows) == len(packages.PACKAGES)
    for package in packages.PACKAGES:
        example, state = rows[package.name]
        assert packages.package_of(example) == package
        assert state.startswith("installed" if packages.is_installed(package) else "pip install")
    assert packages.package_of("Own-v0") is None
