"""The quantised copy that a streamed teacher reads: named, there already, or made at the first start."""

from __future__ import annotations

from pathlib import Path

from distill.models.checkpoints import Checkpoint
from distill.models.quantized_copy import CopyPlan, check_copy, check_room, verify_copy, wait_for_copy, write_copy
from distill.models.quantized_manifest import is_finished
from distill.system.progress import Progress, say
from distill.system.units import parse_size, size


def copy_of(checkpoint: Checkpoint, plan: CopyPlan, folder: str | None, trust_remote_code: bool) -> Path:
    """Return the folder of the quantised copy, which is made if it is not there.

    Raises ValueError where a copy is of another quantisation or type, and UserError if the disk has no room.
    """
    if checkpoint.is_copy:
        check_copy(checkpoint, plan.quantization, plan.dtype)
        return checkpoint.folder
    if folder is None:
        raise ValueError(
            f"streaming in {plan.quantization} reads a quantised copy of {checkpoint.name}: name its folder, new or "
            "made before, with teacher.options.quantized_copy, or make it with `distill quantize` and name it as model"
        )
    path = Path(folder).expanduser()
    if not is_finished(path):
        check_room(plan, path)
        say(f"teacher: a quantised copy of {checkpoint.name} is made once in {path}, {size(plan.nbytes)}")
        wait_for_copy(path, lambda: make(plan, path, trust_remote_code))
    else:
        verify_copy(plan, path, trust_remote_code)
    return path


def make(plan: CopyPlan, folder: Path, trust_remote_code: bool) -> None:
    """Write the copy, with a display of its progress."""
    with Progress("quantize", len(plan.files()), "files") as progress:
        write_copy(plan, folder, trust_remote_code, progress.advance)


def host_bytes_of(text: str | None) -> int:
    """Return the bytes of the option `host_memory`; 0 if it is not given. Raises UserError if it is no size."""
    return 0 if text is None else parse_size(text, "teacher.options.host_memory")
