"""`distill inspect`: what is in a cache, and is it whole."""

from __future__ import annotations

from pathlib import Path

from distill.cache.format import MANIFEST, read_journal, read_manifest
from distill.cache.verify import repair as repair_cache
from distill.cache.verify import verify as verify_cache
from distill.errors import UserError
from distill.progress import say

_MOST_LINES = 50


def main(cache: str, verify: bool = False, repair: bool = False) -> int:
    """Print what the cache is; `verify` reads all of it (exit status 1 on a difference), `repair` drops what is bad."""
    folder = Path(cache)
    if not folder.is_dir():
        raise UserError(f"{cache}: no such folder")
    if repair:
        _repair(folder)
    if verify:
        return _verify(folder)
    if not repair:
        _describe(folder)
    return 0


def _describe(folder: Path) -> None:
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


def _repair(folder: Path) -> None:
    actions = repair_cache(folder)
    for action in actions:
        say(action)
    say("repaired: run `distill cache-teacher` again, it makes what is missing" if actions else "nothing to repair")


def _verify(folder: Path) -> int:
    try:
        report = verify_cache(folder)
    except UserError as error:
        if not (folder / MANIFEST).exists():
            raise
        say(str(error))
        return 1
    for finding in report.findings[:_MOST_LINES]:
        say(f"{finding.file} {finding.problem}: {finding.remedy}")
    if len(report.findings) > _MOST_LINES:
        say(f"... and {len(report.findings) - _MOST_LINES} more")
    not_made = f", {report.to_do} not made yet" if report.to_do else ""
    say(f"verified: {report.whole} shards whole, {report.bad} not{not_made}")
    return 1 if report.findings else 0
