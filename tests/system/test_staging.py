"""A new folder is complete or absent, and replaces nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distill.errors import UserError
from distill.system.staging import new_folder, recover, replaced_folder


def test_it_has_its_name_when_all_is_done(tmp_path: Path) -> None:
    folder = tmp_path / "below" / "out"
    with new_folder(folder) as new:
        (new / "part").mkdir()
        (new / "part/file").write_text("x")
        os.chmod(new / "part/file", 0o600)
        assert not folder.exists()
    assert [path.name for path in folder.parent.iterdir()] == ["out"]
    assert (folder / "part/file").read_text() == "x"
    assert (folder / "part/file").stat().st_mode & 0o777 == folder.stat().st_mode & 0o666


@pytest.mark.parametrize("error", [UserError("differs"), KeyboardInterrupt()])
def test_what_fails_leaves_nothing(error: BaseException, tmp_path: Path) -> None:
    with pytest.raises(type(error)), new_folder(tmp_path / "out") as new:
        (new / "file").touch()
        raise error
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_taken_and_any_other_refused(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    with new_folder(folder) as new:
        (new / "file").write_text("mine")
    with pytest.raises(UserError, match="is not empty, and an export replaces nothing"), new_folder(folder):
        pytest.fail("entered")
    with pytest.raises(UserError, match="is a file"), new_folder(folder / "file"):
        pytest.fail("entered")
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (folder / "file").read_text() == "mine"


def test_what_appeared_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not empty"), new_folder(tmp_path / "out"):
        (tmp_path / "out").mkdir()
        (tmp_path / "out/theirs").touch()
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["out", "out/theirs"]


FILL = """
import sys
from pathlib import Path
from typing import Any
from distill.system.staging import new_folder, recover, replaced_folder

with new_folder(Path(sys.argv[1])) as new:
    (new / "half").mkdir()
    (new / "half/written").touch()
    print("writing", flush=True)
    sys.stdin.read()
"""


@pytest.mark.skipif(os.name == "nt", reason="no file locks there")
def test_a_killed_process_leaves_no_name_and_its_remains_go(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    command = [sys.executable, "-c", FILL, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        with pytest.raises(UserError, match="another process is writing"), new_folder(folder):
            pytest.fail("entered")
        process.send_signal(signal.SIGKILL)
    assert [path.name for path in tmp_path.iterdir()] == [".out.new"]
    with new_folder(folder) as new:
        assert list(new.iterdir()) == []
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("way", [new_folder, replaced_folder])
def test_a_link_in_the_place_of_the_growing_folder_is_not_followed(way: Any, tmp_path: Path) -> None:
    """Whoever sends a folder could send it along, and what it leads to would be emptied."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis").touch()
    for name in (".out.new", ".out.old"):
        (tmp_path / name).symlink_to(tmp_path / "mine")
    with way(tmp_path / "out") as new:
        (new / "file").touch()
    recover(tmp_path / "other")
    assert (tmp_path / "mine/thesis").exists() and (tmp_path / "out/file").exists()
