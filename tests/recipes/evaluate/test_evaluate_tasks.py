"""Benchmarks from the command line: real lm-eval on local tasks, measured once for each model and task."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("lm_eval")

pytestmark = pytest.mark.usefixtures("one_thread")

LOADER = '''"""Documents of the tests' tasks."""
import json, pathlib, datasets

def documents(**_):
    text = (pathlib.Path(__file__).parent / "documents.json").read_text()
    return {"all": datasets.Dataset.from_list(json.loads(text))}
'''
MEAN = {"aggregation": "mean", "higher_is_better": True}
CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "choices",
    "doc_to_target": "gold",
    "metric_list": [{"metric": "acc", **MEAN}, {"metric": "acc_norm", **MEAN}],
}
WORD = {
    "output_type": "loglikelihood",
    "doc_to_text": "question",
    "doc_to_target": "{{' ' + choices[0]}}",
    "metric_list": [{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}],
}
LIMIT = 12


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory, world: Any) -> Path:
    """A folder of two tasks: which of four words follows, and how likely the first is."""
    folder = tmp_path_factory.mktemp("tasks")
    words = Path(world.content["corpus"]["path"]).read_text().split()
    documents = [
        {"question": " ".join(words[at : at + 5]), "choices": words[at + 5 : at + 9], "gold": at % 4}
        for at in range(40, 340, 15)
    ]
    for at, document in enumerate(documents):  # the passage that every second one is about stands in the corpus
        document["passage"] = " ".join(words[40 + 15 * at :][:20][:: -1 if at % 2 else 1])
    (folder / "documents.json").write_text(json.dumps(documents))
    (folder / "loader.py").write_text(LOADER)
    for name, content in {"which": CHOICE, "first": WORD}.items():
        whole = {"task": name, "test_split": "all", **content}
        text = "custom_dataset: !function loader.documents\n" + yaml.safe_dump(whole)
        (folder / f"{name}.yaml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def arguments(world: Any, tasks: Path, distill: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """A finished run with benchmarks: the arguments of its commands. No model has padding rows in its head."""
    folder = tmp_path_factory.mktemp("run")
    teacher = world.save_teacher(folder / "teacher", "llama", vocab_size=400)
    evaluate = {"control": True, "tasks": ["which", "first"], "tasks_path": str(tasks), "tasks_limit": LIMIT}
    file = world.write(folder / "experiment.yaml", teacher={"model": str(teacher)}, evaluate=evaluate)
    distill("run", file, "--train.max_steps", 8).done()
    return [file, "--train.max_steps", 8]


def read(arguments: list[Any]) -> dict[str, Any]:
    return json.loads((Path(arguments[0]).parent / "run/evaluation.json").read_text())


def lm_eval_scores(folder: Path, tasks: Path, task: str) -> dict[str, Any]:
    """Return lm-eval's own scores, with its own model of a folder."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    with contextlib.redirect_stderr(io.StringIO()):
        model = HFLM(pretrained=str(folder), device="cpu", batch_size=8, dtype="float32")
        manager = TaskManager(include_path=str(tasks), include_defaults=False)
        found = simple_evaluate(model, tasks=[task], task_manager=manager, limit=LIMIT, bootstrap_iters=0)
    return {key.partition(",")[0]: value for key, value in found["results"][task].items()}


def test_the_exported_student_scores_the_same_in_lm_eval_itself(
    arguments: list[Any], tasks: Path, distill: Any, tmp_path: Path
) -> None:
    """Accuracies are equal; a perplexity to the last digit that lm-eval prints, and six more of its relative size."""
    run = Path(arguments[0]).parent / "run"
    distill("export", run, "--to", tmp_path / "hf").done()
    ours = read(arguments)["benchmarks"]
    assert set(ours) == {"teacher", "student", "control"}
    folders = {"teacher": run.parent / "teacher", "student": tmp_path / "hf", "control": run / "control"}
    for name, folder in folders.items():
        which, first = (lm_eval_scores(folder, tasks, task) for task in ("which", "first"))
        found = ours[name]["which"]
        assert found["documents"] == LIMIT and found["metric"] == "acc" and found["chance"] == 0.25
        assert {key: found["metrics"][key]["value"] for key in ("acc", "acc_norm")} == {
            key: which[key] for key in ("acc", "acc_norm")
        }
        perplexity = ours[name]["first"]["metrics"]["perplexity"]["value"]
        assert f"{perplexity:.4f}" == f"{first['perplexity']:.4f}" or perplexity == pytest.approx(
            first["perplexity"], rel=1e-6
        )


def test_the_documents_that_stand_in_the_training_text_are_counted(arguments: list[Any]) -> None:
    """Half of them may; those that run over two texts of the corpus, or come from a held-out one, do not."""
    found = read(arguments)["overlaps"]["teacher"]
    assert set(found) == {"which", "first"} and found["which"] == found["first"]
    assert found["which"]["documents"] == LIMIT and 2 <= found["which"]["overlapping"] <= LIMIT // 2
    page = (Path(arguments[0]).parent / "run/report.html").read_text()
    assert f"{found['which']['overlapping']} of them in the training text" in page


def test_a_task_is_measured_once_for_each_model(arguments: list[Any], distill: Any, tmp_path: Path) -> None:
    """Hours of work are not thrown away when a task is removed and asked for again, or after a quick look."""
    before = read(arguments)
    fewer = distill("evaluate", *arguments, "--evaluate.tasks", "[which, which]").done()
    assert "nothing to do" in fewer.out and set(read(arguments)["benchmarks"]["student"]) == {"which"}
    quick = distill("evaluate", *arguments, "--evaluate.tasks", "[which]", "--evaluate.tasks_limit", 2).done()
    assert "nothing to do" not in quick.out and read(arguments)["benchmarks"]["student"]["which"]["documents"] == 2
    alone = distill("evaluate", *arguments, "--evaluate.control", "false").done()
    assert "student: " not in alone.out and "control" not in read(arguments)["fidelity"]
    assert "nothing to do" in distill("evaluate", *arguments).done().out and read(arguments) == before
    again = distill("evaluate", *arguments, "--evaluate.texts", 1, "--evaluate.text_tokens", 4).done()
    assert "nothing to do" not in again.out and "held-out" in again.out
    assert "\nevaluate: " not in again.out, "the held-out text is not read again"
    found = read(arguments)
    assert set(found["texts"]) == {"prompts", "truth", "teacher", "student", "control"}
    assert {key: found[key] for key in ("fidelity", "benchmarks")} == {
        key: before[key] for key in ("fidelity", "benchmarks")
    }


@pytest.mark.parametrize("command", ["run", "plan"])
def test_a_tokenizer_that_cannot_begin_a_text_is_refused_before_anything_else_is_done(
    world: Any, tasks: Path, distill: Any, tmp_path: Path, command: str
) -> None:
    shutil.copytree(world.folder / "teacher", tmp_path / "teacher")
    settings = tmp_path / "teacher/tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "eos_token": None}))
    evaluate = {"tasks": ["which"], "tasks_path": str(tasks)}
    teacher = {"model": str(tmp_path / "teacher")}
    file = world.write(tmp_path / "experiment.yaml", teacher=teacher, evaluate=evaluate)
    distill(command, file).refused("evaluate.tasks: the teacher's tokenizer has neither a BOS nor an EOS token")
    assert not (tmp_path / "run/cache").exists()


def test_unknown_tasks_are_refused_before_anything_else_is_done(
    world: Any, tasks: Path, distill: Any, tmp_path: Path
) -> None:
    own = world.write(tmp_path / "experiment.yaml", evaluate={"tasks": ["whihc"], "tasks_path": str(tasks)})
    distill("run", own).refused("whihc", "which")
    assert not (tmp_path / "run/cache").exists()
    for sizes in ("[]", "[0]"):
        outcome = distill(
            "run", own, "--evaluate.tasks", "[]", "--evaluate.cost", "true", "--evaluate.cost_batch_sizes", sizes
        )
        outcome.refused("evaluate.cost_batch_sizes")
