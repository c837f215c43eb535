"""A student without its teacher's idle neurons, heads and channels answers as the teacher does, in every family."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from distill.models.huggingface import HuggingFaceLanguageModel
from students.lora import load_lora_student
from students.pruned import prune_teacher, pruned_config, pruned_weights
from students.pruning_families import FAMILIES
from students.pruning_stream import split_name
from students.pruning_width import Narrowing, Widths, largest, narrowed_widths, rows_of

LAYERS, VOCABULARY, HIDDEN, NEURONS, HEADS, GROUPS, EXPERTS = 3, 61, 24, 20, 6, 3, 6
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
    "gemma4_text": {
        "global_head_dim": 16,
        "hidden_size_per_layer_input": 4,
        "vocab_size_per_layer_input": VOCABULARY,
        "sliding_window": 3,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    },
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "block_multiple_of": 4, "intermediate_size": 30},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "olmo3": {"sliding_window": 3},
    "olmoe": {"head_dim": 4},
    "deepseek_v2": {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 4, "first_k_dense_replace": 0},
    "deepseek_v3": {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 4, "first_k_dense_replace": 1},
    "glm4_moe": {"first_k_dense_replace": 1},
    "ernie4_5_moe": {"moe_k": 2},
    "phimoe": {"router_jitter_noise": 0.0, "input_jitter_noise": 0.0},
}
HYBRID = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
}
OFFSET_NORMS = ("qwen3_5_text", "qwen3_next", "qwen3_5_moe_text")
EXTRA |= {family: HYBRID for family in OFFSET_NORMS}
OF_MIXTURES: dict[str, Any] = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 8),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim"), 8),
    "num_experts_per_tok": 2,
    "qk_rope_head_dim": 4,
}
DENSE = [family for family, known in FAMILIES.items() if not known.is_mixture]
MIXTURES = [family for family, known in FAMILIES.items() if known.is_mixture]
NARROWABLE = [*(family for family in DENSE if "hidden_size" not in FAMILIES[family].fixed)]
DIFFERENT = ("gpt_oss", "deepseek_v3", "qwen3_next")  # mixtures of one kind each
OF_HEADS = [*(family for family in DENSE if "key_value_groups" not in FAMILIES[family].fixed), "gpt_oss", "qwen3_next"]
SHARED_NORMS = ("olmo2", "olmo3")


def teacher_model(family: str) -> Any:
    torch.manual_seed(0)
    known = set(CONFIG_MAPPING[family]().to_dict()) | set(getattr(CONFIG_MAPPING[family], "attribute_map", {}))
    mixture = {name: size for name, size in OF_MIXTURES.items() if name in known} if family in MIXTURES else {}
    epsilon = {"norm_eps": 1e-12} if family.startswith("lfm2") else {}
    config = AutoConfig.for_model(family, **{**SIZES, **mixture, **epsilon, **EXTRA.get(family, {})})
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


@torch.no_grad()
def silence(model: Any, family: str, rows_of_axis: dict[str, Any], only: tuple[str, ...] = ()) -> None:
    """Zero rows of every tensor, chosen by its axes: `{"F": lambda layer: [3]}`; `only`: tensors whose names end so."""
    for name, tensor in model.state_dict().items():
        layer, local = split_name(name)
        axes = FAMILIES[family].axes_of(local)
        assert axes is not None and len(axes) == tensor.dim(), name
        chosen = rows_of_axis.get(axes[0])
        if chosen is not None and (layer is not None or axes[0] == "D") and (not only or local.endswith(only)):
            tensor[chosen(layer)] = 0


def silence_neurons(model: Any, family: str) -> None:
    for_gate_and_up = {"F": lambda layer: [layer, 7, 19], "U": lambda layer: [layer, 7, 19, NEURONS + layer, 27, 39]}
    silence(model, family, for_gate_and_up)


def silence_groups(model: Any, family: str) -> None:
    """Queries and keys too, for OLMo, whose norm runs over all heads: group 0 in layer 0, 1 in layer 1, and so on."""

    def heads(layer: int, size: int, first: int = 0) -> list[int]:
        return [*range(first + layer * size, first + (layer + 1) * size)]

    shared, all_queries = HEADS // GROUPS * HEAD, HEADS * HEAD
    of_axis = {
        "Q": lambda layer: heads(layer, shared),
        "W": lambda layer: heads(layer, 2 * shared),
        "K": lambda layer: heads(layer, HEAD),
        "P": lambda layer: heads(layer, HEAD, all_queries + GROUPS * HEAD),
    }
    silence(model, family, of_axis)


def silence_channels(model: Any, family: str, channels: list[int]) -> None:
    """Nothing writes to these channels of the residual stream."""
    with torch.no_grad():
        model.model.embed_tokens.weight[:, channels] = 0
        for name, tensor in model.state_dict().items():
            layer, local = split_name(name)
            if layer is not None and not local.endswith("norm.weight") and "layernorm" not in local:
                for dim, axis in enumerate(FAMILIES[family].axes_of(local) or ""):
                    writes = "down_proj" in local or "o_proj" in local or "out_proj" in local or "w2" in local
                    if writes and (axis == "D" or (local == "conv.out_proj.weight" and dim == 0)):
                        tensor.index_fill_(dim, torch.tensor(channels), 0)


@torch.no_grad()
def rescale(model: Any, family: str, axes: str, factor: float) -> None:
    """Give the norms over an axis a factor: sum/D' instead of sum/D under the root is one, which they take back."""
    for name, tensor in model.state_dict().items():
        local = split_name(name)[1]
        if local.endswith("norm.weight") and FAMILIES[family].axes_of(local) in axes:
            offset = 1.0 if family in OFFSET_NORMS else 0.0
            tensor.copy_((tensor + offset) * factor - offset)


