"""Format version 1 as far as caches of it are read: its manifest, shard names, journal lines; nothing writes it."""

from __future__ import annotations

import struct
import zlib
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from distill.errors import UserError

if TYPE_CHECKING:
    from distill.cache.format.journal import JournalEntry
    from distill.cache.format.manifest import Manifest

VERSION = 1

_GONE: dict[str, tuple[str, float]] = {"varopt": ("draws", 1), "random": ("exponent", 1.0)}
"""Parameters of a scheme that are gone, and the only values of them that are read."""


def from_content(content: dict[str, Any], folder: str) -> dict[str, Any]:
    """Turn the manifest's values into those of version 2. Raises UserError for several draws or an exponent."""
    content = {**content, "scheme_parameters": {**content["scheme_parameters"]}, "sources": []}
    if content["scheme"] in _GONE:
        name, kept = _GONE[content["scheme"]]
        if content["scheme_parameters"].pop(name, kept) != kept:
            raise UserError(
                f"cache {folder} was made with cache.{name}, which is gone: make the cache anew, with a lower "
                "cache.threshold (0.01 costs as much as a second draw at 0.02, and is better in every epoch)"
            )
    content["splits"] = {name: stop - start for name, (start, stop) in content["splits"].items()}
    return content


def to_content(manifest: Manifest) -> dict[str, Any]:
    """Return the manifest's values as version 1 wrote them, but for format, version and hash."""
    content = asdict(manifest)
    if manifest.scheme in _GONE:
        name, kept = _GONE[manifest.scheme]
        content["scheme_parameters"][name] = kept
    del content["version"], content["sources"]
    held_out, train = manifest.splits["held_out"], manifest.splits["train"]
    content["splits"] = {"held_out": [0, held_out], "train": [held_out, held_out + train]}
    return content


def shard_file(shard: int) -> str:
    """Return the name of a shard: held-out samples and training samples lie in one row of shards."""
    return f"shards/{shard:06d}.safetensors"


def record_key(identity: str, sample: int) -> int:
    """Return the number that a record's checksum starts from."""
    return zlib.crc32(struct.pack("<32sQ", bytes.fromhex(identity), sample))


def line_content(entry: JournalEntry, shard: int) -> dict[str, Any]:
    """Return a journal line's values."""
    content = {**asdict(entry), "shard": shard}
    del content["tokens"], content["batch_size"]
    return content
