"""The command line: which command is meant. A user's mistake is one sentence and exit code 2.

A command's module is imported when the command runs: help, the version and a typo answer at once.
"""

from __future__ import annotations

import importlib
import os
import select
import sys
import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from headrace import STARTED_S, __version__, catalog
from headrace.errors import ConfigError, DeadlineExceeded, HeadraceError
from headrace.run_files import escaped_lines


class Command(NamedTuple):
    """One command, as the list of them shows it."""

    target: str  # "module:function", which takes the arguments that follow
    argument: str
    summary: str


COMMANDS = {
    "train": Command(
        "headrace.commands.train:train_command",
        "ENV",
        "train an agent, such as `headrace train ALE/Pong-v5`; go on with one by --resume RUN",
    ),
    "tune": Command(
        "headrace.commands.tune:tune_command",
        "ENV",
        "find the fastest settings for this machine, for `train --config`",
    ),
    "worker": Command(
        "headrace.commands.worker:worker_command",
        "",
        "step environments for a run elsewhere: --connect HOST:PORT",
    ),
    "eval": Command(
        "headrace.commands.evaluate:eval_command",
        "RUN",
        "play full episodes with a trained agent, and film one",
    ),
    "envs": Command(
        "headrace.commands.envs:envs_command",
        "",
        "what can be trained here, and what is missing",
    ),
    "presets": Command(
        "headrace.commands.presets:presets_command",
        "",
        "named settings, and where their numbers come from",
    ),
    "plan": Command(
        "headrace.commands.plan:plan_command",
        "[ENV]",
        "what frames cost, and how many cores go with an accelerator",
    ),
    "bench": Command(
        "headrace.bench.command:run",
        "NAME",
        "measure this machine: end-to-end, pools, inference, learner, replay, wire",
    ),
}


_STDOUT = 1
_UNREAD = 141  # as shells say of a program that SIGPIPE has ended


def usage() -> str:
    """Returns the list of commands, at most 80 columns wide."""
    lines = [
        textwrap.fill(
            command.summary,
            width=80,
            initial_indent=f"  {f'{name} {command.argument}':<14}",
            subsequent_indent=" " * 16,
            break_on_hyphens=False,
        )
        for name, command in COMMANDS.items()
    ]
    commands = "\n".join(lines)
    return (
        f"usage: headrace COMMAND …\n\n{commands}\n\n`headrace COMMAND --help` explains a command."
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command; ends the process with 0, 1 (a run failed) or 2 (a mistake of the user).

    Where nobody reads its output any more, as in `headrace presets | head -1`, it ends without a
    word, and as a shell says of other programs: with 141.
    """
    try:
        try:
            _run(argv)
        finally:
            if sys.stdout is not None:  # which it is where it was closed before we began
                sys.stdout.flush()
    except OSError as error:  # nothing else gets here than what cannot be printed
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), _STDOUT
        )  # else Python would try again, and say so
        if isinstance(error, BrokenPipeError):
            sys.exit(_UNREAD)
        sys.exit(_fail_code(error))


def _run(argv: Sequence[str] | None) -> None:
    """Runs one command, and says what went wrong.

    Raises:
        BrokenPipeError: nobody reads what it prints.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return
    if arguments[0] == "--version":
        print(f"headrace {__version__}")
        return
    try:
        command = _command(arguments[0])
        if argv is None and arguments[0] == "train":
            # Who counts minutes counts our imports, too.
            command = partial(command, started_s=STARTED_S)
        command(arguments[1:])
    except ConfigError as error:
        _fail(str(error), 2)
    except KeyboardInterrupt:
        _fail("stopped", 130)
    except SystemExit as ended:
        if isinstance(ended.__context__, BrokenPipeError):  # rich's own way out
            sys.exit(_UNREAD)
        raise
    except (HeadraceError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _is_unread():
            raise
        code = _fail_code(error)
        if isinstance(error, DeadlineExceeded):
            # The thread that hangs in native code would keep the interpreter from ending.
            os._exit(code)
        sys.exit(code)


def _command(name: str) -> Callable[..., None]:
    """Imports a command."""
    if name not in COMMANDS:
        raise ConfigError(f"no command {name!r}; {catalog.nearest(name, COMMANDS)}")
    module, _, function = COMMANDS[name].target.partition(":")
    command: Callable[..., None] = getattr(importlib.import_module(module), function)
    return command


def _is_unread() -> bool:
    """Whether the other end of standard output is closed."""
    watch = select.poll()
    watch.register(_STDOUT, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in watch.poll(0))


def _fail_code(error: Exception) -> int:
    print(f"headrace: {escaped_lines(str(error))}", file=sys.stderr, flush=True)
    return 1


def _fail(message: str, code: int) -> None:
    print(f"headrace: {escaped_lines(message)}", file=sys.stderr)
    sys.exit(code)
