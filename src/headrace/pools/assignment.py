"""Which worker host steps which environments: groups of them, each a block of the wire format.

    free --grant--> pending at host --its step--> waits --receive--> in use by the server
      ^               ^                                                  |
      |               +------------------- reply ------------------------+
      +---- release, from anywhere; what is in use stays so until the reply

For one thread at a time: whoever has it holds a lock.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from headrace.errors import ConfigError
from headrace.specs import vectors_of
from headrace.transport.connections import HostConnection, Refused
from headrace.transport.messages import HostStep
from headrace.transport.wire import WireError

ENVS_PER_CORE = 32
"""Environments of a host that does not say how many it wants: enough that a core of emulators has
work while the actions of most of them travel."""
MAX_ENVS_PER_MESSAGE = 64
"""Environments of a block where `envs_per_message` leaves it open."""
BLOCKS_PER_HOST = 2
"""At least so many for such a host: one steps while the other's message travels."""


@dataclass(slots=True, eq=False)
class Host:
    """A worker host that is connected."""

    peer: HostConnection
    blocks: list[int]
    heard_s: float  # its last sign of progress, or when it began to owe something
    pending: int  # blocks that it has not given back
    starting: int  # of these, those that have not begun
    deaths: int = 0  # of its own worker processes, as it says
    notes: int = 0


@dataclass(slots=True)
class EnvGroup:
    """Environments first .. end - 1, which step together."""

    first: int
    end: int
    host: Host | None = None
    generation: int = -1  # of the grants
    expected: int = 0  # sequence of the host's next step
    pending: bool = False
    in_use: bool = False
    writing: bool = False  # a step is being copied into its rows
    kept: HostStep | None = None  # what came while the server still had the rows of a host before

    @property
    def size(self) -> int:
        """Environments."""
        return self.end - self.first


@dataclass(slots=True)
class Assignment:
    """The blocks of a pool and the hosts that have them."""

    blocks: list[EnvGroup]
    max_envs_per_host: int
    hosts: dict[HostConnection, Host] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        num_envs: int,
        *,
        batch_size: int,
        envs_per_message: int,
        max_envs_per_host: int,
        unit: int = 1,
    ) -> Assignment:
        """Cuts environments into blocks as even as possible.

        Args:
            num_envs: Of the pool.
            batch_size: Most of them that are answered at once.
            envs_per_message: Most of a block; 0 for the batch, at most `MAX_ENVS_PER_MESSAGE`.
            max_envs_per_host: Most of a host.
            unit: Environments that no block cuts.

        Raises:
            ConfigError: a block is larger than a batch, or than what a host may take.
        """
        # Also where all are answered at once, several hosts may have a share.
        own = min(batch_size, -(-num_envs // 2), MAX_ENVS_PER_MESSAGE)
        if envs_per_message > batch_size:
            raise ConfigError(
                f"envs_per_message must be at most the environments answered at once, {batch_size}"
                f", not {envs_per_message}"
            )
        most = max(unit, envs_per_message or own)
        blocks = [EnvGroup(*span) for span in vectors_of(num_envs, most=most, unit=unit)]
        largest = max(block.size for block in blocks)
        if largest > max_envs_per_host:
            raise ConfigError(
                f"envs_per_message must be at most max_envs_per_host={max_envs_per_host}, "
                f"not {largest}"
            )
        return cls(blocks, max_envs_per_host)

    def grant(self, peer: HostConnection, now_s: float) -> Host:
        """Gives free blocks to a host that has come, as many as it takes; it owes their first step.

        Raises:
            Refused: none is free, or none fits.
        """
        wanted = self._wanted(peer.hello)
        taken: list[int] = []
        envs = 0
        for number, block in enumerate(self.blocks):
            free = block.host is None and not block.writing
            if free and envs + block.size <= wanted:
                taken.append(number)
                envs += block.size
        if not taken:
            raise Refused("all environments have a host; wait until one is free", retry=True)
        host = Host(peer, taken, now_s, len(taken), len(taken))
        for number in taken:
            block = self.blocks[number]
            block.host, block.pending, block.expected = host, True, 0
            block.generation += 1
        self.hosts[peer] = host
        return host

    def release(self, peer: HostConnection) -> Host | None:
        """Frees the blocks of a host that is gone, and returns it; None if it had been released."""
        host = self.hosts.pop(peer, None)
        for number in host.blocks if host else ():
            block = self.blocks[number]
            block.host, block.pending, block.kept = None, False, None
        return host

    def due(self, host: Host, number: int, sequence: int) -> EnvGroup:
        """Returns the block whose step has come.

        Raises:
            WireError: it is not the host's, or its step was not asked for.
        """
        if number not in host.blocks:
            raise WireError(f"a step of block {number}, which it was not granted")
        block = self.blocks[number]
        if not block.pending or sequence != block.expected:
            wanted = f"step {block.expected}" if block.pending else "none"
            raise WireError(f"step {sequence} of block {number}, of which {wanted} was asked for")
        return block

    def returned(self, block: EnvGroup, host: Host, now_s: float) -> None:
        """A host has given its step of a block."""
        block.pending = False
        host.starting -= block.expected == 0
        block.expected += 1
        host.pending -= 1
        host.heard_s = now_s

    def asked(self, block: EnvGroup, host: Host, now_s: float) -> None:
        """A host is asked for the next step of a block."""
        if not host.pending:
            host.heard_s = now_s
        block.pending = True
        host.pending += 1

    def envs_granted(self) -> int:
        """Environments that have a host."""
        return sum(block.size for block in self.blocks if block.host is not None)

    def whole(self) -> bool:
        """Whether no block that has begun is still with its host."""
        return not any(block.pending and block.expected for block in self.blocks)

    def silent(self, now_s: float, *, host_timeout_s: float, start_timeout_s: float) -> list[Host]:
        """Returns the hosts that owe steps and gave no sign for too long."""
        return [
            host
            for host in self.hosts.values()
            if host.pending
            and now_s - host.heard_s
            > (max(start_timeout_s, host_timeout_s) if host.starting else host_timeout_s)
        ]

    def span(self, host: Host, *, first_env: int = 0) -> str:
        """Says which environments a host has: "0..31, 64..95"; they count from `first_env`."""
        bounds: list[list[int]] = []
        for number in host.blocks:
            block = self.blocks[number]
            if bounds and bounds[-1][1] == block.first:
                bounds[-1][1] = block.end
            else:
                bounds.append([block.first, block.end])
        return ", ".join(f"{first_env + first}..{first_env + end - 1}" for first, end in bounds)

    def _wanted(self, hello: Mapping[str, Any]) -> int:
        """Returns how many environments a host may have at most."""
        largest = max(block.size for block in self.blocks)
        envs, cores = hello.get("envs", 0), hello.get("cores", 1)
        if type(envs) is not int or type(cores) is not int or envs < 0 or cores < 1:
            raise Refused(f"{envs!r} environments on {cores!r} cores make no sense")
        if 0 < envs < largest:
            raise Refused(
                f"--envs is {envs} at this host, and the run's environments come in blocks of "
                f"{largest}: say --envs {largest} or more, or --envs-per-message {envs} at the run"
            )
        if not envs:
            envs = max(ENVS_PER_CORE * cores, BLOCKS_PER_HOST * largest)
        return min(envs, self.max_envs_per_host)
