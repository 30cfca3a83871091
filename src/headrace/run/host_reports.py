"""What a host that acts tells the learner a few times a second: counts, episodes, waits."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.server.server import Seat
from headrace.telemetry.metrics import Waits
from headrace.transport import wire
from headrace.transport.wire import Kind, WireError

Episode = tuple[int, float, int, Mapping[str, float]]
"""Number of the environment within its host, raw return, agent steps, numbers of the last info."""

_REPORT_S = 0.2
_EPISODES = 64  # of a report: their infos must fit into its text
_MOST_NOTE = 500  # characters
_MOST_COUNT = 1 << 62
_COUNTS = ("agent_steps", "unfinished", "dropped", "deaths")
_WAITS = ("server_for_environments", "server_for_slots")


@dataclass(frozen=True, kw_only=True, slots=True)
class HostReport:
    """Counts since the session began, and what has come up since the report before."""

    agent_steps: int = 0
    unfinished: int = 0
    """Unrolls under construction that have rows."""
    dropped: int = 0
    """Unrolls dropped, since their environment began anew."""
    deaths: int = 0
    """Of the host's own worker processes."""
    waits: Mapping[str, float] = field(default_factory=dict)
    turnaround_s: tuple[float, float] | None = None
    episodes: tuple[Episode, ...] = ()
    note: str = ""

    @classmethod
    def of(cls, text: Mapping[str, Any], *, num_envs: int, before: HostReport) -> HostReport:
        """Returns what the text of a REPORT says.

        Args:
            text: As it came.
            num_envs: Environments of the host.
            before: Its last report.

        Raises:
            WireError: it makes no sense.
        """
        counts: dict[str, Any] = {name: text.get(name) for name in _COUNTS}
        if any(type(count) is not int or not 0 <= count < _MOST_COUNT for count in counts.values()):
            raise WireError(f"a report that counts {str(counts)[:100]}")
        report = cls(
            **counts,
            waits=_numbers(text.get("waits", {})),
            turnaround_s=_pair(text.get("turnaround_s")),
            episodes=tuple(_episode(entry, num_envs) for entry in _list(text.get("episodes", []))),
            note=str(text.get("note", ""))[:_MOST_NOTE],
        )
        growing = ("agent_steps", "dropped", "deaths")
        if any(getattr(report, name) < getattr(before, name) for name in growing):
            raise WireError("a report that counts backwards")
        if report.unfinished > num_envs or not set(report.waits) <= set(_WAITS):
            raise WireError(f"a report of {report.unfinished} unrolls and {sorted(report.waits)}")
        return report

    def plus(self, other: HostReport) -> HostReport:
        """Returns the counts of two hosts together."""
        return HostReport(**{name: getattr(self, name) + getattr(other, name) for name in _COUNTS})

    def ended(self) -> HostReport:
        """Returns the counts of a session that is over: what was under construction is lost."""
        return dataclasses.replace(self, unfinished=0, dropped=self.dropped + self.unfinished)


class Reports:
    """The host's side: gathers, and sends when it is time to."""

    def __init__(self, send: Callable[[bytes], None]) -> None:
        self.waits = Waits()
        self._send = send
        self._episodes: list[Episode] = []
        self._notes: list[str] = []
        self._reported_s = time.monotonic()

    def on_episodes(
        self,
        env_id: NDArray[np.int32],
        returns: NDArray[np.float64],
        lengths: NDArray[np.int64],
        infos: Sequence[Mapping[str, float]],
    ) -> None:
        """Keeps episodes that ended."""
        for env, total, length, info in zip(env_id, returns, lengths, infos, strict=True):
            kept = {str(name): float(value) for name, value in info.items()}
            finite = {name: value for name, value in kept.items() if math.isfinite(value)}
            self._episodes.append((int(env), float(total), int(length), finite))

    def note(self, text: str) -> None:
        """Tells what is worth a line, with the next report. Any thread."""
        self._notes.append(text[:_MOST_NOTE])

    def report(self, seat: Seat, *, at_once: bool = False) -> None:
        """Sends what has come up, if it is time to."""
        now_s = time.monotonic()
        if now_s - self._reported_s < _REPORT_S and not at_once:
            return
        self._reported_s = now_s
        unrolls, turnaround_s = seat.unrolls, seat.turnaround_s.read()
        text: dict[str, Any] = {
            "agent_steps": seat.agent_steps,
            "unfinished": 0 if unrolls is None else unrolls.unfinished(),
            "dropped": 0 if unrolls is None else unrolls.dropped_unrolls,
            "deaths": getattr(seat.pool, "deaths", 0),
        }
        first: dict[str, Any] = {"waits": self.waits.read()}
        if math.isfinite(sum(turnaround_s)):
            first["turnaround_s"] = list(turnaround_s)
        episodes, self._episodes = self._episodes, []
        for start in range(0, max(1, len(episodes)), _EPISODES):
            part = {"episodes": episodes[start : start + _EPISODES]}
            self._send(wire.encode(Kind.REPORT, text=text | first | part))
            first = {}
        while self._notes:
            self._send(wire.encode(Kind.REPORT, text=text | {"note": self._notes.pop(0)}))


def _episode(entry: Any, num_envs: int) -> Episode:
    env, total, length, info = _list(entry, 4)
    if type(env) is not int or not 0 <= env < num_envs:
        raise WireError(f"an episode of environment {str(env)[:50]}")
    if type(length) is not int or not 0 < length < _MOST_COUNT:
        raise WireError(f"an episode of {str(length)[:50]} steps")
    return env, _number(total), length, _numbers(info)


def _list(value: Any, count: int | None = None) -> list[Any]:
    if not isinstance(value, list) or count not in (None, len(value)):
        raise WireError("a report with something that is no such list")
    return value


def _pair(value: Any) -> tuple[float, float] | None:
    if value is None:
        return None
    median, slow = map(_number, _list(value, 2))
    return median, slow


def _numbers(value: Any) -> dict[str, float]:
    if not isinstance(value, dict):
        raise WireError("a report with something that is no table")
    return {name: _number(number) for name, number in value.items()}


def _number(value: Any) -> float:
    # NaN is refused too; and of integers, those beyond may be no floats.
    if type(value) not in (int, float) or not abs(value) <= _MOST_COUNT:
        raise WireError(f"a report with {str(value)[:50]} in place of a number")
    return float(value)
