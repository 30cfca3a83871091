"""What a worker host steps: blocks of environments, each in a thread with a pool of its own."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from headrace.config import RunConfig
from headrace.errors import PeerLost
from headrace.pools.base import Pool
from headrace.run.pools import make_pool
from headrace.run.worker import generation_seed
from headrace.specs import EnvSpec
from headrace.steps import EnvStep
from headrace.transport.messages import decode_action, encode_step
from headrace.transport.wire import Compression, Message, WireError

POLL_S = 0.2
"""How often a session looks after its blocks, and they after the session."""


class LinkLost(PeerLost):
    """The stream to the server has ended: the host tries again."""


class Granted(NamedTuple):
    """A block of environments that this host steps."""

    number: int
    first_env: int
    num_envs: int
    generation: int


class Task(NamedTuple):
    """What the server's welcome asks for."""

    config: RunConfig
    seed: int
    blocks: tuple[Granted, ...]
    compression: Compression
    spec: EnvSpec


class BlockThread:
    """The thread that owns the pool of one block."""

    def __init__(
        self,
        block: Granted,
        task: Task,
        send: Callable[[bytes], None],
        *,
        note: Callable[[str], None],
        in_process: bool,
    ) -> None:
        """Starts it; `send` and `note` are called in it."""
        self.name = (
            f"environments {block.first_env}..{block.first_env + block.num_envs - 1} "
            f"of {task.config.env}"
        )
        self.pool: Pool | None = None
        self.error: BaseException | None = None
        """What it died of."""
        self.actions: SimpleQueue[Message | None] = SimpleQueue()
        """What the server answers; None ends the thread."""
        self.steps = 0
        """Agent steps of this session."""
        self._block, self._task, self._send, self._note = block, task, send, note
        self._in_process = in_process
        self._ended = False
        self._thread = threading.Thread(target=self._run, name=self.name, daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Lets the thread end when it is back from its step."""
        self._ended = True
        self.actions.put(None)

    def join(self, timeout_s: float) -> None:
        """Waits for its end."""
        self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            block, task = self._block, self._task
            self.pool = make_pool(
                task.config,
                num_envs=block.num_envs,
                batch_size=block.num_envs,
                seed=generation_seed(task.seed, block.generation),
                first_env=block.first_env,
                in_process=self._in_process,
                on_message=self._note,
            )
            try:
                self._step(self.pool)
            finally:
                self.pool.close()
        except BaseException as error:  # noqa: BLE001 - handed to the main thread, which raises it
            self.error = error

    def _step(self, pool: Pool) -> None:
        """Steps the block each time that its actions have come."""
        rows, spec, number = self._block.num_envs, pool.spec, self._block.number
        run_ids = RunIds(rows)
        too_long = 0
        for sequence in itertools.count():
            step = None
            while step is None:
                if self._ended:
                    return
                step = pool.receive(POLL_S)
            data, left_out = encode_step(
                with_absent(step._replace(run_id=run_ids.of(step.env_id, step.run_id)), rows),
                block=number,
                sequence=sequence,
                compression=self._task.compression,
            )
            if left_out and not too_long:
                self._note("a final info that is too long or no numbers was left out")
            too_long += left_out
            try:
                self._send(data)
            except PeerLost as lost:
                raise LinkLost(str(lost)) from lost
            message = self.actions.get()
            if message is None:
                return
            if message.sequence != sequence:
                raise WireError(f"an answer to step {message.sequence}, not to {sequence}")
            # Messages are in the order of the environments, and pools want that of their rows.
            pool.reply(decode_action(message, spec, rows)[step.env_id])
            self.steps += rows


def with_absent(step: EnvStep, rows: int) -> EnvStep:
    """Returns a step of a block with all of its rows, where the pool gave those that are due."""
    if len(step.env_id) == rows:
        return step

    def whole(column: NDArray[Any] | None) -> Any:
        if column is None:
            return None
        out = np.zeros((rows, *column.shape[1:]), column.dtype)
        out[step.env_id] = column
        return out

    full = EnvStep(*map(whole, step[:-1]))
    absent = np.ones(rows, np.bool_)
    absent[step.env_id] = False
    full.terminated[absent] = full.truncated[absent] = True
    infos = {int(step.env_id[row]): info for row, info in (step.episode_info or {}).items()}
    return full._replace(env_id=np.arange(rows, dtype=np.int32), episode_info=infos or None)


class RunIds:
    """Run ids that count from 0 in each session, whatever the pool's own are."""

    def __init__(self, num_envs: int) -> None:
        """For a block of that many environments."""
        self._own = np.full(num_envs, -1, np.int64)
        self._theirs = np.full(num_envs, -1, np.int64)

    def of(self, env_id: NDArray[np.int32], run_id: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns run ids for the rows of a step, given the pool's."""
        changed = run_id != self._theirs[env_id]
        if changed.any():
            self._own[env_id[changed]] += 1
            self._theirs[env_id] = run_id
        return self._own[env_id]
