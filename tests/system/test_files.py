"""One writer of a folder at a time; names without the folders of a machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from distill.errors import UserError
from distill.system.files import last_part, sole_writer, without_folders

HOLDS = """
import sys
from pathlib import Path
from distill.system.files import sole_writer
with sole_writer(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.skipif(os.name == "nt", reason="no file locks there")
def test_a_second_writer_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    command = [sys.executable, "-c", HOLDS, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=r"new/folder: another process is writing here"), sole_writer(folder):
            pass
        process.kill()
    with sole_writer(folder):
        assert list(folder.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError), sole_writer(tmp_path / "file" / "folder"):
        pass


@pytest.mark.skipif(os.name == "nt", reason="no file locks there")
def test_a_child_does_not_keep_the_lock_of_a_parent_that_was_killed(tmp_path: Path) -> None:
    code = (
        "import os, sys, time\nfrom pathlib import Path\nfrom distill.system.files import sole_writer\n"
        "with sole_writer(Path(sys.argv[1])):\n    if os.fork():\n        os.kill(os.getpid(), 9)\n"
        "    print(os.getpid(), flush=True)\n    time.sleep(600)"
    )
    done = subprocess.Popen([sys.executable, "-c", code, tmp_path / "folder"], stdout=subprocess.PIPE, text=True)
    assert done.stdout is not None
    child = int(done.stdout.readline())
    try:
        done.wait(60)
        with sole_writer(tmp_path / "folder"):
            pass
    finally:
        os.kill(child, 9)
        done.stdout.close()


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/home/me/model", "model"),
        ("/home/me/model/", "model"),
        ("~/models/large", "large"),
        ("~me/own.py:Own", "own.py:Own"),
        ("file:///home/me/cache", "cache"),
        ("C:\\Users\\me\\model", "model"),
        ("C:/Users/me/model", "model"),
        ("\\\\server\\share\\me\\model", "model"),
        *(
            (same, same)
            for same in ("data/sotu.jsonl", "org/model", "s3://bucket/cache", "../a/own.py:Own", "a:b", "/", "")
        ),
    ],
)
def test_only_paths_of_a_machine_lose_their_folders(path: str, name: str) -> None:
    assert without_folders(path) == name


def test_the_last_part_of_a_relative_path() -> None:
    assert [last_part(path) for path in ("../a/own.py:Own", "a\\b", "model", "")] == ["own.py:Own", "b", "model", ""]
