"""The human-normalised score."""

import csv
from importlib.resources import files

import pytest

from headrace.envs.atari import games
from headrace.envs.scores import human_normalised


def test_random_is_zero_and_human_is_one() -> None:
    assert human_normalised("ALE/Pong-v5", -20.7) == 0.0
    assert human_normalised("ALE/Pong-v5", 14.6) == 1.0
    assert human_normalised("ALE/Breakout-v5", 1.7 + 2 * (30.5 - 1.7)) == pytest.approx(2.0)


def test_a_game_without_reference_has_no_score() -> None:
    assert human_normalised("ALE/Adventure-v5", 1.0) is None
    assert human_normalised("catch", 1.0) is None


def test_the_table_has_57_games_and_names_its_source() -> None:
    table = files("headrace").joinpath("data", "atari57_scores.csv").read_text(encoding="utf-8")
    rows = list(csv.DictReader(table.splitlines()))
    assert len({row["ale_id"] for row in rows}) == 57
    assert all(row["source"] for row in rows)


def test_every_game_of_the_table_can_be_played() -> None:
    pytest.importorskip("ale_py")
    table = files("headrace").joinpath("data", "atari57_scores.csv").read_text(encoding="utf-8")
    assert {row["ale_id"] for row in csv.DictReader(table.splitlines())} <= set(games())
