"""What one of several learners has of a run: its device, and its part of what the run has in all.

`--num-envs`, `--batch-unrolls`, the replay's size, workers and threads are the run's. Each learner
gets an equal part, and environments keep the numbers, and so the seeds, that they have with one.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor

from headrace import catalog
from headrace.config import RunConfig, algorithm_class
from headrace.errors import ConfigError
from headrace.records import PolicyState, PolicyStep
from headrace.resources import usable_cores
from headrace.run.compute import choose_compute
from headrace.run.seeds import Use, derived_seed
from headrace.run.system import choose_device
from headrace.server.acting import Acting


class Share(NamedTuple):
    """Which learner of how many."""

    rank: int = 0
    size: int = 1

    @property
    def own(self) -> tuple[int, ...]:
        """What this learner's seeds have beside the run's; nothing for the first."""
        return (self.rank,) if self.rank else ()

    @property
    def to_fill(self) -> int:
        """Replays to find room for: the first learner looks before any is filled, for all."""
        return 1 if self.rank else self.size

    def draws(self, config: RunConfig) -> tuple[int, ...]:
        """The same for its actions: in lockstep all draw alike, each for the rows of all."""
        return () if config.lockstep else self.own

    def global_seed(self, config: RunConfig, resume_count: int) -> int:
        """Where the global random states of its process begin."""
        return derived_seed(config.seed, Use.GLOBAL, resume_count, *self.own)

    def actor(self, actor: Acting, config: RunConfig) -> Acting:
        """Returns what acts for this learner's environments."""
        return OneOfMany(actor, self) if config.lockstep and self.size > 1 else actor


WHOLE = Share()


def learner_devices(config: RunConfig) -> list[torch.device]:
    """Returns the device of each learner, in order; one if there are not several.

    Raises:
        ConfigError: one of them does not exist, or they are of two kinds.
    """
    names = _names(config.learner_devices)
    if names == ["all"]:
        names = [f"cuda:{index}" for index in range(torch.cuda.device_count())] or ["cpu"]
    if not names:
        return [choose_device(config.device)]
    try:
        devices = [choose_device(name) for name in names]
    except ConfigError as error:
        raise ConfigError(f"--learner-devices {config.learner_devices}: {error}") from error
    if len({device.type for device in devices}) > 1:
        raise ConfigError(
            f"--learner-devices {config.learner_devices}: learners must be of one kind, or their "
            "weights drift apart: name GPUs, or cpu as often as there shall be learners"
        )
    return devices


def acting_devices(config: RunConfig) -> list[str]:
    """Returns where each learner's server acts, by name; empty for where it learns.

    Raises:
        ConfigError: neither one device nor one for each learner.
    """
    names = _names(config.inference_devices)
    count = len(learner_devices(config))
    if len(names) not in (0, 1, count):
        raise ConfigError(
            f"--inference-devices names {len(names)} devices for {count} learners: name one, or "
            "one for each"
        )
    return names * count if len(names) == 1 else names or [""] * count


