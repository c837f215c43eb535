"""Checkpoints that survive a kill or a power cut: written whole, verified before they are trusted, kept to a number."""

from __future__ import annotations

import os
import shutil
import time
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.io import CheckpointIO

from distill.errors import UserError
from distill.system import interrupt
from distill.system.files import TEMPORARY, make_folder, sync_folder
from distill.system.progress import say
from distill.system.units import size

PATTERN = "step-*.ckpt"
BEST = "best.ckpt"


class DurableCheckpoints(CheckpointIO):
    """Checkpoint files of `torch.save`: zip archives with a checksum a member, nothing but tensors and plain values."""

    def save_checkpoint(self, checkpoint: Mapping[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write all of it or nothing: temporary name, sync, rename, sync."""
        _check_plain(checkpoint.get("callbacks", {}))
        path = Path(path)
        make_folder(path.parent)
        temporary = path.with_name(path.name + TEMPORARY)
        failed: list[OSError] = []
        try:
            with temporary.open("wb") as file:
                noting: Any = _Noting(file, failed)
                torch.save(dict(checkpoint), noting)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except (OSError, RuntimeError) as error:
            temporary.unlink(missing_ok=True)
            reason = getattr(failed[0] if failed else error, "strerror", None) or "the writer failed"
            free = f"{size(shutil.disk_usage(path.parent).free)} are free"
            raise UserError(
                f"{path}: cannot be written ({reason}; {free}); the checkpoints before it are kept: make room, then "
                "run the same command again (train-student with --resume)"
            ) from None
        sync_folder(path.parent)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Load tensors and plain values only, whatever the caller says."""
        return torch.load(path, map_location=map_location or "cpu", weights_only=True)

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


class _Noting:
    """A file that notes why a write failed: torch's writer turns OSError into a RuntimeError that does not say it."""

    def __init__(self, file: BinaryIO, failed: list[OSError]) -> None:
        self._file, self._failed = file, failed

    def write(self, content: Any) -> int:
        try:
            return self._file.write(content)
        except OSError as error:
            self._failed.append(error)
            raise

    def flush(self) -> None:
        self._file.flush()


def _check_plain(states: Mapping[str, Any]) -> None:
    """Raise UserError for a callback's state that would be written and could not be read again."""
    for name, state in states.items():
        if not _is_plain(state):
            raise UserError(
                f"train.callbacks: {name}: its state_dict() holds more than tensors, numbers, text, lists and "
                "dictionaries, and a checkpoint with it could not be resumed: return these alone"
            )


def _is_plain(value: Any) -> bool:
    if type(value) in (dict, OrderedDict):
        return all(_is_plain(item) for pair in value.items() for item in pair)
    if type(value) in (list, tuple):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str, bytes, torch.Tensor, torch.nn.Parameter)


def is_whole(path: Path) -> bool:
    """Tell whether every byte of a checkpoint is as written."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile, EOFError, NotImplementedError, ValueError):
        return False


def newest(folder: Path) -> Path | None:
    """Return the newest whole checkpoint, or None if there is none at all. A message names those it passes over.

    Raises UserError if there are some and all are damaged.
    """
    found = sorted(folder.glob(PATTERN), reverse=True)
    for path in found:
        if is_whole(path):
            return path
        say(f"{path}: damaged; going back to the checkpoint before it")
    if found:
        raise UserError(f"{folder}: all checkpoints are damaged: remove them to begin anew")
    return None


class KeepCheckpoints(pl.Callback):
    """A callback that saves a checkpoint at intervals, at the end, and before a stop on request or at the deadline.

    Args:
        folder: folder of the checkpoints, `step-00000200.ckpt` and so on.
        every_steps: optimiser steps between two.
        keep: number of the newest that stay.
        deadline: `time.monotonic()` at which the training stops; None means never.
    """

    def __init__(self, folder: Path, every_steps: int, keep: int, deadline: float | None = None) -> None:
        self.folder, self.every_steps, self.keep, self.deadline = folder, every_steps, keep, deadline
        self.passed_over: set[Path] = set()
        """Damaged checkpoints. They do not count, and are removed when a later one is written."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        interrupt.retake()
        # These are newer than the checkpoint we resumed from, so they must be damaged.
        self.passed_over = {path for path in self.folder.glob(PATTERN) if path > self._path(pl_module)}
        if trainer.is_global_zero:
            for unfinished in self.folder.glob("*" + TEMPORARY):  # left by a process that was killed while it wrote
                unfinished.unlink()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Count the epoch as begun: Lightning does not, after resuming at the end of the epoch before."""
        epochs: Any = trainer.fit_loop.epoch_progress
        if epochs.current.ready <= epochs.current.processed:
            epochs.increment_ready()
            epochs.increment_started()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        late = self.deadline is not None and time.monotonic() >= self.deadline
        # A signal may have reached only some devices; all of them stop together.
        stop = trainer.strategy.reduce_boolean_decision(interrupt.asked() or late, all=False)
        if stop or pl_module.steps_begun % self.every_steps == 0:
            self._save(trainer, pl_module)
        if stop:
            if late:
                say(f"train.max_time is over at step {pl_module.steps_begun}")
            raise interrupt.Interrupted("stopped")

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._save(trainer, pl_module)

    def _save(self, trainer: pl.Trainer, module: Any) -> None:
        path = self._path(module)
        trainer.save_checkpoint(path, weights_only=False)
        self.passed_over.discard(path)
        if trainer.is_global_zero:
            there = {other for other in self.folder.glob(PATTERN) if other <= path}
            whole = sorted(there - self.passed_over)
            for old in (there & self.passed_over).union(whole[: -self.keep]):
                old.unlink()

    def _path(self, module: Any) -> Path:
        return self.folder / f"step-{module.steps_begun:08}.ckpt"
