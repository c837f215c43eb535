"""The walk over held-out text: against a dense float64 program, whatever the batches, chunks and padding.

Shapes: B samples, L sequence length, N positions with loss, V vocabulary, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distill.errors import UserError
from distill.evaluation.breakdown import Measured
from distill.evaluation.fidelity import TeacherStates, student_fidelity, teacher_likelihood, teacher_states
from distill.evaluation.held_out import documents_of
from distill.evaluation.metrics import BINS
from distill.models.language_model import Head

SAMPLES, LENGTH, VOCABULARY, HIDDEN = 7, 13, 53, 8
CPU = torch.device("cpu")


class Tiny(nn.Module):
    """Hidden states that depend on a token, its position and all tokens before it in its document."""

    def __init__(self, seed: int, rows: int = VOCABULARY, hidden: int = HIDDEN, **head: Any) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embedding = nn.Parameter(torch.randn(rows, hidden, generator=generator))
        self.places = nn.Parameter(torch.randn(LENGTH, hidden, generator=generator))
        self.weight = nn.Parameter(torch.randn(rows, hidden, generator=generator))
        self.bias = nn.Parameter(torch.randn(rows, generator=generator))
        self.options = head

    @property
    def head(self) -> Head:
        return Head(self.weight, self.bias, **self.options)

    def body(self, input_ids_BL: Tensor, position_ids_BL: Tensor) -> Tensor:
        document_BL = (position_ids_BL == 0).cumsum(-1)
        same_BLL = (document_BL[:, :, None] == document_BL[:, None, :]).tril().to(self.embedding.dtype)
        tokens_BLD = self.embedding[input_ids_BL] + self.places[position_ids_BL]
        return tokens_BLD + (same_BLL / same_BLL.sum(-1, keepdim=True)) @ tokens_BLD


class Samples(torch.utils.data.Dataset):
    """Packed samples of two documents, with loss at some positions, none of them at a document's end."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(5)
        self.rows = []
        for index in range(SAMPLES):
            cut = 3 + index % 5
            positions_L = torch.cat([torch.arange(cut), torch.arange(LENGTH - cut)])
            mask_L = torch.rand(LENGTH, generator=generator) < 0.6
            mask_L[[cut - 1, -1]] = False
            ids_L = torch.randint(VOCABULARY, (LENGTH,), generator=generator)
            self.rows.append({"input_ids": ids_L, "position_ids": positions_L, "loss_mask": mask_L})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.rows[index]


class InRoom(Tiny):
    """A model for which no more than `room` samples find memory."""

    def __init__(self, seed: int, room: int) -> None:
        super().__init__(seed)
        self.room = room

    def body(self, input_ids_BL: Tensor, position_ids_BL: Tensor) -> Tensor:
        if len(input_ids_BL) > self.room:
            raise torch.OutOfMemoryError("no room")
        return super().body(input_ids_BL, position_ids_BL)


def walked(
    student: Tiny, teacher: Tiny, batch_size: int = 3, chunk_size: int = 4, samples: Samples | None = None
) -> Measured:
    samples = samples or Samples()
    states = teacher_states(teacher, samples, batch_size, VOCABULARY, CPU, lambda amount: None)
    return student_fidelity(student, states, samples, batch_size, chunk_size, CPU, lambda amount: None)


def measured(student: Tiny, teacher: Tiny, batch_size: int = 3, chunk_size: int = 4) -> dict[str, float]:
    """Return the values of `reference`, as the walk measured them."""
    found = walked(student, teacher, batch_size, chunk_size)
    summary = found.summary()
    names = ("nll", "kl", "reverse_kl", "jsd", "top1_agreement", "top5_agreement", "acceptance", "confidence_gap")
    return {name: summary[name] for name in (*names, "ece")} | {"tokens": found.tokens}


def logp(model: Tiny, row: dict[str, Tensor]) -> Tensor:
    """float64 `[L, V]` over the real vocabulary: the whole sample at once, dense."""
    model = model.double()
    logits_LV = model.head(model.body(row["input_ids"][None], row["position_ids"][None])[0])
    model.float()
    return logits_LV[:, :VOCABULARY].log_softmax(-1)


