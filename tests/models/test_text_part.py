"""A multimodal checkpoint is a model of text here: the same logits, and nothing that sees is loaded, kept or saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_families
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from distill.models.checkpoints import load_config, resolve
from distill.models.huggingface import HuggingFaceLanguageModel, load_pretrained
from distill.models.streaming import Weights, without_weights
from distill.models.tensors import tensors
from distill.models.text_part import text_config

IDS_BL = torch.arange(24).view(2, 12) * 7 % 290
POSITIONS_BL = torch.arange(12).expand(2, -1)


@pytest.fixture(scope="module")
def wrapped(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`wrapped("mistral3")`: the folder of a tiny model that sees, and its logits."""
    made: dict[str, tuple[Path, torch.Tensor]] = {}

    def make(family: str) -> tuple[Path, torch.Tensor]:
        if family not in made:
            folder = tiny_families.write(family, tmp_path_factory.mktemp(family))
            whole = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
            with torch.no_grad():
                made[family] = folder, whole(input_ids=IDS_BL, use_cache=False).logits
        return made[family]

    return make


@pytest.mark.parametrize("family", ["mistral3", "gemma3", "llama4", "qwen2_5_vl", "qwen3_vl"])
def test_its_text_part_says_the_same_and_sees_nothing(wrapped: Any, family: str) -> None:
    folder, own_BLV = wrapped(family)
    checkpoint = resolve(str(folder))
    model = HuggingFaceLanguageModel(load_pretrained(checkpoint, torch.float32)).eval()
    model.check()
    with torch.no_grad():
        torch.testing.assert_close(model.head(model.body(IDS_BL, POSITIONS_BL)), own_BLV)
    assert not [name for name, _ in model.named_parameters() if "vis" in name or "project" in name]
    # A reader of single tensors, such as a streamed teacher, finds all that the model has.
    empty = without_weights(load_config(checkpoint), torch.float32, False)
    weights = Weights(empty, tensors(checkpoint), family)
    tied = {"lm_head.weight"} if empty.config.tie_word_embeddings else set()
    assert weights.missing <= tied
    state = model.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in weights.read(set(state) - tied))


def test_a_wrapper_may_leave_out_what_its_text_family_does_to_logits(wrapped: Any) -> None:
    folder, own_BLV = wrapped("aya_vision")  # without the scale of Cohere's logits
    model = HuggingFaceLanguageModel(load_pretrained(resolve(str(folder)), torch.float32)).eval()
    model.check()
    with torch.no_grad():
        torch.testing.assert_close(model.head(model.body(IDS_BL, POSITIONS_BL)), own_BLV)


def test_a_student_of_one_is_saved_as_the_text_family_under_its_names(wrapped: Any, tmp_path: Path) -> None:
    folder, own_BLV = wrapped("mistral3")
    HuggingFaceLanguageModel(load_pretrained(resolve(str(folder)), torch.float32)).save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(again).__name__ == "MistralForCausalLM"
    assert {name.split(".")[0] for name in load_file(tmp_path / "model.safetensors")} == {"model"}, "its head is tied"
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=IDS_BL).logits, own_BLV)


def test_a_trimmed_one_keeps_its_logits_and_forgets_the_token_of_pictures(wrapped: Any) -> None:
    folder, own_BLV = wrapped("qwen3_vl")
    model = HuggingFaceLanguageModel(load_pretrained(resolve(str(folder)), torch.float32)).eval()
    kept = IDS_BL.unique()
    model.keep_tokens(kept)
    with torch.no_grad():
        logits_BLV = model.head(model.body(torch.searchsorted(kept, IDS_BL), POSITIONS_BL))
    torch.testing.assert_close(logits_BLV, own_BLV[..., kept])
    assert model.model.config.image_token_id == -1


def test_a_configuration_of_text_stays_itself() -> None:
    for family in ("llama", "qwen3_vl"):
        config = tiny_families.tiny_config(family)
        assert text_config(config) is config
    assert text_config(tiny_families.tiny_config("mistral3")).model_type == "mistral"
