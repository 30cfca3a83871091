"""The command line: which command is meant. A user's mistake is one sentence and exit code 2."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import tyro
from rich.console import Console

from headrace import STARTED_S, __version__, catalog, presets
from headrace.bench import command
from headrace.commands.evaluate import eval_command
from headrace.commands.plan import plan_command
from headrace.commands.train import train_command
from headrace.commands.tune import tune_command
from headrace.commands.worker import worker_command
from headrace.envs import atari, packages
from headrace.errors import ConfigError, DeadlineExceeded, HeadraceError
from headrace.run_files import escaped_lines

OWN_ENVIRONMENTS = {
    "catch": "a ball falls, a paddle catches it; best return 1",
    "recall": "act on a cue seen steps ago, which needs a recurrent policy; best return 1",
    "pointmass": "push a point to the middle of a plane, continuous actions; best return known",
}

USAGE = """\
usage: headrace COMMAND …

  train ENV     train an agent, such as `headrace train ALE/Pong-v5`; go on with
                one by --resume RUN
  tune ENV      find the fastest settings for this machine, for `train --config`
  worker        step environments for a run elsewhere: --connect HOST:PORT
  eval RUN      play full episodes with a trained agent, and film one
  envs          what can be trained here, and what is missing
  presets       named settings, and where their numbers come from
  plan [ENV]    what frames cost, and how many cores go with an accelerator
  bench NAME    measure this machine: end-to-end, pools, inference, learner,
                replay, wire

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
    if argv is None and command is train_command:  # who counts minutes counts our imports, too
        command = partial(train_command, started_s=STARTED_S)
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
    print(f"headrace: {escaped_lines(str(error))}", file=sys.stderr, flush=True)
    return 1


def _fail(message: str, code: int) -> None:
    print(f"headrace: {escaped_lines(message)}", file=sys.stderr)
    sys.exit(code)


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
        for what, text in (("score", preset.score), ("command", preset.command)):
            if text:
                print(f"  {what}: {text}")
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
    "tune": tune_command,
    "worker": worker_command,
    "plan": plan_command,
    "eval": eval_command,
    "envs": envs_command,
    "presets": presets_command,
    "bench": bench_command,
}
