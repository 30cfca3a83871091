"""Weights between machines: asked for, in chunks, whole or not at all."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from headrace.errors import PeerLost
from headrace.run import remote_weights
from headrace.run.remote_weights import FollowedWeights, OfferedWeights
from headrace.transport import wire


class Weighed:
    """A learner and a host of weights, with what is under way between them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, chunk: int = 64) -> None:
        monkeypatch.setattr(remote_weights, "CHUNK_NBYTES", chunk)
        self.now_s = 0.0
        self.learner = torch.nn.Linear(20, 3)
        self.host = torch.nn.Linear(20, 3).to(torch.bfloat16)
        self.down: list[wire.Message] = []
        self.up: list[wire.Message] = []
        self.offered = OfferedWeights(
            self.host,
            send=lambda _, message: self.down.append(wire.decode(message)),
            now_s=lambda: self.now_s,
        )
        self.followed = FollowedWeights(
            self.host,
            send=lambda message: self.up.append(wire.decode(message)),
            listen=lambda _: None,
        )

    def publish(self, version: int) -> None:
        with torch.no_grad():
            self.learner.weight.fill_(version)
        self.offered.publish(self.learner, version)

    def ask(self, *, at_rest: bool = True) -> None:
        """Lets what the host said arrive, at a learner that is at rest or not."""
        while self.up:
            message = self.up.pop(0)
            waits = self.offered.ask(0, version=message.sequence - 1, chunk=message.block)
            if waits and at_rest:
                self.offered.attend()

    def whole(self, *, at_rest: bool = True) -> int:
        """Lets everything arrive; returns the host's version."""
        while self.up or self.down:
            self.ask(at_rest=at_rest)
            while self.down:
                self.followed.take(self.down.pop(0))
        assert (self.host.weight == float(max(0, self.followed.pull()))).all()
        return self.followed.pull()


def test_weights_go_in_chunks_and_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    between = Weighed(monkeypatch)
    with torch.no_grad():
        between.host.weight.zero_()
    for version in range(5):
        between.publish(version)
    assert between.offered.reads == 0, "nobody had asked"
    assert between.offered.newest_version == 4
    between.ask(at_rest=False)
    assert not between.down
    between.offered.attend()
    assert len(between.down) == 1, "one chunk at a time"
    assert between.down[0].text["chunks"] > 2
    assert between.whole() == 4
    between.offered.attend()
    assert not between.down, "it has the newest"
    between.publish(5)
    between.publish(6)
    assert between.whole(at_rest=False) == 5, "a set is finished before the next"
    between.publish(7)
    assert between.whole() == 7, "and what came between is skipped"
    assert between.offered.reads == 3


def test_reading_weights_takes_a_tenth_of_a_busy_learner(monkeypatch: pytest.MonkeyPatch) -> None:
    between = Weighed(monkeypatch, chunk=1 << 20)
    encode = remote_weights.encode_weights

    def slow(flat: Any) -> list[bytes]:
        between.now_s += 1.0
        return encode(flat)

    monkeypatch.setattr(remote_weights, "encode_weights", slow)
    between.ask()
    versions = []
    for version in range(40):
        between.publish(version)
        versions.append(between.whole(at_rest=False))
        between.now_s += 1.0
    assert 3 <= between.offered.reads <= 6
    assert versions == sorted(versions)
    between.publish(99)
    between.offered.attend()
    assert between.whole() == 99, "a learner that waits has the time"


def test_torn_weights_are_thrown_away(monkeypatch: pytest.MonkeyPatch) -> None:
    between = Weighed(monkeypatch)
    with torch.no_grad():
        between.host.weight.zero_()
    between.ask()
    between.publish(1)
    between.followed.take(between.down.pop(0))
    between.ask()
    second = between.down.pop(0)
    between.followed.take(second._replace(sequence=9))  # of another set
    assert between.up[-1].block == 0, "it asks for a whole set at once"
    assert between.whole() == 1
    between.publish(2)
    flipped = np.array(between.down[0].arrays[0])
    flipped[-1] ^= 1
    between.down[0] = between.down[0]._replace(arrays=(flipped,))
    while between.down[0].block + 1 < between.down[0].text["chunks"]:
        between.followed.take(between.down.pop(0))
        between.ask()
    between.followed.take(between.down.pop(0))  # the sum says no
    assert between.followed.pull() == 1
    assert (between.host.weight == 1).all(), "whole or not at all"
    assert between.whole() == 2
    between.publish(3)
    broken = between.down.pop(0)._replace(arrays=())
    for _ in range(2):
        between.followed.take(broken)
    with pytest.raises(PeerLost, match="torn 3 times"):
        between.followed.take(broken)
