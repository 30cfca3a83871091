"""A run's settings: the parts' configs put together; TOML in and out.

Order: defaults < preset < `--config` < flags. Each layer is a nested dict of what it sets; `merged`
lays one over the other and `from_dict` checks the result, naming what is unknown.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import shlex
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, cast

import tomli_w

from headrace import catalog
from headrace.algorithms.base import Algorithm
from headrace.errors import ConfigError
from headrace.length import Length
from headrace.networks.models import NetworkConfig
from headrace.pools.settings import ClusterConfig, WorkerConfig
from headrace.server.settings import ServerConfig
from headrace.telemetry.settings import EvaluatorConfig, ViewerConfig
from headrace.transport.settings import RemoteConfig

Value = TypeVar("Value")


def setting(default: Value) -> Value:
    """A field that is None until `completed` gives it `default`, or a preset another value.

    So what was given is told apart from what was left, even where it equals the default.
    """
    return cast(Value, field(default=None, metadata={"default": default}))


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Everything that one training run is made from.

    What is not given is None, until `train` fills it as the command line does. A section is one
    that is taken as it stands, or a dict, which is laid over what would be filled in.
    """

    env: str
    """Names the environment to train in, such as ALE/Pong-v5, catch, or my_module:FAMILY."""
    algorithm: str = setting("impala")
    """Names the learning rule: impala, ppo, pqn, r2d2, sac, td3, or my_module:MyAlgorithm."""
    preset: str = setting("")
    """Names the settings that all others are laid over; `headrace presets` lists them. Empty takes
    those that are made for the environment and the algorithm, or else those for observations and
    actions like its."""
    total_frames: int = setting(1_000_000)
    """Ends the run after so many env_frames (agent steps times the action repeat)."""
    total_minutes: float | None = setting(None)
    """Ends the run, and its schedules with it, after so many minutes if total_frames did not end it
    before. They count from the command, start-up included, and on a resume with those of before;
    None sets no clock."""
    schedule_frames: int | None = setting(None)
    """Ends schedules, such as that of the learning rate, at so many env_frames. None takes the
    total_frames with which the run began: a resume that only changes total_frames keeps them."""
    schedule_minutes: float | None = setting(None)
    """Ends schedules after so many minutes if schedule_frames did not end them before. None takes
    the total_minutes with which the run began; 0 sets no clock."""
    seed: int = setting(1)
    """Seeds networks, environments and actions, from 0 to 2**64 - 1."""
    out: str = setting("")
    """Names the run directory; empty takes runs/ENV-ALGORITHM-DATE."""
    device: str = setting("auto")
    """Says where networks learn and act: cpu, cuda, cuda:N, or auto, which takes a GPU if there is
    one."""
    actor_device: str = setting("")
    """Says where the actor learns, apart from the critics and at the same time (sac). It goes with
    critic_device; both may be cpu, which takes a thread for each. Empty keeps both on `device`."""
    critic_device: str = setting("")
    """Says where the critics learn (sac). It goes with actor_device."""
    learner_devices: str = setting("")
    """Starts a learner on each of several devices, as in cuda:0,cuda:1 or cpu,cpu; all takes every
    GPU. Each is a process with its own server and its share of the environments and of the batch;
    they share gradients. Empty starts one learner on `device`."""
    inference_devices: str = setting("")
    """Says where the servers act, one device or one for each learner; empty takes those where they
    learn."""
    precision: Literal["auto", "float32", "bfloat16"] = setting("auto")
    """Sets the arithmetic of the networks' torsos; auto takes bfloat16 where the hardware has it,
    else float32."""
    compile: Literal["auto", "on", "off"] = setting("auto")
    """Compiles networks, or whole updates (sac), with torch.compile. auto is on for a GPU, on a CPU
    only for whole updates of runs that are long enough, and goes on uncompiled where compiling
    fails; on ends the run there."""
    pool: Literal["auto", "inline", "shm", "grpc", "device"] = setting("auto")
    """Says where environments step: in worker processes (shm), in the server's own thread (inline),
    on worker hosts (grpc; `listen` chooses it), or beside the policy if they are written in torch
    (device). auto takes what suits the environment, and inline with `lockstep`."""
    inference: Literal["server", "worker"] = setting("server")
    """Says where the policy acts: in one server for all environments, or in each worker on its own
    copy of the weights (IMPALA)."""
    max_policy_lag: int | None = setting(None)
    """Drops and counts unrolls that are learned from more than so many updates after their weights
    were made. None sets no bound but that of the queue."""
    turns: Literal["auto", "on", "off"] = setting("auto")
    """Says whether server and learner take turns (on), with all environments answered at once,
    which is on-policy but for the one row that two unrolls share; or overlap (off). auto does as
    the algorithm wants it."""
    lockstep: bool = setting(False)
    """Keeps everything in one order, bit-identical for one seed; for tests and debugging."""
    compute_threads: int = setting(0)
    """Gives each compute stage (server, learner) so many threads; 0 fits them to the cores."""
    env_threads: int = setting(0)
    """Gives a native pool so many threads; 0 takes one per core."""
    log_interval_s: float = setting(2.0)
    """Writes to metrics.jsonl, TensorBoard and the terminal every so many seconds."""
    checkpoint_interval_s: float = setting(300.0)
    """Saves a checkpoint every so many seconds; one is always saved at the end."""
    keep_checkpoints: int = setting(3)
    """Keeps so many of the newest checkpoints; 0 keeps all."""
    tensorboard: bool = setting(True)
    """Writes curves for TensorBoard."""
    wandb: str = setting("")
    """Sends curves to this project at Weights & Biases; empty sends none. WANDB_MODE=offline keeps
    them here."""
    workers: WorkerConfig = setting(WorkerConfig())
    """Worker processes."""
    remote: RemoteConfig = setting(RemoteConfig())
    """Worker hosts on other machines."""
    cluster: ClusterConfig = setting(ClusterConfig())
    """What Ray places."""
    server: ServerConfig = setting(ServerConfig())
    """How many environments, and how they are batched."""
    network: NetworkConfig = setting(NetworkConfig())
    """The policy."""
    evaluator: EvaluatorConfig = setting(EvaluatorConfig())
    """Judging the agent beside training."""
    viewer: ViewerConfig = setting(ViewerConfig())
    """Watching the agent beside training."""
    environment: Any = None
    """Settings of the environment's family (its `config_type`); None for its defaults."""
    learning: Any = None
    """Settings of the algorithm (its `config_type`); None for its defaults."""

    def __post_init__(self) -> None:
        for name in (
            "total_frames",
            "schedule_frames",
            "log_interval_s",
            "checkpoint_interval_s",
        ):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"{name} must be positive, not {value}")
        self._check_minutes()
        for one in _settings(self):
            if isinstance(one.value, float) and math.isnan(one.value):
                name = ".".join(one.path)
                raise ConfigError(f"{name} must be a number, not nan: leave it out")
        if min(self.compute_threads or 0, self.env_threads or 0, self.keep_checkpoints or 0) < 0:
            raise ConfigError(
                "compute_threads, env_threads and keep_checkpoints must not be negative"
            )
        if not 0 <= (self.seed or 0) < 1 << 64:
            raise ConfigError(f"seed must be from 0 to 2**64 - 1, not {self.seed}: say --seed 1")
        if bool(self.actor_device) != bool(self.critic_device):
            raise ConfigError("actor_device and critic_device go together: give both, or neither")
        if self.max_policy_lag is not None and self.max_policy_lag < 0:
            raise ConfigError(f"max_policy_lag must be at least 0, not {self.max_policy_lag}")
        if self.inference == "worker" and (self.lockstep or self.turns == "on"):
            raise ConfigError(
                "workers that act on their own have no common order: leave out "
                f"{'--lockstep' if self.lockstep else '--turns on'}, or say --inference server"
            )
        server, evaluator = self.server, self.evaluator
        if (
            self.inference == "worker"
            and isinstance(server, ServerConfig)
            and server.inference_batch
        ):
            raise ConfigError(
                "inference_batch is the server's: leave it out, or --inference server"
            )
        are_whole = isinstance(server, ServerConfig) and isinstance(evaluator, EvaluatorConfig)
        if are_whole and evaluator.evaluator and server.eval_envs:
            raise ConfigError(
                "--evaluator and --eval-envs judge the same agent under the same names: leave out "
                "--eval-envs, or --evaluator"
            )

    @property
    def length(self) -> Length:
        """Where the run ends."""
        return Length(self.total_frames, self.total_minutes)

    @property
    def horizon(self) -> Length:
        """Where its schedules end."""
        minutes = self.schedule_minutes
        return Length(
            self.schedule_frames or self.total_frames,
            self.total_minutes if minutes is None else minutes or None,
        )

    def _check_minutes(self) -> None:
        if not 0.0 <= (self.schedule_minutes or 0.0) < math.inf:
            raise ConfigError(
                f"schedule_minutes must be 0 (no clock) or positive, not {self.schedule_minutes}"
            )
        if self.lockstep and self.schedule_minutes:
            raise ConfigError(
                "--lockstep gives the same run each time, and a clock does not: leave out "
                "--schedule-minutes, or --lockstep"
            )
        minutes = self.total_minutes
        if minutes is None:
            return
        if not 0.0 < minutes < math.inf:
            raise ConfigError(
                f"total_minutes must be positive and finite, not {minutes}: say "
                "--total-minutes 8, or leave it out"
            )
        if self.lockstep:
            raise ConfigError(
                "--lockstep gives the same run each time, and a clock does not: leave out "
                "--total-minutes, or --lockstep"
            )


