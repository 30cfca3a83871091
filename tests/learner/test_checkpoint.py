"""Checkpoints survive kills, full disks and damage; trees of state come back exactly."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings

from headrace.errors import ConfigError
from headrace.learner import checkpoint
from headrace.learner.checkpoint import DamagedCheckpoint, newest_whole, read
from headrace.learner.flattening import flatten, unflatten


def write(directory: Path, agent_steps: int, keep: int = 0, size: int = 4) -> Path:
    weights = {"torso/conv.weight": torch.full((size, 2), float(agent_steps))}
    training = {"count": torch.tensor(agent_steps)}
    return checkpoint.save(
        directory,
        agent_steps=agent_steps,
        tensors={"weights": weights, "training": training},
        meta={"episodes": agent_steps * 2},
        keep=keep,
    )


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_round_trip_keeps_names_dtypes_shapes_and_meta(tmp_path: Path) -> None:
    shared = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "weights": {
            "tied": shared,
            "tied twice": shared,
            "transposed": shared.t(),
            "expanded": torch.ones(1).expand(5),
            "half / é": torch.tensor([1.5], dtype=torch.bfloat16),
        },
        "training": {"scalar": torch.tensor(7), "none": torch.empty(0), "mask": torch.ones(2) > 0},
        "empty": {},
    }
    meta = {"name": "é", "numbers": [1, 2.5, None], "states": {"3": 2**127}}
    path = checkpoint.save(tmp_path / "c", agent_steps=12, tensors=tensors, meta=meta, keep=1)
    assert path.name == "agent_steps_000000000012"
    found = read(path)
    assert found.path == path
    assert {key: found.meta[key] for key in meta} == meta
    assert (found.meta["agent_steps"], found.meta["schema"]) == (12, checkpoint.SCHEMA)
    assert found.tensors.keys() == tensors.keys()
    for group, named in tensors.items():
        assert found.tensors[group].keys() == named.keys()
        for name, tensor in named.items():
            loaded = found.tensors[group][name]
            assert loaded.dtype == tensor.dtype
            torch.testing.assert_close(loaded, tensor, rtol=0, atol=0)


def test_without_checkpoints_there_is_none(tmp_path: Path) -> None:
    assert newest_whole(tmp_path / "nowhere") == (None, [])


def test_keeps_the_newest(tmp_path: Path) -> None:
    for steps in (9, 100, 20, 30):
        write(tmp_path, steps, keep=2)
    # 100 is newer than what was written after it, so it neither goes nor counts.
    assert [int(name[-12:]) for name in names(tmp_path)] == [20, 30, 100]


def test_keep_zero_keeps_all(tmp_path: Path) -> None:
    for steps in range(4):
        write(tmp_path, steps)
    assert len(names(tmp_path)) == 4


def test_same_steps_again_replaces(tmp_path: Path) -> None:
    write(tmp_path, 5, size=4)
    path = write(tmp_path, 5, size=8)
    assert names(tmp_path) == [path.name]
    assert read(path).tensors["weights"]["torso/conv.weight"].shape == (8, 2)


def test_kill_between_the_two_renames_of_a_replacement_loses_nothing(tmp_path: Path) -> None:
    write(tmp_path, 4)
    path = write(tmp_path, 5)
    path.rename(path.with_name(path.name + ".replaced"))
    found, warnings = newest_whole(tmp_path)
    assert found is not None
    assert (found.meta["agent_steps"], warnings) == (5, [])
    write(tmp_path, 5)
    assert names(tmp_path) == ["agent_steps_000000000004", "agent_steps_000000000005"]


def test_leftovers_of_a_killed_process_are_ignored_and_removed(tmp_path: Path) -> None:
    stale = tmp_path / ".agent_steps_000000000009"
    stale.mkdir()
    (stale / "weights.safetensors").write_bytes(b"half")
    assert newest_whole(tmp_path) == (None, [])
    path = write(tmp_path, 1)
    assert names(tmp_path) == [path.name]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "flipped": ("weights.safetensors", flip),
    "truncated": ("training.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-3])),
    "missing": ("weights.safetensors", Path.unlink),
    "no meta": ("meta.json", Path.unlink),
    "cut meta": ("meta.json", lambda path: path.write_bytes(path.read_bytes()[:50])),
    "not UTF-8": ("meta.json", lambda path: path.write_bytes(b'{"\xff": 1}')),
    "edited meta": (
        "meta.json",
        lambda path: path.write_text(path.read_text().replace('"episodes": 4', '"episodes": 5')),
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_checkpoint_is_skipped_with_a_warning_that_names_the_file(
    tmp_path: Path, name: str
) -> None:
    write(tmp_path, 1)
    path = write(tmp_path, 2)
    file, damage = DAMAGES[name]
    damage(path / file)
    with pytest.raises(DamagedCheckpoint, match=file):
        read(path)
    found, warnings = newest_whole(tmp_path)
    assert found is not None
    assert found.meta["agent_steps"] == 1
    assert len(warnings) == 1
    assert path.name in warnings[0]
    assert file in warnings[0]


def forged(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes a meta.json as somebody does who then writes the right SHA-256 into it."""
    meta = json.loads((path / "meta.json").read_text())
    change(meta)
    del meta["meta_sha256"]
    (path / "meta.json").write_bytes(checkpoint._encode_meta(meta))


