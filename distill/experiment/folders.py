"""Folders and files of an experiment's results."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.cache.format.folder import MANIFEST
from distill.errors import UserError
from distill.experiment.configuration import Experiment
from distill.models.saving import DESCRIPTION
from distill.system.files import is_inside, write_durably
from distill.system.staging import recover


@dataclass(frozen=True)
class Folders:
    """The folders in which an experiment leaves everything that it makes."""

    run: Path
    cache: Path
    trained: Path
    """Folder of the trained models, their checkpoints and logs."""

    @classmethod
    def of(cls, experiment: Experiment) -> Folders:
        run = Path(experiment.run_dir)
        cache = Path(experiment.cache.dir) if experiment.cache.dir else run / "cache"
        return cls(run, cache, Path(experiment.train.dir) if experiment.train.dir else run)

    @classmethod
    def of_training(cls, folder: str | Path) -> Folders:
        """Return the folders of a training elsewhere, by its `run_dir` or `train.dir`."""
        return cls(Path(folder), Path(folder) / "cache", Path(folder))

    @property
    def measured(self) -> Path:
        """Folder of what is measured once for all students of a cache: beside it, or in the run if it is elsewhere."""
        is_here = self.cache.parent.is_dir()
        return self.cache.with_name(f"{self.cache.name}.measured") if is_here else self.run / "measured"

    @property
    def quantized_teacher(self) -> Path:
        """Folder of a streamed teacher's quantised copy, if the experiment names no other."""
        return self.run / "quantized-teacher"

    @property
    def evaluation(self) -> Path:
        return self.run / "evaluation.json"

    @property
    def report(self) -> Path:
        return self.run / "report.html"

    @property
    def written(self) -> Path:
        """Folder of the texts that `distill generate` writes, unless `generate.to` names another."""
        return self.run / "written"

    def model(self, role: str) -> Path:
        """Return the folder of the finished `student` or `control`."""
        return self.trained / role

    def checkpoints(self, role: str) -> Path:
        return self.trained / "checkpoints" / role

    def logs(self, role: str) -> Path:
        return self.trained / "logs" / role


def finished_model(run: str | Path) -> Path:
    """Return the finished student of a run folder, or the folder of a model itself. Raises UserError for others."""
    run = Path(run)
    for folder in (run / "student", run):
        recover(folder)
        if any((folder / name).is_file() for name in ("config.json", DESCRIPTION)):
            if not is_inside(folder, run):
                raise UserError(f"{folder}: is a link out of {run} and is not followed: name the model's own folder")
            return folder
    raise UserError(f"{run}: holds no finished student: give the run_dir of a finished training, or a model's folder")


def cache_in(folder: Path) -> Path:
    """Return the cache that lies in a run folder; for any other folder, the folder itself."""
    inner = folder / "cache"
    is_run = not (folder / MANIFEST).exists() and (inner / MANIFEST).exists()
    return inner if is_run and is_inside(inner, folder) else folder


def make_run_folder(folders: Folders) -> None:
    """Make the run folder. Raises UserError if it cannot be written, or if a link in it leads out of it."""
    for folder in {folders.run, folders.trained}:
        _check_links(folder)
    try:
        folders.run.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folders.run):  # a file without a name, of which a kill leaves nothing
            pass
    except OSError as error:
        raise UserError(f"run_dir {folders.run}: cannot be written ({error.strerror}): choose another") from None


def _check_links(run: Path) -> None:
    """Raise UserError for a link through which something would be written elsewhere. A cache is checked on opening."""
    for place, below, files in os.walk(run):
        for name in (*below, *files):
            path = Path(place, name)
            if path.is_symlink() and not is_inside(path, run):
                raise UserError(
                    f"{path}: is a link out of the run folder and is not followed: remove it"
                    + (" and give --cache.dir" if name == "cache" else "")
                )
        if Path(place) == run and "cache" in below:
            below.remove("cache")  # may hold a million shards


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content`, readable, all of it or nothing, also in a power cut.

    Raises UserError for a number that is not finite, because JSON has none.
    """
    try:
        text = json.dumps(content, indent=2, allow_nan=False)
    except ValueError:
        keys = ", ".join(_not_finite(content))
        raise UserError(f"{path}: not written, for JSON has only finite numbers: {keys}") from None
    write_durably(path, (text + "\n").encode())


def _not_finite(content: Any, key: str = "") -> Iterator[str]:
    """Yield the places in `content` where numbers are not finite: `fidelity.student.nll is nan`."""
    if isinstance(content, float) and not math.isfinite(content):
        yield f"{key} is {content}"
    if isinstance(content, (list, tuple)):
        content = dict(enumerate(content))
    if isinstance(content, dict):
        for name, value in content.items():
            yield from _not_finite(value, f"{key}.{name}" if key else str(name))