@pytest.mark.parametrize("family", ["llama", "phi3", "olmo2", "gemma4_text", "lfm2", "qwen3_5_text", "gpt_oss"])
def test_the_teachers_own_sizes_change_nothing_and_need_no_samples(family: str, tmp_path: Path) -> None:
    model = teacher_model(family)
    model.save_pretrained(tmp_path)
    student = prune_teacher(str(tmp_path), LAYERS, "importance", hidden_size=HIDDEN)
    torch.testing.assert_close(logits(student), logits(HuggingFaceLanguageModel(model)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", DENSE)
def test_idle_neurons_are_found_and_not_missed(family: str, tmp_path: Path) -> None:
    model = teacher_model(family)
    silence_neurons(model, family)
    student = pruned(model, tmp_path, intermediate_size=NEURONS - 3)
    torch.testing.assert_close(logits(student), logits(HuggingFaceLanguageModel(model)))
    shapes = {
        tuple(t.shape) for n, t in student.model.state_dict().items() if n.endswith(("down_proj.weight", "w2.weight"))
    }
    assert shapes == {(HIDDEN, NEURONS - 3)}


@pytest.mark.parametrize("family", OF_HEADS)
def test_idle_heads_are_found_and_not_missed(family: str, tmp_path: Path) -> None:
    model = teacher_model(family)
    silence_groups(model, family)
    if family == "gpt_oss":  # a head without keys still sees its sink alone, and gives nothing for it
        assert not model.model.layers[0].self_attn.v_proj.weight[:HEAD].any()
    student = pruned(model, tmp_path, key_value_groups=2)
    if family in SHARED_NORMS:
        rescale(student.model, family, "QK", math.sqrt(3 / 2))
    torch.testing.assert_close(logits(student), logits(HuggingFaceLanguageModel(model)), rtol=1e-4, atol=1e-5)
    config = student.model.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, HEAD)


@pytest.mark.parametrize("family", [*NARROWABLE, *DIFFERENT])
def test_idle_channels_are_found_and_not_missed(family: str, tmp_path: Path) -> None:
    model = teacher_model(family)
    idle = [0, 4, 5, 9, 14, 23] if family in DENSE else [0, 4, 5, 9, 14, 18, 22, 23]
    silence_channels(model, family, idle)
    student = pruned(model, tmp_path, hidden_size=HIDDEN - len(idle))
    rescale(student.model, family, "D", math.sqrt(HIDDEN / (HIDDEN - len(idle))))
    torch.testing.assert_close(logits(student), logits(HuggingFaceLanguageModel(model)), rtol=1e-3, atol=1e-4)
    assert student.head.weight_VD.shape == (VOCABULARY, HIDDEN - len(idle))


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_that_are_never_chosen_are_found_and_not_missed(family: str, tmp_path: Path) -> None:
    """The first channel of the stream is always positive, and the routers take it as a reason against two experts."""
    model = teacher_model(family)
    silence_channels(model, family, [0])
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 0.3
        for name, tensor in model.state_dict().items():
            layer, local = split_name(name)
            if local.endswith(("layernorm.weight", "ffn_norm.weight")):
                tensor[0] = 1.0
            axes = FAMILIES[family].axes_of(local)
            if axes in ("E", ".E"):
                tensor[..., [layer, 5]] = -1.0
            if axes == "ED" and not local.endswith("bias"):
                tensor[:, 0] = 0.0
                tensor[[layer, 5], 0] = -1e4
    student = pruned(model, tmp_path / "teacher", experts=EXPERTS - 2)
    torch.testing.assert_close(logits(student), logits(HuggingFaceLanguageModel(model)))
    routers = {
        len(t) for n, t in student.model.state_dict().items() if FAMILIES[family].axes_of(split_name(n)[1]) == "ED"
    }
    assert routers == {EXPERTS - 2}
    student.save_pretrained(tmp_path / "student")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert torch.equal(logits(HuggingFaceLanguageModel(again)), logits(student))


@pytest.mark.parametrize("family", [*DENSE, *DIFFERENT, "lfm2_moe"])
def test_all_at_once_is_an_ordinary_folder(family: str, tmp_path: Path) -> None:
    asked = {"hidden_size": 18, "intermediate_size": 11, "key_value_groups": 1}
    if family in MIXTURES:
        asked |= {"hidden_size": 16, "experts": 3}
    sizes = {name: size for name, size in asked.items() if name not in FAMILIES[family].fixed}
    student = pruned(teacher_model(family), tmp_path / "teacher", layers=2, depth="importance", **sizes)
    student.save_pretrained(tmp_path / "student")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert torch.equal(logits(HuggingFaceLanguageModel(again)), logits(student))
    config = json.loads((tmp_path / "student" / "config.json").read_text())
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": HEAD}
    expected = {"num_hidden_layers": 2, **{name: size for name, size in sizes.items() if name in config}}
    assert expected.items() <= config.items()
    assert "key_value_groups" not in sizes or heads.items() <= config.items()
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
    widths = narrowed_widths(model.config, hidden_size=4, intermediate_size=2, key_value_groups=2)
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


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("gemma2", {"hidden_size": 8}, "hidden_size: gemma2 cannot change it: its embedding is scaled"),
        ("lfm2", {"hidden_size": 8}, "hidden_size: lfm2 cannot change it"),
        ("deepseek_v3", {"key_value_groups": 2}, "one latent vector"),
        ("qwen3_moe", {"intermediate_size": 8}, "give experts"),
        ("qwen3_moe", {"experts": 1}, r"experts: 1 is out of range; the teacher has 6, so 2 to 6 \(each token"),
        ("qwen3_moe", {"experts": 7}, "so 2 to 6"),
        ("qwen3_moe", {"hidden_size": 12}, "hidden_size: 12 is no multiple of 8"),
        ("llama", {"experts": 2}, "experts: llama has none"),
    ],
)
def test_a_size_that_the_family_cannot_change_is_refused(
    family: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    teacher_model(family).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        prune_teacher(str(tmp_path), first_samples=first_samples, **options)


def test_the_largest_ascend_and_of_equal_ones_the_first_win() -> None:
    assert largest(torch.tensor([1.0, 5.0, 2.0, 5.0, 2.0]), 3).tolist() == [1, 2, 3]
    assert rows_of(torch.tensor([0, 2]), 3).tolist() == [0, 1, 2, 6, 7, 8]


def test_a_size_that_the_family_does_not_load_again_is_refused_with_the_nearest(tmp_path: Path) -> None:
    """transformers asks of llama that the hidden size is a multiple of the heads, whatever the size of a head."""
    with pytest.raises(ValueError, match=r"hidden_size: 20 is not a multiple of the 6 heads.* nearest: 18 or 24"):
        pruned(teacher_model("llama"), tmp_path, hidden_size=20)


PUBLISHED = {
    "mixtral": ("block_sparse_moe.gate", "block_sparse_moe.experts.{}", ("w1", "w2", "w3")),
    "qwen3_moe": ("mlp.gate", "mlp.experts.{}", ("gate_proj", "up_proj", "down_proj")),
}


@pytest.mark.parametrize("family", PUBLISHED)
@pytest.mark.parametrize("way", ["experts", "layers", "merged"])
def test_a_mixture_is_saved_under_the_names_that_it_is_published_by(way: str, family: str, tmp_path: Path) -> None:
    """Older transformers, llama.cpp and vLLM look for them: a matrix for each expert."""
    teacher, folder = str(tmp_path / "teacher"), tmp_path / "student"
    teacher_model(family).save_pretrained(teacher)
    if way == "merged":
        load_lora_student(teacher, rank=2, base_dtype="float32").merged().save_pretrained(folder)
    else:
        options = {"experts": 3} if way == "experts" else {"layers": [0, 2]}
        prune_teacher(teacher, first_samples=first_samples, calibration_samples=3, **options).save_pretrained(folder)
    router, expert, matrices = PUBLISHED[family]
    count = 3 if way == "experts" else EXPERTS
    expected = {router, *(f"{expert.format(number)}.{name}" for number in range(count) for name in matrices)}
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        names = [name for name in file.keys() if name.startswith("model.layers.1.")]  # noqa: SIM118
    mixture = {name.removeprefix("model.layers.1.").removesuffix(".weight") for name in names}
    assert {name for name in mixture if name.startswith(("mlp.", "block_sparse_moe."))} == expected
