"""A worker host that acts: steps its environments with weights of its own and sends whole unrolls.

    stream   WEIGHTS, in chunks ---> model
             SLOTS: credits           |
                |     environments <--+-- actions --- seat: act    by the server's functions
                |          |                           |
                |          +-------- steps ----------> rows ---> slots of this host's own
                +---> acts while there are some                          |
             UNROLL, one at a time <-------------------------------------+
             REPORT, a few times a second

One thread does all of it, and another looks whether it hangs; what steps the environments has its
own threads or processes, as beside any server. `run.host` connects, and calls `run_session` for
each stream whose run wants unrolls.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any, NamedTuple, NoReturn, Protocol

import numpy as np
import torch

from headrace.errors import ConfigError, DeadlineExceeded, PeerLost
from headrace.experience.packing import UnrollFormat
from headrace.experience.remote import HostSlots
from headrace.run.acting_mandate import Mandate, read_mandate
from headrace.run.acting_workers import make_table
from headrace.run.build import exploration
from headrace.run.experience import spreads_ends
from headrace.run.host_blocks import LinkLost
from headrace.run.host_reports import Reports
from headrace.run.pools import make_pool
from headrace.run.remote_weights import FollowedWeights
from headrace.run.seeds import Use, derived_seed
from headrace.run.worker import generation_seed
from headrace.server.acting import Actor, initial_state
from headrace.server.server import Seat
from headrace.transport.wire import Kind, Message, WireError, encode

_CPU = torch.device("cpu")
_WAIT_S = 0.1  # longest wait without a look at the stream
_LOOK_S = 1.0
_MOST_LOAD = 0.5  # of what a stream queues
_SILENCE_S = 120.0  # longest that a native pool may take for one batch


class Stream(Protocol):
    """What a session needs of a `transport.grpc_client.HostClient`."""

    @property
    def welcome(self) -> dict[str, Any]:
        """See `HostClient.welcome`."""

    @property
    def server(self) -> str:
        """See `HostClient.server`."""

    @property
    def load(self) -> float:
        """See `HostClient.load`."""

    def send(self, message: bytes) -> None:
        """See `HostClient.send`."""

    def receive(self, timeout_s: float) -> Message | None:
        """See `HostClient.receive`."""

    def close(self, reason: str = ...) -> None:
        """See `HostClient.close`."""


class Over(Exception):
    """The session has ended as it should; says why."""


class Wire:
    """The stream as a session uses it: who gets what comes, and what a loss is called."""

    def __init__(self, link: Stream, *, stop: Callable[[], bool]) -> None:
        self._link, self._stop = link, stop
        self._takers: dict[Kind, Callable[[Message], None]] = {Kind.BYE: self._bye}

    def on(self, kind: Kind, take: Callable[[Message], None]) -> None:
        """Lets `take` have messages of a kind."""
        self._takers[kind] = take

    def send(self, message: bytes) -> None:
        """Queues a message.

        Raises:
            LinkLost: the stream has ended.
            Over: and the learner's side wanted it so.
        """
        try:
            self._link.send(message)
        except PeerLost as lost:
            raise self._ended(lost) from lost

    def make_room(self) -> None:
        """Waits while much is queued: the network, or the learner, is slower than this host.

        Raises:
            LinkLost, Over: see `listen`.
        """
        while self._link.load > _MOST_LOAD:
            self.look()
            self.listen(_WAIT_S / 10)

    def look(self) -> None:
        """Sees whether this host was stopped.

        Raises:
            Over: it was.
        """
        if self._stop():
            raise Over("stopped")

    def listen(self, timeout_s: float) -> None:
        """Hands on all that has come; waits so many seconds for something.

        Raises:
            LinkLost: the stream has ended.
            Over: the run is.
            WireError: what came belongs nowhere.
        """
        while True:
            try:
                message = self._link.receive(timeout_s)
            except PeerLost as lost:
                raise self._ended(lost) from lost
            if message is None:
                return
            take = self._takers.get(message.kind)
            if take is None:
                raise WireError(f"the learner sent {message.kind.name}, which has no place here")
            take(message)
            timeout_s = 0.0

    def _ended(self, lost: PeerLost) -> LinkLost | Over:
        """Looks whether the learner's side had said goodbye before the stream ended."""
        with contextlib.suppress(PeerLost):
            while (message := self._link.receive(0.0)) is not None:
                if message.kind is Kind.BYE:
                    return self._goodbye(message)
        return LinkLost(str(lost))

    def _goodbye(self, message: Message) -> Over:
        return Over(f"{self._link.server} says: {message.text.get('reason', 'it is over')}")

    def _bye(self, message: Message) -> None:
        raise self._goodbye(message)


class Acting(NamedTuple):
    """What acts in a session."""

    seat: Seat
    weights: FollowedWeights
    slots: HostSlots
    reports: Reports


