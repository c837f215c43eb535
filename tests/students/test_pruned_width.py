"""A student without its teacher's idle neurons, heads and channels answers as the teacher does, in every family."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from distill.models.huggingface import HuggingFaceLanguageModel
from students.pruned import prune_teacher, pruned_config, pruned_weights
from students.pruning_width import FAMILIES, FIXED_HIDDEN, Narrowing, Widths, largest, narrowed_widths, rows_of

LAYERS, VOCABULARY, HIDDEN, NEURONS, HEADS, GROUPS = 3, 61, 24, 20, 6, 3
HEAD = 8  # not HIDDEN / HEADS: the rows of the heads and the channels must not be mistaken for one another
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "head_dim": HEAD,
    "intermediate_size": NEURONS,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-12,  # so that fewer channels under a norm's root are a plain factor
    "pad_token_id": None,
}
EXTRA: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "qwen2": {"tie_word_embeddings": True},
    "gemma2": {"sliding_window": 3},
    "gemma3_text": {"sliding_window": 3},
    "granite": {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0},
}
NARROWABLE = [family for family in FAMILIES if family not in FIXED_HIDDEN]


def teacher_model(family: str) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SIZES, **EXTRA.get(family, {})})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model


def first_samples(count: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids_BL = torch.randint(0, VOCABULARY, (count, 12), generator=generator)
    return ids_BL, torch.cat([torch.arange(7), torch.arange(5)]).expand(count, -1), torch.ones_like(ids_BL).bool()


@torch.no_grad()
def logits(model: HuggingFaceLanguageModel) -> Tensor:
    ids_BL, positions_BL, _ = first_samples(2)
    return model.head(model.eval().body(ids_BL, positions_BL))


def pruned(model: Any, folder: Path, **options: Any) -> HuggingFaceLanguageModel:
    model.save_pretrained(folder)
    return prune_teacher(str(folder), first_samples=first_samples, calibration_samples=3, **options)


def rows(projection: Any, start: int, count: int) -> None:
    """Silence rows of a linear layer, so that they give 0."""
    projection.weight[start : start + count] = 0
    if projection.bias is not None:
        projection.bias[start : start + count] = 0


@torch.no_grad()
def silence_neurons(layer: Any, neurons: list[int]) -> None:
    for neuron in neurons:
        if hasattr(layer.mlp, "gate_up_proj"):
            rows(layer.mlp.gate_up_proj, NEURONS + neuron, 1)
        else:
            rows(layer.mlp.up_proj, neuron, 1)


@torch.no_grad()
def silence_group(layer: Any, group: int) -> None:
    """Queries and keys too, for OLMo 2, whose norm runs over all heads."""
    attention, shared = layer.self_attn, HEADS // GROUPS
    if hasattr(attention, "qkv_proj"):
        rows(attention.qkv_proj, (HEADS + GROUPS + group) * HEAD, HEAD)
        return
    rows(attention.v_proj, group * HEAD, HEAD)
    rows(attention.k_proj, group * HEAD, HEAD)
    rows(attention.q_proj, group * HEAD * shared, HEAD * shared)


@torch.no_grad()
def silence_channels(model: Any, channels: list[int]) -> None:
    """Nothing writes to these channels of the residual stream."""
    model.model.embed_tokens.weight[:, channels] = 0
    for layer in model.model.layers:
        for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
            for channel in channels:
                rows(projection, channel, 1)


def wide_norms(model: Any, family: str, kind: str) -> Iterator[Any]:
    """Norms whose mean of squares is over fewer channels (or heads) in the student."""
    for name, module in model.named_modules():
        over_heads = name.endswith(("q_norm", "k_norm"))
        if name.endswith("norm") and over_heads == (kind == "heads") and (family == "olmo2" or not over_heads):
            yield module


@torch.no_grad()
def rescale(norms: Iterator[Any], factor: float) -> None:
    """sum/D' instead of sum/D under the root of a norm is a factor, which the norm's weight takes back."""
    for norm in norms:
        norm.weight *= factor


@pytest.mark.parametrize("family", FAMILIES)
def test_the_teachers_own_sizes_change_nothing_and_need_no_samples(family: str, tmp_path: Path) -> None:
    model = teacher_model(family)
    model.save_pretrained(tmp_path)
    student = prune_teacher(str(tmp_path), LAYERS, "importance", HIDDEN, NEURONS, GROUPS)
    assert torch.equal(logits(student), logits(HuggingFaceLanguageModel(model)))


@pytest.mark.parametrize("family", FAMILIES)
def test_idle_neurons_are_found_and_not_missed(family: str, tmp_path: Path) -> None:
    model = teacher_model(family)
    for index, layer in enumerate(model.model.layers):
        silence_neurons(layer, [index, 7, 19])
    student = pruned(model, tmp_path, intermediate_size=NEURONS - 3)
    torch.testing.assert_close(logits(student), logits(HuggingFaceLanguageModel(model)))
    assert {layer.mlp.down_proj.weight.shape for layer in student.model.model.layers} == {(HIDDEN, NEURONS - 3)}


@pytest.mark.parametrize("family", FAMILIES)
def test_idle_heads_are_found_and_not_missed(family: str, tmp_path: Path) -> None:
    model = teacher_model(family)
    for layer, group in zip(model.model.layers, (0, 1, 2), strict=True):
        silence_group(layer, group)
    student = pruned(model, tmp_path, key_value_groups=2)
    if family == "olmo2":
        rescale(wide_norms(student.model, family, "heads"), math.sqrt(3 / 2))
    torch.testing.assert_close(logits(student), logits(HuggingFaceLanguageModel(model)), rtol=1e-4, atol=1e-5)
    config = student.model.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, HEAD)


@pytest.mark.parametrize("family", NARROWABLE)
def test_idle_channels_are_found_and_not_missed(family: str, tmp_path: Path) -> None:
    model = teacher_model(family)
    silence_channels(model, [0, 4, 5, 9, 14, 23])
    student = pruned(model, tmp_path, hidden_size=18)
    rescale(wide_norms(student.model, family, "hidden"), math.sqrt(HIDDEN / 18))
    torch.testing.assert_close(logits(student), logits(HuggingFaceLanguageModel(model)), rtol=1e-3, atol=1e-4)
    assert student.head.weight_VD.shape == (VOCABULARY, 18)


@pytest.mark.parametrize("family", NARROWABLE)
def test_all_at_once_is_an_ordinary_folder(family: str, tmp_path: Path) -> None:
    sizes = {"layers": 2, "depth": "importance", "hidden_size": 16, "intermediate_size": 11, "key_value_groups": 1}
    student = pruned(teacher_model(family), tmp_path / "teacher", **sizes)
    student.save_pretrained(tmp_path / "student")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert torch.equal(logits(HuggingFaceLanguageModel(again)), logits(student))
    config = json.loads((tmp_path / "student" / "config.json").read_text())
    expected = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 11, "num_attention_heads": 2}
    assert expected.items() <= config.items() and config["head_dim"] == HEAD
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}


def test_slices_are_the_rows_and_columns_that_were_chosen() -> None:
    """The student's weights are the teacher's, indexed by hand, in every case."""
    model = teacher_model("qwen3")
    hidden, neurons, groups = torch.tensor([1, 2, 9, 23]), torch.tensor([0, 19]), torch.tensor([0, 2])
    other = [torch.tensor([5, 6])] * LAYERS
    narrowing = Narrowing(
        "qwen3", Widths.of(model.config), hidden, [*[torch.tensor([1, 2])] * 2, groups], [*other[:2], neurons]
    )
    weights = model.state_dict()

    class Source:
        def names(self) -> list[str]:
            return sorted(weights)

        def read(self, name: str) -> Tensor:
            return weights[name]

    kept = pruned_weights(Source(), [0, 2], narrowing)
    queries, keys = [*range(16), *range(32, 48)], [*range(8), *range(16, 24)]
    here = "model.layers.2."
    by_hand = {
        "self_attn.q_proj.weight": weights[here + "self_attn.q_proj.weight"][queries][:, hidden],
        "self_attn.k_proj.weight": weights[here + "self_attn.k_proj.weight"][keys][:, hidden],
        "self_attn.v_proj.weight": weights[here + "self_attn.v_proj.weight"][keys][:, hidden],
        "self_attn.o_proj.weight": weights[here + "self_attn.o_proj.weight"][hidden][:, queries],
        "self_attn.q_norm.weight": weights[here + "self_attn.q_norm.weight"],
        "mlp.gate_proj.weight": weights[here + "mlp.gate_proj.weight"][[0, 19]][:, hidden],
        "mlp.down_proj.weight": weights[here + "mlp.down_proj.weight"][hidden][:, [0, 19]],
        "input_layernorm.weight": weights[here + "input_layernorm.weight"][hidden],
    }
    for name, expected in by_hand.items():
        assert torch.equal(kept["model.layers.1." + name], expected), name
    assert torch.equal(kept["model.embed_tokens.weight"], weights["model.embed_tokens.weight"][:, hidden])
    assert torch.equal(kept["lm_head.weight"], weights["lm_head.weight"][:, hidden])
    widths = narrowed_widths(model.config, 4, 2, 2)
    shapes = AutoModelForCausalLM.from_config(pruned_config(model.config, [0, 2], widths)).state_dict()
    assert {name: tensor.shape for name, tensor in kept.items()} == {n: t.shape for n, t in shapes.items()}


def test_tensors_that_are_not_known_or_have_another_shape_are_never_sliced() -> None:
    narrowing = Narrowing("llama", Widths.of(teacher_model("llama").config), torch.arange(4))
    with pytest.raises(ValueError, match="does not know"):
        narrowing.slice(torch.zeros(HIDDEN), "self_attn.sinks", 0)
    with pytest.raises(ValueError, match="its configuration says"):
        narrowing.slice(torch.zeros(HIDDEN + 1), "norm.weight", None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "at least one of"),
        ({"hidden_size": HIDDEN + 1}, "hidden_size: 25 is out of range; the teacher has 24"),
        ({"hidden_size": 0}, "1 to 24"),
        ({"intermediate_size": 21}, "intermediate_size: 21"),
        ({"key_value_groups": 4}, "key_value_groups: 4"),
        ({"depth": "importance", "hidden_size": 8}, "layers must be the number"),
        ({"depth": "importance", "layers": [0, 1]}, "layers must be the number"),
        ({"layers": 4, "depth": "importance"}, "layers: 4 is out of range"),
        ({"hidden_size": 12, "calibration_samples": 0}, "calibration_samples: 0"),
        ({"hidden_size": 12, "calibration_samples": 9}, "calibration_samples: 9, but the corpus has 5"),
        ({"hidden_size": 12, "first_samples": None}, "samples of the corpus"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    teacher_model("llama").save_pretrained(tmp_path)
    few = {"first_samples": lambda count: first_samples(min(count, 5))}
    with pytest.raises(ValueError, match=message):
        prune_teacher(str(tmp_path), **{**few, **options})


@pytest.mark.parametrize("options", [{"layers": 1, "depth": "importance"}, {"intermediate_size": 8}])
def test_a_family_whose_tensors_are_not_known_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    config = AutoConfig.for_model("gpt_neox", **{**SIZES, "num_attention_heads": 4, "num_hidden_layers": 2})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"gpt_neox \(known: llama, "):
        prune_teacher(str(tmp_path), first_samples=first_samples, **options)


@pytest.mark.parametrize("family", FIXED_HIDDEN)
def test_a_hidden_size_that_the_family_computes_with_is_refused(family: str, tmp_path: Path) -> None:
    teacher_model(family).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="hidden_size: gemma"):
        prune_teacher(str(tmp_path), hidden_size=8, first_samples=first_samples)


def test_the_largest_ascend_and_of_equal_ones_the_first_win() -> None:
    assert largest(torch.tensor([1.0, 5.0, 2.0, 5.0, 2.0]), 3).tolist() == [1, 2, 3]
    assert rows_of(torch.tensor([0, 2]), 3).tolist() == [0, 1, 2, 6, 7, 8]


def test_a_size_that_the_family_does_not_load_again_is_refused_with_the_nearest(tmp_path: Path) -> None:
    """transformers asks of llama that the hidden size is a multiple of the heads, whatever the size of a head."""
    with pytest.raises(ValueError, match=r"hidden_size: 20 is not a multiple of the 6 heads.* nearest: 18 or 24"):
        pruned(teacher_model("llama"), tmp_path, hidden_size=20)
