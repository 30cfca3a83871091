"""What a search is given, and what it gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from headrace.errors import HeadraceError

Choice = Mapping[str, Any]
"""A value for every parameter, by its name."""


class NothingMeasured(HeadraceError):
    """Not even the defaults could be measured; says why."""


class Parameter(NamedTuple):
    """A setting, and what it may be; neighbours in the list are one step apart."""

    name: str
    values: tuple[Any, ...]
    default: int  # index of the value that stands if nothing is tuned
    helps: frozenset[str] = frozenset()  # stages that it may relieve, as in `Outcome.limits`


class Budget(NamedTuple):
    """How long all of it may take, and what is measured."""

    total_s: float
    trial_s: float  # that one trial measures
    final_s: float  # that a trial of the final comparison measures
    pairs: int = 2  # of trials in the final comparison
    trials: int | None = None  # before it, at most


class Outcome(NamedTuple):
    """What a trial gave."""

    score: float  # more is better; 0 if it failed
    failure: str | None  # the sentence, if it failed
    figures: Mapping[str, Any]  # what else was measured
    limits: str | None = None  # the stage that limits, if that is known


class Measure(Protocol):
    """Measures a choice."""

    def __call__(self, choice: Choice, *, seconds: float, deadline_s: float) -> Outcome:
        """Measures for `seconds` and is back after at most `deadline_s`, with a failure if need be.

        KeyboardInterrupt ends the search.
        """


class Trial(NamedTuple):
    """One measurement."""

    choice: Choice
    outcome: Outcome
    cost_s: float  # wall clock that it took
    stage: str  # search, duel or final


class Result(NamedTuple):
    """What a search found."""

    trials: tuple[Trial, ...]
    default: Choice
    best: Choice  # what the climb came to
    gains: tuple[float, ...]  # best / default, of each pair of the final comparison
    gain: float  # their geometric mean, or what the climb saw if there are none
    noise: float  # how far repeated trials of the same choice lie apart, as a share
    beaten: bool  # whether the defaults clearly lost
    stopped: bool  # whether it was interrupted

    @property
    def winner(self) -> Choice:
        """What to train with."""
        return self.best if self.beaten else self.default
