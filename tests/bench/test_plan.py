"""What frames cost: the model against SEED's published table, and against sums by hand."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import pytest

from headrace.bench.plan import (
    Arrangement,
    Outlook,
    Prices,
    Rates,
    Transport,
    arrangements,
    outlook,
    point_at,
    saving,
)
from headrace.errors import ConfigError


class Published(NamedTuple):
    """A row of SEED's Table 1, and what 1e9 of its frames cost."""

    name: str
    env_frames_per_s: float
    cores: int
    accelerators: int
    price_per_accelerator_hour: float
    dollars: tuple[float, float]  # whole ones, from and to


# Neither is looked up: rows and list prices of the time are recalled, dollars were derived from
# them by others than this code. A row says P100s, or cores of a TPU v3.
CORE_PRICE, P100, TPU_CORE = 0.0475, 1.46, 1.0
SEED_TABLE = (
    Published("DMLab IMPALA, P100", 30e3, 176, 1, P100, (91, 91)),
    Published("DMLab SEED, P100", 19e3, 44, 1, P100, (52, 52)),
    Published("DMLab SEED, TPU 2", 74e3, 104, 2, TPU_CORE, (26, 26)),
    Published("DMLab SEED, TPU 8", 330e3, 520, 8, TPU_CORE, (28, 28)),
    Published("DMLab SEED, TPU 64", 2.4e6, 4160, 64, TPU_CORE, (30, 30)),
    Published("Football IMPALA, P100", 11e3, 400, 2, P100, (553, 553)),
    Published("Football SEED, TPU 2", 18e3, 416, 2, TPU_CORE, (336, 341)),
    Published("Football SEED, TPU 8", 71e3, 1664, 8, TPU_CORE, (336, 341)),
    Published("Atari SEED, TPU 8, 610 environments", 260e3, 213, 8, TPU_CORE, (18, 19)),
    Published("Atari SEED, TPU 8, 1200 environments", 440e3, 419, 8, TPU_CORE, (18, 19)),
)


def dollars(row: Published) -> float:
    prices = Prices(CORE_PRICE, row.price_per_accelerator_hour)
    hours = 1e9 / row.env_frames_per_s / 3600
    return hours * prices.per_hour(cores=row.cores, accelerators=row.accelerators)


@pytest.mark.parametrize("row", SEED_TABLE, ids=lambda row: row.name)
def test_published_rows_cost_what_was_derived(row: Published) -> None:
    low, high = row.dollars
    assert low - 0.6 < dollars(row) < high + 0.6  # a dollar more or less was rounded away


def test_published_savings_are_those_of_the_abstract() -> None:
    cost = {row.name: dollars(row) for row in SEED_TABLE}
    savings = [
        1 - cost["DMLab SEED, P100"] / cost["DMLab IMPALA, P100"],
        1 - cost["DMLab SEED, TPU 2"] / cost["DMLab IMPALA, P100"],
        1 - cost["Football SEED, TPU 2"] / cost["Football IMPALA, P100"],
    ]
    # "40% to 80% cost reduction"; these rows give 39 to 71 %.
    assert savings == pytest.approx([0.43, 0.71, 0.39], abs=0.01)


def test_one_published_row_foretells_another() -> None:
    # Atari on a V100: 55 cores step 67e3 frames/s, and are what limits. A TPU with 213 cores makes
    # 260e3; with 419 it would make 510e3 if cores were all, and makes 440e3: the model is a bound.
    rates = Rates(environment_per_core=67e3 / 55, inference=1e9, learner=1e9)
    (central,) = arrangements(rates, None, apart=False)

    def foretold(cores: int) -> float:
        made = point_at(
            central, rates, Prices(per_core_hour=1.0), cores=cores, servers=1, env_frames=1e9
        )
        assert made.limits == "environment"
        return made.env_frames_per_s

    assert foretold(213) == pytest.approx(260e3, rel=0.01)
    assert 440e3 < foretold(419) == pytest.approx(510e3, rel=0.01)


