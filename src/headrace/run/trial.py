"""The trial: an environment takes its first steps in a process of its own, before a run starts.

    parent   try_environment                      child   main
      status   <-- {"good": true} ------------------        spec was made: the first steps went well
               <-- {"refused": sentence} -----------        or not, and the family says why
      dump     <-- a stack, by faulthandler ---------       of a crash, or of a hang when asked
      spec     <-- spec and notices, as a pickle ----       of a Gymnasium environment

What makes a process exit, crash or hang would take the whole command along without a word; here it
costs the child, and the parent has a sentence to say. The stack has a file of its own: output may
be dropped while an environment is tried, and of output only the tail is kept. The spec is taken
from the child, so that no code of the environment need run here for it.

The child imports no torch, so that a trial takes little longer than the environment itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import os
import pickle
import select
import signal
import time
from collections.abc import Callable
from typing import IO, Any

from headrace import catalog
from headrace.apart import Apart
from headrace.envs import gymnasium, packages
from headrace.envs.gymnasium import GymnasiumFamily
from headrace.envs.wrappers import GymnasiumConfig
from headrace.errors import ConfigError, EnvironmentFault, PeerLost
from headrace.pools.memory import anonymous_file
from headrace.pools.processes import WorkerEnd, WorkerProcess
from headrace.run.worker import as_tuples

_DUMP_SIGNAL = signal.SIGUSR2
_DUMP_LOOKS = 20  # for the stack of a hang
_DUMP_LOOK_S = 0.01
_LOOK_S = 0.1  # at the clock
_MOST_FRAMES = 3
_MOST_BYTES = 1 << 16  # of a dump; faulthandler writes at most 100 frames


class _Trial(WorkerProcess):
    """The child, and what it answered: `death` reads messages too, and would drop the answer."""

    answer: dict[str, Any] | None = None

    def messages(self) -> list[dict[str, Any]]:
        """Returns new messages, and keeps the first."""
        messages = super().messages()
        self.answer = self.answer or next(iter(messages), None)
        return messages


def try_environment(
    env: str,
    environment_config: Any,
    *,
    timeout_s: float,
    now_s: Callable[[], float] = time.monotonic,
) -> None:
    """Tries an environment in a child process, if worker processes are its family's choice.

    The other families are headrace's own, or step themselves.

    Args:
        env: what the user typed.
        environment_config: settings of its family; None for the defaults.
        timeout_s: after which the child is killed.
        now_s: a clock.

    Raises:
        ConfigError: what the family says of the environment; or else the child died or hung.
    """
    family = catalog.environment_family(env)
    if family.pool != "shm":
        return
    config = family.config_type() if environment_config is None else environment_config
    with anonymous_file() as dump, anonymous_file() as found:
        settings = {
            "env": env,
            "settings": dataclasses.asdict(config),
            "dump_fd": dump.fileno(),
            "spec_fd": found.fileno(),
        }
        trial = _Trial(
            "headrace.run.trial",
            settings,
            name=f"trial of {env}",
            pass_fds=(dump.fileno(), found.fileno()),
        )
        try:
            fault = _fault(trial, dump.fileno(), timeout_s, now_s)
        finally:
            # After an answer it may leave in peace; nothing is to be had of a child that hangs.
            trial.close(5.0 if trial.answer else 0.0)
        if fault:
            raise ConfigError(fault if "refused" in (trial.answer or ()) else f"{env} {fault}")
        if isinstance(family, GymnasiumFamily):
            _believe(env, config, found)


def _believe(env: str, config: GymnasiumConfig, found: IO[bytes]) -> None:
    """Takes the spec from the child; where that could not say it, it is asked for again here."""
    found.seek(0)
    # Spaces may be of the environment's own classes, whose modules are imported for them.
    with Apart(), contextlib.suppress(Exception):
        spec, notices = pickle.load(found)
        gymnasium.believe(env, config, spec, notices)


def _fault(trial: _Trial, dump_fd: int, timeout_s: float, now_s: Callable[[], float]) -> str | None:
    """Waits for the end of the trial, and returns what is wrong; None if nothing is."""
    death = _listen(trial, now_s() + timeout_s, now_s)
    answer = trial.answer or {}
    if "good" in answer:
        return None
    if "refused" in answer:
        return str(answer["refused"])
    if "error" in answer:  # the death has last words too, but a thread may have put it off
        return f"cannot be used: {death or answer['error']}"
    if death is None:
        where = _hangs_at(trial, dump_fd)
        return (
            f"cannot be used: its first steps took over {timeout_s:g} s and were given up, "
            f"{f'at {where}' if where else 'nobody knows where'}; raise --start-timeout-s if it "
            "is only slow"
        )
    left, by_itself, how = death.partition("left by itself ")
    where = _innermost(_dumped(dump_fd))
    return (
        f"cannot be used: its first steps ended the process{' ' if by_itself else ', '}"
        f"{how or left}{f'; it was at {where}' if where else ''}"
    )


def _listen(trial: _Trial, until_s: float, now_s: Callable[[], float]) -> str | None:
    """Waits for an answer or a death, and returns the cause of a death.

    An error is no answer: it is written in the course of dying.
    """
    poller = select.poll()
    for fd in (trial.status_fd, trial.output_fd):
        poller.register(fd, select.POLLIN)
    while True:
        trial.printed()  # a full pipe would stop the child
        death = trial.death()
        answered = trial.answer is not None and "error" not in trial.answer
        if death is not None or answered or now_s() >= until_s:
            return death
        for fd, event in poller.poll(_LOOK_S * 1000.0):
            if fd == trial.output_fd and not event & select.POLLIN:
                poller.unregister(fd)  # it closed its output, which is no crime


def _hangs_at(trial: _Trial, dump_fd: int) -> str:
    """Asks a child that hangs where it is; empty if it is silent."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(trial.pid, _DUMP_SIGNAL)
    before = dump = ""
    for _ in range(_DUMP_LOOKS):
        time.sleep(_DUMP_LOOK_S)
        before, dump = dump, _dumped(dump_fd)
        if dump and dump == before:  # it comes in many small writes
            break
    return _innermost(dump)


