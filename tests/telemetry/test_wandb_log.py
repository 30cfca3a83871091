"""W&B gets every row, and whatever it does, the run goes on."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from headrace.errors import ConfigError
from headrace.telemetry.record import MetricsWriter, RunDirectory
from headrace.telemetry.wandb_log import WandbLog, ensure_wandb


class FakeError(Exception):
    pass


class FakeUsageError(FakeError):
    pass


class FakeWandb:
    """Stands for the package: keeps what it is told, and fails where it is told to."""

    Error = FakeError
    errors = SimpleNamespace(UsageError=FakeUsageError)

    def __init__(self) -> None:
        self.inits: list[dict[str, Any]] = []
        self.metrics: list[tuple[str, str | None]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.exit_codes: list[int] = []
        self.fails: dict[str, Exception] = {}
        self.logins = 0
        self.offline, self.url = False, "https://example.org/p/runs/1"

    def _maybe_fail(self, what: str) -> None:
        if what in self.fails:
            raise self.fails[what]

    def login(self) -> bool:
        self.logins += 1
        self._maybe_fail("login")
        return True

    def Settings(self, **settings: Any) -> dict[str, Any]:  # noqa: N802 - the package's name
        return settings

    def init(self, **arguments: Any) -> FakeWandb:
        self.inits.append(arguments)
        self._maybe_fail("init")
        return self

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.metrics.append((name, step_metric))

    def log(self, row: dict[str, float], step: int) -> None:
        self._maybe_fail("log")
        self.logged.append((step, row))

    def finish(self, exit_code: int) -> None:
        self._maybe_fail("finish")
        self.exit_codes.append(exit_code)


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return fake


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(tmp_path / "runs" / "one", 'environment = "catch"\n')


def writer(
    run: RunDirectory, said: list[str], config: dict[str, Any] | None = None
) -> MetricsWriter:
    log = WandbLog(run.path, "p", config or {}, on_message=said.append)
    return MetricsWriter(run, tensorboard=False, wandb=log)


def test_rows_arrive_with_env_frames_as_the_axis(wandb: FakeWandb, run: RunDirectory) -> None:
    said: list[str] = []
    config = {"env": "catch", "server": {"num_envs": 4}}
    with writer(run, said, config) as metrics:
        metrics.write(100, {"return_mean": 0.5, "bad": float("nan"), "bottleneck": "server"})
        metrics.write(200, {"return_mean": 1, "env_frames": 200})
    assert wandb.logged == [
        (0, {"env_frames": 100, "return_mean": 0.5}),
        (1, {"env_frames": 200, "return_mean": 1}),
    ]
    assert wandb.metrics == [("env_frames", None), ("*", "env_frames")]
    [init] = wandb.inits
    assert (init["project"], init["name"], init["config"]) == ("p", "one", config)
    assert init["dir"] == str(run.path.resolve())
    assert said == [f"W&B: {wandb.url}"]
    assert wandb.exit_codes == [0]


def test_resumed_run_goes_on_with_the_same_id_and_higher_steps(
    wandb: FakeWandb, run: RunDirectory
) -> None:
    for env_frames in (300, 100):  # the second session starts from a checkpoint before the first
        with writer(run, []) as metrics:
            metrics.write(env_frames, {})
            metrics.write(env_frames + 100, {})
    first, second = wandb.inits
    assert first["id"] == second["id"] == (run.path / "wandb-id.txt").read_text().strip()
    assert second["resume"] == "allow"
    assert [step for step, _ in wandb.logged] == [0, 1, 2, 3]
    assert [row["env_frames"] for _, row in wandb.logged] == [300, 400, 100, 200]


@pytest.mark.parametrize("known", ["../elsewhere", "a\nb", "\x1b[2J", "x" * 200, "é", None])
def test_an_id_that_is_none_is_said_and_not_used(
    wandb: FakeWandb, run: RunDirectory, known: str | None
) -> None:
    path = run.path / "wandb-id.txt"
    if known is None:
        path.symlink_to("/dev/zero")
    else:
        path.write_text(known)
    said: list[str] = []
    with writer(run, said):
        pass
    assert wandb.inits == []
    assert [str(path) in text and "nothing else is lost" in text for text in said] == [True]
    assert run.metrics_path.exists()


def test_two_runs_have_two_ids(wandb: FakeWandb, tmp_path: Path) -> None:
    for name in ("one", "two"):
        writer(RunDirectory.create(tmp_path / name, ""), []).close()
    first, second = wandb.inits
    assert first["id"] != second["id"]


def test_run_that_raises_is_shown_as_failed(wandb: FakeWandb, run: RunDirectory) -> None:
    with pytest.raises(RuntimeError, match="diverged"), writer(run, []):
        raise RuntimeError("diverged")
    assert wandb.exit_codes == [1]


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_failure_is_said_once_and_the_run_goes_on(
    wandb: FakeWandb, run: RunDirectory, where: str
) -> None:
    wandb.fails[where] = RuntimeError("no route\nto host")
    said: list[str] = []
    with writer(run, said) as metrics:
        for env_frames in range(20):
            metrics.write(env_frames, {"x": 1.0})
    [message] = [text for text in said if "gets no more" in text]
    assert "RuntimeError: no route" in message
    assert "\n" not in message
    assert len(run.metrics_path.read_text().splitlines()) == 20


def test_wandb_is_told_how_long_it_may_take(wandb: FakeWandb, run: RunDirectory) -> None:
    WandbLog(run.path, "p", {}, on_message=lambda _: None, patience_s=7.0).close()
    settings = wandb.inits[0]["settings"]
    assert settings["init_timeout"] == settings["finish_timeout"] == 7.0
    assert settings["finish_timeout_raises"]


def test_an_end_comes_once(wandb: FakeWandb, run: RunDirectory) -> None:
    log = WandbLog(run.path, "p", {}, on_message=lambda _: None)
    with pytest.raises(RuntimeError), MetricsWriter(run, tensorboard=False, wandb=log):
        raise RuntimeError
    log.close()
    log.write(0, {"x": 1.0})
    assert (wandb.exit_codes, wandb.logged) == ([1], [])


def test_offline_run_says_how_to_send_it(wandb: FakeWandb, run: RunDirectory) -> None:
    wandb.offline = True
    said: list[str] = []
    writer(run, said).close()
    assert said == [
        f"W&B is offline; send it with: wandb sync {run.path.resolve()}/wandb/offline-run-*"
    ]


def test_missing_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # what `import` takes for not installed
    with pytest.raises(ConfigError, match=r"pip install 'headrace\[wandb\]'"):
        ensure_wandb()


def test_folder_named_wandb_is_not_taken_for_the_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    try:
        with pytest.raises(ConfigError, match="not installed"):
            ensure_wandb()
    finally:
        sys.modules.pop("wandb", None)


def test_missing_key_is_one_sentence_and_a_missing_network_is_none(wandb: FakeWandb) -> None:
    wandb.fails["login"] = FakeUsageError("no key")
    with pytest.raises(ConfigError, match="WANDB_MODE=offline"):
        ensure_wandb()
    wandb.fails["login"] = FakeError("no network")
    ensure_wandb()
    del wandb.fails["login"]
    ensure_wandb()
    assert wandb.logins == 3


def test_offline_mode_asks_for_no_key(wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    ensure_wandb()
    assert wandb.logins == 0


def test_rows_that_take_the_place_of_cut_ones_have_numbers_of_their_own(
    wandb: FakeWandb, run: RunDirectory
) -> None:
    for start, resumed_at in enumerate((None, 100, 100)):
        log = WandbLog(run.path, "p", {}, on_message=lambda _: None)
        with MetricsWriter(
            run, tensorboard=False, resumed_at=resumed_at, start=start, wandb=log
        ) as metrics:
            for env_frames in (100, 200, 300)[bool(start) :]:
                metrics.write(env_frames, {})
    numbers = [number for number, _ in wandb.logged]
    assert len(numbers) == 7
    assert sorted(set(numbers)) == numbers
