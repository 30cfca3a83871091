"""What goes wrong in worker processes, with real processes: named, mended, and never spoilt."""

import errno
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headrace import catalog
from headrace.errors import ConfigError, PeerLost
from headrace.pools.settings import WorkerConfig
from headrace.pools.shm import ShmPool, WorkerEnvs
from headrace.pools.shm_layout import RECORD
from headrace.steps import EnvStep

ENV = "worker_envs:ECHO"
ENV_ID, COUNT, ACTION, SEED = range(4)
GENERATION = 1 << 32  # run ids of one

Make = Callable[..., ShmPool]


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def make(said: list[str]) -> Iterator[Make]:
    pools = []

    def pool_of(
        settings: dict[str, Any] | None = None,
        *,
        num_envs: int = 8,
        batch_size: int = 4,
        full_batches: bool = False,
        **workers: Any,
    ) -> ShmPool:
        family = catalog.environment_family(ENV)
        recipe = WorkerEnvs(
            env=ENV,
            settings=settings or {},
            spec=family.spec(ENV, family.config_type(**(settings or {}))),
            num_envs=num_envs,
            seed=3,
        )
        config = WorkerConfig(**({"num_workers": 2} | workers))
        pools.append(
            ShmPool(
                recipe,
                batch_size=batch_size,
                workers=config,
                on_message=said.append,
                full_batches=full_batches,
            )
        )
        return pools[-1]

    yield pool_of
    for pool in pools:
        pool.close()


def answer(pool: ShmPool, step: EnvStep) -> None:
    action = np.zeros((len(step.env_id), *pool.spec.action_shape), pool.spec.action_dtype)
    pool.reply(action)


def play(pool: ShmPool, until: Callable[[EnvStep], bool], limit_s: float = 60.0) -> list[EnvStep]:
    """Plays until a step is what the caller waits for; keeps copies."""
    steps = []
    end_s = time.monotonic() + limit_s
    while time.monotonic() < end_s:
        step = pool.receive(1.0)
        if step is None:
            continue
        steps.append(EnvStep(*(v.copy() if isinstance(v, np.ndarray) else v for v in step)))
        answer(pool, step)
        if until(steps[-1]):
            return steps
    raise AssertionError("it never came")


def all_there(num_envs: int) -> Callable[[EnvStep], bool]:
    seen: set[int] = set()

    def done(step: EnvStep) -> bool:
        seen.update(step.env_id.tolist())
        return len(seen) == num_envs

    return done


def restarted(generation: int, num_envs: int) -> Callable[[EnvStep], bool]:
    """Until so many environments have begun their run of this generation."""
    seen: set[int] = set()

    def done(step: EnvStep) -> bool:
        seen.update(step.env_id[step.run_id == generation * GENERATION].tolist())
        return len(seen) == num_envs

    return done


def check_runs(steps: list[EnvStep]) -> None:
    """Of each environment no step is missing or comes twice, and a new run is a plain reset."""
    at: dict[int, tuple[int, int]] = {}
    for step in steps:
        assert (np.diff(step.env_id) > 0).all()
        np.testing.assert_array_equal(step.observation[:, ENV_ID], step.env_id)
        for row, env_id in enumerate(step.env_id.tolist()):
            run, count = int(step.run_id[row]), int(step.observation[row, COUNT])
            if env_id in at and at[env_id][0] == run:
                assert count == at[env_id][1] + 1
            else:
                assert run > at.get(env_id, (-1, 0))[0]
                assert (count, step.reward[row]) == (0, 0.0)
                assert step.reset[row]
                assert not step.terminated[row]
                assert not step.truncated[row]
            at[env_id] = run, count


def check_continuous(steps: list[EnvStep]) -> None:
    """No environment's step is missing or comes twice, from wherever it is met first."""
    count: dict[int, float] = {}
    for step in steps:
        for row, env_id in enumerate(step.env_id.tolist()):
            assert step.observation[row, COUNT] == count.get(env_id, step.observation[row, COUNT])
            count[env_id] = step.observation[row, COUNT] + 1


def test_a_killed_worker_is_named_and_its_environments_start_anew(
    make: Make, said: list[str]
) -> None:
    pool = make()
    steps = play(pool, all_there(8))
    before = steps[0].observation[0, SEED]
    victim = pool.worker_pids[0]
    os.kill(victim, signal.SIGKILL)
    steps += play(pool, restarted(1, 4))
    check_runs(steps)
    assert pool.deaths == 1
    assert victim not in pool.worker_pids
    assert said == [
        f"worker 0 (environments 0..3 of {ENV}) died: killed (SIGKILL): out of memory, or "
        "somebody killed it; its environments start anew"
    ]
    anew = [step for step in steps if (step.run_id > 0).any()][-1]
    assert set(anew.env_id[anew.run_id > 0].tolist()) <= {0, 1, 2, 3}
    assert (anew.observation[anew.run_id > 0, SEED] != before).all()


