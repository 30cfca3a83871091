"""A hill climb over a few discrete parameters, for a measure that is noisy and costs seconds.

From the defaults, one parameter at a time and one step at a time, on as long as it gets better; a
step helps or it does not, and whoever reads the list of trials sees why. Where no single step helps
any more, ties get a second look, and then pairs of steps are tried.

A busy machine is fast now and slow in a minute, so that only scores from about the same time can be
compared: the incumbent is measured again every few trials, and what looks better than it must win
a duel, one right after the other. At the end the winner meets the defaults in turns A B A B, for
longer. Gains of a few percent are ties, and so is what repeated trials differ by anyway; a tie
leaves things as they are.

Nothing here knows what a parameter means; time and measure are arguments.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Hashable, Iterator, Sequence

from headrace.tune.types import (
    Budget,
    Choice,
    Measure,
    NothingMeasured,
    Outcome,
    Parameter,
    Result,
    Trial,
)

_FRESH = 3  # trials until the incumbent's score counts as old
_REPLACED = 2  # scores of the incumbent that its estimate is made of
_CLEAR = 2.0  # times the noise by which the defaults must be beaten
_PATIENCE = 4.0  # times the usual length of a trial that one may take, however little time is left
_NOTHING = 1e-9  # a score that stands for none, so that ratios exist


def search(
    parameters: Sequence[Parameter],
    measure: Measure,
    *,
    key: Callable[[Choice], Hashable],
    budget: Budget,
    clock: Callable[[], float],
    seed: int = 0,
    tie: float = 0.03,
    on_trial: Callable[[Trial], None] = lambda _: None,
) -> Result:
    """Climbs from the defaults until nothing helps, time is up, or KeyboardInterrupt.

    Args:
        parameters: All of them, those that promise most first.
        measure: Gives a choice's score.
        key: Choices with the same key are the same to the machine: one of them is measured.
        budget: In seconds of `clock`.
        clock: A monotonic clock.
        seed: Of the order in which pairs of steps are tried.
        tie: Gain, as a share, up to which two scores are the same.
        on_trial: Told of every trial.

    Raises:
        NothingMeasured: the defaults failed.
    """
    climb = _Climb(
        parameters, measure, key=key, budget=budget, clock=clock, tie=tie, on_trial=on_trial
    )
    try:
        climb.run(random.Random(seed))
    except KeyboardInterrupt:
        return climb.result(stopped=True)
    return climb.result(stopped=False)


Point = tuple[int, ...]
"""An index for every parameter."""


class _OutOfTime(Exception):
    """The next trial would take the time of the final comparison, or there were enough."""


class _Climb:
    def __init__(
        self,
        parameters: Sequence[Parameter],
        measure: Measure,
        *,
        key: Callable[[Choice], Hashable],
        budget: Budget,
        clock: Callable[[], float],
        tie: float,
        on_trial: Callable[[Trial], None],
    ) -> None:
        self._parameters, self._measure, self._budget = tuple(parameters), measure, budget
        self._key_of = key
        self._clock, self._tie, self._on_trial = clock, tie, on_trial
        self._end_s = clock() + budget.total_s
        self._default: Point = tuple(one.default for one in parameters)
        self._incumbent = self._default
        self._estimates: list[float] = []  # newest scores of the incumbent
        self._since = 0  # trials since the last of them
        self._limits: str | None = None  # the stage that limits the incumbent
        self._scores: dict[Hashable, list[float]] = {}  # of the climb, by key
        self._costs_s: dict[Hashable, float] = {}  # of the newest trial that did not fail, by key
        self._tied: set[Hashable] = set()  # keys that deserve a second look
        # What looked better and has not met the incumbent yet, with its score.
        self._hope: tuple[float, Point] | None = None
        self._trials: list[Trial] = []
        self._gains: list[float] = []

    def run(self, rng: random.Random) -> None:
        """Measures the defaults, climbs, and compares.

        Raises:
            NothingMeasured: the defaults failed.
        """
        first = self._try(self._default, "search")
        if first.failure is not None:
            raise NothingMeasured(
                f"the settings to start from cannot be measured: {first.failure}; "
                "if it but takes long, give a larger budget"
            )
        self._renew(first.score)
        try:
            # The first trial of all finds caches cold. By its score whatever follows would look
            # good, and by its cost there would be no time for much.
            cold_s = self._costs_s.copy()
            self._costs_s.clear()
            self._refresh()
            self._costs_s = self._costs_s or cold_s  # else it failed, and would again
            self._estimates = self._estimates[-1:]
            while self._step() or self._step(again=True) or self._step_in_pairs(rng):
                pass
        except _OutOfTime:
            if self._hope is not None and self._incumbent == self._default:
                self._incumbent = self._hope[1]  # the final comparison will tell
        self._compare()

    def result(self, *, stopped: bool) -> Result:
        """Returns what is known by now."""
        best, gains = self._choice(self._incumbent), tuple(self._gains)
        gain = math.exp(sum(map(math.log, gains)) / len(gains)) if gains else self._seen_gain()
        noise = self._noise()
        clear = gain > 1.0 + max(self._tie, _CLEAR * noise) and min(gains, default=gain) > 1.0
        return Result(
            trials=tuple(self._trials),
            default=self._choice(self._default),
            best=best,
            gains=gains,
            gain=gain,
            noise=noise,
            # Without a pair nobody looked again, for which only Ctrl-C is an excuse.
            beaten=self._incumbent != self._default and clear and (len(gains) > 0 or stopped),
            stopped=stopped,
        )

    def _noise(self) -> float:
        """Returns the standard deviation of a score, from neighbours in time of the same choice.

        Those of equal length if there are such: after a few trials there may be none yet.
        """
        steps = self._changes(lambda trial: trial.stage == "final") or self._changes(lambda _: True)
        # The difference of two scores varies twice as much as one.
        return math.sqrt(sum(step**2 for step in steps) / (2 * max(1, len(steps))))

    def _changes(self, kind: Callable[[Trial], bool]) -> list[float]:
        """Returns the changes, as logarithms, between neighbours of the same choice and kind."""
        before: dict[Hashable, float] = {}
        changes: list[float] = []
        for trial in self._trials[1:]:  # the first had a cold start
            if trial.outcome.failure is None:
                key = self._key_of(trial.choice), kind(trial)
                if key in before:
                    changes.append(math.log(_ratio(trial.outcome.score, before[key])))
                before[key] = trial.outcome.score
        return changes

    def _step(self, *, again: bool = False) -> bool:
        """Climbs along every parameter, first those that may help the stage that limits.

        Returns whether one helped. `again`: looks at ties a second time.
        """
        helps = [one.helps for one in self._parameters]
        order = sorted(range(len(helps)), key=lambda index: self._limits not in helps[index])
        # No generator: a gain at one parameter is no reason to leave the others.
        return any([self._climb(index, again=again) for index in order])

    def _climb(self, parameter: int, *, again: bool) -> bool:
        """Steps along one parameter as long as it helps; returns whether it did."""
        for step in (1, -1):
            best: Point | None = None
            best_score = self._estimate() * (1.0 + self._tie)
            point = self._moved(self._incumbent, parameter, step)
            while point is not None and self._is_open(point, again=again):
                score = self._challenge(point)
                if score <= best_score:
                    break
                best, best_score = point, score
                point = self._moved(point, parameter, step)
            if best is not None and self._wins(best, best_score):
                return True
        return False

    def _step_in_pairs(self, rng: random.Random) -> bool:
        """Moves two parameters at once, until a pair helps or all were tried."""
        pairs = list(itertools.combinations(range(len(self._default)), 2))
        moves = [(*pair, *steps) for pair in pairs for steps in itertools.product((1, -1), (1, -1))]
        rng.shuffle(moves)
        for first, second, step, other in moves:
            point = self._moved(self._incumbent, first, step)
            point = None if point is None else self._moved(point, second, other)
            if point is None or not self._is_open(point, again=False):
                continue
            score = self._challenge(point)
            if score > self._estimate() * (1.0 + self._tie) and self._wins(point, score):
                return True
        return False

    def _is_open(self, point: Point, *, again: bool) -> bool:
        """Whether a point is worth a look: a new one, or one that was about as good."""
        key = self._key(point)
        return key not in self._scores or (again and key in self._tied)

    def _wins(self, challenger: Point, first_score: float) -> bool:
        """Measures incumbent and challenger in turn; the winner is the incumbent from then on."""
        self._hope = first_score, challenger
        first_gain = _ratio(first_score, self._estimate())
        self._refresh("duel")
        gain = _ratio(self._in_time(challenger, "duel"), self._estimates[-1])
        self._hope = None
        if gain <= 1.0 or math.sqrt(first_gain * gain) <= 1.0 + self._tie:
            return False
        self._incumbent = challenger
        self._estimates = self._scores[self._key(challenger)][-_REPLACED:]
        self._since = 0
        return True

    def _compare(self) -> None:
        """Measures the winner against the defaults, in turns and for longer."""
        if self._incumbent == self._default:
            return
        for _ in range(self._budget.pairs):
            pair = []
            for point in (self._default, self._incumbent):
                left_s = self._end_s - self._clock()
                if left_s <= self._cost_s(point, self._budget.final_s):
                    return
                pair.append(self._try(point, "final"))
            if pair[0].failure is not None:  # nothing to compare with
                return
            self._gains.append(_ratio(pair[1].score, pair[0].score))

    def _challenge(self, point: Point) -> float:
        if self._since >= _FRESH:
            self._refresh()
        self._since += 1
        key = self._key(point)
        seen = key in self._scores
        score, estimate = self._in_time(point, "search"), self._estimate()
        self._tied.discard(key)
        if not seen and abs(score / max(estimate, _NOTHING) - 1.0) <= self._tie:
            self._tied.add(key)
        if score > estimate * (1.0 + self._tie) and (self._hope is None or score > self._hope[0]):
            self._hope = score, point
        return score

    def _refresh(self, stage: str = "search") -> None:
        """Measures the incumbent again; should that fail for once, older scores stand."""
        score = self._in_time(self._incumbent, stage)
        if score > 0.0:
            self._renew(score)

    def _renew(self, score: float) -> None:
        self._estimates = [*self._estimates, score][-_REPLACED:]
        self._since = 0

    def _estimate(self) -> float:
        return sum(self._estimates) / len(self._estimates)

    def _in_time(self, point: Point, stage: str) -> float:
        """Measures if there is time, beside what the final comparison will take.

        Raises:
            _OutOfTime: there is not, or the trials are used up.
        """
        left_s = self._end_s - self._reserve_s() - self._clock()
        usual_s = self._cost_s(point, self._budget.trial_s)
        allowed = self._budget.trials
        if left_s <= usual_s or (allowed is not None and len(self._trials) >= allowed):
            raise _OutOfTime
        # What hangs must not take all the time, and what compiles for a minute should have it.
        deadline_s = min(left_s, max(_PATIENCE * usual_s, left_s / 2))
        return self._try(point, stage, deadline_s=deadline_s).score

    def _try(self, point: Point, stage: str, *, deadline_s: float = math.inf) -> Outcome:
        seconds = self._budget.final_s if stage == "final" else self._budget.trial_s
        before_s = self._clock()
        outcome = self._measure(
            self._choice(point),
            seconds=seconds,
            deadline_s=min(deadline_s, self._end_s - before_s),
        )
        cost_s, key = self._clock() - before_s, self._key(point)
        if outcome.failure is None:
            self._costs_s[key] = cost_s - seconds
            if point == self._incumbent:
                self._limits = outcome.limits
        if stage != "final":
            self._scores.setdefault(key, []).append(outcome.score)
        self._trials.append(Trial(self._choice(point), outcome, cost_s, stage))
        self._on_trial(self._trials[-1])
        return outcome

    def _cost_s(self, point: Point, seconds: float) -> float:
        """What a trial should take: as long as its last one, or as the usual one."""
        known = self._costs_s.get(self._key(point))
        if known is None:
            known = sum(self._costs_s.values()) / max(1, len(self._costs_s))
        return known + seconds

    def _reserve_s(self) -> float:
        """What the final comparison will take; one pair of it while there is nothing to compare."""
        budget = self._budget
        points = {self._default, self._incumbent}
        dearest_s = max(self._cost_s(point, budget.final_s) for point in points)
        return 2 * (budget.pairs if len(points) > 1 else 1) * dearest_s

    def _seen_gain(self) -> float:
        """What the climb's own trials say of incumbent and defaults."""
        newest = (self._scores.get(self._key(p), [0.0]) for p in (self._incumbent, self._default))
        its, mine = (sum(scores[-_REPLACED:]) / len(scores[-_REPLACED:]) for scores in newest)
        return _ratio(its, mine)

    def _moved(self, point: Point, parameter: int, step: int) -> Point | None:
        """Takes the next value that makes a difference; None behind the last one."""
        values = self._parameters[parameter].values
        for index in _indices(point[parameter], step, len(values)):
            moved = (*point[:parameter], index, *point[parameter + 1 :])
            if self._key(moved) != self._key(point):
                return moved
        return None

    def _choice(self, point: Point) -> Choice:
        pairs = zip(self._parameters, point, strict=True)
        return {one.name: one.values[index] for one, index in pairs}

    def _key(self, point: Point) -> Hashable:
        return self._key_of(self._choice(point))


def _ratio(score: float, other: float) -> float:
    return max(score, _NOTHING) / max(other, _NOTHING)


def _indices(start: int, step: int, count: int) -> Iterator[int]:
    index = start + step
    while 0 <= index < count:
        yield index
        index += step
