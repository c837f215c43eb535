"""A head that does not learn, as LoRA's, costs no matrix product for a gradient of its weights and no room for one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from distill.losses.chunks import SparseChunk
from distill.losses.fused import fused_loss
from distill.losses.objective import Mixture
from distill.models.language_model import Head


class _Made(TorchDispatchMode):
    """Counts matrix products, and new tensors as large as the head."""

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.head, self.products, self.as_large = head, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.products += func._overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        if isinstance(result, torch.Tensor) and result.numel() >= self.head.weight_VD.numel():
            own = self.head.weight_VD.untyped_storage().data_ptr()
            self.as_large += result.untyped_storage().data_ptr() != own
        return result


@pytest.mark.parametrize(("frozen", "products", "as_large"), [(True, 2, False), (False, 3, True)])
def test_a_frozen_head_has_no_weight_gradient(frozen: bool, products: int, as_large: bool) -> None:
    positions, chunks = 12, 3
    generator = torch.Generator().manual_seed(0)
    head = Head(torch.randn(997, 32, generator=generator).requires_grad_(not frozen))
    hidden_ND = torch.randn(positions, 32, generator=generator).requires_grad_()
    ids_NK = torch.randint(997, (positions, 3), generator=generator)
    target = SparseChunk(ids_NK, torch.full((positions, 3), 1 / 3), torch.zeros(positions), ids_NK[:, 0])
    with _Made(head) as made:
        fused_loss(hidden_ND, head, target, Mixture(), positions // chunks).backward()
    assert made.products == products * chunks
    assert (made.as_large > 0) is as_large
    assert (head.weight_VD.grad is None) is frozen
    assert hidden_ND.grad is not None and hidden_ND.grad.norm() > 0
