"""`distill export`: complete and checked, or absent."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from distill.errors import UserError
from distill.recipes.export import main

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 120.0
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def run(world: Any, tmp_path: Path) -> Path:
    """A run folder with a finished student."""
    folder = tmp_path / "run"
    shutil.copytree(world.folder / "teacher", folder / "student")
    settings = {
        "student": {"class_path": "/home/somebody/secret/own.py:Own"},
        "teacher": "/home/somebody/teachers/large",
        "cache": {"sequence_length": 48},
    }
    (folder / "student/settings.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of a Hugging Face folder without the process of its own, which takes seconds to start."""
    from safetensors.torch import load

    from distill.export import alone, hf

    monkeypatch.setattr(hf, "_ask", lambda request: load(alone.look(request)))


def test_a_run_becomes_a_folder_and_says_what_was_compared(run: Path, distill: Any, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    outcome = distill("export", run, "--to", folder, "--format", "hf").done()
    assert "checked: transformers alone against distill on" in outcome.out and "is complete" in outcome.out
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "README.md"} <= names
    assert {"settings.json", "vocabulary.safetensors"}.isdisjoint(names)
    assert {path.name for path in tmp_path.iterdir()} == {"run", "out"}
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n") and 'from_pretrained("out")' in card
    assert "| teacher | large |" in card and "| made by | `own.py:Own` |" in card and "somebody" not in card
    before = {path: path.read_bytes() for path in folder.iterdir()}
    distill("export", run, "--to", folder).refused("is not empty", "replaces nothing")
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.usefixtures("in_this_process")
def test_the_report_of_the_run_is_the_card(run: Path, tmp_path: Path) -> None:
    (run / "report.md").write_text("# What was measured\n")
    assert main(str(run), str(tmp_path / "out"), "hf", "bfloat16", False) == 0
    assert (tmp_path / "out/README.md").read_text() == "# What was measured\n"
    assert main(str(run / "student"), str(tmp_path / "again"), "hf", None, False) == 0
    shutil.rmtree(tmp_path / "again")
    shutil.copytree(run / "student", tmp_path / "model")
    assert main(str(tmp_path / "model"), str(tmp_path / "again"), "hf", None, False) == 0
    assert "# again" in (tmp_path / "again/README.md").read_text(), "the report tells of the run's student alone"


@pytest.mark.usefixtures("in_this_process")
def test_a_failed_check_leaves_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill.export.hf.EXACT", -1.0)
    with pytest.raises(UserError, match=r"answers otherwise: .*largest difference of a logit \d"):
        main(str(run), str(tmp_path / "out"), "hf", None, False)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.usefixtures("in_this_process")
def test_a_full_disk_leaves_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("distill.export.hf.save_tokenizer", full)
    with pytest.raises(UserError, match=r"out: cannot be written: .*No space left"):
        main(str(run), str(tmp_path / "out"), "hf", None, False)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.usefixtures("in_this_process")
def test_a_killed_export_leaves_nothing_under_the_name(run: Path, tmp_path: Path) -> None:
    folder, growing = tmp_path / "out", tmp_path / ".out.new"
    command = [sys.executable, "-m", "distill", "export", str(run), "--to", str(folder)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + PATIENCE
        while not (growing / "model.safetensors").exists() and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    assert {path.name for path in tmp_path.iterdir()} == {"run", ".out.new"}
    assert main(str(run), str(folder), "hf", None, False) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"run", "out"}


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("hff", None, False), "--format hff: unknown; did you mean 'hf'"),
        (("hf", "float8", False), "--type float8: unknown to --format hf; did you mean 'float32'"),
        (("gguf", "q8_1", False), "--type q8_1: unknown to --format gguf; did you mean 'q8_0'"),
        (("onnx", "float16", False), "--type float16: unknown to --format onnx"),
        (("onnx", None, True), "--with_code belongs to --format hf"),
    ],
)
def test_what_there_is_not_is_refused(arguments: Any, why: str, run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=why):
        main(str(run), str(tmp_path / "out"), *arguments)
    with pytest.raises(UserError, match="holds no finished student"):
        main(str(tmp_path), str(tmp_path / "out"), "hf", None, False)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
