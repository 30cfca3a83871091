"""Several gradient steps on one batch: which of its columns each takes, and what all report.

Shape suffixes: R = rows, C = columns of a batch (unrolls, or samples), M = those of a minibatch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from headrace.algorithms.base import Learners
from headrace.algorithms.optimizers import OptimizerConfig, StepSize, clipped_step
from headrace.errors import ConfigError
from headrace.ops.normalization import moments_of
from headrace.records import Batch, PolicyInput, Update
from headrace.schedules import Schedule


def check_minibatches(minibatches: int, what: str, columns: int, *, least: int) -> None:
    """Raises ConfigError if `columns`, which the settings `what` make, give no equal shares.

    Its sentence names a number that gives each share at least `least` of them.
    """
    if columns % minibatches:
        most = min(minibatches, max(1, columns // least))
        fitting = next(d for d in range(most, 0, -1) if columns % d == 0)
        raise ConfigError(
            f"minibatches={minibatches} must divide {what}={columns}: say --minibatches {fitting}"
        )


def check_kl(optimizer: OptimizerConfig, *, stop_kl: float, passes: int, flag: str) -> None:
    """Raises ConfigError if what looks at the divergence between passes sees none.

    `flag` is what sets the `passes`.
    """
    if not stop_kl >= 0:
        raise ConfigError(f"stop_kl must be 0 (never) or positive, not {stop_kl}: say --stop-kl 0")
    if passes > 1:
        return
    if optimizer.learning_rate_schedule == "kl":
        raise ConfigError(
            "learning_rate_schedule=kl looks at how far passes over a batch move the policy, and "
            f"there is one: say {flag} 2 as well"
        )
    if stop_kl:
        raise ConfigError(
            f"stop_kl={stop_kl} ends the passes over a batch, and there is one: say {flag} 2 as "
            "well"
        )


def check_end(name: str, end: float, schedule: Schedule) -> None:
    """Raises ConfigError if the end of a schedule, `final_NAME`, is no number or is never met."""
    flag = name.replace("_", "-")
    if not 0 <= end < math.inf:
        raise ConfigError(
            f"final_{name} must be finite and not negative, not {end}: say --final-{flag} 0"
        )
    if end and schedule == "constant":
        raise ConfigError(
            f"final_{name}={end} is never met without a schedule: say --{flag}-schedule linear"
        )


Step = tuple[Tensor, dict[str, Tensor]]
"""A loss and its parts, detached."""


def take_steps(
    passes: Iterable[Iterable[Step]],
    optimizer: Optimizer,
    step_size: StepSize,
    *,
    progress: float,
    max_norm: float,
    stop_kl: float,
    learners: Learners,
    after: Callable[[], None] = lambda: None,
) -> Update:
    """Takes the gradient steps of an update; metrics are means over them.

    Args:
        passes: Over a batch. A step is taken before the next loss is asked for; where there are
            several passes, the parts of a loss have `kl_divergence`, from the policy before.
        optimizer: Of what the losses are differentiated for.
        step_size: Of this update; told of the divergence that the last pass has seen.
        progress: Of the run.
        max_norm: Clip of the gradient's norm; 0 for none.
        stop_kl: No pass begins where the first loss of it says a larger divergence; 0 for never.
        learners: Who steps alike, and stops alike.
        after: Done after each step.
    """
    learning_rate = step_size.at(progress)
    steps: list[dict[str, Tensor]] = []
    taken = first = 0
    for losses in passes:
        start = len(steps)
        for total, metrics in losses:
            if stop_kl and taken and len(steps) == start:  # what the passes before have done
                moved = metrics["kl_divergence"].clone()
                learners.average([moved])
                if moved > stop_kl:
                    break
            metrics["gradient_norm"] = clipped_step(
                optimizer, total, learning_rate=learning_rate, max_norm=max_norm, learners=learners
            )
            after()
            steps.append(metrics)
        if len(steps) == start:
            break
        taken, first = taken + 1, start
    means = mean_metrics(steps)
    if "kl_divergence" in means:  # of the last pass alone, which begins where others have come to
        moved = means["kl_divergence"] = mean_metrics(steps[first:])["kl_divergence"].clone()
        if step_size.follows_kl:
            learners.average([moved])
            step_size.observe(moved, progress=progress)
    means["learning_rate"] = torch.tensor(learning_rate)
    finite = torch.isfinite(means["loss/total"] + means["gradient_norm"])
    return Update(means, finite, passes=taken)


def shuffled(generator: torch.Generator, columns: int, minibatches: int) -> tuple[Tensor, ...]:
    """Deals the columns out, drawn where they lie: as many [M] int64 as there are minibatches."""
    key_C = torch.rand(columns, device=generator.device, generator=generator)
    return key_C.argsort().view(minibatches, -1).unbind()


def load_generator(generator: torch.Generator, state: Tensor) -> None:
    """Goes on with the shuffles of a checkpoint, unless it is of another kind of device."""
    if len(state) == len(generator.get_state()):
        generator.set_state(state.cpu())


def inputs_mapped(inputs: PolicyInput, change: Callable[[Tensor], Tensor]) -> PolicyInput:
    """Applies `change` to every field [R, C, ...]."""
    mask = inputs.action_mask
    return PolicyInput(
        observation=change(inputs.observation),
        reward=change(inputs.reward),
        previous_action=change(inputs.previous_action),
        reset=change(inputs.reset),
        action_mask=None if mask is None else change(mask),
    )


def columns_of(batch: Batch, index_M: Tensor) -> Batch:
    """Returns a batch of some unrolls of one that came from no replay."""

    def chosen(field: Tensor) -> Tensor:
        return field.index_select(1, index_M)

    return Batch(
        inputs=inputs_mapped(batch.inputs, chosen),
        recurrent=tuple(part.index_select(0, index_M) for part in batch.recurrent),
        action=chosen(batch.action),
        log_prob=chosen(batch.log_prob),
        reward=chosen(batch.reward),
        terminated=chosen(batch.terminated),
        truncated=chosen(batch.truncated),
        bootstrap=chosen(batch.bootstrap),
        version=chosen(batch.version),
    )


def standardized(advantage: Tensor, learners: Learners) -> Tensor:
    """Returns advantages with mean 0 and deviation 1 over the minibatch of all learners."""
    if learners.count == 1:
        return (advantage - advantage.mean()) / (advantage.std(correction=0) + 1e-8)
    mean, variance = moments_of(advantage.double().flatten(), learners)
    return (advantage - mean.float()) / (variance.sqrt().float() + 1e-8)


def mean_metrics(steps: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Returns the mean of each metric over gradient steps."""
    if len(steps) == 1:
        return dict(steps[0])
    return {name: torch.stack([step[name] for step in steps]).mean() for name in steps[0]}
