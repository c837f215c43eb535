"""Batches for a student that has only some of the teacher's tokens, against dense programs.

Shapes: N positions, K entries, V the teacher's vocabulary.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distill.cache.format.records import Record
from distill.cache.reading.batches import Batch, collate
from distill.losses.chunks import DenseChunk, SparseChunk
from distill.losses.divergences import forward_kl, reverse_kl
from distill.models.language_model import Head
from distill.models.vocabulary import Vocabulary, trim_head
from distill.targets import schemes
from distill.targets.hidden import HiddenTargets
from distill.targets.sparse import SparseTargets
from distill.targets.top_k import top_k
from distill.targets.varopt import varopt
from distill.training.vocabulary import count_tokens, trim_batch

V, N = 31, 400
SCHEMES = [
    schemes.make("varopt", threshold=0.1),
    schemes.make("top_k", entries=6),
    schemes.make("random", entries=8),
]


def make_batch(targets: Any, entropy_N: Tensor, text: Tensor) -> Batch:
    """One row of N positions with loss, and one without at its end."""
    ids_BL = text[None]
    mask_BL = torch.ones_like(ids_BL, dtype=torch.bool)
    mask_BL[:, -1] = False
    return Batch(ids_BL, torch.arange(N + 1)[None], mask_BL, targets, entropy_N, torch.zeros(N))


@pytest.fixture(scope="module")
def probs_NV() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return (2 * torch.randn(N, V, generator=generator)).softmax(-1)


@pytest.fixture(scope="module")
def entropy_N(probs_NV: Tensor) -> Tensor:
    return -torch.xlogy(probs_NV, probs_NV).sum(-1)


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary(torch.tensor([0, *range(4, V, 2)]), V)


@pytest.fixture(scope="module")
def text(vocabulary: Vocabulary) -> Tensor:
    return vocabulary.kept_ids[torch.randint(len(vocabulary), (N + 1,), generator=torch.Generator().manual_seed(4))]


@pytest.fixture(scope="module")
def student_NK(vocabulary: Vocabulary) -> Tensor:
    return torch.randn(N, len(vocabulary), generator=torch.Generator().manual_seed(5))


def sparse(batch: Batch) -> SparseTargets:
    assert isinstance(batch.targets, SparseTargets)
    return batch.targets


def chunk(batch: Batch) -> SparseChunk:
    targets, nothing_N = sparse(batch), torch.zeros(len(batch.entropy_N), dtype=torch.int64)
    return SparseChunk(*targets.padded(), batch.entropy_N, nothing_N, targets.rest_N)


def uniforms(seed: int) -> Tensor:
    return torch.rand(N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_nothing_changes_for_all_tokens(scheme: Any, probs_NV: Tensor, entropy_N: Tensor) -> None:
    everything = Vocabulary(torch.arange(V), V)
    targets = scheme.sample(probs_NV, torch.rand(N, scheme.uniforms, dtype=torch.float64))
    batch = make_batch(targets, entropy_N, torch.arange(N + 1) % V)
    trimmed, dropped = trim_batch(batch, everything)
    assert float(dropped) == 0
    torch.testing.assert_close(trimmed.targets.dense(V), targets.dense(V))
    assert torch.equal(trimmed.entropy_N, entropy_N) and torch.equal(trimmed.input_ids_BL, batch.input_ids_BL)
    assert torch.equal(trimmed.targets.exact_N, targets.exact_N)
    assert torch.equal(trimmed.targets.counts_N, targets.counts_N)


@pytest.mark.parametrize("scheme", [SCHEMES[0], SCHEMES[2]], ids=lambda scheme: scheme.name)
def test_samples_lose_the_entries_of_dropped_tokens_and_no_others(
    scheme: Any, probs_NV: Tensor, entropy_N: Tensor, vocabulary: Vocabulary, text: Tensor
) -> None:
    targets = scheme.sample(probs_NV, torch.rand(N, scheme.uniforms, dtype=torch.float64))
    trimmed, dropped = trim_batch(make_batch(targets, entropy_N, text), vocabulary)
    left, dense_NV = sparse(trimmed), targets.dense(V)
    assert torch.equal(left.dense(len(vocabulary)), dense_NV[:, vocabulary.kept_ids])
    assert float(dropped) == pytest.approx(float(dense_NV.sum() - dense_NV[:, vocabulary.kept_ids].sum()), rel=1e-5)
    assert 0.1 * N < float(dropped) < 0.9 * N, "else this says little"
    assert torch.equal(vocabulary.kept_ids[trimmed.input_ids_BL], text[None])


def test_the_order_of_a_target_is_kept(
    probs_NV: Tensor, entropy_N: Tensor, vocabulary: Vocabulary, text: Tensor
) -> None:
    """Exact entries first, in order of falling weight, then atoms of one weight in order of rising id."""
    targets = varopt(probs_NV, 0.1, uniforms(0))
    left = sparse(trim_batch(make_batch(targets, entropy_N, text), vocabulary)[0])
    for n in range(N):
        exact, count = int(left.exact_N[n]), int(left.counts_N[n])
        before, after = targets[n : n + 1], left[n : n + 1]
        kept_before = torch.isin(before.ids_T, vocabulary.kept_ids)
        assert exact == int(kept_before[: int(before.exact_N)].sum())
        assert count == int(kept_before.sum()) == len(after.ids_T)
        assert bool((after.weights_T[:exact].diff() <= 0).all())
        assert len(after.weights_T[exact:].unique()) <= 1
        assert bool((after.ids_T[exact:].diff() > 0).all())


def test_padding_does_not_count_as_token_0(entropy_N: Tensor, probs_NV: Tensor, text: Tensor) -> None:
    """Token 0 is dropped here, and the padding of rows has its id."""
    without_0 = Vocabulary(torch.arange(1, V), V)
    targets = varopt(probs_NV, 0.1, uniforms(0))
    assert len(set(targets.counts_N.tolist())) > 1, "some rows are padded"
    trimmed, dropped = trim_batch(make_batch(targets, entropy_N, text.clamp(min=1)), without_0)
    assert torch.equal(sparse(trimmed).dense(V - 1), targets.dense(V)[:, 1:])
    assert float(dropped) == pytest.approx(float(targets.dense(V)[:, 0].sum()), rel=1e-5)


def conditional(probs_NV: Tensor, vocabulary: Vocabulary) -> tuple[Tensor, Tensor]:
    """p given that a kept token comes, and the mass of those."""
    kept_NK = probs_NV[:, vocabulary.kept_ids]
    mass_N = kept_NK.sum(-1)
    return kept_NK / mass_N[:, None], mass_N


def kl(p: Tensor, logits: Tensor) -> Tensor:
    return (p * (p.log() - logits.log_softmax(-1))).sum(-1)


def test_the_loss_of_complete_targets_is_the_kl_over_the_kept_tokens(
    probs_NV: Tensor, entropy_N: Tensor, vocabulary: Vocabulary, text: Tensor, student_NK: Tensor
) -> None:
    """All entries exact: the loss is the kept mass times that KL, and 0 for the best student."""
    targets = varopt(probs_NV, 1e-9, uniforms(0))
    batch, dropped = trim_batch(make_batch(targets, entropy_N, text), vocabulary)
    p_NK, mass_N = conditional(probs_NV, vocabulary)
    torch.testing.assert_close(
        forward_kl(student_NK, chunk(batch)), mass_N * kl(p_NK, student_NK), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(forward_kl(p_NK.log(), chunk(batch)), torch.zeros(N), rtol=0, atol=1e-5)
    assert float(dropped) == pytest.approx(float((1 - mass_N).sum()), rel=1e-5)


def test_the_gradient_of_samples_is_unbiased(
    probs_NV: Tensor, entropy_N: Tensor, vocabulary: Vocabulary, text: Tensor, student_NK: Tensor
) -> None:
    p_NK, mass_N = conditional(probs_NV, vocabulary)
    expected_NK = mass_N[:, None] * (student_NK.softmax(-1) - p_NK)
    logits_NK = student_NK.clone().requires_grad_(True)
    draws = 300
    for seed in range(draws):
        targets = varopt(probs_NV, 0.2, uniforms(seed))
        batch, _ = trim_batch(make_batch(targets, entropy_N, text), vocabulary)
        (forward_kl(logits_NK, chunk(batch)).sum() / draws).backward()
    assert logits_NK.grad is not None
    error = torch.linalg.vector_norm(logits_NK.grad - expected_NK) / torch.linalg.vector_norm(expected_NK)
    once, _ = trim_batch(make_batch(varopt(probs_NV, 0.2, uniforms(0)), entropy_N, text), vocabulary)
    again_NK = student_NK.clone().requires_grad_(True)
    forward_kl(again_NK, chunk(once)).sum().backward()
    assert again_NK.grad is not None
    noise = torch.linalg.vector_norm(again_NK.grad - expected_NK) / torch.linalg.vector_norm(expected_NK)
    assert error < 2 * noise / draws**0.5, "it falls as that of a mean of independent draws"


def test_the_loss_of_samples_reads_about_the_kl_over_the_kept_tokens(
    probs_NV: Tensor, entropy_N: Tensor, vocabulary: Vocabulary, text: Tensor, student_NK: Tensor
) -> None:
    """The entropy that the tail's dropped tokens took is estimated: without that the loss would read far too low."""
    p_NK, mass_N = conditional(probs_NV, vocabulary)
    expected = float((mass_N * kl(p_NK, student_NK)).mean())
    batches = [make_batch(varopt(probs_NV, 0.1, uniforms(seed)), entropy_N, text) for seed in range(20)]
    read = [forward_kl(student_NK, chunk(trim_batch(batch, vocabulary)[0])).mean() for batch in batches]
    found = float(torch.stack(read).mean())
    uncorrected = found + float(trim_batch(batches[0], vocabulary)[0].entropy_N.mean() - entropy_N.mean())
    assert abs(found - expected) < 0.05 < 0.3 < expected - uncorrected


