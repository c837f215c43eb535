"""Disk space is needed where the files are kept."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from distill.forecast import sizes


def test_each_disk_is_asked_for_what_is_to_lie_on_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two folders on one disk are added up, one on another is compared with what is free there."""
    free = {"large": 100, "small": 10}
    stat = Path.stat
    (tmp_path / "large").mkdir()
    (tmp_path / "small").mkdir()

    def disk(path: Path) -> str:
        return "small" if "small" in path.parts else "large"

    def of(path: Path, **options: bool) -> object:
        return SimpleNamespace(**{**_fields(stat(path, **options)), "st_dev": hash(disk(path))})

    monkeypatch.setattr(Path, "stat", of)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=free[disk(Path(path))]))
    run, cache = tmp_path / "large/run", tmp_path / "small/cache"
    assert sizes.disk_notes({"checkpoints": (run, 60), "student": (run, 30), "cache": (cache, 10)}) == []
    notes = sizes.disk_notes({"checkpoints": (run, 80), "student": (run, 30), "cache": (cache, 11)})
    assert [note.split(", where ")[0].split(" for ")[1] for note in notes] == [str(run), str(cache)]
    assert "110" in notes[0] and "11" in notes[1]


def _fields(found: object) -> dict[str, object]:
    return {name: getattr(found, name) for name in dir(found) if name.startswith("st_")}
