"""Films: real MP4 files, and a twin that plays the same game."""

import itertools
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from headrace import ConfigError, catalog, load, preset, train
from headrace.cli import main
from headrace.config import from_dict
from headrace.run import film as film_module
from headrace.run.build import make_algorithm, make_model
from headrace.run.film import Player, Scene, _pixels, film
from headrace.run.policy import Policy

DRAWN = """
import gymnasium as gym
import numpy as np

MADE = []


class Drawn(gym.Env):
    metadata = {"render_modes": ["rgb_array"]}
    observation_space = gym.spaces.Box(-9, 9, (3,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, render_mode=None):
        self.render_mode = render_mode
        self.steps = 0
        self.open = True
        MADE.append(self)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(3, np.float32), {}

    def step(self, action):
        self.steps += 1
        return np.full(3, self.steps, np.float32), self.reward(), self.steps == 5, False, {}

    def reward(self):
        return 1.0

    def render(self):
        return np.full((8, 6, 3), 10 * self.steps, np.uint8)

    def close(self):
        self.open = False


class Undrawable(Drawn):
    def render(self):
        raise RuntimeError("no display")


class Stray(Drawn):
    def reward(self):
        return 1.0 if self.steps != 3 else float(self.render_mode is not None)
"""


@pytest.fixture
def catch(tmp_path: Path) -> Policy:
    return load(train(preset("catch", "catch", total_frames=1000, out=str(tmp_path / "run"))).run)


def test_an_episode_of_catch_becomes_a_film(catch: Policy, tmp_path: Path) -> None:
    path = tmp_path / "films" / "catch.mp4"
    assert film(catch, path) in (-1.0, 1.0)
    assert path.read_bytes()[4:8] == b"ftyp"


