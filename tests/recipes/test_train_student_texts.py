"""Sample texts while the student trains: in the log, the loggers and the report, and without a trace in the weights."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from lightning.pytorch.plugins.precision import Precision
from safetensors.torch import load_file

from distill.report.page import write_report
from distill.training.texts import WriteTexts

SHORT = ["--train.max_steps", "5", "--evaluate.texts", "2", "--evaluate.text_tokens", "6"]


def looks(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "logs/student/texts.jsonl").read_text().splitlines()]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "student/model.safetensors")


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_texts_come_and_the_weights_are_as_without_them(train: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(*SHORT).done()
    without = weights(run)
    shutil.rmtree(run)

    asking = [*SHORT, "--train.texts_every_steps", "2", "--train.checkpoint_every_steps", "3"]
    said = train(*asking).done().out
    assert same(weights(run), without)
    found = looks(run)
    assert [line["step"] for line in found] == [2, 4, 5], "at intervals and at the end"
    assert all(line["prompts"] == found[0]["prompts"] and len(line["texts"]) == 2 for line in found)
    assert len(set(found[0]["prompts"])) == 2, "of different documents"
    assert sum(line.lstrip().startswith("step 4: ") and " ▸ " in line for line in said.splitlines()) == 2

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    seen = EventAccumulator(str(run / "logs/student")).Reload()
    assert [event.step for event in seen.Tensors("text 2/text_summary")] == [2, 4, 5]

    page = write_report(run)[0].read_text()
    assert "What they wrote while they learned" in page and "student, step 4" in page

    # Gone on with from step 3, as if killed at its end: the texts of steps 4 and 5 come again, and count once.
    shutil.rmtree(run / "student")
    (run / "checkpoints/student/step-00000005.ckpt").unlink()
    train(*asking, "--resume").done()
    assert same(weights(run), without)
    assert looks(run) == [*found, *found[1:]]
    assert write_report(run)[0].read_text().count("student, step 4") == 2, "once for each prompt"


def test_without_prompts_it_is_refused_before_anything(train: Any, finished: Any, distill: Any, tmp_path: Path) -> None:
    asked = ["--train.texts_every_steps", "2"]
    train(*asked, "--evaluate.texts", "0").refused("train.texts_every_steps: evaluate.texts is 0")
    none = ["--run_dir", tmp_path / "other", "--cache.held_out_samples", "0"]
    distill("run", finished.file, *none, *asked).refused("train.texts_every_steps: cache.held_out_samples is 0")
    assert not (tmp_path / "other/cache").exists()


class Careless(torch.nn.Module):
    """A student that draws random numbers where it should not, with a part that never trains."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = torch.nn.Dropout().eval()

    def write(self) -> list[str]:
        assert not self.training
        return [f"{torch.rand(())} {random.random()} {np.random.rand()}"]


def test_neither_random_states_nor_modes_show_that_texts_were_written(tmp_path: Path) -> None:
    student = Careless()
    trainer: Any = SimpleNamespace(is_global_zero=True, precision_plugin=Precision(), loggers=[])
    module: Any = SimpleNamespace(student=student, steps_begun=1)
    draws = []
    for is_written in (False, True):
        torch.manual_seed(0), random.seed(0), np.random.seed(0)
        if is_written:
            WriteTexts(["p"], lambda one: one.write(), tmp_path / "texts.jsonl", 1).on_train_end(trainer, module)
        draws.append((float(torch.rand(())), random.random(), np.random.rand()))
    assert draws[0] == draws[1]
    assert student.training and not student.frozen.training
