"""A run's folder: its JSON is whole and has no words of our own, and its student lies in it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from distill.errors import UserError
from distill.experiment.folders import Folders, finished_model, make_run_folder, write_json


def test_what_is_not_finite_is_named_and_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    write_json(path, {"kl": 1.5})
    broken = {"fidelity": {"student": {"nll": math.nan, "kl": 2.0}}, "values": [1.0, -math.inf]}
    with pytest.raises(UserError, match=r"fidelity\.student\.nll is nan, values\.1 is -inf$"):
        write_json(path, broken)
    assert json.loads(path.read_text()) == {"kl": 1.5}


def test_a_student_that_lies_elsewhere_is_not_the_runs(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/config.json").touch()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/student").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is a link out of"):
        finished_model(tmp_path / "run")
    (tmp_path / "mine").symlink_to(tmp_path / "elsewhere")
    assert finished_model(tmp_path / "mine") == tmp_path / "mine"


@pytest.mark.parametrize("name", ["costs.jsonl", "cache", "logs/student/metrics.csv", "checkpoints/student"])
def test_nothing_is_written_through_a_link_out_of_the_run(name: str, tmp_path: Path) -> None:
    """A run that was sent may have links in it, and logs are appended to files that are there."""
    run = tmp_path / "run"
    make_run_folder(Folders(run, run / "cache", run))
    (run / name).parent.mkdir(parents=True, exist_ok=True)
    (run / name).symlink_to(tmp_path / "mine")
    with pytest.raises(UserError, match="is a link out of the run folder"):
        make_run_folder(Folders(run, run / "cache", run))
    (run / name).unlink()
    (run / name).symlink_to(".")
    make_run_folder(Folders(run, run / "cache", run))
