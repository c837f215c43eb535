"""Body and head together are the original model, for every supported family; unknown ways are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from distill.errors import UserError
from distill.models.huggingface import HuggingFaceLanguageModel, complain_about_missing
from distill.models.isolation import isolates_documents
from distill.models.language_model import LanguageModel
from teachers.huggingface import load_teacher
from teachers.streamed import load_streamed_teacher

FAMILIES = [
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma2",
    "gemma3_text",
    "phi3",
    "granite",
    "olmo2",
    "gpt2",
    "gpt_neox",
    "mamba2",
    "cohere",
]


@pytest.mark.parametrize("family", FAMILIES)
def test_head_of_body_is_the_models_own_logits(family: str, tiny_model: Any) -> None:
    original = tiny_model(family)
    adapter = HuggingFaceLanguageModel(original)
    ids_BL = torch.randint(0, 99, (2, 13), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = original(input_ids=ids_BL).logits
        found = adapter.head(adapter.body(ids_BL, torch.arange(13).expand(2, -1)))
    assert expected.std() > 0.05, "logits too small to tell"
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    adapter.check()
    assert isinstance(adapter, LanguageModel)


def test_a_cast_model_has_exact_positions(tiny_model: Any) -> None:
    adapter = HuggingFaceLanguageModel(tiny_model("llama"))
    exact = adapter.model.model.rotary_emb.inv_freq.clone()
    torch.nn.ModuleList([adapter]).to(torch.bfloat16)
    assert {parameter.dtype for parameter in adapter.parameters()} == {torch.bfloat16}
    assert torch.equal(adapter.model.model.rotary_emb.inv_freq, exact)
    adapter.check()
    assert adapter.to("meta").model.model.rotary_emb.inv_freq.is_meta


@pytest.mark.parametrize(("family", "isolated"), [(f, f != "mamba2") for f in FAMILIES])
def test_isolation_is_measured(family: str, isolated: bool, tiny_model: Any) -> None:
    adapter = HuggingFaceLanguageModel(tiny_model(family)).train()
    assert isolates_documents(adapter, 99, "cpu") is isolated
    assert adapter.training and adapter.model.training, "the measurement leaves the mode as it was"


def test_isolation_sees_a_mask_that_is_left_out(tiny_model: Any) -> None:
    class Unmasked(HuggingFaceLanguageModel):
        def body(self, input_ids_BL: torch.Tensor, position_ids_BL: torch.Tensor) -> torch.Tensor:
            everything = torch.ones_like(input_ids_BL)
            return self.model.model(
                input_ids=input_ids_BL, position_ids=position_ids_BL, attention_mask=everything
            ).last_hidden_state

    assert not isolates_documents(Unmasked(tiny_model("llama")), 99, "cpu")


@pytest.mark.parametrize(("family", "key"), [("granite", "logits_scaling"), ("gemma2", "final_logit_softcapping")])
def test_check_refuses_a_family_that_makes_logits_another_way(family: str, key: str, tiny_model: Any) -> None:
    model = tiny_model(family)
    own = model.forward
    model.forward = lambda **given: _scaled(own(**given))
    with pytest.raises(ValueError, match="in a way this adapter does not know"):
        HuggingFaceLanguageModel(model).check()


def _scaled(output: Any) -> Any:
    output.logits = output.logits * 0.98
    return output


def test_a_model_without_a_head_is_refused(tiny_model: Any) -> None:
    with pytest.raises(ValueError, match="not a causal language model"):
        HuggingFaceLanguageModel(tiny_model("llama").model)


def test_save_pretrained_writes_an_ordinary_folder(tmp_path: Path, tiny_model: Any) -> None:
    adapter = HuggingFaceLanguageModel(tiny_model("gemma2"))
    adapter.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    ids_BL = torch.arange(5)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids_BL).logits, adapter.model(input_ids=ids_BL).logits)


def test_missing_and_misshapen_weights_are_named() -> None:
    complain_about_missing({"missing_keys": set(), "mismatched_keys": set()}, "x")
    with pytest.raises(UserError, match=r"x: the checkpoint lacks a \(and 1 more weights that do not fit"):
        complain_about_missing({"missing_keys": {"b", "a"}, "mismatched_keys": set()}, "x")


@pytest.mark.parametrize(
    ("family", "ending", "words"),
    [
        (
            "llama",
            "1.mlp.up_proj.weight",
            r"has model\.layers\.1\.mlp\.up_proj\.weight as \[47, 32\], where .* \[48, 32\]",
        ),
        ("mixtral", "experts.7.w3.weight", r"do not make .*1\.mlp\.experts\.gate_up_proj: .* \[47, 32\] at entry 7"),
    ],
)
def test_a_tensor_of_another_shape_is_named_with_both(
    family: str, ending: str, words: str, tiny_model: Any, tmp_path: Path
) -> None:
    tiny_model(family).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = next(name for name in reversed(weights) if name.endswith(ending))
    weights[name] = weights[name][:-1].contiguous()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for load in (load_teacher, load_streamed_teacher):
        with pytest.raises(UserError, match=words):
            teacher = load(str(tmp_path), "none", "float32")
            teacher.body(torch.arange(8)[None], torch.arange(8)[None])