def positions(shift: int = 0) -> Iterator[tuple[dict[str, Tensor], int]]:
    """Each position with loss, one by one; `shift` makes the mistake of a mask that is off by so many."""
    for row in Samples().rows:
        for position in row["loss_mask"].nonzero().flatten().tolist():
            if 0 <= position + shift < LENGTH - 1:
                yield row, position + shift


@torch.no_grad()
def reference(student: Tiny, teacher: Tiny, shift: int = 0, ahead: int = 1) -> dict[str, float]:
    """The definitions, position by position; `ahead` is how far the true token lies ahead."""
    names = ("nll", "kl", "reverse_kl", "jsd", "top1_agreement", "top5_agreement", "acceptance", "confidence_gap")
    sums, count = dict.fromkeys(names, 0.0), 0
    gaps = dict.fromkeys(range(BINS), 0.0)  # of each bin of confidence: times right minus confidence
    for row, position in positions(shift):
        q_V, p_V = logp(student, row)[position].exp(), logp(teacher, row)[position].exp()
        next_id, confidence = row["input_ids"][min(position + ahead, LENGTH - 1)], float(q_V.max())
        sums["nll"] -= math.log(q_V[next_id])
        gaps[math.ceil(confidence * BINS) - 1] += float(q_V.argmax() == next_id) - confidence
        sums["kl"] += float((p_V * (p_V.log() - q_V.log())).sum())
        sums["reverse_kl"] += float((q_V * (q_V.log() - p_V.log())).sum())
        sums["jsd"] += float((p_V * (2 * p_V / (p_V + q_V)).log() + q_V * (2 * q_V / (p_V + q_V)).log()).sum()) / 2
        sums["top5_agreement"] += len({*p_V.topk(5).indices.tolist()} & {*q_V.topk(5).indices.tolist()}) / 5
        sums["confidence_gap"] += confidence - float(q_V.argmax() == next_id)
        sums["top1_agreement"] += float(p_V.argmax() == q_V.argmax())
        sums["acceptance"] += float(torch.minimum(p_V, q_V).sum())
        count += 1
    means = {name: total / count for name, total in sums.items()}
    return means | {"ece": sum(map(abs, gaps.values())) / count, "tokens": count}


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        (Tiny(1), Tiny(2)),
        (Tiny(1, rows=60), Tiny(2, rows=57)),
        (Tiny(1, hidden=5), Tiny(2)),
        (Tiny(1, scale=0.3), Tiny(2, soft_cap=2.0)),
    ],
    ids=["plain", "padded differently", "other width", "scale and soft cap"],
)
def test_it_equals_the_dense_program(student: Tiny, teacher: Tiny) -> None:
    assert measured(student, teacher) == pytest.approx(reference(student, teacher), rel=2e-6)


@pytest.mark.parametrize(("shift", "ahead"), [(1, 1), (-1, 1), (0, 0), (0, 2)])
def test_an_off_by_one_would_be_seen(shift: int, ahead: int) -> None:
    """The dense program with the mistake built in is far from what is measured, so the test above can fail."""
    wrong, right = reference(Tiny(1), Tiny(2), shift, ahead), measured(Tiny(1), Tiny(2))
    assert abs(wrong["nll"] - right["nll"]) > 1e-2
    if shift:
        assert abs(wrong["kl"] - right["kl"]) > 1e-2


@pytest.mark.parametrize(("batch_size", "chunk_size"), [(1, 1), (2, 5), (7, 1000), (100, 3)])
def test_neither_batch_nor_chunk_changes_anything(batch_size: int, chunk_size: int) -> None:
    """Sums of each sample and of each bin too, so they are under the right sample and in the right bin."""
    expected, found = walked(Tiny(1), Tiny(2)), walked(Tiny(1), Tiny(2), batch_size, chunk_size)
    for name in ("cluster", "entropy", "position"):
        assert (getattr(found, f"{name}_positions") == getattr(expected, f"{name}_positions")).all()
        sums, expected_sums = getattr(found, f"{name}_sums"), getattr(expected, f"{name}_sums")
        np.testing.assert_allclose(sums, expected_sums, rtol=1e-5, atol=1e-6)
    assert measured(Tiny(1), Tiny(2), batch_size, chunk_size) == pytest.approx(measured(Tiny(1), Tiny(2)), rel=1e-6)