DEFAULT_ALGORITHM: str = RunConfig.__dataclass_fields__["algorithm"].metadata["default"]

FREE_ON_RESUME = frozenset(
    {
        *(
            "total_frames",
            "total_minutes",
            "schedule_frames",
            "schedule_minutes",
            "device",
            "actor_device",
            "critic_device",
            "precision",
            "compile",
        ),
        *("compute_threads", "env_threads"),
        *("log_interval_s", "checkpoint_interval_s", "keep_checkpoints", "tensorboard"),
        *("wandb", "workers", "remote", "cluster", "evaluator", "viewer"),
        *("learner_devices", "inference_devices"),
        *(f"learning.replay.{name}" for name in ("replay_place", "replay_folder", "save_replay")),
    }
)
"""Settings that a resumed run may change; every other one is the run's."""

REACHING_OUT = frozenset({"wandb", "remote", "cluster", "learning.replay.replay_folder"})
"""Settings that open ports, connect to other machines, or name files outside the run's folder.

A run that somebody else made may ask for them too, so whoever goes on with one types them again."""

_STAYING_IN = frozenset(
    {
        *(f"cluster.{name}" for name in ("cluster_hosts", "host_cpus")),
        *(f"remote.{name}" for name in ("envs_per_message", "max_hosts", "max_envs_per_host")),
        *(f"remote.{name}_timeout_s" for name in ("hello", "host", "no_host")),
        "remote.message_compression",
    }
)
"""Settings in those sections that matter only once one of the others is set."""


