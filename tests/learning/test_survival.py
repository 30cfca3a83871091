"""Workers are killed at random while `catch` is learned: nothing is spoilt, and it is learned."""

from __future__ import annotations

import os
import random
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from headrace import evaluate, load, preset, train
from headrace.experience.unrolls import UnrollTable

DEATHS = 10


class Killer:
    """Kills a worker of this process whenever as many agent steps have passed again."""

    def __init__(self, every_steps: int) -> None:
        self.killed = 0
        self._every_steps = every_steps
        self._random = random.Random(1)
        self._lock = threading.Lock()  # guards the two counters

    def __call__(self, agent_steps: int) -> None:
        with self._lock:
            if agent_steps < (self.killed + 1) * self._every_steps:
                return
            workers = psutil.Process().children()
            if workers:
                os.kill(self._random.choice(workers).pid, signal.SIGKILL)
                self.killed += 1


@pytest.mark.parametrize("inference", ["server", pytest.param("worker", marks=pytest.mark.slow)])
def test_catch_is_learned_though_workers_die(
    inference: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Workers that act import torch, so each restart costs seconds: they get more steps for each.
    killer = Killer(every_steps=7_500 if inference == "server" else 25_000)
    seen = {"unrolls": 0, "mixed": 0, "steps": 0}
    run_of: dict[tuple[int, int], int] = {}  # slot and row -> run id, as they were written
    append, gather = UnrollTable.append, UnrollTable.gather

    def noting_append(table: UnrollTable, step: Any, *rest: Any, **more: Any) -> None:
        append(table, step, *rest, **more)
        seen["steps"] += len(step.env_id)
        # After a full slot the environment stands at row 1 of its next one, whose row 0 is a copy.
        for env, run in zip(step.env_id.tolist(), step.run_id.tolist(), strict=True):
            slot, row = int(table._slot[env]), int(table._row[env])
            run_of[slot, row - 1] = run
            if row == 1:
                run_of[slot, 0] = run
        killer(seen["steps"])

    def checking_gather(table: UnrollTable, slots: list[int]) -> Any:
        for slot in slots:
            runs = {run_of[slot, row] for row in range(table.rows - 1)}
            seen["unrolls"] += 1
            seen["mixed"] += len(runs) != 1
        return gather(table, slots)

    if inference == "server":
        monkeypatch.setattr(UnrollTable, "append", noting_append)
        monkeypatch.setattr(UnrollTable, "gather", checking_gather)
    config = preset(
        "catch",
        "catch",
        out=str(tmp_path / "run"),
        device="cpu",
        precision="float32",
        tensorboard=False,
        log_interval_s=0.2,
        total_frames=150_000 if inference == "server" else 300_000,
        pool="shm",
        inference=inference,
        workers={"num_workers": 2, "max_worker_deaths": 1000},
    )
    rows: list[Any] = []

    def on_row(row: Any) -> None:
        rows.append(row)
        if inference == "worker":
            killer(int(row["agent_steps"]))

    result = train(config, on_row=on_row)
    assert result.finished
    assert killer.killed >= DEATHS
    assert int(result.metrics["worker_deaths"]) >= DEATHS
    if inference == "server":
        assert seen["unrolls"] > 100
        assert seen["mixed"] == 0
    returns = evaluate(load(tmp_path / "run", device="cpu"), episodes=200, seed=7).returns
    assert np.mean(returns) >= 0.9
