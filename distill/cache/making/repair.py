"""Repair of a cache: damaged shards and lines are dropped, so that the next `cache-teacher` makes them anew."""

from __future__ import annotations

import shutil
from pathlib import Path

from distill.cache.format import journal, records, version1
from distill.cache.format.arrays import DamagedRecord
from distill.cache.format.folder import JOURNAL, JournalEntry, Manifest, read_manifest
from distill.cache.format.leftovers import remove_leftovers
from distill.cache.format.shards import ShardFile, encode
from distill.cache.format.token_order import load_order
from distill.cache.reading.verify import NO_LINE, shard_problem, side_problems
from distill.errors import UserError
from distill.system.files import read_bounded
from distill.system.locks import cannot_write, sole_writer


def repair(folder: Path) -> list[str]:
    """Drop everything damaged, so that the next `cache-teacher` makes just that anew. A message says what was done.

    A whole shard that has lost its journal line is taken back. Raises UserError if the manifest is damaged or the
    journal is another cache's: then nothing is touched.
    """
    manifest = read_manifest(folder)
    if manifest.version == version1.VERSION:
        raise UserError(
            f"{folder}: a cache of format version 1 is read, but no longer written: restore what is damaged "
            "from a copy, repair it with the release that made it, or make the cache anew"
        )
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
    entries, dropped = {**lines.dropped, **lines.entries}, []
    for shard in range(manifest.shards):
        file = manifest.shard_file(shard)
        problem = shard_problem(folder / file, lines.entries.get(shard))
        if problem is None:
            continue
        if problem == NO_LINE and (entry := recover(folder, shard, manifest)):
            entries[shard] = entry
            said.append(f"{file}: had no journal line, but is whole: taken back")
            continue
        if shard in lines.entries:  # its line stays, for the batch size
            entries[shard] = lines.entries[shard].dropped()
        dropped.append(folder / file)
        said.append(f"{file} {problem}: dropped")
    # The journal first: a file without a line is made anew, a line without its file would be a mistake.
    journal.rewrite(folder, manifest, entries)
    for path in dropped:
        path.unlink(missing_ok=True)
    remove_leftovers(folder)
    return said + _repair_sides(folder, manifest)


def recover(folder: Path, shard: int, manifest: Manifest) -> JournalEntry | None:
    """Return a shard's journal entry, from the shard itself; None if a record in it is not whole or not its own."""
    file, numbers = manifest.shard_file(shard), manifest.shard_range(shard)
    scheme = manifest.make_scheme()
    try:
        order = load_order(folder, manifest)
        with ShardFile(folder / file, len(numbers)) as opened:
            batch_size, encoded = opened.batch_size, [opened.record(row) for row in range(len(numbers))]
        content = read_bounded(folder / file, (folder / file).stat().st_size)
        if batch_size is None or content != encode(encoded, batch_size):
            return None
        samples = [
            order.named(records.decode(data, manifest.sequence_length, scheme, manifest.record_key(number)))
            for data, number in zip(encoded, numbers, strict=True)
        ]
    except (DamagedRecord, OSError, UserError):
        return None
    return JournalEntry.of(file, content, samples, batch_size)


def _repair_sides(folder: Path, manifest: Manifest) -> list[str]:
    """Remove the tokenizer or the head as a whole if it is damaged: the next `cache-teacher` writes it anew."""
    problems = side_problems(folder, manifest)
    for name in {name.split("/")[0] for name in problems}:
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    return [f"{name} {problem}: dropped" for name, problem in problems.items()]
