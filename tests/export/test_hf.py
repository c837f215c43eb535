"""An exported Hugging Face folder answers as the student does, and what does not is found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from distill.errors import UserError
from distill.export import hf, probe
from distill.export.hf import HuggingFaceFormat, stored_dtype
from distill.models.generation import generation_settings
from distill.models.saving import save_language_model
from distill.models.tokenizer_trimming import needed_tokens, trim_tokenizer
from distill.models.tokenizers import vocab_size
from distill.plugins import load_language_model

ENDS = ("bos_token_id", "eos_token_id")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen3"])
def test_logits_and_generation_equal_ours(
    family: str, hugging_face_student: Any, tokens_of: Any, greedy: Any, tmp_path: Path
) -> None:
    source, folder = hugging_face_student(tmp_path / "student", family), tmp_path / "out"
    HuggingFaceFormat().write(source, folder)
    ours, theirs = load_language_model(source), AutoModelForCausalLM.from_pretrained(folder)
    ids = tokens_of(folder)
    with torch.no_grad():
        found = theirs(input_ids=torch.tensor([ids])).logits[0]
    torch.testing.assert_close(found, probe.our_logits(ours, [ids])[0], rtol=0, atol=1e-4)
    made = theirs.generate(torch.tensor([ids]), max_new_tokens=9, do_sample=False, eos_token_id=None)
    assert made[0].tolist() == greedy(ours, ids, 9)


def test_tokenizer_template_and_special_tokens_survive(hugging_face_student: Any, read: Any, tmp_path: Path) -> None:
    source, folder = hugging_face_student(tmp_path / "student"), tmp_path / "out"
    HuggingFaceFormat().write(source, folder)
    before, after = (AutoTokenizer.from_pretrained(path) for path in (source, folder))
    talk = [{"role": "user", "content": "the union 日本"}]
    assert after.apply_chat_template(talk, tokenize=False) == before.apply_chat_template(talk, tokenize=False)
    assert after("the union 日本").input_ids == before("the union 日本").input_ids
    settings = read(folder / "generation_config.json")
    assert settings["eos_token_id"] == before.convert_tokens_to_ids("<|im_end|>") == 2
    assert settings["pad_token_id"] == before.convert_tokens_to_ids("<|pad|>") == 3
    assert settings.get("bos_token_id") is None, "the family's default is another tokenizer's"
    for name in ("config.json", "generation_config.json"):
        ours, theirs = read(source / name), read(folder / name)
        assert [ours.get(key) for key in ENDS] == [theirs.get(key) for key in ENDS] == [None, 2], name


def test_a_turn_that_ends_with_another_token_than_a_text_is_an_end_too(tokenizer: Any) -> None:
    made = tokenizer()
    made.eos_token = "<|end|>"
    assert generation_settings(None, made).eos_token_id == [0, 2]


@pytest.mark.parametrize(("published", "kept"), [([2, 0], [2, 0]), ([2, 77], 2), (77, 2), ([0, 1], 2)])
def test_a_list_of_ends_is_kept_when_the_tokenizer_bears_it_out(published: Any, kept: Any, tokenizer: Any) -> None:
    made = generation_settings(GenerationConfig(eos_token_id=published, max_new_tokens=5), tokenizer())
    assert made.eos_token_id == kept and made.max_new_tokens == 5


@pytest.mark.parametrize("name", ["bfloat16", "float16", None])
def test_weights_have_the_type_asked_for(
    name: str | None, hugging_face_student: Any, read: Any, tmp_path: Path
) -> None:
    trained = torch.bfloat16 if name is None else torch.float32
    source = hugging_face_student(tmp_path / "student", dtype=trained)
    HuggingFaceFormat(name).write(source, tmp_path / "out")
    expected = torch.bfloat16 if name is None else getattr(torch, name)
    assert {value.dtype for value in load_file(tmp_path / "out/model.safetensors").values()} == {expected}
    assert stored_dtype(tmp_path / "out") == expected
    assert read(tmp_path / "out/config.json")["dtype"] == str(expected).removeprefix("torch.")


def test_a_trimmed_vocabulary_goes_along(
    hugging_face_student: Any, tokenizer: Any, tokens_of: Any, tmp_path: Path
) -> None:
    model, full = load_language_model(hugging_face_student(tmp_path / "full")), tokenizer()
    counts_V = np.zeros(vocab_size(full), dtype=np.int64)
    counts_V[full("the state of the union").input_ids] = 1
    vocabulary = needed_tokens(full, counts_V)
    assert len(vocabulary) < vocab_size(full)
    model.keep_tokens(vocabulary.kept_ids)
    trimmed, source = trim_tokenizer(full, vocabulary), tmp_path / "trimmed"
    save_language_model(model, source, "huggingface", {}, trimmed, write_more=vocabulary.save)
    HuggingFaceFormat().write(source, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == trimmed.get_vocab()
    ids = tokens_of(tmp_path / "out")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(input_ids=torch.tensor([ids])).logits[0]
    assert found.shape[1] == len(vocabulary)
    torch.testing.assert_close(found, probe.our_logits(model, [ids])[0], rtol=0, atol=1e-4)
    assert not (tmp_path / "out/vocabulary.safetensors").exists()


def test_large_weights_are_split(
    hugging_face_student: Any, tokens_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf, "SHARD", "50KB")
    source, folder = hugging_face_student(tmp_path / "student"), tmp_path / "out"
    HuggingFaceFormat().write(source, folder)
    assert len(list(folder.glob("model-0*.safetensors"))) > 1
    ids = tokens_of(folder)
    found = AutoModelForCausalLM.from_pretrained(folder)(input_ids=torch.tensor([ids])).logits[0]
    torch.testing.assert_close(found, probe.our_logits(load_language_model(source), [ids])[0], rtol=0, atol=1e-4)


def test_a_missing_weight_is_found_in_the_process_without_distill(hugging_face_student: Any, tmp_path: Path) -> None:
    source, folder = hugging_face_student(tmp_path / "student"), tmp_path / "out"
    HuggingFaceFormat("bfloat16").write(source, folder)
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"transformers alone cannot open it: .*model\.norm\.weight"):
        HuggingFaceFormat("bfloat16").check(source, folder)


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("name", [None, "float16"])
def test_one_other_weight_is_found(name: str | None, hugging_face_student: Any, tmp_path: Path) -> None:
    source, folder = hugging_face_student(tmp_path / "student"), tmp_path / "out"
    HuggingFaceFormat(name).write(source, folder)
    assert ("away from the student" in HuggingFaceFormat(name).check(source, folder)) is (name is not None)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][0, 0] += 0.1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"answers otherwise: .* largest difference of a logit \d"):
        HuggingFaceFormat(name).check(source, folder)


@pytest.mark.usefixtures("in_this_process")
def test_weights_beyond_the_range_of_a_type_are_found(hugging_face_student: Any, tmp_path: Path) -> None:
    source, folder = hugging_face_student(tmp_path / "student"), tmp_path / "out"
    weights = load_file(source / "model.safetensors")
    weights["lm_head.weight"][0, 0] = 1e6
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    HuggingFaceFormat("float16").write(source, folder)
    with pytest.raises(UserError, match=r"answers otherwise: .* logit nan"):
        HuggingFaceFormat("float16").check(source, folder)


@pytest.mark.usefixtures("in_this_process")
def test_another_tokenizer_is_found(hugging_face_student: Any, tmp_path: Path) -> None:
    source, folder = hugging_face_student(tmp_path / "student"), tmp_path / "out"
    HuggingFaceFormat().write(source, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["merges"] = content["model"]["merges"][:1]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="other tokens of the same text"):
        HuggingFaceFormat().check(source, folder)


def test_a_difference_that_is_no_number_is_none_too_small() -> None:
    fine, broken = torch.zeros(2, 3), torch.tensor([[0.0, 0.0, float("nan")], [9.0, 0.0, 0.0]])
    for ours, theirs in (([fine, fine], [broken, fine]), ([fine, fine], [fine, broken]), ([broken], [broken])):
        assert not probe.compare(ours, theirs).largest <= 1e9
    assert probe.compare([fine], [fine + 0.5]).largest == 0.5
    with pytest.raises(UserError, match="shape"):
        probe.compare([fine], [fine[:1]])


def test_a_tokenizer_larger_than_the_model_is_refused(hugging_face_student: Any, tmp_path: Path) -> None:
    model = load_language_model(hugging_face_student(tmp_path / "student"))
    with pytest.raises(UserError, match="token 9999 has no row"):
        probe.our_logits(model, [[1, 9999]])
