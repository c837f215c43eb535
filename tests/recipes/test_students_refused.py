"""Students that cannot be trained are refused in one line, before anything is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

SOURCE = """
import torch
from distill.models.language_model import Head

class NoBody(torch.nn.Module):
    def __init__(self, vocab_size: int):
        super().__init__()
        self.embedding = torch.nn.Embedding(vocab_size, 8)
    @property
    def head(self):
        return Head(self.embedding.weight)

class NoHead(torch.nn.Module):
    def body(self, input_ids, position_ids):
        return input_ids

class BareHead(NoBody):
    head = torch.zeros(3, 3)
    def body(self, input_ids, position_ids):
        return self.embedding(input_ids)

class Plain(NoBody):
    def __init__(self, vocab_size: int, width: int = 8):
        super().__init__(vocab_size)
    def body(self, input_ids, position_ids):
        return self.embedding(input_ids)
"""


def student(name: str, **options: Any) -> list[str]:
    return ["--student.class_path", name, "--student.options", json.dumps(options)]


def files(folder: Path) -> set[str]:
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return {name for name in found if not name.startswith("__pycache__")}


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working directory of a stranger, with a file of students."""
    (tmp_path / "mine.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (student("mine.py:NoBody"), ["NoBody has no method 'body"]),
        (student("mine.py:NoHead"), ["NoHead has no 'head'"]),
        (student("mine.py:BareHead"), ["'head' is a tensor", "Head"]),
        (student("mine.py:Plain", widht=3), ["unknown option 'widht'", "did you mean 'width'?"]),
        (student("mine.py:Plain", width="wide"), ["width", "expected int", "'wide'"]),
        (student("mine.py:Plian"), ["has no 'Plian'", "did you mean 'Plain'?"]),
        (student("mime.py:Plain"), ["no file 'mime.py'", "did you mean 'mine.py'?"]),
        (student("no_such_package.student:Plain"), ["no module 'no_such_package.student'"]),
        (student("comapct"), ["did you mean 'compact'?", "path/file.py:Class"]),
        (student("mine.py:Plain", vocab_size=399), ["the head has 399 rows, the tokenizer 400 tokens"]),
        (student("compact", hidden_size=10, heads=4), ["hidden_size 10 does not split into 4 heads"]),
        (student("pruned"), ["student.search: no student of"]),
        (student("pruned", layers=5), ["layers: 5 is out of range; the teacher has 4 layers"]),
        (student("pruned", layers=[0, 9]), ["[9] out of range"]),
        (student("pruned", layers="all"), ["layers", "'all'"]),
        (student("huggingface"), ["either model (pretrained) or config"]),
        (
            student(
                "huggingface", config={"model_type": "gpt2", "n_embd": 8, "n_head": 1, "n_layer": 1, "n_positions": 8}
            ),
            ["corpus.sequence_length: 48 is beyond the 8 tokens of student huggingface"],
        ),
        (
            [*student("mine.py:Plain"), "--train.activation_checkpointing"],
            ["nn.ModuleList", "activation_checkpointing"],
        ),
    ],
    ids=lambda value: " ".join(value[1:4:2]) if value[0] == "--student.class_path" else "",
)
def test_it_is_refused(train: Any, mine: None, tmp_path: Path, given: list[str], words: list[str]) -> None:
    train(*given).refused(*words)
    assert files(tmp_path) == {"mine.py"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vocab_size": 399}, ["399 rows", "400 tokens"]),
        ({"hidden_sise": 3}, ["'hidden_sise'", "did you mean 'hidden_size'?"]),
        ({"model_type": "lama"}, ["'lama'", "did you mean 'llama'?"]),
        ({"max_position_embeddings": 47}, ["sequence_length: 48", "47 tokens"]),
    ],
)
def test_a_config_is_refused(
    train: Any, tiny_config: dict[str, Any], tmp_path: Path, change: dict[str, Any], words: list[str]
) -> None:
    train(*student("huggingface", config={**tiny_config, **change})).refused(*words)
    assert files(tmp_path) == set()


def test_a_recurrent_student_learns_from_a_packed_cache(
    world: Any, distill: Any, mamba2: dict[str, Any], tmp_path: Path
) -> None:
    file = world.write(
        tmp_path / "experiment.yaml",
        cache={"max_samples": 12},
        student={"class_path": "huggingface", "options": {"config": mamba2}},
        train={"validate_every_steps": 3},
        evaluate={"max_samples": 4},
    )
    said = distill("run", file).done().out
    assert said.count("student huggingface: documents that share a row would see one another in this model") == 1
    result = json.loads((tmp_path / "run/evaluation.json").read_text())
    assert 0 < result["fidelity"]["student"]["kl"] < result["fidelity"]["before"]["kl"]


def test_a_refused_student_leaves_an_earlier_one_alone(finished: Any, distill: Any, untouched: Any) -> None:
    before = untouched(finished.run)
    other = distill("train-student", finished.file, "--train.learning_rate", "0.001")
    other.refused("was trained with other settings", "train.learning_rate: 0.005 there, 0.001 here", "--run_dir")
    other = distill("train-student", finished.file, *student("compact", layers=1))
    other.refused("was trained with other settings", "student.class_path: pruned there, compact here")
    assert untouched(finished.run) == before
