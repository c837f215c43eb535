"""The manifest of a cache: its identity, which must agree before anything is read or added, and its samples' places."""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from distill.cache.format import checks, version1
from distill.errors import UserError
from distill.system.files import is_inside, read_bounded
from distill.targets import schemes

FORMAT = "distill-cache"
VERSION = 2
MANIFEST = "manifest.json"
LIMIT = 2**24
"""Largest size of a manifest in bytes. Most of it is names of the corpus's files."""
SPLITS = ("held_out", "train")
"""Splits of a cache's samples, in the order of their numbers."""
SHARDS = "shards"
MOST_SOURCES = 4096
"""Largest number of sources that are listed by name."""
_REMEDY = "restore it, or make the cache anew with --cache.overwrite true"


@dataclass(frozen=True)
class Manifest:
    """Facts that must agree before anything is read from a cache or added to it.

    Samples are numbered through, held-out ones first, and so are shards. Each shard holds samples of one split, and is
    named by its split and its number there (version 1: by its number alone, and samples of two splits may share one).
    """

    scheme: str
    scheme_parameters: dict[str, Any]
    temperature: float
    seed: int
    vocab_size: int
    """Real tokens of the tokenizer (rows of the head beyond them take no part)."""
    sequence_length: int
    pack: bool
    shard_samples: int
    splits: dict[str, int]
    """Numbers of samples of `held_out` and `train`."""
    fingerprints: dict[str, str]
    """Hashes: teacher_config, teacher_weights, quantization, tokenizer, chat_template, corpus, packing, token_order."""
    made_with: dict[str, str]
    """Versions of the libraries that made it (for information: they are not compared)."""
    sources: list[str] = field(default_factory=list)
    """Names of the corpus's files, to which records refer by number (for information: they are not compared)."""
    version: int = VERSION
    """Version of the format."""

    @property
    def samples(self) -> int:
        """Number of all samples."""
        return sum(self.splits.values())

    def split_range(self, split: str) -> range:
        """Return the numbers of a split's samples."""
        start = 0 if split == SPLITS[0] else self.splits[SPLITS[0]]
        return range(start, start + self.splits[split])

    @property
    def shards(self) -> int:
        """Number of all shards."""
        if self.version == version1.VERSION:
            return -(-self.samples // self.shard_samples)
        return sum(map(self._shards_of, SPLITS))

    def _shards_of(self, split: str) -> int:
        return -(-self.splits[split] // self.shard_samples)

    def _in_split(self, shard: int) -> tuple[str, int]:
        """Return a shard's split and its number there."""
        held_out = self._shards_of(SPLITS[0])
        return (SPLITS[0], shard) if shard < held_out else (SPLITS[1], shard - held_out)

    def shards_with(self, splits: Mapping[str, int]) -> frozenset[int]:
        """Return the shards that hold the first so many samples of each split."""
        numbers = [self.split_range(name)[:count] for name, count in splits.items()]
        return frozenset(
            shard
            for found in numbers
            if found
            for shard in range(self.place(found[0])[0], self.place(found[-1])[0] + 1)
        )

    def shard_file(self, shard: int) -> str:
        """Return the name of a shard inside the folder."""
        if self.version == version1.VERSION:
            return version1.shard_file(shard)
        split, number = self._in_split(shard)
        return f"{SHARDS}/{split}-{number:06d}.safetensors"

    def shard_of_file(self, file: str) -> int | None:
        """Return the shard of a name inside the folder, None for any other name."""
        match = re.fullmatch(rf"{SHARDS}/(?:(held_out|train)-)?([0-9]{{6,9}})\.safetensors", file)
        if match is None:
            return None
        shard = int(match[2]) + (self._shards_of(SPLITS[0]) if match[1] == SPLITS[1] else 0)
        return shard if shard < self.shards and self.shard_file(shard) == file else None

    def shard_range(self, shard: int) -> range:
        """Return the numbers of a shard's samples."""
        if self.version == version1.VERSION:
            start, end = shard * self.shard_samples, self.samples
        else:
            split, number = self._in_split(shard)
            start, end = self.split_range(split).start + number * self.shard_samples, self.split_range(split).stop
        return range(start, min(start + self.shard_samples, end))

    def place(self, sample: int) -> tuple[int, int]:
        """Return the shard that holds a sample, and the sample's row in it."""
        held_out = self.splits[SPLITS[0]]
        if self.version == version1.VERSION or sample < held_out:
            return divmod(sample, self.shard_samples)
        shard, row = divmod(sample - held_out, self.shard_samples)
        return self._shards_of(SPLITS[0]) + shard, row

    def make_scheme(self) -> schemes.AnyScheme:
        """Make the scheme."""
        return schemes.make(self.scheme, **self.scheme_parameters)

    @cached_property
    def identity(self) -> str:
        """Hash of the facts that determine a cache's samples and targets. Journal lines and records carry it.

        It leaves out the number of samples: the full shards of a smaller cache are those of a larger one.
        """
        if self.version == version1.VERSION:
            content = version1.to_content(self)
        else:
            content = {key: value for key, value in asdict(self).items() if key not in ("splits", "sources")}
        del content["made_with"]
        return _sha256(content)

    def record_key(self, sample: int) -> int:
        """Return the number that a record's checksum starts from, so that the record checks in no other place."""
        if self.version == version1.VERSION:
            return version1.record_key(self.identity, sample)
        held_out = self.splits[SPLITS[0]]
        split, index = (SPLITS[0], sample) if sample < held_out else (SPLITS[1], sample - held_out)
        return zlib.crc32(f"{self.identity} {split} {index}".encode())

    def to_json(self) -> str:
        """Return the manifest's file, with a hash of the rest of it."""
        content = asdict(self) if self.version != version1.VERSION else version1.to_content(self)
        content |= {"format": FORMAT, "version": self.version}
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
    "splits": checks.sample_counts,
    "fingerprints": checks.texts,
    "made_with": checks.texts,
    "sources": checks.list_of_texts(MOST_SOURCES),
    "sha256": checks.hexadecimal(64),
}


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of a cache folder. Raises UserError if there is none, or none that can be read."""
    path = folder / MANIFEST
    _check_files(folder)
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
    if type(version) is not int or version not in (version1.VERSION, VERSION):
        raise UserError(
            f"{path}: cache format version {checks.printable(version)}, this program reads versions 1 and {VERSION}: "
            "use the release that made it, or make the cache anew"
        )
    values = _VALUES
    if version == version1.VERSION:
        values = {name: check for name, check in _VALUES.items() if name != "sources"}
        values |= {"splits": checks.sample_ranges, "scheme_parameters": checks.parameters_of_version_1}
    problem = checks.wrong(content, values)
    if not problem:
        content.pop("sha256")
        if version == version1.VERSION:
            content = version1.from_content(content, str(folder))
        manifest = Manifest(**content, version=version)
        problem = _impossible(manifest)
        # The files are compared as text, so that not even a blank can have changed.
        if not problem and manifest.to_json().encode() == text:
            return manifest
    raise UserError(f"{path}: damaged ({problem or 'its hash does not match'}): {_REMEDY}")


def _check_files(folder: Path) -> None:
    """Raise UserError for a link out of the folder, and unless it is a file or a folder.

    Nothing outside a cache is read, copied or deleted. Shards are looked at one by one when they are used.
    """
    for path in [*folder.glob("*"), *folder.glob("tokenizer/*")]:
        if path.is_symlink() and not is_inside(path, folder):
            raise UserError(f"{path}: is a link out of the cache and is not followed: move what it names here")
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise UserError(f"{path}: is no plain file: remove it")


def _impossible(manifest: Manifest) -> str | None:
    """Return a contradiction among the values of a manifest that are each possible, or None."""
    if manifest.splits.keys() != set(SPLITS):
        return f"splits: {checks.printable(', '.join(manifest.splits))} are not {' and '.join(SPLITS)}"
    if manifest.shards > checks.MOST_SHARDS:
        return f"{manifest.shards:,} shards are not possible"
    try:
        entries = manifest.make_scheme().most_entries
    except (KeyError, TypeError, OverflowError):
        return f"scheme {manifest.scheme[:40]} with {checks.printable(manifest.scheme_parameters)} is not known"
    if manifest.sequence_length * entries > checks.MOST_PLACES:
        return f"{manifest.sequence_length:,} tokens of {entries:,} entries are not possible"
    return None


_SETTINGS = {
    "fingerprints.samples": " (corpus.pack, corpus.long)",
    "fingerprints.mixture": " (weights in corpus.sources)",
    "fingerprints.conversations": " (corpus.learn, corpus.thoughts)",
    "fingerprints.date": " (corpus.date)",
}
"""Settings behind a difference whose name does not tell them."""


def differences(expected: Manifest, found: Manifest) -> list[str]:
    """Return the reasons why two caches are not the same one, as `field: expected x, found y`.

    A cache of version 1 is the same as one of version 2 that holds the same targets.
    """
    ours, theirs = _flat(expected), _flat(found)
    keys = ours.keys() | theirs.keys()
    if expected.version != found.version:  # each version counts the tokens' order over other samples
        keys -= {"version", "fingerprints.token_order"}
    return [
        f"{key}{_SETTINGS.get(key, '')}: expected {_short(ours.get(key))}, found {_short(theirs.get(key))}"
        for key in sorted(keys)
        if ours.get(key) != theirs.get(key)
    ]


def _flat(manifest: Manifest) -> dict[str, Any]:
    content = asdict(manifest)
    del content["made_with"], content["sources"]
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat.update({f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value})
    return flat


def _short(value: object) -> str:
    text = str(value)
    return f"{text[:12]}…" if len(text) == 64 else text
