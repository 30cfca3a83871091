"""The seam between a learning rule and the system that feeds it.

An algorithm is a config, `act` and `update`: no process, clock or file. The system asks
`experience` how to cut the stream of steps and never asks which algorithm it is.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

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
    judges_new: bool = False
    """Whether new sequences are sampled by the algorithm's `initial_priority`; else by the largest
    priority so far."""

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


@runtime_checkable
class Averaging(Protocol):
    """A part of a network whose statistics are those of all learners: the system sets them."""

    learners: Learners


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


Shown = tuple[str, str]
"""A metric as a display shows it: a label of a few words, and its name, such as loss/policy."""

_STEP: tuple[Shown, ...] = (("gradient norm", "gradient_norm"), ("learning rate", "learning_rate"))
_LOSS: tuple[Shown, ...] = (("loss", "loss/total"), *_STEP)


@dataclass(frozen=True, kw_only=True, slots=True)
class ShownMetrics:
    """Which of its metrics an algorithm shows in a terminal; all go into the run's files."""

    panel: tuple[Shown, ...]
    """In the live table, in order: at most 6."""
    line: Shown
    """In the plain line."""


POLICY_METRICS = ShownMetrics(
    panel=(
        ("policy loss", "loss/policy"),
        ("value loss", "loss/value"),
        ("entropy, nats", "loss/entropy"),
        *_STEP,
    ),
    line=("loss", "loss/policy"),
)
"""Of what learns a policy and its value."""
VALUES_METRICS = ShownMetrics(
    panel=(
        ("loss", "loss/total"),
        ("TD error", "loss/td_error_mean"),
        ("value", "value_mean"),
        *_STEP,
    ),
    line=("TD error", "loss/td_error_mean"),
)
"""Of what learns values of actions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NoSettings:
    """Of an algorithm that has no settings of its own."""


class Algorithm(ABC):
    """A learning rule. The system knows no other thing about it than what stands here.

    It is made with `(model, config, *, spec: EnvSpec, precision: torch.dtype)`: the network, an
    instance of its `config_type`, what the environment says of itself, and the dtype of arithmetic
    in updates. Own ones subclass this (`headrace.Algorithm`), and define `act`, `update`,
    `state_dict` and `load_state_dict`; all else has a default.

    What changes while a run goes on is a function of the `progress` that `update` is given
    (`headrace.schedules`). What acts learns of it by buffers of the model alone (`annealed`).
    """

    config_type: ClassVar[type[Any]] = NoSettings
    """Its settings: a frozen dataclass. Each becomes a flag, and its docstring the help."""
    heads: ClassVar[str] = "policy_value"
    """Heads of the network that it needs: a name in `headrace.networks.HEADS`, to which
    `register_heads` adds."""
    network: ClassVar[str | None] = None
    """Network that "auto" stands for; None for what suits the observations."""
    on_policy: ClassVar[bool] = False
    """Whether server and learner take turns unless the user says otherwise."""
    normalizes_values: ClassVar[bool] = False
    """Whether it tells a network's `PopArtHead` of its targets."""
    averages_gradients: ClassVar[bool] = False
    """Whether it averages gradients and statistics over its `learners`: else it learns alone."""
    compiles_whole: ClassVar[bool] = False
    """Whether its `compile` makes the whole update one graph, which other learners cannot join."""
    has_two_sides: ClassVar[bool] = False
    """Whether it can `place` actor and critics apart."""
    shown: ClassVar[ShownMetrics] = ShownMetrics(panel=_LOSS, line=_LOSS[0])
    """Which of its metrics a terminal shows."""

    def __init__(self, model: nn.Module, experience: ExperienceSpec) -> None:
        """Takes the network that learns, and how the stream of steps is to be cut."""
        self.model = model
        self.experience = experience
        self.target_model: nn.Module | None = None
        """A second network of updates, compiled where `model` is."""
        self.eval_epsilon = 0.0
        """Share of random actions of the environments that play beside training."""
        self.beside: Beside = in_turn
        """Where work of an update may go on beside it; the system may put a thread there."""
        self._learners: Learners = ALONE

    @property
    def learners(self) -> Learners:
        """Who learns together; the system may set several where `averages_gradients`."""
        return self._learners

    @learners.setter
    def learners(self, learners: Learners) -> None:
        self._learners = learners

    @abstractmethod
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

    @abstractmethod
    def update(self, batch: Batch, *, progress: float) -> Update:
        """Learns from one batch. `progress` is the share of the run that is done, in [0, 1]."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything but the model's weights that a resumed run needs."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""

    def warm_up(self, batch: Batch) -> None:  # noqa: B027 - nothing is a default
        """Runs what `update` compiles and chooses kernels for, without learning from `batch`."""

    def exploration(self, num_envs: int) -> Tensor | None:
        """Epsilon [num_envs] float32 of each environment that trains; None where it has none."""
        return None

    def annealed(self, model: Any, epsilon: Tensor) -> Tensor:
        """Those [N] as they are now, by what the learner wrote into a buffer of `model`."""
        return epsilon

    def initial_priority(self, batch: Batch) -> Tensor:
        """Priorities [B] of sequences that are new in a replay, where `ReplaySpec` says so.

        The batch has `value` and `action_value` of the policy that acted, and no observations.
        """
        raise NotImplementedError(f"{type(self).__name__} says no priority of new sequences")

    def draw_apart(self, seed: int) -> None:  # noqa: B027 - nothing is a default
        """Seeds what it draws in updates: by the run's seed, in further learners by others."""

    @classmethod
    def worth_compiling(cls, config: Any, agent_steps: int) -> bool:
        """Whether a run of so many steps gains by `compile` on a CPU; on a GPU all do."""
        return False

    def compiled(self) -> Sequence[nn.Module]:
        """Returns the networks that updates call, which `compile` has compiled one by one."""
        return [net for net in (self.model, self.target_model) if net is not None]

    def compile(self, capture: Capture | None = None, *, graphs: bool = True) -> None:
        """Compiles what updates call, or without `graphs` takes that back.

        Here it is the networks, one by one. Where `compiles_whole` it is the update; on a GPU
        `capture` records it.
        """
        for network in self.compiled():
            compile_network(network, graphs=graphs)

    def place(self, actor: torch.device, critics: torch.device) -> None:
        """Moves its two sides to devices of their own.

        Raises:
            ConfigError: it has no two sides.
        """
        raise ConfigError(
            f"{type(self).__name__} has no two sides to learn apart: leave out --actor-device and "
            "--critic-device, or use --algorithm sac"
        )


def compile_network(network: nn.Module, *, graphs: bool) -> None:
    """Has calls of a network compiled, or takes that back."""
    network.compile(dynamic=False, disable=not graphs)
