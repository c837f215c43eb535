"""Head and loss of the peers beside ours: `make bench-peers ARGS="--only peer_losses"`.

All take the same hidden states, head and true tokens, and give the gradients of both. Liger's distillation loss has the
teacher's hidden states and head instead of our sparse target, as an online teacher would. A peer that does not run on
the device says why. Source: github.com/linkedin/Liger-Kernel, github.com/apple/ml-cross-entropy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from paired import Row, Setup, not_measured, paired
from torch import Tensor

from distill.losses.chunks import SparseChunk
from distill.losses.divergences import cross_entropy, forward_kl
from distill.losses.fused import fused_loss
from distill.models.language_model import Head

ENTRIES = 16
"""Entries of a sparse target."""


@dataclass
class Problem:
    """Hidden states, head, tokens and targets. Shapes: N positions, D hidden size, V vocabulary, K entries."""

    hidden_ND: Tensor
    weight_VD: Tensor
    true_ids_N: Tensor
    ids_NK: Tensor

    @classmethod
    def make(cls, sizes: tuple[int, int, int], dtype: torch.dtype, device: str) -> Problem:
        """Draw a problem of N, D and V."""
        N, D, V = sizes
        generator = torch.Generator().manual_seed(0)
        hidden_ND = torch.randn(N, D, generator=generator).to(device, dtype).requires_grad_(True)
        weight_VD = (torch.randn(V, D, generator=generator) / D**0.5).to(device, dtype).requires_grad_(True)
        ids_NK = torch.randint(V, (N, ENTRIES), generator=generator).to(device)
        return cls(hidden_ND, weight_VD, ids_NK[:, 0].contiguous(), ids_NK)

    def target(self) -> SparseChunk:
        """Return the sparse target: equal weights."""
        weights_NK = torch.full_like(self.ids_NK, 1, dtype=torch.float32) / ENTRIES
        return SparseChunk(self.ids_NK, weights_NK, torch.zeros_like(weights_NK[:, 0]), self.true_ids_N)

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of hidden states and head anew."""
        self.hidden_ND.grad = self.weight_VD.grad = None
        loss.backward()


def rows(setup: Setup) -> Iterator[Row]:
    """Yield our time in each peer's, for both types."""
    sizes = (64, 32, 1000) if setup.tiny else (1024, 576, 49_152)
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        case = f"{name}, N {sizes[0]:,}, D {sizes[1]}, V {sizes[2]:,}"
        if setup.wants(case):
            problem = Problem.make(sizes, dtype, setup.device)
            for peer, (ours, theirs) in _peers(problem, setup.device).items():
                yield _row(case, peer, ours, theirs, setup)


def _row(case: str, peer: str, ours: Callable[[], None], theirs: Callable[[], None], setup: Setup) -> Row:
    try:
        theirs()
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        return not_measured("peer_losses", case, f"time of {peer}", f"does not run on this {setup.device}: {reason[0]}")
    return paired(ours, theirs, setup).time_row("peer_losses", case, f"time of {peer}")


def _peers(problem: Problem, device: str) -> dict[str, tuple[Callable[[], None], Callable[[], None]]]:
    """Return the name of each peer with our way and theirs of the same work."""

    def text() -> None:
        problem.backward(_fused(problem, cross_entropy) / len(problem.hidden_ND))

    def distilled() -> None:
        problem.backward(_fused(problem, forward_kl) / len(problem.hidden_ND))

    peers = {"plain cross-entropy": _plain, "cut-cross-entropy": _cut(device), "Liger's cross-entropy": _liger}
    found = {name: (text, lambda loss=loss: problem.backward(loss(problem))) for name, loss in peers.items()}
    return {**found, "Liger's chunked KL": (distilled, lambda: problem.backward(_liger_kl(problem)))}


def _fused(problem: Problem, divergence: Callable[..., Tensor]) -> Tensor:
    return fused_loss(problem.hidden_ND, Head(problem.weight_VD), problem.target(), divergence, 256)


def _plain(problem: Problem) -> Tensor:
    """Materialise the logits, as transformers' models do."""
    logits_NV = problem.hidden_ND @ problem.weight_VD.T
    return torch.nn.functional.cross_entropy(logits_NV.float(), problem.true_ids_N)


def _cut(device: str) -> Callable[[Problem], Tensor]:
    """Choose cut-cross-entropy's Triton kernels on a card and its compiled PyTorch elsewhere, as it advises."""

    def loss(problem: Problem) -> Tensor:
        from cut_cross_entropy import linear_cross_entropy

        impl = "cce" if device == "cuda" else "torch_compile"
        return linear_cross_entropy(problem.hidden_ND, problem.weight_VD, problem.true_ids_N, impl=impl)

    return loss


def _liger(problem: Problem) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(problem.weight_VD, problem.hidden_ND, problem.true_ids_N)


def _liger_kl(problem: Problem) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0)
    hidden_ND, weight_VD = problem.hidden_ND, problem.weight_VD
    return loss(hidden_ND, weight_VD, hidden_ND.detach(), weight_VD.detach(), problem.true_ids_N)
