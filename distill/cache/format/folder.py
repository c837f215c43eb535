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

__all__ = [
    "FORMAT",
    "JOURNAL",
    "MANIFEST",
    "PART",
    "SHARDS",
    "SPLITS",
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
