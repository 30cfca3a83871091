"""Stop 10: weights of version n go from the learner to the server, whole or not at all.

The learner copies into one staging set under a lock. Between two batches the server copies staging
into its own fixed tensors, so their addresses never change and captured graphs stay valid. Staging
has the server's
dtypes: the cast to bfloat16 happens once, on publication.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor, nn


class Weights:
    """One staging set and its version. `publish` is the learner's, `pull` the server's."""

    def __init__(self, server_model: nn.Module) -> None:
        """Allocates staging like `server_model`, at version -1: nothing published."""
        self._staging_lock = threading.Lock()  # guards _staging, _version and _published
        self._target = _tensors(server_model)
        self._staging = [tensor.detach().clone() for tensor in self._target]
        self._version = -1
        self._pulled_version = -1
        on_gpu = any(tensor.is_cuda for tensor in self._target)
        self._published = _event() if on_gpu else None
        self._pulled = _event() if on_gpu else None

    def publish(self, learner_model: nn.Module, version: int) -> None:
        """Copies the learner's weights into staging; on a GPU after the last `pull`, there."""
        with self._staging_lock:
            if self._pulled is not None:
                self._pulled.wait()
            with torch.no_grad():
                torch._foreach_copy_(self._staging, _tensors(learner_model))
            if self._published is not None:
                self._published.record()
            self._version = version

    def pull(self) -> int:
        """Copies staging into the server's model if newer; returns the version it has."""
        if self._version != self._pulled_version:  # a stale read costs one batch, nothing else
            with self._staging_lock:
                if self._published is not None:
                    self._published.wait()
                with torch.no_grad():
                    torch._foreach_copy_(self._target, self._staging)
                if self._pulled is not None:
                    self._pulled.record()
                self._pulled_version = self._version
        return self._pulled_version


def _event() -> torch.cuda.Event:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]
