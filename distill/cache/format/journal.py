"""The journal: one line a finished shard, each with its own checksum; sorted and sealed when the last one is there."""

from __future__ import annotations

import builtins
import hashlib
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from distill.cache.format import checks, version1
from distill.cache.format.manifest import Manifest, read_manifest
from distill.cache.format.records import Record, token_hash
from distill.errors import UserError
from distill.system.files import append_durably, open_regular, write_durably

JOURNAL = "journal.jsonl"
LINE_LIMIT = 512
"""Largest size of a line in bytes, with its end."""


@dataclass(frozen=True)
class JournalEntry:
    """A finished shard, or one that was dropped and must be made again: its file is gone, and it has 0 bytes."""

    file: str
    bytes: int
    sha256: str
    samples: int
    positions: int
    entries: int
    tokens: str = ""
    """Hash of its samples' token ids, positions and masks (`token_hash`)."""
    batch_size: int = 0
    """Samples of a forward pass of the teacher. A shard that is made again gets the same."""

    @classmethod
    def of(cls, file: str, content: builtins.bytes, samples: Sequence[Record], batch_size: int) -> JournalEntry:
        """Return the entry of a shard with this content, which holds the `samples`."""
        return cls(
            file=file,
            bytes=len(content),
            sha256=hashlib.sha256(content).hexdigest(),
            samples=len(samples),
            positions=int(sum(record.loss_mask_L.sum() for record in samples)),
            entries=sum(record.entries for record in samples),
            tokens=token_hash(samples),
            batch_size=batch_size,
        )

    @property
    def is_dropped(self) -> bool:
        """True if the shard must be made again."""
        return self.bytes == 0

    def dropped(self) -> JournalEntry:
        """Return the entry that keeps the shard's place when its file goes."""
        return replace(self, bytes=0, sha256="0" * 64, positions=0, entries=0)

    def to_line(self, manifest: Manifest, cache: str | None = None) -> builtins.bytes:
        """Return its line: with the cache's name (by default the manifest's), and a crc32 of the rest of the line."""
        content = asdict(self)
        if manifest.version == version1.VERSION:
            content = version1.line_content(self, manifest.shard_of_file(self.file) or 0)
        content["cache"] = cache_name(manifest) if cache is None else cache
        crc32 = zlib.crc32(json.dumps(content, sort_keys=True).encode())
        return json.dumps({**content, "crc32": f"{crc32:08x}"}, sort_keys=True).encode() + b"\n"


_VALUES: dict[str, checks.Check] = {
    **{name: checks.whole(0, 2**62) for name in ("bytes", "samples", "positions", "entries")},
    "file": checks.is_text,
    "sha256": checks.hexadecimal(64),
    "cache": checks.hexadecimal(16),
    "crc32": checks.hexadecimal(8),
}
_VALUES_1 = {**_VALUES, "shard": checks.whole(0, 2**62)}
_VALUES_2 = {**_VALUES, "tokens": checks.hexadecimal(64), "batch_size": checks.whole(1, 2**32)}


def cache_name(manifest: Manifest) -> str:
    """Return a line's name for its cache."""
    return manifest.identity[:16]


def read_journal(folder: Path, manifest: Manifest | None = None) -> dict[int, JournalEntry]:
    """Return finished shards by number. A last line that was cut off by a power cut does not count.

    Raises UserError if any other line is not as the writer wrote it.
    """
    return read_whole(folder, manifest or read_manifest(folder)).entries


def read_whole(folder: Path, manifest: Manifest) -> Journal:
    """Return a journal without a damaged line. Raises UserError if a line is not as written."""
    journal = scan_journal(folder, manifest)
    for number, reason in journal.damaged.items():
        raise UserError(
            f"{folder / JOURNAL}, line {number}: {reason}: `distill inspect {folder} --repair` drops what is bad"
        )
    return journal


def append(folder: Path, manifest: Manifest, entry: JournalEntry) -> None:
    """Add a finished shard."""
    append_durably(folder / JOURNAL, entry.to_line(manifest))


def rewrite(folder: Path, manifest: Manifest, entries: dict[int, JournalEntry]) -> None:
    """Replace the journal by these entries at once, in the order of the shards. An equal journal stays."""
    path, content = folder / JOURNAL, _sealed(entries, manifest)
    if not path.exists() or path.read_bytes() != content:
        write_durably(path, content)


