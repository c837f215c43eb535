"""Importances of a teacher kept in files: measured once for all students that are cut out of it on the same samples."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from distill.models.checkpoints import Checkpoint, weight_files
from students.pruning_importance import Importance, Samples, Wanted

VERSION = 2
"""Part of a file's name. Raise it when the same samples give other importances."""
_DIGEST = "sha256"


def kept_importance(
    folder: str | None,
    checkpoint: Checkpoint,
    samples: Samples,
    wanted: Wanted,
    measure: Callable[[Wanted], Importance],
) -> Importance:
    """Return the importances that are `wanted`, from a file in `folder` if it has them all; else measure and keep them.

    The file is that of the checkpoint's weights (names, sizes, times of change) and of the samples. One that is damaged
    is measured again, and one that cannot be written is not missed. Without a `folder` nothing is kept.
    """
    if folder is None:
        return measure(wanted)
    file = Path(folder) / f"importance-{_key(checkpoint, samples)}.safetensors"
    known = _read(file)
    if not all(name in known for name in _names(wanted)):
        # Widths cost next to nothing beside the pass itself, so a first measurement has them for all later students.
        depth = wanted.depth or _tensor("depth") in known
        asked = Wanted(depth=depth, hidden=True, groups=True, neurons=True, experts=True)
        found = measure(asked)
        known = {name: getattr(found, name) for name in _names(asked)}
        _write(file, known)
    return Importance(**{name: known[name] for name in _names(wanted)})


def _tensor(what: str) -> str:
    """Return the field of `Importance` that holds what a field of `Wanted` asks for."""
    return next(one.name for one in fields(Importance) if one.name.rpartition("_")[0] == what)


def _names(wanted: Wanted) -> list[str]:
    return [_tensor(one.name) for one in fields(Wanted) if getattr(wanted, one.name)]


def _key(checkpoint: Checkpoint, samples: Samples) -> str:
    files = [checkpoint.path] if checkpoint.gguf_file is not None else weight_files(checkpoint)
    digest = hashlib.sha256(str(VERSION).encode())
    for file in files:
        facts = file.stat()
        digest.update(f"{file.name} {facts.st_size} {facts.st_mtime_ns}\n".encode())
    for tensor in (samples.input_ids_BL, samples.position_ids_BL, samples.counted_BL):
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()[:16]


def _read(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a file; none if it is missing or damaged."""
    try:
        with safe_open(file, framework="pt") as opened:
            found = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            return found if (opened.metadata() or {}).get(_DIGEST) == _digest(found) else {}
    except (OSError, SafetensorError):
        return {}


def _write(file: Path, tensors: dict[str, Tensor]) -> None:
    new = file.with_name(f"{file.name}.{os.getpid()}.new")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, new, {_DIGEST: _digest(tensors)})
        os.replace(new, file)
    except (OSError, SafetensorError):
        with contextlib.suppress(OSError):
            new.unlink()


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
