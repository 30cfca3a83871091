"""The worker host: steps environments for a run on another machine, and knows nothing of policies.

    stream        WELCOME: which environments        main thread: listens, and looks after the rest
                  STEP    block, n       <---------  a thread per block: its own pool, which steps
                  ACTION  block, n       --------->  as soon as its actions are there

Each block has a pool of its own, of the kind that suits its environments, which answers all of them
at once. While the message of one block travels the others step. When the stream ends the
environments end too; the next session starts them anew.

`headrace worker` runs this, and so does `python -m headrace.run.host` as the child of another
process (`pools.processes`).
"""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from headrace import __version__, catalog
from headrace.config import RunConfig, completed
from headrace.errors import ConfigError, DeadlineExceeded, HeadraceError, PeerLost
from headrace.pools.processes import WorkerEnd
from headrace.pools.settings import WorkerConfig
from headrace.resources import usable_cores
from headrace.run.host_blocks import POLL_S, BlockThread, Granted, LinkLost, Task
from headrace.run.system import keep_memory
from headrace.run.worker import as_tuples
from headrace.specs import EnvSpec
from headrace.transport.grpc_client import HostClient
from headrace.transport.messages import describe, spec_difference
from headrace.transport.settings import LinkConfig
from headrace.transport.wire import (
    VERSION,
    Compression,
    Kind,
    WireError,
    check_compression,
    encode,
)

SILENCE_S = 120.0
"""Longest that a native pool may take for one step of a block: its `receive` takes no deadline."""
JOIN_S = 10.0
"""For the threads of a session, together; those that hang in native code die with the process."""
FIRST_RATE_S, RATE_S = 10.0, 60.0
"""Until the first line that says how fast a session is, and between the others."""
_MAX_REASON = 500  # characters


@dataclass(frozen=True, kw_only=True, slots=True)
class HostConfig:
    """What a worker host has to give."""

    envs: int = 0
    """Takes at most so many environments; 0 takes as many as suit its cores: 32 each, and at least
    two messages of them."""
    cores: int = 0
    """Shares so many processors among its environments; 0 takes all that it may use."""
    trust_code: bool = False
    """Imports code that the run names from outside headrace, such as my_module:factory."""

    def __post_init__(self) -> None:
        if self.envs < 0 or self.cores < 0:
            raise ConfigError("envs and cores must not be negative")


def run_host(
    link: LinkConfig,
    config: HostConfig,
    *,
    stop: Callable[[], bool],
    on_message: Callable[[str], None],
    in_process: bool = False,
) -> None:
    """Steps environments for a run until that is over or `stop()`; connects again when it must.

    Args:
        link: Where the run is, and by what right.
        config: What this host gives.
        stop: Whether to end; asked several times a second.
        on_message: Told what is worth a line.
        in_process: Start no worker process.

    Raises:
        ConfigError: what no second attempt mends, such as another spec than the run's.
        PeerLost: the run stayed away for too long, or wants no more of this host.
        HeadraceError: the environments fail.
    """
    cores = config.cores or usable_cores()
    hello = {
        "protocol": VERSION,
        "headrace": __version__,
        "name": platform.node(),
        "pid": os.getpid(),
        "envs": config.envs,
        "cores": cores,
    }
    for stream in HostClient.sessions(link, hello, stop=stop, on_message=on_message):
        try:
            over = run_session(
                stream,
                cores=cores,
                trust_code=config.trust_code,
                stop=stop,
                on_message=on_message,
                in_process=in_process,
            )
        except LinkLost as lost:
            if stream.final and not stream.accused:  # its goodbye did not come through
                on_message(str(lost))
                return
            on_message(f"lost {lost}; the environments end, and it tries again")
            continue  # where the server took it for garbage, `HostClient.sessions` ends
        except BaseException as error:  # also of an environment: both sides are told
            reason = str(error) if isinstance(error, HeadraceError) else repr(error)
            stream.close(reason[:_MAX_REASON])
            raise
        on_message(over)
        return


