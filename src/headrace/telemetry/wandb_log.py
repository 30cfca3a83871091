"""Curves for Weights & Biases, where a run asks for them.

W&B sends from a process of its own: `init` and `finish` wait for the network, each for so long
and no longer, `log` does not. It raises errors of many kinds; the first is said, and the run goes
on without W&B.
"""

from __future__ import annotations

import importlib
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from headrace import run_files
from headrace.errors import ConfigError

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
        return  # no network now: `init` tries again, and says what is wrong


class WandbLog:
    """Sends rows to one W&B run; a resumed run goes on with the same. One thread."""

    def __init__(
        self,
        folder: Path,
        project: str,
        config: Mapping[str, Any],
        *,
        on_message: Callable[[str], None],
        patience_s: float = 60.0,
    ) -> None:
        """Starts the W&B run, or says why there is none.

        Args:
            folder: Run directory; W&B keeps its files in `folder`/wandb.
            project: W&B project.
            config: The run's settings, as W&B shows them.
            on_message: Told where the curves are, or what failed.
            patience_s: Longest that W&B may take to start, and at the end to send what it has.
        """
        self._folder = folder.resolve()
        self._on_message = on_message
        self._session: Any = None  # the W&B run; None after its end, or a failure
        with self._going_on():
            wandb = importlib.import_module("wandb")
            session = wandb.init(
                project=project,
                id=self._run_id(),
                name=self._folder.name,
                dir=str(self._folder),
                config=dict(config),
                resume="allow",
                allow_val_change=True,  # length and threads may change on a resume
                settings=wandb.Settings(
                    silent=True,  # the terminal is ours
                    console="off",
                    init_timeout=patience_s,
                    finish_timeout=patience_s,  # also of what W&B does when Python ends
                    finish_timeout_raises=True,
                ),
            )
            session.define_metric("env_frames")
            session.define_metric("*", step_metric="env_frames")
            on_message(self._where(session))
            self._session = session

    def write(self, number: int, row: Mapping[str, float]) -> None:
        """Sends a row of finite numbers.

        Args:
            number: Of the row in all of metrics.jsonl. W&B takes no number twice, so that
                env_frames, which fall back to the checkpoint on a resume, cannot be its step.
            row: Values by name, env_frames among them: the x axis of every curve.
        """
        if self._session is not None:
            with self._going_on():
                self._session.log(dict(row), step=number)

    def close(self, failed: bool = False) -> None:
        """Ends the W&B run, as failed or not; the first time only."""
        session, self._session = self._session, None
        if session is not None:
            with self._going_on():
                session.finish(exit_code=int(failed))

    @contextmanager
    def _going_on(self) -> Iterator[None]:
        """Says what fails within, and lets W&B be from then on."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - no failure of W&B may end a run of hours
            self._session = None
            why = f"{type(error).__name__}: {error}".splitlines()[0]
            self._on_message(f"W&B gets no more of this run ({why}); nothing else is lost")

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
