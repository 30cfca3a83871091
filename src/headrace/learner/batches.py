"""Stop 9: storage is by arrival, maths is by action. The one place that shifts between them.

```
stored row      0          1          2     …      T
            obs_0      obs_1      obs_2         obs_T      what was known on arrival
            reward_0   reward_1   reward_2      reward_T   of the step that led here
            action_0   action_1   action_2      action_T   what was done there
by action     └─ earns reward_1 ─┘ …
```
"""

from __future__ import annotations

from typing import Any

import torch

from headrace.records import Batch, Finals, PolicyInput, Unrolls
from headrace.rows import upload


def align(unrolls: Unrolls) -> Batch:
    """Returns the unrolls by action: index t holds action t, and the reward and end it led to."""
    truncated = unrolls.truncated[1:]
    return Batch(
        inputs=PolicyInput(
            observation=unrolls.observation,
            # The reward that came with a reset belongs to the episode before.
            reward=torch.where(unrolls.reset, 0.0, unrolls.reward),
            previous_action=unrolls.previous_action,
            reset=unrolls.reset,
            action_mask=unrolls.action_mask,
        ),
        recurrent=unrolls.recurrent,
        action=unrolls.action[:-1],
        log_prob=unrolls.log_prob[:-1],
        reward=unrolls.reward[1:],
        terminated=unrolls.terminated[1:],
        truncated=truncated,
        bootstrap=torch.where(truncated, unrolls.bootstrap[1:], 0.0),
        version=unrolls.version[:-1],
        value=unrolls.value,
        action_value=None if unrolls.action_value is None else unrolls.action_value[:-1],
        weight=unrolls.weight,
        finals=unrolls.finals,
    )


def moved(batch: Batch, device: torch.device) -> Batch:
    """Returns a batch on `device`: itself, but where workers filled it in memory that all share."""
    if batch.log_prob.device == device:
        return batch
    return Batch(*(_moved(field, device) for field in batch))


def _moved(field: Any, device: torch.device) -> Any:
    if isinstance(field, PolicyInput | Finals):
        return type(field)(*(_moved(part, device) for part in field))
    if isinstance(field, tuple):
        return tuple(_moved(part, device) for part in field)
    return None if field is None else upload(field.numpy(), device)
