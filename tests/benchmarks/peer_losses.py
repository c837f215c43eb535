"""Head and loss of the peers beside ours: `make bench-peers ARGS="--only peer_losses"`.

All take the same hidden states, head and true tokens, and give the gradients of both. Liger's distillation loss has the
teacher's hidden states and head instead of our sparse target, as an online teacher would. A peer that does not run on
the device says why. Source: github.com/linkedin/Liger-Kernel, github.com/apple/ml-cross-entropy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from head_loss import Problem, make_problem, materialised_text
from paired import Row, Setup, not_measured, paired
from torch import Tensor

from distill.experiment.configuration import LossConfig
from distill.losses.chunks import SparseChunk
from distill.losses.divergences import cross_entropy, forward_kl
from distill.losses.fused import fused_loss
from distill.models.language_model import Head

CHUNK = LossConfig().chunk_size


def rows(setup: Setup) -> Iterator[Row]:
    """Yield our time in each peer's, for both types."""
    sizes = (64, 32, 1000) if setup.tiny else (1024, 576, 49_152)
    for name in ("bf16", "fp32"):
        case = f"{name}, N {sizes[0]:,}, D {sizes[1]}, V {sizes[2]:,}"
        if setup.wants(case):
            problem = make_problem(*sizes, name, setup.device)
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

    peers = {
        "plain cross-entropy": materialised_text,
        "cut-cross-entropy": _cut(device),
        "Liger's cross-entropy": _liger,
    }
    text, distilled = (partial(fused_loss, divergence=one, chunk_size=CHUNK) for one in (cross_entropy, forward_kl))
    found = {name: (partial(problem.run, text), partial(problem.run, loss)) for name, loss in peers.items()}
    return {**found, "Liger's chunked KL": (partial(problem.run, distilled), partial(problem.run, _liger_kl))}


def _cut(device: str) -> Callable[[Tensor, Head, SparseChunk], Tensor]:
    """Choose cut-cross-entropy's Triton kernels on a card and its compiled PyTorch elsewhere, as it advises."""

    def loss(hidden_ND: Tensor, head: Head, target: SparseChunk) -> Tensor:
        from cut_cross_entropy import linear_cross_entropy

        impl = "cce" if device == "cuda" else "torch_compile"
        return linear_cross_entropy(hidden_ND, head.weight_VD, target.true_ids_N, impl=impl, reduction="sum")

    return loss


def _liger(hidden_ND: Tensor, head: Head, target: SparseChunk) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return loss(head.weight_VD, hidden_ND, target.true_ids_N)


def _liger_kl(hidden_ND: Tensor, head: Head, target: SparseChunk) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0)
    teacher = hidden_ND.detach(), head.weight_VD.detach()
    return loss(hidden_ND, head.weight_VD, *teacher, target.true_ids_N)
