"""The folder's layout, on which writer and reader agree: manifest, journal, shard names."""

from __future__ import annotations

from distill.cache.format.journal import JOURNAL, JournalEntry, read_journal, seal
from distill.cache.format.manifest import (
    FORMAT,
    MANIFEST,
    SHARDS,
    SPLITS,
    VERSION,
    Manifest,
    differences,
    read_manifest,
)

PART = "part.json"
"""File that says which part of a cache the folder holds, if it is not all of it."""
TOKEN_ORDER = "token_order"
"""The order of the tokens in which records write their ids."""
TOKENIZER = "tokenizer"
"""Folder of the teacher's tokenizer."""
CARD = "README.md"
"""Card of a cache or a student that was pushed."""
SUMS = "SHA256SUMS"
"""List of the files that were pushed, with their hashes, in coreutils' form."""
PUSHED = (CARD, SUMS)
"""Files that `distill push` puts beside those of a cache."""

__all__ = [
    "CARD",
    "FORMAT",
    "JOURNAL",
    "MANIFEST",
    "PART",
    "PUSHED",
    "SHARDS",
    "SPLITS",
    "SUMS",
    "TOKENIZER",
    "TOKEN_ORDER",
    "VERSION",
    "JournalEntry",
    "Manifest",
    "differences",
    "read_journal",
    "read_manifest",
    "seal",
]
