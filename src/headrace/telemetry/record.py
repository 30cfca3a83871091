"""The run directory: what a run leaves on disk, and who may write there.

```
runs/NAME/  config.toml  metrics.jsonl  tensorboard/  checkpoints/  log.txt  lock
            videos/  wandb/  wandb-id.txt
```
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Self

from headrace import run_files
from headrace.errors import ConfigError
from headrace.telemetry.wandb_log import ID_NAME, WandbLog

_MOST_CONFIG_NBYTES = 1 << 16  # dotted keys of a megabyte take hours to parse
_PID_BYTES = 32
_BLOCK_NBYTES = 1 << 16
_MOST_ROWS_A_START = 1_000_000


class FolderInUse(ConfigError):
    """Something is in the folder that should become a run's."""


class RunDirectory:
    """Names of everything in a run's folder."""

    def __init__(self, path: Path) -> None:
        """Names only; use `create` for a new run and `open` for one that exists."""
        self.typed = path
        """As the user said it."""
        # From here on the folder that it is relative to may change: environments do so.
        path = path.absolute()
        self.path = path
        self.lock_path = path / "lock"
        self.config_path = path / "config.toml"
        self.new_config_path = path / "config.toml.new"
        self.metrics_path = path / "metrics.jsonl"
        self.log_path = path / "log.txt"
        self.tensorboard = path / "tensorboard"
        self.checkpoints = path / "checkpoints"
        self.videos = path / "videos"

    @classmethod
    def create(cls, path: Path, config_text: str) -> Self:
        """Makes the folder of a new run with its config.toml.

        Raises:
            FolderInUse: the folder has something in it already.
            ConfigError: it cannot be made.
        """
        run = cls(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            cls.ensure_unused(path)
            _write_config(run.config_path, config_text)
        except FileExistsError as error:  # of another process, a moment ago
            raise _in_use(path) from error
        except OSError as error:
            raise ConfigError(
                f"cannot make the run folder {path} ({error.strerror}): choose another with --out"
            ) from error
        return run

    @staticmethod
    def ensure_unused(path: Path) -> None:
        """Looks whether a folder may become that of a new run: there is none, or nothing in it.

        Raises:
            FolderInUse: the folder has something in it already.
        """
        if path.is_dir() and any(path.iterdir()):
            raise _in_use(path)

    @classmethod
    def open(cls, path: Path) -> Self:
        """Opens the folder of a run that exists, to resume or evaluate it.

        Raises:
            ConfigError: there is no run, or its config.toml is a link.
        """
        run = cls(path)
        run_files.ensure_file(run.config_path)
        if not run.config_path.is_file():
            raise ConfigError(f"{path} is not a run: it has no config.toml; check the path")
        return run

    def read_config(self) -> bytes:
        """Returns what config.toml holds.

        Raises:
            ConfigError: it is a link or too long, or cannot be read.
        """
        try:
            return run_files.read(self.config_path, _MOST_CONFIG_NBYTES)
        except OSError as error:
            raise ConfigError(f"cannot read {self.config_path}: {error.strerror}") from error

    def rewrite_config(self, config_text: str) -> None:
        """Puts new settings in place of the old, whole or not at all: those of a resumed run."""
        self.new_config_path.unlink(missing_ok=True)  # of a killed process
        _write_config(self.new_config_path, config_text)
        self.new_config_path.replace(self.config_path)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps other processes from training this run, for as long as the block runs.

        The system gives the lock back when the process dies, however it dies. A forked child shares
        the lock until it ends; a spawned one does not.

        Raises:
            ConfigError: another process trains this run, or something in its folder is not its own.
        """
        self._ensure_own()
        with open(self.lock_path, "a+b", opener=run_files.opener) as file:
            if not _try_lock(file):
                file.seek(0)
                holder = file.read(_PID_BYTES).decode("ascii", "replace").strip() or "unknown"
                raise ConfigError(
                    f"{self.path} is being trained by another process (pid {holder}): "
                    "stop it, or choose another folder with --out"
                )
            file.truncate(0)
            file.write(f"{os.getpid()}\n".encode("ascii"))
            file.flush()
            # The file stays: were it deleted, two processes could each lock a file of that name.
            yield

    def _ensure_own(self) -> None:
        """Looks at all that training will write to, of which some is opened much later.

        Raises:
            ConfigError: names a link, or what else is not the run's.
        """
        files = (self.config_path, self.new_config_path, self.metrics_path, self.log_path)
        for file in (*files, self.lock_path, self.path / ID_NAME):
            run_files.ensure_file(file)
        for folder in (self.checkpoints, self.tensorboard, self.videos, self.path / "wandb"):
            run_files.ensure_folder(folder)


def _in_use(path: Path) -> FolderInUse:
    return FolderInUse(
        f"{path} is not empty: go on with `headrace train --resume {path}`, "
        "or choose another folder with --out"
    )


def _write_config(path: Path, text: str) -> None:
    data = text.encode()
    if len(data) > _MOST_CONFIG_NBYTES:
        raise ConfigError(
            f"these settings take {len(data)} bytes, and a run's config.toml may have "
            f"{_MOST_CONFIG_NBYTES}: keep long values in a file of your environment's own"
        )
    with open(path, "xb", opener=run_files.opener) as file:
        file.write(data)


if sys.platform == "win32":
    import msvcrt

    def _try_lock(file: IO[bytes]) -> bool:
        # A locked byte cannot be read by others, so it lies behind the process id.
        file.seek(_PID_BYTES)
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

else:
    import fcntl

    def _try_lock(file: IO[bytes]) -> bool:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


class MetricsWriter:
    """Appends rows to metrics.jsonl and, if wanted, to TensorBoard and W&B. One thread writes."""

    def __init__(
        self,
        run: RunDirectory,
        tensorboard: bool = True,
        resumed_at: int | None = None,
        *,
        start: int | None = None,
        wandb: WandbLog | None = None,
    ) -> None:
        """Opens files for appending; cuts off the line that a killed run left half written.

        A run that was killed has rows from after its checkpoint, of a future that is lost: those
        beyond `resumed_at` env_frames are cut off metrics.jsonl, and hidden by TensorBoard.

        Args:
            run: Where.
            tensorboard: Whether there are curves.
            resumed_at: env_frames of the checkpoint that a resumed run goes on from.
            start: Sessions of the run before this one; every row has it, as resume_count, if given.
            wandb: Gets the same numbers; closed with the rest.

        Raises:
            ConfigError: what should be the run's own file or folder is a link.
        """
        if tensorboard:
            run_files.ensure_folder(run.tensorboard)
        _cut_half_line(run.metrics_path)
        if resumed_at is not None:
            _cut_rows(run.metrics_path, behind=resumed_at)
        self._first = {} if start is None else {"resume_count": start}
        self._wandb = wandb
        # Numbers for W&B, which takes none twice, while rows that were sent may have been cut here.
        self._rows = (start or 0) * _MOST_ROWS_A_START
        if wandb is not None and not start:
            self._rows = _count_lines(run.metrics_path)
        self._file = open(  # noqa: SIM115 - closed by `close`
            run.metrics_path, "a", encoding="utf-8", opener=run_files.opener
        )
        self._tensorboard = _open_tensorboard(run.tensorboard, resumed_at) if tensorboard else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        self.close(failed=error_type is not None)

    def write(
        self,
        step_env_frames: int,
        row: Mapping[str, float | int | str],
        histograms: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        """Writes one row; numbers that are not finite become null, and no curve gets them.

        Args:
            step_env_frames: the row's own env_frames, of the whole run so far: the x axis of every
                curve.
            row: values by name, such as loss/policy.
            histograms: by name, how often each whole number came, from 0 on; not for W&B.
        """
        counted = histograms or {}
        finite = {name: None if _is_wild(value) else value for name, value in row.items()}
        first = {"env_frames": step_env_frames, **self._first}
        line = json.dumps({**first, **finite, **counted}, allow_nan=False)
        self._file.write(f"{line}\n")
        self._file.flush()
        numbers = {name: value for name, value in finite.items() if isinstance(value, int | float)}
        if self._wandb is not None:
            self._wandb.write(self._rows, {**numbers, "env_frames": step_env_frames})
        self._rows += 1
        if self._tensorboard is None:
            return
        for name, value in numbers.items():
            self._tensorboard.add_scalar(name, value, global_step=step_env_frames)
        for name, counts in counted.items():
            if any(counts):
                self._tensorboard.add_histogram_raw(
                    name, **_buckets(counts), global_step=step_env_frames
                )

    def close(self, failed: bool = False) -> None:
        """Flushes and closes everything; W&B shows whether the run failed."""
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.close(failed)


def _buckets(counts: Sequence[int]) -> dict[str, Any]:
    """What TensorBoard wants to know of a histogram of whole numbers."""
    numbers = [number for number, count in enumerate(counts) if count]
    return {
        "min": numbers[0],
        "max": numbers[-1],
        "num": sum(counts),
        "sum": sum(number * count for number, count in enumerate(counts)),
        "sum_squares": sum(number**2 * count for number, count in enumerate(counts)),
        "bucket_limits": [number + 0.5 for number in range(len(counts))],
        "bucket_counts": list(counts),
    }


def _is_wild(value: float | int | str) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _open_tensorboard(folder: Path, purge_step: int | None) -> Any:
    # Imported here: it takes a second, and a run without curves need not have it.
    from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415

    return SummaryWriter(log_dir=str(folder), flush_secs=30, purge_step=purge_step)


def _cut_half_line(path: Path) -> None:
    """Truncates a file after its last newline; reads backwards, since it may be long."""
    if not path.exists():
        return
    with open(path, "r+b", opener=run_files.opener) as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - _BLOCK_NBYTES)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                file.truncate(start + newline + 1)
                return
            end = start
        file.truncate(0)


def _cut_rows(path: Path, *, behind: int) -> None:
    """Truncates metrics after the last row of so many env_frames or fewer; others stay as bytes."""
    if not path.exists():
        return
    with open(path, "r+b", opener=run_files.opener) as file:
        end = 0
        for line in file:
            if _env_frames(line) > behind:
                break
            end += len(line)
        file.truncate(end)


def _env_frames(line: bytes) -> float:
    try:
        return float(json.loads(line)["env_frames"])
    except (KeyError, RecursionError, TypeError, ValueError):
        return 0.0  # what is no row is not ours to cut


def last_row(path: Path) -> dict[str, Any]:
    """Returns the newest row of a metrics.jsonl; of none, that nothing was done."""
    rows = read_metrics(path)
    return rows[-1] if rows else {"env_frames": 0}


def _count_lines(path: Path) -> int:
    if not path.exists():
        return 0
    with open(path, "rb", opener=run_files.opener) as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(_BLOCK_NBYTES), b""))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a metrics.jsonl, in order; a last line still being written is left out.

    Returns:
        One dict per row, None for a number that was not finite; no rows if there is no file yet.

    Raises:
        ConfigError: names a line that is not JSON; or the file is a link.
    """
    if not path.exists():
        return []
    rows = []
    # What is not UTF-8 becomes what is not JSON.
    with open(path, encoding="utf-8", errors="backslashreplace", opener=run_files.opener) as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith("\n"):
                break
            try:
                row = json.loads(line)
            except (RecursionError, ValueError) as error:
                raise ConfigError(f"{path}, line {number}, is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise ConfigError(f"{path}, line {number}, is no row of metrics")
            rows.append(row)
    return rows


class _OneLine(logging.Formatter):
    """What is said may be anybody's words: a name in a checkpoint, the output of a worker."""

    def format(self, record: logging.LogRecord) -> str:
        return run_files.escaped(super().format(record))


@contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Appends what the logger `headrace` and its children say, from INFO up, to a file.

    Raises:
        ConfigError: the file is a link, or no file.
    """
    logger = logging.getLogger("headrace")
    with open(path, "a", encoding="utf-8", opener=run_files.opener) as file:
        handler = logging.StreamHandler(file)
        handler.setFormatter(
            _OneLine("%(asctime)s %(levelname)s %(process)d %(name)s: %(message)s")
        )
        level_before = logger.level
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        try:
            yield
        finally:
            logger.setLevel(level_before)
            logger.removeHandler(handler)
            handler.close()
