"""What goes from an unroll table to a replay."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


class Segment(NamedTuple):
    """Unrolls as they were stored, without stacks: n of c + 1 rows. What a replay takes."""

    env_id: NDArray[np.int64]  # [n]
    run_id: NDArray[np.int64]  # [n]
    frames: Tensor  # [n, c + 1, ...] single frames
    columns: dict[str, Tensor]  # each [n, c + 1, ...]: action, log_prob, value, action_value, ...
    host: dict[str, NDArray[Any]]  # each [n, c + 1]: reward, reset, terminated, truncated, version
    recurrent: tuple[Tensor, ...]  # each [n, ...] state fed to row 0
    final_frames: Tensor  # [f, ...] final observations of truncated rows
    final_at: NDArray[np.int64]  # [f, 2] which of the n, and which row of it, 1 to c
    final_value: Tensor  # [f] float32 what the policy that acted said of them
    final_mask: Tensor | None = None  # [f, A] bool actions that are allowed there
