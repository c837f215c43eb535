"""Growth of a cache: more samples of the same identity, with every full shard kept byte for byte."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from distill.cache.format import journal
from distill.cache.format.folder import MANIFEST, Manifest, differences
from distill.cache.format.part import read_part
from distill.errors import UserError
from distill.system.files import write_durably


def joined(asked: Manifest, found: Manifest) -> Manifest:
    """Return the manifest of the cache that has the samples of both; `asked` itself if they are not the same cache."""
    if not is_same(asked, found):
        return asked
    splits = {name: max(count, found.splits[name]) for name, count in asked.splits.items()}
    return replace(asked, splits=splits)


def is_same(asked: Manifest, found: Manifest) -> bool:
    """Tell whether two manifests differ in the numbers of samples at most."""
    return not differences(replace(asked, splits=found.splits), found)


def grow(folder: Path, found: Manifest, larger: Manifest) -> None:
    """Give a cache the manifest of a larger one. A last shard that is not full any more is dropped, to be made again.

    A kill at any moment leaves the smaller cache or the larger one, of which only such a shard is missing.
    Raises UserError for a part of a cache: its shards would belong to other parts.
    """
    if part := read_part(folder):
        raise UserError(
            f"cache {folder} is part {part} of a cache of {found.samples:,} samples, and parts do not grow: "
            "merge them, and let the whole cache grow"
        )
    lines = journal.read_whole(folder, found)
    short = {shard: entry for shard, entry in lines.entries.items() if _is_outgrown(found, larger, shard)}
    kept = {**lines.dropped, **lines.entries, **{shard: entry.dropped() for shard, entry in short.items()}}
    journal.rewrite(folder, found, kept)
    write_durably(folder / MANIFEST, larger.to_json().encode())
    for entry in short.values():
        (folder / entry.file).unlink(missing_ok=True)


def _is_outgrown(found: Manifest, larger: Manifest, shard: int) -> bool:
    in_larger = larger.shard_of_file(found.shard_file(shard))
    assert in_larger is not None
    return len(larger.shard_range(in_larger)) > len(found.shard_range(shard))