# An agent step takes 250 µs of inference and 1000 µs of the learner: the accelerator makes 800/s.
RATES = Rates(
    environment_per_core=100.0, inference=4000.0, learner=1000.0, inference_per_core=100.0
)
PRICES = Prices(per_core_hour=0.1, per_accelerator_hour=2.0)


def by_name(
    rates: Rates, transport: Transport | None = None, *, apart: bool = False
) -> dict[str, Arrangement]:
    return {each.name: each for each in arrangements(rates, transport, apart=apart)}


def looked_at(arrangement: Arrangement, rates: Rates = RATES, prices: Prices = PRICES) -> Outlook:
    return outlook(
        arrangement, rates, prices, servers=1, present_cores=4.0, env_frames=3600.0 * 800
    )


def test_the_best_ratio_is_where_nobody_waits() -> None:
    seen = looked_at(by_name(RATES)["central"])
    assert seen.balanced_ratio == pytest.approx(8.0)  # 1 / (1/4000 + 1/1000) = 800 = 8 cores
    assert seen.cheapest == seen.fastest
    best = seen.cheapest
    assert best.agent_steps_per_s == pytest.approx(800.0)
    assert (best.cores, best.accelerators, best.cores_per_accelerator) == (8, 1, 8)
    assert best.cost == pytest.approx(2.0 + 0.8)  # one hour
    assert best.hours == pytest.approx(1.0)
    assert all(share == pytest.approx(1.0) for share in best.busy.values())


def test_a_wrong_ratio_costs_more_and_says_why() -> None:
    points = {point.cores: point for point in looked_at(by_name(RATES)["central"]).points}
    few, many = points[4], points[16]
    assert few.limits == "environment"
    assert few.busy == pytest.approx({"cores": 1.0, "accelerator": 0.5})
    assert few.cost == pytest.approx(2 * (2.0 + 0.4))
    assert many.limits == "learner"
    assert many.busy == pytest.approx({"cores": 0.5, "accelerator": 1.0})
    assert many.cost == pytest.approx(2.0 + 1.6)


@pytest.mark.parametrize("environment", [37.0, 100.0, 333.3, 5000.0])
def test_no_other_number_of_cores_is_cheaper(environment: float) -> None:
    rates = dataclasses.replace(RATES, environment_per_core=environment)
    central = by_name(rates)["central"]
    seen = looked_at(central, rates)
    for cores in range(1, 60):
        point = point_at(central, rates, PRICES, cores=cores, servers=1, env_frames=3600.0 * 800)
        assert seen.cheapest.cost <= point.cost * (1 + 1e-12)
        assert seen.fastest.agent_steps_per_s >= point.agent_steps_per_s * (1 - 1e-12)


def test_whole_cores_part_the_cheapest_from_the_fastest() -> None:
    rates = dataclasses.replace(RATES, environment_per_core=99.0)  # 8.08 cores
    seen = looked_at(by_name(rates)["central"], rates)
    assert (seen.cheapest.cores, seen.fastest.cores) == (8, 9)


def test_of_what_costs_the_same_the_fastest_is_best() -> None:
    free = Prices(per_core_hour=0.1)  # accelerators that cost nothing: cores cost by their work
    seen = looked_at(by_name(RATES)["central"], prices=free)
    assert seen.points[0].cost == pytest.approx(seen.cheapest.cost)
    assert seen.cheapest is seen.fastest
    assert seen.cheapest.cores == seen.balanced_ratio


def test_workers_that_act_need_twice_the_cores_and_leave_the_accelerator_to_the_learner() -> None:
    found = by_name(RATES)
    seen = {name: looked_at(each) for name, each in found.items()}
    assert seen["workers"].balanced_ratio == pytest.approx(20.0)  # 1000 / (1 / (1/100 + 1/100))
    assert seen["workers"].cheapest.cost == pytest.approx((2.0 + 2.0) * 800 / 1000)
    assert saving(list(seen.values())) == pytest.approx(1 - 2.8 / 3.2)
    assert saving([seen["central"]]) is None