def algorithm_class(name: str, *, trust_code: bool = True) -> type[Algorithm]:
    """Returns the class of an algorithm: of the catalog, or a user's "my_module:MyAlgorithm".

    Raises:
        ConfigError: there is none, it is code that is not trusted, or it is no `Algorithm`.
    """
    found = catalog.resolve("algorithm", catalog.ALGORITHMS, name, trust_code=trust_code)
    if not (isinstance(found, type) and issubclass(found, Algorithm)):
        raise ConfigError(
            f"algorithm {name!r} is no headrace.Algorithm: let it be a class that derives from that"
        )
    if inspect.isabstract(found):
        lacking = ", ".join(sorted(found.__abstractmethods__))
        raise ConfigError(f"algorithm {name!r} does not define {lacking}: see headrace.Algorithm")
    return found


def section_types(env: str, algorithm: str, *, trust_code: bool = True) -> dict[str, type[Any]]:
    """Returns the config types of the two sections that depend on what was chosen."""
    family = catalog.environment_family(env, trust_code=trust_code)
    rule = algorithm_class(algorithm, trust_code=trust_code)
    return {"environment": family.config_type, "learning": rule.config_type}


def completed(config: RunConfig, *, trust_code: bool = True) -> RunConfig:
    """Returns `config` with everything that is None filled by its default, and by no preset.

    Raises:
        ConfigError: a section has the type of another environment or algorithm.
    """
    filled = {
        entry.name: entry.metadata["default"]
        for entry in dataclasses.fields(config)
        if "default" in entry.metadata and getattr(config, entry.name) is None
    }
    algorithm = filled.get("algorithm", config.algorithm)
    for name, kind in section_types(config.env, algorithm, trust_code=trust_code).items():
        value = getattr(config, name)
        if value is not None and not isinstance(value, kind):
            raise ConfigError(f"{name} must be a {kind.__name__}, not a {type(value).__name__}")
        filled[name] = kind() if value is None else value
    return dataclasses.replace(config, **filled)


