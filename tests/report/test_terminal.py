"""The tables for a terminal: a dash where a figure is absent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from distill.report.terminal import print_tables


def test_what_is_not_finite_and_so_absent_is_a_dash(
    full_evaluation: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    result = full_evaluation()
    print_tables(result)
    whole = capsys.readouterr().out
    del result["fidelity"]["before"]["perplexity"]
    result["benchmarks"]["control"]["wikitext"]["metrics"] = {}
    print_tables(result)
    shown = capsys.readouterr().out
    assert whole.count("–") == 0 and shown.count("–") == 2
    (row,) = [line for line in shown.splitlines() if " before " in line]
    assert "16.318" in row and "–" in row
