"""Films: real MP4 files, and a twin that plays the same game."""

from pathlib import Path

import numpy as np
import pytest

from headrace import ConfigError, load, preset, train
from headrace.cli import main
from headrace.config import from_dict
from headrace.run.film import _pixels, film
from headrace.run.policy import Policy


@pytest.fixture
def catch(tmp_path: Path) -> Policy:
    return load(train(preset("catch", "catch", total_frames=200, out=str(tmp_path / "run"))).run)


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
    np.testing.assert_array_equal(_pixels({"a": numbers, "b": (image, image + 1)}), image)
    np.testing.assert_array_equal(_pixels({"a": numbers, "b": (1,)}), [[0, 255, 127]])
