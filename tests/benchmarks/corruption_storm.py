"""Flips single bits of a small cache and cuts its files short; each must be found, and none may be read as data.

    python tests/benchmarks/corruption_storm.py --flips 10000 --truncations 1000

Prints a tally; exit status 1 when `inspect --verify` missed one, or when a reader gave a wrong number, raised anything
but the one error, took more than a little memory or did not answer.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import importlib.util
import random
import resource
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from torch import Tensor

from distill.cache.format.folder import Manifest
from distill.cache.format.records import Record
from distill.cache.format.tokenizer_files import checked_tokenizer, save_tokenizer
from distill.cache.making.writer import CacheWriter
from distill.cache.reading.reader import CacheReader
from distill.cache.reading.verify import verify
from distill.errors import UserError

ROOM = 256 * 2**20
"""Bytes of address space beyond what the program takes at its start."""
PATIENCE = 30
"""Seconds for one case."""
FINGERPRINTS = dict.fromkeys(("teacher_config", "teacher_weights", "tokenizer", "corpus"), "a" * 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flips", type=int, default=10_000)
    parser.add_argument("--truncations", type=int, default=1_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        storm = Storm(Path(folder) / "cache", options.seed)
        limit_memory()
        started = time.monotonic()
        storm.rage("flips", options.flips, storm.flip)
        storm.rage("truncations", options.truncations, storm.truncate)
        storm.report()
        print(f"{time.monotonic() - started:.0f} s")
        sys.exit(1 if storm.problems else 0)


class Storm:
    """A small cache, what it holds, and what became of it in each case."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        make_cache(folder)
        self.files = sorted(path for path in folder.rglob("*") if path.is_file())
        self.original = {path: path.read_bytes() for path in self.files}
        self.data = {split: [fingerprint(record) for record in records(folder, split)] for split in SPLITS}
        assert not verify(folder).problems
        self.tally: collections.Counter[tuple[str, str, str]] = collections.Counter()
        self.problems: list[str] = []
        signal.signal(signal.SIGALRM, too_long)

    def rage(self, kind: str, count: int, damage: Any) -> None:
        for _ in range(count):
            # One half of the cases by file, the other by size: small files get their share.
            sizes = [len(self.original[path]) for path in self.files]
            path = self.random.choices(self.files, weights=sizes if self.random.random() < 0.5 else None)[0]
            content, what = damage(self.original[path])
            path.write_bytes(content)
            name = str(path.relative_to(self.folder))
            self._check(kind, name, f"{kind}, {name}, {what}")
            path.write_bytes(self.original[path])

    def flip(self, content: bytes) -> tuple[bytes, str]:
        bit = self.random.randrange(8 * len(content))
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        return bytes(changed), f"bit {bit}"

    def truncate(self, content: bytes) -> tuple[bytes, str]:
        length = self.random.randrange(len(content))
        return content[:length], f"{length} of {len(content)} bytes"

    def _check(self, kind: str, name: str, case: str) -> None:
        signal.alarm(PATIENCE)
        try:
            for outcome in ["found by --verify" if is_found(self.folder) else "MISSED BY --VERIFY", *self._read()]:
                self.tally[kind, name, outcome] += 1
                if outcome.isupper():
                    self.problems.append(f"{outcome}: {case}")
        except BaseException as error:
            self.problems.append(f"{type(error).__name__} {error}: {case}")
        signal.alarm(0)

    def _read(self) -> list[str]:
        """Return the results of a run that touches everything."""
        outcomes = []
        for split in SPLITS:
            try:
                reader = CacheReader(self.folder, split)
            except UserError:
                outcomes.append("readers refused")
                continue
            for index, expected in enumerate(self.data[split]):
                try:
                    right = fingerprint(reader[index]) == expected
                    outcomes.append("samples read unchanged" if right else "WRONG SAMPLES READ")
                except UserError:
                    outcomes.append("samples refused")
        try:
            checked_tokenizer(self.folder)
        except UserError:
            outcomes.append("tokenizer refused")
        return outcomes

    def report(self) -> None:
        kinds = sorted({kind for kind, _, _ in self.tally})
        columns = sorted({outcome for _, _, outcome in self.tally})
        for kind in kinds:
            print(f"{kind}: {', '.join(columns)}")
            for name in [*sorted({name for _, name, _ in self.tally}), "all"]:
                counts = [
                    sum(n for (k, f, o), n in self.tally.items() if (k, o) == (kind, column) and name in (f, "all"))
                    for column in columns
                ]
                print(f"  {name:32}", *(f"{count:8}" for count in counts))
        print(*self.problems[:20], sep="\n", end="\n" if self.problems else "")
        print(f"{len(self.problems)} problems")


SPLITS = ("held_out", "train")


def make_cache(folder: Path) -> None:
    """A cache without a teacher: 14 samples of 24 tokens in 4 shards, and a tokenizer."""
    path = Path(__file__).resolve().parents[1] / "cache" / "conftest.py"
    spec = importlib.util.spec_from_file_location("cache_conftest", path)
    assert spec and spec.loader
    conftest: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)
    manifest = Manifest(
        scheme="varopt",
        scheme_parameters={"threshold": 0.05},
        temperature=1.0,
        seed=0,
        vocab_size=conftest.VOCABULARY,
        sequence_length=conftest.LENGTH,
        pack=True,
        shard_samples=4,
        splits={"held_out": 5, "train": 9},
        fingerprints=FINGERPRINTS,
        made_with={"torch": "2"},
    )
    writer = CacheWriter(folder, manifest)
    save_tokenizer(folder, Tokenizer())
    for shard in writer.missing():
        samples = manifest.shard_range(shard)
        writer.write(shard, [conftest.random_record(sample, manifest.make_scheme()) for sample in samples])


class Tokenizer:
    def save_pretrained(self, folder: Path, /) -> None:
        folder.mkdir()
        (folder / "tokenizer.json").write_text('{"model": "BPE"}')
        (folder / "chat_template.jinja").write_text("{{ messages }}")


def records(folder: Path, split: str) -> list[Record]:
    reader = CacheReader(folder, split)
    return [reader[index] for index in range(len(reader))]


def fingerprint(record: Record) -> str:
    digest = hashlib.sha256()
    for name, value in {**vars(record), **vars(record.targets)}.items():
        if isinstance(value, (np.ndarray, Tensor)):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode() + np.asarray(value).tobytes())
    return digest.hexdigest()


def is_found(folder: Path) -> bool:
    try:
        return bool(verify(folder).problems)
    except UserError:
        return True


def limit_memory() -> None:
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + ROOM, taken + ROOM))


def too_long(*_: object) -> None:
    raise TimeoutError(f"no answer in {PATIENCE} s")


if __name__ == "__main__":
    main()
