"""Holds the number of samples per insert: whichever side is ahead waits.

Let I be the sequences that came, S those that were sampled, m = `min_inserted`, r =
`samples_per_insert`, and d = r (I - m) - S: samples that are due. The limiter allows

    an insert of up to n sequences   if I < m or d + r n <= slack
    a sample of k sequences          if I >= m and d - k >= -slack

With slack >= r n + k, for the largest n and k that are asked for,

- d stays in [-slack, slack] once I >= m: the insert that passes m leaves d < r n, all others are
  checked. So |S / (I - m) - r| <= slack / (I - m), which goes to 0: the ratio is exact in the long
  run.
- One side can always go on. While I < m inserts can. After that, if neither could, d + r n > slack
  and d - k < -slack, so slack - r n < d < k - slack and 2 slack < r n + k <= slack: impossible.

Should an insert bring more than it said, d is above `slack` until samples have caught up; those can
always go on then.
"""

from __future__ import annotations

from headrace.errors import ConfigError


class SampleLimiter:
    """Counts what goes into a replay and what is sampled, and says who may go on. One thread."""

    def __init__(
        self,
        samples_per_insert: float,
        *,
        min_inserted: int,
        batch: int,
        max_insert: int,
        slack: float | None = None,
    ) -> None:
        """Starts at zero.

        Args:
            samples_per_insert: r; 0 for no limit once the first `min_inserted` are there.
            min_inserted: Sequences that must have come before the first sample.
            batch: Most sequences that are sampled at once.
            max_insert: Most sequences that one insert completes.
            slack: Samples that either side may be ahead; None for the least that is safe.

        Raises:
            ConfigError: `slack` is so small that both sides might wait for ever.
        """
        least = samples_per_insert * max_insert + batch
        if slack is not None and slack < least:
            raise ConfigError(
                f"a slack of {slack:g} samples cannot hold {batch} samples at once and "
                f"{samples_per_insert:g} for each of {max_insert} inserts at once: it must be at "
                f"least {least:g}"
            )
        self.slack = least if slack is None else slack
        self.samples_per_insert = samples_per_insert
        self.min_inserted = min_inserted
        self.num_inserted = 0
        self.num_sampled = 0

    @property
    def due(self) -> float:
        """Samples that are due; below 0 if sampling is ahead of inserts."""
        counted = self.num_inserted - self.min_inserted
        return self.samples_per_insert * counted - self.num_sampled

    def may_insert(self, count: int) -> bool:
        """Whether an insert that completes up to `count` sequences need not wait."""
        if self.samples_per_insert == 0 or self.num_inserted < self.min_inserted:
            return True
        return self.due + self.samples_per_insert * count <= self.slack

    def may_sample(self, count: int) -> bool:
        """Whether `count` sequences may be sampled now."""
        if self.num_inserted < self.min_inserted:
            return False
        return self.samples_per_insert == 0 or self.due - count >= -self.slack

    def inserted(self, count: int) -> None:
        """Counts sequences that became complete."""
        self.num_inserted += count

    def sampled(self, count: int) -> None:
        """Counts sequences that were sampled."""
        self.num_sampled += count

    def state_dict(self) -> dict[str, int]:
        """Returns the counts. They belong to the contents: an empty replay starts at zero."""
        return {"inserted": self.num_inserted, "sampled": self.num_sampled}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Puts back what `state_dict` gave."""
        self.num_inserted, self.num_sampled = state["inserted"], state["sampled"]
