"""A trimmed vocabulary: ids there and back, the file, the teacher's head; and a model that keeps some of its tokens.

Shapes: V the full vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from distill.errors import UserError
from distill.models.huggingface import HuggingFaceLanguageModel
from distill.models.language_model import Head
from distill.models.vocabulary import FILE, Vocabulary, trim_head

FAMILIES = ["llama", "qwen2", "gemma2", "gemma3_text", "phi", "phi3", "granite", "gpt2", "gpt_neox", "mamba2", "cohere"]
KEPT = torch.tensor([0, 3, 5, 6, 40, 41, 96])


def test_ids_there_and_back() -> None:
    vocabulary = Vocabulary(KEPT, 99)
    assert len(vocabulary) == len(KEPT)
    assert torch.equal(vocabulary.mapped(vocabulary.kept_ids), torch.arange(len(KEPT)))
    everything_V = vocabulary.mapped(torch.arange(99))
    assert int((everything_V >= 0).sum()) == len(KEPT) and int(everything_V.min()) == -1
    assert vocabulary.mapped(torch.tensor([[96, 1], [0, 98]])).tolist() == [[6, -1], [0, -1]]
    assert vocabulary.covers(torch.tensor([96, 96, 0])) and not vocabulary.covers(torch.tensor([96, 1]))


def test_the_file_comes_back_and_is_the_same_each_time(tmp_path: Path) -> None:
    vocabulary = Vocabulary(KEPT, 99)
    vocabulary.save(tmp_path)
    again = Vocabulary.load(tmp_path)
    assert torch.equal(again.kept_ids, KEPT) and again.full_size == 99
    assert again.fingerprint == vocabulary.fingerprint
    content = (tmp_path / FILE).read_bytes()
    again.save(tmp_path)
    assert (tmp_path / FILE).read_bytes() == content


def test_another_vocabulary_has_another_fingerprint() -> None:
    others = [Vocabulary(KEPT, 99), Vocabulary(KEPT, 100), Vocabulary(KEPT[1:], 99)]
    assert len({vocabulary.fingerprint for vocabulary in others}) == len(others)


def test_a_file_that_is_missing_or_damaged_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    with pytest.raises(UserError, match=r"vocabulary\.safetensors: missing"):
        Vocabulary.load(tmp_path)
    wrong: list[tuple[dict[str, Any], dict[str, str]]] = [
        ({"kept_ids": torch.tensor([3, 3])}, {"full_size": "9"}),
        ({"kept_ids": torch.tensor([3, 9])}, {"full_size": "9"}),
        ({"kept_ids": torch.tensor([3.0, 4.0])}, {"full_size": "9"}),
        ({"kept_ids": torch.tensor([3, 4])}, {}),
        ({"other": torch.tensor([3, 4])}, {"full_size": "9"}),
    ]
    for tensors, metadata in wrong:
        save_file(tensors, tmp_path / FILE, metadata=metadata)
        with pytest.raises(UserError, match="damaged"):
            Vocabulary.load(tmp_path)
    (tmp_path / FILE).write_bytes(b"nothing")
    with pytest.raises(UserError, match="damaged"):
        Vocabulary.load(tmp_path)


@pytest.mark.parametrize("options", [{}, {"scale": 0.5}, {"soft_cap": 3.0}], ids=["plain", "scale", "soft cap"])
def test_the_trimmed_head_makes_the_conditional_distribution(options: dict[str, float]) -> None:
    torch.manual_seed(0)
    head = Head(torch.randn(105, 8), torch.randn(105), **options)  # six rows are padding
    hidden_ND = torch.randn(7, 8)
    probs_NV = head.with_rows(99)(hidden_ND).softmax(-1)[:, KEPT]
    found = trim_head(head, Vocabulary(KEPT, 99))(hidden_ND).softmax(-1)
    torch.testing.assert_close(found, probs_NV / probs_NV.sum(-1, keepdim=True))


def test_a_head_of_a_smaller_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="not the same vocabulary"):
        trim_head(Head(torch.zeros(98, 4)), Vocabulary(KEPT, 99))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_model_that_keeps_some_tokens_gives_them_the_logits_they_had(
    family: str, tied: bool, tiny_model: Any, tmp_path: Path
) -> None:
    model = tiny_model(family, tie_word_embeddings=tied)
    adapter = HuggingFaceLanguageModel(model)
    before = sum(parameter.numel() for parameter in model.parameters())
    ids_BL = torch.randint(len(KEPT), (2, 9), generator=torch.Generator().manual_seed(1))
    positions_BL = torch.arange(9).expand(2, -1)
    with torch.no_grad():
        expected = model(input_ids=KEPT[ids_BL]).logits[..., KEPT]
        adapter.keep_tokens(KEPT)
        found = adapter.head(adapter.body(ids_BL, positions_BL))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    adapter.check()
    assert adapter.head.weight_VD.shape[0] == model.config.vocab_size == len(KEPT)
    is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert is_tied == tied
    width = model.get_input_embeddings().weight.shape[1]
    biases = 0 if adapter.head.bias_V is None else 1
    after = sum(parameter.numel() for parameter in model.parameters())
    assert before - after == (99 - len(KEPT)) * (width * (1 if tied else 2) + biases)

    adapter.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids_BL).logits, expected, rtol=0, atol=1e-6)


def test_the_configuration_speaks_of_the_new_ids(tiny_model: Any) -> None:
    model = tiny_model("llama", eos_token_id=[5, 7, 96], bos_token_id=1, pad_token_id=3)
    model.generation_config.eos_token_id = 5
    HuggingFaceLanguageModel(model).keep_tokens(KEPT)
    config, generation = model.config, model.generation_config
    assert (config.eos_token_id, config.bos_token_id, config.pad_token_id) == ([2, 6], None, 1)
    assert (generation.eos_token_id, generation.bos_token_id, generation.pad_token_id) == (2, None, 1)
    assert model.get_input_embeddings().padding_idx == 1, "else another token would never be learned"


def test_a_model_can_still_learn_all_its_tokens(tiny_model: Any) -> None:
    adapter = HuggingFaceLanguageModel(tiny_model("llama", tie_word_embeddings=False))
    adapter.keep_tokens(KEPT)
    ids_BL = torch.arange(len(KEPT))[None]
    adapter.head(adapter.body(ids_BL, ids_BL)).square().sum().backward()
    for weight in (adapter.model.get_input_embeddings().weight, adapter.model.get_output_embeddings().weight):
        assert weight.requires_grad and bool((weight.grad.abs().sum(-1) > 0).all())


def test_a_token_that_the_model_lacks_is_refused(tiny_model: Any) -> None:
    with pytest.raises(ValueError, match="99 tokens"):
        HuggingFaceLanguageModel(tiny_model("llama")).keep_tokens(torch.tensor([0, 99]))
