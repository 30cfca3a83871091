"""Layers, TOML and the words for a mistake."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import typing
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from headrace import catalog
from headrace.algorithms.base import ReplayConfig
from headrace.config import (
    FREE_ON_RESUME,
    RunConfig,
    completed,
    from_dict,
    leaf_paths,
    merged,
    reaches_out,
    read_toml,
    takes_turns,
    to_dict,
    to_toml,
)
from headrace.envs.catch import CatchConfig
from headrace.envs.recall import RecallConfig
from headrace.errors import ConfigError
from headrace.server.settings import ServerConfig


def test_upper_layers_win_setting_by_setting() -> None:
    low = {"seed": 1, "learning": {"discount": 0.9, "optimizer": {"momentum": 0.1}}}
    high = {"learning": {"optimizer": {"learning_rate": 0.5}}, "env": "catch"}
    assert merged(low, high) == {
        "env": "catch",
        "seed": 1,
        "learning": {"discount": 0.9, "optimizer": {"momentum": 0.1, "learning_rate": 0.5}},
    }
    assert low == {"seed": 1, "learning": {"discount": 0.9, "optimizer": {"momentum": 0.1}}}


def test_what_no_layer_sets_has_its_default() -> None:
    config = from_dict({"env": "catch", "server": {"num_envs": 8}})
    assert config.server.num_envs == 8
    assert config.environment == CatchConfig()
    assert dataclasses.replace(config, server=ServerConfig()) == completed(RunConfig(env="catch"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sead": 3}, "no setting named sead; did you mean seed"),
        ({"server": {"num_env": 3}}, "no setting named server.num_env; did you mean num_envs"),
        (
            {"learning": {"discont": 0.9}},
            "no setting named learning.discont; did you mean discount",
        ),
        (
            {"learning": {"optimizer": {"lr": 0.9}}},
            "no setting named learning.optimizer.lr; known: .*learning_rate",
        ),
        ({"environment": {"frame_skip": 4}}, "no setting named environment.frame_skip"),
        ({"seed": "one"}, "seed must be a int, not 'one'"),
        ({"seed": 1.5}, "seed must be a int, not 1.5"),
        ({"seed": True}, "seed must be a int, not True"),
        ({"total_frames": 10**400}, "total_frames is too large a number"),
        ({"learning": {"discount": -(10**400)}}, "learning.discount is too large a number"),
        ({"lockstep": 1}, "lockstep must be a bool, not 1"),
        ({"learning": {"discount": "high"}}, "learning.discount must be a float, not 'high'"),
        ({"learning": {"discount": True}}, "learning.discount must be a float, not True"),
        ({"learning": {"target_entropy": "x"}}, "learning.target_entropy must be a float"),
        ({"precision": "float16"}, "precision must be one of auto, float32, bfloat16"),
        ({"learning": 3}, "learning must be a section of settings, not 3"),
        ({"server": []}, "server must be a section of settings"),
        ({"env": 5}, "env must be a str, not 5"),
        ({"algorithm": 5}, "algorithm must be a str, not 5"),
        ({"env": "katch"}, "no environment named 'katch'; did you mean catch"),
        ({"algorithm": "impla"}, "no algorithm named 'impla'; did you mean impala"),
        ({"total_frames": 0}, "total_frames must be positive"),
        ({"total_minutes": float("nan")}, "total_minutes must be positive and finite, not nan"),
        ({"total_minutes": 5, "lockstep": True}, "leave out --total-minutes, or --lockstep"),
        ({"keep_checkpoints": -1}, "must not be negative"),
        ({"server": {"num_envs": 4, "inference_batch": 5}}, "inference_batch=5 can never fill"),
    ],
)
def test_a_mistake_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict({"env": "catch", **values})


def test_minutes_go_without_lockstep() -> None:
    assert from_dict({"env": "catch", "total_minutes": 8}).total_minutes == 8.0
    assert from_dict({"env": "catch", "lockstep": True}).total_minutes is None


def test_whole_numbers_do_where_fractions_are_wanted() -> None:
    config = from_dict({"env": "catch", "learning": {"discount": 1, "target_entropy": 1}})
    assert config.learning.discount == 1.0
    assert isinstance(config.learning.discount, float)
    assert isinstance(config.learning.target_entropy, float)


def test_toml_brings_back_the_same_config(tmp_path: Path) -> None:
    config = from_dict(
        {
            "env": "recall",
            "seed": 12,
            "lockstep": True,
            "environment": {"delay_steps": 3},
            "network": {"network": "mlp", "lstm_size": 8},
            "learning": {"target_entropy": 0.25, "optimizer": {"optimizer_eps": 2.44140625e-8}},
        }
    )
    path = tmp_path / "config.toml"
    path.write_text(to_toml(config), encoding="utf-8")
    assert from_dict(read_toml(path)) == config
    assert config.environment == RecallConfig(delay_steps=3)


def test_a_setting_that_is_none_is_left_out_and_comes_back_as_none() -> None:
    config = from_dict({"env": "catch"})
    assert config.learning.target_entropy is None
    assert "target_entropy" not in to_toml(config)
    assert from_dict(to_dict(config)) == config


@pytest.mark.parametrize("text", ["seed = ", "a = 1\na = 2", "\xff"])
def test_a_file_that_is_not_toml_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError, match=r"mine\.toml is not TOML"):
        read_toml(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*none\.toml"):
        read_toml(tmp_path / "none.toml")


def test_sections_of_another_environment_are_refused() -> None:
    with pytest.raises(ConfigError, match="environment must be a CatchConfig, not a RecallConfig"):
        completed(RunConfig(env="catch", environment=RecallConfig()))


def sections() -> list[type[Any]]:
    """Every config that a run may be made from, one at a time for those that exclude each other."""
    family = {catalog.environment_family(env).config_type for env in ("catch", "recall", "ALE/x")}
    rules = {
        catalog.resolve("algorithm", catalog.ALGORITHMS, name).config_type
        for name in catalog.ALGORITHMS
    }
    return [*family, *rules]


def settings_of(kind: type[Any]) -> list[str]:
    names = []
    for field in dataclasses.fields(kind):
        default = field.default_factory if field.default is dataclasses.MISSING else None
        if isinstance(default, type) and dataclasses.is_dataclass(default):
            names += settings_of(default)
        else:
            names.append(field.name)
    return names


def test_a_config_cannot_be_changed() -> None:
    config = from_dict({"env": "catch"})
    parts = (config, config.server, config.network, config.environment, config.learning)
    for part in (*parts, config.learning.optimizer):
        name = dataclasses.fields(part)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(part, name, 1)


def test_every_flag_has_one_meaning() -> None:
    # Flags are the fields' own names, without the section before them.
    for kind in sections():
        names = Counter(settings_of(RunConfig) + settings_of(kind))
        assert [name for name, count in names.items() if count > 1] == []
    pairs = [settings_of(kind) for kind in sections() if kind.__module__ == "headrace.envs.atari"]
    rules = [settings_of(kind) for kind in sections() if "algorithms" in kind.__module__]
    assert pairs
    assert rules
    for one in pairs:
        for other in rules:
            assert set(one).isdisjoint(other)


def test_what_a_resumed_run_may_change_is_a_setting() -> None:
    kinds = {"learning.replay": ReplayConfig}
    for setting in FREE_ON_RESUME:
        section, _, last = setting.rpartition(".")
        kind = kinds[section] if section else RunConfig
        assert last in {field.name for field in dataclasses.fields(kind)}
    for name in ("env", "algorithm", "seed", "lockstep", "server", "network", "learning", "out"):
        assert name not in FREE_ON_RESUME


def test_every_setting_that_is_a_text_is_known_to_reach_out_or_not() -> None:
    """A new address, file or account belongs into `REACHING_OUT`; a text of another kind here."""
    inward = {
        *("env", "algorithm", "preset", "out", "env_kwargs"),  # of the run for good
        *("network", "heads"),
        *("device", "actor_device", "critic_device", "learner_devices", "inference_devices"),
    }
    for env, rule in itertools.product(("catch", "ALE/x", "CartPole-v1"), catalog.ALGORITHMS):
        config = from_dict({"env": env, "algorithm": rule})
        for *sections, name in leaf_paths(env, rule).values():
            kind = type(functools.reduce(getattr, sections, config))
            if typing.get_type_hints(kind)[name] is str and name not in inward:
                assert reaches_out(".".join([*sections, name])), name


def test_every_setting_says_what_it_is() -> None:
    import ast  # noqa: PLC0415
    import inspect  # noqa: PLC0415

    for kind in [RunConfig, *sections()]:
        body = ast.parse(inspect.getsource(kind)).body[0]
        assert isinstance(body, ast.ClassDef)
        for statement, after in zip(body.body, [*body.body[1:], None], strict=True):
            if isinstance(statement, ast.AnnAssign):
                assert isinstance(after, ast.Expr), f"{kind.__name__}.{ast.unparse(statement)}"


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({}, False),
        ({"lockstep": True}, True),
        ({"turns": "on"}, True),
        ({"algorithm": "ppo"}, True),
        ({"algorithm": "ppo", "turns": "off"}, False),
        ({"algorithm": "ppo", "inference": "worker"}, False),
    ],
)
def test_who_takes_turns(values: dict[str, Any], wanted: bool) -> None:
    assert takes_turns(from_dict({"env": "catch", **values})) == wanted
