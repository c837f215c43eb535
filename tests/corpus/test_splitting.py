"""A document's side depends on its content alone; the seed orders the training documents and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from distill.corpus.splitting import check_sides, split_rows, spread
from distill.errors import UserError

SHARES = np.random.default_rng(3).random(2_000)


def test_every_document_is_on_exactly_one_side() -> None:
    train, held = split_rows(SHARES, 0.1, seed=0)
    assert sorted([*train, *held]) == list(range(len(SHARES)))
    assert 140 < len(held) < 260


def test_side_does_not_depend_on_order_or_company() -> None:
    order = np.random.default_rng(4).permutation(len(SHARES))
    _, held = split_rows(SHARES, 0.1, seed=0)
    _, held_shuffled = split_rows(SHARES[order], 0.1, seed=5)
    _, held_half = split_rows(SHARES[:1_000], 0.1, seed=0)
    assert set(order[held_shuffled]) == set(held)
    assert set(held_half) == {row for row in held if row < 1_000}


def test_a_larger_share_holds_out_more_and_frees_none() -> None:
    assert set(split_rows(SHARES, 0.05, 0)[1]) < set(split_rows(SHARES, 0.2, 0)[1])


def test_seed_orders_training_documents_only() -> None:
    (train, held), (same, _), (other, held_other) = (split_rows(SHARES, 0.1, seed) for seed in (1, 1, 2))
    assert np.array_equal(train, same)
    assert not np.array_equal(train, other)
    assert set(train) == set(other)
    assert np.array_equal(held, held_other)
    assert np.array_equal(held, np.sort(held))


def test_empty_documents_are_on_neither_side() -> None:
    shares = np.array([0.01, 2.0, 0.5, 2.0])
    train, held = split_rows(shares, 0.1, seed=0)
    assert (train.tolist(), held.tolist()) == ([2], [0])


def test_held_out_zero_holds_out_nothing() -> None:
    train, held = split_rows(np.array([0.0, 0.5]), 0.0, seed=0)
    assert (sorted(train), held.tolist()) == ([0, 1], [])
    check_sides("corpus", len(train), len(held), 0.0)


@pytest.mark.parametrize(("shares", "message"), [([0.5, 0.6], "none of the 2"), ([0.01], "none is left to train")])
def test_an_empty_side_is_an_error(shares: list[float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_sides("corpus", *map(len, split_rows(np.array(shares), 0.1, seed=0)), 0.1)


@pytest.mark.parametrize("total", [0, 1, 2, 3, 8, 37, 1000])
def test_every_beginning_of_the_order_is_spread_over_all(total: int) -> None:
    order = spread(total)
    assert sorted(order.tolist()) == list(range(total))
    for count in range(1, total + 1, max(1, total // 40)):
        gaps = np.diff([-1, *sorted(order[:count].tolist()), total])
        assert gaps.max() <= 4 * total / count + 1, "no stretch is left out"