def takes_turns(config: RunConfig) -> bool:
    """Whether server and learner take turns in one thread, every environment answered at once."""
    if config.turns == "auto" and config.inference == "server":
        return config.lockstep or algorithm_class(config.algorithm).on_policy
    return config.lockstep or config.turns == "on"


def from_dict(values: Mapping[str, Any], *, trust_code: bool = True) -> RunConfig:
    """Builds a complete config from nested values, as TOML gives them.

    Raises:
        ConfigError: names the key that is unknown, or whose value has the wrong type.
    """
    if "env" not in values:
        raise ConfigError("no environment: name it first, as in `headrace train ALE/Pong-v5`")
    known = {"algorithm": DEFAULT_ALGORITHM, **values}
    for name in ("env", "algorithm"):
        _checked(str, known[name], name)
    if not trust_code:
        for kind, name in foreign_code(values):
            raise catalog.not_trusted(kind, name)
    sections = section_types(known["env"], known["algorithm"], trust_code=trust_code)
    config = _build(RunConfig, values, "", sections)
    return completed(cast(RunConfig, config), trust_code=trust_code)


def section(kind: type[Value], values: Any, name: str) -> Value:
    """Builds the section `name` from plain values; one that is built already stays as it is.

    Raises:
        ConfigError: it is a section of another kind, or names the key that is wrong.
    """
    if isinstance(values, kind):
        return values
    if not isinstance(values, Mapping):
        raise ConfigError(
            f"{name} must be a {kind.__name__} or a dict of its settings, not {values!r}"
        )
    return cast(Value, _build(kind, values, f"{name}.", {}))


def leaf_paths(env: str, algorithm: str) -> dict[str, tuple[str, ...]]:
    """Returns where each setting lies that has a flag: its own name, and those of its sections.

    A section that has a setting of its own name, such as network, is found by that name too.
    """
    paths: dict[str, tuple[str, ...]] = {}

    def walk(kind: type[Any], sections: Mapping[str, type[Any]], path: tuple[str, ...]) -> None:
        hints = typing.get_type_hints(kind)
        for entry in dataclasses.fields(kind):
            hint = sections.get(entry.name, hints[entry.name])
            if dataclasses.is_dataclass(hint):
                walk(cast(type[Any], hint), {}, (*path, entry.name))
            else:
                paths[entry.name] = (*path, entry.name)

    walk(RunConfig, section_types(env, algorithm), ())
    return paths


