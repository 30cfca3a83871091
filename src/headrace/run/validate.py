"""What is refused before a run directory is made or an environment started.

A setting that is wrong by itself is refused by the config that holds it. `RULES` are those between
settings: each has a sentence with the numbers, and flags that mend it as they are typed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from headrace import catalog
from headrace.algorithms.base import ExperienceSpec
from headrace.config import RunConfig, takes_turns
from headrace.errors import ConfigError
from headrace.run.build import Parts, make_learning
from headrace.run.compute import place_sides
from headrace.run.device_seat import check_device_pool
from headrace.run.experience import place_replay, queue_capacity, spreads_ends
from headrace.run.pools import pool_name
from headrace.run.share import Share, learner_devices, share_config
from headrace.specs import EnvSpec


class Case(NamedTuple):
    """What the rules look at: the settings of one of `learners`, and what follows from them."""

    config: RunConfig
    experience: ExperienceSpec
    action_repeat: int
    learners: int = 1
    envs_together: int = 1

    @property
    def num_envs(self) -> int:
        """Environments of all learners."""
        return self.config.server.num_envs * self.learners

    @property
    def wanted(self) -> int:
        """Unrolls, or with a replay sequences, that the first update waits for."""
        replay = self.experience.replay
        if replay is None:
            return self.batch_unrolls
        return replay.settings.replay_min * self.learners

    @property
    def minibatches(self) -> int:
        """Parts of a batch that are learned from one after the other."""
        return int(getattr(self.config.learning, "minibatches", 1))

    @property
    def samples_at_once(self) -> int:
        """Samples whose advantages are normalised together; 0 where none are."""
        if not getattr(self.config.learning, "normalize_advantage", False):
            return 0
        batch = self.experience.unroll_steps * self.batch_unrolls
        return batch // self.minibatches

    @property
    def batch_unrolls(self) -> int:
        """Unrolls, or with a replay sequences, of an update of all learners."""
        return self.experience.batch_unrolls * self.learners

    @property
    def replay_capacity(self) -> int | None:
        """Sequences of all learners' replays; None without one, or where its bytes are given."""
        replay = self.experience.replay
        if replay is None or replay.settings.replay_gib:
            return None
        return replay.settings.replay_capacity * self.learners

    @property
    def full_steps(self) -> int | None:
        """Steps that the longest return of a sequence can have; None without a replay."""
        replay = self.experience.replay
        return None if replay is None else replay.sequence_steps - replay.burn_in_steps

    def frames_to_update(self, *, together: bool) -> int:
        """Frames of this session that are made when the first update can be."""
        replay, steps = self.experience.replay, self.experience.unroll_steps
        return self.action_repeat * steps_to_first_update(
            num_envs=self.num_envs,
            wanted=self.wanted,
            unroll_steps=steps,
            sequence_steps=steps if replay is None else replay.sequence_steps,
            stride_steps=steps if replay is None else replay.stride_steps,
            late_steps=self.late_steps,
            together=together,
        )

    @property
    def late_steps(self) -> int:
        """Steps after which the last unroll of the first batch begins, where ends are spread."""
        experience, num_envs = self.experience, self.config.server.num_envs
        if not spreads_ends(self.config, experience):
            return 0
        return (experience.batch_unrolls - 1) * experience.unroll_steps // num_envs

    def is_too_short(self, frames: int) -> bool:
        """Whether `frames` more frames certainly bring no update."""
        together = takes_turns(self.config)
        needed = self.frames_to_update(together=together)
        # In turns, and at meetings of learners, the end is looked at before the batch.
        return frames <= needed if together or self.learners > 1 else frames < needed

    @property
    def enough_frames(self) -> int:
        """Frames of a session that bring an update, however its environments are answered."""
        return self.frames_to_update(together=True) + 1

    @property
    def first_update(self) -> str:
        """What the first update waits for, in words."""
        replay = self.experience.replay
        steps = self.experience.unroll_steps if replay is None else replay.sequence_steps
        what = f"{self.wanted} unrolls" if replay is None else f"replay_min={self.wanted} sequences"
        frames = self.frames_to_update(together=takes_turns(self.config))
        return (
            f"the first update needs {what} of {steps} steps, which {self.num_envs} environments "
            f"give after {frames} frames"
        )


