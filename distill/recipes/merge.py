"""`distill merge`: parts of a cache, made anywhere, become one cache."""

from __future__ import annotations

from pathlib import Path

from distill.cache.making.parts import merge, whose_shards
from distill.cache.reading.storage import is_url, open_storage
from distill.errors import UserError
from distill.experiment.folders import cache_in
from distill.system import interrupt
from distill.system.locks import cannot_write, sole_writer
from distill.system.progress import Progress, say
from distill.system.units import size


def main(parts: list[str], to: str) -> int:
    """Check that the parts are those of one cache, copy their shards, and check each one's hash."""
    if is_url(to):
        raise UserError(f"{to}: parts are joined in a local folder; copy the cache there when it is finished")
    for part in parts:
        if not is_url(part) and not Path(part).is_dir():
            raise UserError(f"{part}: no such folder")
    storages = [open_storage(part if is_url(part) else cache_in(Path(part))) for part in parts]
    folder = Path(to)
    owners = whose_shards(storages)
    total = sum(entry.bytes for _, entry in owners.values())
    try:
        with sole_writer(folder), Progress("merge", total, "bytes") as progress:

            def advance(amount: int) -> None:
                interrupt.stop_if_asked()
                progress.advance(amount)

            with interrupt.deferred():
                merge(storages, folder, advance)
    except OSError as error:
        raise cannot_write(folder, error, total) from None
    say(f"cache: {folder} is complete, {size(total)} in {len(owners)} shards")
    return 0
