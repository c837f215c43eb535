"""Hugging Face students: pretrained or from a configuration, in float32, with a vocabulary that fits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from students.huggingface import load_student

SIZES: dict[str, Any] = {
    "model_type": "qwen3",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
}


def test_a_configuration_takes_the_tokenizers_vocabulary_and_the_callers_seed() -> None:
    torch.manual_seed(1)
    student = load_student(config=SIZES, vocab_size=77)
    torch.manual_seed(1)
    again = load_student(config=SIZES, vocab_size=77)
    assert student.head.weight_VD.shape == (77, 32)
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), again.parameters(), strict=True))
    assert load_student(config={**SIZES, "vocab_size": 80}, vocab_size=77).head.weight_VD.shape[0] == 80


def test_a_pretrained_student_is_float32_whatever_it_was_saved_in(tmp_path: Path) -> None:
    made = load_student(config=SIZES, vocab_size=77)
    made.model.to(torch.bfloat16).save_pretrained(tmp_path)
    student = load_student(model=str(tmp_path), vocab_size=77)
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    assert all(parameter.requires_grad for parameter in student.parameters())
    torch.testing.assert_close(student.head.weight_VD, made.head.weight_VD.float())


def test_a_configuration_file_or_its_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**SIZES, "architectures": ["X"], "published_extra": 1}))
    for path in (tmp_path, tmp_path / "config.json"):
        assert load_student(config=str(path), vocab_size=70).model.config.num_hidden_layers == 2


@pytest.mark.parametrize(
    "family",
    [
        ("mamba2", {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1}),  # an infinity in its file
        ("gemma4_text", {"head_dim": 8, "global_head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]}),
        ("gemma3", {"text_config": {**SIZES, "model_type": "gemma3_text", "vocab_size": 80}}),  # with eyes
    ],
    ids=lambda family: family[0],
)
def test_a_configuration_as_transformers_writes_it(family: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    """The student has the tokens of the file, and of a published model the part that reads text."""
    name, sizes = family
    common = {} if "text_config" in sizes else {key: size for key, size in SIZES.items() if key != "model_type"}
    written = transformers.AutoConfig.for_model(name, **{**common, "vocab_size": 80, **sizes})
    written.save_pretrained(tmp_path)
    made = load_student(config=str(tmp_path), vocab_size=77).model
    assert made.config.num_hidden_layers == 2 and len(made.get_input_embeddings().weight) == 80
    assert not any("vision" in parameter for parameter, _ in made.named_parameters())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "either model"),
        ({"model": "x", "config": SIZES}, "either model"),
        ({"config": {**SIZES, "model_type": "qwenn3"}}, "unknown model_type 'qwenn3'; did you mean 'qwen3'"),
        ({"config": {**SIZES, "hiden_size": 3}}, "unknown key 'hiden_size'; did you mean 'hidden_size'"),
        ({"config": {**SIZES, "vocab_size": 76}}, "76 rows, the tokenizer 77"),
        ({"config": "nowhere/config.json"}, "no such file"),
    ],
)
def test_mistakes_are_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_student(**given, vocab_size=77)
