"""Threshold sampling: exact entries, no id twice, the right mean, the promised size, less error than random draws."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from distill.targets.random_draws import random_draws
from distill.targets.sparse import SparseTargets
from distill.targets.varopt import varopt

DRAWS = 4096
LAST_UNIFORM = float(np.nextafter(1, 0))


def uniforms(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def check_form(targets: SparseTargets, probs_NV: Tensor, threshold: float) -> None:
    """All that holds for every single draw."""
    rows, vocab_size = probs_NV.shape
    assert len(targets.ids_T) == len(targets.weights_T) == targets.counts_N.sum()
    for n in range(rows):
        count, exact = int(targets.counts_N[n]), int(targets.exact_N[n])
        ids, weights = targets[n : n + 1].ids_T, targets[n : n + 1].weights_T
        assert int(ids.min()) >= 0 and int(ids.max()) < vocab_size
        assert ids.unique().numel() == count, "an id twice"
        assert (weights > 0).all()
        assert (probs_NV[n, ids] > 0).all(), "a token without probability"
        # Exact entries: what reaches the threshold, at least one, with their own probability, falling.
        assert set(probs_NV[n].ge(threshold).nonzero()[:, 0].tolist()) <= set(ids[:exact].tolist())
        assert exact == max(1, int(probs_NV[n].ge(threshold).sum()))
        assert torch.equal(weights[:exact], probs_NV[n, ids[:exact]])
        assert weights[0] == probs_NV[n].max()
        assert (weights[:exact].diff() <= 0).all()
        # Atoms: of one weight, rising, not below any tail token.
        assert (ids[exact:].diff() > 0).all()
        assert weights[exact:].unique().numel() <= 1
        tail_V = probs_NV[n].clone().index_fill_(0, ids[:exact], 0)
        mass = tail_V.double().sum().item()
        if count > exact:
            assert weights[exact:].double().sum().item() == pytest.approx(mass, rel=1e-6)
            assert weights[-1] >= tail_V.max() * (1 - 1e-6)
            assert weights[-1] >= min(threshold, mass) * (1 - 1e-6)
        else:
            assert mass == 0
        assert count <= 1 / threshold + 2


@dataclass(frozen=True)
class Tally:
    """Counts of each tail token's draws, and their expectation."""

    hits_V: Tensor
    expected_V: Tensor
    """Probability of being drawn: of the tail token over the weight of an atom."""
    mean_V: Tensor
    draws: int

    def z_scores(self) -> Tensor:
        """(mean - p) / standard error of each tail token that was to be seen, and missed, 25 times at least."""
        variance_V = self.draws * self.expected_V * (1 - self.expected_V)
        seen = variance_V >= 25
        return (self.hits_V - self.draws * self.expected_V)[seen] / variance_V[seen].sqrt()

    def group_z_scores(self, groups: int) -> Tensor:
        """The same of neighbouring tokens taken together, so that the rare ones are seen too.

        A run of the cumulative sum holds either of the two whole numbers next to its length in atoms.
        """
        hits = torch.stack([part.sum() for part in self.hits_V.tensor_split(groups)])
        expected = torch.stack([part.sum() for part in self.expected_V.tensor_split(groups)])
        variance = self.draws * expected.frac() * (1 - expected.frac())
        seen = variance >= 25
        return (hits - self.draws * expected)[seen] / variance[seen].sqrt()


def tally(probs_V: Tensor, threshold: float, uniform_R: Tensor) -> Tally:
    hits_V, sum_V = (torch.zeros(len(probs_V), dtype=torch.float64) for _ in range(2))
    for part in uniform_R.split(256):
        targets = varopt(probs_V.expand(len(part), -1), threshold, part)
        sum_V.index_add_(0, targets.ids_T, targets.weights_T.double())
        atom_ids = targets.ids_T[~targets.exact_mask()]
        hits_V.index_add_(0, atom_ids, torch.ones(len(atom_ids), dtype=torch.float64))
    tail_V = probs_V.double().clone()
    tail_V[targets.ids_T[: targets.exact_N[0]]] = 0
    atom_weight = tail_V.sum() / (targets.counts_N[0] - targets.exact_N[0])
    return Tally(hits_V, tail_V / atom_weight, sum_V / len(uniform_R), len(uniform_R))


