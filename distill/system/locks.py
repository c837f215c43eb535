"""One writer of a cache at a time, and messages for failed writes."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from distill.errors import UserError
from distill.system import files
from distill.system.units import size


@contextlib.contextmanager
def sole_writer(folder: Path, what: str = "cache", option: str = "--cache.dir") -> Iterator[None]:
    """Keep other writers out of a folder, which is made if missing. A process that dies leaves no lock behind.

    `what` is written there, and `option` names the folder. Raises UserError while another process holds it, and if it
    cannot be made.
    """
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(files.sole_writer(folder))
        except OSError as error:
            raise cannot_write(folder, error, what=what, option=option) from None
        yield


def cannot_write(
    folder: Path, error: OSError, needed: int | None = None, what: str = "cache", option: str = "--cache.dir"
) -> UserError:
    """Return the error of a failed write as a message. `needed` is the approximate number of bytes still to come."""
    reason = error.strerror or str(error)
    again = "then run the same command again"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        room = f"about {size(needed)}" if needed else "room"
        return UserError(
            f"{folder}: disk full ({reason}); everything finished so far is kept: free {room}, "
            f"or move the folder and point {option} to it, {again}"
        )
    return UserError(
        f"{folder}: cannot write the {what} here ({reason}); what was finished before is kept: "
        f"mend that, or point {option} elsewhere, {again}"
    )
