"""The public names as type checkers see them; __init__.py imports each when it is first used."""

from headrace.algorithms.base import Algorithm
from headrace.config import RunConfig
from headrace.errors import ConfigError, HeadraceError, TrainingDiverged
from headrace.run.api import preset, train
from headrace.run.complete import make_config
from headrace.run.evaluate import evaluate
from headrace.run.local import TrainResult
from headrace.run.policy import Policy, load

__version__: str
STARTED_S: float

__all__ = [
    "Algorithm",
    "ConfigError",
    "HeadraceError",
    "Policy",
    "RunConfig",
    "TrainResult",
    "TrainingDiverged",
    "__version__",
    "evaluate",
    "load",
    "make_config",
    "preset",
    "train",
]
