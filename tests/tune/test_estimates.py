"""What one more core or GPU would bring, from rates that are known."""

from __future__ import annotations

import pytest

from headrace.bench.end_to_end import ceiling_of
from headrace.tune.estimates import Stages, bound, estimate


def stages(
    environment: float, inference: float, learner_samples: float, *, share: float, cores: int
) -> Stages:
    ceiling = ceiling_of(
        environment, inference, learner_samples, samples_per_agent_step=share, cores=cores
    )
    return Stages.of(
        ceiling._asdict(), samples_per_agent_step=share, cores=cores, workers_act=False
    )


def test_one_more_core_helps_where_core_time_limits() -> None:
    # 8 ms environment, 1 ms inference, 1 ms learner: 10 ms of core time a step.
    alone = stages(125.0, 1000.0, 4000.0, share=4.0, cores=2)
    assert bound(alone, 2) == pytest.approx(200.0)
    found = estimate(alone, agent_steps_per_s=150.0)
    assert found.bound == pytest.approx(200.0)
    assert found.one_more_core == pytest.approx(150.0 * 3 / 2)
    assert found.one_more_gpu_at_most == pytest.approx(250.0)


def test_no_core_helps_a_learner_on_its_one_thread() -> None:
    # 1 ms environment and inference together, 9 ms learner: two cores already leave one idle.
    alone = stages(2000.0, 2000.0, 1000.0 / 9, share=1.0, cores=2)
    assert bound(alone, 2) == bound(alone, 3) == pytest.approx(1000.0 / 9)
    found = estimate(alone, agent_steps_per_s=100.0)
    assert found.one_more_core == 100.0
    assert found.one_more_gpu_at_most == pytest.approx(4000.0)


def test_the_server_is_one_thread_unless_workers_act() -> None:
    alone = stages(10_000.0, 100.0, 10_000.0, share=1.0, cores=4)
    assert bound(alone, 4) == pytest.approx(100.0)
    assert bound(alone._replace(workers_act=True), 4) == pytest.approx(4 / 0.0102)


def test_with_a_gpu_cores_belong_to_environments() -> None:
    alone = Stages(
        environment=1000.0,
        inference=4000.0,
        learner=2000.0,
        samples_per_agent_step=4.0,
        cores=4,
        on_gpu=True,
        workers_act=False,
    )
    assert bound(alone, 4) == pytest.approx(1000.0)
    assert bound(alone, 5) == pytest.approx(1250.0)
    assert bound(alone, 8) == pytest.approx(4000 / 3)  # inference and learner share it
    found = estimate(alone, agent_steps_per_s=800.0)
    assert found.one_more_core == pytest.approx(1000.0)
    assert found.one_more_gpu_at_most == pytest.approx(1000.0)


def test_in_turns_a_core_helps_environments_alone() -> None:
    # 4 ms of environments on one thread, 1 ms inference, 1 ms learner, one after the other.
    turns = stages(250.0, 1000.0, 1000.0, share=1.0, cores=2)._replace(turns=True)
    assert bound(turns, 2) == pytest.approx(250.0)
    assert bound(turns, 4) == pytest.approx(1000.0 / 3)
    inline = turns._replace(inline=True)
    assert bound(inline, 2) == bound(inline, 3) == pytest.approx(1000.0 / 6)
    found = estimate(inline, agent_steps_per_s=150.0)
    assert found.one_more_core == 150.0
    assert found.one_more_gpu_at_most == pytest.approx(250.0)  # no core of their own


def test_inline_environments_share_the_thread_of_the_server() -> None:
    alone = stages(1000.0, 1000.0, 1000.0, share=1.0, cores=4)
    assert bound(alone, 4) == pytest.approx(1000.0)
    assert bound(alone._replace(inline=True), 4) == pytest.approx(500.0)


def test_in_turns_a_second_gpu_is_of_no_use() -> None:
    alone = Stages(
        environment=1000.0,
        inference=1000.0,
        learner=1000.0,
        samples_per_agent_step=4.0,
        cores=4,
        on_gpu=True,
        workers_act=False,
        turns=True,
    )
    found = estimate(alone, agent_steps_per_s=300.0)
    assert found.bound == found.one_more_gpu_at_most == pytest.approx(1000.0 / 3)


def test_nothing_makes_a_run_slower() -> None:
    alone = stages(10.0, 1000.0, 1000.0, share=1.0, cores=2)
    # On a machine that was busy when the stages were measured.
    assert estimate(alone, agent_steps_per_s=50.0).one_more_gpu_at_most == 50.0
