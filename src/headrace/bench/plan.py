"""What frames cost: from what each stage does alone and what a core and an accelerator cost.

```
central       cores: environment, transport               accelerator: inference + learner
workers       cores: environment, inference, transport    accelerator: learner
processors    cores: environment, inference, learner      no accelerator
```
The first is SEED's cut, the second IMPALA's. Everything is time: each stage takes so many seconds
of a core, of an accelerator or of the network for one agent step. What has the least to give
limits, and the others wait for it. That is what perfect overlap would reach; `efficiency` says how
much of it runs do reach.

With more accelerators each has a server and cores of its own, and nothing is lost between them:
what an all-reduce of gradients takes is not counted. Weights that travel to workers are not either.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro

from headrace.bench.settings import check_rates
from headrace.errors import ConfigError

CORES, ACCELERATOR = "cores", "accelerator"
_SECONDS_PER_HOUR = 3600.0
_RATIOS = (0.25, 0.5, 1.0, 2.0, 4.0)  # of the balanced number of cores


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
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
    frames_per_agent_step: Annotated[float | None, tyro.conf.arg(name="action-repeat")] = None
    """Says how many environment frames make one agent step; None takes what was measured, or 1."""
    efficiency: float | None = None
    """Says which share of what the stages allow together runs reach; None takes what was measured,
    or 1."""

    def __post_init__(self) -> None:
        for name, rate in self.known().items():
            flag = "action_repeat" if name == "frames_per_agent_step" else name
            check_rates(**{f"--{flag.replace('_', '-')}": rate})
        if (self.efficiency or 0.0) > 1:
            raise ConfigError(f"efficiency must be at most 1, not {self.efficiency:g}")

    def known(self) -> dict[str, float]:
        """Returns those that are known, by name."""
        return {name: rate for name in self.__slots__ if (rate := getattr(self, name)) is not None}


class Transport(NamedTuple):
    """What travels between machines, and what that takes."""

    nbytes_per_agent_step: float  # to the server and back
    agent_steps_per_s: float  # most that one server takes
    cores: float  # that both ends kept busy with that
    gbit_per_s: float | None = None  # network of one server; None for more than enough


class Prices(NamedTuple):
    """In whatever money the user thinks."""

    per_core_hour: float
    per_accelerator_hour: float = 0.0
    per_gigabyte: float = 0.0  # 1e9 bytes through the network

    def per_hour(self, *, cores: float, accelerators: float) -> float:
        """What machines cost for an hour, idle or not."""
        return cores * self.per_core_hour + accelerators * self.per_accelerator_hour


class Arrangement(NamedTuple):
    """Seconds that each stage takes of each resource of one server for one agent step."""

    name: str
    seconds: Mapping[str, Mapping[str, float]]  # resource → stage → seconds
    accelerators: int  # of one server
    nbytes_per_agent_step: float

    def rate(self, resource: str, amount: float = 1.0) -> float:
        """Agent steps/s that so much of a resource allows."""
        return amount / sum(self.seconds[resource].values())

    def rates(self, cores: float) -> dict[str, float]:
        """Agent steps/s that each resource of a server with so many cores allows."""
        return {name: self.rate(name, cores if name == CORES else 1.0) for name in self.seconds}

    def balanced_cores(self) -> float:
        """Cores of one server at which they limit as much as all else does."""
        others = [rate for name, rate in self.rates(1.0).items() if name != CORES]
        return min(others, default=math.inf) / self.rate(CORES)


class Point(NamedTuple):
    """One arrangement with so many cores to an accelerator, and what the frames cost there."""

    arrangement: str
    cores: float  # of all servers
    accelerators: int
    agent_steps_per_s: float
    env_frames_per_s: float
    limits: str  # the stage that takes most of what there is least of
    busy: dict[str, float]  # share of time that each resource works, as far as the stages say
    cost_per_hour: float  # without the network
    cost: float
    hours: float

    @property
    def cores_per_accelerator(self) -> float | None:
        """The ratio; None without accelerators."""
        return self.cores / self.accelerators if self.accelerators else None


class Outlook(NamedTuple):
    """One arrangement over ratios."""

    arrangement: Arrangement
    points: list[Point]  # by cores
    cheapest: Point
    fastest: Point  # with the fewest cores that are as fast as any number

    @property
    def balanced_ratio(self) -> float | None:
        """Cores per accelerator at which neither waits; None without accelerators."""
        accelerators = self.arrangement.accelerators
        return self.arrangement.balanced_cores() / accelerators if accelerators else None


def arrangements(rates: Rates, transport: Transport | None, *, apart: bool) -> list[Arrangement]:
    """Returns what can be told from these rates, in the order of the module's table.

    Args:
        rates: Of the stages.
        transport: Of steps, and as much of unrolls; None if all happens on one machine.
        apart: Inference and learner of central inference have an accelerator each.

    Raises:
        ConfigError: nobody said how fast environments are, or two stages are not known.
    """
    if rates.environment_per_core is None:
        raise ConfigError(
            "no rates: name an environment to measure, or give --rates FILE, or "
            "--environment-per-core and the other stages'"
        )
    travelling, limits = _travelling(transport)
    nbytes = transport.nbytes_per_agent_step if transport else 0.0
    environments = {"environment": 1 / rates.environment_per_core}
    share = rates.samples_per_agent_step or 1.0
    found = []
    if rates.inference is not None and rates.learner is not None:
        inference, learner = {"inference": 1 / rates.inference}, {"learner": share / rates.learner}
        devices = (
            {"accelerator of inference": inference, "accelerator of learner": learner}
            if apart
            else {ACCELERATOR: inference | learner}
        )
        seconds = {CORES: environments | travelling, **devices, **limits}
        found.append(Arrangement("central", seconds, len(devices), nbytes))
    if rates.inference_per_core is not None:
        acting = environments | {"inference": 1 / rates.inference_per_core}
        if rates.learner is not None:
            learner = {"learner": share / rates.learner}
            seconds = {CORES: acting | travelling, ACCELERATOR: learner, **limits}
            found.append(Arrangement("workers", seconds, 1, nbytes))
        if rates.learner_per_core is not None:
            acting = acting | {"learner": share / rates.learner_per_core}
            found.append(Arrangement("processors", {CORES: acting}, 0, 0.0))
    if not found:
        raise ConfigError(
            "two stages are not known: give --rates, or --inference and --learner, or "
            "--inference-per-core and --learner-per-core"
        )
    return found


def _travelling(
    transport: Transport | None,
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Returns core-seconds of an agent step's way, and what else limits one server."""
    if transport is None:
        return {}, {}
    per_step_s = 1 / transport.agent_steps_per_s
    limits = {"server's connections": {"transport": per_step_s}}
    if transport.gbit_per_s is not None:
        network_s = 8 * transport.nbytes_per_agent_step / (transport.gbit_per_s * 1e9)
        limits["network"] = {"network": network_s}
    return {"transport": transport.cores * per_step_s}, limits


