"""Curves for Weights & Biases, where a run asks for them.

```
main thread     write: a row into a queue, at once
wandb thread    init, log, finish: whatever waits for a network
```

W&B can be slow, fail or hang at each of its calls, and raises errors of many kinds. In a thread of
its own none of that reaches training: the first failure is said, and the run goes on without W&B.
"""

from __future__ import annotations

import importlib
import os
import re
import secrets
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from queue import Full, Queue
from typing import Any

from headrace import run_files
from headrace.errors import ConfigError

_MOST_WAITING = 1000  # rows; W&B buffers its own, so that more of them waiting means that it hangs
_ID = re.compile(r"[A-Za-z0-9_-]*")
_MOST_ID_NBYTES = 128

ID_NAME = "wandb-id.txt"
"""Of the file in a run's folder that keeps the id of the W&B run."""


def ensure_wandb() -> None:
    """Makes sure, before anything starts, that W&B can be used; may ask for an API key.

    Raises:
        ConfigError: it is not installed, or has no API key and is not offline.
    """
    try:
        wandb = importlib.import_module("wandb")
        login, usage_error = wandb.login, wandb.errors.UsageError
    # A folder named wandb, as W&B itself makes them, imports as a package without anything in it.
    except (ImportError, AttributeError) as missing:
        raise ConfigError(
            "wandb is not installed: pip install 'headrace[wandb]', or leave out --wandb"
        ) from missing
    if os.environ.get("WANDB_MODE", "online") != "online":
        return
    try:
        login()
    except usage_error as error:
        raise ConfigError(
            "W&B has no API key: run `wandb login`, or set WANDB_MODE=offline"
        ) from error
    except wandb.Error:
        return  # no network now: the thread tries again, and says what is wrong


class WandbLog:
    """Sends rows to one W&B run; a resumed run goes on with the same. One thread writes."""

    def __init__(
        self,
        folder: Path,
        project: str,
        config: Mapping[str, Any],
        *,
        on_message: Callable[[str], None],
        patience_s: float = 60.0,
    ) -> None:
        """Starts the thread.

        Args:
            folder: Run directory; W&B keeps its files in `folder`/wandb.
            project: W&B project.
            config: The run's settings, as W&B shows them.
            on_message: Told, in the thread, where the curves are, or what failed.
            patience_s: Longest that W&B may take to start, and `close` for what was not sent yet.
        """
        self._folder = folder.resolve()
        self._on_message = on_message
        self._patience_s = patience_s
        self._exit_code = 0
        self._queue: Queue[tuple[int, dict[str, float]] | None] = Queue(_MOST_WAITING)
        self._lock = threading.Lock()  # guards _given_up
        self._given_up = False
        self._thread = threading.Thread(
            target=self._run, args=(project, dict(config)), name="wandb", daemon=True
        )
        self._thread.start()

    def write(self, number: int, row: Mapping[str, float]) -> None:
        """Hands over a row of finite numbers; returns at once.

        Args:
            number: Of the row in all of metrics.jsonl. W&B takes no number twice, so that
                env_frames, which fall back to the checkpoint on a resume, cannot be its step.
            row: Values by name, env_frames among them: the x axis of every curve.
        """
        if self._given_up:
            return
        try:
            self._queue.put_nowait((number, dict(row)))
        except Full:
            self._give_up("it does not take what is sent")

    def close(self, failed: bool = False) -> None:
        """Ends the W&B run, as failed or not; waits for what was not sent yet, for a time."""
        self._exit_code = int(failed)
        if self._given_up:
            return
        try:
            self._queue.put_nowait(None)
            self._thread.join(self._patience_s)
        except Full:
            pass
        if self._thread.is_alive():
            self._give_up(f"it did not end within {self._patience_s:g} s")

    def _run(self, project: str, config: dict[str, Any]) -> None:
        """The thread: all calls of W&B, in order."""
        try:
            wandb = importlib.import_module("wandb")
            session = wandb.init(
                project=project,
                id=self._run_id(),
                name=self._folder.name,
                dir=str(self._folder),
                config=config,
                resume="allow",
                allow_val_change=True,  # length and threads may change on a resume
                settings=wandb.Settings(
                    silent=True,  # the terminal is ours
                    console="off",
                    init_timeout=self._patience_s,
                    finish_timeout=self._patience_s,  # also of what W&B does when Python ends
                    finish_timeout_raises=True,
                ),
            )
            session.define_metric("env_frames")
            session.define_metric("*", step_metric="env_frames")
            self._on_message(self._where(session))
            while (item := self._queue.get()) is not None:
                number, row = item
                session.log(row, step=number)
            session.finish(exit_code=self._exit_code)
        except Exception as error:  # noqa: BLE001 - no failure of W&B may end a run of hours
            self._give_up(f"{type(error).__name__}: {error}".splitlines()[0])

    def _where(self, session: Any) -> str:
        if session.offline:
            return f"W&B is offline; send it with: wandb sync {self._folder}/wandb/offline-run-*"
        return f"W&B: {session.url or 'disabled by WANDB_MODE'}"

    def _run_id(self) -> str:
        """Returns the W&B id that belongs to the run directory; makes one at the first call."""
        path = self._folder / ID_NAME
        data = run_files.read(path, _MOST_ID_NBYTES) if path.exists() else b""
        known = data.decode("ascii", "replace").strip()
        if not _ID.fullmatch(known):  # W&B names a folder after it
            raise ConfigError(f"{path} holds no id of a W&B run: delete it, to have another")
        if not known:
            known = secrets.token_hex(4)
            with open(path, "w", encoding="ascii", opener=run_files.opener) as file:
                file.write(f"{known}\n")
        return known

    def _give_up(self, why: str) -> None:
        """Says it, the first time."""
        with self._lock:
            if self._given_up:
                return
            self._given_up = True
        self._on_message(f"W&B gets no more of this run ({why}); nothing else is lost")
