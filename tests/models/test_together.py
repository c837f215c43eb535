"""Batches go through the layers of a streamed teacher together, as many as the reading asks for; no result changes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from distill.models.together import STATES_BYTES, Together, batches_for, most_samples, sample_bytes


def settle(computing: float, reading: float, most: int = 999, shard_samples: int = 999) -> Together:
    """Go with a teacher of so many seconds a batch and a reading until the number stays."""
    teacher = SimpleNamespace(pace=None, bytes_read=2_000_000_000)
    together = Together(teacher)
    together.shard_samples = shard_samples
    for _ in range(12):
        teacher.pace = max(together.batches * computing, reading), reading
        together.learn(together.batches, 4, most)
    return together


@pytest.mark.parametrize(
    ("computing", "reading", "batches"), [(10, 1, 1), (10, 10, 2), (1, 10, 16), (1, 12.9, 32), (1, 0, 1), (10, 0, 1)]
)
def test_batches_are_added_until_the_reading_holds_nothing_up(
    computing: float, reading: float, batches: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert settle(computing, reading).batches == batches == batches_for(computing, reading, 999)
    assert f"teacher: {4 * batches} samples go through its layers together ({batches} ×" in capsys.readouterr().out


def test_neither_memory_nor_shards_are_overrun(capsys: pytest.CaptureFixture[str]) -> None:
    assert settle(1, 100, most=33).batches == 8 == batches_for(1, 100, 33 // 4)
    assert settle(1, 100, most=3).batches == 1
    assert settle(1, 100, shard_samples=20).batches == 4
    assert capsys.readouterr().out.count("host_memory and keep_layers read less") == 3
    assert 0.9 * STATES_BYTES < most_samples(1024, 2048, 2) * sample_bytes(1024, 2048, 2) <= STATES_BYTES


def test_what_says_nothing_of_the_pace_teaches_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """The first run reads what stays in memory; a shard's rest is smaller; other teachers read nothing."""
    teacher = SimpleNamespace(pace=(10.0, 10.0), bytes_read=1)
    together = Together(teacher)
    together.shard_samples = 999
    together.learn(1, 4, 999)
    assert together.batches == 1
    together.learn(1, 4, 999)
    together.learn(1, 4, 999)
    assert together.batches == 2
    assert together.halve() and not together.halve() and together.batches == 1
    together.learn(1, 4, 999)
    assert together.batches == 1, "memory ran out once"
    for _ in range(3):
        (other := Together(SimpleNamespace())).learn(1, 4, 999)
        assert other.batches == 1
    assert not capsys.readouterr().out
