"""Repair of a cache: drops what is damaged, so that the next `cache-teacher` makes that anew."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from distill.cache.format import journal, records
from distill.cache.format.arrays import DamagedRecord
from distill.cache.format.folder import JOURNAL, JournalEntry, Manifest, read_manifest, shard_file
from distill.cache.format.leftovers import remove_leftovers
from distill.cache.format.shards import ShardFile, encode
from distill.cache.reading.verify import shard_problem, side_problems
from distill.errors import UserError
from distill.system.files import read_bounded
from distill.system.locks import cannot_write, sole_writer


def repair(folder: Path) -> list[str]:
    """Drop what is damaged, so that the next `cache-teacher` makes just that anew; says what was done.

    A shard that is whole but has lost its journal line is taken back. Raises UserError when the manifest is damaged or
    the journal is another cache's: then nothing is touched.
    """
    manifest = read_manifest(folder)
    with sole_writer(folder):
        lines = journal.scan_journal(folder, manifest)
        if lines.is_foreign:
            raise UserError(
                f"{folder}: {JOURNAL} has lines of another cache: manifest or journal were exchanged; "
                "restore the one that belongs here (nothing was changed)"
            )
        try:
            return _repair(folder, manifest, lines)
        except OSError as error:
            raise cannot_write(folder, error) from None


def _repair(folder: Path, manifest: Manifest, lines: journal.Journal) -> list[str]:
    said = [f"{JOURNAL}, line {number}: {problem}: dropped" for number, problem in lines.damaged.items()]
    entries, dropped = dict(lines.entries), []
    for shard in range(manifest.shards):
        problem = shard_problem(folder, shard, entries.get(shard))
        if problem is None:
            continue
        file = shard_file(shard)
        if shard not in entries and (entry := recover(folder, shard, manifest)):
            entries[shard] = entry
            said.append(f"{file}: had no journal line, but is whole: taken back")
            continue
        entries.pop(shard, None)
        dropped.append(folder / file)
        said.append(f"{file} {problem}: dropped")
    # The journal first: a file without a line is made anew, a line without a file would be a mistake.
    journal.rewrite(folder, manifest, entries)
    for path in dropped:
        path.unlink(missing_ok=True)
    remove_leftovers(folder)
    return said + _repair_sides(folder, manifest)


def recover(folder: Path, shard: int, manifest: Manifest) -> JournalEntry | None:
    """The journal line of a shard, from the shard itself; None when not every record in it is whole and its own."""
    path, samples = folder / shard_file(shard), manifest.shard_range(shard)
    scheme = manifest.make_scheme()
    positions = entries = 0
    try:
        with ShardFile(path, len(samples)) as file:
            encoded = [file.record(row) for row in range(len(samples))]
        content = read_bounded(path, path.stat().st_size)
        for data, sample in zip(encoded, samples, strict=True):
            record = records.decode(data, manifest.sequence_length, scheme, manifest.record_key(sample))
            positions += int(record.loss_mask_L.sum())
            entries += record.entries
    except (DamagedRecord, OSError):
        return None
    if content != encode(encoded):
        return None
    digest = hashlib.sha256(content).hexdigest()
    return JournalEntry(shard, shard_file(shard), len(content), digest, len(samples), positions, entries)


def _repair_sides(folder: Path, manifest: Manifest) -> list[str]:
    """The tokenizer and the head go as a whole: the next `cache-teacher` writes them anew."""
    problems = side_problems(folder, manifest)
    for name in {name.split("/")[0] for name in problems}:
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    return [f"{name} {problem}: dropped" for name, problem in problems.items()]
