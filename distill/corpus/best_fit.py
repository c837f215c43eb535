"""Best-fit-decreasing packing in windows of documents: a pure function of lengths."""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np

WINDOW = 4096
"""Documents that are packed together. A larger window pads less; a sample holds documents of one window alone."""


def best_fit(lengths: np.ndarray, capacity: int, window: int = WINDOW) -> np.ndarray:
    """Return the number of each length's bin (int64, of the shape of `lengths`), so that no bin is over `capacity`.

    Each `window` lengths are packed by themselves, so more of them change no earlier bin: the longest first, each into
    the fullest bin that has room for it, or into a new one. Bins are numbered in the order of their first item.
    Source: best-fit decreasing, Johnson 1973. Lengths are at least 1 and at most `capacity`.
    """
    bins = np.empty(len(lengths), dtype=np.int64)
    done = 0
    for begin in range(0, len(lengths), window):
        found = _window(lengths[begin : begin + window], capacity)
        bins[begin : begin + window] = done + found
        done += int(found.max()) + 1
    return bins


def _window(lengths: np.ndarray, capacity: int) -> np.ndarray:
    rooms: list[int] = []
    """Sorted; the room in a bin times the number of lengths, plus the bin's number."""
    each, count = len(lengths), 0
    bins = np.empty(each, dtype=np.int64)
    order = np.argsort(-lengths, kind="stable")
    for item, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        at = bisect_left(rooms, length * each)
        if at < len(rooms):
            room, number = divmod(rooms.pop(at), each)
        else:
            room, number, count = capacity, count, count + 1
        bins[item] = number
        if room > length:
            insort(rooms, (room - length) * each + number)
    _, firsts = np.unique(bins, return_index=True)
    rank = np.empty(count, dtype=np.int64)
    rank[np.argsort(firsts)] = np.arange(count)
    return rank[bins]
