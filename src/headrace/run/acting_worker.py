"""The acting worker: steps its share of the environments and acts for them, in one loop.

    block of weights ---- pull ----> model
                                       |
    environments <--- actions --- seat: act      the same functions as in the server
         |                             |
         +------ steps --------------> rows ---> its slots of the shared table
    pipe of full slots <--- put ----------------+
    control pipe ---------> slots that are free again; at its end the parent is gone

Run as a program by `run.acting_workers`. An exception ends it; the parent decides whether to start
it again.
"""

from __future__ import annotations

import contextlib
import gc
import mmap
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from headrace import catalog
from headrace.config import RunConfig, from_dict
from headrace.errors import PeerLost
from headrace.experience.shared import Columns, Share, WorkerSlots
from headrace.networks.models import lower_precision
from headrace.networks.modes import frozen
from headrace.pools.processes import WorkerEnd
from headrace.run.acting_workers import (
    BEATS,
    DROPPED,
    ENOUGH,
    STEPS,
    UNFINISHED,
    make_table,
    tally_of,
)
from headrace.run.build import exploration, make_algorithm, make_model
from headrace.run.experience import spreads_ends
from headrace.run.pools import make_pool
from headrace.run.seeds import Use, derived_seed
from headrace.run.system import choose_precision, keep_memory
from headrace.run.worker import generation_seed
from headrace.server.acting import Actor, initial_state
from headrace.server.server import Seat
from headrace.specs import EnvSpec
from headrace.telemetry.metrics import Waits
from headrace.transport.messages import ensure_same_spec
from headrace.weights import WeightsCopy

_CPU = torch.device("cpu")
_WAIT_S = 0.1  # longest wait without a beat
_REPORT_S = 0.2


class Reports:
    """What the parent is told from time to time: episodes, waits, turnaround."""

    def __init__(self, end: WorkerEnd) -> None:
        self.waits = Waits()
        self._end = end
        self._episodes: list[tuple[int, float, int, Mapping[str, float]]] = []
        self._reported_s = time.monotonic()

    def on_episodes(
        self,
        env_id: NDArray[np.int32],
        returns: NDArray[np.float64],
        lengths: NDArray[np.int64],
        infos: Sequence[Mapping[str, float]],
    ) -> None:
        """Keeps episodes that ended."""
        ended = zip(env_id.tolist(), returns.tolist(), lengths.tolist(), infos, strict=True)
        self._episodes += ended

    def note(self, text: str) -> None:
        """Tells what is worth a line."""
        self._end.status({"note": text})

    def report(self, seat: Seat) -> None:
        """Tells what has come up, if it is time to."""
        now_s = time.monotonic()
        if now_s - self._reported_s < _REPORT_S:
            return
        self._reported_s = now_s
        self._end.status(
            {
                "episodes": self._episodes,
                "waits": self.waits.read(),
                "turnaround_s": seat.turnaround_s.read(),
            }
        )
        self._episodes = []


def run_acting_worker(
    seat: Seat,
    weights: WeightsCopy,
    slots: WorkerSlots,
    *,
    tallies: NDArray[np.int64],
    worker: int,
    reports: Reports,
) -> None:
    """Acts for its environments until the parent is gone.

    Args:
        seat: The environments, and what is kept for them.
        weights: Of the model that acts.
        slots: Where unrolls go.
        tallies: Of all workers.
        worker: Which of them this one is.
        reports: To the parent.

    Raises:
        PeerLost: the parent is done or gone.
    """
    unrolls = seat.unrolls
    if unrolls is None:
        raise RuntimeError("an acting worker has nothing to do but to fill unrolls")
    tally = tallies[worker]
    tally[BEATS] += 1  # ready
    while weights.pull() < 0:
        slots.listen(_WAIT_S)
        tally[BEATS] += 1
    while True:
        while tallies[:, STEPS].sum() >= tallies[0, ENOUGH]:
            slots.listen(_WAIT_S)
            tally[BEATS] += 1
        seat.serve(weights.pull, _WAIT_S, reports.waits)
        tally[STEPS] = seat.agent_steps
        tally[UNFINISHED] = unrolls.unfinished()
        tally[DROPPED] = unrolls.dropped_unrolls
        tally[BEATS] += 1
        before_s = time.perf_counter()
        while not slots.wait_for_space(_WAIT_S):
            tally[BEATS] += 1
        reports.waits.add("server_for_slots", time.perf_counter() - before_s)
        reports.report(seat)


def make_worker(
    config: RunConfig, settings: Mapping[str, Any], slots: WorkerSlots, reports: Reports
) -> tuple[Seat, WeightsCopy]:
    """Builds what acts; starts the environments last."""
    share, generation = Share(*settings["share"]), settings["generation"]
    worker, resume_count = settings["worker"], settings["resume_count"]
    spec: EnvSpec = catalog.environment_family(config.env).spec(config.env, config.environment)
    ensure_same_spec(spec, settings["spec"])
    model: Any = frozen(make_model(config, spec, _CPU))
    algorithm = make_algorithm(config, model, spec, torch.float32)  # it acts, and never updates
    lower_precision(model, choose_precision(config.precision, _CPU))
    unrolls = make_table(
        spec,
        model,
        slots,
        num_envs=share.num_envs,
        experience=algorithm.experience,
        num_slots=settings["num_slots"],
        allocate=Columns(_mapped(settings["fds"]["unrolls"])),
    )
    unrolls.spreads_ends = spreads_ends(config, algorithm.experience)
    unrolls.first_env, unrolls.generation = share.first_env, generation
    ladder = exploration(algorithm, config.server.num_envs)
    generator = torch.Generator()
    generator.manual_seed(
        derived_seed(config.seed, Use.ACTING_WORKER, resume_count, worker, generation)
    )
    environments = derived_seed(config.seed, Use.TRAINING_ENVIRONMENTS, resume_count)
    seat = Seat(
        make_pool(
            config,
            num_envs=share.num_envs,
            batch_size=share.max_batch,
            seed=generation_seed(environments, generation),
            first_env=share.first_env,
            in_process=True,
            on_message=reports.note,
        ),
        Actor(algorithm=algorithm, model=model, generator=generator),
        initial_state(spec, model, 1, _CPU),
        unrolls=unrolls,
        on_episodes=reports.on_episodes,
        device=_CPU,
        exploration=None if ladder is None else ladder[share.first_env :][: share.num_envs],
    )
    return seat, WeightsCopy(model, _mapped(settings["fds"]["weights"]))


def _mapped(fd: int) -> mmap.mmap:
    return mmap.mmap(fd, os.fstat(fd).st_size)


def main() -> None:
    """Takes the settings from the parent and works until it leaves."""
    end = WorkerEnd.open()
    keep_memory()
    torch.set_num_threads(1)
    settings = end.settings
    share, reports = Share(*settings["share"]), Reports(end)
    slots = WorkerSlots(
        settings["free"],
        reserve=share.max_batch,
        generation=settings["generation"],
        full_fd=settings["full_fd"],
        receive=end.receive,
    )
    seat, weights = make_worker(from_dict(settings["config"]), settings, slots, reports)
    tallies = tally_of(_mapped(settings["fds"]["tally"]))
    with contextlib.suppress(PeerLost):
        run_acting_worker(
            seat, weights, slots, tallies=tallies, worker=settings["worker"], reports=reports
        )
    seat.pool.close()
    gc.freeze()  # else Python's last search for garbage goes through all of torch for a second


if __name__ == "__main__":
    main()
