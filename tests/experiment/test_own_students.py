"""A stranger's student that breaks the contract is refused in one line, which names the line of theirs that failed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from distill import plugins
from distill.errors import UserError
from distill.experiment.checks import check_model

V = 50


def _grid() -> ModuleType:
    path = Path(__file__).resolve().parents[1] / "benchmarks" / "own_student_faults.py"
    spec = importlib.util.spec_from_file_location("own_student_faults", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


GRID: Any = _grid()
CASES = [*GRID.single_faults(), *GRID.random_faults(20, seed=1)]


def make(source: str, folder: Path) -> None:
    """Make a student and check it as a command does before it trains it."""
    (folder / "own.py").write_text(source)
    model = plugins.build(f"{folder}/own.py:Student", "student", {}, {"vocab_size": V})
    check_model(model, "student own.py:Student", V, True, trains=True)


@pytest.mark.usefixtures("no_traces", "one_thread")
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.constructor}-{case.head}-{case.body}")
def test_only_the_sound_are_accepted(case: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    if case.is_sound:
        make(case.source(), tmp_path)
        return
    with pytest.raises(UserError) as refused:
        make(case.source(), tmp_path)
    assert len(str(refused.value).splitlines()) == 1
    assert "own.py:Student" in str(refused.value) or "own.py" in str(refused.value)


FAILING = {
    "division": GRID.Case(constructor="division"),
    "import raises": GRID.Case(constructor="import raises"),
    "head": GRID.Case(head="ValueError"),
    "body": GRID.Case(body="sizes"),
    "exit": GRID.Case(body="exit"),
}


@pytest.mark.usefixtures("no_traces")
@pytest.mark.parametrize("name", FAILING)
def test_the_line_of_theirs_is_named(name: str, tmp_path: Path) -> None:
    source = FAILING[name].source()
    with pytest.raises(UserError) as refused:
        make(source, tmp_path)
    words = {
        "division": "size / 0",
        "import raises": "raise RuntimeError('not today')",
        "head": "raise ValueError('no head today')",
        "body": "return self.mix(x[..., :3])",
        "exit": "sys.exit(2)",
    }[name]
    lines = source.splitlines()
    (number,) = [index for index, line in enumerate(lines, start=1) if line.strip() == words]
    assert f"(own.py, line {number})" in str(refused.value)


def test_arguments_that_do_not_fit_name_the_method(tmp_path: Path) -> None:
    source = GRID.Case(body="one argument").source()
    (number,) = [index for index, line in enumerate(source.splitlines(), start=1) if "def body" in line]
    with pytest.raises(UserError, match=rf"body failed: TypeError: .* \(own.py, line {number}\)"):
        make(source, tmp_path)