def check_mean(found: Tally, groups: int) -> None:
    """Mean within 4 standard errors of p, as far as that can hold for hundreds of comparisons at once."""
    z, group_z = found.z_scores(), found.group_z_scores(groups)
    assert len(z) > 20 and len(group_z) > groups / 2, "nothing was tested"
    assert group_z.abs().max() <= 4
    # Of a thousand standard normal numbers 0.06 lie beyond 4.
    assert (z.abs() > 4).sum() <= len(z) / 1000
    assert z.abs().max() <= 5
    assert 0.7 < z.square().mean() < 1.3


@pytest.mark.parametrize("threshold", [1 / 3, 1 / 50, 1 / 400])
def test_form(random_rows: Tensor, zipf_rows: Tensor, threshold: float) -> None:
    for seed in range(2):
        for probs_NV in (random_rows, zipf_rows):
            targets = varopt(probs_NV, threshold, uniforms(len(probs_NV), seed=seed))
            check_form(targets, probs_NV, threshold)
            sums_N = targets.padded()[1].double().sum(-1)
            torch.testing.assert_close(sums_N, torch.ones_like(sums_N), atol=1e-6, rtol=0)


def test_size_is_as_promised(random_rows: Tensor) -> None:
    for threshold in (0.3, 0.05, 0.02, 0.003):
        probs_NV = random_rows.double()
        targets = varopt(probs_NV, threshold, uniforms(len(probs_NV)))
        for row, exact, count in zip(probs_NV, targets.exact_N.tolist(), targets.counts_N.tolist(), strict=True):
            tail = 1 - row.topk(exact).values.sum().item()
            assert count - exact == max(1, math.floor(tail / threshold))


def test_every_frequency_is_right_to_the_resolution_of_a_grid(random_rows: Tensor) -> None:
    """Over equally spaced uniforms a token's share is exact but for the two ends of its stretch: no chance involved."""
    grid_R = (torch.arange(1024, dtype=torch.float64) + 0.5) / 1024
    for probs_V in random_rows[::5]:
        found = tally(probs_V, 1 / 50, grid_R)
        assert (found.hits_V - 1024 * found.expected_V).abs().max() <= 2


@pytest.mark.parametrize("row", [2, 6])
def test_mean_over_random_draws(random_rows: Tensor, row: int) -> None:
    check_mean(tally(random_rows[row], 1 / 50, uniforms(DRAWS, seed=row)), groups=12)


@pytest.mark.parametrize("share", [0.1, 0.9])
def test_mean_on_the_demo_teacher(teacher_rows: Tensor, share: float) -> None:
    """A sure row and an open one."""
    entropy_N = torch.special.entr(teacher_rows).sum(-1)
    row = int(entropy_N.argsort()[int(share * len(entropy_N))])
    check_mean(tally(teacher_rows[row], 1 / 50, uniforms(DRAWS, seed=row)), groups=60)


def squared_error(targets: SparseTargets, probs_NV: Tensor) -> float:
    return (targets.dense(probs_NV.shape[1]).double() - probs_NV).square().sum(-1).mean().item()


def check_less_error(probs_NV: Tensor, draws: int) -> None:
    """At a threshold of 1/50: at most a third of the error of 50 random draws, with at most 20 % more entries."""
    rows = len(probs_NV)
    error = entries = random_error = random_entries = 0.0
    for seed in range(draws):
        ours = varopt(probs_NV, 1 / 50, uniforms(rows, seed=seed))
        theirs = random_draws(probs_NV, uniforms(rows, 50, seed=seed))
        error, random_error = error + squared_error(ours, probs_NV), random_error + squared_error(theirs, probs_NV)
        entries, random_entries = entries + ours.counts_N.sum().item(), random_entries + theirs.counts_N.sum().item()
    assert error <= random_error / 3
    assert entries <= 1.2 * random_entries


