"""The run directory: who may write there, and what a kill leaves readable."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from headrace.errors import ConfigError
from headrace.telemetry.record import FolderInUse, MetricsWriter, RunDirectory, log_to, read_metrics


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(tmp_path / "runs" / "one", 'environment = "catch"\n')


def test_create_writes_the_config_and_open_finds_it(run: RunDirectory) -> None:
    assert RunDirectory.open(run.path).config_path.read_text() == 'environment = "catch"\n'


def test_create_refuses_a_folder_in_use_and_names_the_command(run: RunDirectory) -> None:
    with pytest.raises(ConfigError, match=f"headrace train --resume {run.path}"):
        RunDirectory.create(run.path, "")
    assert run.config_path.read_text() != ""


def test_create_takes_an_empty_folder_and_refuses_a_file(tmp_path: Path) -> None:
    RunDirectory.create(tmp_path, "")
    with pytest.raises(ConfigError, match="--out"):
        RunDirectory.create(tmp_path / "config.toml", "")


def test_open_refuses_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a run"):
        RunDirectory.open(tmp_path / "missing")


def test_lock_keeps_a_second_one_out_and_names_the_holder(run: RunDirectory) -> None:
    with run.lock(), pytest.raises(ConfigError, match=f"pid {os.getpid()}"), run.lock():
        pass
    with run.lock():
        pass


HOLDER = """
import sys, time
from pathlib import Path
from headrace.telemetry.record import RunDirectory
with RunDirectory.open(Path(sys.argv[1])).lock():
    sys.stdout.write("locked\\n")
    sys.stdout.flush()
    time.sleep(60)
"""


def test_lock_of_a_killed_process_is_free(run: RunDirectory) -> None:
    command = [sys.executable, "-c", HOLDER, str(run.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline().strip() == b"locked"
            with pytest.raises(ConfigError, match=f"pid {holder.pid}"), run.lock():
                pass
        finally:
            holder.kill()
    with run.lock():
        assert (run.path / "lock").read_text() == f"{os.getpid()}\n"


def test_metrics_are_one_object_per_line_with_null_for_what_is_not_finite(
    run: RunDirectory,
) -> None:
    row = {"loss/policy": 0.5, "bad": float("nan"), "worse": float("-inf"), "bottleneck": "server"}
    with MetricsWriter(run, tensorboard=False) as writer:
        writer.write(100, row)
        written = json.loads(run.metrics_path.read_text())  # flushed before the file is closed
    assert written == {
        "env_frames": 100,
        "loss/policy": 0.5,
        "bad": None,
        "worse": None,
        "bottleneck": "server",
    }


def test_resumed_metrics_are_appended_after_a_half_written_line_is_cut(run: RunDirectory) -> None:
    with MetricsWriter(run, tensorboard=False) as writer:
        writer.write(1, {"x": 1})
    # Longer than a block, so that the search for the newline has to go on.
    with run.metrics_path.open("a") as file:
        file.write('{"env_frames": 2, "text": "' + "a" * 200_000)
    assert [row["env_frames"] for row in read_metrics(run.metrics_path)] == [1]
    with MetricsWriter(run, tensorboard=False) as writer:
        writer.write(3, {"x": 3})
    assert read_metrics(run.metrics_path) == [
        {"env_frames": 1, "x": 1},
        {"env_frames": 3, "x": 3},
    ]


def test_rows_of_a_lost_future_are_cut_and_the_others_say_which_start_wrote_them(
    run: RunDirectory,
) -> None:
    with MetricsWriter(run, tensorboard=False, start=0) as writer:
        for env_frames in (8, 16, 24, 32):
            writer.write(env_frames, {"x": 1})
    with MetricsWriter(run, tensorboard=False, resumed_at=16, start=1) as writer:
        writer.write(24, {"x": 2})
    assert read_metrics(run.metrics_path) == [
        {"env_frames": 8, "resume_count": 0, "x": 1},
        {"env_frames": 16, "resume_count": 0, "x": 1},
        {"env_frames": 24, "resume_count": 1, "x": 2},
    ]


def test_a_name_that_another_process_has_taken_is_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have seen an empty folder; one of them is first."""
    RunDirectory.create(tmp_path / "run", "seed = 1\n")
    monkeypatch.setattr(RunDirectory, "ensure_unused", lambda _: None)
    with pytest.raises(FolderInUse, match="is not empty"):
        RunDirectory.create(tmp_path / "run", "seed = 2\n")
    assert (tmp_path / "run" / "config.toml").read_text() == "seed = 1\n"


def test_only_half_a_line_leaves_an_empty_file(run: RunDirectory) -> None:
    run.metrics_path.write_text('{"env_fr')
    MetricsWriter(run, tensorboard=False).close()
    assert run.metrics_path.read_bytes() == b""


