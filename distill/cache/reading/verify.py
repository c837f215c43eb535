"""Verification that every byte of a cache is as it was written, with the damage and its remedy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from distill.cache.format import journal, version1
from distill.cache.format.checks import printable
from distill.cache.format.folder import (
    JOURNAL,
    MANIFEST,
    PART,
    PUSHED,
    SHARDS,
    TOKEN_ORDER,
    TOKENIZER,
    JournalEntry,
    Manifest,
    read_manifest,
)
from distill.cache.format.head import HEAD, load_head
from distill.cache.format.in_flight import SUFFIX
from distill.cache.format.part import read_part
from distill.cache.format.token_order import FINGERPRINT, load_order
from distill.cache.format.tokenizer_files import tokenizer_problems
from distill.errors import UserError
from distill.system.files import TEMPORARY, is_inside, sha256_of

NO_LINE = "has no journal line"


@dataclass(frozen=True)
class Problem:
    """A file or line that is not as it was written."""

    file: str
    """Name in the cache's folder."""
    problem: str
    remedy: str


@dataclass(frozen=True)
class Report:
    """The result of `verify`."""

    problems: list[Problem]
    whole: int
    """Shards that are as they were written."""
    bad: int
    """Shards that are changed, missing, or without their journal line."""
    to_do: int
    """Shards that were not made yet."""


def verify(folder: Path) -> Report:
    """Read all of a cache and compare every hash. Raises UserError if its manifest cannot be read."""
    manifest = read_manifest(folder)
    lines = journal.scan_journal(folder, manifest)
    repair, again = f"run `distill inspect {folder} --repair`", "run `distill cache-teacher` again"
    if manifest.version == version1.VERSION:
        repair = again = "restore it from a copy, or make the cache anew (format version 1 is only read)"
    problems = list(_journal_problems(lines, repair, again))
    expected = shards_of(folder, manifest)
    bad = whole = 0
    for shard in sorted({*expected, *lines.entries}):
        file = manifest.shard_file(shard)
        problem = shard_problem(folder / file, lines.entries.get(shard))
        if shard not in expected:
            problems.append(Problem(file, "is not of this part of the cache", "start the part anew"))
        elif problem:
            problems.append(Problem(file, problem, repair))
            bad += 1
        elif shard in lines.entries:
            whole += 1
    to_do = len(expected) - whole - bad
    if to_do:
        problems.append(Problem(JOURNAL, f"not finished, {to_do} shards to go", f"{again}, it continues"))
    for name, problem in side_problems(folder, manifest).items():
        problems.append(Problem(name, problem, f"{repair}, then `distill cache-teacher`"))
    for name in _strangers(folder, manifest, {*expected, *lines.entries}):
        if name.endswith(TEMPORARY):
            problems.append(Problem(name, "was left half written", f"{again}, it is removed then"))
        else:
            problems.append(Problem(name, "is not part of the cache", "move it elsewhere"))
    return Report(problems, whole, bad, to_do)


def _journal_problems(lines: journal.Journal, repair: str, again: str) -> Iterator[Problem]:
    for number, problem in lines.damaged.items():
        yield Problem(f"{JOURNAL}, line {number}", problem, repair)
    if lines.is_torn:
        yield Problem(JOURNAL, "its last line has no end", f"{again}, it is made anew")
    elif not lines.damaged and not lines.is_sealed:
        yield Problem(JOURNAL, "its lines are not in the order of the shards", f"{again}, it puts them in order")


def shards_of(folder: Path, manifest: Manifest) -> range:
    """Return the shards that a finished cache has in this folder: all, or those of its part."""
    part = read_part(folder)
    return part.shards(manifest.shards) if part else range(manifest.shards)


def shard_problem(path: Path, entry: JournalEntry | None) -> str | None:
    """Return the fault of a shard's file, None if it matches its line or neither is there yet."""
    if not is_inside(path, path.parents[1]):
        return "is a link out of the cache"
    if entry is None:
        return NO_LINE if path.exists() else None
    try:
        # The size is compared first, since an absurdly long file would take long to read.
        return None if path.stat().st_size == entry.bytes and sha256_of(path) == entry.sha256 else "has changed"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def side_problems(folder: Path, manifest: Manifest) -> dict[str, str]:
    """Return the faults beside manifest, journal and shards."""
    problems = {printable(name): problem for name, problem in tokenizer_problems(folder).items()}
    try:
        load_order(folder, manifest)
    except UserError as error:
        problems[TOKEN_ORDER] = "is missing" if not (folder / TOKEN_ORDER).exists() else f"has changed ({error})"
    if manifest.scheme == "hidden":
        try:
            load_head(folder)
        except UserError as error:
            problems[HEAD] = "is missing" if not (folder / HEAD).exists() else f"has changed ({error})"
    return problems


def _strangers(folder: Path, manifest: Manifest, shards: set[int]) -> Iterator[str]:
    """Return files that neither a writer of caches nor a push made, or that one left half written."""
    known = {MANIFEST, JOURNAL, PART, SHARDS, TOKENIZER, *PUSHED}
    known |= {HEAD} if manifest.scheme == "hidden" else set()
    known |= {TOKEN_ORDER} if FINGERPRINT in manifest.fingerprints else set()
    for path in sorted(folder.iterdir()):
        if path.name not in known:
            yield printable(path.name)
    for path in sorted((folder / SHARDS).iterdir()) if (folder / SHARDS).is_dir() else []:
        # A side file of finished batches stands for its shard.
        name = f"{path.stem}.safetensors" if path.suffix == SUFFIX else path.name
        if manifest.shard_of_file(f"{SHARDS}/{name}") not in shards:
            yield printable(f"{SHARDS}/{path.name}")