def test_less_error_than_random_draws(zipf_rows: Tensor) -> None:
    check_less_error(zipf_rows, draws=30)


def test_less_error_than_random_draws_on_the_demo_teacher(teacher_rows: Tensor) -> None:
    check_less_error(teacher_rows, draws=4)


def test_a_sure_row_takes_one_entry() -> None:
    probs_NV = torch.zeros(1, 1009).index_fill_(1, torch.tensor(77), 1)
    targets = varopt(probs_NV, 0.02, uniforms(1))
    assert targets.ids_T.tolist() == [77] and targets.weights_T.tolist() == [1.0]
    assert targets.exact_N.tolist() == targets.counts_N.tolist() == [1]


@pytest.mark.parametrize("vocab_size", [2, 50, 51, 1009])
@pytest.mark.parametrize("threshold", [1.0, 0.5, 0.02])
def test_uniform_rows(vocab_size: int, threshold: float) -> None:
    """The largest probability is everyone's: whichever token becomes the exact entry must not be in the tail too."""
    probs_NV = torch.full((16, vocab_size), 1 / vocab_size)
    probs_NV[1, 0] += 0.3 / vocab_size  # another number of exact entries in the batch, another width of the topk
    probs_NV[1, 1:] -= 0.3 / vocab_size / (vocab_size - 1)
    check_form(varopt(probs_NV, threshold, uniforms(16)), probs_NV, threshold)


def test_the_mean_is_right_where_many_are_equally_probable() -> None:
    """Half precision makes ties: with 1,009 equal tokens and one exact entry of them, each must keep its own share."""
    grid_R = (torch.arange(256, dtype=torch.float64) + 0.5) / 256
    probs_V = torch.full((1009,), 1 / 1009)
    found = tally(probs_V, 1 / 50, grid_R)
    assert (found.hits_V - 256 * found.expected_V).abs().max() <= 2
    torch.testing.assert_close(found.mean_V, probs_V.double(), atol=2 * 0.021 / 256, rtol=0)


@pytest.mark.parametrize("below", [False, True])
def test_two_equal_tokens(below: bool) -> None:
    threshold = 0.45 if below else 0.3
    probs_NV = torch.tensor([[0.1, 0.4, 0.1, 0.4]]).repeat(32, 1)
    targets = varopt(probs_NV, threshold, uniforms(32))
    check_form(targets, probs_NV, threshold)
    assert set(targets.exact_N.tolist()) == {1 if below else 2}


@pytest.mark.parametrize(
    ("tail", "atoms"), [(0, 0), (2**-30, 1), (0.25 - 2**-20, 1), (0.25, 1), (0.5 - 2**-20, 1), (0.5, 2), (0.75, 3)]
)
def test_tail_mass_around_the_threshold(tail: float, atoms: int) -> None:
    """Dyadic fractions, so that the sums are exact: the number of atoms is the tail's mass in whole thresholds."""
    probs_NV = torch.cat([torch.full((1, 32), tail / 32), torch.tensor([[1 - tail]])], dim=1)
    targets = varopt(probs_NV, 0.25, uniforms(1))
    check_form(targets, probs_NV, 0.25)
    assert (targets.exact_N.tolist(), targets.counts_N.tolist()) == ([1], [1 + atoms])


def test_a_probability_that_equals_the_threshold_is_exact() -> None:
    probs_NV = torch.tensor([[0.25, 0.5, 0.125, 0.125]])
    targets = varopt(probs_NV, 0.25, uniforms(1))
    assert targets.ids_T[:2].tolist() == [1, 0] and targets.exact_N.tolist() == [2]
    just_below = torch.tensor([[0.25 - 2**-24, 0.5, 0.125, 0.125 + 2**-24]])
    assert varopt(just_below, 0.25, uniforms(1)).exact_N.tolist() == [1]


