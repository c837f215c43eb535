"""Students of some of the teacher's tokens, from the cache to the evaluation, and which samples can be measured."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture(scope="module")
def teacher(world: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """One whose tokenizer knows the corpus by long words: most of its tokens are rare."""
    return str(world.save_teacher(tmp_path_factory.mktemp("large"), "llama", vocabulary=1500))


@pytest.fixture(scope="module")
def trained(world: Any, distill: Any, teacher: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """An experiment with a control whose cache holds a few of the training and held-out samples."""
    folder = tmp_path_factory.mktemp("trimmed")
    cache = {"max_samples": 16, "held_out_samples": 4, "batch_size": 4, "shard_samples": 8}
    file = world.write(
        folder / "experiment.yaml",
        teacher={"model": teacher},
        cache=cache,
        student={"vocabulary": "corpus"},
        train={"max_steps": 4, "validate_every_steps": 4},
        evaluate={"control": True},
    )
    distill("cache-teacher", file).done()
    distill("train-student", file).done()
    return file, folder / "run"


def test_all_is_measured_on_the_text_that_all_can_read(trained: tuple[str, Path], distill: Any) -> None:
    file, run = trained
    outcome = distill("evaluate", file).done()
    found = json.loads((run / "evaluation.json").read_text())
    left_out, dropped = (found["text"][name] for name in ("left_out_samples", "dropped_mass"))
    assert left_out > 0 and 0 < dropped < 1
    assert f"{dropped:.2%} of the teacher's probability" in outcome.out
    assert f"{left_out} samples with others" in outcome.out
    for role in ("before", "student", "control"):
        assert found["fidelity"][role]["kl"] > 0
        assert found["parameters"][role] < found["parameters"]["teacher"]
    assert found["fidelity"]["student"]["kl"] < found["fidelity"]["before"]["kl"]
    assert f"{left_out} samples" in distill("evaluate", file).done().out, "said again"


def test_the_students_folder_goes_by_itself(trained: tuple[str, Path]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from distill.models.vocabulary import Vocabulary

    _, run = trained
    tokenizer = AutoTokenizer.from_pretrained(run / "student")
    model = AutoModelForCausalLM.from_pretrained(run / "student")
    vocabulary = Vocabulary.load(run / "student")
    assert len(tokenizer) == len(vocabulary) == model.config.vocab_size < vocabulary.full_size
    ends = model.config.eos_token_id  # of a text, and of an answer
    assert tokenizer.eos_token_id in ends and max(ends) < len(vocabulary)
    made = model.generate(**tokenizer("The people", return_tensors="pt"), max_new_tokens=5, do_sample=False)
    assert tokenizer.decode(made[0]).startswith("The people")


def test_a_text_that_no_student_can_read_is_refused(trained: tuple[str, Path], distill: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    file, run = trained
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (run / "student", run / "cache/tokenizer"))
    word = max(theirs.get_vocab().keys() - ours.get_vocab().keys(), key=len).replace("Ġ", " ")
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"text": f"{n}{60 * word}"}) + "\n" for n in range(40)))
    distill("evaluate", file, "--corpus.path", other).refused("nothing to evaluate on", "student.vocabulary full")


def test_a_students_vocabulary_that_is_missing_or_anothers_is_refused(
    trained: tuple[str, Path], distill: Any, tmp_path: Path
) -> None:
    from distill.models.vocabulary import Vocabulary

    file, run = trained
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("evaluation.json", "cache"))
    own = [file, "--run_dir", tmp_path / "run", "--cache.dir", run / "cache"]
    Vocabulary(torch.arange(5), 1400).save(tmp_path / "run/control")
    distill("evaluate", *own).refused("student and control have other tokens")
    (tmp_path / "run/student/vocabulary.safetensors").unlink()
    distill("evaluate", *own).refused("vocabulary.safetensors", "missing", "train again")


def test_adapters_on_few_tokens(trained: tuple[str, Path], distill: Any, teacher: str, tmp_path: Path) -> None:
    """Trimmed, adapted, merged: an ordinary folder."""
    from transformers import AutoModelForCausalLM

    file, run = trained
    lora = ["--student.class_path", "lora", "--student.options", json.dumps({"model": teacher, "rank": 2})]
    own = [file, "--run_dir", tmp_path, "--cache.dir", run / "cache", *lora, "--evaluate.control", "false"]
    distill("train-student", *own).done()
    adapted = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    plain = AutoModelForCausalLM.from_pretrained(run / "student")
    assert adapted.config.vocab_size == plain.config.vocab_size
    distill("evaluate", *own).done()
