"""What an environment family must say: a config, a spec, and copies that step together."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from headrace.specs import EnvSpec
from headrace.steps import EnvStep


class BatchEnv(Protocol):
    """N copies of one environment in numpy, stepped by one call, with same-step autoreset."""

    spec: EnvSpec
    num_envs: int

    def reset(self) -> EnvStep:
        """Starts every copy; all rows have `reset`."""

    def step(self, env_id: NDArray[np.int32], action: NDArray[Any]) -> EnvStep:
        """Steps the named copies and returns their rows in the same order.

        Where copies only step together (`spec.vector_envs`), those that are named are all of some
        vectors, less the rows that were `absent`; the rows are all of the same vectors.
        """


@runtime_checkable
class RestorableEnv(BatchEnv, Protocol):
    """A `BatchEnv` whose whole state can be saved."""

    def snapshot(self) -> dict[str, NDArray[np.generic]]:
        """Returns the state of all copies and of their random numbers."""

    def restore(self, state: dict[str, NDArray[np.generic]]) -> None:
        """Puts back what `snapshot` gave."""


@runtime_checkable
class Closable(Protocol):
    """A `BatchEnv` that has something to give back."""

    def close(self) -> None:
        """Gives it back."""


class Family(Protocol):
    """One line of `catalog.ENVIRONMENTS`. `name` is what the user typed."""

    config_type: type[Any]
    pool: str
    """Name in `catalog.POOLS` of the pool that steps what `make` returns."""

    def spec(self, name: str, config: Any) -> EnvSpec:
        """Returns the spec, without starting an environment where that can be avoided.

        Raises:
            ConfigError: no such environment, or what it needs is not installed.
        """

    def evaluation(self, config: Any) -> Any:
        """Returns the settings under which an agent trained with `config` is judged."""

    def make(
        self,
        name: str,
        config: Any,
        *,
        num_envs: int,
        batch_size: int,
        threads: int,
        seed: int,
        first_env: int = 0,
    ) -> Any:
        """Starts `num_envs` copies for the family's pool, `batch_size` due at a time.

        Args:
            name: what the user typed.
            config: settings of the family.
            num_envs: copies, counted from 0 in every step.
            batch_size: rows of a step; for native pools only.
            threads: of a native pool.
            seed: of the run.
            first_env: number of the first copy within the run. What a copy does depends on `seed`
                and on its own number, so not on how the copies are spread over workers.
        """

    def make_view(self, name: str, config: Any, *, seed: int) -> Any | None:
        """Starts one copy whose observations are what a person would see, else what `make` gives.

        It goes the same way as the only copy of `make` with this seed if it gets the same actions.
        None if a person may as well look at the agent's observations.
        """


def first_rows(observation: NDArray[Any]) -> EnvStep:
    """Returns the step in which every copy starts: `observation` [N, ...], and a reset alone."""
    count = len(observation)
    never = np.zeros(count, np.bool_)
    return EnvStep(
        env_id=np.arange(count, dtype=np.int32),
        run_id=np.zeros(count, np.int64),
        observation=observation,
        reward=np.zeros(count, np.float32),
        reset=~never,
        terminated=never,
        truncated=never.copy(),
        final_observation=None,
    )
