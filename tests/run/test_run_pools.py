"""Which pool steps a run's environments."""

from typing import Any

import pytest

from headrace.config import from_dict
from headrace.errors import ConfigError
from headrace.pools.grpc import GrpcPool
from headrace.pools.inline import InlinePool
from headrace.run.pools import make_pool, pool_name

LISTEN = {"remote": {"listen": "127.0.0.1:0"}}


def name_of(own: str = "shm", **settings: Any) -> str:
    return pool_name(from_dict({"env": "catch", **settings}), own)


@pytest.mark.parametrize("own", ["inline", "native", "shm"])
def test_whoever_listens_has_worker_hosts(own: str) -> None:
    assert name_of(own, **LISTEN) == "grpc"
    assert name_of(own, pool="grpc") == "grpc"
    assert name_of(own, pool="grpc", **LISTEN) == "grpc"
    assert name_of(own, turns="on", **LISTEN) == "grpc"


@pytest.mark.parametrize("own", ["inline", "native", "shm"])
def test_hosts_that_act_have_their_own_pools(own: str) -> None:
    assert name_of(own, inference="worker", **LISTEN) == own


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"pool": "shm", **LISTEN}, "--pool shm"),
        ({"pool": "inline", **LISTEN}, "--pool inline"),
        ({"lockstep": True, **LISTEN}, "--lockstep"),
        ({"lockstep": True, "pool": "grpc"}, "--lockstep"),
        (
            {"remote": {"listen": "127.0.0.1:0", "envs_per_message": 33}},
            "envs_per_message must be at most the environments answered at once, 32",
        ),
    ],
)
def test_what_contradicts_worker_hosts_is_refused(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        name_of(server={"num_envs": 64}, **settings)


@pytest.mark.net
def test_training_environments_are_elsewhere_and_judging_ones_here() -> None:
    config = from_dict({"env": "catch", "server": {"num_envs": 4}, **LISTEN})
    pool = make_pool(config, num_envs=4, batch_size=2, seed=1)
    pool.close()
    assert isinstance(pool, GrpcPool)
    for local in (
        make_pool(config, num_envs=4, batch_size=4, seed=1, evaluation=True),
        make_pool(config, num_envs=1, batch_size=1, seed=1, in_process=True),
    ):
        local.close()
        assert isinstance(local, InlinePool)
