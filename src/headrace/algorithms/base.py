"""The seam between a learning rule and the system that feeds it.

An algorithm is a config, `act` and `update`: no process, clock or file. The system asks
`experience` how to cut the stream of steps and never asks which algorithm it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from headrace.errors import ConfigError
from headrace.records import Batch, PolicyInput, PolicyStep, Update
from headrace.schedules import Schedule, between

ActionMode = Literal["sample", "greedy", "epsilon"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplayConfig:
    """What is kept for later, and how often it is learned from."""

    replay_capacity: int = 10_000
    """Keeps so many sequences; the oldest of each environment give way."""
    replay_gib: float = 0.0
    """Fills so many GiB of memory with sequences, in place of replay_capacity; 0 takes that."""
    replay_min: int = 500
    """Makes the first update once there are so many sequences."""
    replay_place: Literal["auto", "cpu", "cuda", "disk"] = "auto"
    """Says where sequences lie: with the learner (cuda), in main memory (cpu), or in a mapped file
    (disk). auto takes the first of these that they fit into."""
    replay_folder: str = ""
    """Names the folder of the mapped file; empty takes the system's for temporary files."""
    save_replay: bool = False
    """Saves all sequences with every checkpoint, in a file of their own; else a resumed run
    collects anew. In lockstep they always are."""
    samples_per_insert: float = 0.8
    """Samples a sequence so many times on average, by making the faster side wait; 0 makes neither
    wait."""
    priority_exponent: float = 0.9
    """Samples sequences in proportion to their priority to this power; 0 samples all alike."""
    importance_exponent: float = 0.6
    """Says how far weights in the loss undo sampling by priority: 0 not at all, 1 wholly."""
    importance_exponent_schedule: Schedule = "constant"
    """Moves importance_exponent to final_importance_exponent, which it reaches at the end of the
    run (linear, cosine), or leaves it (constant)."""
    final_importance_exponent: float = 1.0
    """Says where importance_exponent_schedule ends, from 0 to 1."""

    def __post_init__(self) -> None:
        numbers = (self.replay_gib, self.samples_per_insert, self.priority_exponent)
        exponents = (self.importance_exponent, self.final_importance_exponent)
        if not all(map(math.isfinite, (*numbers, *exponents))):
            raise ConfigError("settings of the replay must be finite numbers")
        if self.replay_capacity < 1 or self.replay_min < 1:
            raise ConfigError("replay_capacity and replay_min must be at least 1")
        if self.replay_gib < 0 or self.samples_per_insert < 0:
            raise ConfigError("replay_gib and samples_per_insert must not be negative")
        if not self.replay_gib and self.replay_min > self.replay_capacity:
            raise ConfigError(
                f"replay_min={self.replay_min} sequences never fit in "
                f"replay_capacity={self.replay_capacity}: lower --replay-min"
            )
        if self.priority_exponent < 0 or not 0 <= self.importance_exponent <= 1:
            raise ConfigError(
                "priority_exponent must not be negative, and importance_exponent in [0, 1]"
            )
        if not 0 <= self.final_importance_exponent <= 1:
            raise ConfigError(
                "final_importance_exponent must be in [0, 1]: say --final-importance-exponent 1"
            )
        is_constant = self.importance_exponent_schedule == "constant"
        if self.final_importance_exponent != 1 and is_constant:
            raise ConfigError(
                "final_importance_exponent is of a schedule: say --importance-exponent-schedule "
                "linear as well"
            )
        if not self.priority_exponent and not is_constant:
            raise ConfigError(
                "importance_exponent_schedule has no effect where all sequences are sampled alike: "
                "say --importance-exponent-schedule constant, or --priority-exponent 0.6"
            )

    def importance_exponent_at(self, progress: float) -> float:
        """Returns the exponent when the share `progress` of the run is done."""
        return between(
            self.importance_exponent,
            self.final_importance_exponent,
            self.importance_exponent_schedule,
            progress,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplaySpec:
    """How sequences are cut from what a replay keeps."""

    sequence_steps: int
    """Steps of a sampled sequence, which has one row more; those of the burn-in included."""
    stride_steps: int
    """Steps from the start of one sequence to the start of the next, in the same environment."""
    burn_in_steps: int
    """Steps at the start that only warm the recurrent state up."""
    learned_steps: int
    """Steps of each sequence that go through the gradient."""
    settings: ReplayConfig

    def __post_init__(self) -> None:
        if not 1 <= self.stride_steps <= self.sequence_steps:
            raise ConfigError(
                f"sequences of {self.sequence_steps} steps must start 1 to {self.sequence_steps} "
                f"steps apart, not {self.stride_steps}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ExperienceSpec:
    """How an algorithm wants the stream of steps cut and kept."""

    unroll_steps: int
    """T: agent steps per unroll; an unroll has T + 1 rows. With a replay: of the pieces in which
    experience arrives there; this or the replay's stride divides the other."""
    batch_unrolls: int
    """B: unrolls per update; with a replay, sequences."""
    passes: int = 1
    """How often every row of a batch goes through a gradient in one update."""
    replay: ReplaySpec | None = None
    """How experience is kept and sampled; None to learn from unrolls in order, one batch each."""
    updates_per_call: int = 1
    """Updates that one call of `update` takes, each with batch_unrolls sequences of its own."""

    def __post_init__(self) -> None:
        if self.unroll_steps < 1 or self.batch_unrolls < 1 or self.passes < 1:
            raise ConfigError("unroll_steps, batch_unrolls and passes must be at least 1")
        if self.updates_per_call < 1:
            raise ConfigError("updates_per_call must be at least 1")

    @property
    def unrolls_per_call(self) -> int:
        """Unrolls, or with a replay sequences, that one call of `update` is given."""
        return self.batch_unrolls * self.updates_per_call

    @property
    def samples_per_update(self) -> int:
        """Rows that go through a gradient in one update, as often as they do."""
        steps = self.unroll_steps if self.replay is None else self.replay.learned_steps
        return steps * self.batch_unrolls * self.passes


Beside = Callable[[Callable[[], Any]], Callable[[], Any]]
"""Starts some work, perhaps in another thread; what it returns gives the result, when it is there.

The work computes without gradients and draws nothing, so that it does not matter where it runs."""


def in_turn(work: Callable[[], Any]) -> Callable[[], Any]:
    """Does the work at once: a `Beside` without another thread."""
    result = work()
    return lambda: result


class Learners(Protocol):
    """All learners of a run, as a learning rule sees them. Each has an equal share of a batch."""

    count: int

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replaces tensors, in place, by their means over all learners: in the same order by all.

        Every learner gets the same bits.
        """


class OneLearner:
    """`Learners` without others."""

    count = 1

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Leaves the tensors as they are."""


ALONE = OneLearner()


Capture = Callable[[Callable[[], Any]], tuple[Callable[[], None], Any]]
"""Takes what is done again and again on fixed tensors; returns how to do it again, and the tensors
that it always writes."""


class Model(Protocol):
    """A network with its recurrent state, as algorithms and the server see it."""

    def __call__(
        self, inputs: PolicyInput, recurrent: tuple[Tensor, ...]
    ) -> tuple[Any, tuple[Tensor, ...]]:
        """Runs rows [U, B] in order, clearing the recurrent state before rows that reset."""

    def initial_state(self, batch: int) -> tuple[Tensor, ...]:
        """Zero recurrent state for `batch` environments."""


class Algorithm(Protocol):
    """A learning rule, made with (model, config, *, spec: EnvSpec, precision: torch.dtype).

    It may say more of itself, by attributes that the system looks for:

    - `on_policy` (class): True if server and learner should take turns.
    - `heads`, `network` (class): the heads it needs, and the network that "auto" stands for.
    - `beside`: a `Beside`, which the system may replace by one that has a thread.
    - `learners`: the `Learners`, which the system may replace by several: the rule then averages
      its gradients and statistics over them. A rule without it learns alone.
    - `draw_apart(seed)`: seeds what it draws in updates, by the run's seed; further learners draw
      by others.
    - `target_model`: a second network, compiled where `model` is.
    - `compile(capture, *, graphs)`: makes the whole update one graph, in place of `model`, or
      without `graphs` takes that back; on a GPU `capture` records it (see `Capture`).
      `worth_compiling(config, agent_steps) -> bool` (static): whether it should on a CPU too.
    - `place(actor, critics)`: moves its two sides to devices of their own.
    - `exploration(num_envs) -> Tensor [num_envs]`: epsilon of each environment that trains.
    - `annealed(model, epsilon) -> Tensor [N]`: those as they are now, by what the learner has
      written into a buffer of the model.
    - `normalizes_values` (class): True if it tells a network's `PopArtHead` of its targets.
    - `eval_epsilon`: epsilon of the environments that play beside training.
    - `initial_priority(batch) -> Tensor [B]`: of sequences that are new in a replay, from what the
      policy that acted said; the batch has no observations.
    """

    experience: ExperienceSpec
    model: torch.nn.Module

    def act(
        self,
        model: Model,
        inputs: PolicyInput,
        recurrent: tuple[Tensor, ...],
        *,
        mode: ActionMode,
        generator: torch.Generator | None = None,
        epsilon: float | Tensor = 0.0,
    ) -> tuple[PolicyStep, tuple[Tensor, ...]]:
        """Acts for one batch [1, N] with the given weights: the server's, not the learner's.

        `epsilon` is one share of random actions for all, or one for each, [N].
        """

    def update(self, batch: Batch, *, progress: float) -> Update:
        """Learns from one batch. `progress` is the share of the run that is done, in [0, 1]."""

    def warm_up(self, batch: Batch) -> None:
        """Runs what `update` compiles and chooses kernels for, without learning from `batch`."""

    def state_dict(self) -> dict[str, Any]:
        """Everything but the model's weights that a resumed run needs."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""
