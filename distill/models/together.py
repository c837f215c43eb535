"""Batches that a teacher takes through its layers together, because it reads these anew for every run."""

from __future__ import annotations

from typing import Any

from distill.system.progress import say
from distill.system.units import duration, size

READING = 0.8
"""Share of a run's time from which on the reading of layers, which goes on while others compute, holds it up."""
STATES_BYTES = 2**29
"""Most bytes of hidden states and masks that the samples of several batches may take on the device."""


def sample_bytes(length: int, hidden_size: int, itemsize: int) -> int:
    """Return the bytes of a sample that waits between layers: its input and hidden states, and a mask of positions."""
    return length * (2 * hidden_size * itemsize + length)


def most_samples(length: int, hidden_size: int, itemsize: int) -> int:
    """Return how many samples may go together."""
    return STATES_BYTES // sample_bytes(length, hidden_size, itemsize)


def batches_for(computing: float, reading: float, most: int) -> int:
    """Return the number that `Together` comes to, from the seconds of one batch and of reading the layers."""
    batches = 1
    while reading > READING * max(batches * computing, reading) and 2 * batches <= most:
        batches *= 2
    return batches


class Together:
    """The number of batches that go together: it doubles while the teacher waits for the disk, and is then said.

    A teacher has the attribute `pace` if it reads its layers anew for every run: seconds of the last run, and those in
    which layers were read meanwhile. Each batch is computed as it would be alone, so the number changes no result.
    """

    def __init__(self, teacher: Any) -> None:
        self._teacher = teacher
        self.batches = 1
        """Number of batches for the next run."""
        self.shard_samples = 1
        """Samples of a shard, which no run goes beyond."""
        self._runs, self._is_settled = 0, False

    def learn(self, batches: int, samples: int, most: int) -> None:
        """Learn from a run of so many batches of so many samples each; `most` samples may go together."""
        pace: tuple[float, float] | None = getattr(self._teacher, "pace", None)
        self._runs += 1
        # The first run reads what stays in the host's memory; a shard's last one may be smaller.
        if pace is None or self._is_settled or self._runs == 1 or batches != self.batches:
            return
        seconds, reading = pace
        is_held_up = reading > READING * seconds
        if is_held_up and 2 * batches * samples <= min(most, self.shard_samples):
            self.batches = 2 * batches
            return
        self._is_settled = True
        if nbytes := getattr(self._teacher, "bytes_read", 0):
            advice = "; teacher.options.host_memory and keep_layers read less" if is_held_up else ""
            count = batches * samples
            say(
                f"teacher: {count} {'sample goes' if count == 1 else 'samples go'} through its layers together "
                f"({batches} × cache.batch_size), "
                f"{duration(seconds)}, while {size(nbytes)} are read in {duration(reading)}{advice}"
            )

    def halve(self) -> bool:
        """Take half of the batches from now on, since memory ran out; False if it is one already."""
        self._is_settled = True
        self.batches, before = max(self.batches // 2, 1), self.batches
        return self.batches < before
