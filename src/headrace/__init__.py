"""headrace trains deep-RL agents as fast as the hardware allows.

One step of an environment, in ten stops:

 1. N environments step together, ended ones reset         envs/
 2. a worker hands over a group's steps                     run/worker.py
 3. the steps are written into their rows                   pools/shm.py, pools/shm_layout.py
 4. rows that wait become a batch, by size or by age        pools/batcher.py
 5. the policy acts for the batch                           server/server.py, server/acting.py
 6. actions go back                                         pools/
 7. rows of one environment become an unroll of T + 1       experience/unrolls.py
 8. the unroll waits its turn, or is kept and sampled       experience/fifo.py, experience/replay.py
 9. rows are aligned; loss, gradient, step                  learner/, algorithms/, ops/
10. weights of version n are published                      weights.py
"""

import importlib
import time
from typing import Any

__version__ = "0.1.0"

STARTED_S = time.monotonic()  # when a process of ours began, as near as can be told

_PUBLIC = {  # imported when first used: `import headrace` is quick. Types stand in __init__.pyi
    "Algorithm": "headrace.algorithms.base",
    "ConfigError": "headrace.errors",
    "HeadraceError": "headrace.errors",
    "Policy": "headrace.run.policy",
    "RunConfig": "headrace.config",
    "TrainResult": "headrace.run.local",
    "TrainingDiverged": "headrace.errors",
    "evaluate": "headrace.run.evaluate",
    "load": "headrace.run.policy",
    "make_config": "headrace.run.complete",
    "preset": "headrace.run.api",
    "train": "headrace.run.api",
}

__all__ = ["__version__", *_PUBLIC]  # noqa: PLE0604 - the names are strings


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'headrace' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