@torch.no_grad()
def test_each_position_is_counted_under_its_sample_and_its_place_in_the_document() -> None:
    found, student, teacher = walked(Tiny(1), Tiny(2)), Tiny(1), Tiny(2)
    by_sample, by_place = [0.0] * SAMPLES, dict.fromkeys((0, 4), 0.0)
    for index, row in enumerate(Samples().rows):
        p_LV, q_LV = logp(teacher, row).exp(), logp(student, row).exp()
        for position in row["loss_mask"].nonzero().flatten().tolist():
            kl = float((p_LV[position] * (p_LV[position] / q_LV[position]).log()).sum())
            by_sample[index] += kl
            by_place[0 if row["position_ids"][position] < 4 else 4] += kl
    np.testing.assert_allclose(found.sums.values["kl"], by_sample, rtol=1e-5)
    assert found.sums.positions.tolist() == [int(row["loss_mask"].sum()) for row in Samples().rows]
    bins = found.summary()["by_position"]
    assert [(bin["from"], bin["to"]) for bin in bins] == [(0, 4), (4, 16)]
    assert [bin["kl"] * bin["positions"] for bin in bins] == pytest.approx(list(by_place.values()), rel=1e-5)


def test_what_the_mask_hides_takes_no_part() -> None:
    """Other tokens at the end of a sample, behind all its positions with loss and their next tokens, change nothing."""

    class Corrupted(Samples):
        def __getitem__(self, index: int) -> dict[str, Tensor]:
            row = dict(self.rows[index])
            behind = int(row["loss_mask"].nonzero().max()) + 2
            row["input_ids"] = row["input_ids"].clone()
            row["input_ids"][behind:] = 0
            return row

    assert any((Corrupted()[i]["input_ids"] != Samples()[i]["input_ids"]).any() for i in range(SAMPLES))
    assert walked(Tiny(1), Tiny(2), samples=Corrupted()).summary() == walked(Tiny(1), Tiny(2)).summary()


def test_a_teacher_is_its_own_best_student() -> None:
    same = measured(Tiny(2), Tiny(2))
    assert (same["kl"], same["reverse_kl"], same["jsd"]) == (0, 0, 0)
    assert same["top1_agreement"] == same["top5_agreement"] == 1.0
    assert same["acceptance"] == 1.0
    assert same["nll"] == pytest.approx(reference(Tiny(2), Tiny(2))["nll"])


def test_padding_rows_take_no_probability() -> None:
    """However large the logits of rows that stand for no token."""
    plain, padded = Tiny(1), Tiny(1, rows=VOCABULARY + 9)
    with torch.no_grad():
        for name in ("embedding", "weight", "bias"):
            getattr(padded, name)[:VOCABULARY] = getattr(plain, name)
        padded.places.copy_(plain.places)
        padded.bias[VOCABULARY:] = 50.0
    assert measured(padded, Tiny(2)) == measured(plain, Tiny(2))
    assert measured(Tiny(2), padded) == measured(Tiny(2), plain)


def test_the_teachers_own_likelihood() -> None:
    samples = Samples()
    states = teacher_states(Tiny(2, rows=57), samples, 3, VOCABULARY, CPU, lambda amount: None)
    measured = teacher_likelihood(states, samples, 3, 4, CPU, text_bytes=70)
    likelihood = measured.summary()
    expected = reference(Tiny(2, rows=57), Tiny(2, rows=57))
    assert likelihood["nll"] == pytest.approx(expected["nll"])
    assert likelihood["perplexity"] == pytest.approx(math.exp(expected["nll"]))
    assert likelihood["ece"] == pytest.approx(expected["ece"], rel=1e-5)
    assert likelihood["confidence_gap"] == pytest.approx(expected["confidence_gap"], rel=1e-5)
    assert likelihood["bits_per_byte"] == pytest.approx(expected["nll"] * expected["tokens"] / (math.log(2) * 70))
    assert measured.tokens == expected["tokens"]
    assert sum(bin["positions"] for bin in likelihood["by_entropy"]) == measured.tokens


