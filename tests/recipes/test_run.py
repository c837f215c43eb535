"""`distill run`: from text to a student beside its teacher, once, and nothing twice."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

ALONE = {"nll", "perplexity", "bits_per_byte", "ece", "confidence_gap", "intervals", "by_entropy", "by_position"}
BESIDE = ALONE | {"kl", "reverse_kl", "jsd", "top1_agreement", "top5_agreement", "acceptance"}
ABOUT = {"corpus", "experiment", "versions", "machine", "fingerprints"}


def read(run: Path) -> dict[str, Any]:
    return json.loads((run / "evaluation.json").read_text())


def check_evaluation(result: dict[str, Any], roles: set[str]) -> None:
    """The keys that are promised, and values that can be true."""
    against = {"student_against_control"} if "control" in roles else set()
    assert set(result) == {"parameters", "text", "fidelity", *against, *ABOUT}
    assert set(result["parameters"]) == set(result["fidelity"]) == {"teacher", *roles}
    assert result["text"]["tokens"] > 100 and result["text"]["samples"] * 48 >= result["text"]["tokens"]
    teacher = result["fidelity"]["teacher"]
    assert set(teacher) == ALONE
    assert 0 < teacher["nll"] < math.inf and 0 < teacher["ece"] < 1
    assert teacher["perplexity"] == pytest.approx(math.exp(teacher["nll"]))
    for role in roles:
        found = result["fidelity"][role]
        assert set(found) == BESIDE
        assert all(math.isfinite(value) for value in found.values() if isinstance(value, float))
        assert min(found[metric] for metric in ("nll", "kl", "reverse_kl", "jsd", "bits_per_byte")) > 0
        assert 0 <= found["top1_agreement"] <= 1 and 0 < found["acceptance"] < 1 and 0 < found["ece"] < 1
        low, high = found["intervals"]["kl"]
        assert low < found["kl"] < high
        assert sum(part["positions"] for part in found["by_entropy"]) == result["text"]["tokens"]


def test_the_student_has_learned_from_its_teacher(finished: Any) -> None:
    result = read(finished.run)
    check_evaluation(result, {"before", "student", "control"})
    fidelity = result["fidelity"]
    assert fidelity["student"]["kl"] < 0.8 * fidelity["before"]["kl"]
    assert fidelity["student"]["kl"] < fidelity["control"]["kl"]
    assert fidelity["student"]["acceptance"] > fidelity["before"]["acceptance"]
    # The control learned from the text alone: it is the one that predicts the text.
    assert fidelity["control"]["nll"] < fidelity["student"]["nll"]
    assert result["parameters"]["before"] == result["parameters"]["student"] == result["parameters"]["control"]
    assert result["parameters"]["student"] < result["parameters"]["teacher"]


def test_the_table_shows_what_the_file_holds(finished: Any) -> None:
    result = read(finished.run)
    fidelity = result["fidelity"]
    rows = {
        line.strip("│ ").split("│")[0].strip(): line for line in finished.outcome.out.splitlines() if line[:1] == "│"
    }
    assert set(rows) == {"teacher", "before", "student", "control"}
    assert all(f"{fidelity[role]['ece']:.1%} │" in rows[role] for role in rows)
    assert (
        f"{fidelity['student']['kl']:.3f}" in rows["student"] and f"{fidelity['teacher']['nll']:.3f}" in rows["teacher"]
    )
    assert f"on {result['text']['tokens']:,} held-out positions" in finished.outcome.out


def test_without_a_terminal_the_log_says_where_things_are(finished: Any) -> None:
    for part in ("cache-teacher: ", "train student: ", "train control: ", "step 8: held-out KL ", "evaluate: "):
        assert part in finished.outcome.out, part
    assert "\x1b[" not in finished.outcome.out
    assert str(finished.run / "student") in finished.outcome.out


def test_the_same_command_again_does_nothing_and_says_so(finished: Any, distill: Any, untouched: Any) -> None:
    before = untouched(finished.run)
    again = distill("run", finished.file).done()
    assert again.out.count("nothing to do") == 4  # cache, student, control, evaluation
    assert untouched(finished.run) == before


def test_the_student_is_an_ordinary_hugging_face_folder(finished: Any) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from distill.models.huggingface import HuggingFaceLanguageModel

    model, report = AutoModelForCausalLM.from_pretrained(finished.run / "student", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model.config.num_hidden_layers == 2
    tokenizer = AutoTokenizer.from_pretrained(finished.run / "student")
    assert tokenizer.chat_template
    ids_BL = tokenizer("My fellow citizens, I have", return_tensors="pt")["input_ids"]
    positions_BL = torch.arange(ids_BL.shape[1])[None]
    ours = HuggingFaceLanguageModel(model.eval())
    with torch.no_grad():
        torch.testing.assert_close(ours.head(ours.body(ids_BL, positions_BL)), model(ids_BL).logits)


def test_the_measured_student_is_the_one_in_the_folder(finished: Any, world: Any) -> None:
    """The nll of evaluation.json, computed anew from the folder with transformers alone, document by document."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from distill.corpus import open_corpus

    model = AutoModelForCausalLM.from_pretrained(finished.run / "student").eval()
    tokenizer = AutoTokenizer.from_pretrained(finished.run / "student")
    corpus = world.content["corpus"]
    held_out = open_corpus(
        corpus["path"], tokenizer, sequence_length=corpus["sequence_length"], held_out=corpus["held_out"]
    ).held_out
    total, count = 0.0, 0
    for sample in held_out:
        starts = (sample["position_ids"] == 0).nonzero().flatten().tolist()
        for start, stop in zip(starts, [*starts[1:], len(sample["input_ids"])], strict=True):
            mask, ids = sample["loss_mask"][start:stop], sample["input_ids"][start:stop]
            with torch.no_grad():
                logp = model(ids[None]).logits[0, :, : len(tokenizer)].double().log_softmax(-1)
            for position in mask.nonzero().flatten().tolist():
                total, count = total - float(logp[position, ids[position + 1]]), count + 1
    result = read(finished.run)
    assert count == result["text"]["tokens"]
    assert total / count == pytest.approx(result["fidelity"]["student"]["nll"], rel=1e-5)


def test_a_four_bit_teacher(world: Any, distill: Any, tmp_path: Path) -> None:
    file = world.write(
        tmp_path / "experiment.yaml",
        teacher={"quantization": "nf4"},
        cache={"max_samples": 64},
        train={"epochs": 2, "precision": "bf16-mixed"},
    )
    outcome = distill("run", file).done()
    assert "nf4, float32" in outcome.out
    result = read(tmp_path / "run")
    check_evaluation(result, {"before", "student"})
    assert result["fidelity"]["student"]["kl"] < result["fidelity"]["before"]["kl"]
    assert result["parameters"]["teacher"] == 63_584  # two 4-bit weights lie in a byte, and count as two


def test_conversations_with_the_tokenizers_chat_template(world: Any, distill: Any, tmp_path: Path) -> None:
    turns = [
        [
            {"role": "user", "content": f"Question {i}, if you please?"},
            {"role": "assistant", "content": "Yes, " * (i + 1)},
        ]
        for i in range(20)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in turns))
    file = world.write(
        tmp_path / "experiment.yaml",
        corpus={"path": str(tmp_path / "chats.jsonl"), "held_out": 0.3},
        train={"max_steps": 2},
    )
    distill("run", file).done()
    result = read(tmp_path / "run")
    check_evaluation(result, {"before", "student"})
