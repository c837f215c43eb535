"""The writer beside the teacher: all is written, in order, and its errors and the user's interruptions are heard."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from distill.cache.format.folder import Manifest
from distill.cache.making.background import BackgroundWriter
from distill.errors import UserError


@pytest.fixture
def manifest(make_manifest: Any) -> Manifest:
    return make_manifest(samples=10, shard_samples=4)


class Sink:
    """A writer that fails at a shard, or waits before each."""

    def __init__(self, manifest: Manifest, fails_at: int = 99, gate: threading.Event | None = None) -> None:
        self.manifest, self.fails_at, self.gate = manifest, fails_at, gate
        self.written: list[int] = []

    def add(self, shard: int, records: Any, batch_size: int) -> Any:
        if self.gate:
            assert self.gate.wait(60)
        if shard == self.fails_at:
            raise UserError("disk full")
        self.written.append(shard)
        return type("Entry", (), {"bytes": 10, "positions": 2})


def background(sink: Sink) -> BackgroundWriter:
    return BackgroundWriter(sink)  # type: ignore[arg-type]


def test_the_background_writer_writes_everything_in_order(manifest: Manifest) -> None:
    sink = Sink(manifest)
    with background(sink) as writer:
        for shard in range(20):
            writer.add(shard, [], 8)
    assert sink.written == list(range(20)) and (writer.bytes, writer.positions) == (200, 40)


@pytest.mark.parametrize("shards", [1, 3, 50])
def test_an_error_of_the_writer_is_never_lost_and_never_hangs(manifest: Manifest, shards: int) -> None:
    """At the last shard it comes out at the end; with a queue full of others, at the next call."""
    sink, given = Sink(manifest, fails_at=0), 0
    with pytest.raises(UserError, match="disk full"), background(sink) as writer:
        for shard in range(shards):
            writer.add(shard, [], 8)
            given += 1
    assert sink.written == [] and given <= 4


def test_a_batch_after_the_error_is_the_last(manifest: Manifest) -> None:
    with pytest.raises(UserError, match="disk full"), background(Sink(manifest, fails_at=0)) as writer:
        writer.add(0, [], 8)
        writer._thread.join(60)
        writer.check()
        pytest.fail("the error did not come out")


def test_what_was_handed_over_before_an_interruption_is_written(manifest: Manifest) -> None:
    gate = threading.Event()
    sink = Sink(manifest, gate=gate)
    with pytest.raises(KeyboardInterrupt), background(sink) as writer:
        writer.add(0, [], 8)
        writer.add(1, [], 8)
        gate.set()
        raise KeyboardInterrupt
    assert sink.written == [0, 1]


def test_no_more_batches_wait_than_the_queue_holds(manifest: Manifest) -> None:
    gate, given = threading.Event(), []
    with background(Sink(manifest, gate=gate)) as writer:

        def give() -> None:
            for shard in range(10):
                writer.add(shard, [], 8)
                given.append(shard)

        giver = threading.Thread(target=give)
        giver.start()
        giver.join(1)
        assert len(given) <= 3  # two wait, one is being written
        gate.set()
        giver.join(60)
    assert len(given) == 10