def make_acting(mandate: Mandate, wire: Wire, reports: Reports, *, in_process: bool) -> Acting:
    """Builds what acts; starts the environments last.

    Raises:
        ConfigError: unrolls have other columns here than at the learner, as `describe` says.
    """
    config, model, algorithm = mandate.config, mandate.model, mandate.algorithm

    def send(slot: int) -> None:
        table = unrolls.of_slot
        wire.make_room()
        wire.send(
            encode(
                Kind.UNROLL,
                block=int(table["env_id"][slot]),
                sequence=int(table["run_id"][slot]),
                arrays=packing.pack(slot),
                compression=mandate.compression,
            )
        )

    slots = HostSlots(mandate.num_envs, max_batch=mandate.max_batch, send=send, listen=wire.listen)
    unrolls = make_table(
        mandate.spec,
        model,
        slots,
        num_envs=mandate.num_envs,
        experience=algorithm.experience,
        num_slots=slots.num_slots,
        allocate=lambda _, shape, dtype: np.zeros(shape, dtype),
    )
    unrolls.first_env = mandate.first_env
    unrolls.spreads_ends = spreads_ends(config, algorithm.experience)
    packing = UnrollFormat(unrolls)
    if packing.describe() != mandate.unroll:
        raise ConfigError(
            "unrolls of this host have other columns than the run's: install the same headrace on "
            "both, and the same code of the network"
        )
    weights = FollowedWeights(model, send=wire.send, listen=wire.listen)
    wire.on(Kind.WEIGHTS, weights.take)
    wire.on(Kind.SLOTS, lambda message: slots.gain(message.sequence))
    seeds = mandate.resume_count, mandate.first_env, mandate.generation
    generator = torch.Generator()
    generator.manual_seed(derived_seed(config.seed, Use.ACTING_WORKER, *seeds))
    ladder = exploration(algorithm, config.server.num_envs)
    seat = Seat(
        make_pool(
            config,
            num_envs=mandate.num_envs,
            batch_size=mandate.max_batch,
            seed=generation_seed(
                derived_seed(config.seed, Use.TRAINING_ENVIRONMENTS, mandate.resume_count),
                mandate.generation,
            ),
            first_env=mandate.first_env,
            # Answered all at once, they gain nothing from processes.
            in_process=in_process or mandate.max_batch == mandate.num_envs,
            on_message=reports.note,
        ),
        Actor(algorithm=algorithm, model=model, generator=generator),
        initial_state(mandate.spec, model, 1, _CPU),
        unrolls=unrolls,
        on_episodes=reports.on_episodes,
        device=_CPU,
        exploration=None if ladder is None else ladder[mandate.first_env :][: mandate.num_envs],
    )
    return Acting(seat, weights, slots, reports)


def act(acting: Acting, wire: Wire) -> NoReturn:
    """Acts until the stream or the run ends, or this host is stopped.

    Raises:
        LinkLost: the stream has ended.
        Over: the run is, or this host was stopped.
    """
    seat, weights, slots, reports = acting

    def look() -> None:
        reports.report(seat)
        wire.look()

    wire.send(encode(Kind.READY))
    while weights.pull() < 0:
        look()
        wire.listen(_WAIT_S)
    while True:
        before_s = time.perf_counter()
        while not slots.wait_for_space(_WAIT_S):
            look()
        reports.waits.add("server_for_slots", time.perf_counter() - before_s)
        seat.serve(weights.pull, _WAIT_S, reports.waits)
        look()


def run_session(
    link: Stream,
    *,
    cores: int,
    trust_code: bool,
    stop: Callable[[], bool],
    on_message: Callable[[str], None],
    in_process: bool = False,
) -> str:
    """Acts for the learner at the other end until that says that the run is over.

    Args:
        link: A stream whose welcome asks for unrolls.
        cores: That this host gives.
        trust_code: Whether to import what the welcome names from outside headrace.
        stop: Whether to end; asked several times a second, in another thread.
        on_message: Told what is worth a line.
        in_process: Start no worker process.

    Returns:
        Why it has ended.

    Raises:
        LinkLost: the stream has ended.
        ConfigError: what no second attempt mends.
        DeadlineExceeded: a native pool hangs.
        HeadraceError: the environments fail.
    """
    try:
        return _run_session(
            link,
            cores=cores,
            trust_code=trust_code,
            stop=stop,
            on_message=on_message,
            in_process=in_process,
        )
    except LinkLost:
        raise
    except BaseException:  # the caller tells why
        with contextlib.suppress(PeerLost):
            link.send(encode(Kind.REPORT, text={"failed": True}))
        raise


def _run_session(
    link: Stream,
    *,
    cores: int,
    trust_code: bool,
    stop: Callable[[], bool],
    on_message: Callable[[str], None],
    in_process: bool,
) -> str:
    mandate = read_mandate(link.welcome, cores=cores, trust_code=trust_code)
    on_message(
        f"connected to {link.server}: acts in {mandate.num_envs} environments of "
        f"{mandate.config.env}"
    )
    wire = Wire(link, stop=stop)
    acting = make_acting(mandate, wire, Reports(wire.send), in_process=in_process)
    ended: Future[str] = Future()

    def work() -> None:
        torch.set_num_threads(max(1, cores // 2))  # the environments have the others
        try:
            with contextlib.closing(acting.seat.pool):
                act(acting, wire)
        except Over as over:
            with contextlib.suppress(Over, PeerLost):  # whom it would tell may be gone
                acting.reports.report(acting.seat, at_once=True)
                link.close("it was stopped there")
            ended.set_result(str(over))
        except BaseException as error:  # noqa: BLE001 - handed to the thread that looks
            ended.set_exception(error)

    threading.Thread(target=work, name="acting", daemon=True).start()
    while not ended.done():
        wait([ended], timeout=_LOOK_S)
        since_s = getattr(acting.seat.pool, "waiting_since", None)
        if since_s is not None and time.monotonic() - since_s > _SILENCE_S:
            raise DeadlineExceeded(
                f"{mandate.config.env}: no environment gave a step for {_SILENCE_S:.0f} s; the "
                "worker host ends"
            )
    return ended.result()
