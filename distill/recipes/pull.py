"""`distill pull`: what `distill push` brought to a bucket or a hub, into a new folder."""

from __future__ import annotations

from pathlib import Path

from distill.cache.format.folder import MANIFEST
from distill.cache.reading.storage import is_url
from distill.errors import UserError
from distill.system.locks import cannot_write
from distill.system.progress import Progress, say
from distill.system.units import size
from distill.transfer.download import download
from distill.transfer.remote import open_remote


def main(url: str, to: str) -> int:
    """Copy what is at `url` into the new folder `to`, or go on with that. Raises UserError as `download` does."""
    if not is_url(url):
        raise UserError(f"{url}: give a URL, such as s3://bucket/name, or hf://OWNER/NAME for the hub")
    folder, url = Path(to).absolute(), url.rstrip("/")
    remote = open_remote(url)
    with Progress("pull", 0, "bytes") as progress:

        def began(total: int, done: int) -> None:
            say(f"pull: {url} to {to}, {size(total)}")
            progress.total = total
            progress.start(done)

        try:
            download(remote, folder, began, progress.advance)
        except OSError as error:
            raise cannot_write(folder, error, what="copy", option="--to") from None
    use = f"--cache.dir {to} reads it" if (folder / MANIFEST).exists() else f"distill chat {to}"
    say(f"pull: {to} is complete, every file as it was pushed ({use})")
    return 0