def test_targets_with_a_rest_are_the_distribution_without_the_dropped_entries(
    probs_NV: Tensor, entropy_N: Tensor, vocabulary: Vocabulary, text: Tensor, student_NK: Tensor
) -> None:
    targets = top_k(probs_NV, 6)
    batch, dropped = trim_batch(make_batch(targets, entropy_N, text), vocabulary)
    left, dense_NV = sparse(batch), targets.dense(V)
    assert left.rest_N is not None and targets.rest_N is not None
    dropped_N = dense_NV.sum(-1) - dense_NV[:, vocabulary.kept_ids].sum(-1)
    expected_NK = dense_NV[:, vocabulary.kept_ids] / (1 - dropped_N)[:, None]
    torch.testing.assert_close(left.dense(len(vocabulary)), expected_NK)
    torch.testing.assert_close(left.rest_N, targets.rest_N / (1 - dropped_N))
    assert float(dropped) == pytest.approx(float(dropped_N.sum()), rel=1e-5)
    for divergence in (forward_kl, reverse_kl):
        assert bool((divergence(student_NK, chunk(batch)) > -1e-6).all())
    best_NK = torch.where(expected_NK > 0, expected_NK, 0)
    empty_NK = expected_NK == 0
    best_NK = best_NK + empty_NK * (left.rest_N / empty_NK.sum(-1))[:, None]
    for divergence in (forward_kl, reverse_kl):
        torch.testing.assert_close(divergence(best_NK.log(), chunk(batch)), torch.zeros(N), rtol=0, atol=1e-4)


