"""Code that is not ours, in a process of ours: what it changes of the process stays its own.

    with Apart() as apart: make(env)     what it changed is put back behind the block
    with apart.light: step(env)          what it changed holds again within, if it changed anything

Environments, networks, algorithms and functions of a user's may change the folder, torch's default
dtype, what a signal does. In a worker that is theirs to do; here it would move a run, or break it.

Not put back is what they may need later on and does not harm: `sys.path`, and variables of the
environment that neither torch nor a process of ours reads. Nor random states: what headrace draws
comes from generators of its own (`run/draws.py`).
"""

from __future__ import annotations

import gc
import locale
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any, NamedTuple, Self

_UNKNOWN = object()  # what cannot be read, or is not there yet
_SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGPIPE", "SIGCHLD")
    if hasattr(signal, name)
)
_VARIABLES = ("HOME", "LD_LIBRARY_PATH", "PATH", "TMPDIR")
_PREFIXES = ("CUDA_", "NVIDIA_", "PYTHON", "PYTORCH_", "TORCH", "NCCL_", "GLOO_", "RAY_")


class Aspect(NamedTuple):
    """Something of a process that code can change."""

    read: Callable[[], Any]
    put: Callable[[Any], Any]
    again: bool = True
    """Whether what code has changed holds again when it runs again."""


def _variables() -> dict[str, str]:
    return {
        name: value
        for name, value in os.environ.items()
        if name in _VARIABLES or name.startswith(_PREFIXES)
    }


def _put_variables(values: Mapping[str, str]) -> None:
    for name in _variables().keys() - values.keys():
        del os.environ[name]
    os.environ.update(values)


def _folder() -> Any:
    try:
        return os.getcwd()
    except OSError:  # it was removed
        return _UNKNOWN


def _put_folder(path: str) -> None:
    with suppress(OSError):
        os.chdir(path)


def _umask() -> int:
    with suppress(OSError, StopIteration), open("/proc/self/status", encoding="utf-8") as status:
        line = next(line for line in status if line.startswith("Umask:"))
        return int(line.split()[1], 8)
    mask = os.umask(0o077)  # elsewhere there is no other way to ask
    os.umask(mask)
    return mask


def _put_locale(name: str) -> None:
    with suppress(locale.Error):
        locale.setlocale(locale.LC_ALL, name)


def _signals() -> Any:
    if threading.current_thread() is not threading.main_thread():
        return _UNKNOWN  # nobody can change them here
    return {number: signal.getsignal(number) for number in _SIGNALS}


def _put_signals(handlers: Mapping[int, Any]) -> None:
    for number, handler in handlers.items():
        if handler is not None and signal.getsignal(number) is not handler:
            signal.signal(number, handler)


def _put_warnings(filters: list[Any]) -> None:
    warnings.filters[:] = filters  # type: ignore[index]  # a list, whatever its type says
    getattr(warnings, "_filters_mutated", lambda: None)()


def _loggers() -> dict[logging.Logger, tuple[Any, ...]]:
    logging.getLogger("headrace")  # is made if nobody has asked for it yet
    known = logging.root.manager.loggerDict
    ours = [known[name] for name in known if name.partition(".")[0] == "headrace"]
    return {
        logger: (logger.disabled, logger.level, logger.propagate, tuple(logger.handlers))
        for logger in ours
        if isinstance(logger, logging.Logger)
    }


def _put_loggers(loggers: Mapping[logging.Logger, tuple[Any, ...]]) -> None:
    for logger, (disabled, level, propagate, handlers) in loggers.items():
        logger.disabled, logger.propagate = disabled, propagate
        logger.setLevel(level)
        logger.handlers[:] = handlers


def _streams() -> tuple[Any, ...]:
    return sys.stdin, sys.stdout, sys.stderr, sys.excepthook


def _put_streams(streams: tuple[Any, ...]) -> None:
    sys.stdin, sys.stdout, sys.stderr, sys.excepthook = streams


def _cores() -> Any:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else _UNKNOWN


def _of(module: str, read: Callable[[Any], Any]) -> Callable[[], Any]:
    """Returns what reads an aspect of a module, which need not be imported (yet)."""

    def reading() -> Any:
        found = sys.modules.get(module)
        try:
            return _UNKNOWN if found is None else read(found)
        except (AttributeError, RuntimeError):  # half imported; or torch has two settings for one
            return _UNKNOWN

    return reading


def _to(module: str, put: Callable[[Any, Any], Any]) -> Callable[[Any], Any]:
    return lambda value: put(sys.modules[module], value)


def _device(torch: Any) -> Any:
    """Returns torch's default device; None, and not the CPU, where there is none.

    A device that was set has torch look at it in every call.
    """
    context = getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)
    return None if context is None else context.device


def _determinism(torch: Any) -> tuple[Any, ...]:
    cudnn = torch.backends.cudnn
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        (cudnn.enabled, cudnn.benchmark, cudnn.deterministic),
    )


def _put_determinism(torch: Any, values: tuple[Any, ...]) -> None:
    torch.use_deterministic_algorithms(values[0], warn_only=values[1])
    cudnn = torch.backends.cudnn
    cudnn.enabled, cudnn.benchmark, cudnn.deterministic = values[2]


