"""The seam between whatever steps environments and the server."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from headrace.specs import EnvSpec
from headrace.steps import EnvStep


class Pool(Protocol):
    """Everything that steps environments, seen from the server; `receive`, `reply`, in turns."""

    spec: EnvSpec
    num_envs: int
    max_batch: int
    """Most rows that one `receive` gives."""

    def receive(self, timeout_s: float) -> EnvStep | None:
        """Returns the steps of all that are due, by size or by age; None after `timeout_s`.

        The arrays are the caller's until its `reply`; it copies what it keeps.

        Raises:
            PeerLost: nothing is left that could step.
        """

    def reply(self, action: NDArray[Any]) -> None:
        """Answers exactly the rows last received, in their order.

        Raises:
            ValueError: an action is outside the space, or the count is not that of the last
                `receive`.
        """

    def close(self) -> None:
        """Gives back threads, processes and memory. A second call does nothing."""


@runtime_checkable
class Restorable(Protocol):
    """A pool whose environments can be saved and put back, bit for bit."""

    restorable: bool
    """Whether these environments can."""

    def snapshot(self) -> dict[str, NDArray[np.generic]]:
        """Returns everything that a pool of the same settings needs to go on as this one would."""

    def restore(self, state: dict[str, NDArray[np.generic]]) -> None:
        """Puts back what `snapshot` gave."""
