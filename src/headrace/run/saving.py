"""What a checkpoint of a run holds, and how a run goes on from one.

Always: weights, optimiser, counters, random state of the actions. In lockstep, with environments
that can be saved, also every environment, the policy's state, all unrolls and the global random
states, so that the resumed run is bit-equal to one that never stopped. Otherwise new episodes start
and unfinished unrolls are dropped, which is said.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeGuard

import torch
from torch import nn

from headrace import __version__
from headrace.algorithms.base import Algorithm
from headrace.config import RunConfig, to_dict
from headrace.errors import ConfigError
from headrace.learner import checkpoint
from headrace.learner.checkpoint import Checkpoint, DamagedCheckpoint
from headrace.learner.feeds import ReplayFeed
from headrace.learner.flattening import flatten, unflatten
from headrace.learner.loop import Learner
from headrace.pools.base import Restorable
from headrace.run.build import Parts
from headrace.run.draws import global_states, set_global_states
from headrace.run.report import Reporter
from headrace.run.share import learner_devices
from headrace.server.acting import Actor
from headrace.specs import EnvSpec
from headrace.telemetry.record import RunDirectory
from headrace.transport.messages import describe, spec_difference


@dataclass(frozen=True, kw_only=True, slots=True)
class Before:
    """Counters of a run when this session of it began."""

    agent_steps: int = 0
    updates: int = 0
    samples: int = 0
    elapsed_s: float = 0.0
    episodes: int = 0
    return_max: float = float("nan")
    resume_count: int = 0
    """Sessions before this one."""

    @classmethod
    def read(cls, saved: Checkpoint | None) -> Self:
        """Returns the counters of a checkpoint, or of a new run.

        Raises:
            DamagedCheckpoint: one is missing, or no such number.
        """
        if saved is None:
            return cls()
        counters = saved.meta.get("counters")
        found = dict(counters) if isinstance(counters, dict) else {}
        found["resume_count"] = saved.meta.get("resume_count")
        no_episode = found.get("return_max", 0.0) is None
        if no_episode:
            found["return_max"] = 0.0
        for entry in fields(cls):
            if not _is_number(found.get(entry.name), whole=entry.type == "int"):
                raise DamagedCheckpoint(f"its meta.json has no {entry.name}, or a strange one")
        before = cls(**{entry.name: found[entry.name] for entry in fields(cls)})
        highest = math.nan if no_episode else before.return_max
        return replace(before, return_max=highest, resume_count=before.resume_count + 1)


def _is_number(value: Any, *, whole: bool) -> bool:
    """Whether this is a count, or a finite number where it need not be `whole`."""
    if type(value) is int:
        return 0 <= value < 1 << 63
    return not whole and type(value) is float and math.isfinite(value)


def newest(
    run: RunDirectory, *, without: Collection[str] = ()
) -> tuple[Checkpoint | None, list[str]]:
    """Returns the newest whole checkpoint of a run, and what to say of those passed over."""
    check = partial(_check, without=without)
    return checkpoint.newest_whole(run.checkpoints, without=without, check=check)


def _check(saved: Checkpoint, *, without: Collection[str]) -> None:
    """Looks whether all is there that `save` writes, but for the groups `without`.

    Raises:
        DamagedCheckpoint: it is not.
    """
    Before.read(saved)
    if "weights" not in saved.tensors or not isinstance(saved.meta.get("training"), dict):
        raise DamagedCheckpoint("it has no weights, or no state of the training")
    if not _is_number(saved.meta.get("unfinished_unrolls"), whole=True):
        raise DamagedCheckpoint("its meta.json has no unfinished_unrolls, or strange ones")
    for group in {"training", "system", "replay"}.difference(without):
        skeleton = saved.meta.get(group)
        if skeleton is None:
            continue
        try:
            tree = unflatten(saved.tensors.get(group, {}), skeleton, copy=False)
        except ConfigError as error:
            raise DamagedCheckpoint(f"its {group}: {error}") from error
        if not isinstance(tree, dict):
            raise DamagedCheckpoint(f"its {group} is no state of ours")


def find(run: RunDirectory, on_message: Callable[[str], None]) -> Checkpoint:
    """Returns the newest whole checkpoint of a run; names each damaged one that it passes over.

    Raises:
        ConfigError: there is none.
    """
    saved, warnings = newest(run)
    for warning in warnings:
        on_message(warning)
    if saved is None:
        raise ConfigError(
            f"{run.path} has no whole checkpoint to go on from: start anew with another --out"
        )
    return saved


def save(
    config: RunConfig,
    run: RunDirectory,
    parts: Parts,
    learner: Learner,
    reporter: Reporter,
    before: Before,
) -> Path:
    """Writes a checkpoint of the run as it stands."""
    training, training_skeleton = flatten(parts.algorithm.state_dict())
    tensors = {"weights": parts.algorithm.model.state_dict(), "training": training}
    meta: dict[str, Any] = {
        "headrace": __version__,
        "config": to_dict(config),
        "counters": {
            "agent_steps": reporter.agent_steps,
            "updates": learner.version,
            "samples": learner.samples,
            "elapsed_s": reporter.elapsed_s,
            **reporter.episode_counters(),
        },
        "resume_count": before.resume_count,
        "spec": describe(parts.spec),
        "unfinished_unrolls": parts.unfinished_unrolls,
        "training": training_skeleton,
        "system": None,
        "replay": None,
    }
    if is_bit_equal(config, parts):
        tensors["system"], meta["system"] = flatten(_system_state(parts))
    if isinstance(parts.feed, ReplayFeed) and (
        meta["system"] is not None or (_keeps_replay(parts) and parts.feed.replay.inserted)
    ):
        tensors["replay"], meta["replay"] = flatten(parts.feed.state_dict())
    return checkpoint.save(
        run.checkpoints,
        agent_steps=reporter.agent_steps,
        tensors=tensors,
        meta=meta,
        keep=config.keep_checkpoints,
    )


def is_bit_equal(config: RunConfig, parts: Parts) -> bool:
    """Whether a checkpoint can hold everything that the run depends on: not of several learners."""
    alone = len(learner_devices(config)) == 1
    return (
        alone
        and config.lockstep
        and all(isinstance(seat.pool, Restorable) and seat.pool.restorable for seat in parts.seats)
    )


def restore(
    parts: Parts, saved: Checkpoint, on_message: Callable[[str], None], *, alone: bool = True
) -> bool:
    """Puts back what a checkpoint holds; environments and replay only for a learner that is alone.

    What a checkpoint of another version lacks starts anew, which is said.

    Returns:
        Whether experience goes on where it was: unrolls, or a replay, that need not fill anew.

    Raises:
        ConfigError: its network is not the one that the settings build, or its state is of
            something else.
    """
    with _naming(saved):
        return _restore(parts, saved, on_message, alone)


@contextmanager
def _naming(saved: Checkpoint) -> Iterator[None]:
    """What a state of the wrong kind raises, in whatever takes it, names the checkpoint."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (
        *(ArithmeticError, AttributeError, LookupError),
        *(RuntimeError, TypeError, ValueError),
    ) as error:
        raise ConfigError(
            f"{saved.path} does not fit its run ({type(error).__name__}: {error}): move that "
            "folder away to go on from the checkpoint before it"
        ) from error


