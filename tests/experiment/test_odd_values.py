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
    """About one case in two hundred; the benchmark tries all."""
    fuzz, cases = FUZZ.Fuzz(tmp_path), ALL[first * 199 :: 797]
    assert len(cases) > 20
    wrong = {str(case): found for case in cases if (found := fuzz.run(case)[0]) not in FUZZ.FINE}
    assert not wrong


@pytest.mark.parametrize("name", [name for name in FUZZ.WHOLE if name != "many values"])  # which takes seconds
def test_odd_files_are_refused_or_mean_what_they_seem_to(name: str, tmp_path: Path) -> None:
    found, _ = FUZZ.Fuzz(tmp_path).run(FUZZ.Case("", name, FUZZ.WHOLE[name], "whole"))
    assert found in ("taken", "refused")


@pytest.mark.parametrize("key", ["train.epochs", "corpus.name"])
def test_values_as_they_are_written(key: str, tmp_path: Path) -> None:
    """A date is text, `"null"` no missing value, 1e3 a number or a name; sets and binary data are none of these."""
    fuzz = FUZZ.Fuzz(tmp_path)
    cases = [case for case in ALL if case.key == key and case.how == "raw"]
    wrong = {case.name: found for case in cases if (found := fuzz.run(case)[0]) not in FUZZ.FINE}
    assert len(cases) > 60 and not wrong


def test_a_value_of_another_meaning_would_be_found() -> None:
    case = FUZZ.Case("train.epochs", "3", 3)
    assert FUZZ._means(case, 3) and not FUZZ._means(case, 4) and not FUZZ._means(case, "3")
    for given, held in ((None, 1), (True, 1), (0.5, 0), ("null", "none"), ([1], 1)):
        assert not FUZZ._means(FUZZ.Case("train.epochs", "", given), held)
    assert not FUZZ._means(FUZZ.Case("corpus.name", '"null"', ("null",), "raw"), None)
