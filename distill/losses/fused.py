"""Head and loss in one pass over blocks of positions: no `[N, V]` tensor exists, nothing is computed twice.

A block is one matrix product, in the type of the products. Its logits then go a few rows at a time through a scratch in
float32, which stays in a processor's cache, and their gradient takes their place in the block, for two products more.

Shapes: N positions, D hidden size, V vocabulary, C positions of a block, R rows of the scratch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill.losses.chunks import ChunkTarget, DenseChunk, Divergence
from distill.losses.surprisal import surprisals, take_all_
from distill.models.language_model import Head

SCRATCH = {"cpu": 2**20, "cuda": 2**25}
"""Numbers of the scratch, by device: 4 MiB stay in a processor's cache from kernel to kernel; 128 MiB keep a card busy
for longer than the launch of a kernel takes.
"""


@dataclass(frozen=True)
class Walk:
    """The way through a block, a few rows at a time."""

    numbers: int | None = None
    """Numbers of the scratch. None takes the device's (`SCRATCH`)."""
    each: Callable[[Iterable[slice]], Iterable[slice]] = iter
    """Parts of those given that are really walked. A forecast leaves out parts like others."""

    def parts(self, matrix: Tensor) -> Iterable[slice]:
        """Return slices of a matrix's rows, each with as many numbers as the scratch has, or one row."""
        numbers = self.numbers or SCRATCH.get(matrix.device.type, SCRATCH["cuda"])
        rows, size = len(matrix), max(1, numbers // max(1, matrix.shape[1]))
        return self.each(slice(start, min(start + size, rows)) for start in range(0, rows, size))


def fused_loss(
    hidden_ND: Tensor,
    head: Head,
    target: ChunkTarget,
    divergence: Divergence,
    chunk_size: int,
    walk: Walk | None = None,
) -> Tensor:
    """Compute the sum of the divergence over N positions, differentiable in hidden states, head weight and head bias.

    Equals `divergence(head(hidden_ND), target).sum()`. The gradients are computed in the forward pass, while the logits
    of a block of `chunk_size` positions exist: three matrix products a block. Products run in the autocast type if
    there is one, logits and divergence in float32 (float64 for float64 input). Forward KL and cross-entropy with sparse
    targets are differentiated in closed form (`surprisal.py`), other divergences by autograd. Gradients are kept in
    float32 until the loss scale is known, so that float16 neither overflows nor underflows. Without autograd
    (validation) none are computed.
    """
    compute_dtype = hidden_ND.dtype
    device_type = hidden_ND.device.type
    if torch.is_autocast_enabled(device_type):
        compute_dtype = torch.get_autocast_dtype(device_type)
    # Autograd is asked here: inside `forward` it is always off, and parameters want gradients even under `no_grad`.
    loss = _Loss(head, target, divergence, chunk_size, walk or Walk(), compute_dtype, torch.is_grad_enabled())
    return _FusedLoss.apply(hidden_ND, head.weight_VD, head.bias_V, loss)


@dataclass(frozen=True)
class _Loss:
    """Arguments of a fused loss that have no gradient."""

    head: Head
    target: ChunkTarget
    divergence: Divergence
    chunk_size: int
    walk: Walk
    compute_dtype: torch.dtype
    backward_follows: bool


@dataclass(frozen=True)
class _Gradients:
    """The gradients that are wanted, in float32 or float64: sums over positions, without the loss scale."""

    hidden_ND: Tensor | None
    weight_VD: Tensor | None
    bias_V: Tensor | None
    product_VD: Tensor | None
    """Place of a block's product, in the type of the products, where the sum is in another. The system would clear a
    new one for every block."""
    walk: Walk

    def add_products(self, rows: slice, grad_CV: Tensor, hidden_CD: Tensor, weight_VD: Tensor) -> None:
        """Add a block: the gradient in its logits times the weight, and times the hidden states."""
        if self.hidden_ND is not None:
            self.hidden_ND[rows] = grad_CV @ weight_VD
        if self.weight_VD is None:
            return
        is_first = rows.start == 0
        if self.product_VD is None:
            torch.addmm(self.weight_VD, grad_CV.T, hidden_CD, beta=0 if is_first else 1, out=self.weight_VD)
            return
        product_VD = torch.mm(grad_CV.T, hidden_CD, out=self.product_VD)
        # A sum of two types casts one of them whole, on a CPU. So it is made a part at a time.
        for part in self.walk.parts(product_VD):
            if is_first:
                self.weight_VD[part].copy_(product_VD[part])
            else:
                self.weight_VD[part].add_(product_VD[part])


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, loss: _Loss) -> Tensor:
        wide = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
        inputs = hidden_ND, weight_VD, bias_V
        make = torch.empty_like if len(hidden_ND) else torch.zeros_like  # the first block writes without adding
        hidden, weight, bias = (
            make(tensor, dtype=wide) if tensor is not None and needs and loss.backward_follows else None
            for tensor, needs in zip(inputs, ctx.needs_input_grad, strict=False)
        )
        product = None
        if weight is not None and wide != loss.compute_dtype:
            product = torch.empty_like(weight, dtype=loss.compute_dtype)
        gradients = _Gradients(hidden, weight, None if bias is None else bias.zero_(), product, loss.walk)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            total = _walk(*inputs, loss, gradients, wide)
        ctx.save_for_backward(gradients.hidden_ND, gradients.weight_VD, gradients.bias_V)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in inputs]
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        # The scaling is in place, because the weight's gradient is as large as the head. The graph is used only once.
        scaled = [
            None if grad is None else grad.mul_(grad_outputs[0]).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*scaled, None)


