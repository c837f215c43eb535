"""A cache far larger than needed to fill memory: time to open it, resident memory, tokens a second at random.

    python tests/benchmarks/read_large_cache.py --gigabytes 20 --folder /tmp/large --workers 2

The targets are synthetic: a few hundred samples of random logits, sharpened until they have about as many heads and
atoms as a language model's, repeated until the cache is large enough. What is measured does not depend on what the
numbers mean, but mind that the disk's cache in memory may hold the file when it was just written (`--cold` asks the
system to drop it, shard by shard).
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from distill.cache.format.folder import Manifest, read_journal
from distill.cache.format.records import Record
from distill.cache.making.extract import extract
from distill.cache.making.writer import CacheWriter
from distill.cache.reading.reader import CacheReader
from distill.models.language_model import Head
from distill.targets import schemes
from distill.training.data import EpochPermutation, Samples

LENGTH, VOCABULARY, DISTINCT = 1024, 49_152, 16


def manifest(samples: int, shard_samples: int) -> Manifest:
    return Manifest(
        scheme="varopt",
        scheme_parameters={"threshold": 0.02},
        temperature=1.0,
        seed=0,
        vocab_size=VOCABULARY,
        sequence_length=LENGTH,
        pack=True,
        shard_samples=shard_samples,
        splits={"held_out": 0, "train": samples},
        fingerprints={"teacher_weights": "synthetic"},
        made_with={},
    )


def synthetic_records(scheme: schemes.AnyScheme, distinct: int) -> list[Record]:
    """Exact entries and atoms of random logits whose sharpness varies from position to position."""
    generator = torch.Generator().manual_seed(0)
    head = Head(torch.randn(VOCABULARY, 32, generator=generator))
    records = []
    for _ in range(distinct):
        sharpness_L1 = 0.6 + torch.rand(LENGTH, 1, generator=generator)
        hidden_LD = torch.randn(LENGTH, 32, generator=generator) * sharpness_L1
        ids_L = torch.randint(VOCABULARY, (LENGTH,), generator=generator)
        mask_L = torch.arange(LENGTH) < LENGTH - 1
        records.append(extract(hidden_LD, head, ids_L, torch.arange(LENGTH), mask_L, scheme, seed=0))
    return records


def make(folder: Path, gigabytes: float, shard_samples: int, distinct: int = DISTINCT) -> None:
    """Write it as the teacher would: packed, hashed, synced, with journal lines."""
    scheme = manifest(1, 1).make_scheme()
    records = synthetic_records(scheme, distinct)
    probe = CacheWriter(folder / "probe", manifest(distinct, distinct)).write(0, records)
    shutil.rmtree(folder / "probe")
    samples = int(gigabytes * 1e9 / (probe.bytes / distinct))
    writer = CacheWriter(folder / "cache", manifest(samples, shard_samples))
    started = time.perf_counter()
    with reused_encoding():
        for shard in writer.missing():
            writer.write(shard, [records[sample % distinct] for sample in writer.manifest.shard_range(shard)])
    print(f"made: {samples:,} samples in {writer.manifest.shards:,} shards, {time.perf_counter() - started:,.0f} s")
    print(f"  {probe.bytes / probe.positions:.1f} bytes and {probe.entries / probe.positions:.1f} entries a position")


class reused_encoding:
    """The few distinct records are encoded once and only their checksums made anew: compressing takes hours."""

    def __enter__(self) -> None:
        import struct
        import zlib

        from distill.cache.format import records

        self.module, self.encode = records, records.encode
        bodies: dict[int, bytes] = {}

        def encode(record: Record, scheme: Any, key: int = 0) -> bytes:
            body = bodies.setdefault(id(record), b"") or self.encode(record, scheme, key)[4:]
            bodies[id(record)] = body
            return struct.pack("<I", zlib.crc32(body, key)) + body

        records.encode = encode  # type: ignore[assignment]

    def __exit__(self, *_: object) -> None:
        self.module.encode = self.encode


def drop_from_memory(folder: Path) -> None:
    """Ask the system to forget what it holds of the shards."""
    for entry in read_journal(folder).values():
        descriptor = os.open(folder / entry.file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def memory(process: str | int = "self") -> dict[str, float]:
    """MB: resident at most and now, and now with each page divided by the number of processes that share it (Pss)."""
    lines: dict[str, str] = {}
    for file in ("status", "smaps_rollup"):
        text = Path(f"/proc/{process}/{file}").read_text()
        lines |= dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    return {name: int(lines[name].split()[0]) / 1024 for name in ("VmHWM", "VmRSS", "Pss")}


def workers_of(process: int) -> Iterator[int]:
    for child in Path(f"/proc/{process}/task/{process}/children").read_text().split():
        yield int(child)


def read(folder: Path, batches: int, workers: int, cold: bool) -> None:
    before = memory()
    started = time.perf_counter()
    reader = CacheReader(folder, "train")
    print(f"opened in {time.perf_counter() - started:.3f} s ({len(reader):,} samples); memory before and after:")
    print("  ", shown(before), "\n  ", shown(memory()))
    if cold:
        drop_from_memory(folder)
    for count in (0, workers):
        samples = Samples(reader)
        order = EpochPermutation(len(reader), seed=count)
        loader = iter(DataLoader(samples, 8, sampler=order, collate_fn=samples.collate, num_workers=count))
        next(loader)
        started, tokens = time.perf_counter(), 0
        for _ in range(batches):
            tokens += next(loader).input_ids_BL.numel()
        seconds = time.perf_counter() - started
        print(f"{count} workers: {tokens / seconds:,.0f} tokens/s decoded at random ({tokens:,} tokens)")
        total = memory()["Pss"]
        print("   this process ", shown(memory()))
        for child in workers_of(os.getpid()):
            print("   worker       ", shown(memory(child)))
            total += memory(child)["Pss"]
        print(f"   resident in all: {total:,.0f} MB")
        del loader


def shown(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:,.0f} MB" for name, value in values.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=20.0)
    parser.add_argument("--folder", type=Path, required=True, help="where there is room; the cache stays there")
    parser.add_argument("--shard-samples", type=int, default=128)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batches", type=int, default=100)
    parser.add_argument("--cold", action="store_true", help="drop the shards from memory before reading")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not (options.folder / "cache").exists():
        make(options.folder, options.gigabytes, options.shard_samples)
    read(options.folder / "cache", options.batches, options.workers, options.cold)


if __name__ == "__main__":
    main()
