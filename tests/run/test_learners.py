"""Several learners on one machine: what each gets, that they are as one, and how they end."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from headrace import RunConfig, train
from headrace.algorithms.base import Algorithm
from headrace.algorithms.impala import Impala
from headrace.config import from_dict, merged
from headrace.errors import ConfigError, PeerLost
from headrace.learner import checkpoint
from headrace.learner.group import ExchangeFailed
from headrace.pools.assignment import Assignment
from headrace.pools.shm import ShmPool
from headrace.presets import find
from headrace.records import PolicyState
from headrace.run import experience, learner_rank
from headrace.run.build import build
from headrace.run.compute import choose_compute
from headrace.run.learners import OtherLearners, draws_seed
from headrace.run.meeting import ensure_shares, spread_state
from headrace.run.share import (
    OneOfMany,
    Share,
    acting_devices,
    learner_devices,
    share_config,
    uncompiled,
)
from headrace.run.validate import check
from headrace.server.acting import Actor, initial_state
from headrace.telemetry.record import read_metrics


def a_config(out: Path | str = "", **settings: Any) -> RunConfig:
    base = {
        "env": "catch",
        "out": str(out),
        "device": "cpu",
        "precision": "float32",
        "tensorboard": False,
        "total_frames": 800,
        "learner_devices": "cpu,cpu",
        "server": {"num_envs": 8},
        "learning": {"unroll_steps": 7, "batch_unrolls": 8},
    }
    own = {} if "algorithm" in settings else find("catch").values
    if "algorithm" in settings:
        base.pop("learning")
    return from_dict(merged(merged(own, base), settings))


def newest(run: Path) -> checkpoint.Checkpoint:
    found, warnings = checkpoint.newest_whole(run / "checkpoints")
    assert warnings == []
    assert found is not None
    return found


# What each learner gets.


def test_each_learner_gets_an_equal_part() -> None:
    config = a_config(
        server={"num_envs": 12, "inference_batch": 6, "queue_unrolls": 9, "eval_envs": 2},
        learning={"batch_unrolls": 9},
        learner_devices="cpu,cpu,cpu",
        compute_threads=0,
        env_threads=7,
        workers={"num_workers": 6},
        remote={"listen": "127.0.0.1:4000"},
    )
    parts = [share_config(config, Share(rank, 3)) for rank in range(3)]
    for rank, part in enumerate(parts):
        assert (part.device, part.learner_devices) == ("cpu", "")
        assert part.server.num_envs == 4
        assert (part.server.inference_batch, part.server.queue_unrolls) == (2, 3)
        assert part.server.eval_envs == (0 if rank else 2)
        assert part.learning.batch_unrolls == 3
        assert (part.env_threads, part.workers.num_workers) == (2, 2)
        assert part.compute_threads == 0  # what fits a part of the cores is found with the network
        assert part.remote.listen == f"127.0.0.1:{4000 + rank}"
    any_port = a_config(remote={"listen": "127.0.0.1:0"})
    assert share_config(any_port, Share(1, 2)).remote.listen == "127.0.0.1:0"


def test_a_replay_is_divided_and_sac_is_not_compiled() -> None:
    config = a_config(
        env="pointmass",
        algorithm="sac",
        learning={"batch_unrolls": 64, "replay": {"replay_capacity": 1001, "replay_min": 11}},
    )
    part = share_config(config, Share(1, 2))
    assert (part.learning.replay.replay_capacity, part.learning.replay.replay_min) == (500, 6)
    assert part.compile == "off"


def test_who_waits_longer_for_sac_with_several_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headrace.run.compute.has_compiler", lambda: True)
    settings: dict[str, Any] = {"env": "pointmass", "algorithm": "sac"}
    long = {**settings, "total_frames": 10**8}
    assert "updates of sac are not compiled" in str(uncompiled(a_config(**long)))
    assert uncompiled(a_config(**long, learner_devices="cpu")) is None
    assert uncompiled(a_config(**long, compile="off")) is None
    assert uncompiled(a_config(**settings)) is None, "too short to compile with one learner"
    assert uncompiled(a_config()) is None


def test_replays_of_all_learners_must_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    learning = {"replay": {"replay_capacity": 100_000, "replay_place": "cpu"}}
    config = a_config(env="pointmass", algorithm="sac", learning=learning)
    room = {"nbytes": 10**12}
    monkeypatch.setattr(experience, "free_memory_nbytes", lambda: room["nbytes"])
    check(config)
    part = share_config(config, Share(0, 2))
    parts = build(
        part, resume_count=0, on_episodes=lambda *_: None, on_eval_episodes=lambda *_: None
    )
    parts.close()
    one = experience.replay_layout(
        parts.algorithm, parts.spec, parts.server_model, num_envs=part.server.num_envs
    ).nbytes
    room["nbytes"] = int(2.2 * one)  # two take 2 / 0.85 of one
    with pytest.raises(ConfigError, match="sequences for each of 2 learners takes"):
        check(config)
    room["nbytes"] = int(2.4 * one)
    check(config)


def test_environments_of_another_learner_keep_their_numbers_in_messages() -> None:
    grants = Assignment.of(8, batch_size=8, envs_per_message=4, max_envs_per_host=8)
    host: Any = SimpleNamespace(blocks=[0, 1])
    assert grants.span(host) == "0..7"
    assert grants.span(host, first_env=8) == "8..15"
    pool: Any = SimpleNamespace(
        _groups=[[(0, 4)], [(4, 8)]], _recipe=SimpleNamespace(env="catch", first_env=8)
    )
    assert ShmPool._label(pool, 1) == "worker 1 (environments 12..15 of catch)"


def test_noise_of_a_learner_is_its_own_in_every_session() -> None:
    def drawn(rank: int, resume_count: int) -> Tensor:
        parts = build(
            a_config(env="pointmass", algorithm="sac", learner_devices=""),
            resume_count=0,
            on_episodes=lambda *_: None,
            on_eval_episodes=lambda *_: None,
        )
        parts.close()
        told: list[bytes] = []

        def spread(data: bytes | None) -> bytes:
            told.append(data or told[0])
            return told[0]

        group: Any = SimpleNamespace(rank=0, spread=spread)
        seed = draws_seed(a_config(), resume_count)
        spread_state(parts, group, seed=seed)
        group.rank = rank
        spread_state(parts, group, seed=seed)
        algorithm: Any = parts.algorithm
        noise: Tensor = algorithm.draw(2).noise
        return noise

    first, second, later = drawn(0, 0), drawn(1, 0), drawn(1, 1)
    assert not torch.equal(first, second)
    assert not torch.equal(second, later)
    assert torch.equal(second, drawn(1, 0))


@pytest.mark.parametrize("hung_up", [True, False])
def test_a_learner_that_lost_the_others_says_so_unless_the_first_ends(
    monkeypatch: pytest.MonkeyPatch, hung_up: bool
) -> None:
    def receive(_: float) -> None:
        if hung_up:
            raise PeerLost("the parent is gone")

    def run_rank(*_: Any) -> None:
        raise ExchangeFailed("learners waited 9 s for each other")

    end = SimpleNamespace(
        receive=receive, settings={"config": {"env": "catch"}, "trust_code": False}
    )
    ignored: list[Any] = []
    monkeypatch.setattr(learner_rank, "WorkerEnd", SimpleNamespace(open=lambda: end))
    monkeypatch.setattr(learner_rank, "run_rank", run_rank)
    monkeypatch.setattr(learner_rank, "gc", SimpleNamespace(freeze=lambda: None))
    monkeypatch.setattr(
        learner_rank.signal, "signal", lambda number, act: ignored.append((number, act))
    )
    if hung_up:
        learner_rank.main()
    else:
        with pytest.raises(ExchangeFailed, match="waited 9 s"):
            learner_rank.main()
    assert ignored == [(signal.SIGTERM, signal.SIG_IGN)]


def test_a_death_at_the_end_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    dead = SimpleNamespace(
        account="OSError: no room", death=lambda: "dead", messages=list, printed=list
    )
    others: Any = object.__new__(OtherLearners)
    others._processes, others.devices, others._on_message = {1: dead}, ["cpu", "cpu"], said.append
    others.finish()
    assert said == ["learner 1 on cpu died at the end: OSError: no room"]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"server": {"num_envs": 9}}, "num_envs=9 cannot be divided.*say --num-envs 10"),
        ({"learning": {"batch_unrolls": 7}}, "batch_unrolls=7 .*say --batch-unrolls 8"),
        ({"inference": "worker"}, "leave out --inference worker"),
        ({"inference_devices": "cpu,cpu,cpu"}, "names 3 devices for 2 learners"),
        ({"cluster": {"cluster": "local"}}, "--cluster places one"),
        ({"learner_devices": "cpu,quantum"}, "--learner-devices cpu,quantum: no device named"),
        ({"learner_devices": "cpu,cuda:99"}, "^--learner-devices cpu,.* 'cuda:99'.*auto or cpu$"),
    ],
)
def test_what_cannot_be_is_named_before_anything_starts(
    settings: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        check(a_config(**settings))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"compile": "on"}, "leave out --compile on"),
        ({"actor_device": "cpu", "critic_device": "cpu"}, "leave out either"),
        ({"learning": {"replay": {"save_replay": True}}}, "leave out --save-replay"),
    ],
)
def test_what_sac_cannot_do_with_several_is_named(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        check(a_config(env="pointmass", algorithm="sac", **settings))


def test_all_is_every_gpu_or_one_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    for count, names in ((0, ["cpu"]), (1, ["cuda:0"]), (8, [f"cuda:{n}" for n in range(8)])):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        config = a_config(learner_devices="all", server={"num_envs": 8})
        assert [str(device) for device in learner_devices(config)] == names
        part = share_config(config, Share(0, len(names)))
        assert (part.device, part.server.num_envs) == (names[0], 8 // len(names))


def test_learners_of_two_kinds_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="must be of one kind"):
        learner_devices(a_config(learner_devices="cuda:0,cpu"))


def test_servers_act_where_they_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert acting_devices(a_config()) == ["", ""]
    assert acting_devices(a_config(inference_devices="cpu")) == ["cpu", "cpu"]
    config = a_config(learner_devices="cuda:0,cuda:1", inference_devices="cuda:2, cuda:3")
    part = share_config(config, Share(1, 2))
    assert (part.device, part.inference_devices) == ("cuda:1", "cuda:3")
    spec = find_spec(part)
    compute = choose_compute(part, spec)
    assert (str(compute.device), str(compute.acting)) == ("cuda:1", "cuda:3")
    with pytest.raises(ConfigError, match="this is about one learner"):
        choose_compute(config, spec)


def find_spec(config: RunConfig) -> Any:
    from headrace import catalog  # noqa: PLC0415 - of this helper alone

    return catalog.environment_family(config.env).spec(config.env, config.environment)


def test_a_rule_that_learns_alone_is_refused() -> None:
    ensure_shares(Impala)
    with pytest.raises(ConfigError, match="Algorithm does not average its gradients"):
        ensure_shares(Algorithm)


def test_environments_are_those_of_one_learner_and_so_are_their_actions() -> None:
    """In lockstep: what the shares see and do, side by side, is what one server sees and does."""

    def played(share: Share) -> list[tuple[Tensor, Tensor]]:
        config = a_config(lockstep=True, learner_devices=",".join(["cpu"] * share.size))
        parts = build(
            share_config(config, share),
            resume_count=0,
            on_episodes=lambda *_: None,
            on_eval_episodes=lambda *_: None,
            share=share,
        )
        parts.algorithm.model.requires_grad_(False)
        parts.weights.publish(parts.algorithm.model, 0)
        seen = []
        for _ in range(12):
            pool: Any = parts.training.pool
            step = pool.receive(0.0)
            action = parts.training._answer(step, parts.weights.pull())  # type: ignore[union-attr]
            seen.append((torch.from_numpy(step.observation), torch.from_numpy(action)))
            pool.reply(action)
        parts.close()
        return seen

    whole = played(Share())
    shares = [played(Share(rank, 2)) for rank in range(2)]
    for together, first, second in zip(whole, *shares, strict=True):
        for place in range(2):
            assert torch.equal(together[place], torch.cat((first[place], second[place])))


def test_one_of_many_allows_an_action_in_every_row() -> None:
    config = a_config("", env="catch", learner_devices="")
    parts = build(
        config, resume_count=0, on_episodes=lambda *_: None, on_eval_episodes=lambda *_: None
    )
    model: Any = parts.server_model
    actor = OneOfMany(Actor(algorithm=parts.algorithm, model=model), Share(1, 2))
    state: PolicyState = initial_state(parts.spec, model, 3, torch.device("cpu"))
    mask = torch.tensor([[True, False, False]] * 3)
    step, after = actor.act(
        state, state.stack[:, -1], torch.zeros(3), torch.ones(3, dtype=torch.bool), mask
    )
    assert step.action.tolist() == [0, 0, 0]
    assert torch.isfinite(step.log_prob).all()
    assert after.stack.shape == state.stack.shape
    parts.close()


# Whole runs.


def equal_runs(tmp_path: Path, **settings: Any) -> None:
    results = {}
    for devices in ("", "cpu,cpu"):
        out = tmp_path / (devices or "one")
        results[devices] = train(
            a_config(out, lockstep=True, learner_devices=devices, log_interval_s=1e-9, **settings)
        )
    one, two = (results[devices] for devices in ("", "cpu,cpu"))
    for name in ("updates", "samples", "agent_steps", "episodes", "return_mean", "return_max"):
        assert one.metrics[name] == two.metrics[name], name
    assert one.metrics["updates"] >= 10
    weights = [newest(result.run).tensors for result in (one, two)]
    # A sum over a batch in two parts is rounded otherwise: float32's tolerance, not bits.
    for name, expected in weights[0]["weights"].items():
        torch.testing.assert_close(
            weights[1]["weights"][name], expected, rtol=1e-4, atol=1e-6, msg=name
        )
    start = newest_of_first(one.run)
    assert any(not torch.equal(start[name], weights[0]["weights"][name]) for name in start), (
        "nothing was learned"
    )


def newest_of_first(run: Path) -> Mapping[str, Tensor]:
    path = run / "checkpoints" / "agent_steps_000000000000"
    return checkpoint.read(path).tensors["weights"]


@pytest.mark.net
def test_in_lockstep_two_learners_are_one_with_the_whole_batch(tmp_path: Path) -> None:
    equal_runs(tmp_path, network={"normalize_observations": True})


@pytest.mark.net
@pytest.mark.slow
@pytest.mark.parametrize("lstm_size", [0, 8])
def test_so_they_are_with_ppo(tmp_path: Path, lstm_size: int) -> None:
    learning = {
        "unroll_steps": 7,
        "batch_unrolls": 8,
        "minibatches": 1,
        "epochs": 3,
        "reward_transform": "normalize",
    }
    network = {"network": "mlp", "lstm_size": lstm_size, "normalize_observations": True}
    equal_runs(tmp_path, algorithm="ppo", learning=learning, network=network)


@pytest.mark.net
@pytest.mark.slow
def test_a_signal_ends_all_and_another_number_of_learners_goes_on(tmp_path: Path) -> None:
    def on_update(version: int, _: Mapping[str, Tensor]) -> None:
        if version == 5:  # as a scheduler does that ends a whole job: to every process
            children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text()
            for pid in (*map(int, children.split()), os.getpid()):
                if (
                    pid == os.getpid()
                    or b"learner_rank" in Path(f"/proc/{pid}/cmdline").read_bytes()
                ):
                    os.kill(pid, signal.SIGTERM)

    run = tmp_path / "run"
    config = a_config(
        run,
        total_frames=10**9,
        server={"eval_envs": 2},
        log_interval_s=0.01,
        inference_devices="cpu",
    )
    result = train(config, on_update=on_update)
    assert not result.finished
    counters = newest(run).meta["counters"]
    assert counters["updates"] == 5
    # The others hear of the end at the next meeting, and learn no further.
    assert counters["samples"] == result.metrics["samples"] == 5 * 8 * 7
    assert counters["agent_steps"] >= counters["samples"]
    assert result.metrics["eval_episodes"] >= 0
    result = train(
        resume=run,
        changes={"learner_devices": "", "inference_devices": "", "total_frames": 2000},
    )
    assert result.finished
    assert result.metrics["updates"] > 5
    rows = read_metrics(run / "metrics.jsonl")
    for name in ("env_frames", "agent_steps", "updates", "samples", "episodes"):
        values = [row[name] for row in rows]
        assert values == sorted(values), name


@pytest.mark.net
@pytest.mark.slow
def test_two_learners_go_on_from_what_one_has_saved_in_lockstep(tmp_path: Path) -> None:
    """Its checkpoint has environments, and as many returns as it has columns: of other shapes."""
    run = tmp_path / "run"
    learning = {"reward_transform": "normalize"}
    train(a_config(run, lockstep=True, learner_devices="", learning=learning))
    assert newest(run).meta["system"] is not None
    result = train(resume=run, changes={"learner_devices": "cpu,cpu", "total_frames": 1600})
    assert result.finished
    assert result.metrics["agent_steps"] == 1600
    assert newest(run).meta["system"] is None
    assert "new episodes start" in (run / "log.txt").read_text()


@pytest.mark.net
@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["r2d2", "sac"])
def test_learners_with_replays(tmp_path: Path, algorithm: str) -> None:
    settings: dict[str, Any] = {
        "r2d2": {
            "env": "catch",
            "network": {"network": "mlp", "lstm_size": 8},
            "learning": {
                "unroll_steps": 8,
                "burn_in_steps": 4,
                "batch_unrolls": 8,
                "replay": {"replay_capacity": 2000, "replay_min": 60},
            },
        },
        "sac": {
            "env": "pointmass",
            "pool": "shm",
            "network": {"normalize_observations": True},
            "learning": {
                "batch_unrolls": 32,
                "replay": {"replay_capacity": 4000, "replay_min": 400, "priority_exponent": 0.6},
            },
        },
    }[algorithm]
    out = tmp_path / "run"
    result = train(a_config(out, algorithm=algorithm, total_frames=4000, **settings))
    assert result.finished
    assert result.metrics["updates"] > 10
    assert result.metrics["agent_steps"] >= 4000
    before = result.metrics["updates"]
    resumed = train(resume=out, changes={"total_frames": 6000})
    assert resumed.finished
    assert resumed.metrics["updates"] > before
    assert "learner 1: replay: " in (out / "log.txt").read_text()
