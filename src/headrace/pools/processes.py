"""Worker processes: how one is started, watched, heard and ended; both ends of its pipes.

    parent   WorkerProcess                        child   WorkerEnd
      control  --- bytes --------------------------->       EOF: the parent is done, so leave
      status   <-- one line of JSON a message -------       EOF: the worker is dead
      output   <-- what it and its libraries print --       the tail is its last words
      lifeline --- never a byte -------------------->       closed: killed by the kernel

A worker is a fresh interpreter, not a fork: it imports only what it needs and never the user's
script. It leads a process group, so that a Ctrl-C reaches the parent alone, and a kill takes along
what an environment may have started.

Nothing outlives the parent, not even when that is killed while the worker hangs in C code. The
usual means, PR_SET_PDEATHSIG, fires when the parent's *thread* that started the worker ends, which
here may be long before the run does. So the kernel is asked to send SIGKILL when the last writer
of the lifeline is gone (fcntl(2), F_SETSIG and O_ASYNC); where that does not exist, a thread of the
worker waits for it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import io
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from headrace.errors import HeadraceError, PeerLost
from headrace.pools.memory import anonymous_block, anonymous_file

__all__ = ["WorkerEnd", "WorkerProcess", "anonymous_block"]

ONE_THREAD = {  # a worker is one core's work; a library's thread pool would fight the learner
    name: "1"
    for name in (
        "BLIS_NUM_THREADS",
        "MKL_NUM_THREADS",
        "NUMBA_NUM_THREADS",
        "NUMEXPR_NUM_THREADS",
        "OMP_NUM_THREADS",
        "OPENBLAS_NUM_THREADS",
        "VECLIB_MAXIMUM_THREADS",
    )
}
LAST_WORDS = 12
"""Lines of output that are kept for the obituary."""
MAX_LINE = 500
"""Characters of one printed line that are kept."""

_DUMP_SIGNAL = signal.SIGUSR2
_DUMP_WAIT_MS = 200
_DUMP_PAUSE_MS = 20  # the dump comes in many small writes
_CHUNK = 1 << 16
# The sys.path of the parent comes first: the module may be found through it alone. Before it is
# there, -P keeps Python from looking into this folder first of all, as -c and -m would have it.
_START = """
import json, os, runpy, sys
fd = int(sys.argv[1])
sys.path[:] = json.loads(os.pread(fd, os.fstat(fd).st_size, 0))["sys_path"]
runpy.run_module(sys.argv[2], run_name="__main__", alter_sys=True)
"""


class WorkerProcess:
    """The parent's handle of one worker process. For one thread."""

    def __init__(
        self, module: str, settings: Mapping[str, Any], *, name: str, pass_fds: Sequence[int] = ()
    ) -> None:
        """Starts `module` as a program; returns at once.

        Args:
            module: calls `WorkerEnd.open` first of all.
            settings: what JSON can say; its `WorkerEnd.settings`.
            name: shown by ps.
            pass_fds: file descriptors that it gets under the same numbers.
        """
        self.name = name
        control, self._control_fd = os.pipe()
        self.status_fd, status = os.pipe()
        self.output_fd, output = os.pipe()
        lifeline, self._lifeline_fd = os.pipe()
        page = {
            "control": control,
            "status": status,
            "lifeline": lifeline,
            "pass_fds": list(pass_fds),
            "sys_path": sys.path,
            "settings": settings,
        }
        with anonymous_file() as file:
            os.pwrite(file.fileno(), json.dumps(page).encode(), 0)
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _START, str(file.fileno()), module, name],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, **ONE_THREAD},
                pass_fds=(file.fileno(), control, status, lifeline, *pass_fds),
                process_group=0,
            )
        for fd in (control, status, output, lifeline):
            os.close(fd)
        for fd in (self._control_fd, self.status_fd, self.output_fd):
            os.set_blocking(fd, False)
        self._unsent = b""
        self._half_message = b""
        self._untold: list[dict[str, Any]] = []  # read by another method than `messages`
        self._half_line = b""
        self._words: deque[str] = deque(maxlen=LAST_WORDS)
        self._heard = 0  # lines in all
        self._told = 0  # of these, how many `printed` has returned
        self._dead = False
        self._closed = False
        self._cause: str | None = None
        self._error: str | None = None

    @property
    def pid(self) -> int:
        """Process id, also of its process group."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """Exit code once `death` has said that it is dead, negative for a signal; else None."""
        return self._process.returncode

    def fileno(self) -> int:
        """The status pipe: readable when there is a message, or the worker is dead."""
        return self.status_fd

    def send(self, data: bytes) -> None:
        """Writes to the control pipe; never waits, and does nothing if the worker is dead."""
        if self._control_fd < 0:
            return
        self._unsent += data
        try:
            self._unsent = self._unsent[os.write(self._control_fd, self._unsent) :]
        except BlockingIOError:
            return
        except BrokenPipeError:
            self._unsent = b""

    def messages(self) -> list[dict[str, Any]]:
        """Returns the messages that have come since the last call; never waits.

        One with the key "error" is a worker's own account of why it dies.
        """
        untold, self._untold = self._untold, []
        if self._closed:
            return untold
        if self._unsent:
            self.send(b"")
        data, ended = _read_all(self.status_fd)
        self._dead = self._dead or ended
        *lines, self._half_message = (self._half_message + data).split(b"\n")
        messages = [json.loads(line) for line in lines]
        for message in messages:
            self._error = self._error or message.get("error")
        return untold + messages

    def printed(self) -> list[str]:
        """Returns whole lines that the worker has printed since the last call; never waits.

        Of a flood, `LAST_WORDS` lines are returned; `lines_printed` counts them all.
        """
        self._hear()
        new = min(self._heard - self._told, len(self._words))
        self._told = self._heard
        return list(self._words)[len(self._words) - new :]

    @property
    def lines_printed(self) -> int:
        """Lines printed so far."""
        return self._heard

    def death(self) -> str | None:
        """Returns why the worker is dead, with its last words; None while it lives."""
        self._untold = self.messages()
        if not self._dead:
            return None
        if not self._closed:
            # The pipe closed before its exit code can be fetched. Whoever closes it and lives on
            # cannot be heard any more; and what its environments started must go too.
            self._kill_group()
            code = self._process.wait()
            self._cause = self._cause or self._error or _exit_cause(code)
            self._hear(to_the_end=True)
        words = " / ".join(line for line in self._words if line.strip())
        cause = self._cause or "closed"
        return f"{cause}; its last words: {words}" if words else cause

    def kill(self, cause: str | None = None) -> None:
        """Kills the worker's process group; `cause` is what `death` will say."""
        self._cause = self._cause or cause
        if not self._closed:
            self._kill_group()

    def stack(self) -> str:
        """Asks a worker that hangs where it is; waits for at most 0.2 s; empty if it is silent."""
        self._hear()
        before, words = self._heard, self._words.copy()
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, _DUMP_SIGNAL)
        poller = select.poll()
        poller.register(self.output_fd, select.POLLIN)
        wait_ms = _DUMP_WAIT_MS
        while poller.poll(wait_ms) and self._hear():
            wait_ms = _DUMP_PAUSE_MS
        lines = list(self._words)[-min(self._heard - before, LAST_WORDS) :]
        frames = [line.strip() for line in lines if line.startswith("  File ")]
        if self._heard == before or not frames:
            return ""
        self._words, self._heard = words, before  # no words of its own
        return ", called from ".join(frames[:3])

    def close(self, timeout_s: float = 5.0) -> None:
        """Lets the worker leave, kills it after `timeout_s`, and closes the pipes; may come twice.

        To close many, `hang_up` all of them first: then they leave at the same time.
        """
        if self._closed:
            return
        self.hang_up()
        self._wait(timeout_s)
        self._kill_group()
        self._process.wait()
        self._untold = self.messages()
        self._dead = self._closed = True
        for fd in (self.status_fd, self.output_fd, self._lifeline_fd):
            os.close(fd)

    def hang_up(self) -> None:
        """Closes the control pipe, at which the worker leaves."""
        if self._control_fd >= 0:
            os.close(self._control_fd)
            self._control_fd = -1

    def _wait(self, timeout_s: float) -> None:
        # Not by reaping it: its id must stay taken until its group was killed.
        poller = select.poll()
        poller.register(self.status_fd, select.POLLIN)
        until_s = time.monotonic() + timeout_s
        while not self._dead and poller.poll(max(0.0, until_s - time.monotonic()) * 1000.0):
            self._untold = self.messages()

    def _kill_group(self) -> None:
        if self._process.returncode is None:
            # macOS refuses to signal a group of the dead.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)

    def _hear(self, *, to_the_end: bool = False) -> bool:
        """Reads what waits in the output pipe; returns whether there was anything."""
        data, ended = (b"", True) if self._closed else _read_all(self.output_fd)
        *lines, self._half_line = (self._half_line + data).split(b"\n")
        if to_the_end or ended or len(self._half_line) > _CHUNK:
            lines += [self._half_line] if self._half_line else []
            self._half_line = b""
        self._heard += len(lines)
        self._words.extend(
            line[: 4 * MAX_LINE].decode(errors="replace")[:MAX_LINE] for line in lines[-LAST_WORDS:]
        )
        return len(data) > 0


