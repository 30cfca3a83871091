"""Presets, number by number: a published setting must not change unnoticed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from headrace import preset
from headrace.algorithms.impala import ImpalaConfig
from headrace.algorithms.ppo import PpoConfig
from headrace.algorithms.pqn import PqnConfig
from headrace.algorithms.r2d2 import R2d2Config
from headrace.algorithms.sac import SacConfig
from headrace.algorithms.td3 import Td3Config
from headrace.config import RunConfig, from_dict, merged, to_dict
from headrace.envs.atari import AtariConfig
from headrace.errors import ConfigError
from headrace.networks.models import NetworkConfig
from headrace.presets import PRESETS, UNASKED, default_for, find

# Espeholt et al. 2018, arXiv:1802.01561, Table G.1: a loss summed over T = 20 and B = 32.
SAMPLES = 20 * 32
PAPER_LEARNING = {
    "reward_scale": 1.0,
    "unroll_steps": 20,
    "batch_unrolls": 32,
    "passes": 1,
    "minibatches": 1,
    "clip_range": 0.0,
    "clip_range_schedule": "constant",
    "stop_kl": 0.0,
    "normalize_advantage": False,
    "discount": 0.99,
    "entropy_cost": 0.01,
    "entropy_cost_schedule": "constant",
    "final_entropy_cost": 0.0,
    "target_entropy": None,
    "entropy_cost_adjustment_speed": 10.0,
    "value_cost": 0.5,
    "reward_transform": "clip",
    "vtrace_lambda": 1.0,
    "vtrace_lambda_form": "traces",
    "vtrace_rho_max": 1.0,
    "vtrace_c_max": 1.0,
    "vtrace_pg_rho_max": 1.0,
}
PAPER_OPTIMIZER = {
    "optimizer": "rmsprop_tf",
    "learning_rate": 0.0006,
    "learning_rate_schedule": "linear",
    "target_kl": None,
    "optimizer_eps": pytest.approx(0.01 / SAMPLES**2, rel=1e-12),
    "rmsprop_decay": 0.99,
    "momentum": 0.0,
    "initial_mean_square": pytest.approx(1.0 / SAMPLES**2, rel=1e-12),
    "muon_momentum": 0.95,  # which rmsprop has no use for, nor for Adam's
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "learning_rate_warmup": 0.0,
    "learning_rate_decay": 1.0,
    "max_gradient_norm": pytest.approx(40.0 / SAMPLES, rel=1e-12),
}
ENVIRONMENTS = {
    # Table G.1 and Mnih et al. 2015.
    "atari": {
        "frame_skip": 4,
        "max_pool": True,
        "frame_size": 84,
        "frame_stack": 4,
        "noop_max": 30,
        "sticky_probability": 0.0,
        "life_loss_ends_episode": True,
        "full_action_space": False,
        "max_episode_frames": 108_000,
    },
    # Machado et al. 2018, arXiv:1709.06009.
    "atari-sticky": {
        "frame_skip": 4,
        "max_pool": True,
        "frame_size": 84,
        "frame_stack": 4,
        "noop_max": 0,
        "sticky_probability": 0.25,
        "life_loss_ends_episode": False,
        "full_action_space": True,
        "max_episode_frames": 108_000,
    },
}


@pytest.mark.parametrize("name", ["atari", "atari-sticky"])
def test_the_atari_presets_are_the_papers(name: str) -> None:
    config = preset(name, "ALE/Pong-v5")
    assert (config.algorithm, config.total_frames) == ("impala", 200_000_000)
    assert config.network == NetworkConfig(network="impala_deep", lstm_size=0)
    assert dataclasses.asdict(config.environment) == ENVIRONMENTS[name]
    learning = dataclasses.asdict(config.learning)
    assert learning.pop("optimizer") == PAPER_OPTIMIZER
    assert learning == PAPER_LEARNING


@pytest.mark.parametrize("name", ["atari", "atari-sticky", "atari-desktop"])
def test_the_atari_presets_leave_no_setting_of_the_environment_to_a_default(name: str) -> None:
    fields = {field.name for field in dataclasses.fields(AtariConfig)}
    assert set(PRESETS[name].values["environment"]) == fields


def test_the_defaults_of_an_atari_game_are_those_of_the_paper() -> None:
    assert dataclasses.asdict(AtariConfig()) == ENVIRONMENTS["atari"]


def test_the_desktop_preset_plays_by_the_rules_of_the_paper_and_sees_less() -> None:
    config = preset("atari-desktop", "ALE/Pong-v5")
    smaller = {**ENVIRONMENTS["atari"], "frame_size": 64}
    assert dataclasses.asdict(config.environment) == smaller
    assert config.learning.reward_transform == "clip"
    assert config.learning.discount == 0.99


EXAMPLES = {
    "catch": "catch",
    "recall": "recall",
    "pointmass": "pointmass",
    "control": "CartPole-v1",
    "mujoco-impala": "HalfCheetah-v5",
    "ppo-mujoco": "HalfCheetah-v5",
    "ppo-control": "CartPole-v1",
    "r2d2-control": "recall",
    "dqn-control": "CartPole-v1",
    "sac-mujoco": "HalfCheetah-v5",
    "sac-control": "Pendulum-v1",
    "sac-throughput": "HalfCheetah-v5",
    "td3-control": "Pendulum-v1",
    "td3-continuous": "HalfCheetah-v5",
    "pqn-control": "CartPole-v1",
    "football": "envpool:gfootball/11_vs_11_easy_stochastic-v1",
}


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_whole_config_and_says_where_it_is_from(name: str) -> None:
    env = EXAMPLES.get(name, "ALE/Pong-v5")
    if env.startswith("envpool:"):
        pytest.importorskip("envpool")
    config = preset(name, env)
    kinds = {"ppo": PpoConfig, "r2d2": R2d2Config, "dqn": R2d2Config, "sac": SacConfig}
    kinds |= {"pqn": PqnConfig, "td3": Td3Config}
    assert isinstance(config.learning, kinds.get(name.partition("-")[0], ImpalaConfig))
    assert find(name).summary.endswith(".")
    assert find(name).source
    # Nothing is set in vain: what the preset says is what the run gets.
    whole = to_dict(config)
    assert merged(whole, PRESETS[name].values) == whole


def test_a_score_stands_in_the_results_with_its_command() -> None:
    results = (Path(__file__).parents[1] / "docs" / "results.md").read_text()
    commands = {name: each.command for name, each in PRESETS.items() if each.command}
    assert commands["atari-desktop"].startswith("headrace train ALE/Pong-v5")
    for name, command in commands.items():
        assert command in results, name
        assert PRESETS[name].score, name


def test_a_preset_that_extends_another_is_laid_over_what_it_keeps_of_that() -> None:
    desktop, images = PRESETS["atari-desktop"].values, PRESETS["images"].values
    assert set(desktop) - set(images) == {"environment"}
    own = {"total_frames": 2_000_000, "learning": {"reward_transform": "normalize"}}
    assert images == merged({key: desktop[key] for key in images}, own)
    assert PRESETS["images"].score == ""  # what is said of a preset is said of that one


def test_settings_lie_over_a_preset() -> None:
    config = preset(
        "catch", "catch", seed=9, learning={"discount": 0.5, "optimizer": {"momentum": 0.25}}
    )
    plain = preset("catch", "catch")
    assert (config.seed, config.learning.discount) == (9, 0.5)
    assert config.learning.optimizer.momentum == 0.25
    assert config.learning.optimizer.learning_rate == plain.learning.optimizer.learning_rate
    assert config.learning.batch_unrolls == plain.learning.batch_unrolls


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(
        ConfigError, match="no preset named 'atari-stiky'; did you mean atari-sticky"
    ):
        preset("atari-stiky", "ALE/Pong-v5")


def test_what_an_environment_takes_unasked() -> None:
    assert {name for _, name in UNASKED} <= set(PRESETS)
    assert default_for("ALE/Breakout-v5") == "atari-desktop"
    assert default_for("ALE/Breakout-v5", "ppo") == "ppo-atari"
    assert default_for("HalfCheetah-v5") == "mujoco-impala"
    assert default_for("HalfCheetah-v5", "ppo") == "ppo-mujoco"
    assert default_for("envpool:Hopper-v5") == "mujoco-impala"
    assert default_for("CartPole-v1", "ppo") == "ppo-control"
    assert default_for("catch", "ppo") is None
    assert default_for("NotCartPole-v1") is None
    assert default_for("catch") == "catch"
    assert default_for("my_module:FAMILY") is None


def test_a_preset_without_an_environment_is_no_config() -> None:
    with pytest.raises(ConfigError, match="no environment"):
        from_dict(PRESETS["atari"].values)
    assert RunConfig(env="catch").learning is None


def test_r2d2_atari_has_the_published_numbers() -> None:
    config = preset("r2d2-atari", "ALE/MsPacman-v5")
    learning, replay, optimizer = (
        config.learning,
        config.learning.replay,
        config.learning.optimizer,
    )
    assert (learning.unroll_steps, learning.burn_in_steps, learning.overlap_steps) == (80, 40, 40)
    assert (learning.batch_unrolls, learning.discount, learning.n_steps) == (64, 0.997, 5)
    assert (learning.target_update_interval, learning.priority_eta) == (2500, 0.9)
    assert (learning.epsilon_base, learning.epsilon_power, learning.eval_epsilon) == (0.4, 7, 1e-3)
    assert learning.double_q
    assert learning.rescale_values
    assert not learning.full_returns
    assert learning.value_scale_epsilon == 1e-3
    assert (learning.reward_transform, learning.reward_scale) == ("none", 1.0)
    assert (replay.replay_capacity, replay.replay_min) == (100_000, 5_000)
    assert (replay.priority_exponent, replay.importance_exponent) == (0.9, 0.6)
    assert replay.samples_per_insert == 0.8
    # The published loss is a sum over 80 steps.
    assert (optimizer.optimizer, optimizer.learning_rate) == ("adam", 1e-4)
    assert optimizer.learning_rate_schedule == "constant"
    assert optimizer.optimizer_eps * 80 == pytest.approx(1e-3)
    assert optimizer.max_gradient_norm * 80 == pytest.approx(80.0)
    assert (config.network.network, config.network.lstm_size) == ("r2d2", 512)
    assert config.server.num_envs == 256
    environment = config.environment
    assert environment.full_action_space
    assert not environment.life_loss_ends_episode
    assert (environment.frame_stack, environment.frame_skip) == (4, 4)


@pytest.mark.parametrize(
    ("env", "name"),
    [("ALE/Pong-v5", "r2d2-small"), ("recall", "r2d2-control"), ("CartPole-v1", "r2d2-control")],
)
def test_what_r2d2_takes_unasked(env: str, name: str) -> None:
    assert default_for(env, "r2d2") == name


def test_sac_mujoco_has_the_published_numbers() -> None:
    # Haarnoja et al. 2018, arXiv:1812.05905, table 1.
    config = preset("sac-mujoco", "HalfCheetah-v5")
    learning, replay, optimizer = (
        config.learning,
        config.learning.replay,
        config.learning.optimizer,
    )
    assert (learning.batch_unrolls, learning.discount, learning.n_steps) == (256, 0.99, 1)
    assert learning.target_tau == 0.005
    assert (learning.temperature, learning.target_entropy) == (None, None)
    assert (learning.reward_transform, learning.reward_scale) == ("none", 1.0)
    assert (optimizer.optimizer, optimizer.learning_rate) == ("adam", 3e-4)
    assert optimizer.learning_rate_schedule == "constant"
    assert optimizer.max_gradient_norm == 0.0
    assert (replay.replay_capacity, replay.priority_exponent) == (1_000_000, 0.0)
    assert replay.samples_per_insert == learning.batch_unrolls, "one update per step"
    network = config.network
    assert (network.hidden_sizes, network.activation) == ((256, 256), "relu")
    assert (network.num_critics, network.critic_dropout) == (2, 0.0)
    assert not network.critic_layer_norm
    assert config.server.num_envs == 1


@pytest.mark.parametrize(
    ("env", "name"),
    [
        ("HalfCheetah-v5", "sac-mujoco"),
        ("Pendulum-v1", "sac-control"),
        ("pointmass", "sac-control"),
        ("CartPole-v1", None),
    ],
)
def test_what_sac_takes_unasked(env: str, name: str | None) -> None:
    assert default_for(env, "sac") == name
