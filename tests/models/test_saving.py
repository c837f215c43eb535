"""A saved language model is complete or absent, and comes back the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill import plugins
from distill.errors import UserError
from distill.models.huggingface import HuggingFaceLanguageModel
from distill.models.saving import load_language_model, save_language_model

OPTIONS = {"vocab_size": 300, "hidden_size": 32, "layers": 2, "heads": 4}


def hidden(model: Any) -> torch.Tensor:
    ids_BL = torch.arange(6)[None]
    with torch.no_grad():
        return model.head(model.body(ids_BL, ids_BL))


@pytest.mark.parametrize("tie", [True, False])
def test_a_custom_student_comes_back_bit_for_bit(tie: bool, tmp_path: Path, tokenizer: Any) -> None:
    options = {**OPTIONS, "tie_embeddings": tie}
    model = plugins.build("compact", "student", options, {})
    save_language_model(model, tmp_path / "student", "compact", options, tokenizer)
    again = load_language_model(tmp_path / "student")
    assert torch.equal(hidden(again), hidden(model))
    assert (again.output.weight is again.embedding.weight) is tie
    assert not again.training


def test_a_hugging_face_student_is_an_ordinary_folder(tmp_path: Path, tiny_model: Any, tokenizer: Any) -> None:
    model = HuggingFaceLanguageModel(tiny_model("qwen3"))
    save_language_model(model, tmp_path / "student", "huggingface", {}, tokenizer)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert torch.equal(plain(input_ids=torch.arange(6)[None]).logits, hidden(model))
    assert AutoTokenizer.from_pretrained(tmp_path / "student").encode("the cat") == tokenizer.encode("the cat")
    assert torch.equal(hidden(load_language_model(tmp_path / "student")), hidden(model))


def test_a_failed_save_leaves_the_old_folder(tmp_path: Path, tokenizer: Any) -> None:
    model = plugins.build("compact", "student", OPTIONS, {})
    folder = save_language_model(model, tmp_path / "student", "compact", OPTIONS, tokenizer)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    class FullDisk:
        def save_pretrained(self, _: Path) -> None:
            raise OSError("no space left on device")

    changed = plugins.build("compact", "student", OPTIONS, {})
    with pytest.raises(OSError, match="no space"):
        save_language_model(changed, folder, "compact", OPTIONS, FullDisk())
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["student"], "nothing half-made is left"
    save_language_model(changed, folder, "compact", OPTIONS, tokenizer)
    assert torch.equal(hidden(load_language_model(folder)), hidden(changed))


def test_what_does_not_fit_or_brings_code_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    model = plugins.build("compact", "student", OPTIONS, {})
    folder = save_language_model(model, tmp_path / "student", "compact", {**OPTIONS, "layers": 3}, tokenizer)
    with pytest.raises(UserError, match="do not fit compact"):
        load_language_model(folder)
    (folder / "student.json").write_text(json.dumps({"class_path": f"{folder}/evil.py:Model", "options": {}}))
    (folder / "evil.py").write_text("raise SystemExit")
    with pytest.raises(UserError, match="not run"):
        load_language_model(folder)
    with pytest.raises(UserError, match="holds no language model"):
        load_language_model(tmp_path)