def _walk(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, loss: _Loss, gradients: _Gradients, wide: torch.dtype
) -> Tensor:
    """Return the sum of the loss over all positions, and write the gradients that are wanted."""
    needs_grad = any(grad is not None for grad in (gradients.hidden_ND, gradients.weight_VD, gradients.bias_V))
    compute_weight_VD = weight_VD.to(loss.compute_dtype)
    losses_N = hidden_ND.new_empty(len(hidden_ND), dtype=wide)
    blocks_CV = hidden_ND.new_empty(min(loss.chunk_size, len(hidden_ND)), len(weight_VD), dtype=loss.compute_dtype)
    scratch_RV: Tensor | None = None
    for start in range(0, len(hidden_ND), loss.chunk_size):
        # Three products a block: the logits, and below the gradients of hidden states and head weight.
        block = slice(start, min(start + loss.chunk_size, len(hidden_ND)))
        hidden_CD = hidden_ND[block].to(loss.compute_dtype)
        block_CV = torch.mm(hidden_CD, compute_weight_VD.T, out=blocks_CV[: len(hidden_CD)])
        differentiate = _in_closed_form(loss, block) or _by_autograd(loss, block)
        for part in loss.walk.parts(block_CV):
            product_RV = rows_RV = block_CV[part]
            if wide != loss.compute_dtype:
                if scratch_RV is None:
                    scratch_RV = torch.empty_like(rows_RV, dtype=wide)
                product_RV = scratch_RV[: len(rows_RV)].copy_(rows_RV)
            if bias_V is not None:
                product_RV += bias_V
            losses_N[block][part], grad_RV = differentiate(part, product_RV, needs_grad)
            if gradients.bias_V is not None and grad_RV is not None:
                gradients.bias_V.add_(grad_RV.sum(0))
            if grad_RV is not None and grad_RV is not rows_RV:
                rows_RV.copy_(grad_RV)
        if needs_grad:
            gradients.add_products(block, block_CV, hidden_CD, compute_weight_VD)
    return losses_N.sum()


_Differentiate = Callable[[slice, Tensor, bool], tuple[Tensor, Tensor | None]]
"""Function (rows of a block, the head's product there, gradient wanted?) -> each row's loss, gradient in the product.

It may write over the product, and may return it as the gradient.
"""


def _in_closed_form(loss: _Loss, block: slice) -> _Differentiate | None:
    terms = surprisals(loss.divergence, loss.target[block])
    if terms is None:
        return None

    def differentiate(rows: slice, product_RV: Tensor, needs_grad: bool) -> tuple[Tensor, Tensor | None]:
        slope_RV = loss.head.transform_(product_RV)
        losses_R = take_all_([term[rows] for term in terms], product_RV, needs_grad)
        if not needs_grad:
            return losses_R, None
        if isinstance(slope_RV, Tensor) or slope_RV != 1:
            product_RV *= slope_RV
        return losses_R, product_RV

    return differentiate


def _by_autograd(loss: _Loss, block: slice) -> _Differentiate:
    target = loss.target[block]
    if isinstance(target, DenseChunk):
        target = target.with_logits()

    def differentiate(rows: slice, product_RV: Tensor, needs_grad: bool) -> tuple[Tensor, Tensor | None]:
        with torch.set_grad_enabled(needs_grad):
            product_RV = product_RV.detach().requires_grad_(needs_grad)
            losses_R = loss.divergence(loss.head.transform(product_RV), target[rows])
            if not needs_grad:
                return losses_R, None
            return losses_R.detach(), torch.autograd.grad(losses_R.sum(), product_RV)[0]

    return differentiate
