"""JSON files of a run are JSON: whole, and without words that other readers do not know."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from distill.errors import UserError
from distill.experiment.folders import write_json


def test_what_is_not_finite_is_named_and_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    write_json(path, {"kl": 1.5})
    broken = {"fidelity": {"student": {"nll": math.nan, "kl": 2.0}}, "values": [1.0, -math.inf]}
    with pytest.raises(UserError, match=r"fidelity\.student\.nll is nan, values\.1 is -inf$"):
        write_json(path, broken)
    assert json.loads(path.read_text()) == {"kl": 1.5}
