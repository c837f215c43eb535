"""A pretrained student is compared with the teacher by the ids of the same strings, not by its number of rows."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from distill.errors import UserError
from distill.experiment.configuration import Experiment, StudentConfig
from distill.experiment.place import Place
from distill.experiment.student import check_tokens
from distill.experiment.teacher_sections import CorpusConfig, TeacherConfig
from distill.models.tokenizers import load_folder_tokenizer


@pytest.fixture(scope="module")
def teacher(world: Any) -> Path:
    return Path(world.content["teacher"]["model"])


def check(folder: Path, teacher: Path, class_path: str = "huggingface", **options: Any) -> None:
    option = "teacher" if class_path == "pruned" else "model"
    student = StudentConfig(class_path, {option: str(folder), **options})
    experiment = Experiment(CorpusConfig("c"), TeacherConfig(str(teacher)), student)
    check_tokens(experiment, Place.host(), load_folder_tokenizer(teacher))


def changed(teacher: Path, folder: Path, change: Any) -> Path:
    """A copy of the teacher with another `tokenizer.json`."""
    shutil.copytree(teacher, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("class_path", ["huggingface", "lora", "pruned"])
def test_another_tokenizer_of_enough_rows_is_refused(
    world: Any, teacher: Path, tmp_path: Path, class_path: str
) -> None:
    other = world.save_teacher(tmp_path / "other", "llama", vocabulary=600)
    with pytest.raises(UserError, match=f"student {class_path}: .*another tokenizer .* there, .* here.*own family"):
        check(other, teacher, class_path)
    check(other, other, class_path)


def test_the_same_tokenizer_beside_other_weights_is_taken(world: Any, teacher: Path, tmp_path: Path) -> None:
    check(world.save_teacher(tmp_path / "other", "llama", seed=1), teacher)


def test_two_ids_exchanged_are_found(teacher: Path, tmp_path: Path) -> None:
    def exchange(content: dict[str, Any]) -> None:
        vocabulary = content["model"]["vocab"]
        vocabulary["x"], vocabulary["y"] = vocabulary["y"], vocabulary["x"]

    with pytest.raises(UserError, match=r"'x' is \d+ there, \d+ here"):
        check(changed(teacher, tmp_path / "other", exchange), teacher)


def test_the_same_tokens_joined_otherwise_are_found(teacher: Path, tmp_path: Path) -> None:
    """The ids that are shown begin where they differ: only the later merges are gone."""

    def cut(content: dict[str, Any]) -> None:
        del content["model"]["merges"][60:]

    with pytest.raises(UserError) as refused:
        check(changed(teacher, tmp_path / "other", cut), teacher)
    shown = re.search(r"is \[(\d+),?.*\] there, \[(\d+),?.*\] here, from token \d+ on", str(refused.value))
    assert shown is not None and shown[1] != shown[2], str(refused.value)


def test_special_tokens_of_its_own_do_not_matter(teacher: Path, tmp_path: Path) -> None:
    def add(content: dict[str, Any]) -> None:
        content["added_tokens"].append({**content["added_tokens"][0], "id": 400, "content": "<|think|>"})

    check(changed(teacher, tmp_path / "other", add), teacher)


def test_a_student_without_a_tokenizer_is_said(teacher: Path, tmp_path: Path, capsys: Any) -> None:
    shutil.copytree(teacher, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    check(tmp_path / "bare", teacher)
    assert "has no tokenizer" in capsys.readouterr().out