def test_read_metrics_names_a_damaged_line(run: RunDirectory) -> None:
    assert read_metrics(run.metrics_path) == []
    run.metrics_path.write_text('{"x": 1}\noops\n{"x": 2}\n')
    with pytest.raises(ConfigError, match="line 2"):
        read_metrics(run.metrics_path)


def test_tensorboard_gets_the_finite_numbers_by_env_frames(run: RunDirectory) -> None:
    with MetricsWriter(run) as writer:
        writer.write(400, {"loss/policy": 0.5, "bad": float("nan"), "bottleneck": "server"})
    from tensorboard.backend.event_processing.event_accumulator import (  # noqa: PLC0415
        EventAccumulator,
    )

    events = EventAccumulator(str(run.tensorboard))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss/policy"]
    [point] = events.Scalars("loss/policy")
    assert (point.step, point.value) == (400, 0.5)


def test_log_gets_what_the_package_says_while_the_block_runs(run: RunDirectory) -> None:
    logger = logging.getLogger("headrace.server")
    with log_to(run.log_path):
        logger.info("worker 3 restarted")
    logger.warning("unheard")
    text = run.log_path.read_text()
    assert "INFO" in text
    assert "headrace.server: worker 3 restarted" in text
    assert "unheard" not in text


def test_a_line_of_the_log_is_one_line_whatever_is_said(run: RunDirectory) -> None:
    logger = logging.getLogger("headrace.pools")
    with log_to(run.log_path):
        logger.info("worker 3 printed: %s", "a\nrm -r ~\x1b[2J\r\udcff")
        logger.info("worker 4 is well")
    first, second = run.log_path.read_text().splitlines()
    assert first.endswith(r"worker 3 printed: a\nrm -r ~\x1b[2J\r\udcff")
    assert second.endswith("worker 4 is well")


def opened(run: RunDirectory) -> dict[str, Callable[[], object]]:
    return {
        "log.txt": lambda: log_to(run.log_path).__enter__(),
        "lock": lambda: run.lock().__enter__(),
        "config.toml": lambda: RunDirectory.open(run.path),
        "metrics.jsonl": lambda: MetricsWriter(run, tensorboard=False),
        "tensorboard": lambda: MetricsWriter(run),
    }


@pytest.mark.parametrize("name", ["log.txt", "lock", "config.toml", "metrics.jsonl", "tensorboard"])
@pytest.mark.parametrize("kind", ["link", "link to nothing", "endless link", "fifo"])
def test_nothing_in_the_folder_is_opened_through_a_link(
    run: RunDirectory, tmp_path: Path, name: str, kind: str
) -> None:
    theirs, ours = tmp_path / "theirs", run.path / name
    theirs.mkdir()
    profile = theirs / "profile"
    profile.write_text("half a line")
    ours.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(ours)
    elif kind == "link":
        ours.symlink_to(theirs if name == "tensorboard" else profile)
    else:
        ours.symlink_to("/dev/zero" if kind == "endless link" else theirs / "nowhere")
    with pytest.raises(ConfigError, match=f"{ours} is .*delete it"):
        opened(run)[name]()
    assert [path.name for path in theirs.iterdir()] == ["profile"]
    assert profile.read_text() == "half a line"


def test_metrics_are_read_from_the_folder_itself(run: RunDirectory) -> None:
    run.metrics_path.symlink_to("/dev/zero")
    with pytest.raises(ConfigError, match="is a link"):
        read_metrics(run.metrics_path)


@pytest.mark.parametrize("line", ["[" * 100_000, "[1]", '{"x": "\udcff"}'])
def test_read_metrics_names_a_line_that_is_no_row(run: RunDirectory, line: str) -> None:
    run.metrics_path.write_text(f'{{"x": 1}}\n{line}\n', "utf-8", "surrogateescape")
    with pytest.raises(ConfigError, match="line 2"):
        read_metrics(run.metrics_path)


def test_settings_left_half_written_are_written_anew(run: RunDirectory) -> None:
    run.new_config_path.write_text("half")
    run.rewrite_config("seed = 2\n")
    assert run.config_path.read_text() == "seed = 2\n"
    assert not run.new_config_path.exists()


def test_new_settings_replace_a_link_and_not_what_it_leads_to(
    run: RunDirectory, tmp_path: Path
) -> None:
    (tmp_path / "theirs").write_text("theirs")
    run.new_config_path.symlink_to(tmp_path / "theirs")
    run.rewrite_config("seed = 2\n")
    assert run.config_path.read_text() == "seed = 2\n"
    assert not run.config_path.is_symlink()
    assert (tmp_path / "theirs").read_text() == "theirs"
