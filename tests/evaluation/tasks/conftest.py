"""Small task files of every output type, and what reads them with lm-eval."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from distill.evaluation import task_files
from distill.models.huggingface import HuggingFaceLanguageModel

_LOADER = '''"""Documents of the tests' tasks, from the files beside this one."""
import json, pathlib, datasets

def documents(file, **_):
    return {"all": datasets.Dataset.from_list(json.loads((pathlib.Path(__file__).parent / file).read_text()))}
'''
_MEAN = {"aggregation": "mean", "higher_is_better": True}
_TASKS: dict[str, dict[str, Any]] = {
    "arc_easy": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}\nAnswer:",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc", **_MEAN}, {"metric": "acc_norm", **_MEAN}],
    },
    "last_word": {
        "output_type": "loglikelihood",
        "doc_to_text": "question",
        "doc_to_target": "{{' ' + choices[0]}}",
        "metric_list": [
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            {"metric": "acc", **_MEAN},
        ],
    },
    "whole_text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "question",
        "metric_list": [
            {"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False},
            {"metric": "byte_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False},
            {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False},
        ],
    },
    "answer": {
        "output_type": "generate_until",
        "doc_to_text": "question",
        "doc_to_target": "answer",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6, "do_sample": False},
        "metric_list": [{"metric": "exact_match", **_MEAN}],
    },
}


def _write_task(folder: Path, name: str, **content: Any) -> None:
    content = {"task": name, "dataset_kwargs": {"file": "documents.json"}, "test_split": "all", **content}
    text = "custom_dataset: !function loader.documents\n" + yaml.safe_dump(content)
    (folder / f"{name}.yaml").write_text(text, encoding="utf-8")


@pytest.fixture(scope="session")
def write_task() -> Callable[..., None]:
    """`write_task(folder, name, **content)`: over its `documents.json`; yaml has no word for lm-eval's `!function`."""
    return _write_task


@pytest.fixture(scope="session")
def tasks() -> dict[str, dict[str, Any]]:
    """The content of the task files, by name."""
    return _TASKS


@pytest.fixture(scope="session")
def our_tasks() -> str:
    """The folder of the tasks that need no hub."""
    return str(Path(__file__).resolve().parents[3] / "configs" / "tasks")


@pytest.fixture(scope="session")
def model(world: Any) -> HuggingFaceLanguageModel:
    from transformers import AutoModelForCausalLM

    return HuggingFaceLanguageModel(AutoModelForCausalLM.from_pretrained(world.folder / "teacher", dtype=torch.float32))


@pytest.fixture(scope="session")
def tokenizer(world: Any) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(world.folder / "teacher")


@pytest.fixture(scope="session")
def folder(world: Any, model: Any, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Task files of every output type over twelve documents, two to four choices each."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "loader.py").write_text(_LOADER, encoding="utf-8")
    with open(world.folder / "corpus.jsonl", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    rows = []
    for index, text in zip(range(12), texts, strict=False):
        words = texts[-1 - index].split()
        rows.append(
            {
                "question": text[: 40 + 20 * index],
                "choices": [" ".join(words[start : start + 1 + start % 4]) for start in range(2 + index % 3)],
                "gold": index % 2,
                "answer": "",
            }
        )
    (folder / "documents.json").write_text(json.dumps(rows), encoding="utf-8")
    for name, content in _TASKS.items():
        _write_task(folder, name, **content)
    answers = _generated(folder, model, tokenizer, rows)
    for row, answer in zip(rows[::2], answers[::2], strict=True):  # so that some are met
        row["answer"] = answer
    (folder / "documents.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder


def _generated(folder: Path, model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> list[str]:
    from distill.models.generation import generate

    texts = []
    for row in rows:
        ids = list(generate(model.eval(), tokenizer.encode(row["question"]), 6, vocab_size=413))
        texts.append(tokenizer.decode(ids, skip_special_tokens=True).split("\n")[0])
    return texts


@pytest.fixture(scope="session")
def run(model: Any, tokenizer: Any, folder: Path) -> Callable[..., dict[str, Any]]:
    """`run(names, place=folder, of=model, **options)`: what is found by the benchmarks of these names."""
    from distill.evaluation.benchmarks import run_tasks

    def found(names: list[str], place: Any = folder, of: Any = model, **options: Any) -> dict[str, Any]:
        given = {"batch_size": 4, "vocab_size": 413, "max_length": 64, "device": torch.device("cpu")}
        return run_tasks(of, tokenizer, names, tasks_path=str(place), **{**given, **options})

    return found


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Callable[..., None]:
    """`copied(*tasks)`: the loader, the documents and the files of these tasks come into `tmp_path`."""

    def copy(*names: str) -> None:
        for file in ("loader.py", "documents.json", *(f"{name}.yaml" for name in names)):
            (tmp_path / file).write_bytes((folder / file).read_bytes())

    return copy


@pytest.fixture
def no_own_tasks(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`no_own_tasks(folder)`: lm-eval's own tasks are those of `folder` (default: none).

    Its index of fourteen thousand takes ten seconds to read.
    """
    from lm_eval.tasks import TaskManager

    def replaced(folder: Path | None = None) -> None:
        manager = TaskManager(include_path=folder, include_defaults=False)
        monkeypatch.setattr(task_files, "_own_manager", lambda: manager)

    return replaced