def foreign_code(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields what nested values name from outside headrace: its kind and its name."""
    network = values.get("network")
    named = (
        ("environment", catalog.ENVIRONMENTS, values.get("env")),
        ("algorithm", catalog.ALGORITHMS, values.get("algorithm")),
        (
            "network",
            catalog.NETWORKS,
            network.get("network") if isinstance(network, Mapping) else None,
        ),
    )
    for kind, table, name in named:
        if isinstance(name, str) and catalog.is_foreign(table, name):
            yield kind, name


def ensure_typed(config: RunConfig, changes: Mapping[str, Any]) -> None:
    """Refuses what a run's own settings would reach out for; see `REACHING_OUT`.

    Args:
        config: The settings of a run that goes on.
        changes: Those of them that were typed for it, nested.

    Raises:
        ConfigError: shows what the run asks for, and what to type.
    """
    asked = [one for one in _asked(config) if not _is_in(one.path, changes)]
    if not asked:
        return
    typed: dict[str, Any] = {}
    for one in asked:
        typed = merged(typed, nested(one.path, one.value))
    again = " ".join(_flag(one.path[-1], one.value) for one in asked)
    without = " ".join(_flag(one.path[-1], one.default) for one in asked)
    raise ConfigError(
        f"this run asks for {again}, which reaches out of its folder or this machine: type that "
        f"again to have it, or {without} to go on without it (in Python, changes={typed})"
    )


def flags_again(config: RunConfig) -> list[str]:
    """Returns what must be typed to go on with a run as it is; see `ensure_typed`."""
    return [_flag(one.path[-1], one.value) for one in _asked(config)]


def reaches_out(name: str) -> bool:
    """Whether the setting of a dotted name reaches out of the run's folder and this machine."""
    outward = any(name == other or name.startswith(f"{other}.") for other in REACHING_OUT)
    return outward and name not in _STAYING_IN


class _Setting(NamedTuple):
    path: tuple[str, ...]
    value: Any
    default: Any


def _asked(config: RunConfig) -> list[_Setting]:
    """Returns the settings that reach out, and say so: those that are not as they are unasked."""
    return [
        one
        for one in _settings(config)
        if one.value != one.default and reaches_out(".".join(one.path))
    ]


def _settings(section: Any, path: tuple[str, ...] = ()) -> Iterator[_Setting]:
    for entry in dataclasses.fields(section):
        value = getattr(section, entry.name)
        if dataclasses.is_dataclass(value):
            yield from _settings(value, (*path, entry.name))
        else:
            default = entry.metadata.get("default", entry.default)
            yield _Setting((*path, entry.name), value, default)


def _is_in(path: Sequence[str], values: Any) -> bool:
    """Whether nested values have one at `path`."""
    for part in path:
        if not isinstance(values, Mapping) or part not in values:
            return False
        values = values[part]
    return True


def _flag(name: str, value: Any) -> str:
    """Returns the words that give a setting its value on the command line."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    text = str(value)
    return f"--{flag} {shlex.quote(text if text.isprintable() else ascii(text))}"


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Returns nested plain values; settings that are None are left out, since TOML has no null."""
    return cast(dict[str, Any], _without_none(dataclasses.asdict(config)))


def to_toml(config: RunConfig) -> str:
    """Returns the text of config.toml."""
    return tomli_w.dumps(to_dict(config))


def read_toml(path: Path) -> dict[str, Any]:
    """Reads nested values from a TOML file.

    Raises:
        ConfigError: the file is missing or is not TOML.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    return parse_toml(data, path)


def parse_toml(data: bytes, path: Path) -> dict[str, Any]:
    """Returns the nested values of a TOML file, which has been read.

    Raises:
        ConfigError: it is not TOML.
    """
    try:
        values = tomllib.loads(data.decode())
        repr(values)  # as a refusal of one may show it: dotted keys are parsed at any depth
    except ValueError as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{path} is nested too deeply: no settings are") from error
    return values


def of_a_run(values: dict[str, Any]) -> dict[str, Any]:
    """Returns settings from the config.toml of a run, which acts on as it did.

    It holds every setting, so one that it lacks is younger than the run.
    """
    network = values.get("network")
    if not isinstance(network, Mapping) or "pictures" in network:
        return values
    return merged(values, {"network": {"pictures": "bytes"}})


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `base` with the values of `over` laid on top, section by section."""
    result = dict(base)
    for key, value in over.items():
        below = result.get(key)
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            result[key] = merged(below, value)
        else:
            result[key] = value
    return result


def nested(path: Sequence[str], value: Any) -> Any:
    """Returns `value` at `path` of nested values."""
    for part in reversed(path):
        value = {part: value}
    return value


def _build(
    kind: type[Any], values: Mapping[str, Any], where: str, sections: Mapping[str, type[Any]]
) -> Any:
    hints = typing.get_type_hints(kind)
    names = {entry.name for entry in dataclasses.fields(kind)}
    arguments = {}
    for key, value in values.items():
        if key not in names:
            raise ConfigError(f"no setting named {where}{key}; {catalog.nearest(key, names)}")
        hint = sections.get(key, hints[key])
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{where}{key} must be a section of settings, not {value!r}")
            arguments[key] = _build(cast(type[Any], hint), value, f"{where}{key}.", {})
        else:
            arguments[key] = _checked(hint, value, f"{where}{key}")
    return kind(**arguments)


def _checked(hint: Any, value: Any, where: str) -> Any:
    """Returns `value` if it fits `hint`; an int does where a float is wanted."""
    origin = typing.get_origin(hint)
    if origin is Literal:
        if value not in typing.get_args(hint):
            choices = ", ".join(map(str, typing.get_args(hint)))
            raise ConfigError(f"{where} must be one of {choices}, not {value!r}")
        return value
    if origin in (typing.Union, types.UnionType):
        options = [option for option in typing.get_args(hint) if option is not type(None)]
        return value if value is None else _checked(options[0], value, where)
    if origin is tuple:
        item = typing.get_args(hint)[0]
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where} must be a list of {item.__name__}, not {value!r}")
        return tuple(_checked(item, part, where) for part in value)
    if hint in (int, float) and isinstance(value, int) and value.bit_length() > 128:
        raise ConfigError(f"{where} is too large a number")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(f"{where} must be a {hint.__name__}, not {value!r}")
    return value


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return list(value) if isinstance(value, tuple) else value
