"""Values of fake tensors: those that follow from a batch are right, others are taken to be fine."""

from __future__ import annotations

from typing import Any

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


def test_a_tensor_of_tensors_has_their_type_and_values() -> None:
    wide, whole = torch.ones((), dtype=torch.float64), torch.tensor([4, 7], dtype=torch.int32)
    with without_memory("cpu") as values:
        known = values.known(whole)
        assert torch.tensor([[known[0], 2], [3, known[1]]]).tolist() == [[4, 2], [3, 7]]
        for content in ([known[0]], [known[0], 5], [values.known(wide), 2.0], [torch.randn(()), 1]):
            real = [torch.ones((), dtype=each.dtype) if isinstance(each, torch.Tensor) else each for each in content]
            made = torch.as_tensor(content)
            assert made.shape == (len(content),) and made.dtype == torch.as_tensor(real).dtype
        assert torch.tensor([torch.randn(())], dtype=torch.float16).dtype == torch.float16


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


def test_a_router_chooses_each_expert_as_often() -> None:
    with without_memory("cpu"):
        chosen_NK = torch.randn(12, 8).topk(2).indices
        taken_EKN = torch.nn.functional.one_hot(chosen_NK, 8).permute(2, 1, 0)
        assert [len(torch.where(taken_KN)[1]) for taken_KN in taken_EKN] == [3] * 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shapes", [((50, 24), (5, 24, 36)), ((36, 50), (50, 20)), ((5, 36, 24), (24, 50))])
def test_a_grouped_product_is_as_large_as_the_real_one(shapes: tuple[Any, Any], dtype: torch.dtype) -> None:
    """Its rows are padded to 16 bytes."""

    def product(a: Any, b: Any) -> Any:
        offs = torch.tensor([10, 10, 30, 40, 50], dtype=torch.int32)
        made = torch.nn.functional.grouped_mm(a, b, offs=offs)
        return made.shape, made.stride(), made.dtype, made.untyped_storage().nbytes()

    def padded(*shape: int) -> Any:  # as the real kernel wants its arguments
        return torch.ones(*shape[:-1], -(-shape[-1] // 8) * 8, dtype=dtype)[..., : shape[-1]]

    real = product(*(padded(*shape) for shape in shapes))
    with without_memory("cpu"):
        assert product(*(padded(*shape) for shape in shapes)) == real


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
