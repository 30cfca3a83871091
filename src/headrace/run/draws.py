"""The global random states of torch, numpy and Python.

headrace draws from generators of its own. These are for what a user brings: dropout, the start of a
network, an environment.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def global_states() -> dict[str, Any]:
    """Returns all of them, as `learner.flattening` can keep them."""
    version, words, gauss = random.getstate()
    has_gpus: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if has_gpus else [],
        "numpy": np.random.get_state(legacy=False),  # noqa: NPY002 - the global one is meant
        "python": (version, np.array(words, np.int64), gauss),
    }


def set_global_states(states: dict[str, Any]) -> None:
    """Puts back what `global_states` gave; of GPUs, those that are here."""
    torch.set_rng_state(states["torch"].cpu())
    for device, state in zip(range(torch.cuda.device_count()), states["cuda"], strict=False):
        torch.cuda.set_rng_state(state.cpu(), device)
    np.random.set_state(states["numpy"])  # noqa: NPY002
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words.tolist()), gauss))


@contextmanager
def own_draws(seed: int | None = None) -> Iterator[None]:
    """Leaves the global states as they were, whatever the block draws; with a seed it begins there.

    GPUs that the block is the first to use have no state before: they are seeded at random.

    Args:
        seed: Of 32 bits.
    """
    before = global_states()
    if seed is not None:
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        random.seed(seed)
    try:
        yield
    finally:
        set_global_states(before)
        has_gpus: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        if has_gpus and not before["cuda"]:
            torch.cuda.seed_all()
