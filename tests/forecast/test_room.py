"""Disk space is needed where the files are kept, for all that is still to be written, before the teacher's hours."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from distill.experiment.file import load_experiment
from distill.forecast import room
from distill.forecast.room import Need

Free = dict[str, int]


@pytest.fixture
def disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Free:
    """Free bytes of two disks, which a test may change: whatever lies below a folder `small`, and all else."""
    free = {"large": 10**12, "small": 10**12}
    stat = Path.stat
    (tmp_path / "small").mkdir()

    def disk(path: Path) -> str:
        return "small" if "small" in Path(path).absolute().parts else "large"

    def of(path: Path, **options: bool) -> object:
        return SimpleNamespace(**{**_fields(stat(path, **options)), "st_dev": hash(disk(path))})

    monkeypatch.setattr(Path, "stat", of)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=free[disk(path)]))
    return free


def _fields(found: object) -> dict[str, object]:
    return {name: getattr(found, name) for name in dir(found) if name.startswith("st_")}


def test_each_disk_is_asked_for_what_is_to_lie_on_it(tmp_path: Path, disks: Free) -> None:
    """Two folders on one disk are added up, one on another is compared with what is free there."""
    disks |= {"large": 100, "small": 10}
    run, cache = tmp_path / "large/run", tmp_path / "small/cache"
    assert room.shortages([Need("a", run, 60), Need("b", run, 30), Need("cache", cache, 10)]) == []
    large, small = room.shortages([Need("a", run, 80), Need("b", run, 30), Need("cache", cache, 11)])
    assert large == f"disk of {run}: 110 bytes are needed (a 80 bytes, b 30 bytes), 100 bytes are free"
    assert small == f"disk of {cache}: 11 bytes are needed (cache 11 bytes), 10 bytes are free"


DISK = {"cache": 8000, "checkpoints": 600, "student": 200}
"""A forecast for two models, and 8 shards of 1000 bytes."""


def still_needed(file: str, **overrides: Any) -> dict[str, int]:
    options = [word for key, value in overrides.items() for word in (f"--{key.replace('__', '.')}", str(value))]
    return {need.what: need.bytes for need in room.needs(load_experiment(file, options), DISK, 64)}


def test_what_is_finished_needs_no_room(world: Any, tmp_path: Path) -> None:
    file, run = world.write(tmp_path / "experiment.yaml", evaluate={"control": True}), tmp_path / "run"
    models = {"student": 100, "control": 100}
    checkpoints = {"checkpoints of the student": 300, "checkpoints of the control": 300}
    assert still_needed(file) == {"cache": 9000, **models, **checkpoints}  # a shard waits beside the others
    (run / "checkpoints/student").mkdir(parents=True)
    (run / "checkpoints/student/step-00000003.ckpt").write_bytes(bytes(120))
    assert still_needed(file)["checkpoints of the student"] == 180
    (run / "student").mkdir()
    assert still_needed(file).keys() == {"cache", "control", "checkpoints of the control"}
    assert still_needed(file, cache__part="1/4") == {"cache": 3000}  # the others, and the training, are elsewhere
    assert still_needed(file, cache__devices=2)["cache"] == 10000
    assert still_needed(file, cache__max_size="4kB")["cache"] == 4500


def test_a_disk_without_room_is_refused_before_the_teacher_begins(
    world: Any, distill: Any, tmp_path: Path, disks: Free
) -> None:
    """`cache-teacher` alone asks for the room of the training that follows, too."""
    cache = tmp_path / "small/cache"
    file = world.write(tmp_path / "experiment.yaml", preflight=True, cache={"dir": str(cache)})
    for full, folder, what in (("small", cache, "cache"), ("large", tmp_path / "run", "checkpoints of the student")):
        disks |= {"large": 10**12, "small": 10**12, full: 5}
        distill("cache-teacher", file).refused(f"disk of {folder}", what, "5 bytes are free", "--preflight false")
        assert not cache.exists()
    plan = distill("plan", file)
    assert plan.status == 3 and f"does not fit on the disk of {folder}" in plan.out and "it fits" not in plan.out