def test_a_film_that_is_no_mp4_is_refused(catch: Policy, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\.mp4"):
        film(catch, tmp_path / "catch.gif")


def test_the_view_of_an_atari_plays_the_same_game_in_colour(tmp_path: Path) -> None:
    pytest.importorskip("ale_py")
    config = preset(
        "atari-sticky",
        "ALE/Pong-v5",
        total_frames=100,
        network={"network": "impala_shallow"},
        server={"num_envs": 2},
        learning={"unroll_steps": 5, "batch_unrolls": 2},
        out=str(tmp_path / "run"),
    )
    policy = load(train(config).run)
    env, view = policy.make_env(3), policy.make_view(3)
    assert view is not None
    frame, _ = env.reset()
    screen, _ = view.reset()
    assert frame.shape == (84, 84)
    assert screen.shape == (210, 160, 3)
    rng, earned = np.random.default_rng(0), 0
    for _ in range(150):
        action = int(rng.integers(18))
        one, other = env.step(action), view.step(action)
        assert one[1:4] == other[1:4]
        earned += one[1] != 0
    assert earned, "150 steps in which nothing happens would prove nothing"
    env.close()
    view.close()


def test_a_film_keeps_to_the_actions_that_are_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    config = {
        "env": "nested_env:Guarded",  # raises where a forbidden action is taken
        "out": str(tmp_path / "run"),
        "device": "cpu",
        "lockstep": True,
        "tensorboard": False,
        "total_frames": 160,
        "server": {"num_envs": 8},
        "learning": {"unroll_steps": 5, "batch_unrolls": 4},
        "network": {"lstm_size": 8},
    }
    run = train(from_dict(config)).run
    path = tmp_path / "guarded.mp4"
    main(["eval", str(run), "--episodes", "2", "--video", str(path), "--trust-code"])
    assert path.read_bytes()[4:8] == b"ftyp"


def test_of_several_parts_the_first_image_is_drawn() -> None:
    image = np.arange(12, dtype=np.uint8).reshape(3, 4)
    numbers = np.array([0.0, 2.0])
    box = gym.spaces.Box(-9, 9, (2,), np.float64)
    picture = gym.spaces.Box(0, 255, (3, 4), np.uint8)
    space = gym.spaces.Dict(a=box, b=gym.spaces.Tuple((picture, picture)))
    np.testing.assert_array_equal(_pixels({"a": numbers, "b": (image, image + 1)}, space), image)
    space = gym.spaces.Dict(a=box, b=gym.spaces.Tuple((gym.spaces.Discrete(2),)))
    np.testing.assert_array_equal(_pixels({"a": numbers, "b": (1,)}, space), [[0, 255, 127]])


COLOURED = np.arange(2 * 5 * 4 * 3, dtype=np.uint8).reshape(2, 5, 4, 3)
LAYOUTS = {
    "colours last": (COLOURED[0], COLOURED[0]),
    "colours first": (np.moveaxis(COLOURED[0], -1, 0), COLOURED[0]),
    "one colour": (COLOURED[0, :, :, :1], COLOURED[0, :, :, 0]),
    "a stack of grey": (COLOURED[..., 0], COLOURED[..., 0].reshape(10, 4)),
    "the newest of a stack": (COLOURED, COLOURED[1]),
    "a stack, colours first": (np.moveaxis(COLOURED, -1, 1), COLOURED[1]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_picture_is_drawn_as_it_lies(layout: str) -> None:
    shown, drawn = LAYOUTS[layout]
    space = gym.spaces.Box(0, 255, shown.shape, np.uint8)
    np.testing.assert_array_equal(_pixels(shown, space), drawn)
    floats = gym.spaces.Box(0, 1, shown.shape, np.float32)
    np.testing.assert_allclose(_pixels(shown / np.float32(255), floats), drawn, atol=1)


def test_a_picture_is_as_bright_as_its_bounds_say() -> None:
    space = gym.spaces.Box(0, 5, (2, 3), np.uint8)
    shown = np.array([[0, 1, 2], [3, 4, 5]], np.uint8)
    np.testing.assert_array_equal(_pixels(shown, space), shown * 51)


@pytest.fixture
def drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"drawn_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(DRAWN, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def untrained(env: str) -> Policy:
    config = from_dict({"env": env, "device": "cpu", "network": {"lstm_size": 8}})
    spec = catalog.environment_family(env).spec(env, config.environment)
    model: Any = make_model(config, spec, torch.device("cpu")).requires_grad_(False)
    algorithm = make_algorithm(config, model, spec, torch.float32)
    return Policy(config, algorithm, spec, torch.device("cpu"))


def brightness(scene: Scene) -> int:
    return int(scene.picture[0, 0, 0])


def test_scenes_are_those_of_the_episode(drawn: str) -> None:
    with Player(untrained(f"{drawn}:Drawn"), seed=0) as player:
        made: set[int] = set()
        for _ in range(2):
            scenes = list(player.episode("greedy", 0.0))
            made.add(len(__import__(drawn).MADE))
            assert [brightness(scene) for scene in scenes] == [0, 10, 20, 30, 40, 50]
            assert [scene.earned for scene in scenes] == [0, 1, 2, 3, 4, 5]
            assert [scene.steps for scene in scenes] == [0, 1, 2, 3, 4, 5]
            assert [scene.last for scene in scenes] == [False] * 5 + [True]
            assert scenes[0].picture.shape == (8, 6, 3)
        assert len(made) == 1, "the second episode needs no new environment"


def test_an_episode_that_is_left_is_over_and_its_environments_are_closed(drawn: str) -> None:
    policy = untrained(f"{drawn}:Drawn")
    made = __import__(drawn).MADE
    made.clear()
    with Player(policy, seed=0) as player:
        few = list(itertools.islice(player.episode("greedy", 0.0), 3))
        assert [scene.steps for scene in few] == [0, 1, 2]
        assert len(list(player.episode("greedy", 0.0))) == 6
        assert sum(env.open for env in made) == 2  # one to play in, and its twin
    assert not any(env.open for env in made)


def test_an_episode_has_an_end_even_where_the_environment_gives_none(
    drawn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(film_module, "_MOST_STEPS", 3)
    with Player(untrained(f"{drawn}:Drawn"), seed=0) as player:
        for _ in range(2):
            scenes = list(player.episode("greedy", 0.0))
            assert [scene.last for scene in scenes] == [False, False, False, True]


def test_where_nothing_can_be_drawn_observations_are_filmed_and_that_is_said_once(
    drawn: str, tmp_path: Path
) -> None:
    said: list[str] = []
    path = tmp_path / "undrawable.mp4"
    policy = untrained(f"{drawn}:Undrawable")
    assert film(policy, path, on_message=said.append) == 5.0
    assert path.read_bytes()[4:8] == b"ftyp"
    assert len(said) == 1
    assert "cannot be drawn here: RuntimeError: no display" in said[0]
    assert "observes instead" in said[0]
    with Player(policy, seed=0, on_message=said.append) as player:
        for _ in range(2):
            assert next(player.episode("greedy", 0.0)).picture.shape == (1, 3)
    assert len(said) == 2


def test_a_twin_that_plays_another_game_is_not_shown(drawn: str, tmp_path: Path) -> None:
    said: list[str] = []
    path = tmp_path / "stray.mp4"
    assert film(untrained(f"{drawn}:Stray"), path, on_message=said.append) == 4.0
    assert path.read_bytes()[4:8] == b"ftyp"
    assert len(said) == 1
    assert "same game twice" in said[0]


def test_whatever_is_observed_becomes_a_picture() -> None:
    stack = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    space = gym.spaces.Box(0, 255, (2, 3, 4), np.uint8)
    np.testing.assert_array_equal(_pixels(stack, space), stack.reshape(6, 4))
    numbers = gym.spaces.Box(-np.inf, np.inf, (3,))
    odd = np.array([np.nan, np.inf, 2.0])
    np.testing.assert_array_equal(_pixels(odd, numbers), [[0, 0, 255]])
    unbounded = gym.spaces.Box(-np.inf, np.inf, (2, 3, 4))
    assert _pixels(np.zeros((2, 3, 4), np.float32), unbounded).shape == (6, 4)


def test_mujoco_is_drawn_where_this_machine_can() -> None:
    pytest.importorskip("mujoco")
    said: list[str] = []
    with Player(untrained("HalfCheetah-v5"), seed=0, on_message=said.append) as player:
        scenes = list(itertools.islice(player.episode("greedy", 0.0), 3))
    if said:
        assert "MUJOCO_GL" in said[0]
        assert {scene.picture.shape for scene in scenes} == {(1, 17)}
    else:
        assert {scene.picture.shape for scene in scenes} == {(480, 480, 3)}
        assert (scenes[0].picture != scenes[2].picture).any()
