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


def test_nothing_fake_is_left_behind() -> None:
    from distill.training.optimizers import moments

    with without_memory("cpu"):
        assert isinstance(moments._dynamic_map(True, torch.device("cpu")), torch.Tensor)
    kept = moments._dynamic_map(True, torch.device("cpu"))
    assert not isinstance(kept, FakeTensor) and not isinstance(torch.zeros(1), FakeTensor)
    assert kept.abs().max() == 1


def test_a_loop_that_waits_for_a_weight_ends() -> None:
    with without_memory("cpu"), pytest.raises(RuntimeError, match="a loop that ends by them"):
        hidden = torch.randn(4)
        while hidden.norm().item() > 0.5:
            hidden = hidden * 0.5
