"""A tiny student, and batches of unevenly masked samples with targets of a tiny teacher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from distill.cache.format.records import Record
from distill.cache.making.extract import extract
from distill.cache.reading.batches import collate
from distill.losses.objective import Mixture
from distill.models.language_model import Head
from distill.targets import schemes
from distill.training.module import DistillationModule
from distill.training.optimizers.schedule import Schedule

V, D, L = 37, 6, 11


class Block(nn.Module):
    """Counts how often it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)
        self.runs = 0

    def forward(self, hidden_BLD: Tensor) -> Tensor:
        self.runs += 1
        return hidden_BLD + torch.tanh(self.linear(hidden_BLD))


class Student(nn.Module):
    """Embedding, blocks that see one position each, and a head with five padding rows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(V, D)
        self.others = nn.ModuleList([nn.Tanh()])
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.output = nn.Linear(D, V + 5)

    @property
    def head(self) -> Head:
        return Head(self.output.weight, self.output.bias, soft_cap=20.0)

    def body(self, input_ids_BL: Tensor, position_ids_BL: Tensor) -> Tensor:
        hidden_BLD = self.embedding(input_ids_BL)
        for block in self.blocks:
            hidden_BLD = block(hidden_BLD)
        return hidden_BLD


@pytest.fixture
def make_student() -> Callable[[], Student]:
    return Student


@pytest.fixture(scope="session")
def scheme() -> schemes.AnyScheme:
    return schemes.make("varopt", threshold=0.1)


@pytest.fixture(scope="session")
def records(scheme: schemes.AnyScheme) -> list[Record]:
    """Ten samples; from all positions with loss to none."""
    generator = torch.Generator().manual_seed(5)
    head = Head(torch.randn(V, D, generator=generator) * 2)
    made = []
    for number in range(10):
        ids_L = torch.randint(V, (L,), generator=generator)
        mask_L = torch.rand(L, generator=generator) < (1, 0.1, 0.7, 0, 0.9)[number % 5]
        mask_L[-1] = False
        hidden_LD = torch.randn(L, D, generator=generator)
        made.append(extract(hidden_LD, head, ids_L, torch.arange(L), mask_L, scheme, seed=0))
    return made


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    """Plain gradient descent, whose step shows the gradient."""
    return torch.optim.SGD(module.parameters(), lr=1.0)


@pytest.fixture(scope="session")
def adamw() -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda module: torch.optim.AdamW(module.parameters(), lr=0.01, weight_decay=0.1, betas=(0.9, 0.95))


@pytest.fixture(scope="session")
def make_trainer() -> Callable[..., pl.Trainer]:
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    return lambda **settings: pl.Trainer(accelerator="cpu", devices=1, **quiet, **settings)


@pytest.fixture(scope="session")
def make_module() -> Callable[..., DistillationModule]:
    def make(student: nn.Module, **changes: Any) -> DistillationModule:
        settings: dict[str, Any] = {
            "vocab_size": V,
            "objective": Mixture(0.3),
            "chunk_size": 3,
            "micro_batch": 4,
            "make_optimizer": sgd,
            "make_schedule": lambda total: Schedule("cosine", total, 0.0, 0.2, 1.0),
        }
        return DistillationModule(student, **{**settings, **changes})

    return make


@pytest.fixture
def run(
    make_student: Callable[[], nn.Module],
    make_module: Any,
    make_trainer: Any,
    scheme: schemes.AnyScheme,
    records: list[Record],
) -> Callable[..., dict[str, Tensor]]:
    """`run(batch_size, accumulate)`: train a fresh student on the records in order; its parameters, the last loss."""

    def train(
        batch_size: int,
        accumulate: int,
        *,
        samples: list[Record] = records,
        trainer: Any = None,
        change: Callable[[Any], Any] = lambda student: student,
        **module: Any,
    ) -> dict[str, Tensor]:
        student = change(make_student())
        step = batch_size * accumulate
        loader = DataLoader(samples, step, collate_fn=collate)  # type: ignore[arg-type]
        lightning = make_trainer(**{"max_epochs": 1, **(trainer or {})})
        lightning.fit(make_module(student, micro_batch=batch_size, **module), loader)
        return {**{k: v.clone() for k, v in student.state_dict().items()}, "loss": lightning.callback_metrics["loss"]}

    return train
