"""An auxiliary loss, of a student from a file of the user's: the same gradient however a step is cut into passes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distill import plugins
from distill.cache.format.records import Record
from distill.cache.reading.batches import collate
from distill.losses.objective import Mixture

SOURCE = '''
"""A mixture of experts whose balance is measured on each sample."""

import torch
from distill.models.language_model import Head
from torch import nn


class Experts(nn.Module):
    def __init__(self, coefficient: float = 0.3, balanced: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(37, 6)
        self.router = nn.Linear(6, 3)
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.output = nn.Linear(6, 42)
        self.coefficient, self.balanced = coefficient, balanced

    @property
    def head(self):
        return Head(self.output.weight, self.output.bias)

    def body(self, input_ids_BL, position_ids_BL):
        hidden_BLD = self.embedding(input_ids_BL)
        share_BLE = self.router(hidden_BLD).softmax(-1)
        each_BLD = [torch.tanh(expert(hidden_BLD)) for expert in self.experts]
        mixed_BLD = sum(share_BLE[..., e, None] * each_BLD[e] for e in range(3))
        if not self.balanced:
            return hidden_BLD + mixed_BLD
        # Fedus et al. 2021, of each sample: experts * sum over them of share of tokens * mean probability.
        first_BLE = nn.functional.one_hot(share_BLE.argmax(-1), 3).float()
        balance_B = 3 * (first_BLE.mean(1) * share_BLE.mean(1)).sum(-1)
        return hidden_BLD + mixed_BLD, self.coefficient * input_ids_BL.shape[1] * balance_B.sum()
'''

Run = Callable[..., dict[str, Tensor]]


@pytest.fixture
def experts(tmp_path: Path) -> Callable[..., Any]:
    """`experts(coefficient=0.3)`: a fresh student of a class in a file outside the repository."""
    file = tmp_path / "experts.py"
    file.write_text(SOURCE)
    return plugins.load(f"{file}:Experts", "student")


def check_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=tolerance, rtol=0)


@pytest.mark.parametrize(("batch_size", "accumulate"), [(1, 4), (2, 2), (4, 1), (1, 10), (5, 2), (10, 1)])
def test_passes_of_any_size_make_the_step_from_the_definition(
    run: Run, experts: Any, records: list[Record], batch_size: int, accumulate: int
) -> None:
    """Samples without a position that counts, which are among them, take no part in either loss."""
    step = batch_size * accumulate
    found = run(batch_size, accumulate, change=lambda _: experts(), samples=records[:step])
    student = experts()
    batch = collate([record for record in records[:step] if record.loss_mask_L.any()])
    hidden_BLD, auxiliary = student.body(batch.input_ids_BL, batch.position_ids_BL)
    logits_NV = student.head.with_rows(37)(hidden_BLD[batch.loss_mask_BL])
    log_q_NV = logits_NV.log_softmax(-1)
    kl_N = -(batch.targets.dense(37) * log_q_NV).sum(-1) - batch.entropy_N
    true_N = batch.input_ids_BL.roll(-1, 1)[batch.loss_mask_BL]
    nll_N = -log_q_NV.gather(1, true_N[:, None])[:, 0]
    loss = (0.7 * kl_N + 0.3 * nll_N).mean() + auxiliary / batch.input_ids_BL.numel()
    loss.backward()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter -= parameter.grad
    check_same(found, {**student.state_dict(), "loss": loss.detach()})


def test_it_moves_what_nothing_else_moves(run: Run, experts: Any, records: list[Record]) -> None:
    """Else the test above could hold without it."""
    with_it, without = (run(2, 2, change=lambda _, c=c: experts(c), samples=records[:4]) for c in (0.3, 0.0))
    assert (with_it["router.weight"] - without["router.weight"]).abs().max() > 1e-3
    plain = run(2, 2, change=lambda _: experts(balanced=False), samples=records[:4])
    check_same(without, plain, tolerance=0)


@pytest.mark.parametrize("room", [1, 2])
def test_after_an_out_of_memory_error_the_step_is_the_same(
    run: Run, experts: Any, records: list[Record], adamw: Any, capsys: pytest.CaptureFixture[str], room: int
) -> None:
    def narrow(_: Any) -> Any:
        student = experts()
        body = student.body

        def limited(ids_BL: Tensor, positions_BL: Tensor) -> Any:
            if len(ids_BL) > room:
                raise torch.OutOfMemoryError("no room for the activations")
            return body(ids_BL, positions_BL)

        student.body = limited
        return student

    expected = run(4, 1, change=lambda _: experts(), make_optimizer=adamw)
    check_same(run(4, 1, change=narrow, make_optimizer=adamw), expected)
    assert f"from here on {room} sample" in capsys.readouterr().out


def test_it_is_logged_as_it_was_added(run: Run, experts: Any, records: list[Record]) -> None:
    """The balance is 1 at best; and it is part of the loss."""
    seen: dict[str, float] = {}

    import lightning.pytorch as pl

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *rest: Any) -> None:
            seen.update({name: float(value) for name, value in trainer.callback_metrics.items()})

    def losses(student: Any) -> dict[str, float]:
        seen.clear()
        run(2, 2, change=lambda _: student, samples=records[:4], trainer={"callbacks": [Look()]})
        return dict(seen)

    with_it, without = losses(experts(0.3)), losses(experts(balanced=False))
    assert "auxiliary_loss" not in without
    assert 0.9 * 0.3 < with_it["auxiliary_loss"] < 3 * 0.3
    assert with_it["loss"] - with_it["auxiliary_loss"] == pytest.approx(without["loss"], rel=1e-6)


def test_the_held_out_measurement_leaves_it_out(
    experts: Any, make_module: Any, make_trainer: Any, records: list[Record]
) -> None:
    def measured(student: Any) -> dict[str, float]:
        module = make_module(student, objective=Mixture(0.3))
        module.trainer = make_trainer()
        return module.measure([collate(records)])

    assert measured(experts(0.3)) == measured(experts(balanced=False))
