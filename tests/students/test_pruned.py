"""A pruned student is its teacher with layers taken out: same weights, ordinary model."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from distill.errors import UserError
from distill.models.huggingface import HuggingFaceLanguageModel
from students.huggingface import load_student
from students.lora import load_lora_student
from students.pruned import chosen_layers, prune_teacher, pruned_weights

LAYERS = 5
SIZES: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": None,
}
EXTRA: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 64},
    "gemma2": {"head_dim": 8, "sliding_window": 3},
    "gemma3_text": {"head_dim": 8, "sliding_window": 3},
    "qwen3": {"head_dim": 8},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 4},
}
FAMILIES = [
    "llama",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "mistral",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "phi3",
    "olmo2",
    "granite",
    "mamba2",
]


def teacher_folder(family: str, folder: Path, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SIZES, **EXTRA.get(family, {}), **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    return model


def layer_list(model: Any) -> tuple[Any, str]:
    for name in ("layers", "h"):
        if hasattr(model.base_model, name):
            return model.base_model, name
    raise AssertionError("no layer list")


@pytest.mark.parametrize("family", FAMILIES)
def test_pruning_equals_taking_layers_out_of_the_loaded_model(family: str, tmp_path: Path) -> None:
    teacher = teacher_folder(family, tmp_path)
    # gemma's kinds of attention go by the layer's number: keep some of either kind, out of their usual rhythm
    chosen = [0, 3, 4]
    student = prune_teacher(str(tmp_path), chosen).eval()
    parent, name = layer_list(teacher)
    setattr(parent, name, torch.nn.ModuleList(getattr(parent, name)[index] for index in chosen))
    types = teacher.config.to_dict().get("layer_types")
    teacher.config.num_hidden_layers = len(chosen)
    if types:
        teacher.config.layer_types = [types[index] for index in chosen]
    ids_BL, positions_BL = torch.randint(0, 99, (1, 12)), torch.arange(12)[None]
    with torch.no_grad():
        expected = HuggingFaceLanguageModel(teacher).body(ids_BL, positions_BL)
        torch.testing.assert_close(student.body(ids_BL, positions_BL), expected, rtol=1e-5, atol=1e-5)
    assert student.model.config.num_hidden_layers == 3


def test_the_result_is_an_ordinary_float32_folder(tmp_path: Path) -> None:
    teacher_folder("gemma3_text", tmp_path / "teacher")
    student = prune_teacher(str(tmp_path / "teacher"), 2).eval()
    student.save_pretrained(tmp_path / "student")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    config = json.loads((tmp_path / "student" / "config.json").read_text())
    assert config["num_hidden_layers"] == len(config["layer_types"]) == 2 and "quantization_config" not in config
    ids_BL = torch.arange(7)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids_BL).logits, student.head(student.body(ids_BL, ids_BL)))
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_only_kept_tensors_are_read() -> None:
    class Source:
        def __init__(self) -> None:
            self.read_names: list[str] = []

        def names(self) -> list[str]:
            return ["embed", *(f"model.layers.{index}.w" for index in range(12)), "transformer.h.11.layers.w"]

        def read(self, name: str) -> torch.Tensor:
            self.read_names.append(name)
            return torch.zeros(1)

    source = Source()
    kept = pruned_weights(source, [0, 11])
    assert source.read_names == ["embed", "model.layers.0.w", "model.layers.11.w", "transformer.h.11.layers.w"]
    assert list(kept) == ["embed", "model.layers.0.w", "model.layers.1.w", "transformer.h.1.layers.w"]


def test_evenly_spaced_layers_keep_the_ends() -> None:
    for total in (1, 2, 7, 30):
        for count in range(2, total + 1):
            chosen = chosen_layers(count, total)
            gaps = [b - a for a, b in itertools.pairwise(chosen)]
            assert chosen[0] == 0 and chosen[-1] == total - 1 and len(chosen) == count
            assert max(gaps) - min(gaps) <= 1
    assert chosen_layers(1, 7) == [0]


@pytest.mark.parametrize("layers", [0, 8, -1, [], [0, 7], [-1, 2], [1, 1], [2, 1]])
def test_wrong_layers_are_refused(layers: int | list[int]) -> None:
    with pytest.raises(ValueError, match=r"^layers: "):
        chosen_layers(layers, 7)


def test_a_quantized_teacher_folder_is_refused(tmp_path: Path) -> None:
    teacher_folder("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="quantized: set teacher to an unquantized copy"):
        prune_teacher(str(tmp_path), 2)
    config["quantization_config"] = {"quant_method": "hqq"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for make in (
        lambda: prune_teacher(str(tmp_path), 2),
        lambda: load_student(str(tmp_path)),
        lambda: load_lora_student(str(tmp_path)),
    ):
        with pytest.raises(UserError, match="quantised as hqq, which is not read here"):
            make()


def test_a_last_layer_that_the_family_would_change_is_refused(tmp_path: Path) -> None:
    """Gemma 4's code makes the last layer one that sees the whole text, whatever its weights were made for."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    sizes = {"global_head_dim": 16, "hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 99}
    teacher_folder("gemma4_text", tmp_path, layer_types=kinds, head_dim=8, **sizes)
    with pytest.raises(ValueError, match=r"layer 3 does not: end with one of \[1, 4\]"):
        prune_teacher(str(tmp_path), [0, 3])
    student = prune_teacher(str(tmp_path), [0, 2, 4])  # compared with its teacher there
    assert student.model.config.to_dict()["per_layer_config"] == {"2": {"head_dim": 16}}
