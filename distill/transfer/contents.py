"""The files that are pushed: those of a finished cache or part, or of a model's folder, and a card beside them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from distill.cache.format.folder import (
    JOURNAL,
    MANIFEST,
    PART,
    SUMS,
    TOKEN_ORDER,
    TOKENIZER,
    read_journal,
    read_manifest,
)
from distill.cache.format.head import HEAD
from distill.cache.format.part import read_part
from distill.errors import UserError
from distill.system.files import TEMPORARY, is_inside, sha256_of
from distill.system.units import size
from distill.transfer.listing import BEGUN


@dataclass(frozen=True)
class Entry:
    """A file to push."""

    name: str
    """Name below the target, with slashes."""
    source: Path | bytes
    """File here, or the content itself."""
    sha256: str
    size: int


def made(name: str, content: bytes) -> Entry:
    """Return the entry of a file that is made while it is pushed."""
    return Entry(name, content, hashlib.sha256(content).hexdigest(), len(content))


def of_cache(folder: Path) -> list[Entry]:
    """Return the files of a finished cache, or of a finished part of one, the manifest last.

    The shards' hashes are the journal's. Raises UserError for a cache that is not finished, and for links out of it.
    """
    manifest, part = read_manifest(folder), read_part(folder)
    journal = read_journal(folder, manifest)
    wanted = part.shards(manifest.shards) if part else range(manifest.shards)
    if missing := sum(number not in journal or journal[number].is_dropped for number in wanted):
        raise UserError(
            f"{folder}: is not finished ({missing} of {len(wanted)} shards are missing): run `distill cache-teacher` "
            "again, then push it"
        )
    shards = [journal[number] for number in wanted]
    entries = [Entry(each.file, _checked(folder / each.file, folder), each.sha256, each.bytes) for each in shards]
    beside = [folder / name for name in (JOURNAL, PART, TOKEN_ORDER, HEAD) if (folder / name).is_file()]
    beside += sorted(path for path in (folder / TOKENIZER).rglob("*") if path.is_file())
    return [*entries, *_read(beside, folder), *_read([folder / MANIFEST], folder)]


def of_model(folder: Path) -> list[Entry]:
    """Return the files of a model's or an export's folder. Raises UserError for links out of it."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != TEMPORARY]
    paths = [path for path in paths if path.relative_to(folder).parts[0] not in (SUMS, BEGUN)]
    return list(_read(paths, folder))


def card_of_cache(folder: Path, url: str) -> str:
    """Return the card of a cache: its facts, and the ways to use it. It contains no path of this machine."""
    manifest, part = read_manifest(folder), read_part(folder)
    entries = read_journal(folder, manifest).values()
    parameters = ", ".join(f"{name} {value:g}" for name, value in manifest.scheme_parameters.items())
    rows = {
        "scheme": f"{manifest.scheme} ({parameters})" if parameters else manifest.scheme,
        "part": None if part is None else str(part),
        "training samples": f"{manifest.splits['train']:,} of {manifest.sequence_length:,} tokens",
        "held-out samples": f"{manifest.splits['held_out']:,}",
        "positions with loss": f"{sum(entry.positions for entry in entries):,}",
        "shards": f"{len(entries):,}, {size(sum(entry.bytes for entry in entries))}",
        "teacher's weights": f"sha256 {manifest.fingerprints.get('teacher_weights', '')[:16]}…",
        "teacher's type": manifest.fingerprints.get("quantization"),
    }
    table = "".join(f"| {name} | {value} |\n" for name, value in rows.items() if value)
    use = (
        f"distill merge {url} OTHER_PART … --to CACHE     # joins the parts"
        if part
        else f"distill train-student my.yaml --cache.dir {url}\n    distill pull {url} --to CACHE"
    )
    return (
        "---\ntags:\n- distillation\n---\n\n# A teacher's answers, for students to learn from\n\n"
        "A cache of `distill`: token ids and sparse targets. It holds the text that the teacher read.\n\n"
        f"| | |\n|---|---|\n{table}\n    {use}\n\n"
        "## Licence\n\nFor the publisher to name: the teacher's applies, and that of the text.\n"
    )


def _read(paths: Iterable[Path], folder: Path) -> Iterator[Entry]:
    for path in paths:
        _checked(path, folder)
        yield Entry(path.relative_to(folder).as_posix(), path, sha256_of(path), path.stat().st_size)


def _checked(path: Path, folder: Path) -> Path:
    if not path.is_file():
        raise UserError(f"{path}: is missing: run `distill inspect {folder} --verify`")
    if path.is_symlink() and not is_inside(path, folder):
        raise UserError(f"{path}: is a link out of the folder and is not followed: copy the file there")
    return path