def test_a_rest_of_nothing_and_a_target_of_nothing_teach_nothing(vocabulary: Vocabulary, text: Tensor) -> None:
    """All entries dropped: only the rest is left. All kept tokens are entries: there is no rest."""
    probs_NV = torch.full((N, V), 1e-4)
    probs_NV[:, 1:4] = 0.3  # all three dropped
    probs_NV /= probs_NV.sum(-1, keepdim=True)
    batch, _ = trim_batch(make_batch(top_k(probs_NV, 3), torch.ones(N), text), vocabulary)
    left = sparse(batch)
    assert left.rest_N is not None and not left.counts_N.any() and not len(left.weights_T)
    torch.testing.assert_close(left.rest_N, torch.ones(N))
    logits_NK = torch.randn(N, len(vocabulary), requires_grad=True)
    forward_kl(logits_NK, chunk(batch)).sum().backward()
    torch.testing.assert_close(logits_NK.grad, torch.zeros_like(logits_NK), rtol=0, atol=1e-5)

    few = Vocabulary(torch.tensor([2, 3]), V)
    batch, _ = trim_batch(make_batch(top_k(probs_NV, 5), torch.ones(N), few.kept_ids[text % 2]), few)
    left = sparse(batch)
    assert left.rest_N is not None and not left.rest_N.any()
    torch.testing.assert_close(left.dense(2), torch.full((N, 2), 0.5))


