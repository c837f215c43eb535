"""Odd values of every key are refused in one line, or mean what they seem to."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest


def _fuzz() -> Any:
    path = Path(__file__).resolve().parents[1] / "benchmarks" / "experiment_keys.py"
    spec = importlib.util.spec_from_file_location("experiment_keys", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


FUZZ = _fuzz()
ALL = FUZZ.all_cases()


@pytest.mark.parametrize("first", range(4))
def test_odd_values_are_refused_or_mean_what_they_seem_to(first: int, tmp_path: Path) -> None:
    """About one case in fifty; the benchmark tries all."""
    cases = ALL[first * 53 :: 211]
    assert len(cases) > 30
    wrong = {str(case): found for case in cases if (found := FUZZ.run(case, tmp_path)) not in FUZZ.FINE}
    assert not wrong


def test_a_value_of_another_meaning_would_be_found() -> None:
    case = FUZZ.Case("train.epochs", "3")
    assert FUZZ._means(3, 3, case) and not FUZZ._means(3, 4, case)
    assert not FUZZ._means(None, 1, case) and not FUZZ._means(True, 1, case) and not FUZZ._means(0.5, 0, case)