def difference_of_spec(spec: EnvSpec, saved: Checkpoint) -> str:
    """Says in a sentence how an environment differs from what a checkpoint learned in; or "".

    One of before there was this knows nothing of it.
    """
    known = saved.meta.get("spec")
    if not isinstance(known, dict) or not (found := spec_difference(describe(spec), known)):
        return ""
    found = found.replace(" here", " now").replace(" at the other end", " in the checkpoint")
    return f"{spec.name} is not what {saved.path} has learned in: {found}"


def _restore(
    parts: Parts, saved: Checkpoint, on_message: Callable[[str], None], alone: bool
) -> bool:
    if difference := difference_of_spec(parts.spec, saved):
        on_message(difference)
    anew = load_weights(parts.algorithm.model, saved)
    training = unflatten(saved.tensors["training"], saved.meta["training"])
    if anew := [*anew, *_load_training(parts.algorithm, training)]:
        on_message(
            f"{saved.path} does not hold all that this version needs, so this starts anew, whole "
            f"or in part: {', '.join(anew)}"
        )
    goes_on = has_system = alone and saved.meta.get("system") is not None
    if isinstance(parts.feed, ReplayFeed):
        if alone and saved.meta.get("replay") is not None:
            kept = unflatten(saved.tensors["replay"], saved.meta["replay"])
            parts.feed.load_state_dict(kept, streams_go_on=has_system)
            goes_on = True
        else:
            why = "was not saved (--save-replay)" if alone else "is not that of several learners"
            on_message(f"the replay {why}: it fills anew")
    if has_system:
        _load_system_state(parts, unflatten(saved.tensors["system"], saved.meta["system"]))
        on_message(f"resumed from {saved.path}")
        return True
    on_message(
        f"resumed from {saved.path}; the environments cannot be saved, so new episodes start "
        f"({saved.meta['unfinished_unrolls']} unfinished unrolls dropped)"
    )
    return goes_on


