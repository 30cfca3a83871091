"""The command line: parse, then call `run`. A user's mistake is one sentence and exit code 2."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from headrace import __version__, catalog, presets
from headrace.bench import command
from headrace.config import RunConfig, from_dict, merged, read_toml
from headrace.envs import atari, packages
from headrace.errors import ConfigError, DeadlineExceeded, HeadraceError
from headrace.run import api
from headrace.run.evaluate import evaluate
from headrace.run.film import film
from headrace.run.local import Hooks
from headrace.run.policy import load
from headrace.telemetry.record import RunDirectory
from headrace.telemetry.terminal import open_display

OWN_ENVIRONMENTS = {
    "catch": "a ball falls, a paddle catches it; best return 1",
    "recall": "act on a cue seen steps ago, which needs a recurrent policy; best return 1",
    "pointmass": "push a point to the middle of a plane, continuous actions; best return known",
}

USAGE = """\
usage: headrace COMMAND …

  train ENV     train an agent, such as `headrace train ALE/Pong-v5`; --resume RUN goes on with one
  eval RUN      play full episodes with a trained agent, and film one
  envs          what can be trained here, and what is missing
  presets       named settings, and where their numbers come from
  bench NAME    measure this machine: end-to-end, pools, inference, learner, replay

`headrace COMMAND --help` explains a command."""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command; ends the process with 0, 1 (a run failed) or 2 (a mistake of the user)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return
    if arguments[0] == "--version":
        print(f"headrace {__version__}")
        return
    command = COMMANDS.get(arguments[0])
    # As `python` itself does for a script: my_module of this folder is found.
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        if command is None:
            raise ConfigError(
                f"no command {arguments[0]!r}; {catalog.nearest(arguments[0], COMMANDS)}"
            )
        command(arguments[1:])
    except ConfigError as error:
        _fail(str(error), 2)
    except KeyboardInterrupt:
        _fail("stopped", 130)
    except (HeadraceError, OSError) as error:
        code = _fail_code(error)
        if isinstance(error, DeadlineExceeded):
            # The thread that hangs in native code would keep the interpreter from ending.
            os._exit(code)
        sys.exit(code)


def _fail_code(error: Exception) -> int:
    print(f"headrace: {error}", file=sys.stderr, flush=True)
    return 1


def _fail(message: str, code: int) -> None:
    print(f"headrace: {message}", file=sys.stderr)
    sys.exit(code)


def train_command(argv: list[str]) -> None:
    """Trains an agent."""
    chosen, rest = _first_pass(argv)
    if chosen.resume:
        _resume(chosen, rest)
        return
    layers: dict[str, Any] = {}
    file = read_toml(Path(chosen.config)) if chosen.config else {}
    env = chosen.env or file.get("env")
    wants_help = "-h" in rest or "--help" in rest
    if not env and wants_help:
        env = "ALE/Pong-v5"
    algorithm = chosen.algorithm or file.get("algorithm")
    name = chosen.preset
    if not name and isinstance(env, str):
        name = presets.default_for(env, algorithm)
    if name:
        own = presets.find(name).values
        if algorithm and own.get("algorithm", algorithm) != algorithm:
            raise ConfigError(
                f"preset {name} is for {own['algorithm']}, not {algorithm}: leave out one of "
                "--preset and --algorithm"
            )
        layers = merged(layers, own)
    layers = merged(layers, file)
    layers = merged(
        layers,
        {key: value for key, value in (("env", env), ("algorithm", chosen.algorithm)) if value},
    )
    base = from_dict(layers)
    if not (name or chosen.config or wants_help):
        print(
            f"no preset is made for {env} with {base.algorithm}: what you do not set is a plain "
            "default; mind --total-frames, and --reward-transform, which may clip",
            file=sys.stderr,
        )
    config = _parse_flags(base, rest, prog="headrace train ENV")
    _train(config=config)


def _first_pass(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Reads what decides which other settings there are."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for flag in ("--algorithm", "--preset", "--config", "--resume"):
        parser.add_argument(flag)
    parser.add_argument("--trust-code", action="store_true")
    try:
        chosen, rest = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise ConfigError(f"{error}: see `headrace train --help`") from error
    # The one word that is no flag comes before all flags that only the second pass knows.
    chosen.env = rest.pop(0) if rest and not rest[0].startswith("-") else None
    return chosen, rest


TRAIN_HELP = """Trains an agent and leaves everything in a run directory.

    headrace train ENV [--preset NAME] [--config FILE] [--algorithm NAME] [settings]
    headrace train --resume RUN [--total-frames N …]