class WorkerEnd:
    """The worker's own end. For one thread."""

    def __init__(self, page: Mapping[str, Any]) -> None:
        """Takes over the pipes that the parent wrote down."""
        self.settings: dict[str, Any] = page["settings"]
        self._control: int = page["control"]
        self._status: int = page["status"]
        self._lifeline: int = page["lifeline"]
        self._poller = select.poll()
        self._poller.register(self._control, select.POLLIN)
        # Programs that an environment starts must not keep the pipes open.
        for fd in (self._control, self._status, self._lifeline, *page["pass_fds"]):
            os.set_inheritable(fd, False)

    @classmethod
    def open(cls) -> WorkerEnd:
        """Makes this process a worker: pipes, signals, and how it dies."""
        fd = int(sys.argv[1])
        page = json.loads(os.pread(fd, os.fstat(fd).st_size, 0))
        os.close(fd)
        end = cls(page)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        faulthandler.enable()
        faulthandler.register(_DUMP_SIGNAL)
        for stream in (sys.stdout, sys.stderr):  # a pipe makes stdout a block buffer
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(line_buffering=True)
        sys.excepthook = end._obituary
        _die_with(end._lifeline)
        return end

    def receive(self, timeout_s: float | None = None) -> bytes | None:
        """Returns what was sent since, at least a byte of it; None after `timeout_s`.

        Raises:
            PeerLost: the parent is done or gone.
        """
        if timeout_s is not None and not self._poller.poll(timeout_s * 1000.0):
            return None
        data = os.read(self._control, _CHUNK)
        if not data:
            raise PeerLost("the parent is gone")
        return data

    def _obituary(
        self, kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        """What Python calls for an exception that nobody caught."""
        text = f"{kind.__name__}: {error}"
        if isinstance(error, HeadraceError):  # a sentence already; but where did its cause arise?
            text, cause = str(error), error.__cause__
            trace = cause.__traceback__ if cause else None
        frames = traceback.extract_tb(trace)[-1:]
        place = "".join(f" ({Path(f.filename).name}:{f.lineno} in {f.name})" for f in frames)
        self.status({"error": text + place})

    def status(self, message: Mapping[str, Any]) -> None:
        """Tells the parent something; {"error": sentence} before leaving says why."""
        data = json.dumps(message).encode() + b"\n"
        with contextlib.suppress(BrokenPipeError):
            while data:
                data = data[os.write(self._status, data) :]


def _read_all(fd: int) -> tuple[bytes, bool]:
    """Returns what waits in a pipe (1 MiB at most, against floods), and whether it has ended."""
    parts: list[bytes] = []
    with contextlib.suppress(BlockingIOError):
        while len(parts) < 16:
            parts.append(os.read(fd, _CHUNK))
            if not parts[-1]:
                return b"".join(parts), True
    return b"".join(parts), False


def _exit_cause(code: int) -> str:
    if code == -signal.SIGKILL:
        return "killed (SIGKILL): out of memory, or somebody killed it"
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"left by itself with exit code {code}"


def _die_with(lifeline: int) -> None:
    """Has this process group killed when the last writer of the pipe is gone."""
    if sys.platform == "linux":
        fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpgrp())
        flags = fcntl.fcntl(lifeline, fcntl.F_GETFL)
        fcntl.fcntl(lifeline, fcntl.F_SETFL, flags | os.O_ASYNC)
        # The parent may have gone before the kernel was asked.
        if _ended(lifeline):
            _kill_own_group()
    else:
        threading.Thread(target=_wait_for_end, args=(lifeline,), daemon=True).start()


def _wait_for_end(lifeline: int) -> None:
    os.read(lifeline, 1)
    _kill_own_group()


def _ended(fd: int) -> bool:
    poller = select.poll()
    poller.register(fd, 0)  # a hang-up is reported unasked
    return bool(poller.poll(0))


def _kill_own_group() -> None:
    os.killpg(os.getpgrp(), signal.SIGKILL)
