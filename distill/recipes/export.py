"""`distill export`: a finished student in a format that others open, checked before it gets its name."""

from __future__ import annotations

import time
from pathlib import Path

from safetensors import SafetensorError

from distill.errors import UserError
from distill.experiment.folders import finished_model
from distill.export.card import write_card
from distill.export.format import find_format
from distill.system.progress import say
from distill.system.staging import new_folder
from distill.system.units import duration, size


def main(run: str, to: str, format: str, type: str | None, with_code: bool, class_path: str | None = None) -> int:
    """Write the student of `run` (a run folder, or a model's) to the folder `to`, which is complete or absent.

    Raises UserError for a student that the format cannot hold, and for an export that a check found to differ.
    """
    began = time.monotonic()
    form = find_format(format, type, with_code, class_path)
    source, folder = finished_model(run).resolve(), Path(to).expanduser().resolve()
    try:
        with new_folder(folder) as new:
            say(f"export: {source} as {format}" + (f" ({type})" if type else ""))
            form.write(source, new)
            checked = form.check(source, new)
            say(f"checked: {checked}")
            write_card(source, new, folder.name, format, checked)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{to}: cannot be written: {error}") from None
    written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    say(f"export: {folder} is complete, {size(written)}, in {duration(time.monotonic() - began)}")
    return 0
