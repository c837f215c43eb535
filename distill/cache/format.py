"""The folder's layout: manifest, journal, shard names. What writer and reader agree on."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from distill.errors import UserError
from distill.targets import schemes

FORMAT = "distill-cache"
VERSION = 1
MANIFEST = "manifest.json"
JOURNAL = "journal.jsonl"


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

    def make_scheme(self) -> schemes.Scheme:
        return schemes.make(self.scheme, **self.scheme_parameters)

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=2, sort_keys=True) + "\n"


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


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a cache folder. Raises UserError when there is none or it is not one this version can read."""
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder}: no cache here ({MANIFEST} is missing): run `distill cache-teacher` first") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: not readable as a manifest ({error}): restore it or make the cache anew") from None
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise UserError(f"{path}: not the manifest of a cache of this program")
    version = content.pop("version", None)
    if version != VERSION:
        raise UserError(
            f"{path}: cache format version {version}, this program reads version {VERSION}: "
            "use the release that made it, or make the cache anew"
        )
    known = {field.name for field in fields(Manifest)}
    if set(content) != known:
        raise UserError(f"{path}: unexpected or missing keys: {', '.join(sorted(set(content) ^ known))}")
    return Manifest(**content)


def read_journal(folder: Path) -> dict[int, JournalEntry]:
    """Finished shards by number; a last line that was cut off by a power cut does not count."""
    path = folder / JOURNAL
    entries: dict[int, JournalEntry] = {}
    if not path.exists():
        return entries
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            entry = JournalEntry(**json.loads(line))
            assert entry.file == shard_file(entry.shard)
        except (ValueError, TypeError, AssertionError):
            raise UserError(f"{path}, line {number}: damaged: run `distill inspect {folder} --verify`") from None
        entries[entry.shard] = entry
    return entries


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


def sha256_of(path: Path) -> str:
    """Content hash of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def write_durably(path: Path, content: bytes) -> None:
    """Write a file so that after a power cut there is either all of it or none: temporary name, sync, rename, sync."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make a rename or a new name in `folder` last."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