def test_samples_without_a_kept_entry_teach_nothing(vocabulary: Vocabulary, text: Tensor) -> None:
    probs_NV = torch.zeros(N, V)
    probs_NV[:, 1] = 1  # dropped
    batch, dropped = trim_batch(make_batch(varopt(probs_NV, 0.1, uniforms(0)), torch.zeros(N), text), vocabulary)
    assert float(dropped) == N
    assert not forward_kl(torch.randn(N, len(vocabulary)), chunk(batch)).any()


def test_hidden_states_stay_and_the_trimmed_head_makes_the_exact_distribution(
    entropy_N: Tensor, vocabulary: Vocabulary, text: Tensor, student_NK: Tensor
) -> None:
    torch.manual_seed(1)
    head, hidden_ND = Head(torch.randn(V + 4, 5), torch.randn(V + 4)), torch.randn(N, 5)
    targets = HiddenTargets(hidden_ND)
    batch, dropped = trim_batch(make_batch(targets, entropy_N, text), vocabulary)
    assert batch.targets is targets and dropped is None
    p_NK, _ = conditional(head.with_rows(V)(hidden_ND).softmax(-1), vocabulary)
    exact = DenseChunk(hidden_ND, trim_head(head, vocabulary), torch.zeros(N, dtype=torch.int64))
    torch.testing.assert_close(forward_kl(student_NK, exact), kl(p_NK, student_NK), rtol=1e-4, atol=1e-5)


def test_a_text_with_a_dropped_token_is_never_trained_on(
    probs_NV: Tensor, entropy_N: Tensor, vocabulary: Vocabulary, text: Tensor
) -> None:
    wrong = text.clone()
    wrong[3] = 1
    with pytest.raises(AssertionError, match="another text"):
        trim_batch(make_batch(top_k(probs_NV, 3), entropy_N, wrong), vocabulary)


def test_tokens_are_counted_in_every_sample(records: list[Record]) -> None:
    seen: list[int] = []
    readers: Any = [records[:4], records[4:]]
    counts_V = count_tokens(readers, 37, seen.append)
    ids = np.concatenate([record.input_ids_L for record in records])
    assert counts_V.tolist() == [int((ids == token).sum()) for token in range(37)]
    assert sum(seen) == len(ids)
    vocabulary = Vocabulary(torch.from_numpy(np.flatnonzero(counts_V)), 37)
    for record in records:
        trim_batch(collate([record]), vocabulary)
