"""The notebook runs from its first cell to its last, on a small experiment, and again after its session's end."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest
from traitlets.config import Config

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "configs" / "notebook.ipynb"
UNWANTED = ("Downloading", "Traceback", "Warning")
"""Words that a reader of the cells should not see."""


def executed(folder: Path, settings: str) -> Any:
    """Return the notebook, run in `folder` with its settings' cell replaced, as a new kernel."""
    notebook = nbformat.read(FILE, as_version=4)
    (cell,) = [cell for cell in notebook.cells if cell.cell_type == "code" and "EXPERIMENT =" in cell.source]
    cell.source = settings
    # The kernel is spoken to through files, in a folder whose name is short enough for a socket: no network is needed.
    with tempfile.TemporaryDirectory() as short, pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_RUNTIME_DIR", short)
        files = Config(ConnectionFileMixin={"transport": "ipc", "ip": f"{short}/kernel"})
        client = nbclient.NotebookClient(
            notebook, timeout=240, startup_timeout=240, kernel_name="python3", config=files
        )
        return client.execute(cwd=str(folder))


def shown(cell: Any) -> str:
    """Return everything that a cell shows as text."""
    texts = [output.get("text", "") or output.get("data", {}).get("text/plain", "") for output in cell.outputs]
    return "\n".join(texts)


def test_it_runs_to_the_report_and_a_second_session_finds_all_done(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    changes = {"train.max_steps": 2, "evaluate.max_samples": 4, "evaluate.control": True}
    file = world.write(tmp_path / "small.yaml")
    settings = f"SOURCE = '.'\nEXPERIMENT = {str(file)!r}\nCHANGES = {changes!r}\nCARD = None"
    notebook = executed(tmp_path, settings)
    text = "\n".join(shown(cell) for cell in notebook.cells if cell.cell_type == "code")
    assert not [words for words in UNWANTED if words in text], text
    assert "it fits" in text
    kl = json.loads((tmp_path / "run" / "evaluation.json").read_text())["fidelity"]["student"]["kl"]
    frames = [
        output.data["text/html"]
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if "text/html" in output.get("data", {})
    ]
    assert any(f"{kl:.3f}" in frame for frame in frames if "<iframe" in frame), "the report is shown in the notebook"

    before = (tmp_path / "run" / "evaluation.json").read_bytes()
    again = executed(tmp_path, settings)
    (run,) = [cell for cell in again.cells if "distill.run(" in cell.source]
    assert "nothing to do" in shown(run) or "is complete" in shown(run), shown(run)
    assert (tmp_path / "run" / "evaluation.json").read_bytes() == before


def test_what_is_published_has_no_outputs_and_says_what_a_t4_needs() -> None:
    notebook = nbformat.read(FILE, as_version=4)
    nbformat.validate(notebook)
    assert [cell for cell in notebook.cells if cell.get("outputs")] == []
    assert "configs/smollm2-1.7b-to-360m-t4.yaml" in FILE.read_text(encoding="utf-8")
