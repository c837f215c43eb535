"""Ragged targets: rows come back from them, slices are those rows, and joining undoes slicing."""

from __future__ import annotations

import pytest
import torch

from distill.targets.sparse import SparseTargets, entry_mask

COUNTS = torch.tensor([3, 0, 1, 4, 0])
EXACT = torch.tensor([1, 0, 1, 4, 0])


def targets(rest: bool = True) -> SparseTargets:
    return SparseTargets(
        torch.arange(8) * 10, torch.arange(1, 9).float(), EXACT, COUNTS, torch.arange(5.0) if rest else None
    )


def test_padded_rows_hold_the_entries_and_nothing_else() -> None:
    ids_NK, weights_NK = targets().padded()
    assert ids_NK.tolist() == [[0, 10, 20, 0], [0] * 4, [30, 0, 0, 0], [40, 50, 60, 70], [0] * 4]
    assert weights_NK.tolist() == [[1, 2, 3, 0], [0] * 4, [4, 0, 0, 0], [5, 6, 7, 8], [0] * 4]
    rubbish_NK = torch.where(entry_mask(COUNTS, 4), ids_NK, 999)
    again = SparseTargets.of_rows(rubbish_NK, weights_NK, EXACT, COUNTS)
    assert torch.equal(again.ids_T, targets().ids_T) and torch.equal(again.weights_T, targets().weights_T)


def test_the_exact_entries_are_the_first_of_each_position() -> None:
    assert targets().exact_mask().tolist() == [True, False, False, True, True, True, True, True]


@pytest.mark.parametrize("rest", [True, False])
@pytest.mark.parametrize("cut", range(6))
def test_slices_are_the_rows_and_joining_undoes_them(rest: bool, cut: int) -> None:
    whole = targets(rest)
    first, second = whole[:cut], whole[cut:]
    assert first.counts_N.tolist() == COUNTS[:cut].tolist() and second.exact_N.tolist() == EXACT[cut:].tolist()
    assert len(first.ids_T) == COUNTS[:cut].sum()
    joined = SparseTargets.cat([first, second])
    for name, value in vars(whole).items():
        assert value is None if getattr(joined, name) is None else torch.equal(getattr(joined, name), value), name


def test_without_a_position() -> None:
    nothing = targets()[2:2]
    assert [tuple(part.shape) for part in nothing.padded()] == [(0, 0), (0, 0)]
    assert not len(nothing.exact_mask()) and nothing.dense(7).shape == (0, 7)
