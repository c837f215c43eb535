"""The choice of documents that are never trained on, and the order of the others."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from distill.errors import UserError


def split_rows(shares: np.ndarray, held_out: float, seed: int | Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of the training documents, shuffled with `seed`, and of the held-out documents, in file order.

    `shares` is float64 [documents]: a hash of each document's content as a number in [0, 1]. An empty document has 2
    and
    is on neither side. A document is held out if its share is below `held_out`. So the same text is always on the same
    side, in any order, in any file, and beside any other documents.
    """
    held_rows = np.flatnonzero(shares < held_out)
    train_rows = np.flatnonzero((shares >= held_out) & (shares <= 1))
    return np.random.default_rng(seed).permutation(train_rows), held_rows


def mix(rows: np.ndarray, owners: np.ndarray, tokens: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """Return documents of several sources in an order whose every beginning has the sources' tokens by their weights.

    The order ends where a source has no more: the others' further documents are left out. Documents of one source keep
    their order. Each document takes its turn when its middle is due, as in weighted fair queueing.

    `rows` are int64 [documents]; `owners`, the sources' numbers, and `tokens` are those of all rows of the table.
    """
    due = np.empty(len(rows))
    end = np.inf
    for owner, weight in enumerate(weights):
        places = np.flatnonzero(owners[rows] == owner)
        lengths = tokens[rows[places]].astype(np.float64)
        behind = np.cumsum(lengths)
        due[places] = (behind - lengths / 2) / weight
        end = min(end, behind[-1] / weight if len(behind) else 0.0)
    order = np.argsort(due, kind="stable")
    return rows[order[due[order] < end]]


def spread(total: int) -> np.ndarray:
    """Return the numbers 0 to `total` - 1 in an order whose every beginning is spread over all of them.

    They stand in the order of their bits read backwards (van der Corput's sequence): 0, 4, 2, 6, 1, 5, 3, 7.
    """
    bits = max(total - 1, 0).bit_length()
    numbers = np.arange(2**bits)
    reversed_bits = np.zeros_like(numbers)
    for bit in range(bits):
        reversed_bits |= (numbers >> bit & 1) << (bits - 1 - bit)
    return reversed_bits[reversed_bits < total]


def check_sides(path: str, train: int, held: int, held_out: float) -> None:
    """Raise UserError if one of the two sides, of so many documents, was asked for and has none."""
    documents = train + held
    if train == 0:
        raise UserError(
            f"{path}: all {documents} documents are held out, none is left to train on: lower corpus.held_out "
            f"(now {held_out}; 0: none) or give more documents"
        )
    if held_out > 0 and held == 0:
        raise UserError(
            f"{path}: none of the {documents} documents falls into the held-out share of {held_out}: raise "
            "corpus.held_out, give more or shorter documents (say, one passage a line of a .jsonl file), or set it to 0"
        )