def steps_to_first_update(
    *,
    num_envs: int,
    wanted: int,
    unroll_steps: int,
    sequence_steps: int,
    stride_steps: int,
    late_steps: int = 0,
    together: bool,
) -> int:
    """Returns the agent steps of all environments that are made when `wanted` sequences are there.

    Environments advance evenly. A sequence comes with the unroll that holds its last row, and an
    unroll of T steps with row T, when an environment is answered for the (T + 1)-th time.

    Args:
        num_envs: N.
        wanted: Sequences; of a learner without a replay, unrolls.
        unroll_steps: T.
        sequence_steps: Of a sequence; T for unrolls.
        stride_steps: From one sequence of an environment to its next; T for unrolls.
        late_steps: Of the environment whose unroll is the last: when that begins.
        together: Whether all environments are answered at once; else one may be the last.
    """

    def given(unrolls: int) -> int:
        """Sequences that so many unrolls of one environment hold."""
        return max(0, (unrolls * unroll_steps - sequence_steps) // stride_steps + 1)

    each = -(-wanted // num_envs)
    unrolls = -(-(sequence_steps + (each - 1) * stride_steps) // unroll_steps)
    lacking = wanted - num_envs * given(unrolls - 1)
    last = num_envs if together else -(-lacking // (given(unrolls) - given(unrolls - 1)))
    last = 1 if late_steps else last
    return num_envs * (unrolls * unroll_steps + late_steps) + last


class Rule(NamedTuple):
    """Settings that do not fit each other."""

    is_broken: Callable[[Case], bool]
    sentence: Callable[[Case], str]
    fix: Callable[[Case], str]  # flags


def _returns_are_cut(case: Case) -> bool:
    most = case.full_steps
    return most is not None and getattr(case.config.learning, "n_steps", 1) > most


def _replay_is_small(case: Case) -> bool:
    return case.replay_capacity is not None and case.batch_unrolls > case.replay_capacity


def _cuts_vectors(case: Case) -> bool:
    return case.config.server.num_envs % case.envs_together != 0


def _whole_vectors(case: Case) -> str:
    unit = case.envs_together * case.learners
    return f"--num-envs {-(-case.num_envs // unit) * unit}"


RULES = (
    Rule(
        _cuts_vectors,
        lambda case: (
            f"num_envs={case.num_envs} is no multiple of the {case.envs_together} environments "
            f"that a vector of {case.config.env} has"
            + (f", for each of {case.learners} learners" if case.learners > 1 else "")
        ),
        _whole_vectors,
    ),
    Rule(
        _returns_are_cut,
        lambda case: (
            f"n_steps={case.config.learning.n_steps} rewards are in no target, since sequences "
            f"have {case.full_steps} steps that are learned from"
        ),
        lambda case: (
            "--full-returns"  # makes them longer
            if hasattr(case.config.learning, "full_returns")
            else f"--n-steps {case.full_steps}"
        ),
    ),
    Rule(
        lambda case: case.samples_at_once == 1,
        lambda case: (
            f"minibatches={case.minibatches} of unroll_steps="
            f"{case.experience.unroll_steps} x batch_unrolls="
            f"{case.batch_unrolls} samples have one each, whose "
            "advantage becomes 0 when it is normalised"
        ),
        lambda _: "--no-normalize-advantage",
    ),
    Rule(
        lambda case: (
            case.config.network.critic_layer_norm and min(case.config.network.hidden_sizes) == 1
        ),
        lambda case: (
            "critic_layer_norm makes a constant of a layer of one unit, and hidden_sizes are "
            f"{case.config.network.hidden_sizes}"
        ),
        lambda _: "--no-critic-layer-norm",
    ),
    Rule(
        _replay_is_small,
        lambda case: (
            f"batch_unrolls={case.batch_unrolls} sequences are more "
            f"than replay_capacity={case.replay_capacity}, "
            "so that every update learns from some of them twice"
        ),
        lambda case: f"--replay-capacity {case.batch_unrolls}",
    ),
    Rule(
        lambda case: case.is_too_short(case.config.total_frames),
        lambda case: (
            f"a run of total_frames={case.config.total_frames} ends before anything is learned: "
            f"{case.first_update}"
        ),
        lambda case: f"--total-frames {case.enough_frames}",
    ),
)


def refuse(case: Case) -> None:
    """Looks at every rule.

    Raises:
        ConfigError: the sentence and the fix of the first one that is broken.
    """
    for rule in RULES:
        if rule.is_broken(case):
            raise ConfigError(f"{rule.sentence(case)}; say {rule.fix(case)}")


def say_if_short(
    config: RunConfig, parts: Parts, on_message: Callable[[str], None], *, agent_steps: int
) -> None:
    """Says that a resumed run, whose experience begins anew, ends before its first update.

    Args:
        config: The run's settings.
        parts: Of its first learner.
        on_message: Told.
        agent_steps: Of the sessions before.
    """
    share = Share(0, len(learner_devices(config)))
    repeat = parts.spec.action_repeat
    case = Case(share_config(config, share), parts.algorithm.experience, repeat, share.size)
    left = max(0, config.total_frames - agent_steps * repeat)
    if case.is_too_short(left):
        on_message(
            f"the {left} frames that are left end before anything is learned: "
            f"{case.first_update}; say --total-frames {agent_steps * repeat + case.enough_frames}"
        )


def check(config: RunConfig, *, trust_code: bool = True, elsewhere: bool = False) -> None:
    """Finds what can be wrong before a run directory is made or an environment started.

    `elsewhere`: the learner's memory is another machine's, and cannot be looked at.

    Raises:
        ConfigError: settings that do not fit each other or this machine.
    """
    family = catalog.environment_family(config.env, trust_code=trust_code)
    spec: EnvSpec = family.spec(config.env, config.environment)
    share = Share(0, len(learner_devices(config)))
    config = share_config(config, share)
    compute, model, algorithm = make_learning(
        config, spec, trust_code=trust_code, learners=share.size
    )
    place_sides(config, algorithm)
    queue_capacity(config, algorithm)
    pool_name(config, family.pool)
    if config.pool == "device":
        check_device_pool(config, family)
    refuse(Case(config, algorithm.experience, spec.action_repeat, share.size, spec.envs_together))
    if not elsewhere:
        place_replay(config, algorithm, spec, model, compute.device, learners=share.size)
