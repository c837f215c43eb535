"""The way to a bucket or a hub: a list of all files first, the files, and the list's own name last."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from distill.cache.format.folder import SUMS
from distill.errors import UserError
from distill.system.files import sha256_of
from distill.transfer import listing
from distill.transfer.contents import Entry, made
from distill.transfer.listing import BEGUN, MOST_BYTES
from distill.transfer.remote import Remote

_ANOTHER = "nothing there was changed: give another --to"


def upload(
    entries: Sequence[Entry], remote: Remote, began: Callable[[int], None], advance: Callable[[int], None]
) -> bool:
    """Write the files to a place that has none yet, or a beginning of the same. Returns False if all is there already.

    A file counts as there by its size. `began` receives the bytes that are there already, `advance` those of each
    file. Raises UserError for a place that holds anything else, and for a file that is not what its hash says.
    """
    content = listing.encode({entry.name: entry.sha256 for entry in entries})
    there = remote.sizes()
    if SUMS in there:
        if _read(remote, SUMS, there) == content:
            return False
        raise UserError(f"{remote.name}: holds something else that was pushed there: {_ANOTHER}")
    if BEGUN not in there:
        if there:
            raise UserError(f"{remote.name}: is not empty ({min(there)} is there): {_ANOTHER}")
        remote.put([made(BEGUN, content)], lambda _: None)
    elif _read(remote, BEGUN, there) != content:
        raise UserError(f"{remote.name}: the beginning of another push is there: {_ANOTHER}")
    wanted = [entry for entry in entries if there.get(entry.name) != entry.size]
    began(sum(entry.size for entry in entries) - sum(entry.size for entry in wanted))
    remote.put((_whole(entry) for entry in wanted), lambda entry: advance(entry.size))
    there = remote.sizes()
    wrong = [entry.name for entry in entries if there.get(entry.name) != entry.size]
    if wrong:
        raise UserError(f"{remote.name}: {wrong[0]} did not arrive whole: run the same command again")
    remote.put([made(SUMS, content)], lambda _: None)
    remote.remove(BEGUN)
    return True


def _whole(entry: Entry) -> Entry:
    """Return the entry, whose file has been read: a damaged one is not spread."""
    if isinstance(entry.source, Path) and (found := sha256_of(entry.source)) != entry.sha256:
        raise UserError(
            f"{entry.source}: has changed (expected sha256 {entry.sha256[:12]}…, found {found[:12]}…): of a cache, "
            "`distill inspect CACHE --verify` says what to do"
        )
    return entry


def _read(remote: Remote, name: str, there: dict[str, int]) -> bytes:
    if there[name] > MOST_BYTES:
        raise UserError(f"{remote.name}: {name} is too large for a list of files")
    with remote.open(name) as file:
        return file.read(MOST_BYTES + 1)
