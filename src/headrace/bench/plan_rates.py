"""Rates for `headrace plan`: from what the benchmarks printed, and from flags."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from headrace.bench.plan import Rates, check_rates
from headrace.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class GivenRates:
    """What each stage does alone, where you know it; over what files and measurements say."""

    environment_per_core: float | None = None
    """Says how many agent steps/s one core steps."""
    inference: float | None = None
    """Says how many agent steps/s one accelerator answers, doing nothing else."""
    learner: float | None = None
    """Says how many samples/s one accelerator learns from, doing nothing else."""
    inference_per_core: float | None = None
    """Says how many agent steps/s one core answers, doing nothing else."""
    learner_per_core: float | None = None
    """Says how many samples/s one core learns from, doing nothing else."""
    samples_per_agent_step: float | None = None
    """Says how many samples go through the gradient for every agent step; None takes what was
    measured, or 1."""
    action_repeat: float | None = None
    """Says how many environment frames make one agent step; None takes what was measured, or 1."""
    efficiency: float | None = None
    """Says which share of what the stages allow together runs reach; None takes what was measured,
    or 1."""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            check_rates(**{f"--{name.replace('_', '-')}": getattr(self, name)})


class MeasuredRates(NamedTuple):
    """What one run of `headrace bench end-to-end` says."""

    source: str
    task: tuple[str, ...]  # environment, learning rule, network
    cores: int
    rates: Mapping[str, float]  # names as in `Rates`


def read_measured(path: str) -> MeasuredRates:
    """Reads what `headrace bench end-to-end --json` printed.

    Raises:
        ConfigError: there is no such file, or it is of something else.
    """
    return measured_rates(_read(path), path)


def measured_rates(result: Mapping[str, Any], source: str) -> MeasuredRates:
    """Takes the rates from what `bench.end_to_end.measure` returned.

    On an accelerator the environments were measured on all cores, else each stage on one thread.

    Raises:
        ConfigError: it is of another benchmark, or holds what no rate can be, or no core stepped
            the environments.
    """
    try:
        ceiling, cores = result["ceiling"], int(result["cores"])
        on_accelerator = {"accelerator": True, "core-time": False}[ceiling["model"]]
        environment, inference, steps = (
            float(ceiling[name]) for name in ("environment", "inference", "learner")
        )
        share = float(result["samples_per_agent_step"])
        agent_steps, env_frames = (
            float(result[name]) for name in ("agent_steps_per_s", "env_frames_per_s")
        )
        reached = float(result["share_of_ceiling"])
        task = tuple(str(result[name]) for name in ("env", "algorithm", "network"))
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{source} is not what `headrace bench end-to-end --json` prints"
        ) from error
    if on_accelerator and result.get("pool") == "device":
        raise ConfigError(
            f"in {source} the accelerator stepped the environments, so no cores are to be planned: "
            "measure without --pool device"
        )
    measured = {
        f"{source}: cores": cores,
        f"{source}: environment": environment,
        f"{source}: inference": inference,
        f"{source}: learner": steps,
        f"{source}: samples_per_agent_step": share,
        f"{source}: agent_steps_per_s": agent_steps,
        f"{source}: env_frames_per_s": env_frames,
        f"{source}: share_of_ceiling": reached,
    }
    check_rates(**measured)
    suffix = "" if on_accelerator else "_per_core"
    rates = {
        "environment_per_core": environment / cores if on_accelerator else environment,
        f"inference{suffix}": inference,
        f"learner{suffix}": steps * share,
        "samples_per_agent_step": share,
        "frames_per_agent_step": env_frames / agent_steps,
        # Stages alone are measured at other times: a run may come out a little above them.
        "efficiency": min(1.0, reached),
    }
    return MeasuredRates(source, task, cores, rates)


def together(measured: Sequence[MeasuredRates], given: GivenRates) -> tuple[Rates, int | None]:
    """Returns the rates, and the cores of the first machine that was measured.

    Args:
        measured: What the first one says counts.
        given: Counts above all.

    Raises:
        ConfigError: they are of different tasks, or say nothing of environments.
    """
    values: dict[str, float] = {}
    for each in measured:
        if each.task != measured[0].task:
            raise ConfigError(
                f"{each.source} is of {', '.join(each.task)}, but {measured[0].source} of "
                f"{', '.join(measured[0].task)}"
            )
        values = {**each.rates, **values}
    flags = {
        "frames_per_agent_step" if name == "action_repeat" else name: value
        for name, value in dataclasses.asdict(given).items()
        if value is not None
    }
    values |= flags
    if "environment_per_core" not in values:
        raise ConfigError(
            "no rates: name an environment to measure, or give --rates FILE, or "
            "--environment-per-core and the other stages'"
        )
    return Rates(**values), measured[0].cores if measured else None


def read_transport(path: str) -> tuple[float, float, float | None]:
    """Returns bytes per agent step, agent steps/s, and the cores that took, if the file knows.

    The fastest row counts: what environments cost is another stage.

    Raises:
        ConfigError: there is no such file, or it is not of `bench wire` or of `bench pools` with
            the pool grpc.
    """
    try:
        rows = [
            row
            for row in _read(path)["rows"]
            if row.get("pool") == "grpc" or row.get("name") == "headrace"
        ]
        best = max(rows, key=lambda row: float(row["agent_steps_per_s"]))
        per_s, nbytes_per_s = float(best["agent_steps_per_s"]), float(best["bytes_per_s"])
        ends = [best[name] for name in ("server_cores", "host_cores") if name in best]
        cores = None if len(ends) < 2 or None in ends else float(sum(ends))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"{path} is not what `headrace bench wire --json` or `headrace bench pools --pool grpc "
            "--json` prints"
        ) from error
    check_rates(**{f"{path}: agent_steps_per_s": per_s, f"{path}: bytes_per_s": nbytes_per_s})
    check_rates(**{f"{path}: cores": cores})
    return nbytes_per_s / per_s, per_s, cores


def _read(path: str) -> dict[str, Any]:
    try:
        result = json.loads(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: print it with --json") from error
    if not isinstance(result, dict):
        raise ConfigError(f"{path} is not what a benchmark prints with --json")
    return result