def _keeps_replay(parts: Parts) -> bool:
    spec = parts.algorithm.experience.replay
    return spec is not None and spec.settings.save_replay


def _load_training(algorithm: Algorithm, saved: dict[str, Any]) -> list[str]:
    """Puts back a learning rule's state; returns the parts of it that `saved` does not fill."""
    new = algorithm.state_dict()
    anew = {name for name, part in new.items() if _lacks(saved.get(name), part)}
    algorithm.load_state_dict(_filled(saved, new))
    for name, part in algorithm.state_dict().items():
        before = saved.get(name)
        if _is_optimizer(part) and _is_optimizer(before) and before["state"] and not part["state"]:
            anew.add(name)  # its moments did not fit
    return sorted(anew)


def _lacks(saved: Any, new: Any) -> bool:
    """Whether something in `new` has no counterpart in `saved`; optimisers see for themselves."""
    if _is_optimizer(new):
        return not _is_optimizer(saved)
    if isinstance(new, dict):
        kept = saved if isinstance(saved, dict) else {}
        return any(_lacks(kept.get(name), part) for name, part in new.items())
    return new is not None and saved is None


def _filled(saved: Any, new: Any) -> Any:
    """Returns `saved`, with what it lacks taken from `new`."""
    if isinstance(saved, dict) and isinstance(new, dict) and not _is_optimizer(new):
        return {**saved, **{name: _filled(saved.get(name), part) for name, part in new.items()}}
    return new if saved is None or _lacks(saved, new) else saved


def _is_optimizer(state: Any) -> TypeGuard[dict[str, Any]]:
    """Whether this is the state of one of torch's optimisers, which is empty before a step."""
    return isinstance(state, dict) and state.keys() == {"state", "param_groups"}


def load_weights(model: nn.Module, saved: Checkpoint) -> list[str]:
    """Copies a checkpoint's weights into `model`.

    Returns:
        Buffers, such as running statistics, that the checkpoint lacks; they stay as they are.

    Raises:
        ConfigError: names the first weight that does not fit.
    """
    weights, wanted = saved.tensors["weights"], model.state_dict()
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    anew = sorted(wanted.keys() - weights.keys() - parameters)
    for name in sorted((weights.keys() | wanted.keys()) - set(anew)):
        have = tuple(weights[name].shape) if name in weights else None
        want = tuple(wanted[name].shape) if name in wanted else None
        if have != want:
            raise ConfigError(
                f"{saved.path} holds another network: {name} is {have or 'missing'}, the settings "
                f"want {want or 'none'}; use the run's own config.toml"
            )
    model.load_state_dict({**wanted, **weights})
    return anew


def _system_state(parts: Parts) -> dict[str, Any]:
    return {
        "seats": [seat.state_dict() for seat in parts.seats],
        "pools": [
            seat.pool.snapshot() for seat in parts.seats if isinstance(seat.pool, Restorable)
        ],
        "generator": parts.generator.get_state(),
        "evaluation": [generator.get_state() for generator in _of_evaluation(parts)],
        "global": global_states(),
    }


def _of_evaluation(parts: Parts) -> list[torch.Generator]:
    """Generator of the actions beside training, if there are any that draw."""
    actor = None if parts.evaluation is None else parts.evaluation.actor
    generator = actor.generator if isinstance(actor, Actor) else None
    return [] if generator is None else [generator]


def _load_system_state(parts: Parts, state: dict[str, Any]) -> None:
    for seat, saved, environments in zip(parts.seats, state["seats"], state["pools"], strict=True):
        seat.load_state_dict(saved)
        if isinstance(seat.pool, Restorable):
            seat.pool.restore(environments)
    parts.generator.set_state(state["generator"].cpu())
    saved_states = state.get("evaluation", [])  # runs of before have none
    for generator, drawn in zip(_of_evaluation(parts), saved_states, strict=False):
        generator.set_state(drawn.cpu())
    if "global" in state:  # runs of before have none
        set_global_states(state["global"])