def point_at(
    arrangement: Arrangement,
    rates: Rates,
    prices: Prices,
    *,
    cores: float,
    servers: int,
    env_frames: float,
) -> Point:
    """Returns speed and cost of servers that have `cores` together."""
    each = arrangement.rates(cores / servers)
    least = min(each, key=each.__getitem__)
    stages = arrangement.seconds[least]
    steps_per_s = servers * each[least] * (rates.efficiency or 1.0)
    frames_per_step = rates.frames_per_agent_step or 1.0
    frames_per_s = steps_per_s * frames_per_step
    accelerators = servers * arrangement.accelerators
    gigabytes = env_frames / frames_per_step * arrangement.nbytes_per_agent_step / 1e9
    hours = env_frames / frames_per_s / _SECONDS_PER_HOUR
    cost_per_hour = prices.per_hour(cores=cores, accelerators=accelerators)
    return Point(
        arrangement.name,
        cores,
        accelerators,
        steps_per_s,
        frames_per_s,
        max(stages, key=stages.__getitem__),
        {name: steps_per_s / servers / rate for name, rate in each.items()},
        cost_per_hour,
        hours * cost_per_hour + gigabytes * prices.per_gigabyte,
        hours,
    )


def outlook(
    arrangement: Arrangement,
    rates: Rates,
    prices: Prices,
    *,
    servers: int,
    present_cores: float | None,
    env_frames: float,
) -> Outlook:
    """Returns costs around the best ratio of cores to accelerators, and at the present one."""
    balanced = arrangement.balanced_cores()
    tried = {present_cores} if present_cores else set()
    if not math.isinf(balanced):
        per_server = {max(1, math.floor(balanced * ratio)) for ratio in _RATIOS}
        tried |= {servers * cores for cores in per_server | {max(1, math.ceil(balanced))}}
    # Processors alone: twice as many cost twice as much for half the time, so any number does.
    points = [
        point_at(arrangement, rates, prices, cores=cores, servers=servers, env_frames=env_frames)
        for cores in sorted(tried or {servers})
    ]
    top = max(point.agent_steps_per_s for point in points)
    fastest = next(p for p in points if math.isclose(p.agent_steps_per_s, top, rel_tol=1e-9))
    least = min(point.cost for point in points)
    # Where accelerators cost nothing, several cost the same: then the one that takes least time.
    cheap = [point for point in points if math.isclose(point.cost, least, rel_tol=1e-9)]
    cheapest = max(cheap, key=lambda point: point.agent_steps_per_s)
    return Outlook(arrangement, points, cheapest, fastest)


