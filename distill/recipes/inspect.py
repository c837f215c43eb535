"""`distill inspect`: what is in a cache, and is it whole."""

from __future__ import annotations

from pathlib import Path

from distill.cache.format import read_journal, read_manifest, sha256_of
from distill.errors import UserError
from distill.progress import say


def main(cache: str, verify: bool = False) -> int:
    """Print what the cache is; with `verify` compare every shard's hash (exit status 1 on a difference)."""
    folder = Path(cache)
    if not folder.is_dir():
        raise UserError(f"{cache}: no such folder")
    manifest, journal = read_manifest(folder), read_journal(folder)
    entries = journal.values()
    positions = max(sum(entry.positions for entry in entries), 1)
    size = sum(entry.bytes for entry in entries)
    parameters = ", ".join(f"{name} {value}" for name, value in manifest.scheme_parameters.items())
    say(f"cache            {folder}")
    say(f"scheme           {manifest.scheme} ({parameters}), temperature {manifest.temperature}, seed {manifest.seed}")
    for name, (start, stop) in sorted(manifest.splits.items()):
        say(f"{name:<16} {stop - start:,} samples of {manifest.sequence_length} tokens")
    say(f"vocabulary       {manifest.vocab_size:,} tokens")
    say(f"shards           {len(journal)} of {manifest.shards}")
    say(f"positions        {sum(entry.positions for entry in entries):,}")
    say(f"size             {size / 1e6:,.2f} MB, {size / positions:.1f} bytes a position")
    say(f"entries          {sum(entry.entries for entry in entries) / positions:.1f} a position")
    for name, value in sorted(manifest.fingerprints.items()):
        say(f"{name:<16} {value}")
    for name, value in sorted(manifest.made_with.items()):
        say(f"{name:<16} {value}")
    return _verify(folder) if verify else 0


def _verify(folder: Path) -> int:
    bad = 0
    for shard, entry in sorted(read_journal(folder).items()):
        path = folder / entry.file
        problem = "is missing" if not path.exists() else "has changed" if sha256_of(path) != entry.sha256 else None
        if problem:
            bad += 1
            say(f"{entry.file} {problem}: delete it and run `distill cache-teacher` again (shard {shard})")
    say(f"verified: {len(read_journal(folder)) - bad} shards whole, {bad} not")
    return 1 if bad else 0
