"""The hill climb on machines that are functions: it finds the best, and stays where nothing is."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from headrace.tune.search import search
from headrace.tune.types import (
    Budget,
    Choice,
    NothingMeasured,
    Outcome,
    Parameter,
    Result,
    Trial,
)

Speed = Callable[[Choice], float]


class Machine:
    """A machine whose speed is a function, with noise and a clock of its own."""

    def __init__(
        self,
        speed: Speed,
        *,
        noise: float = 0.0,
        drift: Callable[[float], float] = lambda _: 1.0,
        start_s: float = 3.0,
        seed: int = 0,
    ) -> None:
        self.speed, self.noise, self.drift, self.start_s = speed, noise, drift, start_s
        self.rng = random.Random(seed)
        self.now_s = 1000.0
        self.deadlines: list[float] = []

    def clock(self) -> float:
        return self.now_s

    def measure(self, choice: Choice, *, seconds: float, deadline_s: float) -> Outcome:
        self.deadlines.append(deadline_s)
        speed = self.speed(choice)
        if speed == math.inf:  # it hangs
            self.now_s += deadline_s
            return Outcome(0.0, "hangs", {})
        self.now_s += self.start_s + seconds
        if speed == 0.0:
            return Outcome(0.0, "crashed", {})
        # A longer look sees less noise.
        spread = self.noise / math.sqrt(seconds / 4.0)
        factor = math.exp(self.rng.gauss(0.0, spread)) * self.drift(self.now_s)
        return Outcome(speed * factor, None, {})


PARAMETERS = (
    Parameter("num_envs", (4, 8, 16, 32, 64), 2),
    Parameter("num_workers", (1, 2, 4, 8, 16), 2),
    Parameter("share", (1, 2, 4, 8), 1),
    Parameter("threads", (1, 2, 4), 0),
    Parameter("compile", ("off", "on"), 0),
    Parameter("inference", ("server", "worker"), 0),
    Parameter("groups", (1, 2, 3, 4), 1),
)
DEFAULT = {parameter.name: parameter.values[parameter.default] for parameter in PARAMETERS}
BUDGET = Budget(total_s=600.0, trial_s=4.0, final_s=8.0)


def by_value(choice: Choice) -> str:
    return repr(sorted(choice.items()))


def pipeline(choice: Choice) -> float:
    """Eight cores that three stages share: each choice helps one stage and costs another."""
    workers, threads = choice["num_workers"], choice["threads"]
    overhead = 1.0 + 0.02 * choice["groups"] + 0.5 / choice["groups"]
    environment = 900.0 * min(workers, 8) / overhead * (0.8 if workers > 8 else 1.0)
    batch = choice["num_envs"] / choice["share"]
    inference = 9000.0 * batch / (batch + 12.0)
    learner = 3000.0 * threads**0.7 * (1.6 if choice["compile"] == "on" else 1.0)
    if choice["inference"] == "worker":
        environment *= 0.7
        inference = 20000.0
    lack = max(1.0, (workers + threads + 1) / 9.0)  # more threads than cores
    waiting = 1.0 + 0.4 * (choice["share"] == 1)
    together = (environment**-4 + inference**-4 + learner**-4) ** -0.25
    return together / lack / waiting


def best_of(speed: Speed) -> float:
    values = itertools.product(*(parameter.values for parameter in PARAMETERS))
    names = [parameter.name for parameter in PARAMETERS]
    speeds = (speed(dict(zip(names, value, strict=True))) for value in values)
    return max(found for found in speeds if found < math.inf)


def run(
    machine: Machine,
    *,
    budget: Budget = BUDGET,
    seed: int = 0,
    key: Callable[[Choice], str] = by_value,
    on_trial: Callable[[Trial], None] = lambda _: None,
) -> Result:
    return search(
        PARAMETERS,
        machine.measure,
        key=key,
        budget=budget,
        clock=machine.clock,
        seed=seed,
        on_trial=on_trial,
    )


@pytest.mark.parametrize("seed", range(6))
def test_it_finds_the_optimum_without_noise(seed: int) -> None:
    result = run(Machine(pipeline), seed=seed, budget=BUDGET._replace(total_s=2000.0))
    assert result.beaten
    assert pipeline(result.winner) >= 0.95 * best_of(pipeline)
    assert result.gain == pytest.approx(pipeline(result.winner) / pipeline(DEFAULT))
    assert pipeline(DEFAULT) < 0.6 * best_of(pipeline), "the machine is too easy"


@pytest.mark.parametrize("noise", [0.02, 0.04])
def test_it_comes_near_on_a_noisy_machine(noise: float) -> None:
    results = [run(Machine(pipeline, noise=noise, seed=seed), seed=seed) for seed in range(20)]
    shares = [pipeline(result.winner) / best_of(pipeline) for result in results]
    assert sum(shares) / len(shares) > 0.9
    assert sum(result.beaten for result in results) >= 18
    # How noisy the machine is was seen.
    assert sum(result.noise for result in results) / 20 == pytest.approx(noise, rel=0.3)


def test_it_keeps_to_the_budget_of_five_minutes() -> None:
    machine = Machine(pipeline, noise=0.04)
    result = run(machine, budget=BUDGET._replace(total_s=300.0))
    assert machine.now_s <= 1300.0
    assert len(result.gains) == 2  # there was time left for the final comparison
    assert result.beaten
    assert pipeline(result.winner) > 1.3 * pipeline(DEFAULT)


def test_the_defaults_stay_where_nothing_is_better() -> None:
    result = run(Machine(lambda choice: 100.0 if choice == DEFAULT else 90.0))
    assert not result.beaten
    assert result.winner == result.best == result.default == DEFAULT
    assert result.gains == ()


def test_a_small_gain_is_a_tie() -> None:
    result = run(Machine(lambda choice: 100.0 if choice == DEFAULT else 102.0))
    assert result.winner == DEFAULT


@pytest.mark.parametrize("noise", [0.02, 0.04, 0.08])
def test_noise_alone_wins_nothing(noise: float) -> None:
    results = [run(Machine(lambda _: 100.0, noise=noise, seed=seed)) for seed in range(20)]
    assert sum(result.beaten for result in results) <= 1


def test_a_winner_that_loses_the_final_is_dropped() -> None:
    machine = Machine(pipeline)

    def speed(choice: Choice) -> float:
        # Something else that needs cores begins when the final comparison does.
        return 50.0 if late and choice != DEFAULT else pipeline(choice)

    late = False

    def watch(trial: Trial) -> None:
        nonlocal late
        late = late or trial.stage == "final"

    machine.speed = speed
    result = run(machine, on_trial=watch)
    assert result.best != DEFAULT
    assert not result.beaten
    assert result.winner == DEFAULT
    assert result.gain < 1.0


def test_trials_are_in_turns_in_the_end() -> None:
    result = run(Machine(pipeline))
    final = [trial.choice for trial in result.trials if trial.stage == "final"]
    assert final == [result.default, result.best] * 2
    for trial in result.trials:
        assert trial.cost_s == (11.0 if trial.stage == "final" else 7.0)


def test_a_machine_that_slows_down_does_not_hide_what_helps() -> None:
    # Half as fast at the end as at the start: against an old score nothing would look better.
    machine = Machine(pipeline, drift=lambda now_s: 2.0 ** (-(now_s - 1000.0) / 600.0))
    result = run(machine)
    assert result.beaten
    assert pipeline(result.winner) >= 0.8 * best_of(pipeline)


def test_what_fails_is_passed_by() -> None:
    def speed(choice: Choice) -> float:
        return 0.0 if choice["compile"] == "on" else pipeline(choice)

    result = run(Machine(speed), budget=BUDGET._replace(total_s=2000.0))
    assert speed(result.winner) >= 0.95 * best_of(speed)
    failures = [trial for trial in result.trials if trial.outcome.failure is not None]
    assert failures
    assert all(trial.choice["compile"] == "on" for trial in failures)


def test_what_hangs_does_not_take_all_the_time() -> None:
    def speed(choice: Choice) -> float:
        return math.inf if choice["num_envs"] == 32 else pipeline(choice)

    machine = Machine(speed)
    result = run(machine)
    assert machine.now_s <= 1000.0 + BUDGET.total_s
    assert result.beaten
    assert len(result.gains) == 2
    assert max(machine.deadlines[1:]) < BUDGET.total_s


def test_a_first_trial_that_takes_long_leaves_time_for_others() -> None:
    machine = Machine(pipeline)

    def measure(choice: Choice, **arguments: float) -> Outcome:
        if machine.now_s == 1000.0:  # as when something is compiled for the first time
            machine.now_s += 150.0
        return machine.measure(choice, **arguments)

    budget = BUDGET._replace(total_s=300.0)
    result = search(PARAMETERS, measure, key=by_value, budget=budget, clock=machine.clock)
    assert len(result.trials) > 10
    assert result.beaten


def test_what_limits_is_looked_at_first() -> None:
    parameters = tuple(
        one._replace(helps=frozenset({"learner"})) if one.name == "compile" else one
        for one in PARAMETERS
    )
    machine = Machine(pipeline)

    def measure(choice: Choice, **arguments: float) -> Outcome:
        limits = "learner" if choice["compile"] == "off" else "server"
        return machine.measure(choice, **arguments)._replace(limits=limits)

    result = search(parameters, measure, key=by_value, budget=BUDGET, clock=machine.clock)
    assert result.trials[2].choice == {**DEFAULT, "compile": "on"}
    assert run(Machine(pipeline)).trials[2].choice == {**DEFAULT, "num_envs": 32}


@pytest.mark.parametrize("fails", ["the defaults", "the winner"])
def test_who_fails_in_the_end_wins_nothing(fails: str) -> None:
    machine = Machine(pipeline)

    def measure(choice: Choice, **arguments: float) -> Outcome:
        outcome = machine.measure(choice, **arguments)
        late = arguments["seconds"] == BUDGET.final_s
        if late and (choice == DEFAULT) == (fails == "the defaults"):
            return Outcome(0.0, "crashed", {})
        return outcome

    result = search(PARAMETERS, measure, key=by_value, budget=BUDGET, clock=machine.clock)
    assert result.best != DEFAULT
    assert not result.beaten


@pytest.mark.parametrize("seed", range(4))
def test_a_failure_now_and_then_misleads_nobody(seed: int) -> None:
    machine, rng = Machine(pipeline, seed=seed), random.Random(seed)
    count = 0

    def measure(choice: Choice, **arguments: float) -> Outcome:
        nonlocal count
        count += 1
        outcome = machine.measure(choice, **arguments)
        unlucky = count == 2 or (count > 2 and rng.random() < 0.1)
        return Outcome(0.0, "crashed", {}) if unlucky else outcome

    found = search(PARAMETERS, measure, key=by_value, budget=BUDGET, clock=machine.clock, seed=seed)
    # Nothing worse was ever taken for better; a failure in the end may cost the whole gain.
    assert pipeline(found.best) > pipeline(DEFAULT)
    assert found.winner in (found.best, DEFAULT)


def test_defaults_that_fail_are_told() -> None:
    with pytest.raises(NothingMeasured, match="crashed"):
        run(Machine(lambda _: 0.0))


def test_equal_choices_are_measured_as_one() -> None:
    def key(choice: Choice) -> str:  # workers do not count where the server acts
        known = {**choice, "num_workers": 0} if choice["inference"] == "server" else choice
        return by_value(known)

    result = run(Machine(lambda _: 100.0), key=key)
    seen = [key(trial.choice) for trial in result.trials if trial.choice != DEFAULT]
    assert max(Counter(seen).values()) == 2  # a tie gets one more look
    assert not any(
        trial.choice["num_workers"] != DEFAULT["num_workers"]
        for trial in result.trials
        if trial.choice["inference"] == "server"
    )


@pytest.mark.parametrize(("after", "beaten"), [(1, False), (2, False), (25, True)])
def test_what_was_found_by_ctrl_c_is_kept(after: int, beaten: bool) -> None:
    machine = Machine(pipeline)
    count = 0

    def measure(choice: Choice, **arguments: float) -> Outcome:
        nonlocal count
        count += 1
        if count > after:
            raise KeyboardInterrupt
        return machine.measure(choice, **arguments)

    result = search(PARAMETERS, measure, key=by_value, budget=BUDGET, clock=machine.clock)
    assert result.stopped
    assert len(result.trials) == after
    assert result.beaten is beaten
    if beaten:
        assert pipeline(result.winner) > pipeline(DEFAULT)
        assert result.gain == pytest.approx(pipeline(result.winner) / pipeline(DEFAULT))


def test_one_seed_is_one_search() -> None:
    def trials(seed: int) -> list[Mapping[str, Any]]:
        return [trial.choice for trial in run(Machine(pipeline, noise=0.04), seed=seed).trials]

    assert trials(3) == trials(3)


def test_trials_can_be_counted_instead() -> None:
    result = run(Machine(pipeline), budget=BUDGET._replace(trials=3, pairs=1))
    assert len([trial for trial in result.trials if trial.stage != "final"]) == 3


def test_after_a_trial_that_took_all_its_time_none_is_begun_in_vain() -> None:
    # The defaults take 40 of 100 seconds, and are killed at half of the rest the second time.
    machine = Machine(lambda _: 100.0, start_s=36.0)
    measure = machine.measure

    def patient(choice: Choice, *, seconds: float, deadline_s: float) -> Outcome:
        before_s = machine.now_s
        outcome = measure(choice, seconds=seconds, deadline_s=deadline_s)
        if machine.now_s - before_s > deadline_s:
            machine.now_s = before_s + deadline_s
            return Outcome(0.0, "late", {})
        return outcome

    machine.measure = patient  # type: ignore[method-assign]
    result = run(machine, budget=BUDGET._replace(total_s=100.0))
    assert [trial.outcome.failure for trial in result.trials] == [None, "late"]
    assert result.winner == DEFAULT


def test_without_repeated_trials_of_a_length_others_tell_the_noise() -> None:
    speeds = iter((100.0, 100.0, 110.0, 90.0, 100.0))
    machine = Machine(lambda _: next(speeds))
    result = run(machine, budget=BUDGET._replace(trials=3, pairs=1))
    assert [trial.stage for trial in result.trials] == ["search"] * 3 + ["final"] * 2
    assert result.noise == pytest.approx(0.071, rel=0.01)
    assert result.gain == pytest.approx(100.0 / 90.0)
    assert not result.beaten
