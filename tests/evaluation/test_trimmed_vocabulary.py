"""A student with some of the teacher's tokens, measured over those: against a dense float64 program.

Shapes: L sequence length, V the teacher's vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from distill.evaluation.fidelity import dropped_mass, student_fidelity, teacher_likelihood, teacher_states
from distill.evaluation.held_out import covered
from distill.models.language_model import Head
from distill.models.vocabulary import Vocabulary

V, L, D = 41, 9, 6
KEPT = Vocabulary(torch.arange(1, V, 3), V)
CPU = torch.device("cpu")


class Tiny(nn.Module):
    """Hidden states that depend on the token and its position alone."""

    def __init__(self, seed: int, rows: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding, self.places, self.output = nn.Embedding(rows, D), nn.Embedding(L, D), nn.Linear(D, rows)

    @property
    def head(self) -> Head:
        return Head(self.output.weight, self.output.bias)

    def body(self, input_ids_BL: Tensor, position_ids_BL: Tensor) -> Tensor:
        return self.embedding(input_ids_BL) + self.places(position_ids_BL)


class Samples(Dataset[Any]):
    """Seven samples; the text of the even ones is made of the kept tokens."""

    def __len__(self) -> int:
        return 7

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        ids_L = KEPT.kept_ids[torch.randint(len(KEPT), (L,), generator=generator)]
        if index % 2:
            ids_L[index] = 0
        mask_L = torch.rand(L, generator=generator) < 0.6
        mask_L[0], mask_L[-1] = True, False
        return {"input_ids": ids_L, "position_ids": torch.arange(L), "loss_mask": mask_L}


SAMPLES = covered(Subset(Samples(), range(7)), KEPT)


def ignore(tokens: int) -> None:
    pass


@torch.no_grad()
def reference(student: Tiny, teacher: Tiny) -> dict[str, float]:
    """Position by position, over the kept tokens; the teacher's mass on the others beside."""
    student, teacher = student.double(), teacher.double()
    sums = dict.fromkeys(("nll", "kl", "top1_agreement", "acceptance", "dropped", "teacher_nll"), 0.0)
    count = low = 0
    for index in range(0, 7, 2):
        row = Samples()[index]
        ids_L, own_L = row["input_ids"], KEPT.mapped(row["input_ids"])
        p_LV = teacher.head(teacher.body(ids_L, row["position_ids"]))[:, :V].softmax(-1)
        q_LK = student.head(student.body(own_L, row["position_ids"]))[:, : len(KEPT)].softmax(-1)
        for place in row["loss_mask"].nonzero().flatten().tolist():
            p_V, q_K = p_LV[place], q_LK[place]
            p_K = p_V[KEPT.kept_ids] / p_V[KEPT.kept_ids].sum()
            sums["nll"] -= math.log(q_K[own_L[place + 1]])
            sums["teacher_nll"] -= math.log(p_V[ids_L[place + 1]])
            sums["kl"] += float((p_K * (p_K / q_K).log()).sum())
            sums["top1_agreement"] += float(p_K.argmax() == q_K.argmax())
            sums["acceptance"] += float(torch.minimum(p_K, q_K).sum())
            sums["dropped"] += 1 - float(p_V[KEPT.kept_ids].sum())
            low += float(-(p_K * p_K.log()).sum()) < 2
            count += 1
    student.float(), teacher.float()
    return {name: total / count for name, total in sums.items()} | {"tokens": count, "of_low_entropy": low}


@pytest.mark.parametrize("padding", [0, 3])
def test_it_equals_the_dense_program(padding: int) -> None:
    student, teacher = Tiny(1, len(KEPT) + padding), Tiny(2, V + 5)
    states = teacher_states(teacher, SAMPLES, 3, V, CPU, ignore)
    expected = reference(student, teacher)
    measured = student_fidelity(student, states, SAMPLES, 3, 4, CPU, ignore, KEPT)
    found = measured.summary()
    for name in ("nll", "kl", "top1_agreement", "acceptance"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5), name
    assert measured.tokens == expected["tokens"]
    first = [bin["positions"] for bin in found["by_entropy"] if bin["from"] < 2]
    assert sum(first) == expected["of_low_entropy"] > 0, "binned by the entropy of what is left of the teacher"
    assert dropped_mass(states, KEPT, 4, CPU) == pytest.approx(expected["dropped"], rel=1e-5)
    assert 0.2 < expected["dropped"] < 0.9, "else this says little"
    alone = teacher_likelihood(states, SAMPLES, 3, 4, CPU).summary()
    assert alone["nll"] == pytest.approx(expected["teacher_nll"], rel=1e-5)


def test_the_teacher_cut_down_to_the_kept_tokens_is_the_best_student() -> None:
    teacher, student = Tiny(2, V + 5), Tiny(1, len(KEPT))
    with torch.no_grad():
        for weight, own in zip(student.parameters(), teacher.parameters(), strict=True):
            weight.copy_(own if weight.shape == own.shape else own[KEPT.kept_ids])
    states = teacher_states(teacher, SAMPLES, 3, V, CPU, ignore)
    found = student_fidelity(student, states, SAMPLES, 3, 4, CPU, ignore, KEPT).summary()
    assert found["kl"] == pytest.approx(0, abs=1e-9)
    assert found["top1_agreement"] == 1 and found["acceptance"] == pytest.approx(1)


def test_samples_with_a_dropped_token_are_left_out_and_no_others() -> None:
    everything = Vocabulary(torch.arange(V), V)
    assert SAMPLES.indices == [0, 2, 4, 6]
    assert len(covered(Subset(Samples(), range(7)), everything)) == 7
    assert covered(Subset(Samples(), [1, 3]), KEPT).indices == []


def test_nothing_is_dropped_of_the_whole_vocabulary() -> None:
    student, teacher = Tiny(1, V), Tiny(2, V)
    everything = Vocabulary(torch.arange(V), V)
    states = teacher_states(teacher, SAMPLES, 3, V, CPU, ignore)
    assert dropped_mass(states, everything, 4, CPU) == 0
    whole = student_fidelity(student, states, SAMPLES, 3, 4, CPU, ignore).summary()
    assert student_fidelity(student, states, SAMPLES, 3, 4, CPU, ignore, everything).summary() == whole
