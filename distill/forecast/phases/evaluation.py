"""The evaluation's memory and work: its real walks over one batch of held-out text, on tensors without memory.

Shapes: N positions of a batch, V vocabulary, D the teacher's hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from distill.evaluation.fidelity import Each, TeacherStates, student_fidelity, teacher_likelihood, teacher_states
from distill.forecast.phases.teacher import make_batch
from distill.forecast.simulation.blocks import alike_once
from distill.forecast.simulation.fake import tracked
from distill.forecast.simulation.kernels import DeviceKind
from distill.forecast.simulation.repetition import first_two_alike
from distill.forecast.simulation.result import Simulation, result_of, tag_model
from distill.forecast.simulation.tracker import Tracker
from distill.models.language_model import Head

_CPU = torch.device("cpu")


def simulate_likelihood(
    make_teacher: Callable[[], nn.Module],
    *,
    batch_size: int,
    length: int,
    vocab_size: int,
    chunk_size: int,
    documents: int = 1,
    device: DeviceKind = "cpu",
) -> Simulation:
    """Simulate one batch of held-out samples that the teacher reads, including a copy of its head."""
    with tracked(_samples(batch_size, length, documents), device) as (samples, tracker):
        teacher: Any = make_teacher()
        tag_model(tracker, teacher)
        tracker.forget()
        with alike_once(teacher, tracker):
            states = teacher_states(teacher, samples, batch_size, vocab_size, _CPU, lambda tokens: None)
        tracker.tag([states.head.weight_VD], "weights")
        teacher_likelihood(states, samples, batch_size, chunk_size, _CPU, each=_equal_chunks_twice(tracker))
        return result_of(tracker)


def simulate_fidelity(
    make_student: Callable[[], nn.Module],
    *,
    teacher_hidden_size: int,
    teacher_dtype: torch.dtype,
    batch_size: int,
    length: int,
    vocab_size: int,
    chunk_size: int,
    documents: int = 1,
    device: DeviceKind = "cpu",
) -> Simulation:
    """Simulate one batch of held-out samples; the teacher has left its head and its hidden states."""
    with tracked(_samples(batch_size, length, documents), device) as (samples, tracker):
        student: Any = make_student().eval()
        tag_model(tracker, student)
        head = Head(torch.empty(vocab_size, teacher_hidden_size, dtype=teacher_dtype))
        tracker.tag([head.weight_VD], "weights")
        with tracker.host() if device == "cuda" else nullcontext():  # the device has the chunk in hand alone
            hidden_ND = torch.empty(batch_size * length, teacher_hidden_size, dtype=teacher_dtype)
        tracker.forget()
        states = TeacherStates([hidden_ND], head)
        each = _equal_chunks_twice(tracker)
        with alike_once(student, tracker):
            student_fidelity(student, states, samples, batch_size, chunk_size, _CPU, lambda tokens: None, each=each)
        return result_of(tracker)


def _samples(batch_size: int, length: int, documents: int) -> Any:
    batch = make_batch(batch_size, length, documents)
    return [{name: tensor[row].clone() for name, tensor in batch.items()} for row in range(batch_size)]


def _equal_chunks_twice(tracker: Tracker) -> Each:
    """Return a walk over a batch's chunks that measures two of the equal ones: a metric's memory does not grow."""
    return lambda chunks: first_two_alike(chunks, tracker, lambda chunk: len(chunk[1].next_ids_N))
