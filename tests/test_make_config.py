"""Settings become complete in Python as on the command line, and by what an environment is like."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import headrace
from headrace import RunConfig, make_config
from headrace.algorithms.impala import ImpalaConfig
from headrace.commands.settings import first_pass, read_request
from headrace.config import from_dict
from headrace.errors import ConfigError
from headrace.presets import PRESETS
from headrace.run.complete import completed_as_typed
from headrace.run.validate import check
from headrace.server.settings import ServerConfig

MODULE = '''
import gymnasium as gym, numpy as np

class Plain(gym.Env):
    """Whatever is done, a reward of 1; 20 steps."""
    def __init__(self, observations, actions):
        self.observation_space, self.action_space = observations, actions
    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(0)
        self.steps = 0
        return self.observation_space.sample(), {}
    def step(self, action):
        self.steps += 1
        return self.observation_space.sample(), 1.0, self.steps == 20, False, {}

VECTOR = gym.spaces.Box(-1, 1, (4,), np.float32)
IMAGE = gym.spaces.Box(0, 255, (40, 40, 3), np.uint8)
BOTH = gym.spaces.Dict({"camera": IMAGE, "speed": VECTOR})
LEFT_RIGHT, PUSH = gym.spaces.Discrete(2), gym.spaces.Box(-1, 1, (1,), np.float32)

def sized(size): return Plain(gym.spaces.Box(-1, 1, (size,), np.float32), LEFT_RIGHT)
def crash():
    import os
    os._exit(3)
def vector_discrete(): return Plain(VECTOR, LEFT_RIGHT)
def vector_continuous(): return Plain(VECTOR, PUSH)
def image_discrete(): return Plain(IMAGE, LEFT_RIGHT)
def image_continuous(): return Plain(IMAGE, PUSH)
def both_discrete(): return Plain(BOTH, LEFT_RIGHT)
def cart(): return gym.make("CartPole-v1")
def pendulum(): return gym.make("Pendulum-v1")
'''


@pytest.fixture(autouse=True)
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "likes.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))


def typed(line: str) -> RunConfig:
    chosen, rest = first_pass(line.split())
    return read_request(chosen, rest, prog="headrace train ENV", description="").config


@pytest.mark.parametrize(
    ("line", "env", "settings"),
    [
        ("ALE/Pong-v5", "ALE/Pong-v5", {}),
        ("catch --seed 3 --num-envs 8", "catch", {"seed": 3, "num_envs": 8}),
        (
            "CartPole-v1 --algorithm ppo --learning-rate 1e-4 --epochs 2",
            "CartPole-v1",
            {"algorithm": "ppo", "learning_rate": 1e-4, "epochs": 2},
        ),
        (
            "likes:vector_continuous --algorithm sac --replay-min 50 --optimizer adam",
            "likes:vector_continuous",
            {"algorithm": "sac", "replay_min": 50, "optimizer": "adam"},
        ),
        (
            "ALE/Pong-v5 --preset atari-sticky --network nature --total-minutes 3",
            "ALE/Pong-v5",
            {"preset": "atari-sticky", "network": "nature", "total_minutes": 3.0},
        ),
        (
            "catch --evaluator --truncate-after 4",
            "catch",
            {"evaluator": {"evaluator": True}, "environment": {"truncate_after": 4}},
        ),
    ],
)
def test_python_gives_what_the_command_line_gives(
    line: str, env: str, settings: dict[str, Any]
) -> None:
    assert make_config(env, **settings) == typed(line)


def test_a_config_of_few_words_is_filled_as_the_command_line_does() -> None:
    assert completed_as_typed(RunConfig(env="CartPole-v1")) == typed("CartPole-v1")
    own = completed_as_typed(RunConfig(env="likes:cart", algorithm="ppo", seed=2))
    assert own == typed("likes:cart --algorithm ppo --seed 2")


def test_what_was_given_stays_even_where_it_equals_a_default() -> None:
    default = from_dict({"env": "catch"}).total_frames
    assert PRESETS["catch"].values["total_frames"] != default
    assert completed_as_typed(RunConfig(env="catch", total_frames=default)).total_frames == default
    assert completed_as_typed(RunConfig(env="catch", seed=1)).seed == 1


def test_a_section_is_taken_as_it_stands_and_a_dict_is_laid_over() -> None:
    whole = completed_as_typed(RunConfig(env="catch", server=ServerConfig(inference_batch=4)))
    assert whole.server == ServerConfig(inference_batch=4)
    assert whole.server.num_envs == 64
    laid: Any = {"inference_batch": 4}
    laid_over = completed_as_typed(RunConfig(env="CartPole-v1", server=laid))
    assert laid_over.server.num_envs == PRESETS["control"].values["server"]["num_envs"]
    assert laid_over.server.inference_batch == 4
    learning = ImpalaConfig(unroll_steps=5)
    assert make_config("CartPole-v1", learning=learning).learning == learning


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"lerning_rate": 1}, "no setting named lerning_rate; did you mean learning_rate"),
        ({"total_frames": "many"}, "total_frames must be a int, not 'many'"),
        ({"server": 3}, "server is a section: give a dict of its settings, not 3"),
        ({"network": {"netwrk": "mlp"}}, "no setting named network.netwrk"),
        ({"preset": "atari", "algorithm": "ppo"}, "preset atari is for impala, not ppo"),
        ({"preset": "atary"}, "no preset named 'atary'; did you mean atari"),
        ({"learning": ServerConfig()}, "learning must be a ImpalaConfig"),
        (
            {"server": ServerConfig(), "num_envs": 3},
            "server was given whole, and a setting of it too",
        ),
        ({"algorithm": "impalla"}, "no algorithm named 'impalla'"),
    ],
)
def test_a_mistake_is_one_sentence(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        make_config("catch", **settings)


@pytest.mark.parametrize("algorithm", ["impala", "ppo", "r2d2", "sac"])
@pytest.mark.parametrize(
    "env", ["vector_discrete", "vector_continuous", "image_discrete", "both_discrete"]
)
def test_an_environment_of_ones_own_gets_settings_of_its_kind(algorithm: str, env: str) -> None:
    is_continuous = env.endswith("continuous")
    if (algorithm == "r2d2" and is_continuous) or (algorithm == "sac" and not is_continuous):
        pytest.skip(f"{algorithm} does not take these actions")
    config = make_config(f"likes:{env}", algorithm=algorithm)
    check(config)  # the network can be built, and makes an update before the end
    assert config.preset
    assert PRESETS[config.preset].values.get("algorithm", "impala") == algorithm
    assert config.total_frames <= 2_000_000
    assert config.learning.reward_transform != "clip"
    assert config.learning.optimizer.optimizer in ("adam", "muon")
    assert config.network.normalize_observations
    if env in ("image_discrete", "both_discrete"):
        assert "images" in config.preset


def test_an_environment_may_need_its_flags_to_be_made_at_all() -> None:
    config = typed('likes:sized --env-kwargs {"size":5}')
    assert config == make_config("likes:sized", env_kwargs='{"size":5}')
    assert config.preset == "control"


def test_an_environment_that_ends_the_process_is_named() -> None:
    with pytest.raises(ConfigError, match=r"likes:crash cannot be used: .* exit code 3"):
        make_config("likes:crash")


@pytest.mark.parametrize("algorithm", ["impala", "ppo"])
def test_an_lstm_may_be_asked_for(algorithm: str) -> None:
    config = typed(f"likes:vector_discrete --algorithm {algorithm} --lstm-size 16")
    assert config.network.lstm_size == 16
    assert not config.network.separate_value
    check(config)
    assert make_config("likes:vector_discrete", algorithm=algorithm, lstm_size=16) == config


def test_actions_that_a_rule_cannot_take_are_said_to_be_so() -> None:
    with pytest.raises(ConfigError, match=r"need continuous actions.* use --algorithm r2d2"):
        check(make_config("likes:vector_discrete", algorithm="sac"))
    with pytest.raises(ConfigError, match="needs one discrete action"):
        check(make_config("likes:vector_continuous", algorithm="r2d2"))


def test_sections_given_whole_are_not_judged_by_what_they_replace() -> None:
    config = make_config(
        "ALE/Pong-v5", algorithm="r2d2", evaluator={"evaluator": True}, server=ServerConfig()
    )
    assert config.evaluator.evaluator
    assert config.server == ServerConfig()


def test_a_config_that_is_complete_stays_as_it_is() -> None:
    for config in (make_config("likes:cart"), make_config("recall", algorithm="r2d2")):
        assert completed_as_typed(config) == config
    plain = from_dict({"env": "CartPole-v1"})
    assert completed_as_typed(plain) == plain


def test_a_rule_of_the_users_keeps_its_own_settings_and_gets_the_rest(tmp_path: Path) -> None:
    (tmp_path / "rules.py").write_text(
        "from headrace.algorithms.impala import Impala\nclass Mine(Impala): pass\n"
        "from headrace.algorithms.r2d2 import R2d2\nclass Values(R2d2): pass\n"
    )
    check(make_config("likes:vector_discrete", algorithm="rules:Values"))
    config = make_config("likes:vector_discrete", algorithm="rules:Mine")
    control = PRESETS["control"].values
    assert config.preset == ""
    assert config.learning == ImpalaConfig()
    assert config.server.num_envs == control["server"]["num_envs"]
    assert config.total_frames == control["total_frames"]


def test_settings_of_the_environment_decide_what_it_is_like() -> None:
    from_flags = typed("likes:image_discrete --frame-stack 2")
    assert from_flags == make_config("likes:image_discrete", frame_stack=2)
    assert from_flags.environment.frame_stack == 2


def test_one_line_says_what_was_chosen(tmp_path: Path) -> None:
    config = make_config(
        "likes:cart", total_frames=2_000, out=str(tmp_path / "run"), tensorboard=False
    )
    headrace.train(config)
    log = (tmp_path / "run" / "log.txt").read_text()
    line = "observation (4,) float32 → mlp 64-64, 9 155 parameters; settings: control"
    assert line in log
    assert log.count("settings: ") == 1


def test_no_plain_default_is_ataris() -> None:
    config = from_dict({"env": "CartPole-v1"})
    assert config.total_frames == 1_000_000
    assert config.learning.reward_transform == "none"
    assert config.learning.optimizer.optimizer in ("adam", "muon")
    assert {entry.name for entry in dataclasses.fields(config)} >= {"preset", "total_minutes"}


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["impala", "ppo"])
def test_cartpole_under_another_name_is_learned(algorithm: str, tmp_path: Path) -> None:
    result = headrace.train(
        RunConfig(
            env="likes:cart", algorithm=algorithm, total_frames=150_000, out=str(tmp_path / "run")
        )
    )
    played = headrace.evaluate(headrace.load(result.run, trust_code=True), episodes=20)
    assert np.mean(played.returns) >= 475.0


@pytest.mark.slow
def test_pendulum_under_another_name_is_learned(tmp_path: Path) -> None:
    result = headrace.train(
        make_config(
            "likes:pendulum", algorithm="sac", total_frames=20_000, out=str(tmp_path / "run")
        )
    )
    played = headrace.evaluate(headrace.load(result.run, trust_code=True), episodes=20)
    assert np.mean(played.returns) >= -200.0


def test_a_constant_step_size_may_be_asked_of_a_preset_whose_falls() -> None:
    config = typed("ALE/Pong-v5 --learning-rate-schedule constant")
    assert config == make_config("ALE/Pong-v5", learning_rate_schedule="constant")
