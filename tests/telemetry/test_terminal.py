"""What a user sees: plain lines, and the table at 80 columns."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from headrace.algorithms.base import POLICY_METRICS, VALUES_METRICS, ShownMetrics
from headrace.algorithms.sac import Sac
from headrace.length import Length
from headrace.telemetry import terminal
from headrace.telemetry.panel import render
from headrace.telemetry.terminal import open_display
from headrace.telemetry.wording import Row

FULL: dict[str, float | int | str] = {
    "env_frames": 4_213_000,
    "agent_steps": 1_053_250,
    "updates": 1646,
    "env_frames_per_s": 12345.6,
    "agent_steps_per_s": 3086.4,
    "sampling_hz": 3086.4,
    "updates_per_s": 4.8,
    "samples": 1_053_440,
    "update_frame_rate_hz": 24_680.0,
    "samples_used_share": 0.975,
    "transmission_loss": 0.0125,
    "cpu_load": 15.25,
    "cpu_load_machine": 0.953,
    "episodes": 123_456,
    "return_mean": -1234.567,
    "return_max": 98765.4,
    "length_mean": 1711.2,
    "loss/policy": -0.0000123,
    "loss/value": 0.3121,
    "loss/entropy": -1.21,
    "gradient_norm": 40.123,
    "learning_rate": 0.00048,
    "policy_lag_mean": 1.5,
    "policy_lag_max": 40,
    "server_turnaround_ms_p50": 3.21,
    "server_turnaround_ms_p99": 1119.82,
    "wait/server_for_environments": 0.41,
    "wait/server_for_slots": 0.02,
    "wait/learner_for_unrolls": 1.0,
    "bottleneck": "environments",
    "eval_return_mean": 19.5,
    "precision": "bfloat16",
    "elapsed_s": 90_754,
}


LENGTH = Length(10_000_000)


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def drawn(
    row: Row, width: int = 80, length: Length = LENGTH, metrics: ShownMetrics = POLICY_METRICS
) -> list[str]:
    console = Console(file=io.StringIO(), width=width, record=True)
    console.print(render("impala ALE/Pong-v5", row, length, 468.7, metrics.panel))
    return console.export_text().splitlines()


def plain_line(
    row: Row, length: Length, eta_s: float, metrics: ShownMetrics = POLICY_METRICS
) -> str:
    return terminal.plain_line(row, length, eta_s, metrics.line)


def test_table_shows_every_number_whole_at_80_columns() -> None:
    lines = drawn(FULL)
    text = "\n".join(lines)
    assert all(len(line) == 80 for line in lines)
    for part in (
        *("ALE/Pong-v5", "42.1 %", "4.21 M of 10.0 M frames", "ETA 0:07:49", "12.3 k", "3.09 k"),
        *("-1234.57", "98765.40", "19.50", "123 k", "1.71 k", "1.5 / 40.0", "3.2 / 1119.8"),
        *("-1.23e-05", "0.3121", "-1.21", "40.12", "4.80e-04", "41.0 %", "2.0 %", "100.0 %"),
        *("24.7 k", "97.5 / 1.2", "15.2", "95.3 %"),
        *("bottleneck environments", "bfloat16", "1 d 1:12:34"),
    ):
        assert part in text
    assert "…" not in text


def test_table_of_a_row_without_numbers_shows_dashes() -> None:
    text = "\n".join(drawn({"env_frames": 0, "return_mean": float("nan")}))
    assert "0.0 %" in text
    assert "nan" not in text
    assert text.count("\N{EN DASH}") > 15


def test_worker_deaths_are_shown_once_there_are_some() -> None:
    none, some = {**FULL, "worker_deaths": 0}, {**FULL, "worker_deaths": 3}
    for row, shown in ((FULL, False), (none, False), (some, True)):
        lines = drawn(row)
        assert any("worker deaths" in line and line.split()[-2] == "3" for line in lines) is shown
        assert len(lines) == len(drawn(FULL))
        assert ("worker deaths 3" in plain_line(row, Length(10_000_000), 1.0)) is shown


ALL_ROLES: Row = {
    **FULL,
    "gpu_load": 0.375,
    "gpu_memory_gib": 139.5,
    "eval_return_mean": -12345.678,
    "eval_return_min": -98765.4,
    "eval_return_max": 23.5,
    "eval_episodes": 5,
    "eval_length_mean": 777.0,
    "eval_agent_steps": 987_000,
}


def test_an_evaluator_and_a_gpu_are_shown_whole_at_80_columns_and_24_lines() -> None:
    lines = drawn(ALL_ROLES)
    text = "\n".join(lines)
    assert all(len(line) == 80 for line in lines)
    assert len(lines) <= 24
    evaluation = {
        line.split("\N{BOX DRAWINGS LIGHT VERTICAL}")[1].split()[-1]
        for line in lines
        if any(label in line for label in ("mean return", "lowest", "best", "at agent", "episodes"))
    }
    assert evaluation == {"-12345.68", "-98765.40", "23.50", "k", "5"}
    for part in ("987 k", "1.05 M", "GPU busy, 139.5 GiB", "37.5 %"):
        assert part in text
    assert "…" not in text
    line = plain_line(ALL_ROLES, Length(10_000_000), 1.0)
    assert "evaluation -12345.68" in line
    assert "cores 15.2" in line
    assert "gpu 37.5 %" in line


def test_environments_that_evaluate_beside_training_have_no_step_of_their_own() -> None:
    text = "\n".join(drawn({**FULL, "eval_length_mean": 777.0}))
    for part in ("evaluation", "19.50", "1.71 k", "777"):
        assert part in text
    for part in ("lowest", "at agent step"):
        assert part not in text
    alone = "\n".join(drawn({name: FULL[name] for name in FULL if not name.startswith("eval_")}))
    assert "evaluation" not in alone


def test_numbers_of_the_environment_take_no_place() -> None:
    reported: Row = {**FULL, **{f"episode/name_{index}": 0.5 for index in range(64)}}
    assert drawn(reported) == drawn(FULL)
    assert plain_line(reported, Length(10_000_000), 1.0) == plain_line(
        FULL, Length(10_000_000), 1.0
    )


def test_a_run_with_a_replay_shows_what_it_has_and_not_what_it_has_not() -> None:
    row: Row = {
        "env_frames": 500,
        "replay_sequences": 14_000,
        "samples_per_insert": 3.875,
        "loss/td_error_mean": 0.0625,
    }
    table = "\n".join(drawn(row, metrics=VALUES_METRICS))
    for text in ("sequences in the replay", "14.0 k", "3.875", "TD error", "0.0625"):
        assert text in table
    for text in ("policy lag", "policy loss", "entropy"):
        assert text not in table
    line = plain_line(row, Length(1000), 1.0, VALUES_METRICS)
    assert "TD error 0.0625" in line
    assert "replay 14.0 k" in line


def test_critics_show_what_they_learn() -> None:
    row: Row = {
        "replay_sequences": 14_000,
        "loss/critic": 0.0625,
        "loss/entropy": -3.25,
        "temperature": 0.125,
    }
    table = "\n".join(drawn(row, metrics=Sac.shown))
    for text in ("critics' loss", "0.0625", "-3.25", "temperature", "0.125"):
        assert text in table


def test_an_algorithm_names_the_metrics_that_are_shown() -> None:
    own = ShownMetrics(panel=(("wits {}", "own/wits"),), line=("wits {}", "own/wits"))
    row: Row = {"env_frames": 500, "own/wits": 0.25, "loss/policy": 0.75}
    table = "\n".join(drawn(row, metrics=own))
    line = plain_line(row, Length(1000), 1.0, own)
    for text in (table, line):
        assert "wits" in text
        assert "0.25" in text
        assert "0.75" not in text


def test_table_stays_readable_on_a_wide_terminal() -> None:
    assert max(len(line.rstrip()) for line in drawn(FULL, width=200)) == 100


def test_plain_line_leaves_out_what_is_unknown() -> None:
    line = plain_line({"env_frames": 500, "return_mean": float("nan")}, Length(1000), float("nan"))
    assert line == "500/1.00 k frames (50.0 %)"
    assert plain_line(FULL, Length(10_000_000), 468.7).isascii()


def test_plain_lines_come_at_most_once_per_interval_and_the_last_always() -> None:
    clock, stream = Clock(), io.StringIO()
    with open_display(
        Length(1000), "catch", POLICY_METRICS, stream=stream, plain_interval_s=5, now_s=clock
    ) as display:
        for now_s, env_frames in ((0, 0), (4.9, 100), (5, 200), (6, 250), (7, 300)):
            clock.now_s = now_s
            display.update({"env_frames": env_frames})
        display.message("checkpoint at 300")
    lines = stream.getvalue().splitlines()
    assert [line.split("/")[0] for line in lines] == [
        "catch",
        "0",
        "200",
        "checkpoint at 300",
        "300",
    ]


def test_eta_follows_the_pace_since_the_first_row_also_after_a_resume() -> None:
    clock, stream = Clock(), io.StringIO()
    with open_display(
        Length(1000), "catch", POLICY_METRICS, stream=stream, plain_interval_s=0, now_s=clock
    ) as display:
        display.update({"env_frames": 400, "env_frames_per_s": 6})
        clock.now_s = 10
        display.update({"env_frames": 500, "env_frames_per_s": 1})
    _, first, second = stream.getvalue().splitlines()
    assert "eta 0:01:40" in first
    assert "eta 0:00:50" in second


def test_what_is_ahead_is_shown_of_frames_and_minutes() -> None:
    row: Row = {"env_frames": 500, "elapsed_s": 120.0}
    line = plain_line(row, Length(10_000, 8.0), 360.0)
    assert line == "0:02:00/0:08:00, 500 frames (25.0 %)  eta 0:06:00"
    assert plain_line(row, Length(1000, 8.0), 9.0).startswith("500/1.00 k frames (50.0 %)")
    assert "0:02:00 of 0:08:00, 500 frames" in "".join(drawn(row, length=Length(10_000, 8.0)))


def test_eta_is_at_most_what_the_clock_has_left() -> None:
    clock, stream = Clock(), io.StringIO()
    with open_display(
        Length(1000, 8.0), "catch", POLICY_METRICS, stream=stream, plain_interval_s=0, now_s=clock
    ) as display:
        display.update({"env_frames": 0, "elapsed_s": 180})
        display.update({"env_frames": 0, "env_frames_per_s": 10, "elapsed_s": 180})
        display.update({"env_frames": 0, "env_frames_per_s": 2, "elapsed_s": 180})
    _, unknown, fast, slow = stream.getvalue().splitlines()
    assert "eta 0:05:00" in unknown
    assert "eta 0:01:40" in fast
    assert "eta 0:05:00" in slow


def test_live_table_is_redrawn_at_most_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    clock, stream = Clock(), io.StringIO()
    with open_display(
        Length(1000), "catch", POLICY_METRICS, stream=stream, live=True, now_s=clock
    ) as display:
        for now_s in (0.0, 0.5, 0.9, 1.0):
            clock.now_s = now_s
            display.update({"env_frames": int(now_s * 100)})
        before_message = stream.getvalue()
        display.message("[not markup]")
    assert before_message.count("headrace  catch") == 2
    assert "[not markup]" in stream.getvalue()


def test_stream_without_unicode_still_gets_its_lines() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    with open_display(Length(10), "ünder", POLICY_METRICS, stream=stream) as display:
        display.update({"env_frames": 5})
    assert b"5/10 frames" in stream.buffer.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("live", [False, True])
def test_what_is_said_moves_no_cursor_and_poses_as_no_line_of_ours(live: bool) -> None:
    stream = io.StringIO()
    with open_display(LENGTH, "title\x1b[2J", POLICY_METRICS, stream=stream, live=live) as display:
        display.message("a\nb\x1b[31m\rc\x1b[2J")
        display.update(FULL)
    assert "a\n    b\\rc\\x1b[2J\n" in stream.getvalue().replace("\r\n", "\n")
    assert "\x1b[2J" not in stream.getvalue()
    assert "\x1b[31m" not in stream.getvalue()