def instead(path: Path, put: Callable[[Path], Any]) -> None:
    """Moves what is at `path` beside the checkpoints, and has `put` put something in its place."""
    path.rename(path.parents[1] / f"moved-{path.name}")
    put(path)


def linked(path: Path) -> None:
    instead(path, lambda there: there.symlink_to(path.parents[1] / f"moved-{path.name}"))


def fifo(path: Path) -> None:
    os.mkfifo(path)  # which Windows lacks


def added(name: str) -> Callable[[Path], None]:
    """Names one more file, which is there, with size and SHA-256 that are right."""

    def add(path: Path) -> None:
        (path.parent / "outside.safetensors").write_bytes(b"")
        sound = {"sha256": hashlib.sha256(b"").hexdigest(), "nbytes": 0}
        forged(path, lambda meta: meta["files"].update({name: sound}))

    return add


def entry(value: Any) -> Callable[[Path], None]:
    """Puts a value in place of size and SHA-256 of the weights."""
    return lambda path: forged(
        path, lambda meta: meta["files"].update({"weights.safetensors": value})
    )


def swapped(**values: Any) -> Callable[[Path], None]:
    return lambda path: forged(path, lambda meta: meta.update(values))


def text(data: str) -> Callable[[Path], None]:
    return lambda path: (path / "meta.json").write_text(data) and None


