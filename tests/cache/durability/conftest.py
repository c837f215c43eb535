"""A small cache, how it is made, and what it is when nobody disturbs it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distill.cache.format.folder import Manifest
from distill.cache.format.records import Record, encode
from distill.cache.format.tokenizer_files import save_tokenizer
from distill.cache.making.writer import CacheWriter


@pytest.fixture
def manifest(make_manifest: Any) -> Manifest:
    return make_manifest(samples=10, shard_samples=4)


@pytest.fixture
def records_of(manifest: Manifest, records_of: Any) -> Callable[[Manifest, int], list[Record]]:
    """As the other, but this manifest's records are made once."""
    made = [records_of(manifest, shard) for shard in range(manifest.shards)]
    return lambda wanted, shard: made[shard] if wanted is manifest else records_of(wanted, shard)


@pytest.fixture
def encoded(manifest: Manifest, records_of: Any) -> list[bytes]:
    """The records of all samples as bytes."""
    records = [record for shard in range(manifest.shards) for record in records_of(manifest, shard)]
    scheme = manifest.make_scheme()
    return [encode(record, scheme, manifest.record_key(sample)) for sample, record in enumerate(records)]


@pytest.fixture
def finish(manifest: Manifest, records_of: Any, tokenizer: Any) -> Callable[..., None]:
    """`finish(folder)`: make a cache, or what is missing of it."""

    def run(folder: Path, overwrite: bool = False) -> None:
        writer = CacheWriter(folder, manifest, overwrite, batch_size=2)
        save_tokenizer(folder, tokenizer)
        for shard in writer.missing():
            made = records_of(manifest, shard)
            for start in range(writer.begun(shard), len(made), 2):
                writer.add(shard, made[start : start + 2], 2)

    return run


@pytest.fixture
def undisturbed(tmp_path: Path, finish: Any, contents: Any) -> dict[str, bytes]:
    finish(tmp_path / "undisturbed")
    return contents(tmp_path / "undisturbed")
