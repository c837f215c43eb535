"""Measures of a model's own texts: by hand on small ones, and in a run of a student that is its teacher."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.evaluation.fidelity import TeacherStates
from distill.evaluation.own_texts import (
    Question,
    Written,
    as_samples,
    distinct,
    own_divergences,
    pick_questions,
    repetition,
    summary,
    token_f1,
)
from distill.models.language_model import Head

pytestmark = pytest.mark.usefixtures("one_thread")


def test_repetition_and_distinct_ngrams() -> None:
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 - 4 / 5)
    assert repetition([1, 2, 3]) == 0 and repetition([7] * 9) == pytest.approx(1 - 1 / 6)
    assert distinct([[1, 2, 1, 2], [1, 2]], 2) == 2 / 4 and distinct([[1]], 2) == 0


def test_token_f1_is_of_words() -> None:
    assert token_f1("The cat, the mat.", "the cat") == pytest.approx(2 * 2 / 6)
    assert token_f1("", "") == 1 and token_f1("a", "") == 0


def sample(ids: list[int], positions: list[int], learned: list[int], documents: list[int]) -> dict[str, Any]:
    mask = torch.tensor([place in learned for place in range(len(ids))])
    hashes = torch.tensor(documents)
    return {
        "input_ids": torch.tensor(ids),
        "position_ids": torch.tensor(positions),
        "loss_mask": mask,
        "document_hash": hashes,
    }


def test_questions_are_the_last_answer_or_the_beginning_of_a_plain_text() -> None:
    # A conversation of 7 tokens with answers (2, 3) and (6,), and a plain text of 4 tokens.
    row = sample(
        [10, 11, 2, 3, 12, 13, 6, 20, 21, 22, 23],
        [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3],
        [1, 2, 5, 7, 8, 9],
        [5] * 7 + [9] * 4,
    )
    found = pick_questions([row, row], 5, prompt_tokens=2)  # type: ignore[arg-type]
    assert found == [
        Question([10, 11, 2, 3, 12, 13], [6], is_answer=True),
        Question([20, 21], [22, 23], is_answer=False),
    ], "one a document"
    assert len(pick_questions([row], 1, prompt_tokens=2)) == 1  # type: ignore[arg-type]


def test_the_divergence_is_of_the_written_tokens_and_in_order() -> None:
    questions = [Question([1, 2], [], False), Question([3], [], False)]
    texts = [Written([5], True, "", None), Written([6, 7], False, "", None)]
    samples = as_samples(questions, texts, None)
    assert [each["loss_mask"].tolist() for each in samples] == [[False, True, False], [True, True, False]]
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (Head(torch.randn(9, 4, generator=generator)) for _ in range(2))
    own_ND, read_ND = torch.randn(3, 4, generator=generator), torch.randn(3, 4, generator=generator)
    states = TeacherStates([own_ND], ours), TeacherStates([read_ND], theirs)
    found_N = own_divergences(*states, 2, torch.device("cpu"))
    logq_NV = (own_ND.double() @ ours.weight_VD.double().T).log_softmax(-1)
    logp_NV = (read_ND.double() @ theirs.weight_VD.double().T).log_softmax(-1)
    torch.testing.assert_close(found_N, (logq_NV.exp() * (logq_NV - logp_NV)).sum(-1), rtol=1e-5, atol=1e-6)
    figures = summary(texts, found_N)
    assert figures["kl"] == pytest.approx(float(found_N.mean())) and figures["ended"] == 0.5
    assert figures["by_position"] == [{"from": 0, "to": 8, "positions": 3, "kl": pytest.approx(figures["kl"])}]


def test_answers_beside_their_references() -> None:
    pairs = [('{"a": 1}', '{"a": 1}'), ("no", "[2]"), (" yes ", "yes"), ("yes", "no"), ("x", None), ("b", "b")]
    texts = [Written([1, 2], True, answer, reference) for answer, reference in pairs]
    found = summary(texts, None, lambda answer, reference: len(answer))
    assert found["answers"] == 5 and found["exact_match"] == 3 / 5 and found["valid_json"] == 1 / 2
    assert found["metric"] == (8 + 2 + 5 + 3 + 1) / 5 and "kl" not in found
    assert {"ended", "exact_match", "token_f1", "metric"} <= found["intervals"].keys()


def test_a_student_that_is_its_teacher_is_never_led_astray(world: Any, distill: Any, tmp_path: Path) -> None:
    """And one that is not is: measured in a run, shown in its report, and not measured twice."""
    (tmp_path / "own.py").write_text("def longer(answer, reference):\n    return len(answer) > len(reference)\n")
    (tmp_path / "corpus.jsonl").write_text(
        "".join(
            json.dumps({"prompt": f"What is {number}?", "completion": f"It is the number {number}."}) + "\n"
            for number in range(60)
        )
    )
    sections = {
        "corpus": {"path": str(tmp_path / "corpus.jsonl"), "held_out": 0.3},
        "student": {"class_path": "huggingface", "options": {"model": str(world.folder / "teacher")}},
        "train": {"max_steps": 1, "learning_rate": 0.0, "loggers": ["csv"]},
        "generate": {"max_new_tokens": 12},
        "evaluate": {"own_texts": 12, "metric": f"{tmp_path / 'own.py'}:longer", "control": True},
    }
    file = world.write(tmp_path / "experiment.yaml", **sections)
    said = distill("run", file).done().out
    assert "12 texts of the student: KL student || teacher 0.000" in said
    own = json.loads((tmp_path / "run/evaluation.json").read_text())["own_texts"]
    assert own["student"]["kl"] == pytest.approx(0, abs=1e-6) and "kl" not in own["teacher"]
    assert own["student"]["ended"] == own["teacher"]["ended"] and own["student"]["answers"] == 12
    assert own["student"]["metric"] == own["teacher"]["metric"] and own["control"]["texts"] == 12
    page = (tmp_path / "run/report.html").read_text()
    assert "Their own texts" in page and "KL on own text by position" in page and "own metric" in page
    assert "all is measured" in distill("evaluate", file).done().out
    refused = distill("evaluate", file, "--evaluate.metric", f"{tmp_path / 'own.py'}:shorter")
    refused.refused("evaluate.metric", "longer")
    (tmp_path / "own.py").write_text("def longer(answer, reference):\n    return answer / 2\n")
    failed = distill("evaluate", file)
    failed.refused("evaluate.metric", "own.py")
    assert "own texts:" not in failed.out, "before a text is written"