def share_config(config: RunConfig, share: Share) -> RunConfig:
    """Returns the settings of one learner: as of a run of its own, with its part of everything.

    Raises:
        ConfigError: what cannot be divided, or several learners cannot do.
    """
    device, count = str(learner_devices(config)[share.rank]), share.size
    acting = acting_devices(config)[share.rank]
    if acting and (config.pool == "device" or config.inference == "worker"):
        choice = "--pool device" if config.pool == "device" else "--inference worker"
        raise ConfigError(
            f"with {choice} the policy acts beside the environments: leave out --inference-devices"
        )
    if not config.learner_devices:
        return dataclasses.replace(config, inference_devices=acting)
    config = dataclasses.replace(
        config, device=device, learner_devices="", inference_devices=acting
    )
    if count == 1:
        return config
    _check(config)
    return dataclasses.replace(
        config,
        compile=_compile(config),
        env_threads=_part(config.env_threads or usable_cores(), count),
        learning=_learning(config.learning, count),
        server=dataclasses.replace(
            config.server,
            num_envs=_divided(config.server.num_envs, count, "num_envs"),
            inference_batch=_part(config.server.inference_batch, count),
            queue_unrolls=-(-config.server.queue_unrolls // count),
            eval_envs=0 if share.rank else config.server.eval_envs,
        ),
        workers=dataclasses.replace(
            config.workers,
            num_workers=_part(config.workers.num_workers or usable_cores(), count),
        ),
        remote=dataclasses.replace(
            config.remote, listen=_own_port(config.remote.listen, share.rank)
        ),
    )


def uncompiled(config: RunConfig) -> str | None:
    """Returns what to tell a user whose updates one learner would compile, and several do not."""
    devices = learner_devices(config)
    if len(devices) == 1 or not _whole_update(config):
        return None
    alone = dataclasses.replace(
        config, device=str(devices[0]), learner_devices="", inference_devices=""
    )
    spec = catalog.environment_family(config.env).spec(config.env, config.environment)
    if not choose_compute(alone, spec).compiled:
        return None
    return (
        f"updates of {config.algorithm} are not compiled, since several learners average their "
        "gradients in the middle of each; one learner compiles them"
    )


class OneOfMany:
    """Acts for some rows of a batch as if all were there: in lockstep, with draws for all.

    So each environment gets the action that it would get from one server for all. That holds until
    an episode meets the clock, since the value of its last frame costs a draw at its own learner.
    """

    def __init__(self, actor: Acting, share: Share) -> None:
        """Takes what acts; the rows of this share are those behind the shares before it."""
        self._actor, self._share = actor, share

    def act(
        self,
        state: PolicyState,
        observation: Tensor,
        reward: Tensor,
        reset: Tensor,
        action_mask: Tensor | None = None,
        epsilon: Tensor | None = None,
    ) -> tuple[PolicyStep, PolicyState]:
        """See `server.acting.Actor.act`."""
        rank, size = self._share
        own = slice(rank * len(reward), (rank + 1) * len(reward))

        def wide(part: Tensor) -> Tensor:
            whole = part.new_zeros(size * len(part), *part.shape[1:])
            whole[own] = part
            return whole

        if action_mask is not None:  # no row without an action that is allowed
            action_mask = ~wide(~action_mask)
        step, after = self._actor.act(
            _mapped(wide, state),
            wide(observation),
            wide(reward),
            wide(reset),
            action_mask,
            None if epsilon is None else wide(epsilon),
        )
        return _mapped(lambda part: part[own], step), _mapped(lambda part: part[own], after)


def _mapped(change: Any, parts: Any) -> Any:
    if parts is None or isinstance(parts, Tensor):
        return None if parts is None else change(parts)
    changed = (_mapped(change, part) for part in parts)
    return type(parts)(*changed) if hasattr(parts, "_fields") else tuple(changed)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _check(config: RunConfig) -> None:
    several = "--learner-devices names several learners"
    if config.actor_device:
        raise ConfigError(
            f"{several}, and --actor-device with --critic-device divides one: leave out either"
        )
    if config.inference == "worker":
        raise ConfigError(
            f"{several}, each of which acts for its own environments: leave out --inference worker"
        )
    if config.cluster.cluster:
        raise ConfigError(f"{several} on this machine, and --cluster places one: leave out either")
    replay = getattr(config.learning, "replay", None)
    if replay is not None and replay.save_replay:
        raise ConfigError(
            f"{several}, each with a replay of its own, and a checkpoint holds one: leave out "
            "--save-replay"
        )
    if config.compile == "on" and _whole_update(config):
        raise ConfigError(
            f"{several}, which share gradients within an update, so that of {config.algorithm} "
            "cannot be compiled whole: leave out --compile on"
        )


def _whole_update(config: RunConfig) -> bool:
    return algorithm_class(config.algorithm).compiles_whole


def _compile(config: RunConfig) -> Any:
    return "off" if _whole_update(config) else config.compile


def _learning(learning: Any, count: int) -> Any:
    changes: dict[str, Any] = {}
    if hasattr(learning, "batch_unrolls"):
        changes["batch_unrolls"] = _divided(learning.batch_unrolls, count, "batch_unrolls")
    replay = getattr(learning, "replay", None)
    if replay is not None:
        changes["replay"] = dataclasses.replace(
            replay,
            replay_capacity=_part(replay.replay_capacity, count),
            replay_gib=replay.replay_gib / count,
            replay_min=min(
                -(-replay.replay_min // count),
                _part(replay.replay_capacity, count),
            ),
        )
    return dataclasses.replace(learning, **changes)


def _divided(total: int, count: int, name: str) -> int:
    if total % count:
        fitting = -(-total // count) * count
        raise ConfigError(
            f"{name}={total} cannot be divided among {count} learners: say "
            f"--{name.replace('_', '-')} {fitting}"
        )
    return total // count


def _part(total: int, count: int) -> int:
    """An equal part, at least 1; 0 of 0."""
    return max(1, total // count) if total else 0


def _own_port(listen: str, rank: int) -> str:
    """Each learner listens at a port of its own: the next ones, or any."""
    host, colon, port = listen.rpartition(":")
    if not colon or not port.isdigit() or port == "0":
        return listen
    return f"{host}:{int(port) + rank}"
