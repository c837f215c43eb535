"""Errors that training or evaluation would raise on settings alone come before the teacher's hours."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from distill.experiment.file import load_experiment
from distill.forecast.room import needs

ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "a size that no student has": ({"student.options": {}}, "student.search: no student of"),
    "an option that is not there": ({"student.options": {"lairs": 2}}, "did you mean 'layers'?"),
    "more layers than the teacher has": ({"student.options": {"layers": 9}}, "student pruned: "),
    "a class that is not there": ({"student.class_path": "compakt"}, "did you mean 'compact'?"),
    "a file that is not there": ({"student.class_path": "mine.py:Own", "student.options": {}}, "no file 'mine.py'"),
    "heads that do not divide": (
        {"student.class_path": "compact", "student.options": {"hidden_size": 10, "heads": 3}},
        "student compact: ",
    ),
    "a divergence that the scheme lacks": ({"loss.divergence": "jsd"}, "loss.divergence: jsd"),
    "a divergence that is always 0": (
        {"loss.divergence": "jsd", "loss.beta": 1.0, "cache.scheme": "hidden"},
        "loss.beta: 1",
    ),
    "features without hidden states": ({"loss.feature_weight": 1.0}, "loss.feature_weight"),
    "nothing to stop early by": ({"train.early_stopping": 2, "cache.held_out_samples": 0}, "train.early_stopping"),
    "rounding without such weights": ({"train.rounding": "kahan"}, "train.rounding"),
    "one device to share the student over": ({"train.strategy": "fsdp"}, "train.strategy"),
    "a step in the backward pass and clipping": ({"train.step_in_backward": True}, "train.step_in_backward"),
    "a time that is none": ({"train.max_time": "soon"}, "train.max_time"),
    "an unknown device": ({"train.accelerator": "tpu"}, "train.accelerator: 'tpu'"),
    "a callback that is not there": ({"train.callbacks": ["mine.py:Own"]}, "train.callbacks"),
    "a logger that is not installed": ({"train.loggers": ["mlflow"]}, "mlflow"),
    "nothing to measure the cost at": (
        {"evaluate.cost": True, "evaluate.cost_batch_sizes": []},
        "evaluate.cost_batch_sizes",
    ),
    "a constructor that fails": (
        {"train.callbacks": [{"class_path": "lightning.pytorch.callbacks:Timer", "init_args": {"duration": "soon"}}]},
        "train.callbacks: lightning.pytorch.callbacks:Timer: its constructor failed",
    ),
    "a callback that stands there twice": (
        {"train.callbacks": ["lightning.pytorch.callbacks:Timer", "lightning.pytorch.callbacks:Timer"]},
        "stands there twice",
    ),
    "a task that does not load": (
        {"evaluate.tasks": ["own"], "evaluate.tasks_path": "tasks"},
        "task 'own' (",
    ),
    "a folder of tasks that is not there": (
        {"evaluate.tasks": ["own"], "evaluate.tasks_path": "nowhere"},
        "evaluate.tasks_path: nowhere is no folder",
    ),
    "blocks that are not there": (
        {
            "student.class_path": "own.py:Own",
            "student.options": {},
            "train.activation_checkpointing": True,
        },
        "no nn.ModuleList of equal blocks",
    ),
    "a student that sees the future": (
        {"student.class_path": "own.py:Seer", "student.options": {}, "corpus.pack": False},
        "a position sees the tokens behind it",
    ),
    "a student whose constructor fails": (
        {"student.class_path": "own.py:Failing", "student.options": {}},
        "own.py, line ",
    ),
    "a size that is none": ({"cache.max_size": "much"}, "cache.max_size: 'much' is not a size"),
    "a limit that is none": ({"memory_limit": "12"}, "memory_limit: '12' is not a size"),
    "a part of more than there are": ({"cache.part": "9/8"}, "cache.part: '9/8'"),
    "a control on several machines": ({"evaluate.control": True, "train.num_nodes": 2}, "train.num_nodes"),
}


OWN = """
import torch
from torch import nn
from distill.models.language_model import Head

class Own(nn.Module):
    def __init__(self, vocab_size: int):
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, 8)

    @property
    def head(self):
        return Head(self.tokens.weight)

    def body(self, input_ids, position_ids):
        return self.mixed(self.tokens(input_ids))

    def mixed(self, hidden):
        return hidden

class Seer(Own):
    def mixed(self, hidden):
        return hidden + hidden.roll(-1, 1)

class Failing(Own):
    def __init__(self, vocab_size: int):
        raise KeyError("size")