def test_progress_counts_every_token_of_every_sample_once() -> None:
    seen: list[int] = []
    states = teacher_states(Tiny(2), Samples(), 3, VOCABULARY, CPU, seen.append)
    assert sum(seen) == SAMPLES * LENGTH
    student_fidelity(Tiny(1), states, Samples(), 3, 4, CPU, seen.append)
    assert sum(seen) == 2 * SAMPLES * LENGTH


@pytest.mark.parametrize("room", [1, 2])
def test_out_of_memory_halves_the_batches_and_goes_on(room: int, capsys: pytest.CaptureFixture[str]) -> None:
    """The measurement is the same to float32's last digits, and each model says it once a halving."""
    expected = walked(Tiny(1), Tiny(2), batch_size=4).summary()
    found = walked(InRoom(1, room), InRoom(2, room), batch_size=4).summary()
    assert found["kl"] == pytest.approx(expected["kl"], rel=1e-5)
    assert found["nll"] == pytest.approx(expected["nll"], rel=1e-5)
    assert capsys.readouterr().out.count("out of memory with 4 samples a forward pass; from here on 2") == 2


def test_one_sample_that_finds_no_room_is_refused_in_a_line() -> None:
    with pytest.raises(UserError, match=f"out of memory with 1 sample of {LENGTH} tokens"):
        walked(Tiny(1), InRoom(2, room=0))


def test_the_states_do_not_keep_the_teacher() -> None:
    """Neither its gradients nor, through a view of a larger tensor, its memory: the student needs the room."""
    teacher = Tiny(2, rows=VOCABULARY + 100)
    states = teacher_states(teacher, Samples(), 3, VOCABULARY, CPU, lambda amount: None)
    assert isinstance(states, TeacherStates)
    for tensor in (*states.hidden, states.head.weight_VD, states.head.bias_V):
        assert tensor is not None and not tensor.requires_grad
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    with torch.no_grad():
        teacher.weight.zero_()
    assert states.head.weight_VD.abs().sum() > 0


def test_a_smaller_vocabulary_and_a_text_without_loss_are_refused() -> None:
    with pytest.raises(ValueError, match="not the same vocabulary"):
        measured(Tiny(1, rows=VOCABULARY - 1), Tiny(2, rows=VOCABULARY))
    samples = Samples()
    for row in samples.rows:
        row["loss_mask"][:] = False
    states = teacher_states(Tiny(2), samples, 3, VOCABULARY, CPU, lambda amount: None)
    with pytest.raises(UserError, match="nothing to measure"):
        student_fidelity(Tiny(1), states, samples, 3, 4, CPU, lambda amount: None)


def test_positions_of_a_document_in_several_samples_are_one_cluster() -> None:
    """Sums by document: each position under its own document, whatever the batch; the means do not change."""
    samples = Samples()
    for index, row in enumerate(samples.rows):
        first_L = (row["position_ids"] == 0).cumsum(0) == 1
        # Every sample ends with the document that the next one begins with; some hashes are negative.
        row["document_hash"] = torch.where(first_L, 7 * index, 7 * index + 7) - 20
    documents = documents_of(samples)
    assert len(documents) == SAMPLES + 1
    states = teacher_states(Tiny(2), samples, 3, VOCABULARY, CPU, lambda amount: None)
    run = lambda size: student_fidelity(  # noqa: E731
        Tiny(1), states, samples, 3, size, CPU, lambda amount: None, documents=documents
    )
    by_document, by_sample = run(4), walked(Tiny(1), Tiny(2), samples=samples)
    expected = [0] * len(documents)
    for row in samples.rows:
        for hash_ in row["document_hash"][row["loss_mask"]].tolist():
            expected[documents.tolist().index(hash_)] += 1
    assert by_document.cluster_positions.tolist() == expected and by_document.clusters == sum(map(bool, expected))
    assert by_document.summary()["kl"] == pytest.approx(by_sample.summary()["kl"], rel=1e-12)
    assert by_document.summary()["intervals"]["kl"] != by_sample.summary()["intervals"]["kl"]
    alone = teacher_likelihood(states, samples, 3, 4, CPU, documents=documents)
    assert alone.cluster_positions.tolist() == expected
