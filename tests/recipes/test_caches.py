"""`train.caches`: a student of several caches, resumed and refused as one of a single cache is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from distill.experiment.file import load_experiment
from distill.forecast.sizes import amount_of


def test_a_student_learns_from_several_caches(finished: Any, distill: Any, tmp_path: Path) -> None:
    other = tmp_path / "other"
    distill("cache-teacher", finished.file, "--corpus.seed", 1, "--cache.max_samples", 6, "--cache.dir", other).done()
    few = ["--evaluate.control", "false", "--train.max_steps", 4, "--train.checkpoint_every_steps", 2]

    def train(run: str, weight: float, *arguments: object) -> Any:
        caches = json.dumps({str(finished.cache): 1, str(other): weight})
        own = ["--run_dir", tmp_path / run, "--train.caches", caches, *few, *arguments]
        return distill("train-student", finished.file, *own)

    train("whole", 1).done()
    train("whole", 1).done()
    train("whole", 2).refused("trained with other settings", "caches.1")
    train("halves", 1, "--train.max_time", "0s")
    train("halves", 1, "--resume").done()
    whole, halves = (load_file(tmp_path / run / "student/model.safetensors") for run in ("whole", "halves"))
    assert all(torch.equal(whole[name], halves[name]) for name in whole)
    train("none", 0).refused("train.caches", "weighs 0, as only the first")
    train("nowhere", 1, "--train.caches", json.dumps({str(tmp_path / "nowhere"): 1})).refused("nowhere")
    caches = json.dumps({str(finished.cache): 1, str(other): 1})
    experiment = load_experiment(finished.file, ["--train.caches", caches])
    splits = json.loads((finished.cache / "manifest.json").read_text())["splits"]
    assert amount_of(experiment, []).train == splits["train"] + 6, "for the forecast"


def test_caches_of_another_scheme_are_refused(finished: Any, distill: Any, tmp_path: Path) -> None:
    other = tmp_path / "other"
    own = ["--cache.scheme", "top_k", "--cache.max_samples", 6, "--cache.dir", other]
    distill("cache-teacher", finished.file, *own).done()
    caches = json.dumps({str(finished.cache): 1, str(other): 1})
    refused = distill("train-student", finished.file, "--run_dir", tmp_path / "run", "--train.caches", caches)
    refused.refused("cannot be mixed", "scheme: top_k, not varopt")
