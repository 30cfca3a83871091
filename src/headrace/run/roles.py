"""The parent's side of the roles: who follows training, what they found, and their deaths.

    evaluator   judges the newest weights       run/evaluator.py
    viewer      films them, and shows them      run/viewer.py

A role tells {"wants": n} to be given the newest weights, {"evaluation": ...}, {"clip": path,
"return": ...}, and {"note": text} for the user. Training never waits for a role and never ends for
it: one that dies is started again, after growing pauses, and left dead when it dies too often.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from headrace.config import RunConfig, to_dict
from headrace.errors import PeerLost
from headrace.pools.crew import Crew
from headrace.pools.memory import anonymous_block
from headrace.pools.processes import WorkerProcess
from headrace.run.report import Row
from headrace.run.role import Stamped
from headrace.weights import SharedWeights, shared_nbytes

MODULES = {"evaluator": "headrace.run.evaluator", "viewer": "headrace.run.viewer"}
"""The program of each role."""

NICE = 10
"""How far a role stands back. Where it and training want the same core, Linux gives training nine
tenths of it (sched(7): each step is a factor of about 1.25). At 19 it would be 98 of 100, and on a
saturated machine the role would show what training was long ago."""

_LOOK_S = 0.1  # between two looks: also bounds how often a GPU is waited for
_CLOSE_S = 1.0  # for all roles together, to leave by themselves


class Roles:
    """The roles of one run. For the learner's thread.

    Nothing is started or reserved where no role is asked for.
    """

    def __init__(
        self,
        config: RunConfig,
        run: Path,
        model: nn.Module,
        *,
        on_message: Callable[[str], None],
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """Starts the roles that `config` asks for; returns before they are ready.

        Args:
            config: The run's settings.
            run: The run directory.
            model: The one that learns; its weights are what roles get.
            on_message: Told what is worth a line, such as a role that died.
            now_s: The clock.

        Raises:
            ConfigError: there is too little memory.
        """
        self._on_message = on_message
        self._now_s = now_s
        self._next_look_s = 0.0
        self._published = -1
        self._newest: Mapping[str, Any] | None = None  # evaluation
        self._evaluations = self._episodes = self._clips = 0
        self._fds: list[int] = []
        asked = {"evaluator": config.evaluator.evaluator, "viewer": config.viewer.wanted}
        names = [name for name, wanted in asked.items() if wanted]
        self._roles: list[_Role] = []
        if not names:
            return
        self._stamped = Stamped(model)
        weights_fd, block = anonymous_block(shared_nbytes(self._stamped))
        self._fds.append(weights_fd)
        self._weights = SharedWeights(self._stamped, block)
        settings = {
            "config": to_dict(config),
            "run": str(run.resolve()),
            "weights_fd": weights_fd,
            "nice": NICE,
        }
        for name in names:
            self._roles.append(
                _Role(name, settings, config, on_message=on_message, on_finding=self._keep)
            )

    def due(self) -> bool:
        """Whether it is time to `attend`. Costs next to nothing."""
        return bool(self._roles) and self._now_s() >= self._next_look_s

    def attend(self, version: int, agent_steps: int) -> None:
        """Hears the roles, starts again who died, and publishes weights to those who ask.

        Args:
            version: Of the model's weights, in updates.
            agent_steps: Made so far.
        """
        self._next_look_s = self._now_s() + _LOOK_S
        for role in self._roles:
            role.look()
            if not role.question:
                continue
            if version != self._published:
                self._stamped.agent_steps.fill_(agent_steps)
                self._weights.publish(self._stamped, version)
                self._published = version
            role.answer(version)

    def row(self, version: int) -> Row:
        """Returns what is known of the roles, for the metrics.

        Args:
            version: Of the learner's weights, for how far behind them the judged ones are.
        """
        row: Row = {f"{role.name}_deaths": role.deaths for role in self._roles}
        if any(role.name == "viewer" for role in self._roles):
            row["clips"] = self._clips
        if self._newest is None:
            return row
        returns = np.asarray(self._newest["returns"])
        return row | {
            "evaluations": self._evaluations,
            "eval_episodes": self._episodes,
            "eval_return_mean": float(returns.mean()),
            "eval_return_min": float(returns.min()),
            "eval_return_max": float(returns.max()),
            "eval_length_mean": float(np.mean(self._newest["lengths"])),
            "eval_agent_steps": self._newest["agent_steps"],
            "eval_lag_updates": version - self._newest["version"],
        }

    def pids(self) -> dict[str, int]:
        """Returns the process id of every role that lives."""
        return {role.name: role.process.pid for role in self._roles if role.process is not None}

    def close(self) -> None:
        """Ends the roles, whatever they are at; a second call does nothing."""
        processes = [role.process for role in self._roles if role.process is not None]
        for process in processes:
            process.hang_up()
        until_s = time.monotonic() + _CLOSE_S
        for process in processes:
            process.close(max(0.0, until_s - time.monotonic()))
        for role in self._roles:
            role.leave()
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()

    def _keep(self, finding: Mapping[str, Any]) -> None:
        if "evaluation" in finding:
            self._newest = finding["evaluation"]
            self._evaluations += 1
            self._episodes += len(finding["evaluation"]["returns"])
        if "clip" in finding:
            self._clips += 1


class _Role:
    """One role: a crew of one, which is given up instead of ending the run."""

    def __init__(
        self,
        name: str,
        settings: Mapping[str, Any],
        config: RunConfig,
        *,
        on_message: Callable[[str], None],
        on_finding: Callable[[Mapping[str, Any]], None],
    ) -> None:
        self.name = name
        self.question = 0  # that is not answered yet; 0 for none
        self.process: WorkerProcess | None = None
        self._settings = settings
        self._on_message = on_message
        self._on_finding = on_finding
        self._ready = False
        self._deaths = 0
        self._crew: Crew | None = None
        try:
            self._crew = Crew(
                self._start,
                [name],
                groups=1,
                config=config.workers,
                on_death=self._bury,
                on_message=on_message,
            )
        except OSError as error:
            self._give_up(f"{name} cannot be started: {error.strerror}")

    @property
    def deaths(self) -> int:
        """How often it has died so far."""
        return self._deaths

    def look(self) -> None:
        """Hears what it says, and starts it again if it is dead and its pause is over."""
        if self._crew is None:
            return
        try:
            self._crew.back()
            self._crew.wait(0.0)
            self._crew.look()
            self._crew.away()
        except PeerLost as error:
            self._give_up(str(error))
        except OSError as error:
            self._give_up(f"{self.name} cannot be started again: {error.strerror}")

    def answer(self, version: int) -> None:
        """Says that the weights it asked for are there, and of which version they are."""
        if self._crew is not None:
            self._crew.ask(0, f"{self.question} {version}\n".encode(), 0)
        self.question = 0

    def leave(self) -> None:
        """Forgets its process, which has been closed."""
        self._crew, self.process, self.question = None, None, 0

    def _start(self, _index: int, _generation: int) -> WorkerProcess:
        self.question, self._ready = 0, False
        self.process = _Telling(self._hear, self.name, self._settings)
        return self.process

    def _bury(self, _index: int) -> None:
        self._deaths += 1
        self.process, self.question = None, 0

    def _give_up(self, why: str) -> None:
        self.leave()
        self._on_message(f"{why}; training goes on without the {self.name}")

    def _hear(self, message: Mapping[str, Any]) -> None:
        if "wants" in message:
            self.question = message["wants"]
            if not self._ready and self._crew is not None:
                self._ready = True
                self._crew.returned(0)  # to the crew its start was a task, and has a deadline
        elif "note" in message:
            self._on_message(f"{self.name}: {message['note']}")
        else:
            self._on_finding(message)


class _Telling(WorkerProcess):
    """A role's process, whose messages are heard whoever asks for them."""

    def __init__(
        self, hear: Callable[[Mapping[str, Any]], None], name: str, settings: Mapping[str, Any]
    ) -> None:
        super().__init__(
            MODULES[name], settings, name=f"headrace {name}", pass_fds=(settings["weights_fd"],)
        )
        self._hear_message = hear

    def messages(self) -> list[dict[str, Any]]:
        """Hands on all but its account of why it dies, which is returned."""
        errors = []
        for message in super().messages():
            if "error" in message:
                errors.append(message)
            else:
                self._hear_message(message)
        return errors
