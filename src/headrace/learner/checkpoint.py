"""Checkpoints: safetensors plus JSON, never pickle, never half written.

```
checkpoints/agent_steps_000012345678/
  weights.safetensors  training.safetensors ...   one file per group of tensors
  meta.json            schema, counters, and size and SHA-256 of every file beside it
```

A checkpoint is written to a hidden folder beside its place, synced and renamed: a process that is
killed, or a disk that is full, leaves the earlier ones as they were. One process writes at a time;
the lock of the run directory sees to that.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from headrace import run_files
from headrace.errors import ConfigError

SCHEMA = 1
"""Raised by one whenever an older reader would misread the files."""

_NAME = re.compile(r"agent_steps_(\d{12,})(\.replaced)?")
_GROUP = re.compile(r"[A-Za-z0-9_]+")
_FILE = re.compile(rf"({_GROUP.pattern})\.safetensors")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MOST_META_NBYTES = 1 << 26  # parsed, JSON may take twenty times as much
_INT64_END = 1 << 63
_PIECE_NBYTES = 1 << 26
_DTYPES = {  # as safetensors calls them
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.bool: "BOOL",
}
_OWN_KEYS = ("schema", "agent_steps", "files", "meta_sha256")


class DamagedCheckpoint(ConfigError):
    """A file of a checkpoint is not as it was written; an older checkpoint may be whole."""


class Checkpoint(NamedTuple):
    """A whole checkpoint, read and verified."""

    path: Path
    tensors: dict[str, dict[str, Tensor]]  # group -> name -> tensor, on the CPU
    meta: dict[str, Any]  # what the caller of `save` gave, with schema, agent_steps and files


def save(
    directory: Path,
    *,
    agent_steps: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    meta: Mapping[str, Any],
    keep: int,
) -> Path:
    """Writes one checkpoint whole or not at all, then deletes what is too old.

    Args:
        directory: folder of all checkpoints of the run; made if missing.
        agent_steps: names the checkpoint; the same number again replaces it.
        tensors: group -> name -> tensor on any device; each group becomes one file. Groups are made
            of letters, digits and underscores; names are free.
        meta: anything that JSON holds; may not use the keys that the checkpoint writes itself.
        keep: newest checkpoints that stay, counted up to this one; 0 keeps all.

    Raises:
        OSError: the disk is full or may not be written; earlier checkpoints are intact.
        ConfigError: the folder is a link, or `meta` is too large to be read again.
        ValueError: a group or a key of `meta` is not allowed.
    """
    _check_names(tensors, meta)
    run_files.ensure_folder(directory)
    directory.mkdir(parents=True, exist_ok=True)
    # Before writing, so that what a killed process left does not fill the disk for its successor.
    _remove_hidden(directory)
    final = directory / f"agent_steps_{agent_steps:012d}"
    temporary = _hidden(final)
    try:
        temporary.mkdir()
        files = {}
        for group, named in tensors.items():
            name = f"{group}.safetensors"
            files[name] = _write_file(temporary / name, _tensor_file(named))
        own = {"schema": SCHEMA, "agent_steps": agent_steps, "files": files}
        _write_file(temporary / "meta.json", [_encode_meta({**own, **meta})])
        _sync_folder(temporary)
        _put_in_place(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _prune(directory, agent_steps, keep)
    return final


def _check_names(tensors: Mapping[str, Mapping[str, Tensor]], meta: Mapping[str, Any]) -> None:
    for group, named in tensors.items():
        if not _GROUP.fullmatch(group):
            raise ValueError(f"group {group!r} must be made of letters, digits and underscores")
        if "__metadata__" in named:
            raise ValueError(f"group {group!r}: the name '__metadata__' belongs to safetensors")
    if taken := sorted(set(_OWN_KEYS) & set(meta)):
        raise ValueError(f"meta may not use the keys of the checkpoint itself: {', '.join(taken)}")


def _tensor_file(named: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """Yields the bytes of a safetensors file, in pieces: a replay may be most of the memory.

    The library's own writer wants all tensors in one string first.
    """
    # The widest first, as the library has them: each begins at a multiple of its items.
    order = sorted(named, key=lambda name: (-named[name].element_size(), name))
    header, end = {}, 0
    for name in order:
        tensor = named[name]
        begin, end = end, end + tensor.numel() * tensor.element_size()
        kind, shape = _DTYPES[tensor.dtype], list(tensor.shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        row_major = named[name].detach().contiguous().reshape(-1)  # wherever it is
        step = _PIECE_NBYTES // row_major.element_size()
        for start in range(0, len(row_major), step):
            yield row_major[start : start + step].cpu().view(torch.uint8).numpy().data


def _write_file(path: Path, pieces: Iterable[bytes | memoryview]) -> dict[str, str | int]:
    """Writes and syncs one file; returns what `read` needs to verify it."""
    digest, nbytes = hashlib.sha256(), 0
    with path.open("wb") as file:
        for piece in pieces:
            file.write(piece)
            digest.update(piece)
            nbytes += len(piece)
        file.flush()
        os.fsync(file.fileno())
    return {"sha256": digest.hexdigest(), "nbytes": nbytes}


def _encode_meta(content: Mapping[str, Any]) -> bytes:
    # Through JSON first: the digest is of what a reader will see, where every key is a string.
    seen = json.loads(json.dumps(content))
    data = json.dumps({**seen, "meta_sha256": _digest_of_meta(seen)}, indent=1).encode()
    if len(data) > _MOST_META_NBYTES:
        raise ConfigError(
            f"meta.json would have {len(data)} bytes, and {_MOST_META_NBYTES} can be read again: "
            "have the environment, or the algorithm, give arrays as its state instead of lists, or "
            "train without --lockstep"
        )
    return data


def _digest_of_meta(content: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in content.items() if key != "meta_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put_in_place(temporary: Path, final: Path) -> None:
    """Renames; a folder cannot be renamed over a full one, so an older twin steps aside first.

    A kill between the two renames leaves the twin under its other name, which readers know as well.
    """
    aside = final.with_name(f"{final.name}.replaced")
    had_twin = os.path.lexists(final)
    if had_twin:
        _remove(aside)
        final.rename(aside)
    try:
        temporary.rename(final)
    except OSError:
        if had_twin:
            aside.rename(final)
        raise
    _sync_folder(final.parent)


def _prune(directory: Path, agent_steps: int, keep: int) -> None:
    # Newer ones stay uncounted: after a resume from an older checkpoint they would otherwise fill
    # the quota, and the one just written would go.
    past = [path for steps, path in _newest_first(directory) if steps <= agent_steps]
    whole = [path for path in past if not path.name.endswith(".replaced")]
    too_old = whole[keep:] if keep else []
    replaced = [path for path in past if path not in whole]
    for path in [*replaced, *too_old]:
        _remove(path)


def _remove(folder: Path) -> None:
    """Hides a checkpoint, then deletes it: a kill half-way leaves nothing damaged in sight."""
    if os.path.lexists(folder):
        hidden = _hidden(folder)
        folder.rename(hidden)
        run_files.remove(hidden)


def _hidden(folder: Path) -> Path:
    """Returns a new name out of sight: what has an old one may not go away."""
    return folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")


def _remove_hidden(directory: Path) -> None:
    for path in directory.glob(".agent_steps_*"):
        run_files.remove(path)


def read(path: Path, *, without: Collection[str] = ()) -> Checkpoint:
    """Reads one checkpoint; parses no tensor before its file's size and SHA-256 are right.

    The groups `without` are neither read nor verified.

    Raises:
        DamagedCheckpoint: names the file and what is wrong with it.
        ConfigError: the checkpoint was written in another schema.
    """
    with _damage(path):
        run_files.ensure_folder(path)
    meta = _read_meta(path / "meta.json")
    tensors = {}
    for name, expected in meta["files"].items():
        group = name.removesuffix(".safetensors")
        if group in without:
            continue
        _verify(path / name, **expected)
        try:
            tensors[group] = safetensors.torch.load_file(path / name)
        except (safetensors.SafetensorError, TypeError) as error:  # a shape that torch cannot have
            said = str(error)[:200]  # it may repeat what the file says
            raise DamagedCheckpoint(f"{path / name} is not a safetensors file: {said}") from error
    return Checkpoint(path, tensors, meta)


def newest_whole(
    directory: Path,
    *,
    without: Collection[str] = (),
    check: Callable[[Checkpoint], None] = lambda _: None,
) -> tuple[Checkpoint | None, list[str]]:
    """Finds where to go on from; the groups `without` may be damaged, and are not read.

    Args:
        directory: folder of all checkpoints of the run.
        without: groups that are not wanted.
        check: raises DamagedCheckpoint where the caller's own part of a checkpoint is not whole.

    Returns:
        The newest whole checkpoint, None if there is none, and one sentence for each newer one that
        is damaged and was skipped.

    Raises:
        ConfigError: the newest that can be read was written in another schema, or the folder is a
            link.
    """
    warnings: list[str] = []
    for _, path in _newest_first(directory):
        try:
            found = read(path, without=without)
            check(found)
            return found, warnings
        except DamagedCheckpoint as error:
            warnings.append(f"skipped the damaged checkpoint {path.name}: {error}")
    return None, warnings


def _newest_first(directory: Path) -> list[tuple[int, Path]]:
    """Checkpoints as (agent_steps, path); one that was set aside follows its twin."""
    run_files.ensure_folder(directory)
    if not directory.is_dir():
        return []
    found = [(match, path) for path in directory.iterdir() if (match := _NAME.fullmatch(path.name))]
    found.sort(key=lambda pair: (int(pair[0][1]), pair[0][2] is None), reverse=True)
    return [(int(match[1]), path) for match, path in found]


def _read_meta(path: Path) -> dict[str, Any]:
    with _damage(path):
        data = run_files.read(path, _MOST_META_NBYTES)
    try:
        meta = json.loads(data)
        if not isinstance(meta, dict) or type(meta.get("schema")) is not int:
            raise DamagedCheckpoint(f"{path} names no schema")
        if meta["schema"] != SCHEMA:
            raise ConfigError(
                f"{path} has schema {meta['schema']} but this headrace reads schema {SCHEMA}: use "
                "the version of headrace that wrote the run, or start a new run with another --out"
            )
        if meta.get("meta_sha256") != _digest_of_meta(meta):
            raise DamagedCheckpoint(f"{path} does not match its own SHA-256")
    except ValueError as error:
        raise DamagedCheckpoint(f"{path} is not JSON: {error}") from error
    except RecursionError as error:
        raise DamagedCheckpoint(f"{path} is nested too deeply") from error
    _check_own(path, meta)
    return meta


def _check_own(path: Path, meta: Mapping[str, Any]) -> None:
    """Looks at what `save` has added: the SHA-256 shows accidents, and anybody can make one."""
    steps, files = meta.get("agent_steps"), meta.get("files")
    if type(steps) is not int or not 0 <= steps < _INT64_END:
        raise DamagedCheckpoint(f"{path} has no agent_steps")
    if not isinstance(files, dict):
        raise DamagedCheckpoint(f"{path} has no list of files")
    for name, expected in files.items():
        if not _FILE.fullmatch(name):  # which keeps it inside the folder, too
            raise DamagedCheckpoint(f"{path} names a file {name[:80]!r}, which is none of ours")
        match expected:
            case {"sha256": str(sha256), "nbytes": int(nbytes), **rest} if not rest:
                known = _SHA256.fullmatch(sha256) and 0 <= nbytes < _INT64_END
            case _:
                known = None
        if not known:
            raise DamagedCheckpoint(f"{path} does not say size and SHA-256 of {name}")


def _verify(path: Path, *, sha256: str, nbytes: int) -> None:
    digest, left = hashlib.sha256(), nbytes
    with _damage(path), open(path, "rb", opener=run_files.opener) as file:
        size = os.fstat(file.fileno()).st_size
        if size != nbytes:
            raise DamagedCheckpoint(f"{path} has {size} bytes instead of {nbytes}")
        while piece := file.read(min(left, _PIECE_NBYTES)):
            digest.update(piece)
            left -= len(piece)
    if digest.hexdigest() != sha256:
        raise DamagedCheckpoint(f"{path} does not match its SHA-256")


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """What cannot be opened in the block makes a checkpoint damaged."""
    try:
        yield
    except FileNotFoundError as error:
        raise DamagedCheckpoint(f"{path} is missing") from error
    except OSError as error:
        raise DamagedCheckpoint(f"{path} cannot be read: {error.strerror}") from error
    except ConfigError as error:  # it says where
        raise DamagedCheckpoint(str(error)) from error
