"""`distill quantize`: a checkpoint quantised once, layer by layer, into a folder that teachers read."""

from __future__ import annotations

import time
from pathlib import Path

from distill.errors import UserError
from distill.models.checkpoints import resolve
from distill.models.devices import DTYPES
from distill.models.quantized_copy import CopyPlan, check_room, write_copy
from distill.system import interrupt
from distill.system.progress import Progress, say
from distill.system.quiet import quiet_for_good
from distill.system.units import duration, size


def main(
    model: str, to: str, quantization: str, compute_dtype: str, revision: str | None, trust: bool, allow: bool
) -> int:
    """Write the copy, or the rest of one that was begun. Raises UserError if the disk has no room for it."""
    began, folder = time.monotonic(), Path(to).expanduser()
    quiet_for_good("bitsandbytes")
    checkpoint = resolve(model, revision, trust)
    if checkpoint.folder.resolve() == folder.resolve():
        raise UserError(f"{to}: is the checkpoint itself: name a new folder")
    try:
        plan = CopyPlan(checkpoint, quantization, DTYPES[compute_dtype], trust, allow)
    except ValueError as error:
        raise UserError(str(error)) from None
    check_room(plan, folder)
    with Progress("quantize", len(plan.files()), "files") as progress:

        def advance(amount: int) -> None:
            progress.advance(amount)
            interrupt.stop_if_asked()

        with interrupt.deferred():
            manifest = write_copy(plan, folder, trust, advance)
    written = sum((folder / name).stat().st_size for name in manifest.files)
    say(
        f"quantize: {folder} is complete, {size(written)} in {manifest.as_it_is}, for {compute_dtype}, in "
        f"{duration(time.monotonic() - began)}"
    )
    return 0
