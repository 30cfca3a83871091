"""Counts, quantiles and waits, with the clock given."""

from __future__ import annotations

import math
import threading

import numpy as np
import pytest

from headrace.telemetry.metrics import EpisodeStats, Quantiles, Rate, Waits, clean_name


def test_rate_is_since_the_last_read() -> None:
    rate = Rate("env_frames", start_s=10.0)
    rate.add(300)
    rate.add(100)
    assert rate.read(12.0) == (200.0, "env_frames/s")
    rate.add(50)
    assert rate.read(12.5) == (100.0, "env_frames/s")
    assert rate.read(13.0) == (0.0, "env_frames/s")
    assert rate.total == 450


def test_rate_without_a_start_begins_at_the_first_read() -> None:
    rate = Rate("updates")
    rate.add(1000)
    assert rate.read(5.0)[0] == 0.0
    rate.add(4)
    assert rate.read(7.0)[0] == 2.0
    assert rate.read(7.0)[0] == 0.0


def test_quantiles_are_of_the_newest_values() -> None:
    quantiles = Quantiles(101)
    assert all(math.isnan(value) for value in quantiles.read())
    quantiles.add(7.0)
    assert quantiles.read() == (7.0, 7.0)
    for value in range(1000, 1101):
        quantiles.add(value)
    assert quantiles.read() == pytest.approx((1050.0, 1099.0))


def test_episode_means_are_of_the_last_hundred_and_the_rest_of_the_whole_run() -> None:
    stats = EpisodeStats()
    assert stats.read()["episodes"] == 0
    assert math.isnan(stats.read()["return_mean"])
    assert math.isnan(stats.read()["return_max"])
    stats.add(np.array([500.0], dtype=np.float32), np.array([9]))
    for _ in range(50):
        stats.add([-2.0, 4.0], [10, 20])
    assert stats.read() == {
        "episodes": 101,
        "return_mean": 1.0,
        "return_max": 500.0,
        "length_mean": 15.0,
    }


def test_episode_stats_go_on_after_a_resume() -> None:
    stats = EpisodeStats(episodes=40, return_max=21.0)
    stats.add([3.0], [5])
    assert (stats.read()["episodes"], stats.read()["return_max"]) == (41, 21.0)


def test_numbers_of_the_environment_are_means_over_the_episodes_that_gave_them() -> None:
    stats = EpisodeStats()
    stats.add([0.0], [1])
    stats.add([0.0, 0.0, 0.0], [1, 1, 1], [{"won": 1.0, "x": 4.0}, {}, {"won": 0.0}])
    read = stats.read()
    assert {name: read[name] for name in read if name.startswith("episode/")} == {
        "episode/won": 0.5,
        "episode/x": 4.0,
    }
    for _ in range(98):  # the one that gave x is now the 101st last
        stats.add([0.0], [1], [{"won": 0.0}])
    read = stats.read()
    assert "episode/x" not in read
    assert read["episode/won"] == 0.0
    assert read["episodes"] == 102


def test_infos_must_be_as_many_as_episodes() -> None:
    with pytest.raises(ValueError, match="zip"):
        EpisodeStats().add([0.0, 1.0], [1, 1], [{"won": 1.0}])


def test_number_that_is_not_finite_spoils_no_mean() -> None:
    stats = EpisodeStats()
    stats.add([0.0] * 3, [1] * 3, [{"x": float("nan")}, {"x": 2.0}, {"x": float("-inf")}])
    assert stats.read()["episode/x"] == 2.0


def test_names_beyond_64_are_left_out_and_said_once() -> None:
    said: list[str] = []
    stats = EpisodeStats(on_message=said.append)
    stats.add([0.0], [1], [{f"name_{index}": 1.0 for index in range(64)}])
    assert said == []
    for index in range(64, 70):
        stats.add([0.0], [1], [{f"name_{index}": 1.0, "name_3": 3.0}])
    read = stats.read()
    assert sum(name.startswith("episode/") for name in read) == 64
    assert read["episode/name_3"] == pytest.approx((1.0 + 6 * 3.0) / 7)
    [message] = said
    assert "episode/name_64" in message
    EpisodeStats().add([0.0], [1], [{str(index): 1.0 for index in range(70)}])  # nobody to tell


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("won", "won"),
        ("score/left-2.b", "score/left-2.b"),
        ("/a b\n{c}", "a_b__c_"),
        ("h\u00f6he", "h_he"),
        ("//", "_"),
        ("a" * 200, "a" * 100),
    ],
)
def test_names_are_such_as_every_reader_takes(given: str, name: str) -> None:
    assert clean_name(given) == name


def test_waits_are_since_the_last_read_and_keep_their_names() -> None:
    waits = Waits()
    threads = [
        threading.Thread(target=lambda: [waits.add("server", 0.5) for _ in range(100)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    waits.add("learner", 1.0)
    assert waits.read() == {"server": 200.0, "learner": 1.0}
    assert waits.read() == {"server": 0.0, "learner": 0.0}
