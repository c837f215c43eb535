"""A tiny student, and batches of unevenly masked samples with targets of a tiny teacher."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distill.cache.records import Record
from distill.models.language_model import Head
from distill.targets import schemes
from distill.targets.extract import extract

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
        targets = extract(hidden_LD, head, ids_L, torch.arange(L), mask_L, scheme, seed=0)
        positions_L = np.arange(L, dtype=np.uint32)
        made.append(Record(ids_L.numpy().astype(np.uint32), positions_L, mask_L.numpy(), targets))
    return made
