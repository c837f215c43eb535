"""Values of fake tensors: those that follow from a batch are right, others are taken to be fine."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from distill.forecast.simulation.fake import without_memory


def test_what_follows_from_a_batch_is_known() -> None:
    mask_BL = torch.rand(3, 50, generator=torch.Generator().manual_seed(0)) < 0.3
    with without_memory("cpu") as values:
        known_BL = values.known(mask_BL)
        assert isinstance(known_BL, FakeTensor)
        assert int(known_BL[:2].sum()) == int(mask_BL[:2].sum())
        assert bool((known_BL & ~known_BL).any()) is False
        hidden_ND = torch.empty(3, 50, 8)[known_BL]
        assert hidden_ND.shape == (int(mask_BL.sum()), 8)
        assert len(known_BL.nonzero()) == len(hidden_ND)
        assert (known_BL.long() * 2).numpy().max() == 2


def test_what_follows_from_weights_is_fine() -> None:
    with without_memory("cpu"):
        loss = torch.nn.Linear(4, 4)(torch.randn(2, 4)).mean()
        assert torch.isfinite(loss)
        assert float(loss.detach()) == 1.0
        assert loss.reshape(1).numpy().shape == (1,)


def test_what_is_changed_by_the_unknown_is_unknown() -> None:
    real = torch.zeros((), dtype=torch.int64)
    with without_memory("cpu", integer=7) as values:
        total = values.known(real)
        total += 2
        assert int(total) == 2
        total += torch.randn(3).argmax()
        assert int(total) == 7


def test_nothing_of_the_unknown_is_out_of_its_place() -> None:
    """As `torch.nn.init.trunc_normal_` asks, again and again."""
    with without_memory("cpu"):
        weight = torch.randn(3, 3)
        assert not (weight > 2).any() and (weight < 2).all()
        assert torch.nn.init.trunc_normal_(weight) is weight


def test_an_index_keeps_its_values_where_unknown_ones_are_added_by_it() -> None:
    real = torch.tensor([2, 0])
    with without_memory("cpu") as values:
        rows = values.known(real)
        torch.zeros(3).index_add_(0, rows, torch.randn(2))
        counts = torch.zeros(3, dtype=torch.int64).index_add_(0, rows, torch.ones_like(rows))
        assert counts.tolist() == [1, 0, 1]


def test_a_module_is_cast_and_moved() -> None:
    with without_memory("cpu"):
        model = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Linear(4, 5, bias=False))
        model[1].weight = model[0].weight
        model.to(torch.bfloat16).to("cpu")
        assert model[0].weight is model[1].weight and model[0].weight.dtype == torch.bfloat16


def test_a_loop_that_waits_for_a_weight_ends() -> None:
    with without_memory("cpu"), pytest.raises(RuntimeError, match="a loop that ends by them"):
        hidden = torch.randn(4)
        while hidden.norm().item() > 0.5:
            hidden = hidden * 0.5
