"""Reading and decoding a cache against the training step that needs it: `make bench ARGS="--only decode"`.

The cache is made as in read_large_cache.py. The step is that of the demo's student (8 layers of 576, vocabulary 49,152,
bf16-mixed) on the same batch: body, fused loss, backward, optimiser. Decoding is timed alone; a training reads ahead.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from paired import Row, Setup, paired
from read_large_cache import VOCABULARY, make
from torch import Tensor

from distill.cache.reading.reader import CacheReader
from distill.losses.chunks import SparseChunk
from distill.losses.fused import fused_loss
from distill.losses.objective import Mixture
from distill.targets.next_token import next_ids
from students.huggingface import load_student

BATCH = 4
"""Samples of 1,024 tokens a step."""


def rows(setup: Setup) -> Iterator[Row]:
    """Yield the speed of decoding, in that of the step."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), 0.001 if setup.tiny else 0.004, 32, distinct=1 if setup.tiny else 16)
        reader = CacheReader(Path(folder) / "cache", "train")
        samples = 1 if setup.tiny else BATCH
        step = Step(setup.device, layers=1 if setup.tiny else 8)
        order = itertools.cycle(range(len(reader)))

        def decode() -> Any:
            return reader.collate([reader[next(order)] for _ in range(samples)])

        batch = decode()
        found = paired(decode, lambda: step(batch), setup)
    case = f"{samples} x 1,024 tokens, bf16, demo's student"
    yield found.speed_row("decode", case, "positions/s of the training step", "≥ 50")


class Step:
    """A training step of the demo's student."""

    def __init__(self, device: str, layers: int) -> None:
        sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
        config = {"model_type": "llama", **sizes, "num_hidden_layers": layers, "vocab_size": VOCABULARY}
        self.student = load_student(config={**config, "tie_word_embeddings": True}).to(device)
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=1e-4)
        self.device = device

    def __call__(self, batch: Any) -> None:
        """Make one step on a batch in host memory."""
        batch = batch.to(torch.device(self.device))
        with torch.autocast(self.device, torch.bfloat16):
            hidden_BLD = self.student.body(batch.input_ids_BL, batch.position_ids_BL)
            loss = fused_loss(hidden_BLD[batch.loss_mask_BL], self.student.head, _target(batch), Mixture(0.0), 256)
        (loss / len(batch.entropy_N)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def _target(batch: Any) -> SparseChunk:
    true_ids_N: Tensor = next_ids(batch.input_ids_BL, batch.loss_mask_BL)
    return SparseChunk(*batch.targets.padded(), batch.entropy_N, true_ids_N)
