"""A training step: the mean over all positions of the step, however it is cut into micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn

from distill.cache.format.records import Record
from distill.cache.reading.batches import Batch, collate
from distill.losses.objective import Mixture

V = 37
Run = Callable[..., dict[str, Tensor]]


def check_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=tolerance, rtol=0)


class Seen(pl.Callback):
    """Notes all that a step logs."""

    def __init__(self, seen: dict[str, float]) -> None:
        self.seen = seen

    def on_train_batch_end(self, trainer: pl.Trainer, *rest: Any) -> None:
        self.seen.update({name: float(value) for name, value in trainer.callback_metrics.items()})


@pytest.fixture
def seen() -> dict[str, float]:
    return {}


def naive_losses(student: Any, batch: Batch) -> Tensor:
    """The mixture of `Mixture(0.3)` at each position, from the definition."""
    logits_BLV = student.head(student.body(batch.input_ids_BL, batch.position_ids_BL))[..., :V]
    losses, position = [], 0
    for ids_L, mask_L, logits_LV in zip(batch.input_ids_BL, batch.loss_mask_BL, logits_BLV, strict=True):
        for place in mask_L.nonzero()[:, 0]:
            log_q_V = logits_LV[place].log_softmax(-1)
            weights_V = batch.targets.dense(V)[position]
            kl = -(weights_V * log_q_V).sum() - batch.entropy_N[position]
            losses.append(0.7 * kl - 0.3 * log_q_V[ids_L[place + 1]])
            position += 1
    return torch.stack(losses) if losses else torch.zeros(0)


def naive_training(student: Any, batches: Iterator[Batch]) -> dict[str, Tensor]:
    """Gradient descent on the mean over each batch's positions, in six lines of torch."""
    loss = torch.zeros(())
    for batch in batches:
        loss = naive_losses(student, batch).mean()
        student.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in student.parameters():
                parameter -= parameter.grad
    return {**student.state_dict(), "loss": loss.detach()}


@pytest.mark.parametrize(("batch_size", "accumulate"), [(4, 1), (2, 2), (1, 4)])
@pytest.mark.parametrize("samples", [4, 10])  # one step; three, of which the last has half of the samples
def test_a_step_is_the_mean_over_its_positions(
    run: Run,
    make_student: Callable[[], nn.Module],
    records: list[Record],
    batch_size: int,
    accumulate: int,
    samples: int,
) -> None:
    steps = (collate(records[start : min(start + 4, samples)]) for start in range(0, samples, 4))
    expected = naive_training(make_student(), steps)
    check_same(run(batch_size, accumulate, samples=records[:samples]), expected)


def test_adamw_takes_the_same_steps(run: Run, adamw: Any) -> None:
    expected = run(4, 1, make_optimizer=adamw)
    for batch_size, accumulate in ((2, 2), (1, 4)):
        check_same(run(batch_size, accumulate, make_optimizer=adamw), expected)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_clipping_sees_the_gradient_of_the_mean(
    run: Run, make_student: Callable[[], nn.Module], accumulate: int
) -> None:
    """The step of length 1 times the gradient is as long as the clip says, or as the gradient where that is shorter."""
    begin = make_student().state_dict()

    def length(clip: float) -> float:
        end = run(4 // accumulate, accumulate, gradient_clip=clip, trainer={"max_steps": 1})
        return torch.cat([(end[name] - begin[name]).flatten() for name in begin]).norm().item()

    free = length(0.0)
    assert length(free / 10) == pytest.approx(free / 10, rel=1e-3)
    assert length(free * 1.01) == pytest.approx(free, rel=1e-6)


def test_what_the_mask_hides_has_no_influence(run: Run, records: list[Record]) -> None:
    """Tokens that are neither read at a position with loss nor the next one of such a position may be anything."""

    def corrupt(record: Record) -> Record:
        used_L = record.loss_mask_L | np.roll(record.loss_mask_L, 1)
        return replace(record, input_ids_L=np.where(used_L, record.input_ids_L, V - 1).astype(np.uint32))

    corrupted = [corrupt(record) for record in records]
    assert sum((a.input_ids_L != b.input_ids_L).sum() for a, b in zip(records, corrupted, strict=True)) > 10
    check_same(run(2, 2, samples=corrupted), run(2, 2), tolerance=0)


def test_a_step_without_any_position_changes_nothing(
    run: Run, make_student: Callable[[], nn.Module], records: list[Record]
) -> None:
    nothing = [records[3], records[8]]
    assert not any(record.loss_mask_L.any() for record in nothing)
    expected = run(1, 2, samples=records[:2])
    check_same(run(1, 2, samples=[*records[:2], *nothing]), expected, tolerance=0)


def test_padding_rows_of_the_head_never_move(run: Run, make_student: Callable[[], nn.Module]) -> None:
    begin, end = make_student().state_dict(), run(4, 1)
    assert torch.equal(end["output.weight"][V:], begin["output.weight"][V:])
    assert torch.equal(end["output.bias"][V:], begin["output.bias"][V:])
    assert not torch.equal(end["output.weight"][:V], begin["output.weight"][:V])


def test_bf16_mixed_is_near(run: Run) -> None:
    expected, found = run(2, 2), run(2, 2, trainer={"precision": "bf16-mixed"})
    check_same(found, expected, tolerance=0.03)
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}


def test_float16_clips_and_logs_the_gradient_without_its_scale(
    run: Run, make_student: Callable[[], nn.Module], seen: dict[str, float]
) -> None:
    """The gradient is clipped while it is scaled: the step of length 1 times the gradient is as long as the clip."""
    begin = make_student().state_dict()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    settings = {"callbacks": [Seen(seen)], "max_steps": 1}
    run(2, 2, trainer=settings)
    expected = seen["gradient_norm"]
    plugins = [MixedPrecision("16-mixed", "cpu", scaler)]
    end = run(2, 2, gradient_clip=expected / 10, trainer={**settings, "plugins": plugins})
    assert scaler.get_scale() == 2.0**10 and seen["gradient_norm"] == pytest.approx(expected, rel=0.02)
    way = torch.cat([(end[name] - begin[name]).flatten() for name in begin]).norm().item()
    assert way == pytest.approx(expected / 10, rel=0.02)


@pytest.mark.parametrize("batch_size", [1, 3, 10])
def test_held_out_means_are_over_positions(
    make_student: Callable[[], nn.Module],
    make_module: Any,
    make_trainer: Any,
    records: list[Record],
    batch_size: int,
) -> None:
    student = make_student()
    with torch.no_grad():
        expected = naive_losses(student, collate(records)).mean().item()

    def measure(alpha: float) -> dict[str, float]:
        module = make_module(student, objective=Mixture(alpha))
        module.trainer = make_trainer()
        return module.measure(collate(records[at : at + batch_size]) for at in range(0, 10, batch_size))

    found = measure(0.3)
    assert found["held_out_loss"] == pytest.approx(expected, rel=1e-5)
    cross_entropy = measure(1.0)["held_out_loss"]
    assert 0.7 * found["held_out_kl"] + 0.3 * cross_entropy == pytest.approx(expected, rel=1e-5)
    assert student.training, "it goes on learning"
