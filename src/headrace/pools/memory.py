"""Memory that processes share and that has no name: nothing is left of it after any end."""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
from typing import IO

from headrace import resources
from headrace.errors import ConfigError

_CHUNK = 1 << 16


def anonymous_block(nbytes: int) -> tuple[int, mmap.mmap]:
    """Returns a file descriptor and a mapping of zeroed memory that has no name and is all there.

    Space is reserved now: a page that cannot be had later would kill with SIGBUS, far from the
    cause.

    Raises:
        ConfigError: there is not so much.
    """
    free = _free_bytes()
    try:
        if nbytes > free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with anonymous_file() as file:
            fd = os.dup(file.fileno())
    except OSError as error:
        raise _too_little(nbytes, free, error) from error
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(fd, 0, nbytes)
        else:  # macOS: written, so that it is there
            for start in range(0, nbytes, _CHUNK):
                os.pwrite(fd, bytes(min(_CHUNK, nbytes - start)), start)
        return fd, mmap.mmap(fd, nbytes)
    except OSError as error:
        os.close(fd)
        raise _too_little(nbytes, free, error) from error


def _too_little(nbytes: int, free: int, error: OSError) -> ConfigError:
    return ConfigError(
        f"workers need {nbytes / 2**20:.1f} MiB of shared memory and {free / 2**20:.1f} MiB are "
        f"free ({error.strerror}); "
        "use fewer environments or smaller observations"
    )


def _free_bytes() -> int:
    """Memory that can still be had: the kernel hands out more, and kills when it is used.

    Of a container's limit its use is not subtracted: most of that may be files in the cache, which
    give way.
    """
    free, limit = resources.available_memory_nbytes(), resources.container_limit_nbytes()
    return free if limit is None else min(free, limit)


def anonymous_file() -> IO[bytes]:
    """Returns a file with no name, in memory where there is memfd, that no program inherits."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("headrace"), "r+b", buffering=0)
    return tempfile.TemporaryFile(buffering=0)  # unlinked before this returns