def test_threshold_one_leaves_the_best_token_and_one_atom(random_rows: Tensor) -> None:
    targets = varopt(random_rows, 1.0, uniforms(len(random_rows)))
    check_form(targets, random_rows, 1.0)
    assert set(targets.counts_N.tolist()) == {2}


@pytest.mark.parametrize("uniform", [0.0, 0.5, LAST_UNIFORM])
@pytest.mark.parametrize("zeros_from", [5, 300, 600, 1009])
def test_extreme_uniforms_stay_inside_the_vocabulary(random_rows: Tensor, uniform: float, zeros_from: int) -> None:
    """The last point of a row can round up to the end of the tail, where tokens without probability may follow."""
    for threshold in (1 / 3, 1 / 50, 1 / 97):
        probs_NV = random_rows.clone()
        probs_NV[:, zeros_from:] = 0
        probs_NV /= probs_NV.sum(-1, keepdim=True)
        rows = len(probs_NV)
        check_form(varopt(probs_NV, threshold, torch.full((rows,), uniform).double()), probs_NV, threshold)


def test_rows_do_not_depend_on_their_company(random_rows: Tensor, zipf_rows: Tensor) -> None:
    both_NV, uniform_N = torch.cat([random_rows, zipf_rows]), uniforms(28)
    together = varopt(both_NV, 0.02, uniform_N).dense(1009)
    alone = torch.cat([varopt(both_NV[n : n + 1], 0.02, uniform_N[n : n + 1]).dense(1009) for n in range(28)])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("vocab_size", [1, 7, 255, 256, 257, 511, 513, 1009])
def test_vocabularies_of_any_size(vocab_size: int) -> None:
    """The last tile of a vocabulary may be short; and the first and last tokens may be the probable ones."""
    for seed in range(4):
        probs_NV = (3 * torch.randn(9, vocab_size, generator=torch.Generator().manual_seed(seed))).softmax(-1)
        probs_NV[:4, -1] = probs_NV[4:6, 0] = 2
        probs_NV /= probs_NV.sum(-1, keepdim=True)
        for threshold in (0.5, 0.02, 0.001):
            check_form(varopt(probs_NV, threshold, uniforms(9, seed=seed)), probs_NV, threshold)


def test_equal_probabilities_stand_in_the_order_of_their_ids() -> None:
    """Half precision makes ties: the order must not be an accident of a sort, nor may rows share anything."""
    probs_NV = torch.full((3, 1000), 1e-5).index_fill_(1, torch.tensor([999, 3, 700, 255, 256]), 0.198)
    targets = varopt(probs_NV[:1].expand(3, -1), 0.02, uniforms(3))
    assert targets.ids_T[targets.exact_mask()].tolist() == [3, 255, 256, 700, 999] * 3
    flat_NV = torch.full((2, 1000), 1e-3)
    assert [int(varopt(flat_NV, 0.02, uniforms(2))[n : n + 1].ids_T[0]) for n in (0, 1)] == [0, 0]


class Largest(TorchDispatchMode):
    """The bytes of the largest storage that was made."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            self.bytes = max(self.bytes, tensor.untyped_storage().nbytes() if torch.is_tensor(tensor) else 0)
        return made


def test_memory_is_bounded_at_a_low_threshold() -> None:
    """A flat row at 1/5,000 has thousands of atoms; each looks into a tile."""
    probs_NV = (0.1 * torch.randn(16, 20_000, generator=torch.Generator().manual_seed(0))).softmax(-1)
    with Largest() as largest:
        targets = varopt(probs_NV, 1 / 5000, uniforms(16))
    assert int(targets.counts_N.min()) > 4000
    assert largest.bytes <= 8 * probs_NV.nbytes


def test_the_input_is_not_changed(random_rows: Tensor) -> None:
    probs_NV = random_rows.clone()
    varopt(probs_NV, 0.02, uniforms(len(probs_NV)))
    assert torch.equal(probs_NV, random_rows)
