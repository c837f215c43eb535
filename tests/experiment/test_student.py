"""A fresh student of some of the teacher's tokens has exactly these, or is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from distill.errors import UserError
from distill.experiment.configuration import Experiment, StudentConfig, TrainConfig
from distill.experiment.place import Place
from distill.experiment.student import make_student, make_student_to_train
from distill.experiment.teacher_sections import CorpusConfig, TeacherConfig
from distill.models.vocabulary import Vocabulary

FULL = 120  # the teacher's tokens
KEPT = torch.arange(0, FULL, 3)
PLACE = Place.host()
SOURCE = """
import torch
from distill.models.language_model import Head

class Student(torch.nn.Module):
    def __init__(self, vocab_size: int, rows: int | None = None, teacher: str = '', teacher_revision=None):
        super().__init__()
        self.embedding = torch.nn.Embedding(rows or vocab_size, 8)
    def body(self, input_ids, position_ids):
        return self.embedding(input_ids)
    def keep_tokens(self, kept_ids):
        self.embedding.weight = torch.nn.Parameter(self.embedding.weight[kept_ids])
    @property
    def head(self):
        return Head(self.embedding.weight)
"""


def build(class_path: str, kept_ids: torch.Tensor = KEPT, teacher: str = "", **options: Any) -> Any:
    corpus = CorpusConfig("", sequence_length=16)
    experiment = Experiment(corpus, TeacherConfig(teacher), StudentConfig(class_path, options, "corpus"))
    return make_student(experiment, PLACE, FULL, vocabulary=Vocabulary(kept_ids, FULL))[0]


@pytest.fixture
def pretrained(tiny_model: Any, tmp_path: Path) -> Any:
    """`pretrained(rows)`: the folder of a model."""

    def save(rows: int) -> str:
        tiny_model("llama", vocab_size=rows).save_pretrained(tmp_path / str(rows))
        return str(tmp_path / str(rows))

    return save


@pytest.fixture
def mine(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text(SOURCE)
    return f"{tmp_path}/mine.py:Student"


@pytest.mark.parametrize("class_path", ["huggingface", "lora", "pruned"])
def test_a_pretrained_student_is_trimmed_and_one_of_another_tokenizer_refused(class_path: str, pretrained: Any) -> None:
    """60 rows are enough for the 40 kept tokens, and are 60 other tokens."""
    for rows in (FULL, FULL + 8, 60):
        folder = pretrained(rows)
        options = {"teacher": folder, "layers": 1} if class_path == "pruned" else {"model": folder}
        if rows < FULL:
            with pytest.raises(UserError, match=f"{class_path}.*60 rows.*teacher's 120 tokens.*another tokenizer"):
                build(class_path, **options)
            continue
        student, full = build(class_path, **options), build(class_path, torch.arange(FULL), **options)
        assert torch.equal(student.head.weight_VD, full.head.weight_VD[KEPT])
        assert full.head.weight_VD.shape[0] == rows


def test_a_fresh_student_is_made_with_the_kept_tokens(mine: str, tiny_config: dict[str, Any]) -> None:
    for student in (build("huggingface", config=tiny_config), build("compact", hidden_size=8, heads=2), build(mine)):
        assert student.head.weight_VD.shape[0] == len(KEPT)
    assert build("huggingface", config={**tiny_config, "vocab_size": FULL}).head.weight_VD.shape[0] == len(KEPT)


def test_a_fresh_student_of_a_size_of_its_own_is_refused(mine: str, tiny_config: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"its head has 60 rows.*set no size for a fresh student"):
        build("huggingface", config={**tiny_config, "vocab_size": 60})
    with pytest.raises(UserError, match="its head has 60 rows"):
        build(mine, rows=60)


def test_what_could_not_be_made_again_from_its_options_is_not_trimmed(mine: str) -> None:
    """From its options it would come back with all tokens, and not fit the saved weights."""
    with pytest.raises(UserError, match="only Hugging Face models are trimmed: build it with the vocab_size"):
        build(mine, rows=FULL)
    assert build(mine, torch.arange(FULL), rows=FULL).head.weight_VD.shape[0] == FULL


@pytest.mark.parametrize(("options", "revision"), [({}, "v2"), ({"teacher": "another"}, None)])
def test_a_student_cut_from_the_teacher_is_cut_from_the_revision_that_teaches(
    options: dict[str, Any], revision: str | None, mine: str
) -> None:
    teacher = TeacherConfig("someone/something", revision="v2")
    _, made_with = make_student(Experiment(CorpusConfig(""), teacher, StudentConfig(mine, options)), PLACE, FULL)
    assert made_with["teacher_revision"] == revision
    assert made_with["teacher"] == options.get("teacher", "someone/something")


def test_a_student_reads_whole_samples_and_has_all_tokens(mine: str, tiny_config: dict[str, Any]) -> None:
    config = {**tiny_config, "max_position_embeddings": 16}
    for length in (16, 17):
        corpus, student = CorpusConfig("", sequence_length=length), StudentConfig("huggingface", {"config": config})
        experiment = Experiment(corpus, TeacherConfig(""), student)
        if length == 16:
            assert make_student(experiment, PLACE, FULL)
            continue
        with pytest.raises(
            UserError, match=r"corpus.sequence_length: 17 is beyond the 16 tokens of student huggingface"
        ):
            make_student(experiment, PLACE, FULL)
    few = Experiment(CorpusConfig(""), TeacherConfig(""), StudentConfig(mine, {"rows": FULL - 1}))
    with pytest.raises(UserError, match=r"mine.py:Student: .*119 rows.*120 tokens"):
        make_student(few, PLACE, FULL)


def test_a_student_to_train_has_the_levers_of_its_training(mine: str, tiny_config: dict[str, Any]) -> None:
    levers = TrainConfig(precision="bf16-true", activation_checkpointing=True)
    corpus, student = CorpusConfig("", sequence_length=16), StudentConfig("huggingface", {"config": tiny_config})
    plain, _ = make_student(Experiment(corpus, TeacherConfig(""), student, train=levers), PLACE, FULL)
    made, _, recomputed = make_student_to_train(
        Experiment(corpus, TeacherConfig(""), student, train=levers), PLACE, FULL
    )
    assert recomputed == tiny_config["num_hidden_layers"]
    assert plain.head.weight_VD.dtype == torch.float32 and made.head.weight_VD.dtype == torch.bfloat16
    assert torch.equal(plain.head.weight_VD.bfloat16(), made.head.weight_VD)
    with pytest.raises(UserError, match=r"leave --train.activation_checkpointing off"):
        make_student_to_train(Experiment(corpus, TeacherConfig(""), StudentConfig(mine), train=levers), PLACE, FULL)
