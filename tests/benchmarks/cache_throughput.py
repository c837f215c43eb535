"""The teacher phase beside a bare forward pass of the same batches: `bench.py --only cache_throughput`.

Ours is the whole phase in its steady state, under Lightning, from samples to finished shards on disk. The peer is body,
head and log-softmax of the same batches, and nothing is kept: head and log-softmax (float32) of 256 positions at a
time, which is faster than of all at once. The teacher is the demo's, on the demo's corpus.

    python tests/benchmarks/bench.py --only cache_throughput --case "bf16, NF4, 8 x 512" --repeats 3
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from paired import Row, Setup, paired
from torch.utils.data import Subset

from distill.cache.format.folder import Manifest
from distill.cache.format.token_order import TokenOrder, save_order, token_counts
from distill.cache.making.predict import TeacherModule
from distill.cache.making.processes import ShardShares, make_trainer, predict
from distill.cache.making.writer import CacheWriter
from distill.corpus import open_corpus
from distill.models import checkpoints, tokenizers
from distill.models.language_model import hidden_states
from distill.system.progress import Progress
from distill.targets import schemes
from teachers.huggingface import load_teacher

TEACHER = "smollm2-135m-demo"
CORPUS = Path(__file__).resolve().parents[2] / "data" / "sotu.jsonl"
BARE_CHUNK = 256
SCHEME = schemes.make("varopt", threshold=0.02)


@dataclass(frozen=True)
class Case:
    """Type of the computation, quantisation, and shape of a batch."""

    dtype: str
    quantization: str
    samples: int
    length: int
    batches: int = 1

    def __str__(self) -> str:
        dtype, bits = {"bfloat16": "bf16", "float32": "fp32"}[self.dtype], {"nf4": "NF4", "none": "16 bits"}
        return f"{dtype}, {bits[self.quantization]}, {self.samples} x {self.length}"


CASES = [
    Case(dtype, quantization, *shape)
    for dtype in ("bfloat16", "float32")
    for quantization in ("nf4", "none")
    for shape in ((8, 512), (2, 2048))
]
TINY = [Case("float32", "none", 2, 64)]


class Bench:
    """A teacher, some batches of the corpus, and both ways through them."""

    def __init__(self, case: Case, device: str) -> None:
        checkpoint = checkpoints.resolve(TEACHER)
        tokenizer = tokenizers.load_tokenizer(checkpoint)
        self.case, self.device, self.vocab_size = case, device, tokenizers.vocab_size(tokenizer)
        self.teacher = load_teacher(TEACHER, case.quantization, case.dtype, device)  # type: ignore[arg-type]
        corpus = open_corpus(str(CORPUS), tokenizer, sequence_length=case.length, held_out=0)
        count = case.samples * case.batches
        self.samples: Any = Subset(corpus.train, range(count))
        self.order = TokenOrder.by_frequency(token_counts(self.samples, count, self.vocab_size))
        self.manifest = Manifest(
            scheme=SCHEME.name,
            scheme_parameters=schemes.parameters(SCHEME),
            temperature=1.0,
            seed=0,
            vocab_size=self.vocab_size,
            sequence_length=case.length,
            pack=True,
            shard_samples=case.samples,
            splits={"held_out": 0, "train": count},
            fingerprints={"token_order": self.order.fingerprint},
            made_with={},
        )
        self.module = TeacherModule(self.teacher, self.vocab_size, SCHEME, seed=0)

    def ours(self) -> None:
        """Make the cache."""
        with tempfile.TemporaryDirectory() as folder:

            def open_writer() -> CacheWriter:
                return CacheWriter(Path(folder), self.manifest, batch_size=self.case.samples)

            open_writer()
            save_order(Path(folder), self.order)
            shares = ShardShares(self.samples, open_writer, range(self.manifest.shards), Progress("", 0, ""))
            predict(make_trainer(self.device), self.module, shares)

    @torch.no_grad()
    def bare(self) -> None:
        """Compute the same distributions."""
        head = self.teacher.head.with_rows(self.vocab_size)
        for start in range(0, len(self.samples), self.case.samples):
            rows = [self.samples[start + row] for row in range(self.case.samples)]
            ids_BL, positions_BL = (
                torch.stack([torch.as_tensor(row[name]) for row in rows]).to(self.device)
                for name in ("input_ids", "position_ids")
            )
            for hidden_ND in hidden_states(self.teacher, ids_BL, positions_BL).flatten(0, 1).split(BARE_CHUNK):
                torch.log_softmax(head(hidden_ND).float(), dim=-1)


def rows(setup: Setup) -> Iterator[Row]:
    """Yield the speed of the teacher phase, divided by that of the bare passes, for each case."""
    for case in TINY if setup.tiny else CASES:
        if not setup.wants(str(case)):
            continue
        bench = Bench(case, setup.device)
        pairs = paired(bench.ours, bench.bare, setup)
        yield pairs.speed_row("cache_throughput", str(case), "speed of body + head + log-softmax", "≥ 0.97")