def run_session(
    link: HostClient,
    *,
    cores: int,
    trust_code: bool,
    stop: Callable[[], bool],
    on_message: Callable[[str], None],
    in_process: bool = False,
) -> str:
    """Does what a welcome asks for, until the run is over; returns why it ended.

    Args:
        link: A stream whose welcome has come.
        cores: That this host gives.
        trust_code: Whether to import what the welcome names from outside headrace.
        stop: Whether to end; asked several times a second.
        on_message: Told what is worth a line.
        in_process: Start no worker process.

    Raises:
        LinkLost: the stream has ended.
        ConfigError: what no second attempt mends.
        HeadraceError: the environments fail.
    """
    if link.welcome.get("cut") == "unrolls":
        # Only here, since who only steps environments needs no networks.
        from headrace.run import acting_host  # noqa: PLC0415

        return acting_host.run_session(
            link,
            cores=cores,
            trust_code=trust_code,
            stop=stop,
            on_message=on_message,
            in_process=in_process,
        )
    try:
        task = read_welcome(link.welcome, cores=cores, trust_code=trust_code)
        return Session(link, on_message=on_message).run(task, stop=stop, in_process=in_process)
    except LinkLost:
        raise
    except BaseException:  # the caller tells why
        with contextlib.suppress(PeerLost):
            link.send(encode(Kind.REPORT, text={"failed": True}))
        raise


