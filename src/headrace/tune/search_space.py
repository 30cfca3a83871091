"""Which settings of a run are tuned, between which bounds, and what a choice of them means.

| parameter | when | what it may be |
|---|---|---|
| num_envs | always | a quarter to four times, or to two per core; in turns, what divides a batch |
| num_workers | worker processes step or may act | one to two per core |
| inference_batch | the server acts, and overlaps | all, a half, a quarter, an eighth of num_envs |
| compute_threads | always | one to one per core |
| compile | always | on, off |
| env_threads | threads of a native pool, the server acts | half to two per core |
| inference | server and learner overlap | server, worker |
| groups_per_worker | worker processes step, and overlap | 1 to 4 |
| precision | the hardware has bfloat16 | float32, bfloat16 |
| updates_per_call | the algorithm can take several at once | 1 to 8 |
| batch_unrolls | only if asked for | a half to four times, or, with a replay, to 16 times |

What the user has set stays as it is. Most parameters change how fast a run is and not what it
learns; those in `EFFECTS` change a little of that, and the report says so.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from headrace import catalog
from headrace.config import RunConfig, merged, takes_turns
from headrace.run.build import make_learning
from headrace.run.pools import pool_name
from headrace.tune.types import Choice, Parameter

EFFECTS = {
    "num_envs": "more environments give experience that is more alike and, without a replay, older "
    "when it is learned from; fewer the opposite",
    "inference": "workers act on their own copies of the weights, which may be an update or two "
    "older",
    "precision": "bfloat16 rounds what is computed",
    "updates_per_call": "the policy that acts is renewed after so many updates, not after each",
    "batch_unrolls": "another batch is another gradient, and may want another learning rate",
}
"""What a parameter does to learning, where it does anything."""

_HELPS = {
    "num_envs": ("environments", "server"),
    "num_workers": ("environments",),
    "inference_batch": ("environments", "server"),
    "compute_threads": ("learner", "server"),
    "compile": ("learner", "server"),
    "env_threads": ("environments",),
    "inference": ("server",),
    "groups_per_worker": ("environments",),
    "precision": ("learner", "server"),
    "updates_per_call": ("learner",),
    "batch_unrolls": ("learner",),
}
"""Stages, as `run.report.bottleneck` names them, that may gain by a parameter."""

_ENVS_PER_CORE = 2
_PARTS = (1, 2, 4, 8)  # the part of num_envs that is answered at once, as its divisor


class Facts(NamedTuple):
    """What a search space depends on besides the settings."""

    cores: int
    pool: str  # native, shm or inline: that of the environment's family, or as asked
    turns: bool  # server and learner take turns
    bfloat16: bool  # the hardware has it
    half_precision: bool  # and the run uses it
    compiled: bool
    compute_threads: int

    @classmethod
    def of(cls, config: RunConfig, *, cores: int, bfloat16: bool) -> Facts:
        """Finds out what `config` means on this machine."""
        family = catalog.environment_family(config.env)
        compute, *_ = make_learning(config, family.spec(config.env, config.environment))
        return cls(
            cores=cores,
            pool=pool_name(config, family.pool),
            turns=takes_turns(config),
            bfloat16=bfloat16,
            half_precision=compute.precision.itemsize == 2,
            compiled=compute.compiled,
            compute_threads=compute.threads,
        )


class SearchSpace:
    """The search space of one run: its parameters, and what a choice of them means as settings."""

    def __init__(
        self, config: RunConfig, facts: Facts, *, pinned: Collection[str], tune_batch: bool
    ) -> None:
        """Finds the parameters.

        Args:
            config: The defaults: a complete config.
            facts: Of config and machine.
            pinned: Names of settings that the user has set.
            tune_batch: Whether the learner's batch may change too.
        """
        self._config, self._facts, self._pinned = config, facts, frozenset(pinned)
        every = _parameters(config, facts, tune_batch=tune_batch)
        self.parameters = tuple(
            parameter._replace(helps=frozenset(_HELPS[parameter.name]))
            for parameter in every
            if parameter.name not in pinned and len(parameter.values) > 1
        )
        self._default = {one.name: one.values[one.default] for one in self.parameters}

    def key(self, choice: Choice) -> str:
        """Returns the same text for choices that are the same to the machine."""
        return json.dumps(self.settings(choice), sort_keys=True)

    def settings(self, choice: Choice) -> dict[str, Any]:
        """Returns what a choice sets otherwise than the defaults, nested as in config.toml."""
        config, cores = self._config, self._facts.cores
        changed = {name: value for name, value in choice.items() if value != self._default[name]}
        num_envs = changed.get("num_envs", config.server.num_envs)
        acting = changed.get("inference", config.inference) == "worker"
        stepping = self._facts.pool == "shm"
        server = {"num_envs": num_envs} if "num_envs" in changed else {}
        workers = {}
        if "inference_batch" in changed and not acting:
            answered = max(1, num_envs // changed["inference_batch"])
            if answered != (num_envs + 1) // 2:  # what 0 stands for
                server["inference_batch"] = answered
        if "num_workers" in changed and (acting or stepping):
            count = min(changed["num_workers"], num_envs)
            if count != min(config.workers.num_workers or cores, num_envs):
                workers["num_workers"] = count
        if "groups_per_worker" in changed and stepping and not acting:
            workers["groups_per_worker"] = changed["groups_per_worker"]
        plain = ["inference", "precision", "compile", "compute_threads"]
        if not acting:  # else it would be of each worker
            plain.append("env_threads")
        result: dict[str, Any] = {name: changed[name] for name in plain if name in changed}
        sections = {"server": server, "workers": workers}
        result |= {name: values for name, values in sections.items() if values}
        if "updates_per_call" in changed:
            result["learning"] = {"updates_per_call": changed["updates_per_call"]}
        if "batch_unrolls" in changed:
            batch = _batch_settings(config, changed["batch_unrolls"], self._pinned)
            result = merged(result, batch)
        return result

    def effects(self, choice: Choice) -> list[str]:
        """Says what a choice changes besides speed, a sentence for each parameter."""
        changed = [
            f"{name} {choice[name]}: {effect}"
            for name, effect in EFFECTS.items()
            if name in choice and choice[name] != self._default[name]
        ]
        if choice.get("compile") == "on" and self._default["compile"] != "on":
            changed.append(
                "compile on: a run begins by compiling, for half a minute or more, which trials do "
                "not count"
            )
        return changed


def laid_over(config: Any, settings: Mapping[str, Any]) -> Any:
    """Returns a config dataclass with `settings`, nested as in config.toml, in place of its own.

    Raises:
        ConfigError: they do not fit each other.
    """
    values = {
        name: laid_over(getattr(config, name), value) if isinstance(value, Mapping) else value
        for name, value in settings.items()
    }
    return dataclasses.replace(config, **values)


def _parameters(config: RunConfig, facts: Facts, *, tune_batch: bool) -> list[Parameter]:
    """Returns all parameters that apply, those that promise most first."""
    # Environments in torch are answered all at once, by the server that they live beside.
    cores, overlap = facts.cores, not facts.turns and facts.pool != "device"
    serves = config.inference == "server"
    found = [_num_envs(config, facts)]
    if facts.pool == "shm" or overlap:
        workers = config.workers.num_workers
        counts = (1, cores // 2, cores - 1, cores, cores + cores // 2, 2 * cores)
        found.append(_count("num_workers", counts, workers, instead_of=workers or cores))
    if overlap and serves and not config.server.inference_batch:
        found.append(Parameter("inference_batch", _PARTS, _PARTS.index(2)))
    threads = config.compute_threads
    counts = tuple(2**power for power in range(cores.bit_length()))
    found.append(_count("compute_threads", (*counts, cores), threads, facts.compute_threads))
    other = "off" if facts.compiled else "on"
    found.append(_switch("compile", config.compile, other))
    if facts.pool == "native":
        threads = config.env_threads
        counts = (cores // 2, cores - 1, cores, cores + 1, cores + cores // 2, 2 * cores)
        found.append(_count("env_threads", counts, threads, threads or cores))
    # What the user wants of the server cannot be had from workers.
    if overlap and not config.server.inference_batch:
        found.append(_switch("inference", config.inference, "worker" if serves else "server"))
    if facts.pool == "shm" and overlap:
        groups = config.workers.groups_per_worker
        found.append(_count("groups_per_worker", (1, 2, 3, 4), groups, groups))
    if facts.bfloat16:
        other = "float32" if facts.half_precision else "bfloat16"
        found.append(_switch("precision", config.precision, other))
    at_once = getattr(config.learning, "updates_per_call", None)
    if at_once is not None:
        found.append(_count("updates_per_call", (1, 2, 4, 8), at_once, at_once))
    if tune_batch and not facts.turns and hasattr(config.learning, "batch_unrolls"):
        batch = config.learning.batch_unrolls
        most = 16 if _replay_of(config) else 4
        sizes = tuple(batch * 2**power // 2 for power in range(most.bit_length() + 1))
        found.append(_count("batch_unrolls", sizes, batch, batch))
    return found


def _num_envs(config: RunConfig, facts: Facts) -> Parameter:
    now = config.server.num_envs
    most = max(4 * now, _ENVS_PER_CORE * facts.cores)
    counts = [now // 4, now // 2, *(now * 2**power for power in range((most // now).bit_length()))]
    if facts.turns:
        # Whole rounds of unrolls make a batch: what is learned from is of the newest weights.
        batch = getattr(config.learning, "batch_unrolls", now)
        counts = [count for count in counts if count > 0 and batch % count == 0]
    return _count("num_envs", tuple(counts), now, now)


def _count(name: str, values: tuple[int, ...], default: int, instead_of: int) -> Parameter:
    """Returns a parameter of ordered counts, `default` in the place of what it amounts to."""
    counts = sorted({count for count in values if count > 0} | {instead_of})
    index = counts.index(instead_of)
    counts[index] = default
    return Parameter(name, tuple(counts), index)


def _switch(name: str, default: str, other: str) -> Parameter:
    return Parameter(name, (default, other), 0)


def _replay_of(config: RunConfig) -> Any:
    """Returns the settings of the replay, None if the algorithm has none."""
    return getattr(config.learning, "replay", None)


def _batch_settings(config: RunConfig, batch: int, pinned: Collection[str]) -> dict[str, Any]:
    """Returns what another learner batch entails.

    With a replay an update is made for as many agent steps as before, so that only the size of the
    gradient's sample changes: sequences are then sampled more often. Without one every unroll is
    in one batch, and larger batches mean fewer updates. What the user has set stays.
    """
    learning: dict[str, Any] = {"batch_unrolls": batch}
    before, replay = config.learning.batch_unrolls, _replay_of(config)
    if replay is not None and replay.samples_per_insert and "samples_per_insert" not in pinned:
        often = replay.samples_per_insert * batch / before
        learning["replay"] = {"samples_per_insert": often}
    result: dict[str, Any] = {"learning": learning}
    queue = config.server.queue_unrolls
    if replay is None and queue and "queue_unrolls" not in pinned:
        result["server"] = {"queue_unrolls": -(-queue * batch // before)}
    return result


def is_free_running(config: RunConfig) -> bool:
    """Whether nothing holds the updates to the agent steps."""
    replay = _replay_of(config)
    return replay is not None and not replay.samples_per_insert
