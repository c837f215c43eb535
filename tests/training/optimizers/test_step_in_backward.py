"""The step inside the backward pass: the plain optimiser's weights to the last bit, and no gradient left over."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from distill.errors import UserError
from distill.losses.chunks import SparseChunk
from distill.losses.divergences import forward_kl
from distill.losses.fused import fused_loss
from distill.models.language_model import Head
from distill.training.activation_checkpointing import checkpoint_blocks
from distill.training.optimizers.adamw import make_optimizer
from distill.training.optimizers.step_in_backward import StepInBackward, check_step_in_backward, gradient_norm

V, D = 80, 64
OPTIMIZERS = [("adamw", "nearest"), ("adamw", "kahan"), ("adamw_8bit", "nearest"), ("adamw_4bit", "kahan")]


class Tied(nn.Module):
    """Embedding and head are one matrix, and two of the three blocks are one block."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(V, D)
        block, other = (nn.Sequential(nn.LayerNorm(D), nn.Linear(D, D), nn.GELU()) for _ in range(2))
        self.blocks = nn.ModuleList([block, other, block])
        self.unused = nn.Linear(2, 2)
        self.to(dtype)

    def loss(self, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        ids_N = torch.randint(V, (20,), generator=generator)
        hidden_ND = self.embedding(ids_N)
        for block in self.blocks:
            hidden_ND = hidden_ND + block(hidden_ND)
        ids_NK, weights_NK = torch.randint(V, (20, 4), generator=generator), torch.full((20, 4), 0.25)
        target = SparseChunk(ids_NK, weights_NK, torch.zeros(20), ids_N)
        return fused_loss(hidden_ND, Head(self.embedding.weight), target, forward_kl, 8) / 20


def make(model: nn.Module, name: str, rounding: Any = "nearest") -> torch.optim.Optimizer:
    betas = (0.9, 0.95)
    return make_optimizer(model, name=name, learning_rate=1e-2, weight_decay=0.1, betas=betas, rounding=rounding)


def train(model: Tied, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (1 + step)
        loss = model.loss(step)
        loss.backward()
        if isinstance(optimizer, StepInBackward):
            assert all(parameter.grad is None for parameter in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def dtype_for(rounding: str) -> torch.dtype:
    return torch.float32 if rounding == "nearest" else torch.bfloat16


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize(("name", "rounding"), OPTIMIZERS)
def test_the_weights_are_the_plain_optimisers(name: str, rounding: str, recomputed: bool) -> None:
    plain, inside = Tied(dtype_for(rounding)), Tied(dtype_for(rounding))
    if recomputed:
        checkpoint_blocks(inside)
    expected = train(plain, make(plain, name, rounding), range(4))
    assert train(inside, StepInBackward(make(inside, name, rounding), inside), range(4)) == expected
    assert all(torch.equal(*pair) for pair in zip(plain.parameters(), inside.parameters(), strict=True))
    assert not torch.equal(inside.embedding.weight, Tied(dtype_for(rounding)).embedding.weight)


def test_gradients_are_freed_while_backward_runs() -> None:
    """The other blocks' gradients are gone when the first block's comes."""
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(5)])
    alive: list[int] = []

    def count(parameter: Tensor) -> None:
        alive.append(sum(parameter.grad is not None for parameter in model.parameters()))

    optimizer = StepInBackward(make(model, "adamw"), model)
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(count)  # runs behind the optimiser's
    model(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    assert alive == [0] * 10


@pytest.mark.parametrize(("name", "rounding"), OPTIMIZERS)
def test_checkpoints_are_the_plain_optimisers(name: str, rounding: str) -> None:
    """Saved inside, continued plainly, and the other way round: the same as without an interruption."""
    undisturbed = Tied(dtype_for(rounding))
    train(undisturbed, make(undisturbed, name, rounding), range(4))
    for begins_inside in (True, False):
        first, second = Tied(dtype_for(rounding)), Tied(dtype_for(rounding))
        one, other = make(first, name, rounding), make(second, name, rounding)
        if begins_inside:
            one = StepInBackward(one, first)
        else:
            other = StepInBackward(other, second)
        train(first, one, range(2))
        file = io.BytesIO()
        torch.save(one.state_dict(), file)
        file.seek(0)
        second.load_state_dict(first.state_dict())
        other.load_state_dict(torch.load(file, weights_only=True))
        train(second, other, range(2, 4))
        assert all(torch.equal(*pair) for pair in zip(undisturbed.parameters(), second.parameters(), strict=True))


def test_the_gradients_norm_is_known_after_backward() -> None:
    plain, inside = Tied(torch.float32), Tied(torch.float32)
    plain.loss(0).backward()
    optimizer = StepInBackward(make(inside, "adamw"), inside)
    inside.loss(0).backward()
    torch.testing.assert_close(gradient_norm(inside, optimizer), gradient_norm(plain, make(plain, "adamw")))


def test_a_gradient_that_is_not_finite_moves_no_weight_of_its_own() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    StepInBackward(make(model, "adamw"), model)
    before = model[0].weight.clone()
    hidden = model[0](torch.ones(1, 3))
    hidden.register_hook(lambda gradient: gradient * torch.nan)
    with pytest.raises(UserError, match=r"gradient of 0\.(weight|bias) is not finite.*--resume --train\.step_in_back"):
        model[1](hidden).sum().backward()
    assert torch.equal(model[0].weight, before)


def test_two_passes_a_step_are_an_error() -> None:
    model = nn.Linear(2, 2)
    StepInBackward(make(model, "adamw"), model)
    model(torch.ones(1, 2)).sum().backward()
    with pytest.raises(AssertionError, match="after every backward"):
        model(torch.ones(1, 2)).sum().backward()


class Manual(pl.LightningModule):
    """Manual optimisation as the students' module has it."""

    def __init__(self, make_optimizer: Callable[[nn.Module], torch.optim.Optimizer]) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.student, self.make_optimizer = Tied(torch.float32), make_optimizer

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        self.manual_backward(self.student.loss(self.global_step))
        optimizer.step()
        optimizer.zero_grad()
        self.lr_schedulers().step()  # type: ignore[union-attr]

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self)
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))]


