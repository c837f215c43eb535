"""A cache made on many machines: the shards of each part, and many parts joined into one cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path

from distill.cache.format import journal, version1
from distill.cache.format.folder import (
    JOURNAL,
    MANIFEST,
    PART,
    PUSHED,
    SHARDS,
    JournalEntry,
    Manifest,
    differences,
    read_journal,
    read_manifest,
    seal,
)
from distill.cache.format.part import Part, read_part
from distill.cache.format.token_order import load_order
from distill.cache.making.writer import CacheWriter
from distill.cache.reading.storage import Storage
from distill.errors import UserError
from distill.system.files import TEMPORARY, is_inside, write_durably


def claim_part(folder: Path, part: Part | None) -> None:
    """Write in a cache's folder that it holds a part. Raises UserError if it holds another one."""
    found = read_part(folder)
    if found == part:
        return
    if found:
        raise UserError(f"cache {folder} holds part {found}: give --cache.part {found}, or point --cache.dir elsewhere")
    if read_journal(folder):
        raise UserError(f"cache {folder} was begun as a whole, not as part {part}: point --cache.dir elsewhere")
    write_durably(folder / PART, (json.dumps({"part": str(part)}) + "\n").encode())


def merge(parts: list[Storage], to: Path, advance: Callable[[int], None]) -> None:
    """Join parts that together have each shard once into a whole cache. Copies of an earlier merge stay.

    Manifests are compared first, then the lists of shards, then each shard's hash while it is copied. `advance`
    receives the copied bytes. Raises UserError if the parts are not those of one whole cache, if a shard has changed,
    or if `to` holds anything else.
    """
    owners = whose_shards(parts)
    manifest = read_manifest(parts[0].folder)
    load_order(parts[0].folder, manifest)  # without it nothing that is copied could be read
    _check_target(to, parts, manifest)
    writer = CacheWriter(to, manifest)
    for relative in _beside_shards(parts[0].folder):
        write_durably(to / relative, (parts[0].folder / relative).read_bytes())
    for shard in writer.missing():
        part, entry = owners[shard]
        _copy_shard(part, shard, entry, to)
        journal.append(to, writer.manifest, entry)
        advance(entry.bytes)
    seal(to)


def _check_target(to: Path, parts: list[Storage], manifest: Manifest) -> None:
    """Raise UserError if the parts cannot be joined there: it may be empty or hold a beginning of the same cache."""
    another = "give --to a new or empty folder"
    if any(part.folder.resolve() == to.resolve() for part in parts):
        raise UserError(f"{to} is one of the parts: {another}")
    if read_part(to):
        raise UserError(f"{to} holds a part of a cache: {another}")
    if (to / MANIFEST).exists():
        different = differences(manifest, read_manifest(to))
        if different:
            raise UserError(f"{to} holds another cache ({'; '.join(different)}): {another}")
    elif to.exists() and not all(child.name.endswith(TEMPORARY) for child in to.iterdir()):
        raise UserError(f"{to}: not a cache, and not empty: {another}")


def whose_shards(parts: list[Storage]) -> dict[int, tuple[Storage, JournalEntry]]:
    """Return each shard's part. Raises UserError if parts are of different caches, or have a gap or a shard twice."""
    manifest = read_manifest(parts[0].folder)
    if manifest.version == version1.VERSION:
        raise UserError(
            f"{parts[0].name} is of format version 1, which this release reads but does not write: "
            "join its parts with the release that made them"
        )
    owners: dict[int, tuple[Storage, JournalEntry]] = {}
    twice: set[int] = set()
    for part in parts:
        different = differences(manifest, read_manifest(part.folder))
        if different:
            raise UserError(f"{part.name} is not of the same cache as {parts[0].name}: {'; '.join(different)}")
        for shard, entry in read_journal(part.folder).items():
            if shard in owners:
                twice.add(shard)
            owners[shard] = part, entry
    if twice:
        raise UserError(f"the parts overlap: more than one has shards {_ranges(twice)}: give each part once")
    gaps = set(range(manifest.shards)) - owners.keys()
    if gaps:
        raise UserError(
            f"the parts leave a gap: none has shards {_ranges(gaps)} of {manifest.shards}: "
            "finish them with `distill cache-teacher`, and give all of them"
        )
    return owners


def _copy_shard(part: Storage, shard: int, entry: JournalEntry, to: Path) -> None:
    content = _content(part, shard, entry)
    if hashlib.sha256(content).hexdigest() != entry.sha256 and part.drop_copy(shard):
        content = _content(part, shard, entry)
    found = hashlib.sha256(content).hexdigest()
    if found != entry.sha256:
        raise UserError(
            f"{part.name}: {entry.file} has changed (expected sha256 {entry.sha256[:12]}…, found {found[:12]}…): "
            f"run `distill inspect {part.name} --verify`, or copy that part anew"
        )
    write_durably(to / entry.file, content)


def _content(part: Storage, shard: int, entry: JournalEntry) -> bytes:
    try:
        with part.shard(shard).open("rb") as file:
            return file.read(entry.bytes + 1)
    except OSError as error:
        raise UserError(f"{part.name}: {entry.file} cannot be read ({error.strerror})") from None


def _beside_shards(folder: Path) -> list[Path]:
    """Return the files that merging copies: all beside the shards, but those that it makes, and those of a push."""
    made = {MANIFEST, JOURNAL, PART, *PUSHED}
    found = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    for path in found:
        if path.is_symlink() and not is_inside(path, folder):
            raise UserError(f"{path}: is a link out of the cache and is not copied: remove it, or copy the file there")
    files = (path.relative_to(folder) for path in found)
    return [path for path in files if path.parts[0] not in {SHARDS, *made} and path.suffix != TEMPORARY]


def _ranges(shards: Iterable[int]) -> str:
    """Write numbers as `3, 7-9`, at most ten ranges of them."""
    ranges: list[list[int]] = []
    for shard in sorted(shards):
        if ranges and shard == ranges[-1][1] + 1:
            ranges[-1][1] = shard
        else:
            ranges.append([shard, shard])
    shown = [str(first) if first == last else f"{first}-{last}" for first, last in ranges[:10]]
    return ", ".join(shown) + (", ..." if len(ranges) > 10 else "")