def seal(folder: Path) -> None:
    """Sort the lines in the order of the shards, so that the journal does not show in which order they were made."""
    manifest = read_manifest(folder)
    journal = read_whole(folder, manifest)
    rewrite(folder, manifest, {**journal.dropped, **journal.entries})


def _sealed(entries: dict[int, JournalEntry], manifest: Manifest) -> bytes:
    return b"".join(entry.to_line(manifest) for _, entry in sorted(entries.items()))


@dataclass(frozen=True)
class Journal:
    """The lines of a journal, and their faults."""

    entries: dict[int, JournalEntry]
    """Finished shards by number."""
    dropped: dict[int, JournalEntry]
    """Shards to be made again, by number."""
    damaged: dict[int, str]
    """Reasons why a line does not count, by its number."""
    is_torn: bool
    """True if the last line has no end: a kill or a power cut came while it was written."""
    is_foreign: bool
    """True if there are whole lines of another cache: manifest or journal were exchanged."""
    is_sealed: bool
    """True if it is exactly what `seal` would write."""


def scan_journal(folder: Path, manifest: Manifest) -> Journal:
    """Return the journal with all faults in it. Raises UserError if it is not readable at all.

    It takes little memory at any size: lines have a limit, and so has their number.
    """
    found = Journal({}, {}, {}, is_torn=False, is_foreign=False, is_sealed=False)
    whole: list[bytes] = []
    is_torn = is_foreign = False
    for number, line in enumerate(_lines(folder / JOURNAL), start=1):
        # A shard has one line, and one more when it was dropped and made again.
        if number > 2 * manifest.shards + 2:
            found.damaged[number] = "more lines than shards; it and what follows is not read"
            break
        if len(line) <= LINE_LIMIT and not line.endswith(b"\n"):
            is_torn = True
            break
        whole.append(line)
        try:
            shard, entry, cache = _parse_line(line, manifest)
        except ValueError as error:
            found.damaged[number] = str(error)
            continue
        if cache != cache_name(manifest):
            found.damaged[number], is_foreign = "of another cache (was the manifest or the journal exchanged?)", True
        elif shard in found.entries:
            found.damaged[number] = f"{entry.file} for a second time"
        else:
            found.dropped.pop(shard, None)
            (found.dropped if entry.is_dropped else found.entries)[shard] = entry
    is_sealed = not found.damaged and not is_torn
    is_sealed = is_sealed and b"".join(whole) == _sealed({**found.dropped, **found.entries}, manifest)
    return replace(found, is_torn=is_torn, is_foreign=is_foreign, is_sealed=is_sealed)


def _lines(path: Path) -> Iterator[bytes]:
    """Yield lines with their ends; of one that is too long, only the beginning, one byte longer than the limit."""
    try:
        with open(open_regular(path), "rb") as file:
            while line := file.readline(LINE_LIMIT + 1):
                yield line
                while len(line) > LINE_LIMIT and not line.endswith(b"\n"):
                    line = file.readline(1 << 20)
                    if not line:
                        return
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): restore it, or make the cache anew") from None


def _parse_line(line: bytes, manifest: Manifest) -> tuple[int, JournalEntry, str]:
    """Return a shard, its entry, and the name of the cache it belongs to.

    Raises ValueError when the line is not whole or not possible.
    """
    if len(line) > LINE_LIMIT:
        raise ValueError("damaged (too long)")
    try:
        content = checks.parse_object(line)
    except ValueError as error:
        raise ValueError(f"damaged ({error})") from None
    problem = checks.wrong(content, _VALUES_1 if manifest.version == version1.VERSION else _VALUES_2)
    if problem:
        raise ValueError(f"damaged ({problem})")
    entry = JournalEntry(**{key: content[key] for key in content.keys() - {"cache", "crc32", "shard"}})
    if entry.to_line(manifest, content["cache"]) != line:
        raise ValueError("damaged (its checksum does not match)")
    if content["cache"] != cache_name(manifest):
        return -1, entry, content["cache"]
    # The file is one that we would write: a journal cannot send the reader anywhere else.
    shard = manifest.shard_of_file(entry.file)
    if shard is None:
        raise ValueError(f"no shard {checks.printable(entry.file)} in this cache")
    # A dropped shard may have been shorter, if the cache has grown since.
    if not entry.is_dropped and entry.samples != len(manifest.shard_range(shard)):
        raise ValueError(f"{entry.file} has {entry.samples} samples")
    return shard, entry, content["cache"]
