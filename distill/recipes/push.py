"""`distill push`: a finished cache, or a student, to a bucket or a hub, with a card."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from distill.cache.format.folder import CARD, MANIFEST
from distill.cache.reading.storage import is_url
from distill.errors import UserError
from distill.experiment.folders import cache_in, finished_model
from distill.export.card import card_of
from distill.models.saving import DESCRIPTION
from distill.system.progress import Progress, say
from distill.system.units import size
from distill.transfer.contents import Entry, card_of_cache, made, of_cache, of_model
from distill.transfer.remote import open_remote
from distill.transfer.upload import upload


def main(folder: str, to: str, public: bool = False) -> int:
    """Push what is in `folder` to the URL `to`, or go on with that. Raises UserError as `upload` does."""
    if not is_url(to):
        raise UserError(f"--to {to}: give a URL, such as s3://bucket/name, or hf://OWNER/NAME for the hub")
    if not Path(folder).is_dir():
        raise UserError(f"{folder}: no such folder")
    to = to.rstrip("/")
    remote = open_remote(to, public)
    source, entries = _contents(Path(folder), to)
    say(f"push: {source} to {to}, {len(entries)} files, {size(sum(entry.size for entry in entries))}")
    with Progress("push", sum(entry.size for entry in entries), "bytes") as progress:
        is_new = upload(entries, remote, progress.start, progress.advance)
    say(f"push: {to} is complete" if is_new else f"push: {to} has all of it already, nothing to do")
    return 0


def _contents(folder: Path, to: str) -> tuple[Path, list[Entry]]:
    """Return the folder that is meant and its files, with a card: a model, a run's student or else its cache."""
    if not (folder / MANIFEST).exists():
        if any(folder.glob("*.gguf")) or (folder / "model.onnx").is_file():
            return folder, _with_card(of_model(folder), lambda: card_of(folder, folder, _name(to), "gguf"))
        try:
            model = finished_model(folder)
        except UserError:
            if not (cache_in(folder) / MANIFEST).exists():
                raise UserError(
                    f"{folder}: holds neither a finished student nor a cache: give a run_dir, a model's folder, an "
                    "export's, or a cache's"
                ) from None
        else:
            format = "own" if (model / DESCRIPTION).is_file() else "hf"
            return model, _with_card(of_model(model), lambda: card_of(model, model, _name(to), format))
    cache = cache_in(folder)
    return cache, _with_card(of_cache(cache), lambda: card_of_cache(cache, to).encode())


def _name(to: str) -> str:
    return to.rpartition("/")[2]


def _with_card(entries: list[Entry], card: Callable[[], bytes]) -> list[Entry]:
    """Return the files with a card in front, unless one of them is one."""
    return entries if any(entry.name == CARD for entry in entries) else [made(CARD, card()), *entries]
