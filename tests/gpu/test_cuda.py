"""Tests that only a CUDA device can show: the same results as on the CPU, and memory that stays with the chunk."""

from __future__ import annotations

import pytest
import torch

from distill.losses.chunks import SparseChunk
from distill.losses.fused import fused_loss
from distill.losses.objective import Mixture
from distill.models.language_model import Head
from distill.targets.varopt import varopt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none here"),
]


def _problem(device: str, positions: int, vocab_size: int, size: int) -> tuple[torch.Tensor, Head, SparseChunk]:
    generator = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(positions, size, generator=generator)
    weight_VD = torch.randn(vocab_size, size, generator=generator) / size**0.5
    probs_NV = torch.softmax(torch.randn(positions, vocab_size, generator=generator) * 3, -1)
    targets = varopt(probs_NV, 0.02, torch.rand(positions, generator=generator, dtype=torch.float64))
    entropy_N = -torch.xlogy(probs_NV, probs_NV).sum(-1)
    ids_NK, weights_NK = (rows.to(device) for rows in targets.padded())
    chunk = SparseChunk(ids_NK, weights_NK, entropy_N.to(device), ids_NK[:, 0])
    hidden_ND = hidden_ND.to(device).requires_grad_(True)
    return hidden_ND, Head(weight_VD.to(device).requires_grad_(True)), chunk


def test_fused_loss_equals_the_cpus() -> None:
    results = []
    for device in ("cpu", "cuda"):
        hidden_ND, head, chunk = _problem(device, 253, 1009, 64)
        loss = fused_loss(hidden_ND, head, chunk, Mixture(0.3), 64)
        loss.backward()
        assert hidden_ND.grad is not None and head.weight_VD.grad is not None
        results.append((loss.detach().cpu(), hidden_ND.grad.cpu(), head.weight_VD.grad.cpu()))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_fused_loss_keeps_no_logits() -> None:
    hidden_ND, head, chunk = _problem("cuda", 4096, 32_768, 64)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fused_loss(hidden_ND, head, chunk, Mixture(), 128).backward()
    added = torch.cuda.max_memory_allocated() - before
    assert added < 4096 * 32_768 * 4 / 4, f"{added / 2**20:.0f} MiB: a fourth of the full logits or more"


def test_targets_are_the_cpus() -> None:
    probs_NV = torch.softmax(torch.randn(64, 49_152, generator=torch.Generator().manual_seed(1)) * 3, -1)
    uniform_N = torch.rand(64, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ours, theirs = varopt(probs_NV, 0.02, uniform_N), varopt(probs_NV.cuda(), 0.02, uniform_N.cuda())
    assert torch.equal(ours.counts_N, theirs.counts_N.cpu())
    same = (ours.ids_T == theirs.ids_T.cpu()).float().mean()
    assert same > 0.999, "the sum of a tile may differ in its last bit, and move a point that falls on a border"


def test_nf4_on_the_device(tmp_path: object) -> None:
    from bitsandbytes.nn import Linear4bit
    from transformers import LlamaConfig, LlamaForCausalLM

    from teachers.huggingface import load_teacher

    config = LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(str(tmp_path))
    teacher = load_teacher(str(tmp_path), quantization="nf4", device="cuda")
    assert sum(isinstance(module, Linear4bit) for module in teacher.modules()) == 14
    ids_BL = torch.randint(256, (2, 16), device="cuda")
    hidden_BLD = teacher.body(ids_BL, torch.arange(16, device="cuda").expand(2, -1))
    assert hidden_BLD.is_cuda and torch.isfinite(teacher.head(hidden_BLD)).all()