Order: defaults < preset < --config (TOML) < flags. `headrace presets` lists presets; the
values below are those of the preset that ENV takes unasked. Ctrl-C saves and ends; a second one
ends at once."""


def _parse_flags(base: RunConfig, argv: list[str], *, prog: str) -> RunConfig:
    """Lays flags over `base`; every setting is a flag, named as its field."""
    config: RunConfig = tyro.cli(
        tyro.conf.OmitArgPrefixes[RunConfig],
        args=_whole_numbers(argv),
        default=base,
        prog=prog,
        description=TRAIN_HELP,
    )
    if (config.env, config.algorithm) != (base.env, base.algorithm):
        raise ConfigError("name the environment first: headrace train ENV [settings]")
    return config


def _whole_numbers(argv: list[str]) -> list[str]:
    """Turns --total-frames 1e7 and 10_000_000 into digits; frames are counted in millions."""
    words = [part for word in argv for part in _split_total_frames(word)]
    for index in range(1, len(words)):
        if words[index - 1] == "--total-frames":
            try:
                words[index] = str(int(float(words[index].replace("_", ""))))
            except (ValueError, OverflowError) as error:
                raise ConfigError(
                    f"--total-frames must be a number such as 2e7, not {words[index]!r}"
                ) from error
    return words


def _split_total_frames(word: str) -> list[str]:
    flag, equals, value = word.partition("=")
    if flag not in ("--total-frames", "--total_frames"):
        return [word]
    return ["--total-frames", value] if equals else ["--total-frames"]


def _resume(chosen: argparse.Namespace, rest: list[str]) -> None:
    named = [f"--{key}" for key in ("algorithm", "preset", "config") if getattr(chosen, key)]
    if chosen.env or named:
        raise ConfigError(
            f"{chosen.env or named[0]} cannot go with --resume: a resumed run keeps its settings"
        )
    run = RunDirectory.open(Path(chosen.resume))
    base = api.resumed_config(run, {}, trust_code=chosen.trust_code)
    config = _parse_flags(base, rest, prog="headrace train --resume RUN")
    changes = _difference(dataclasses.asdict(base), dataclasses.asdict(config))
    _train(resume=chosen.resume, changes=changes, trust_code=chosen.trust_code)


def _difference(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Returns what `after` sets otherwise, nested as both are."""
    changes: dict[str, Any] = {}
    for key, value in after.items():
        if isinstance(value, dict):
            nested = _difference(before.get(key, {}), value)
            changes |= {key: nested} if nested else {}
        elif value != before.get(key):
            changes[key] = value
    return changes