ASPECTS = {
    "folder": Aspect(_folder, _put_folder),
    "umask": Aspect(_umask, os.umask),
    "variables": Aspect(_variables, _put_variables),
    "locale": Aspect(lambda: locale.setlocale(locale.LC_ALL), _put_locale),
    "arguments": Aspect(lambda: list(sys.argv), lambda value: setattr(sys, "argv", list(value))),
    "start method": Aspect(
        _of("multiprocessing", lambda module: module.get_start_method(allow_none=True)),
        _to("multiprocessing", lambda module, value: module.set_start_method(value, force=True)),
    ),
    "numpy errors": Aspect(
        _of("numpy", lambda numpy: numpy.geterr()),
        _to("numpy", lambda numpy, value: numpy.seterr(**value)),
    ),
    "numpy printing": Aspect(
        _of("numpy", lambda numpy: numpy.get_printoptions()),
        _to("numpy", lambda numpy, value: numpy.set_printoptions(**value)),
    ),
    "dtype": Aspect(
        _of("torch", lambda torch: torch.get_default_dtype()),
        _to("torch", lambda torch, value: torch.set_default_dtype(value)),
    ),
    "device": Aspect(
        _of("torch", _device), _to("torch", lambda torch, value: torch.set_default_device(value))
    ),
    "gradients": Aspect(
        _of("torch", lambda torch: torch.is_grad_enabled()),
        _to("torch", lambda torch, value: torch.set_grad_enabled(value)),
    ),
    "anomalies": Aspect(
        _of("torch", lambda torch: torch.is_anomaly_enabled()),
        _to("torch", lambda torch, value: torch.autograd.set_detect_anomaly(value)),
    ),
    "determinism": Aspect(_of("torch", _determinism), _to("torch", _put_determinism)),
    "precision": Aspect(
        _of("torch", lambda torch: torch.get_float32_matmul_precision()),
        _to("torch", lambda torch, value: torch.set_float32_matmul_precision(value)),
    ),
    "threads": Aspect(
        _of("torch", lambda torch: torch.get_num_threads()),
        _to("torch", lambda torch, value: torch.set_num_threads(value)),
        again=False,  # to change their number takes long
    ),
    "signals": Aspect(_signals, _put_signals, again=False),
    "streams": Aspect(_streams, _put_streams, again=False),
    "warnings": Aspect(lambda: list(warnings.filters), _put_warnings, again=False),
    "logging": Aspect(lambda: logging.root.manager.disable, logging.disable, again=False),
    "loggers": Aspect(_loggers, _put_loggers, again=False),
    "cores": Aspect(_cores, lambda value: os.sched_setaffinity(0, value), again=False),
    "garbage": Aspect(
        gc.isenabled, lambda value: gc.enable() if value else gc.disable(), again=False
    ),
}
_CHEAP = ("dtype", "gradients", "threads", "device", "folder", "signals")


class Apart:
    """A process within the process. Not for two threads at once, and not within itself."""

    def __init__(self, theirs: Mapping[str, Any] | None = None, *, keeps: bool = True) -> None:
        """Begins with what the process has, but for `theirs`, by the names of `ASPECTS`.

        Unless it `keeps` them, changes are put back and forgotten: for what has no state that may
        rely on them.
        """
        self._keeps = keeps
        self._theirs: dict[str, Any] = dict(theirs or {})
        self._ours: dict[str, Any] = {}
        self.light = _Light(self)
        """The same in some microseconds, for what is called often: it looks at torch's default
        dtype and device, its gradients and threads, the folder, signals, and what was changed
        before. What was changed holds again in the main thread alone."""

    def __enter__(self) -> Self:
        self._begin(ASPECTS)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    def _begin(self, names: Iterable[str]) -> None:
        self._ours = {name: ASPECTS[name].read() for name in names}
        for name, value in self._theirs.items():
            if self._ours.get(name, _UNKNOWN) not in (_UNKNOWN, value):
                ASPECTS[name].put(value)

    def _end(self) -> None:
        for name, before in self._ours.items():
            if before is _UNKNOWN:
                continue
            aspect = ASPECTS[name]
            now = aspect.read()
            if now == before:
                self._theirs.pop(name, None)
                continue
            if self._keeps and aspect.again and now is not _UNKNOWN:
                self._theirs[name] = now
            aspect.put(before)


class _Light:
    """See `Apart.light`."""

    def __init__(self, apart: Apart) -> None:
        self._apart = apart
        self._before: tuple[Any, ...] | None = None

    def __enter__(self) -> None:
        # What holds for the whole process again would hold for the learner too, in its own thread.
        in_turn = threading.current_thread() is threading.main_thread()
        theirs = self._apart._theirs if in_turn else None
        self._before = None if theirs else _cheap()
        if self._before is None:
            self._apart._begin({*_CHEAP, *(theirs or ())})

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._before is not None:
            if _cheap() == self._before:
                return
            self._apart._ours = dict(zip(_CHEAP, self._before, strict=True))
        self._apart._end()


def _cheap() -> tuple[Any, ...] | None:
    """Returns the aspects that are named `_CHEAP`; None without torch."""
    torch: Any = sys.modules.get("torch")
    try:
        return (
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
            torch.get_num_threads(),
            _device(torch),
            _folder(),
            _signals(),
        )
    except AttributeError:
        return None


def known() -> Apart:
    """Returns what has our own code find torch and numpy as they are when they are imported."""
    torch: Any = sys.modules["torch"]
    errors = {"divide": "warn", "over": "warn", "under": "ignore", "invalid": "warn"}
    return Apart(
        {"dtype": torch.float32, "device": None, "gradients": True, "numpy errors": errors}
    )
