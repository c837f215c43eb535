"""Time and memory of head and loss, beside materialised logits with the same target: a benchmark of `bench.py`.

    python tests/benchmarks/bench.py --only head_loss --case "bf16, D 576"

Forward and backward of 4,096 positions, hidden states and weight in one type, sparse targets of 16 entries. The peer is
plain PyTorch: logits of all positions, in float32 from the product on, logsumexp, autograd; and, for the true token
alone, torch's own cross-entropy. Memory is the largest
number of bytes that torch's allocator held, less the weight's gradient, which both leave behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from paired import Row, Setup, allocator_peak, number_row, paired
from torch import Tensor

from distill.experiment.configuration import LossConfig
from distill.losses.chunks import SparseChunk
from distill.losses.divergences import cross_entropy, forward_kl
from distill.losses.fused import fused_loss
from distill.models.language_model import Head

POSITIONS, ENTRIES = 4096, 16
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
CASES = [
    (576, 49_152, "bf16", "≤ 0.65"),
    (576, 49_152, "fp32", "≤ 0.87"),
    (1024, 151_936, "bf16", "≤ 0.75"),
    (1024, 151_936, "fp32", "≤ 0.90"),
]
"""Hidden size, vocabulary, type, and the aim of the time."""


@dataclass(frozen=True)
class Problem:
    """Hidden states, a head and targets, of which a side takes loss and gradients."""

    hidden_ND: Tensor
    weight_VD: Tensor
    target: SparseChunk

    def run(self, loss: Callable[[Tensor, Head, SparseChunk], Tensor]) -> None:
        """Take loss and gradients, and leave the gradients behind."""
        self.hidden_ND.grad = self.weight_VD.grad = None
        loss(self.hidden_ND, Head(self.weight_VD), self.target).backward()


def rows(setup: Setup) -> Iterator[Row]:
    """Yield ratios of time and of memory for each case, in blocks of the default `loss.chunk_size`."""
    chunk_size = LossConfig().chunk_size
    for hidden_size, vocab_size, dtype, aim in CASES:
        if setup.tiny:
            hidden_size, vocab_size = 16, 512
        case = f"{dtype}, D {hidden_size}, V {vocab_size:,}"
        if setup.wants(case):
            problem = make_problem(64 if setup.tiny else POSITIONS, hidden_size, vocab_size, dtype, setup.device)
            yield from measure(setup, case, problem, chunk_size, aim)


def measure(setup: Setup, case: str, problem: Problem, chunk_size: int, aim: str) -> Iterator[Row]:
    """Yield the rows of one case: two of time, one of memory."""
    ours = partial(problem.run, partial(fused_loss, divergence=forward_kl, chunk_size=chunk_size))
    plain = partial(problem.run, materialised)
    yield paired(ours, plain, setup).time_row("head_loss", case, "time of materialised logits, same target", aim)
    text = partial(problem.run, partial(fused_loss, divergence=cross_entropy, chunk_size=chunk_size))
    plain_text = partial(problem.run, materialised_text)
    yield paired(text, plain_text, setup).time_row("head_loss", case, "time of torch's cross-entropy, true token", aim)
    left = problem.weight_VD.nbytes + problem.hidden_ND.nbytes
    problem.hidden_ND.grad = problem.weight_VD.grad = None
    peaks = []
    for run in (ours, plain):
        peaks.append((allocator_peak(lambda run=run: run, setup.device) - left) / 1e6)  # type: ignore[misc]
        problem.hidden_ND.grad = problem.weight_VD.grad = None
    yield number_row(
        "head_loss", case, "memory of materialised logits, without the gradients", *peaks, "{:.0f} MB", "≤ 0.1"
    )


def materialised(hidden_ND: Tensor, head: Head, target: SparseChunk) -> Tensor:
    """Return the loss that users of plain PyTorch write: all logits, then logsumexp."""
    return forward_kl(head(hidden_ND).float(), target).sum()


def materialised_text(hidden_ND: Tensor, head: Head, target: SparseChunk) -> Tensor:
    """Return torch's own cross-entropy with the true tokens: all logits, then its fused kernel."""
    return torch.nn.functional.cross_entropy(head(hidden_ND).float(), target.true_ids_N, reduction="sum")


def make_problem(positions: int, hidden_size: int, vocab_size: int, dtype: str, device: str) -> Problem:
    """Make random hidden states, weights and sparse targets on a device."""
    kind = DTYPES[dtype]
    generator = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(positions, hidden_size, generator=generator).to(device, kind)
    weight_VD = (torch.randn(vocab_size, hidden_size, generator=generator) / hidden_size**0.5).to(device, kind)
    ids_NK = torch.randint(vocab_size, (positions, ENTRIES), generator=generator).to(device)
    weights_NK = torch.full((positions, ENTRIES), 1 / ENTRIES, device=device)
    target = SparseChunk(ids_NK, weights_NK, torch.ones(positions, device=device), ids_NK[:, 0].clone())
    return Problem(hidden_ND.requires_grad_(), weight_VD.requires_grad_(), target)