def read_welcome(welcome: Mapping[str, Any], *, cores: int, trust_code: bool) -> Task:
    """Returns what a server's welcome asks for.

    Args:
        welcome: Its text.
        cores: That the blocks share.
        trust_code: Whether to import what it names from outside headrace.

    Raises:
        ConfigError: it makes no sense, its environments cannot be had here, or are others.
    """
    try:
        env = welcome["env"]
        blocks = tuple(Granted(*map(int, block)) for block in welcome["blocks"])
        own = {
            "num_workers": max(1, cores // len(blocks)),
            "groups_per_worker": 1,  # all of a block come back before any is answered
        }
        workers = WorkerConfig(**{**welcome["workers"], **own})
        family = catalog.environment_family(env, trust_code=trust_code)
        settings = family.config_type(
            **{name: as_tuples(value) for name, value in welcome["settings"].items()}
        )
        config = completed(
            RunConfig(
                env=env, environment=settings, workers=workers, turns="on", env_threads=cores
            ),
            trust_code=trust_code,
        )
        theirs, seed = dict(welcome["spec"]), int(welcome["seed"])
        compression: Compression = "lz4" if welcome["compression"] == "lz4" else "off"
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ConfigError(
            f"the run's settings make no sense here ({type(error).__name__}: {error}): install the "
            "same headrace on both"
        ) from error
    check_compression(compression)
    spec: EnvSpec = family.spec(env, settings)
    difference = spec_difference(describe(spec), theirs)
    if difference:
        raise ConfigError(
            f"{env} is another environment on this host than in the run: {difference}; install "
            "the same packages on both"
        )
    return Task(config, seed, blocks, compression, spec)


class Session:
    """One stream to the server, and the environments that step for it."""

    def __init__(self, link: HostClient, *, on_message: Callable[[str], None]) -> None:
        """Takes a stream whose welcome has come."""
        self._link = link
        self._on_message = on_message
        self._blocks: dict[int, BlockThread] = {}
        self._deaths = 0

    def run(self, task: Task, *, stop: Callable[[], bool], in_process: bool) -> str:
        """Steps the blocks until the server says that the run is over; returns why it ended.

        Raises:
            LinkLost: the stream has ended.
            HeadraceError: the environments fail.
        """
        count = sum(block.num_envs for block in task.blocks)
        self._on_message(
            f"connected to {self._link.server}: steps {count} environments of {task.config.env}"
        )
        self._say(Kind.READY, {})
        for block in task.blocks:
            self._blocks[block.number] = BlockThread(
                block, task, self._link.send, note=self._note, in_process=in_process
            )
        try:
            return self._listen(stop, Pace(self._on_message))
        finally:
            until_s = time.monotonic() + JOIN_S
            for thread in self._blocks.values():
                thread.end()
            for thread in self._blocks.values():
                thread.join(max(0.0, until_s - time.monotonic()))

    def _listen(self, stop: Callable[[], bool], pace: Pace) -> str:
        while not stop():
            try:
                message = self._link.receive(POLL_S)
            except PeerLost as lost:
                raise LinkLost(str(lost)) from lost
            if message is None or pace.due():
                self._look(pace)
            if message is None:
                continue
            if message.kind is Kind.BYE:
                return f"{self._link.server} says: {message.text.get('reason', 'it is over')}"
            thread = self._blocks.get(message.block)
            if message.kind is not Kind.ACTION or thread is None:
                raise WireError(f"the server sent {message.kind.name} for block {message.block}")
            thread.actions.put(message)
        self._link.close("it was stopped there")
        return "stopped"

    def _look(self, pace: Pace) -> None:
        """Sees whether all blocks are well, and tells the server of what died and was mended.

        Raises:
            DeadlineExceeded: a native pool hangs.
            HeadraceError: whatever a block died of.
        """
        for thread in self._blocks.values():
            # That the stream has ended this thread hears for itself, after all that came before.
            if thread.error is not None and not isinstance(thread.error, LinkLost):
                raise thread.error
            since_s = getattr(thread.pool, "waiting_since", None)
            if since_s is not None and time.monotonic() - since_s > SILENCE_S:
                raise DeadlineExceeded(
                    f"{thread.name}: no step for {SILENCE_S:.0f} s; the worker host ends"
                )
        threads = self._blocks.values()
        deaths = sum(getattr(thread.pool, "deaths", 0) for thread in threads)
        if deaths != self._deaths:
            self._deaths = deaths
            self._say(Kind.REPORT, {"deaths": deaths})
        pace.tell(sum(thread.steps for thread in threads))

    def _note(self, note: str) -> None:
        self._on_message(note)
        self._say(Kind.REPORT, {"note": note[:_MAX_REASON]})

    def _say(self, kind: Kind, text: Mapping[str, Any]) -> None:
        with contextlib.suppress(PeerLost):  # whoever listens next hears of it
            self._link.send(encode(kind, text=text))


class Pace:
    """Says now and then how fast a session is."""

    def __init__(self, on_message: Callable[[str], None]) -> None:
        """Starts counting."""
        self._on_message = on_message
        self._since_s = time.monotonic()
        self._next_s = self._since_s + FIRST_RATE_S
        self._looked_s = self._since_s
        self._steps = 0

    def due(self) -> bool:
        """Whether to look after the session, however busy it is."""
        return time.monotonic() - self._looked_s > POLL_S

    def tell(self, steps: int) -> None:
        """Takes the steps so far; says how many there are in a second, if it is time to."""
        now_s = self._looked_s = time.monotonic()
        if now_s < self._next_s:
            return
        rate = (steps - self._steps) / (now_s - self._since_s)
        self._on_message(f"{rate:,.0f} agent steps/s")
        self._since_s, self._steps, self._next_s = now_s, steps, now_s + RATE_S


def main() -> None:
    """Takes the settings from the parent and works until the run is over or the parent leaves."""
    end = WorkerEnd.open()
    keep_memory()
    settings = end.settings

    def parent_is_gone() -> bool:
        try:
            end.receive(0.0)
        except PeerLost:
            return True
        return False

    run_host(
        LinkConfig(**settings["link"]),
        HostConfig(
            envs=settings.get("envs", 0),
            cores=settings.get("cores", 0),
            trust_code=settings.get("trust_code", False),
        ),
        stop=parent_is_gone,
        on_message=lambda note: end.status({"note": note}),
    )


if __name__ == "__main__":
    main()
