"""The manifest: what a cache is, and all that must agree before anything is read from it or added to it."""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distill.cache.format import checks
from distill.errors import UserError
from distill.system.files import read_bounded
from distill.targets import schemes

FORMAT = "distill-cache"
VERSION = 1
MANIFEST = "manifest.json"
LIMIT = 2**20
"""Bytes of a manifest."""
_REMEDY = "restore it, or make the cache anew with --cache.overwrite true"


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

    @property
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


_VALUES: dict[str, checks.Check] = {
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
    try:
        text = read_bounded(path, LIMIT)
        content = checks.parse_object(text)
    except FileNotFoundError:
        raise UserError(f"{folder}: no cache here ({MANIFEST} is missing): run `distill cache-teacher` first") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: not readable as a manifest ({error}): {_REMEDY}") from None
    if content.pop("format", None) != FORMAT:
        raise UserError(f"{path}: not the manifest of a cache of this program")
    version = content.pop("version", None)
    if type(version) is not int or version != VERSION:
        raise UserError(
            f"{path}: cache format version {checks.printable(version)}, this program reads version {VERSION}: "
            "use the release that made it, or make the cache anew"
        )
    problem = checks.wrong(content, _VALUES)
    if not problem:
        content.pop("sha256")
        manifest = Manifest(**content)
        problem = _impossible(manifest)
        # Compared as text, so that not even a blank can have changed.
        if not problem and manifest.to_json().encode() == text:
            return manifest
    raise UserError(f"{path}: damaged ({problem or 'its hash does not match'}): {_REMEDY}")


def _impossible(manifest: Manifest) -> str | None:
    """What cannot be true of a manifest whose values are each possible."""
    if manifest.shards > checks.MOST_SHARDS:
        return f"{manifest.shards:,} shards are not possible"
    try:
        entries = manifest.make_scheme().most_entries
    except (KeyError, TypeError):
        return f"scheme {manifest.scheme[:40]} with {checks.printable(manifest.scheme_parameters)} is not known"
    if manifest.sequence_length * entries > checks.MOST_PLACES:
        return f"{manifest.sequence_length:,} tokens of {entries:,} entries are not possible"
    return None


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