def test_under_lightning(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its wrappers, schedules, checkpoints: interrupted inside it equals the plain one undisturbed."""

    def fit(module: Manual, steps: int, resume: Any = None) -> pl.Trainer:
        trainer = pl.Trainer(
            max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, torch.utils.data.DataLoader(range(4)), ckpt_path=resume, weights_only=True)
        return trainer

    def inside(module: nn.Module) -> torch.optim.Optimizer:
        return StepInBackward(make(module, "adamw_8bit"), module)

    plain = Manual(lambda module: make(module, "adamw_8bit"))
    fit(plain, 4)
    first, second = Manual(inside), Manual(inside)
    fit(first, 2).save_checkpoint(tmp_path / "last.ckpt")
    fit(second, 4, tmp_path / "last.ckpt")
    assert all(torch.equal(*pair) for pair in zip(plain.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("accumulate_grad_batches", 2),
        ("gradient_clip", 1.0),
        ("devices", 2),
        ("num_nodes", 2),
        ("strategy", "fsdp"),
        ("precision", "16-mixed"),
        ("non_finite", "skip"),
    ],
)
def test_what_needs_all_gradients_is_refused(key: str, value: Any) -> None:
    fine: dict[str, Any] = {
        "accumulate_grad_batches": 1,
        "gradient_clip": 0.0,
        "devices": 1,
        "num_nodes": 1,
        "strategy": "auto",
        "precision": "bf16-mixed",
        "non_finite": "stop",
    }
    check_step_in_backward(**fine)
    with pytest.raises(UserError, match=rf"train\.step_in_backward.*train\.{key}"):
        check_step_in_backward(**{**fine, key: value})
