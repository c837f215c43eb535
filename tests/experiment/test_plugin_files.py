"""Code of the user's own beside the experiment file is found from any folder, and is the same from each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from distill.experiment import settings
from distill.experiment.file import load_experiment

CONTENT: dict[str, Any] = {
    "corpus": {"sources": [{"path": "a.txt", "reader": "mine.py:read"}, {"path": "b.txt"}]},
    "teacher": {"model": "m", "class_path": "teachers.own:Teacher"},
    "student": {"class_path": "parts/mine.py:Student"},
    "loss": {"divergence": "mine.py:kl"},
    "evaluate": {"metric": "missing.py:metric"},
    "train": {"callbacks": ["mine.py:First", {"class_path": "mine.py:Second", "init_args": {"path": "mine.py:no"}}]},
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    for name in ("mine.py", "parts/mine.py"):
        (tmp_path / "there" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "there" / name).touch()
    (tmp_path / "there" / "my.yaml").write_text(yaml.safe_dump(CONTENT))
    (tmp_path / "elsewhere").mkdir()
    return tmp_path / "there" / "my.yaml"


def named(experiment: Any) -> list[Any]:
    sources = [source.reader for source in experiment.corpus.all_sources]
    first, second = experiment.train.callbacks
    plugins = [experiment.student.class_path, experiment.loss.divergence, first, second["class_path"]]
    return [*sources, *plugins, second["init_args"]["path"], experiment.evaluate.metric, experiment.teacher.class_path]


def test_a_file_is_looked_for_here_and_then_beside_the_experiment(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rest = ["mine.py:no", "missing.py:metric", "teachers.own:Teacher"]
    monkeypatch.chdir(file.parent)
    here = named(load_experiment("my.yaml", []))
    assert here == [
        "mine.py:read",
        None,
        "parts/mine.py:Student",
        *[f"mine.py:{n}" for n in ("kl", "First", "Second")],
        *rest,
    ]
    monkeypatch.chdir(file.parents[1] / "elsewhere")
    beside = named(load_experiment("../there/my.yaml", []))
    assert beside == [name and (name if name in rest else f"../there/{name}") for name in here]
    Path("mine.py").touch()
    assert named(load_experiment("../there/my.yaml", ["--student.class_path", "mine.py:Other"]))[:3] == [
        "mine.py:read",
        None,
        "mine.py:Other",
    ]


def test_one_file_from_two_folders_is_no_other_setting(tmp_path: Path) -> None:
    def of(class_path: str, divergence: str) -> dict[str, Any]:
        return {"student": {"class_path": class_path, "source": "1234"}, "loss": {"divergence": divergence}}

    settings.write(tmp_path, of("parts/mine.py:Student", "mine.py:kl"))
    assert not settings.differences(tmp_path, of("../there/parts/mine.py:Student", "/a/b/mine.py:kl"))
    assert len(settings.differences(tmp_path, of("parts/mine.py:Other", "forward_kl"))) == 2