def _dumped(dump_fd: int) -> str:
    return os.pread(dump_fd, _MOST_BYTES, 0).decode(errors="replace")


def _innermost(dump: str) -> str:
    """Returns the innermost frames of a stack that faulthandler wrote."""
    frames = [line.strip() for line in dump.splitlines() if line.startswith("  File ")]
    return ", called from ".join(frames[:_MOST_FRAMES])


def main() -> None:
    """Tries the environment that the parent names, and says how it went."""
    end = WorkerEnd.open()
    dump_fd = end.settings["dump_fd"]
    spec_fd = end.settings["spec_fd"]
    for fd in (dump_fd, spec_fd):
        os.set_inheritable(fd, False)
    faulthandler.enable(dump_fd, all_threads=False)
    faulthandler.register(_DUMP_SIGNAL, dump_fd, all_threads=False)
    packages.heard.set(True)  # should it end the process, what it prints is its last words
    env = end.settings["env"]
    answer: dict[str, Any] = {"good": True}
    try:
        family = catalog.environment_family(env)
        settings = {name: as_tuples(value) for name, value in end.settings["settings"].items()}
        config = family.config_type(**settings)
        spec = family.spec(env, config)
        if isinstance(family, GymnasiumFamily):
            with open(spec_fd, "wb", closefd=False) as file, contextlib.suppress(Exception):
                file.write(pickle.dumps((spec, family.notices(env, config))))
    except (ConfigError, EnvironmentFault) as error:
        answer = {"refused": str(error)}
    end.status(answer)
    with contextlib.suppress(PeerLost):
        end.receive()


if __name__ == "__main__":
    main()