SHA256 = "0" * 64
STRANGE: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "weights are a link": ("is a link", lambda path: linked(path / "weights.safetensors")),
    "meta is a link": ("is a link", lambda path: linked(path / "meta.json")),
    "the folder is a link": ("is a link", linked),
    "the folder is a file": ("no folder", lambda path: instead(path, Path.touch)),
    "weights are endless": (
        "is a link",
        lambda path: instead(
            path / "weights.safetensors", lambda there: there.symlink_to("/dev/zero")
        ),
    ),
    "meta is endless": (
        "is a link",
        lambda path: instead(path / "meta.json", lambda there: there.symlink_to("/dev/zero")),
    ),
    "weights are a fifo": (
        "is a fifo",
        lambda path: instead(path / "weights.safetensors", fifo),
    ),
    "meta is a fifo": (
        "is a fifo",
        lambda path: instead(path / "meta.json", fifo),
    ),
    "weights are a folder": (
        "is a folder",
        lambda path: instead(path / "weights.safetensors", Path.mkdir),
    ),
    "a name leads up": ("'../outside.safetensors'", added("../outside.safetensors")),
    "a name is absolute": ("'/dev/null'", added("/dev/null")),
    "a name has a new line": (r"'a\\nb.safetensors'", added("a\nb.safetensors")),
    "a name ends in one": (r"safetensors\\n'", added("weights.safetensors\n")),
    "a name has an escape": (r"'\\x1b", added("\x1b[2J.safetensors")),
    "a file of another kind": ("'meta.json'", added("meta.json")),
    "deep JSON": ("too deep", text("[" * 200_000)),
    "deep JSON inside": ("too deep", text('{"schema": 1, "a": ' + "[" * 200_000)),
    "a huge number": ("not JSON", text('{"schema": 1' + "0" * 5000 + "}")),
    "a list": ("schema", text("[1]")),
    "a schema of another type": ("schema", swapped(schema="1")),
    "no schema": ("schema", swapped(schema=None)),
    "steps of another type": ("agent_steps", swapped(agent_steps=[2])),
    "steps below 0": ("agent_steps", swapped(agent_steps=-2)),
    "more steps than can be": ("agent_steps", swapped(agent_steps=10**30)),
    "no files": ("files", swapped(files=None)),
    "files as a list": ("files", swapped(files=["weights.safetensors"])),
    "a number for a file": ("SHA-256 of weights", entry(7)),
    "no size": ("SHA-256 of weights", entry({"sha256": SHA256})),
    "a size of text": ("SHA-256 of weights", entry({"sha256": SHA256, "nbytes": "7"})),
    "a size below 0": ("SHA-256 of weights", entry({"sha256": SHA256, "nbytes": -1})),
    "a huge size": ("SHA-256 of weights", entry({"sha256": SHA256, "nbytes": 10**30})),
    "a SHA-256 of another type": ("SHA-256 of weights", entry({"sha256": 7, "nbytes": 7})),
    "a SHA-256 that is none": ("SHA-256 of weights", entry({"sha256": "\n", "nbytes": 7})),
    "more than size and SHA-256": (
        "SHA-256 of weights",
        entry({"sha256": SHA256, "nbytes": 7, "path": "x"}),
    ),
    "another size": ("instead of 7", entry({"sha256": SHA256, "nbytes": 7})),
}


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fifos")
@pytest.mark.parametrize("name", STRANGE)
def test_a_strangers_checkpoint_is_damaged_like_any_other(tmp_path: Path, name: str) -> None:
    directory = tmp_path / "checkpoints"
    write(directory, 1)
    path = write(directory, 2)
    complaint, damage = STRANGE[name]
    damage(path)
    with pytest.raises(DamagedCheckpoint, match=complaint):
        read(path)
    found, warnings = newest_whole(directory)
    assert found is not None
    assert found.meta["agent_steps"] == 1
    assert [path.name in warning for warning in warnings] == [True]
    assert warnings[0].isprintable()


