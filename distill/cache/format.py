"""The folder's layout: manifest, journal, shard names. What writer and reader agree on."""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from distill.cache import checks
from distill.cache.durable import read_bounded, sha256_of, write_durably
from distill.cache.records import most_entries
from distill.errors import UserError
from distill.targets import schemes

__all__ = [
    "JOURNAL",
    "MANIFEST",
    "SHARDS",
    "TOKENIZER",
    "JournalEntry",
    "Manifest",
    "differences",
    "read_journal",
    "read_manifest",
    "scan_journal",
    "seal",
    "sha256_of",
    "shard_file",
    "write_durably",
]

FORMAT = "distill-cache"
VERSION = 1
MANIFEST = "manifest.json"
JOURNAL = "journal.jsonl"
SHARDS = "shards"
TOKENIZER = "tokenizer"
MANIFEST_LIMIT = 2**20
"""Bytes."""
LINE_LIMIT = 1024
"""Bytes of a journal line."""


@dataclass(frozen=True)
class Manifest:
    """What a cache is: everything that must agree before anything is read from it or added to it."""

    scheme: str
    scheme_parameters: dict[str, Any]
    temperature: float
    seed: int
    vocab_size: int
    """Real tokens of the tokenizer (rows of the head beyond them take no part)."""
    sequence_length: int
    pack: bool
    shard_samples: int
    splits: dict[str, list[int]]
    """First sample and the one after the last of `held_out` and `train`."""
    fingerprints: dict[str, str]
    """teacher_config, teacher_weights, quantization, tokenizer, chat_template, corpus, packing."""
    made_with: dict[str, str]
    """Versions of the libraries that made it (for information: they are not compared)."""

    @property
    def samples(self) -> int:
        return max(stop for _, stop in self.splits.values())

    @property
    def shards(self) -> int:
        return -(-self.samples // self.shard_samples)

    def shard_range(self, shard: int) -> range:
        """The samples of a shard."""
        start = shard * self.shard_samples
        return range(start, min(start + self.shard_samples, self.samples))

    def make_scheme(self) -> schemes.AnyScheme:
        return schemes.make(self.scheme, **self.scheme_parameters)

    @cached_property
    def identity(self) -> str:
        """Hash of all that two caches must have in common to be the same one; journal lines and records carry it."""
        return _sha256({key: value for key, value in asdict(self).items() if key != "made_with"})

    def record_key(self, sample: int) -> int:
        """What the checksum of a sample's record starts from: in another place or cache the record does not check."""
        return zlib.crc32(struct.pack("<32sQ", bytes.fromhex(self.identity), sample))

    def to_json(self) -> str:
        """The manifest's file, with a hash of the rest of it."""
        content = {"format": FORMAT, "version": VERSION, **asdict(self)}
        return json.dumps({**content, "sha256": _sha256(content)}, indent=2, sort_keys=True) + "\n"


def _sha256(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


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

    def to_line(self, manifest: Manifest) -> bytes:
        """Its line, with the cache it belongs to and a crc32 of the rest of the line."""
        content = {**asdict(self), "cache": manifest.identity[:16]}
        crc32 = zlib.crc32(json.dumps(content, sort_keys=True).encode())
        return json.dumps({**content, "crc32": f"{crc32:08x}"}, sort_keys=True).encode() + b"\n"


_MANIFEST_VALUES: dict[str, checks.Check] = {
    "scheme": checks.is_text,
    "scheme_parameters": checks.parameters,
    "temperature": checks.positive,
    "seed": checks.whole(-(2**63), 2**64),
    "vocab_size": checks.whole(1, checks.MOST_VOCABULARY),
    "sequence_length": checks.whole(1, checks.MOST_TOKENS),
    "pack": checks.is_bool,
    "shard_samples": checks.whole(1, checks.MOST_SHARD_SAMPLES),
    "splits": checks.sample_ranges,
    "fingerprints": checks.texts,
    "made_with": checks.texts,
    "sha256": checks.hexadecimal(64),
}


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a cache folder. Raises UserError when there is none or it is not one this version can read."""
    path = folder / MANIFEST
    damaged = f"{path}: damaged ({{}}): restore it, or make the cache anew with --cache.overwrite true"
    try:
        text = read_bounded(path, MANIFEST_LIMIT)
        content = checks.parse_object(text)
    except FileNotFoundError:
        raise UserError(f"{folder}: no cache here ({MANIFEST} is missing): run `distill cache-teacher` first") from None
    except (ValueError, OSError) as error:
        raise UserError(damaged.format(error)) from None
    if content.pop("format", None) != FORMAT:
        raise UserError(f"{path}: not the manifest of a cache of this program")
    version = content.pop("version", None)
    if type(version) is not int or version != VERSION:
        raise UserError(
            f"{path}: cache format version {str(version)[:20]}, this program reads version {VERSION}: "
            "use the release that made it, or make the cache anew"
        )
    problem = checks.wrong(content, _MANIFEST_VALUES)
    if problem:
        raise UserError(damaged.format(problem))
    content.pop("sha256")
    manifest = Manifest(**content)
    # Compared as text, so that not even a blank can have changed.
    problem = _impossible(manifest) or (None if manifest.to_json().encode() == text else "its hash does not match")
    if problem:
        raise UserError(damaged.format(problem))
    return manifest


def _impossible(manifest: Manifest) -> str | None:
    """What cannot be true of a manifest whose values are each possible."""
    if manifest.shards > checks.MOST_SHARDS:
        return f"{manifest.shards:,} shards are not possible"
    try:
        entries = most_entries(manifest.make_scheme())
    except (KeyError, TypeError):
        return f"no scheme {manifest.scheme[:40]} with {', '.join(manifest.scheme_parameters)[:80]}"
    if manifest.sequence_length * entries > checks.MOST_PLACES:
        return f"{manifest.sequence_length:,} tokens of {entries:,} entries are not possible"
    return None


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
        content = read_bounded(path, LINE_LIMIT * (2 * manifest.shards + 1))
    except FileNotFoundError:
        content = b""
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): run `distill inspect {folder} --verify`") from None
    *lines, rest = content.split(b"\n")
    entries: dict[int, JournalEntry] = {}
    damaged: dict[int, str] = {}
    is_foreign = False
    for number, line in enumerate(lines, start=1):
        try:
            entry = _parse_line(line, manifest)
        except ValueError as error:
            damaged[number] = str(error)
            is_foreign |= isinstance(error, _Foreign)
            continue
        if entry.shard in entries:
            damaged[number] = f"shard {entry.shard} for a second time"
        entries[entry.shard] = entry
    is_sealed = content == _sealed(entries, manifest)
    return Journal(entries, damaged, is_torn=bool(rest), is_foreign=is_foreign, is_sealed=is_sealed)


class _Foreign(ValueError):
    """A line of another cache."""


def _parse_line(line: bytes, manifest: Manifest) -> JournalEntry:
    if len(line) > LINE_LIMIT:
        raise ValueError("too long")
    content = checks.parse_object(line)
    number = checks.whole(0, 2**62)
    hashed = {"sha256": checks.hexadecimal(64), "cache": checks.hexadecimal(16), "crc32": checks.hexadecimal(8)}
    numbers = {name: number for name in ("shard", "bytes", "samples", "positions", "entries")}
    problem = checks.wrong(content, {**hashed, **numbers, "file": checks.is_text})
    if problem:
        raise ValueError(problem)
    cache = content.pop("cache")
    content.pop("crc32")
    entry = JournalEntry(**content)
    # The line's own cache is put in for the comparison, so that damage and foreignness are told apart.
    if entry.to_line(replace(manifest, **{}) if False else manifest) != line + b"\n":
        if cache != manifest.identity[:16] and entry._line(cache) == line + b"\n":
            raise _Foreign("of another cache")
        raise ValueError("its checksum does not match")
    return entry


def shard_file(shard: int) -> str:
    """Name of a shard inside the folder."""
    return f"shards/{shard:06d}.safetensors"


def differences(expected: Manifest, found: Manifest) -> list[str]:
    """What keeps two caches from being the same one, as `field: expected x, found y`."""
    ours, theirs = _flat(expected), _flat(found)
    keys = sorted(ours.keys() | theirs.keys())
    return [
        f"{key}: expected {_short(ours.get(key))}, found {_short(theirs.get(key))}"
        for key in keys
        if ours.get(key) != theirs.get(key)
    ]


def _flat(manifest: Manifest) -> dict[str, Any]:
    content = asdict(manifest)
    content.pop("made_with")
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat.update({f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value})
    return flat


def _short(value: object) -> str:
    text = str(value)
    return f"{text[:12]}…" if len(text) == 64 else text