def test_the_others_go_on_meanwhile(make: Make) -> None:
    pool = make(num_envs=4, batch_size=1)
    steps = play(pool, all_there(4))
    os.kill(pool.worker_pids[0], signal.SIGSTOP)  # silent for as long as we like
    seen = len(steps)
    others = itertools.count()  # their steps; what was under way of the silent one comes first
    steps += play(pool, lambda step: step.env_id[0] in (2, 3) and next(others) >= 50)
    assert {int(step.env_id[0]) for step in steps[-10:]} <= {2, 3}
    assert len(steps) > seen + 10
    assert pool.deaths == 0
    os.kill(pool.worker_pids[0], signal.SIGCONT)
    check_runs(steps)


def test_many_deaths_spoil_nothing(make: Make) -> None:
    pool = make(max_worker_deaths=100)
    steps = play(pool, all_there(8))
    for kill in range(6):
        os.kill(pool.worker_pids[kill % 2], signal.SIGKILL)
        deaths = pool.deaths
        steps += play(pool, lambda _, deaths=deaths: pool.deaths > deaths)
        steps += play(pool, lambda _: len(pool.worker_pids) == 2)
    steps += play(pool, all_there(8))
    check_runs(steps)
    assert pool.deaths == 6


def test_an_exception_in_a_step_is_mended_and_named(
    make: Make, said: list[str], tmp_path: Path
) -> None:
    once = str(tmp_path / "once")
    pool = make({"trouble": "raise", "trouble_at": 3, "once": once})
    check_runs(play(pool, restarted(1, 4)))
    assert pool.deaths == 1
    assert "ValueError: environment 0: the moon is in the wrong quarter" in said[0]
    assert "worker_envs.py" in said[0]


def test_an_exception_in_every_reset_ends_the_run_with_its_cause(make: Make) -> None:
    pool = make({"trouble": "raise in reset", "trouble_env": 7}, max_worker_deaths=3)
    with pytest.raises(PeerLost, match=r"worker 1 .* died 3 times in a row, first: .* the moon"):
        play(pool, lambda _: False)


@pytest.mark.parametrize(
    ("trouble", "cause"),
    [("exit", "left by itself with exit code 7"), ("segfault", "killed by SIGSEGV")],
)
def test_other_ends_have_a_cause_too(make: Make, trouble: str, cause: str) -> None:
    pool = make({"trouble": trouble}, max_worker_deaths=1)
    with pytest.raises(PeerLost, match=cause):
        play(pool, lambda _: False)


def test_a_hanging_step_is_killed_where_it_hangs(
    make: Make, said: list[str], tmp_path: Path
) -> None:
    once = str(tmp_path / "once")
    pool = make({"trouble": "hang", "trouble_at": 3, "once": once}, step_timeout_s=1.0)
    check_runs(play(pool, restarted(1, 4)))
    assert "gave no step after 1 s and was killed: File" in said[0]
    assert "in _hang" in said[0]


def test_a_stopped_worker_is_replaced(make: Make, said: list[str]) -> None:
    pool = make(step_timeout_s=1.0)
    steps = play(pool, all_there(8))
    os.kill(pool.worker_pids[1], signal.SIGSTOP)
    check_runs(steps + play(pool, restarted(1, 4)))
    assert "worker 1" in said[0]
    assert "somebody may have stopped it" in said[0]


def test_full_batches_wait_for_the_restart(make: Make) -> None:
    pool = make(batch_size=8, full_batches=True)
    steps = play(pool, all_there(8))
    os.kill(pool.worker_pids[0], signal.SIGKILL)
    steps += play(pool, restarted(1, 4))
    steps += play(pool, lambda _: True)
    assert {len(step.env_id) for step in steps} == {8}
    check_runs(steps)


def test_records_of_the_dead_are_ignored(make: Make) -> None:
    pool = make()
    play(pool, all_there(8))
    os.kill(pool.worker_pids[0], signal.SIGKILL)
    play(pool, restarted(1, 4))
    # What an earlier process of worker 0 could have written before it died.
    for _ in range(3):
        os.write(pool._ready_end, RECORD.pack(0, 0, 0))
    after = play(pool, lambda step: bool(step.observation[0, COUNT] > 30))
    check_continuous(after)


def test_rows_that_waited_for_the_server_die_with_their_worker(make: Make) -> None:
    pool = make(num_envs=4, batch_size=4, batch_wait_ms=1.0, num_workers=1)
    steps = play(pool, all_there(4))
    time.sleep(0.2)  # its next rows are in the table
    os.kill(pool.worker_pids[0], signal.SIGKILL)
    time.sleep(0.2)
    steps += play(pool, restarted(1, 4))
    check_runs(steps)