def test_a_shape_that_no_tensor_has_is_damage(tmp_path: Path) -> None:
    path, shape = write(tmp_path, 2), [0, 2**64 - 1]
    header = json.dumps({"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}).encode()
    data = len(header).to_bytes(8, "little") + header
    (path / "weights.safetensors").write_bytes(data)
    entry({"sha256": hashlib.sha256(data).hexdigest(), "nbytes": len(data)})(path)
    with pytest.raises(DamagedCheckpoint, match="not a safetensors file"):
        read(path)


def test_what_the_caller_finds_damaged_is_skipped_too(tmp_path: Path) -> None:
    for steps in (1, 2):
        write(tmp_path, steps)

    def check(found: checkpoint.Checkpoint) -> None:
        if found.meta["agent_steps"] == 2:
            raise DamagedCheckpoint("not mine")

    found, warnings = newest_whole(tmp_path, check=check)
    assert found is not None
    assert found.meta["agent_steps"] == 1
    assert warnings == ["skipped the damaged checkpoint agent_steps_000000000002: not mine"]


@pytest.mark.parametrize("name", [".agent_steps_x", ".agent_steps_000000000001.deleted"])
@pytest.mark.parametrize("kind", ["link", "link to nothing", "file"])
def test_hidden_leftovers_go_whatever_they_are(tmp_path: Path, name: str, kind: str) -> None:
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    for folder in (theirs, ours):
        folder.mkdir()
    (theirs / "kept").touch()
    if kind == "file":
        (ours / name).touch()
    else:
        (ours / name).symlink_to(theirs if kind == "link" else tmp_path / "nowhere")
    path = write(ours, 1)
    assert names(ours) == [path.name]
    assert names(theirs) == ["kept"]


@pytest.mark.parametrize("name", [".agent_steps_000000000001", ".agent_steps_000000000001.deleted"])
@pytest.mark.parametrize("error", [PermissionError, RecursionError])
def test_leftovers_that_cannot_be_removed_stop_no_save(
    tmp_path: Path, name: str, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).mkdir()
    remove = shutil.rmtree

    def refusing(path: Path, **settings: Any) -> None:
        if path.name == name:
            raise error
        remove(path, **settings)

    monkeypatch.setattr(shutil, "rmtree", refusing)
    for _ in range(2):  # the second takes the place of the first, which is deleted
        path = write(tmp_path, 1)
        assert names(tmp_path) == [name, path.name]
    latest = write(tmp_path, 2, keep=1)
    assert names(tmp_path) == [name, latest.name]


def test_an_old_checkpoint_that_cannot_be_removed_stops_no_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusing(_: Path, *, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise PermissionError

    write(tmp_path, 1)
    with monkeypatch.context() as context:
        context.setattr(shutil, "rmtree", refusing)
        path = write(tmp_path, 2, keep=1)
    found, warnings = newest_whole(tmp_path)
    assert found is not None
    assert (found.path, warnings) == (path, [])
    write(tmp_path, 2, keep=1)
    assert names(tmp_path) == [path.name]


def test_links_among_the_checkpoints_go_in_their_turn(tmp_path: Path) -> None:
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    theirs.mkdir()
    ours.mkdir()
    (theirs / "kept").touch()
    for steps in (1, 2):
        (ours / f"agent_steps_{steps:012d}").symlink_to(theirs)
    (ours / "agent_steps_000000000001.replaced").symlink_to(tmp_path / "nowhere")
    path = write(ours, 2, keep=1)
    assert names(ours) == [path.name]
    assert read(path).meta["agent_steps"] == 2
    assert names(theirs) == ["kept"]


def test_a_link_for_all_checkpoints_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "theirs", 1)
    before = names(tmp_path / "theirs")
    (tmp_path / "ours").symlink_to(tmp_path / "theirs")
    with pytest.raises(ConfigError, match=r"ours is a link.*delete it"):
        newest_whole(tmp_path / "ours")
    with pytest.raises(ConfigError, match=r"ours is a link.*delete it"):
        write(tmp_path / "ours", 2)
    assert names(tmp_path / "theirs") == before


def test_a_run_that_is_reached_through_a_link_is_read_and_written(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    write(tmp_path / "link" / "checkpoints", 1)
    found, warnings = newest_whole(tmp_path / "link" / "checkpoints")
    assert found is not None
    assert warnings == []


def test_a_meta_that_could_not_be_read_again_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "_MOST_META_NBYTES", 100)
    with pytest.raises(ConfigError, match=r"can be read again: .*train without --lockstep"):
        write(tmp_path, 1)
    assert names(tmp_path) == []
    monkeypatch.undo()
    path = write(tmp_path, 1)
    monkeypatch.setattr(checkpoint, "_MOST_META_NBYTES", 100)
    with pytest.raises(DamagedCheckpoint, match="over 100 bytes"):
        read(path)


def test_other_schema_is_not_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 1)
    monkeypatch.setattr(checkpoint, "SCHEMA", 41)
    write(tmp_path, 2)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match=f"schema 41 .* schema {checkpoint.SCHEMA}") as caught:
        newest_whole(tmp_path)
    assert not isinstance(caught.value, DamagedCheckpoint)


def test_names_that_would_clash_are_refused_before_writing(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"agent_steps": 1, "keep": 0}
    tensor = {"x": torch.ones(1)}
    with pytest.raises(ValueError, match="letters"):
        checkpoint.save(tmp_path, tensors={"../up": tensor}, meta={}, **arguments)
    with pytest.raises(ValueError, match="schema"):
        checkpoint.save(tmp_path, tensors={"weights": tensor}, meta={"schema": 2}, **arguments)
    assert names(tmp_path) == []


@contextmanager
def small_files_only(nbytes: int) -> Iterator[None]:
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("agent_steps", [1, 2], ids=["replacing", "new"])
def test_write_that_the_system_refuses_leaves_older_intact(
    tmp_path: Path, agent_steps: int
) -> None:
    path = write(tmp_path, 1, keep=1)
    with small_files_only(20_000), pytest.raises(OSError, match="large"):
        write(tmp_path, agent_steps, keep=1, size=10_000)
    assert names(tmp_path) == [path.name]
    assert read(path).meta["agent_steps"] == 1


