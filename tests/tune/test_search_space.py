"""Which space there are for which run, and what their choices mean as settings."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from headrace.config import RunConfig, from_dict, to_dict
from headrace.errors import ConfigError
from headrace.presets import PRESETS, find
from headrace.tune.search_space import Facts, SearchSpace, is_free_running, laid_over
from headrace.tune.types import Parameter

FACTS = Facts(
    cores=8,
    pool="shm",
    turns=False,
    bfloat16=True,
    half_precision=True,
    compiled=False,
    compute_threads=2,
)


def config_of(algorithm: str = "impala", **values: Any) -> RunConfig:
    env = "pointmass" if algorithm == "sac" else "catch"
    return from_dict({"env": env, "algorithm": algorithm, "device": "cpu", **values})


def space_of(
    config: RunConfig | None = None,
    facts: Facts = FACTS,
    *,
    pinned: tuple[str, ...] = (),
    tune_batch: bool = False,
) -> SearchSpace:
    return SearchSpace(config or config_of(), facts, pinned=pinned, tune_batch=tune_batch)


def names(space: SearchSpace) -> set[str]:
    return {parameter.name for parameter in space.parameters}


def parameter(space: SearchSpace, name: str) -> Parameter:
    found = next(parameter for parameter in space.parameters if parameter.name == name)
    assert found.helps
    return found._replace(helps=frozenset())


def choice_of(space: SearchSpace, **values: Any) -> dict[str, Any]:
    default = {one.name: one.values[one.default] for one in space.parameters}
    assert values.keys() <= default.keys()
    return {**default, **values}


ALWAYS = {"num_envs", "compute_threads", "compile", "precision"}


@pytest.mark.parametrize(
    ("facts", "more"),
    [
        (
            FACTS,
            {"num_workers", "inference_batch", "inference", "groups_per_worker"},
        ),
        (
            FACTS._replace(pool="native"),
            {"num_workers", "inference_batch", "inference", "env_threads"},
        ),
        (FACTS._replace(pool="inline"), {"num_workers", "inference_batch", "inference"}),
        (FACTS._replace(turns=True), {"num_workers"}),
        (FACTS._replace(turns=True, pool="native"), {"env_threads"}),
        (FACTS._replace(turns=True, pool="inline"), set()),
    ],
)
def test_every_kind_of_pool_has_its_parameters(facts: Facts, more: set[str]) -> None:
    assert names(space_of(facts=facts)) == ALWAYS | more


def test_bfloat16_is_tried_where_the_hardware_has_it() -> None:
    assert parameter(space_of(), "precision").values == ("auto", "float32")
    in_float32 = config_of(precision="float32")
    space = space_of(in_float32, FACTS._replace(half_precision=False))
    assert parameter(space, "precision").values == ("float32", "bfloat16")
    assert "precision" not in names(space_of(facts=FACTS._replace(bfloat16=False)))


def test_what_the_user_has_set_stays() -> None:
    pinned = ("num_envs", "compile", "learning_rate")
    assert names(space_of(pinned=pinned)).isdisjoint(pinned)
    # The server's batch was asked for, and with acting workers there is no such.
    given = space_of(config_of(server={"inference_batch": 16}))
    assert names(given).isdisjoint({"inference_batch", "inference"})


def test_counts_are_sorted_around_the_default() -> None:
    space = space_of()
    assert parameter(space, "num_envs") == Parameter("num_envs", (16, 32, 64, 128, 256), 2)
    # 0 stands where what it amounts to would be.
    assert parameter(space, "num_workers") == Parameter("num_workers", (1, 4, 7, 0, 12, 16), 3)
    assert parameter(space, "compute_threads") == Parameter("compute_threads", (1, 0, 4, 8), 1)
    given = space_of(config_of(compute_threads=3), FACTS._replace(compute_threads=3))
    assert parameter(given, "compute_threads") == Parameter("compute_threads", (1, 2, 3, 4, 8), 2)


def test_few_environments_may_become_two_per_core() -> None:
    space = space_of(config_of("sac", server={"num_envs": 1}))
    assert parameter(space, "num_envs").values == (1, 2, 4, 8, 16)


def test_in_turns_environments_fill_whole_batches() -> None:
    config = config_of("ppo", server={"num_envs": 8}, learning={"batch_unrolls": 8})
    space = space_of(config, FACTS._replace(turns=True))
    assert parameter(space, "num_envs").values == (2, 4, 8)


def test_one_core_has_few_choices() -> None:
    space = space_of(facts=FACTS._replace(cores=1, compute_threads=1))
    assert parameter(space, "num_workers").values == (0, 2)
    assert "compute_threads" not in names(space)


def test_the_batch_is_tuned_only_if_asked_for() -> None:
    assert "batch_unrolls" not in names(space_of())
    assert parameter(space_of(tune_batch=True), "batch_unrolls").values == (16, 32, 64, 128)
    # On-policy, another batch is another algorithm.
    assert "batch_unrolls" not in names(
        space_of(config_of("ppo"), FACTS._replace(turns=True), tune_batch=True)
    )


def test_a_larger_batch_leaves_updates_per_step_as_they_were() -> None:
    config = config_of("sac", learning={"batch_unrolls": 256})
    space = space_of(config, tune_batch=True)
    settings = space.settings(choice_of(space, batch_unrolls=1024))
    larger = laid_over(config, settings).learning
    assert larger.batch_unrolls == 1024
    before = config.learning.replay.samples_per_insert / config.learning.batch_unrolls
    assert larger.replay.samples_per_insert / larger.batch_unrolls == before


def test_a_larger_batch_still_fits_the_queue() -> None:
    config = config_of(server={"queue_unrolls": 40}, learning={"batch_unrolls": 32})
    space = space_of(config, tune_batch=True)
    settings = space.settings(choice_of(space, batch_unrolls=128, num_envs=128))
    assert settings["server"] == {"num_envs": 128, "queue_unrolls": 160}


def test_the_defaults_set_nothing() -> None:
    for facts in (FACTS, FACTS._replace(pool="native"), FACTS._replace(turns=True)):
        space = space_of(facts=facts, tune_batch=True)
        assert space.settings(choice_of(space)) == {}


def test_several_updates_at_once() -> None:
    assert "updates_per_call" not in names(space_of())
    space = space_of(config_of("sac"), tune_batch=True)
    assert parameter(space, "updates_per_call").values == (1, 2, 4, 8)
    choice = choice_of(space, updates_per_call=4, batch_unrolls=512)
    assert space.settings(choice)["learning"]["updates_per_call"] == 4
    assert space.settings(choice)["learning"]["batch_unrolls"] == 512


def test_settings_are_those_of_the_config_file() -> None:
    config = config_of()
    space = space_of(config)
    choice = choice_of(
        space,
        num_envs=128,
        inference_batch=4,
        num_workers=4,
        groups_per_worker=3,
        compile="on",
        precision="float32",
        compute_threads=1,
    )
    settings = space.settings(choice)
    assert settings == {
        "compile": "on",
        "precision": "float32",
        "compute_threads": 1,
        "server": {"num_envs": 128, "inference_batch": 32},
        "workers": {"num_workers": 4, "groups_per_worker": 3},
    }
    changed = laid_over(config, settings)
    assert (changed.compile, changed.server.inference_batch) == ("on", 32)
    assert changed.learning == config.learning
    effects = space.effects(choice)
    assert [effect.split()[0] for effect in effects] == ["num_envs", "precision", "compile"]


def test_what_makes_no_difference_is_the_same_choice() -> None:
    space = space_of()
    acting = {"inference": "worker"}
    # Workers that act have neither a server's batch nor groups.
    assert space.key(choice_of(space, **acting)) == space.key(
        choice_of(space, **acting, inference_batch=1, groups_per_worker=4)
    )
    # Not more workers than environments.
    few = space_of(config_of(server={"num_envs": 2}), pinned=("num_envs",))
    assert few.key(choice_of(few, num_workers=4)) == few.key(choice_of(few))
    assert few.settings(choice_of(few, num_workers=1)) == {"workers": {"num_workers": 1}}
    # A pool in this process has no workers until they act.
    inline = space_of(facts=FACTS._replace(pool="inline"))
    assert inline.settings(choice_of(inline, num_workers=4)) == {}
    assert inline.settings(choice_of(inline, num_workers=4, **acting)) == {
        "inference": "worker",
        "workers": {"num_workers": 4},
    }


@pytest.mark.parametrize("pool", ["shm", "native", "inline"])
@pytest.mark.parametrize("algorithm", ["impala", "sac"])
def test_no_choice_is_refused(algorithm: str, pool: str) -> None:
    config = config_of(algorithm, server={"num_envs": 4})
    space = space_of(config, FACTS._replace(pool=pool), tune_batch=True)
    ends = [
        (parameter.name, value)
        for parameter in space.parameters
        for value in (parameter.values[0], parameter.values[-1])
    ]
    for pair in itertools.combinations(ends, 2):
        settings = space.settings(choice_of(space, **dict(pair)))
        changed = laid_over(config, settings)
        # It goes to the trial and into the file as plain values.
        assert from_dict(to_dict(changed)) == changed


def test_laid_over_checks() -> None:
    with pytest.raises(ConfigError, match="num_envs must be at least 1"):
        laid_over(config_of(), {"server": {"num_envs": 0}})


def test_facts_of_a_run() -> None:
    facts = Facts.of(config_of(compute_threads=3), cores=4, bfloat16=False)
    assert facts == Facts(
        cores=4,
        pool="inline",
        turns=False,
        bfloat16=False,
        half_precision=facts.half_precision,
        compiled=False,
        compute_threads=3,
    )
    assert Facts.of(config_of("ppo"), cores=4, bfloat16=False).turns
    assert Facts.of(config_of(pool="shm"), cores=4, bfloat16=False).pool == "shm"


def test_free_running() -> None:
    free = {"replay": {"samples_per_insert": 0.0}}
    assert is_free_running(config_of("sac", learning=free))
    assert not is_free_running(config_of("sac"))
    assert not is_free_running(config_of("impala"))


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_can_be_tuned(name: str) -> None:
    values = find(name).values
    env = "pointmass" if values.get("algorithm") == "sac" else "catch"
    # What belongs to other environments is left out.
    kept = {key: value for key, value in values.items() if key not in ("environment", "network")}
    space = space_of(from_dict({**kept, "env": env}), tune_batch=True)
    for one in space.parameters:
        assert len(set(one.values)) == len(one.values) > 1


def test_what_the_user_has_set_stays_with_another_batch() -> None:
    sac = config_of("sac", learning={"batch_unrolls": 64, "replay": {"samples_per_insert": 64.0}})
    space = space_of(sac, pinned=("samples_per_insert",), tune_batch=True)
    assert space.settings(choice_of(space, batch_unrolls=256)) == {
        "learning": {"batch_unrolls": 256}
    }
    impala = config_of(server={"queue_unrolls": 64}, learning={"batch_unrolls": 32})
    space = space_of(impala, pinned=("queue_unrolls",), tune_batch=True)
    assert space.settings(choice_of(space, batch_unrolls=64)) == {"learning": {"batch_unrolls": 64}}


def test_one_environment_is_answered_in_one_way() -> None:
    space = space_of(config_of("sac", server={"num_envs": 1}))
    for part in parameter(space, "inference_batch").values:
        assert space.settings(choice_of(space, inference_batch=part)) == {}


def test_the_time_of_compiling_is_told() -> None:
    space = space_of()
    (said,) = space.effects(choice_of(space, compile="on"))
    assert said.startswith("compile on: a run begins by compiling")
    assert space.effects(choice_of(space)) == []
