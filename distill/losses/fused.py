"""Head and loss in one pass over chunks of positions: no `[N, V]` tensor exists, nothing is computed twice.

Shapes: N positions, D hidden size, V vocabulary, C positions of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distill.losses.chunks import ChunkTarget, Divergence
from distill.models.language_model import Head


def fused_loss(hidden_ND: Tensor, head: Head, target: ChunkTarget, divergence: Divergence, chunk_size: int) -> Tensor:
    """Compute the sum of the divergence over N positions, differentiable in hidden states, head weight and head bias.

    Equals `divergence(head(hidden_ND), target).sum()`. The gradients are computed chunk by chunk in the forward pass,
    while a chunk's logits exist: three matrix products a chunk. Products run in the autocast type if there is one,
    logits and divergence in float32 (float64 for float64 input). Gradients are kept in float32 until the loss scale
    is known, so that float16 neither overflows nor underflows. Without autograd (validation) none are computed.
    """
    compute_dtype = hidden_ND.dtype
    device_type = hidden_ND.device.type
    if torch.is_autocast_enabled(device_type):
        compute_dtype = torch.get_autocast_dtype(device_type)
    # Autograd is asked here: inside `forward` it is always off, and parameters want gradients even under `no_grad`.
    backward_follows = torch.is_grad_enabled()
    return _FusedLoss.apply(
        hidden_ND, head.weight_VD, head.bias_V, head, target, divergence, chunk_size, compute_dtype, backward_follows
    )


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        head: Head,
        target: ChunkTarget,
        divergence: Divergence,
        chunk_size: int,
        compute_dtype: torch.dtype,
        backward_follows: bool,
    ) -> Tensor:
        wide = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
        needs_hidden, needs_weight, needs_bias = (backward_follows and needs for needs in ctx.needs_input_grad[:3])
        needs_grad = needs_hidden or needs_weight or needs_bias
        grad_hidden_ND = torch.zeros_like(hidden_ND, dtype=wide) if needs_hidden else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=wide) if needs_weight else None
        grad_bias_V = torch.zeros_like(bias_V, dtype=wide) if needs_bias and bias_V is not None else None
        total = torch.zeros((), dtype=wide, device=hidden_ND.device)
        compute_weight_VD = weight_VD.to(compute_dtype)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            for start in range(0, len(hidden_ND), chunk_size):
                # Three products a chunk: the logits, and below the gradients of hidden states and head weight.
                rows = slice(start, start + chunk_size)
                hidden_CD = hidden_ND[rows].to(compute_dtype)
                product_CV = (hidden_CD @ compute_weight_VD.T).to(wide)
                if bias_V is not None:
                    product_CV += bias_V
                loss, grad_CV = _chunk(product_CV, head, target[rows], divergence, needs_grad)
                total += loss
                if grad_CV is None:
                    continue
                if grad_bias_V is not None:
                    grad_bias_V += grad_CV.sum(0)
                grad_CV = grad_CV.to(compute_dtype)
                if grad_hidden_ND is not None:
                    grad_hidden_ND[rows] = grad_CV @ compute_weight_VD
                if grad_weight_VD is not None:
                    grad_weight_VD += grad_CV.T @ hidden_CD
        ctx.save_for_backward(grad_hidden_ND, grad_weight_VD, grad_bias_V)
        ctx.dtypes = (hidden_ND.dtype, weight_VD.dtype, None if bias_V is None else bias_V.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        # The scaling is in place, because the weight's gradient is as large as the head. The graph is used only once.
        scaled = [
            None if grad is None else grad.mul_(grad_outputs[0]).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None, None, None, None, None)


def _chunk(
    product_CV: Tensor, head: Head, target: ChunkTarget, divergence: Divergence, needs_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the loss of one chunk and its gradient in the product, by autograd over this chunk alone."""
    with torch.set_grad_enabled(needs_grad):
        product_CV.requires_grad_(needs_grad)
        loss = divergence(head.transform(product_CV), target).sum()
        if not needs_grad:
            return loss, None
        (grad_CV,) = torch.autograd.grad(loss, product_CV)
        return loss.detach(), grad_CV