def test_files_are_what_the_library_reads_and_writes(tmp_path: Path) -> None:
    image = torch.arange(48.0).view(1, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    tensors = {
        "odd": torch.arange(3, dtype=torch.uint8),
        "image": image,
        "bfloat": torch.randn(5).bfloat16(),
        "scalar": torch.tensor(7, dtype=torch.int64),
        "flag": torch.tensor([True, False]),
        "empty": torch.zeros(0, 4),
        "strided": torch.arange(10.0)[::2],
    }
    path = checkpoint.save(tmp_path, agent_steps=1, tensors={"weights": tensors}, meta={}, keep=0)
    loaded = safetensors.torch.load_file(path / "weights.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


def test_a_group_that_is_not_wanted_is_not_read(tmp_path: Path) -> None:
    groups = {"weights": {"w": torch.ones(2)}, "replay": {"frames": torch.ones(2)}}
    path = checkpoint.save(tmp_path, agent_steps=1, tensors=groups, meta={}, keep=0)
    (path / "replay.safetensors").unlink()
    found, warnings = newest_whole(tmp_path, without=("replay",))
    assert found is not None
    assert (list(found.tensors), warnings) == (["weights"], [])
    assert newest_whole(tmp_path)[0] is None


@pytest.mark.parametrize("failing", ["weights.safetensors", "meta.json"])
def test_full_disk_leaves_older_intact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    path = write(tmp_path, 1, keep=1)
    write_file = checkpoint._write_file

    def full(target: Path, pieces: Iterable[bytes]) -> dict[str, str | int]:
        if target.name == failing:
            target.write_bytes(bytes(next(iter(pieces)))[:3])
            raise OSError(28, "No space left on device")
        return write_file(target, pieces)

    monkeypatch.setattr(checkpoint, "_write_file", full)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path, 2, keep=1)
    assert names(tmp_path) == [path.name]
    assert read(path).meta["agent_steps"] == 1


KILLED = """
import os, signal, sys, time
from pathlib import Path
import torch
from headrace.learner.checkpoint import newest_whole, save

directory, delays = Path(sys.argv[1]), [float(delay) for delay in sys.argv[2:]]
torch.set_num_threads(1)

def save_forever(first, acknowledge):
    step = first
    while True:
        tensors = {"weights": {"x": torch.full((20_000,), float(step))}}
        # Every step is saved twice: the second save replaces the first.
        for _ in range(2):
            save(directory, agent_steps=step, tensors=tensors, meta={}, keep=1)
        os.write(acknowledge, step.to_bytes(8, "little"))
        step += 1

newest = 0
for delay in delays:
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        save_forever(newest + 1, send)
    os.close(send)
    newest = int.from_bytes(os.read(receive, 8), "little")
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while told := os.read(receive, 8):
        newest = int.from_bytes(told, "little")
    os.close(receive)
    found, warnings = newest_whole(directory)
    assert warnings == [], warnings
    step = found.meta["agent_steps"]
    assert newest <= step <= newest + 1, (newest, step)
    assert (found.tensors["weights"]["x"] == step).all()
    newest = step
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")
def test_kill_at_any_moment_leaves_a_whole_newest_checkpoint(tmp_path: Path) -> None:
    delays = [str(random.Random(seed).uniform(0, 0.08)) for seed in range(20)]
    finished = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), *delays],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr


def arrays(seed: int) -> np.ndarray[Any, Any]:
    dtype = ["<u4", "|b1", "<f8", ">i2", "<c16"][seed % 5]
    return np.random.default_rng(seed).integers(0, 2, size=(seed % 3, 2)).astype(dtype)


LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(max_size=3),
    st.integers(0, 30).map(arrays),
    st.integers(0, 30).map(np.uint32),
    st.floats(allow_nan=False).map(np.float64),
    st.integers(0, 3).map(lambda n: torch.arange(n, dtype=torch.int32)),
    st.floats(width=32, allow_nan=False).map(torch.tensor),
)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.one_of(st.integers(-2, 2), st.sampled_from("012/'")), inner, max_size=4),
    ),
    max_leaves=12,
)


def assert_same(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    elif isinstance(expected, np.ndarray | np.generic):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        np.testing.assert_array_equal(found, expected)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key, value in expected.items():
            assert_same(found[key], value)
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert found == expected


@settings(max_examples=60, deadline=None)
@given(TREES)
def test_unflatten_undoes_flatten_through_json_and_safetensors(tree: Any) -> None:
    tensors, skeleton = flatten(tree)
    written = checkpoint.safetensors.torch.save(
        {name: tensor.clone() for name, tensor in tensors.items()}
    )
    loaded = checkpoint.safetensors.torch.load(written)
    assert_same(unflatten(loaded, json.loads(json.dumps(skeleton))), tree)


def test_optimiser_and_random_states_go_on_bit_for_bit(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    optimiser = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimiser.step()
    numpy_generators = np.random.Generator(np.random.PCG64(3)), np.random.RandomState(3)
    tree = {
        "optimiser": optimiser.state_dict(),
        "numpy": numpy_generators[0].bit_generator.state,
        "legacy": numpy_generators[1].get_state(),
        "python": random.Random(3).getstate(),
        "torch": torch.get_rng_state(),
    }
    tensors, skeleton = flatten(tree)
    path = checkpoint.save(
        tmp_path, agent_steps=1, tensors={"training": tensors}, meta={"tree": skeleton}, keep=1
    )
    found = read(path)
    restored = unflatten(found.tensors["training"], found.meta["tree"])
    assert_same(restored, tree)
    torch.optim.Adam(model.parameters()).load_state_dict(restored["optimiser"])
    python = random.Random()
    python.setstate(restored["python"])
    assert python.random() == random.Random(3).random()


@pytest.mark.parametrize(
    ("tree", "place"),
    [({"a": [object()]}, "/a/0"), ({"a": {1.5: 1}}, "/a"), (np.array(["x"]), "/")],
)
def test_flatten_names_the_place_of_what_it_cannot_hold(tree: Any, place: str) -> None:
    with pytest.raises(TypeError, match=f"^{place}: "):
        flatten(tree)


def test_unflatten_names_a_missing_tensor() -> None:
    _, skeleton = flatten({"a": torch.ones(1)})
    with pytest.raises(ConfigError, match="/a"):
        unflatten({}, skeleton)


ARRAY = {"array": "bytes", "dtype": "<f4", "shape": [2], "scalar": False}


@pytest.mark.parametrize("copy", [True, False])
@pytest.mark.parametrize(
    "skeleton",
    [
        {"dict": 7},
        {"dict": [["key"]]},
        {"dict": [["key", 1, 2]]},
        {"dict": [[["key"], 1]]},
        {"list": None},
        {"tuple": 1.5},
        {"tensor": ["bytes"]},
        {"set": []},
        {},
        {"list": [{"tensor": "bytes"}, {"tensor": "bytes"}]},
        {"array": "bytes"},
        ARRAY | {"dtype": "O"},
        ARRAY | {"dtype": "S0"},
        ARRAY | {"dtype": "V4"},
        ARRAY | {"dtype": ["<f4"]},
        ARRAY | {"dtype": "01f4"},
        ARRAY | {"dtype": "(,1,)f4"},
        ARRAY | {"dtype": "f٤"},
        ARRAY | {"dtype": "<f8"},
        ARRAY | {"shape": [3]},
        ARRAY | {"shape": "2"},
        ARRAY | {"shape": [2, 10**30]},
        ARRAY | {"array": "half"},
    ],
    ids=str,
)
def test_a_strangers_skeleton_is_refused(skeleton: Any, copy: bool) -> None:
    tensors = {
        "bytes": torch.arange(8, dtype=torch.uint8),
        "half": torch.ones(4, dtype=torch.bfloat16),
    }
    with pytest.raises(ConfigError, match="the checkpoint"):
        unflatten(tensors, skeleton, copy=copy)


def test_a_skeleton_without_end_is_refused() -> None:
    skeleton: Any = 1
    for _ in range(5000):
        skeleton = {"list": [skeleton]}
    with pytest.raises(ConfigError, match="none of ours"):
        unflatten({}, skeleton)


def test_arrays_are_lent_where_no_copy_is_wanted() -> None:
    tensors, skeleton = flatten({"a": np.arange(3)})
    lent = unflatten(tensors, skeleton, copy=False)["a"]
    own = unflatten(tensors, skeleton)["a"]
    tensors["/a"].zero_()
    assert lent.tolist() == [0, 0, 0]
    assert own.tolist() == [0, 1, 2]
