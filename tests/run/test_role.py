"""A role's own end: the weights it is given, the end of the run; and the settings of roles."""

from __future__ import annotations

import os
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from headrace import RunConfig, catalog
from headrace.config import from_dict, merged, to_dict
from headrace.errors import ConfigError, PeerLost
from headrace.pools.memory import anonymous_block
from headrace.pools.processes import WorkerEnd
from headrace.run.build import make_model
from headrace.run.role import Follower, Stamped
from headrace.weights import SharedWeights, shared_nbytes


class Pipes:
    """A follower in this process, and the parent's ends of its pipes."""

    def __init__(self, config: RunConfig, model: nn.Module) -> None:
        control, self.control = os.pipe()
        self.status, status = os.pipe()
        lifeline, self.lifeline = os.pipe()
        self.stamped = Stamped(model)
        self.fd, block = anonymous_block(shared_nbytes(self.stamped))
        self.weights = SharedWeights(self.stamped, block)
        self._fds = [control, self.control, self.status, status, lifeline, self.lifeline, self.fd]
        settings = {
            "config": to_dict(config),
            "run": config.out,
            "weights_fd": self.fd,
        }
        page = {"control": control, "status": status, "lifeline": lifeline, "pass_fds": []}
        self.follower = Follower(WorkerEnd({**page, "settings": settings}))

    def publish(self, version: int, agent_steps: int) -> None:
        self.stamped.agent_steps.fill_(agent_steps)
        self.weights.publish(self.stamped, version)

    def close(self) -> None:
        for fd in self._fds:
            with suppress(OSError):  # the one that a test has closed
                os.close(fd)


def a_network(config: RunConfig) -> nn.Module:
    """Returns one like the run's, with weights that no seed gives."""
    spec = catalog.environment_family(config.env).spec(config.env, config.environment)
    model = make_model(config, spec, torch.device("cpu"))
    with torch.no_grad():
        for number, tensor in enumerate(model.parameters()):
            tensor.add_(0.1 * (number + 1))
    return model


@pytest.mark.parametrize(("env", "algorithm"), [("catch", "impala"), ("pointmass", "sac")])
def test_a_follower_has_exactly_the_weights_that_were_published(
    tmp_path: Path, env: str, algorithm: str
) -> None:
    config = from_dict({"env": env, "algorithm": algorithm, "out": str(tmp_path)})
    model = a_network(config)
    with closing(Pipes(config, model)) as pipes:
        follower = pipes.follower
        own: Any = follower.policy.actor("greedy", 0.0).model
        assert not any(part.training for part in own.modules())
        assert follower.newest(0.0) == -1
        assert b'{"wants": 1}' in os.read(pipes.status, 1000)
        pipes.publish(7, 700)
        os.write(pipes.control, b"1 7\n2 7\n")  # the first is answered too late, and passed over
        assert follower.newest(10.0) == 7
        assert follower.agent_steps == follower.policy.agent_steps == 700
        published, loaded = Stamped(model).acting_tensors(), Stamped(own).acting_tensors()
        assert len(published) > 4
        for one, other in zip(published[:-1], loaded[:-1], strict=True):
            assert torch.equal(one, other)
            assert other.dtype == torch.float32
        pipes.publish(8, 800)
        assert follower.newest(0.0) == 8, "what is there is taken, answered or not"


def test_a_follower_notices_that_the_run_is_over(tmp_path: Path) -> None:
    config = from_dict({"env": "catch", "out": str(tmp_path)})
    with closing(Pipes(config, a_network(config))) as pipes:
        pipes.follower.rest(0.0)
        os.close(pipes.control)
        with pytest.raises(PeerLost):
            pipes.follower.rest(60.0)
        with pytest.raises(PeerLost):
            pipes.follower.newest(60.0)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"evaluator": {"eval_episodes": 0}}, "eval_episodes"),
        ({"evaluator": {"eval_interval_s": -1.0}}, "eval_interval_s"),
        ({"viewer": {"video_interval_s": -1.0}}, "video_interval_s"),
        ({"viewer": {"video_interval_s": float("nan")}}, "video_interval_s"),
        ({"viewer": {"watch_port": 70000}}, "watch_port"),
        ({"viewer": {"watch_fps": 0.0}}, "watch_fps"),
        ({"server": {"eval_envs": 2}}, "--eval-envs"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        from_dict(merged({"env": "catch", "evaluator": {"evaluator": True}}, settings))
