"""Nameless memory: zeroed, shared, all there, or one sentence."""

import errno
import mmap
import os

import pytest

from headrace.errors import ConfigError
from headrace.pools import memory
from headrace.pools.memory import anonymous_block, anonymous_file


def test_a_block_is_zeroed_shared_and_reserved() -> None:
    nbytes = 3 * mmap.PAGESIZE + 5
    fd, ours = anonymous_block(nbytes)
    theirs = mmap.mmap(fd, nbytes)
    assert theirs[:] == bytes(nbytes)
    ours[nbytes - 1] = 7
    assert theirs[nbytes - 1] == 7
    assert os.fstat(fd).st_blocks * 512 >= nbytes
    assert not os.get_inheritable(fd)
    os.close(fd)


def test_without_memfd_a_file_without_a_name_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    fd, ours = anonymous_block(1 << 17)
    assert os.fstat(fd).st_nlink == 0
    assert ours[:] == bytes(1 << 17)
    os.close(fd)


def test_without_fallocate_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "posix_fallocate")
    fd, _ = anonymous_block(200_000)
    stat = os.fstat(fd)
    assert (stat.st_size, stat.st_blocks * 512 >= 200_000) == (200_000, True)
    os.close(fd)


def test_too_little_is_a_sentence_with_the_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(memory, "_free_bytes", lambda: 5 << 20)
    monkeypatch.setattr(os, "posix_fallocate", no_space)
    for nbytes in (3 << 20, 6 << 20):  # refused by the file system, and before it is asked
        with pytest.raises(ConfigError) as raised:
            anonymous_block(nbytes)
        said = f"need {nbytes >> 20}.0 MiB of shared memory and 5.0 MiB are free (No space"
        assert said in str(raised.value)


def test_programs_do_not_inherit_the_file() -> None:
    with anonymous_file() as file:
        assert not os.get_inheritable(file.fileno())