"""


TASK = """
task: own
dataset_path: json
dataset_kwargs: {data_files: {test: nowhere.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
"""


def arguments(settings: dict[str, Any]) -> list[str]:
    given = ((f"--{key}", value if isinstance(value, str) else json.dumps(value)) for key, value in settings.items())
    return [word for pair in given for word in pair]


SOME = [what for number, what in enumerate(ERRORS) if number % 4 == 0]
"""Errors that commands other than `run` are tried with: they make the same checks."""


@pytest.mark.parametrize(
    ("command", "what"),
    [("run", what) for what in ERRORS] + [(command, what) for command in ("cache-teacher", "plan") for what in SOME],
)
def test_an_error_of_the_last_phases_comes_first(
    world: Any, distill: Any, tmp_path: Path, what: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, words = ERRORS[what]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/own.yaml").write_text(TASK)
    file = world.write(tmp_path / "experiment.yaml")
    distill(command, file, *arguments(settings)).refused(words)
    assert not (tmp_path / "run/cache").exists()


def test_a_run_with_nothing_to_evaluate_on_is_refused(world: Any, distill: Any, tmp_path: Path) -> None:
    file = world.write(tmp_path / "experiment.yaml")
    distill("run", file, "--corpus.held_out", "0").refused("corpus.held_out: 0 leaves nothing to evaluate on")
    assert not (tmp_path / "run").exists()


def test_a_cache_with_nothing_to_evaluate_on_says_so_first(world: Any, distill: Any, tmp_path: Path) -> None:
    file = world.write(tmp_path / "experiment.yaml", corpus={"held_out": 0}, cache={"max_samples": 4})
    said = distill("cache-teacher", file).done().out
    assert said.index("corpus.held_out is 0") < said.index("\nteacher: ")


def test_a_pretrained_recurrent_student_is_no_hindrance(
    world: Any, distill: Any, tmp_path: Path, mamba2: dict[str, Any]
) -> None:
    values = dict(mamba2)
    tokenizer = AutoTokenizer.from_pretrained(world.content["teacher"]["model"])
    config = AutoConfig.for_model(values.pop("model_type"), **{**values, "vocab_size": len(tokenizer)})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "mamba2")
    tokenizer.save_pretrained(tmp_path / "mamba2")
    student = {"class_path": "huggingface", "options": {"model": str(tmp_path / "mamba2")}}
    file = world.write(tmp_path / "experiment.yaml", student=student)
    distill("cache-teacher", file, "--cache.max_samples", 4).done()
    assert "each is read in a row of its own" in distill("train-student", file, "--train.max_steps", 1).done().out


@pytest.mark.parametrize("key", ["train.devices", "cache.devices"])
def test_more_cards_than_there_are(
    world: Any, distill: Any, tmp_path: Path, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of this machine's: the card is imagined, and refused before it is touched."""
    # The rooms that import it come first: one that was imported later would keep the imagined card for good.
    rooms = ("experiment.last_steps", "recipes.train_student.command", "forecast.preflight", "models.devices")
    for room in rooms:
        monkeypatch.setattr(f"distill.{room}.pick_device", lambda accelerator: torch.device("cuda", 0))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    file = world.write(tmp_path / "experiment.yaml")
    distill("run", file, f"--{key}", 2).refused(f"{key}: 2 are asked for, and this machine has 1 (cuda): give 1")
    assert not (tmp_path / "run/cache").exists()


@pytest.mark.parametrize("command", ["run", "cache-teacher", "plan"])
def test_a_student_of_another_tokenizer_is_refused_first(
    world: Any, distill: Any, tmp_path: Path, command: str
) -> None:
    other = str(world.save_teacher(tmp_path / "other", "llama", vocabulary=600))
    student = {"class_path": "huggingface", "options": {"model": other}}
    file = world.write(tmp_path / "experiment.yaml", student=student)
    distill(command, file).refused(other, "another tokenizer than the teacher")
    assert not (tmp_path / "run/cache").exists()


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n"])
def test_a_student_of_damaged_weights_is_refused_first(
    world: Any, distill: Any, tmp_path: Path, content: bytes
) -> None:
    """Its tokens are the teacher's, so nothing but its weights is wrong."""
    shutil.copytree(world.folder / "teacher", tmp_path / "other")
    (tmp_path / "other/model.safetensors").write_bytes(content)
    student = {"class_path": "huggingface", "options": {"model": str(tmp_path / "other")}}
    distill("run", world.write(tmp_path / "experiment.yaml", student=student)).refused("other: model.safetensors is")
    assert not (tmp_path / "run/cache").exists()


def test_a_device_for_training_alone_may_be_elsewhere(world: Any, distill: Any, tmp_path: Path) -> None:
    file = world.write(tmp_path / "experiment.yaml")
    distill("cache-teacher", file, "--train.precision", "16-mixed", "--cache.max_samples", "4").done()


def test_what_is_finished_needs_no_room_on_a_disk(finished: Any) -> None:
    """Or a full disk would refuse a run that has nothing more to write."""
    disk = {"cache": 10**6, "checkpoints": 10**6, "student": 10**6}
    assert needs(load_experiment(finished.file, []), disk, 64) == []