def test_what_environments_print_is_told_once(make: Make, said: list[str]) -> None:
    pool = make({"trouble": "print"})
    play(pool, lambda _: pool.lines_printed == 10)
    assert [line.partition(" printed: ")[2] for line in said] == [
        "line 0",
        "line 1",
        "line 2 (from now on its lines are only counted)",
    ]
    assert all(line.startswith("worker 0 (environments 0..3 of") for line in said)


def test_a_closed_output_costs_nothing_but_the_last_words(make: Make, said: list[str]) -> None:
    pool = make({"trouble": "close output"})
    play(pool, lambda step: bool(step.observation[0, COUNT] > 30))
    assert (pool.deaths, said) == (0, [])
    os.kill(pool.worker_pids[0], signal.SIGKILL)
    play(pool, restarted(1, 4))


def test_long_infos_are_left_out_with_one_note(make: Make, said: list[str]) -> None:
    pool = make({"trouble": "long info"})
    steps = play(pool, lambda _: bool(said))
    steps += play(pool, lambda step: bool(step.observation[0, COUNT] > 60))
    assert all(step.episode_info is None for step in steps)
    [line] = said  # though each worker has it to say
    assert "final info of over 1024 bytes" in line


@pytest.mark.parametrize("space", ["discrete", "multi", "box"])
def test_actions_masks_and_infos_of_every_kind_cross(make: Make, space: str) -> None:
    pool = make({"space": space, "mask": space != "box", "shape": (4,)})
    sent: dict[int, float] = {}
    infos = 0
    for _ in range(60):
        step = pool.receive(30.0)
        assert step is not None
        for row, env_id in enumerate(step.env_id.tolist()):
            assert step.observation[row, ACTION] == sent.get(env_id, 0.0)
        if step.action_mask is not None:
            choices = np.arange(pool.spec.action_mask_size) + step.observation[:, [COUNT]]
            np.testing.assert_array_equal(step.action_mask, choices % 2 == 0)
        for row, info in (step.episode_info or {}).items():
            assert info == {"count": step.observation[row, COUNT]}
            assert step.final_observation is not None
            np.testing.assert_array_equal(step.final_observation[row], -step.observation[row])
            infos += 1
        action = np.stack([pool.spec.action_space.sample() for _ in step.env_id])
        action = action.astype(pool.spec.action_dtype)
        pool.reply(action)
        first = action.reshape(len(action), -1)[:, 0]
        sent.update(zip(step.env_id.tolist(), first.tolist(), strict=True))
    assert infos > 5
    assert (step.action_mask is not None) == (space != "box")


def test_too_little_memory_is_one_sentence(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = set(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(os, "posix_fallocate", no_space)
    with pytest.raises(ConfigError, match=r"workers need .* MiB of shared memory and .* MiB are"):
        make()
    assert set(os.listdir("/proc/self/fd")) <= before


def test_more_memory_than_there_is_is_refused_before_it_is_touched(make: Make) -> None:
    with pytest.raises(ConfigError, match="use fewer environments or smaller observations"):
        make({"shape": (1 << 12,)}, num_envs=10_000_000, batch_size=10_000_000)


MAIN = """
import json, os, sys, time
import numpy as np
from headrace import catalog
from headrace.pools.settings import WorkerConfig
from headrace.pools.shm import ShmPool, WorkerEnvs

name, settings = "worker_envs:ECHO", {"trouble": "hang", "trouble_at": 2}
family = catalog.environment_family(name)
pool = ShmPool(
    WorkerEnvs(env=name, settings=settings, spec=family.spec(name, family.config_type(**settings)),
               num_envs=4, seed=1),
    batch_size=2, workers=WorkerConfig(num_workers=2),
)
for _ in range(20):
    step = pool.receive(0.1)
    if step is not None:
        pool.reply(np.zeros(len(step.env_id), dtype=np.int64))
sys.stdout.write(json.dumps(pool.worker_pids) + "\\n")
sys.stdout.flush()
time.sleep(1000.0)
"""


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] in "ZX"
    except FileNotFoundError:
        return True


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_worker_outlives_the_main_process(how: signal.Signals, tmp_path: Path) -> None:
    script = tmp_path / "main.py"
    script.write_text(MAIN)
    path = os.pathsep.join([str(Path(__file__).parents[1] / "pools")])
    with subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    ) as main:
        assert main.stdout is not None
        pids = json.loads(main.stdout.readline())
        assert len(pids) == 2
        assert not any(gone(pid) for pid in pids)
        main.send_signal(how)
    for _ in range(1000):
        if all(gone(pid) for pid in pids):
            return
        time.sleep(0.01)
    raise AssertionError("a worker lives on")
