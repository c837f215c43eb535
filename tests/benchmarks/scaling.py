"""Cost of a token and memory of the teacher phase as the cache grows: `bench.py --only scaling`.

A tiny random teacher makes one cache of 10^7 tokens. The processor time of its last million tokens is compared with
that of its second hundred thousand, and the resident memory at its end with that after its first hundred thousand.

    python tests/benchmarks/scaling.py --tokens 1000000
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from paired import Row, Setup, number_row
from torch import Tensor, nn
from torch.utils.data import Dataset

from distill.cache.format.folder import Manifest
from distill.cache.format.token_order import TokenOrder, save_order
from distill.cache.making.predict import TeacherModule
from distill.cache.making.processes import ShardShares, make_trainer, predict
from distill.cache.making.writer import CacheWriter
from distill.models.language_model import Head
from distill.system.progress import Progress
from distill.targets import schemes

LENGTH, BATCH, VOCABULARY, SIZE, SHARD = 1024, 8, 512, 16, 64
SCHEME = schemes.make("varopt", threshold=0.1)


class RandomTeacher(nn.Module):
    """Hidden states from a table."""

    def __init__(self) -> None:
        super().__init__()
        self.table_VD = nn.Parameter(torch.randn(VOCABULARY, SIZE, generator=torch.Generator().manual_seed(0)))
        self.head = Head(self.table_VD)

    def body(self, input_ids_BL: Tensor, position_ids_BL: Tensor) -> Tensor:
        return self.table_VD[input_ids_BL]


class RandomSamples(Dataset[dict[str, Tensor]]):
    """Samples of random tokens, each a function of its number."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids_L = torch.randint(VOCABULARY, (LENGTH,), generator=torch.Generator().manual_seed(index))
        mask_L = torch.ones(LENGTH, dtype=torch.bool)
        mask_L[-1] = False
        return {"input_ids": ids_L, "position_ids": torch.arange(LENGTH), "loss_mask": mask_L}


class Marks(Progress):
    """Processor time and resident memory after each batch."""

    def __init__(self) -> None:
        super().__init__("", 0, "")
        self.tokens, self.seconds, self.memory = [0], [time.process_time()], [0]

    def advance(self, amount: int, **values: str) -> None:
        self.tokens.append(self.tokens[-1] + amount)
        self.seconds.append(time.process_time())
        self.memory.append(psutil.Process().memory_info().rss)

    def at(self, tokens: float) -> int:
        """Return the number of the first batch that ends there or later."""
        return next(place for place, seen in enumerate(self.tokens) if seen >= tokens)

    def cost(self, begin: float, end: float) -> float:
        """Return microseconds a token from one place to another."""
        first, last = self.at(begin), self.at(end)
        return 1e6 * (self.seconds[last] - self.seconds[first]) / (self.tokens[last] - self.tokens[first])


def measure(tokens: int, device: str) -> Marks:
    """Make a cache of so many tokens, and return its marks."""
    count = -(-tokens // (LENGTH * SHARD)) * SHARD
    order = TokenOrder.by_frequency(torch.arange(VOCABULARY).numpy())
    manifest = Manifest(
        scheme=SCHEME.name,
        scheme_parameters=schemes.parameters(SCHEME),
        temperature=1.0,
        seed=0,
        vocab_size=VOCABULARY,
        sequence_length=LENGTH,
        pack=True,
        shard_samples=SHARD,
        splits={"held_out": 0, "train": count},
        fingerprints={"token_order": order.fingerprint},
        made_with={},
    )
    marks = Marks()
    module: Any = TeacherModule(RandomTeacher(), VOCABULARY, SCHEME, seed=0)
    with tempfile.TemporaryDirectory() as folder:

        def open_writer() -> CacheWriter:
            return CacheWriter(Path(folder), manifest, batch_size=BATCH)

        open_writer()
        save_order(Path(folder), order)
        predict(
            make_trainer(device), module, ShardShares(RandomSamples(count), open_writer, range(manifest.shards), marks)
        )
    return marks


def rows(setup: Setup, tokens: int = 10**7) -> Iterator[Row]:
    """Yield time a token and memory, late divided by early."""
    if setup.tiny:
        tokens = 3 * LENGTH * SHARD
    marks = measure(tokens, setup.device)
    early, total = min(10**5, tokens / 3), marks.tokens[-1]
    late = max(2 * early, total - max(10 * early, total / 10))
    case = f"{tokens:,} tokens, a tiny random teacher"
    costs = marks.cost(late, total), marks.cost(early, 2 * early)
    yield number_row("scaling", case, "processor time a token: last against first", *costs, "{:.3g} µs", "≤ 1.05")
    memory = marks.memory[-1] / 1e6, marks.memory[marks.at(early)] / 1e6
    yield number_row("scaling", case, "resident memory: end against beginning", *memory, "{:.4g} MB", "≤ 1.05")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=10**7)
    for row in rows(Setup(), parser.parse_args().tokens):
        print(f"{row.measure}: {row.ratio:.3f} ({row.ours} against {row.peer})", flush=True)