def _train(**arguments: Any) -> None:
    prepared = api.prepare(**arguments)
    config, path = prepared.config, prepared.directory.path
    title = f"{config.env} · {config.algorithm} · {path}"
    with open_display(config.total_frames, title) as display:
        hooks = Hooks(
            on_row=display.update,
            on_update=lambda *_: None,
            on_checkpoint=lambda _: None,
            on_message=display.message,
        )
        result = api.start(prepared, hooks)
    end, more = ("done", " --total-frames MORE") if result.finished else ("stopped and saved", "")
    print(f"{end}; go on with: headrace train --resume {result.run}{more}")
    print(f"evaluate and film: headrace eval {result.run} --video agent.mp4")
    print(f"curves: tensorboard --logdir {result.run}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalArguments:
    """Plays full episodes with a trained agent, on the same code that trained it."""

    run: Annotated[str, tyro.conf.Positional]
    """Run directory."""
    episodes: int = 20
    """Full episodes to play."""
    mode: Literal["greedy", "sample", "epsilon"] = "greedy"
    """The likeliest action, a draw from the policy, or greedy but for a share of random actions."""
    epsilon: float = 0.001
    """That share, for --mode epsilon; where Q-values act, sample is the same."""
    seed: int | None = None
    """Of the environments; None for one derived from the run's."""
    video: str | None = None
    """Film one more episode into this .mp4 file."""
    json: bool = False
    """Print one JSON object and nothing else."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    trust_code: bool = False
    """Import code that the run names from outside headrace. Read it first."""


def eval_command(argv: list[str]) -> None:
    """Evaluates an agent."""
    arguments = tyro.cli(EvalArguments, args=argv, prog="headrace eval")

    if not 0 <= arguments.epsilon <= 1:
        raise ConfigError(f"epsilon must be in [0, 1], not {arguments.epsilon}")
    if arguments.video and not arguments.video.endswith(".mp4"):
        raise ConfigError(f"--video must name an .mp4 file, not {arguments.video!r}")
    policy = load(arguments.run, trust_code=arguments.trust_code, device=arguments.device)
    filmed: dict[str, Any] = {}
    if arguments.video:  # first, so that a path that cannot be written costs no episodes
        path = Path(arguments.video)
        value = film(policy, path, mode=arguments.mode, epsilon=arguments.epsilon)
        filmed = {"video": arguments.video, "video_return": value}
    result = evaluate(
        policy,
        episodes=arguments.episodes,
        mode=arguments.mode,
        epsilon=arguments.epsilon,
        seed=arguments.seed,
    )
    summary = {
        "run": arguments.run,
        "env": policy.spec.name,
        "agent_steps": policy.agent_steps,
        "mode": arguments.mode,
        **result.summary(),
        **filmed,
    }
    if arguments.json:
        print(json.dumps(summary))
        return
    table = Table(title=f"{policy.spec.name}, {arguments.mode}, {policy.agent_steps:,} agent steps")
    table.add_column("")
    table.add_column("", justify="right")
    for key, value in summary.items():
        if key not in ("run", "env", "agent_steps", "mode"):
            table.add_row(key.replace("_", " "), _cell(value))
    Console().print(table)


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return " to ".join(_cell(item) for item in value)
    return (
        f"{value:,.2f}" if isinstance(value, float) else str("unknown" if value is None else value)
    )


def envs_command(argv: list[str]) -> None:
    """Lists environments."""
    tyro.cli(
        _nothing, args=argv, prog="headrace envs", description="Lists what can be trained here."
    )

    for name, what in OWN_ENVIRONMENTS.items():
        print(f"{name:<18}{what}")
    rows = packages.available()
    width = max(len(example) for _, example, _ in rows)
    print("\nPackages of environments, each with an example of what to train:")
    for name, example, state in rows:
        print(f"  {name:<18}{example:<{width}}  {state}")
    print("Any other Gymnasium environment: its id, or my_module:factory.")
    try:
        games = atari.games()
    except ConfigError:
        return
    print(f"\n{len(games)} Atari games:")
    Console().print("  ".join(games), highlight=False)


def presets_command(argv: list[str]) -> None:
    """Lists presets."""
    tyro.cli(_nothing, args=argv, prog="headrace presets", description="Lists named settings.")
    for name, preset in presets.PRESETS.items():
        print(f"{name}\n  {preset.summary}\n  source: {preset.source}")
        for line in _flat(preset.values):
            print(f"    {line}")


def _flat(values: dict[str, Any], prefix: str = "") -> list[str]:
    lines: list[str] = []
    for key, value in values.items():
        lines += (
            _flat(value, f"{prefix}{key}.")
            if isinstance(value, dict)
            else [f"{prefix}{key} = {value}"]
        )
    return lines


def _nothing() -> None:
    """Takes no arguments."""


def bench_command(argv: list[str]) -> None:
    """Measures this machine."""
    command.run(argv)


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "train": train_command,
    "eval": eval_command,
    "envs": envs_command,
    "presets": presets_command,
    "bench": bench_command,
}