def saving(outlooks: Sequence[Outlook]) -> float | None:
    """Returns the share of money that central inference saves, each cut at its own best ratio.

    None where one of the two cannot be told; negative where inference on workers is cheaper.
    """
    best = {each.arrangement.name: each.cheapest.cost for each in outlooks}
    if "central" not in best or not best.get("workers"):
        return None
    return 1 - best["central"] / best["workers"]


class MeasuredRates(NamedTuple):
    """What one run of `headrace bench end-to-end` says."""

    source: str
    task: tuple[str, ...]  # environment, learning rule, network
    cores: int
    rates: Mapping[str, float]  # names as in `Rates`


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
        of_ceiling = ("environment", "inference", "learner")
        of_run = ("samples_per_agent_step", "agent_steps_per_s", "env_frames_per_s")
        values = {name: float(ceiling[name]) for name in of_ceiling}
        values |= {name: float(result[name]) for name in (*of_run, "share_of_ceiling")}
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
    check_rates(
        **{f"{source}: {name}": value for name, value in {"cores": cores, **values}.items()}
    )
    suffix = "" if on_accelerator else "_per_core"
    rates = {
        "environment_per_core": values["environment"] / (cores if on_accelerator else 1),
        f"inference{suffix}": values["inference"],
        f"learner{suffix}": values["learner"] * values["samples_per_agent_step"],
        "samples_per_agent_step": values["samples_per_agent_step"],
        "frames_per_agent_step": values["env_frames_per_s"] / values["agent_steps_per_s"],
        # Stages alone are measured at other times: a run may come out a little above them.
        "efficiency": min(1.0, values["share_of_ceiling"]),
    }
    return MeasuredRates(source, task, cores, rates)


def together(measured: Sequence[MeasuredRates], given: Rates) -> Rates:
    """Returns the rates: what is given counts above all, then what the first one measured.

    Raises:
        ConfigError: they are of different tasks.
    """
    values = {"samples_per_agent_step": 1.0, "frames_per_agent_step": 1.0, "efficiency": 1.0}
    for each in reversed(measured):
        if each.task != measured[0].task:
            raise ConfigError(
                f"{each.source} is of {', '.join(each.task)}, but {measured[0].source} of "
                f"{', '.join(measured[0].task)}"
            )
        values |= each.rates
    return dataclasses.replace(given, **(values | given.known()))


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
            for row in read_json(path)["rows"]
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
    found = {"agent_steps_per_s": per_s, "bytes_per_s": nbytes_per_s, "cores": cores}
    check_rates(**{f"{path}: {name}": value for name, value in found.items()})
    return nbytes_per_s / per_s, per_s, cores


def read_json(path: str) -> dict[str, Any]:
    """Returns what a benchmark printed with --json into a file.

    Raises:
        ConfigError: there is no such file, or it is of something else.
    """
    try:
        result = json.loads(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: print it with --json") from error
    if not isinstance(result, dict):
        raise ConfigError(f"{path} is not what a benchmark prints with --json")
    return result
