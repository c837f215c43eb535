"""The journal: one line a finished shard, each with its own checksum; sorted and sealed when the last one is there."""

from __future__ import annotations

import builtins
import json
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

from distill.cache.format import checks
from distill.cache.format.manifest import Manifest, read_manifest
from distill.errors import UserError
from distill.system.files import append_durably, read_bounded, write_durably

JOURNAL = "journal.jsonl"
SHARDS = "shards"
LINE_LIMIT = 512
"""Bytes of a line."""


def shard_file(shard: int) -> str:
    """Name of a shard inside the folder."""
    return f"{SHARDS}/{shard:06d}.safetensors"


@dataclass(frozen=True)
class JournalEntry:
    """One finished shard."""

    shard: int
    file: str
    bytes: int
    sha256: str
    samples: int
    positions: int
    entries: int

    def to_line(self, cache: str) -> builtins.bytes:
        """Its line: with `cache`, whose it is (`cache_name`), and a crc32 of the rest of the line."""
        content = {**asdict(self), "cache": cache}
        crc32 = zlib.crc32(json.dumps(content, sort_keys=True).encode())
        return json.dumps({**content, "crc32": f"{crc32:08x}"}, sort_keys=True).encode() + b"\n"


_NUMBERS = ("shard", "bytes", "samples", "positions", "entries")
_VALUES: dict[str, checks.Check] = {
    **{name: checks.whole(0, 2**62) for name in _NUMBERS},
    "file": checks.is_text,
    "sha256": checks.hexadecimal(64),
    "cache": checks.hexadecimal(16),
    "crc32": checks.hexadecimal(8),
}


def cache_name(manifest: Manifest) -> str:
    """What a line calls the cache that it belongs to."""
    return manifest.identity[:16]


def read_journal(folder: Path, manifest: Manifest | None = None) -> dict[int, JournalEntry]:
    """Finished shards by number; a last line that was cut off by a power cut does not count.

    Raises UserError when any other line is not what the writer wrote.
    """
    journal = scan_journal(folder, manifest or read_manifest(folder))
    for number, reason in journal.damaged.items():
        raise UserError(
            f"{folder / JOURNAL}, line {number}: {reason}: `distill inspect {folder} --repair` drops what is bad"
        )
    return journal.entries


def append(folder: Path, manifest: Manifest, entry: JournalEntry) -> None:
    """Add a finished shard."""
    append_durably(folder / JOURNAL, entry.to_line(cache_name(manifest)))


def rewrite(folder: Path, manifest: Manifest, entries: dict[int, JournalEntry]) -> None:
    """Make these the journal, at once and in the order of the shards; nothing is done where they are already."""
    path, content = folder / JOURNAL, _sealed(entries, manifest)
    if not path.exists() or path.read_bytes() != content:
        write_durably(path, content)


def seal(folder: Path) -> None:
    """Put the lines in the order of the shards, so that it cannot be told in which order they were made."""
    manifest = read_manifest(folder)
    rewrite(folder, manifest, read_journal(folder, manifest))


def _sealed(entries: dict[int, JournalEntry], manifest: Manifest) -> bytes:
    return b"".join(entry.to_line(cache_name(manifest)) for _, entry in sorted(entries.items()))


@dataclass(frozen=True)
class Journal:
    """What a journal says, and what is wrong with it."""

    entries: dict[int, JournalEntry]
    """Finished shards by number."""
    damaged: dict[int, str]
    """Reasons why a line does not count, by its number."""
    is_torn: bool
    """The last line has no end: a kill or a power cut came while it was written."""
    is_foreign: bool
    """There are whole lines of another cache: manifest or journal were exchanged."""
    is_sealed: bool
    """It is what `seal` would write."""


def scan_journal(folder: Path, manifest: Manifest) -> Journal:
    """The journal with all that is wrong in it. Raises UserError when it is not readable at all."""
    path = folder / JOURNAL
    try:
        content = read_bounded(path, LINE_LIMIT * (manifest.shards + 1))
    except FileNotFoundError:
        content = b""
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): restore it, or make the cache anew") from None
    *lines, rest = content.split(b"\n")
    entries: dict[int, JournalEntry] = {}
    damaged: dict[int, str] = {}
    is_foreign = False
    for number, line in enumerate(lines, start=1):
        try:
            entry, cache = _parse_line(line, manifest)
        except ValueError as error:
            damaged[number] = str(error)
            continue
        if cache != cache_name(manifest):
            damaged[number], is_foreign = "of another cache (was the manifest or the journal exchanged?)", True
        elif entry.shard in entries:
            damaged[number] = f"shard {entry.shard} for a second time"
        else:
            entries[entry.shard] = entry
    is_sealed = content == _sealed(entries, manifest)
    return Journal(entries, damaged, is_torn=bool(rest), is_foreign=is_foreign, is_sealed=is_sealed)


def _parse_line(line: bytes, manifest: Manifest) -> tuple[JournalEntry, str]:
    """An entry, and the name of the cache it belongs to. Raises ValueError when it is not whole or not possible."""
    if len(line) >= LINE_LIMIT:
        raise ValueError("damaged (too long)")
    try:
        content = checks.parse_object(line)
    except ValueError as error:
        raise ValueError(f"damaged ({error})") from None
    problem = checks.wrong(content, _VALUES)
    if problem:
        raise ValueError(f"damaged ({problem})")
    entry = JournalEntry(**{key: content[key] for key in content.keys() - {"cache", "crc32"}})
    if entry.to_line(content["cache"]) != line + b"\n":
        raise ValueError("damaged (its checksum does not match)")
    if content["cache"] == cache_name(manifest):
        # The file is the one we would write: a journal cannot send the reader anywhere else.
        if entry.shard >= manifest.shards or entry.file != shard_file(entry.shard):
            raise ValueError(f"no shard {entry.shard} in this cache")
        if entry.samples != len(manifest.shard_range(entry.shard)):
            raise ValueError(f"shard {entry.shard} has {entry.samples} samples")
    return entry, content["cache"]