def test_apart_the_slower_of_two_accelerators_limits() -> None:
    seen = looked_at(by_name(RATES, apart=True)["central"])
    assert seen.balanced_ratio == pytest.approx(5.0)  # 10 cores to two accelerators
    assert seen.cheapest.accelerators == 2
    assert seen.cheapest.cost == pytest.approx((4.0 + 1.0) * 0.8)
    assert seen.cheapest.busy["accelerator of inference"] == pytest.approx(0.25)


def test_samples_and_frames_per_agent_step() -> None:
    rates = dataclasses.replace(RATES, samples_per_agent_step=3.75, frames_per_agent_step=4.0)
    best = looked_at(by_name(rates)["central"], rates).cheapest
    assert best.agent_steps_per_s == pytest.approx(250.0, rel=0.21)  # 2 or 3 cores of 2.5
    assert best.env_frames_per_s == pytest.approx(4 * best.agent_steps_per_s)
    assert best.hours == pytest.approx(800 / best.env_frames_per_s)


def test_processors_alone_cost_the_same_in_any_number() -> None:
    rates = Rates(environment_per_core=100.0, inference_per_core=100.0, learner_per_core=50.0)
    (alone,) = arrangements(rates, None, apart=False)
    seen = looked_at(alone, rates)
    assert seen.balanced_ratio is None
    assert seen.cheapest.agent_steps_per_s == pytest.approx(4 / 0.04)
    assert seen.cheapest.limits == "learner"
    assert seen.cheapest.cost == pytest.approx(0.1 * 800 * 0.04)  # core-hours


def test_servers_share_the_time_and_not_the_cost() -> None:
    central = by_name(RATES)["central"]
    one, four = (
        outlook(central, RATES, PRICES, servers=n, present_cores=None, env_frames=1e9).cheapest
        for n in (1, 4)
    )
    assert (four.cores, four.accelerators) == (4 * one.cores, 4)
    assert four.hours == pytest.approx(one.hours / 4)
    assert four.cost == pytest.approx(one.cost)


def test_transport_takes_cores_money_and_sets_a_limit() -> None:
    travelling = Transport(nbytes_per_agent_step=1e4, agent_steps_per_s=400.0, cores=2.0)
    central = by_name(RATES, travelling)["central"]
    assert central.rate("cores") == pytest.approx(1 / (1 / 100 + 2 / 400))
    prices = PRICES._replace(per_gigabyte=5.0)
    seen = looked_at(central, prices=prices)
    assert seen.points[-1].limits == "transport"  # 400 of the 800 that the accelerator could
    machines = looked_at(central)
    gigabytes = 3600.0 * 800 * 1e4 / 1e9
    assert seen.cheapest.cost - machines.cheapest.cost == pytest.approx(5 * gigabytes)


def test_a_slow_network_limits() -> None:
    travelling = Transport(
        nbytes_per_agent_step=1e4, agent_steps_per_s=1e6, cores=1.0, gbit_per_s=0.01
    )
    seen = looked_at(by_name(RATES, travelling)["central"])
    assert seen.points[-1].limits == "network"
    assert seen.points[-1].agent_steps_per_s == pytest.approx(0.01e9 / 8 / 1e4)


def test_efficiency_slows_everything_alike() -> None:
    rates = dataclasses.replace(RATES, efficiency=0.5)
    seen, bound = looked_at(by_name(rates)["central"], rates), looked_at(by_name(RATES)["central"])
    assert seen.cheapest.cores == bound.cheapest.cores
    assert seen.cheapest.cost == pytest.approx(2 * bound.cheapest.cost)


@pytest.mark.parametrize("rate", [0.0, -1.0, math.nan, math.inf])
def test_what_is_no_rate_is_refused(rate: float) -> None:
    with pytest.raises(ConfigError, match="inference must be a positive number"):
        dataclasses.replace(RATES, inference=rate)
