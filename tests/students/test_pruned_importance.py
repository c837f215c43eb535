"""Importance measured layer by layer is what the whole model in memory says, and finds what was planted."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from distill.errors import UserError
from distill.models.huggingface import HuggingFaceLanguageModel
from students import pruning_importance
from students.pruned import prune_teacher, pruned_weights
from students.pruning_importance import Importance, Samples, Wanted, measure
from students.pruning_stream import LayerwiseTeacher
from students.pruning_width import Narrowing, Widths

LAYERS, VOCABULARY = 3, 61
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 20,
    "max_position_embeddings": 64,
    "pad_token_id": None,
}
EXTRA: dict[str, dict[str, Any]] = {
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": 4},
    "gemma2": {"head_dim": 8, "sliding_window": 3, "layer_types": ["full_attention", "sliding_attention"] * 2},
    "gemma3_text": {"head_dim": 8, "sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "granite": {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0},
}
EXTRA |= {
    "gemma4_text": {
        "head_dim": 8,
        "global_head_dim": 16,
        "hidden_size_per_layer_input": 4,
        "vocab_size_per_layer_input": VOCABULARY,
        "sliding_window": 3,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    },
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "qwen3_5_text": {
        "head_dim": 8,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
        **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    },
    "qwen3_moe": {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}
FAMILIES = ("llama", "mistral", "qwen2", "olmo2", "phi3", "glm4", *[family for family in EXTRA if family != "qwen2"])
EVERYTHING = Wanted(depth=True, hidden=True, groups=True, neurons=True)


def teacher_model(family: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    options = {**SIZES, **EXTRA.get(family, {}), **changes}
    if "layer_types" in options:
        options["layer_types"] = options["layer_types"][:LAYERS]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **options), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model


class Weights:
    """A model's weights as a source of tensors."""

    def __init__(self, model: Any) -> None:
        self.weights = {name: weight.detach().clone() for name, weight in model.state_dict().items()}

    def names(self) -> list[str]:
        return sorted(self.weights)

    def read(self, name: str) -> Tensor:
        return self.weights[name].clone()


def packed_samples(count: int = 3, length: int = 13) -> Samples:
    """Rows of two documents each, cut in different places; a few positions do not count."""
    generator = torch.Generator().manual_seed(1)
    positions = [torch.cat([torch.arange(5 + row), torch.arange(length - 5 - row)]) for row in range(count)]
    return Samples(
        torch.randint(0, VOCABULARY, (count, length), generator=generator),
        torch.stack(positions),
        torch.rand(count, length, generator=generator) < 0.8,
    )


def measured(model: Any, samples: Samples, wanted: Wanted = EVERYTHING) -> Importance:
    return measure(LayerwiseTeacher(model.config, Weights(model)), samples, wanted)


class Identity(nn.Module):
    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_streamed_layers_make_the_models_own_hidden_states(family: str) -> None:
    model, samples = teacher_model(family), packed_samples()
    streamed = LayerwiseTeacher(model.config, Weights(model))
    begun = streamed.begin(samples.input_ids_BL, samples.position_ids_BL)
    for row, (hidden_LD, calls) in enumerate(begun):
        for index, call in enumerate(calls):
            with streamed.layer(index) as layer:
                hidden_LD = call(layer, hidden_LD)
        given = samples.input_ids_BL[row : row + 1], samples.position_ids_BL[row : row + 1]
        expected_LD = HuggingFaceLanguageModel(model).body(*given)[0]
        torch.testing.assert_close(streamed.norm(hidden_LD), expected_LD, rtol=1e-5, atol=1e-5)
        with streamed.head() as head:
            torch.testing.assert_close(head(expected_LD), HuggingFaceLanguageModel(model).head(expected_LD))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_depth_importance_is_the_divergence_of_the_model_with_a_layer_replaced_by_nothing(family: str) -> None:
    model, samples = teacher_model(family), packed_samples()
    student = HuggingFaceLanguageModel(model)

    def log_probs() -> Tensor:
        rows = zip(samples.input_ids_BL, samples.position_ids_BL, samples.counted_BL, strict=True)
        hidden_ND = torch.cat(
            [student.body(ids_L[None], pos_L[None])[0, counted_L] for ids_L, pos_L, counted_L in rows]
        )
        return student.head(hidden_ND).double().log_softmax(dim=-1)

    whole_NV, expected = log_probs(), []
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = Identity()
        expected.append((whole_NV.exp() * (whole_NV - log_probs())).sum(dim=-1).mean())
        model.model.layers[index] = layer
    found_I = measured(model, samples, Wanted(depth=True)).depth_I
    torch.testing.assert_close(found_I, torch.stack(expected), rtol=1e-5, atol=1e-5)
    assert found_I is not None and found_I.min() > 1e-3, "layers that do nothing would make this test empty"


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "olmo2"])
@torch.no_grad()
def test_width_importance_is_what_hooks_on_the_whole_model_see(family: str) -> None:
    model, samples = teacher_model(family), packed_samples()
    found = measured(model, samples)
    layer = model.model.layers[1]
    seen: dict[str, list[Tensor]] = {"neurons": [], "heads": [], "channels": [], "final": []}
    layer.mlp.down_proj.register_forward_pre_hook(lambda _, args: seen["neurons"].append(args[0][0]))
    layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: seen["heads"].append(args[0][0]))
    norms = [module for name, module in layer.named_children() if name.endswith("layernorm")]
    assert len(norms) == 2
    for module in norms:
        module.register_forward_hook(lambda _, args, out: seen["channels"].append(out[0]))
    model.model.norm.register_forward_hook(lambda _, args, out: seen["final"].append(out[0]))
    for ids_L, positions_L in zip(samples.input_ids_BL, samples.position_ids_BL, strict=True):
        HuggingFaceLanguageModel(model).body(ids_L[None], positions_L[None])

    def score(activations: list[Tensor], rows: Tensor) -> Tensor:
        """Mean over counted positions, L2 over samples."""
        means = [a_LC.abs()[counted].mean(dim=0) for a_LC, counted in zip(activations, rows, strict=True)]
        return torch.stack(means).double().norm(dim=0)

    rows = samples.counted_BL
    torch.testing.assert_close(found.neurons_IF[1], score(seen["neurons"], rows))
    heads = [a.unflatten(-1, (4, -1)).norm(dim=-1) for a in seen["heads"]]
    groups = [a[:, :2].sum(dim=-1, keepdim=True) for a in heads], [a[:, 2:].sum(dim=-1, keepdim=True) for a in heads]
    torch.testing.assert_close(found.groups_IG[1], torch.cat([score(group, rows) for group in groups]))
    channels = score(seen["channels"][::2], rows) + score(seen["channels"][1::2], rows)
    torch.testing.assert_close(found.hidden_ID[1], channels)
    torch.testing.assert_close(found.hidden_ID[LAYERS], score(seen["final"], rows))


@torch.no_grad()
def test_planted_units_are_found() -> None:
    model = teacher_model("llama")
    nothing, busy = model.model.layers[1], model.model.layers[2]
    nothing.self_attn.o_proj.weight.zero_()
    nothing.mlp.down_proj.weight.zero_()
    busy.mlp.up_proj.weight[7] *= 50
    busy.mlp.up_proj.weight[11] = 0
    busy.self_attn.v_proj.weight[:6] = 0  # the first group's values
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter[5] = 0
    found = measured(model, packed_samples())
    assert found.depth_I.argmin() == 1 and found.depth_I[1].abs() < 1e-6
    assert found.neurons_IF[2].argmax() == 7 and found.neurons_IF[2, 11] == 0 and found.groups_IG[2, 0] == 0
    assert (found.hidden_ID[:, 5] == 0).all() and (found.hidden_ID > 0).sum() == (LAYERS + 1) * 23


def test_what_does_not_count_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding behind the last counted position; samples without any; how many samples share a turn; chunks."""
    model, samples = teacher_model("qwen2"), packed_samples()
    samples.counted_BL[:, -3:] = False
    found = measured(model, samples)
    ids_BL = torch.cat([samples.input_ids_BL, samples.input_ids_BL[:1]])
    ids_BL[:, -3:] = 0
    other = Samples(
        ids_BL,
        torch.cat([samples.position_ids_BL, samples.position_ids_BL[:1]]),
        torch.cat([samples.counted_BL, torch.zeros_like(samples.counted_BL[:1])]),
    )
    monkeypatch.setattr(pruning_importance, "STATE_BYTES", 1)
    monkeypatch.setattr(pruning_importance, "CHUNK", 2)
    again = measured(model, other)
    for name, expected in vars(found).items():
        torch.testing.assert_close(getattr(again, name), expected, rtol=1e-5, atol=1e-6)


def test_only_what_is_wanted_is_measured() -> None:
    found = measured(teacher_model("llama"), packed_samples(), Wanted(neurons=True))
    assert found.neurons_IF is not None
    assert found.depth_I is None and found.hidden_ID is None and found.groups_IG is None


def test_without_a_counted_position_nothing_can_be_measured() -> None:
    samples = packed_samples()
    samples.counted_BL.zero_()
    with pytest.raises(ValueError, match="no position"):
        measured(teacher_model("llama"), samples)


def test_a_checkpoint_that_lacks_a_tensor_is_refused() -> None:
    model = teacher_model("llama")
    source = Weights(model)
    del source.weights["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(UserError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        measure(LayerwiseTeacher(model.config, source), packed_samples(), Wanted(neurons=True))


def test_a_tensor_that_the_configuration_does_not_know_is_refused() -> None:
    model = teacher_model("llama")
    source = Weights(model)
    source.weights["model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.ones(2)  # early Llama checkpoints have it
    LayerwiseTeacher(model.config, source)
    source.weights["model.layers.1.mlp.up_proj.bias"] = torch.ones(2)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.bias has no place"):
        LayerwiseTeacher(model.config, source)


class Watched(Weights):
    """Notes what is read, and what of it is in memory at each read (parameters share the memory of what they take)."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self._memory: dict[str, weakref.ref[Any]] = {}
        self.reads: list[tuple[str, set[str]]] = []

    def read(self, name: str) -> Tensor:
        self.reads.append((name, {other for other, memory in self._memory.items() if memory() is not None}))
        memory = self.weights[name].numpy().copy()
        self._memory[name] = weakref.ref(memory)
        return torch.from_numpy(memory)


def part_of(name: str) -> str:
    """The layer of a tensor; itself when it is in none."""
    return ".".join(name.split(".")[:3]) if ".layers." in name else name


def test_one_layer_of_the_teacher_is_in_memory_at_a_time() -> None:
    source = Watched(teacher_model("llama"))
    measure(LayerwiseTeacher(teacher_model("llama").config, source), packed_samples(), EVERYTHING)
    assert sorted(name for name, _ in source.reads) == source.names(), "each tensor is read once"
    for name, others in source.reads:
        together = {part_of(other) for other in others} - {"model.norm.weight"}
        assert together <= {part_of(name)}, f"reading {name} while {together} are in memory"
    assert any(".layers." in other for _, others in source.reads for other in others), "a layer's tensors are together"


def test_the_teachers_tensors_are_let_go_as_they_are_sliced() -> None:
    model = teacher_model("llama")
    source, some = Watched(model), torch.tensor([0, 2])
    units = Narrowing("llama", Widths.of(model.config), some, [some[:1]] * LAYERS, [some] * LAYERS)
    kept = pruned_weights(source, [0, 2], units)
    assert len(source.reads) == len(kept) and not any(".layers.1." in name for name, _ in source.reads)
    assert not any(others for _, others in source.reads)


@torch.no_grad()
def test_pruning_by_importance_takes_the_idle_layer_out(tmp_path: Path) -> None:
    model, samples = teacher_model("qwen3"), packed_samples()
    model.model.layers[1].self_attn.o_proj.weight.zero_()
    model.model.layers[1].mlp.down_proj.weight.zero_()
    model.save_pretrained(tmp_path)

    def first_samples(count: int) -> tuple[Tensor, Tensor, Tensor]:
        return samples.input_ids_BL[:count], samples.position_ids_BL[:count], samples.counted_BL[:count]

    student = prune_teacher(str(tmp_path), 2, "importance", calibration_samples=3, first_samples=first_samples).eval()
    assert student.model.config.num_hidden_layers == 2
    given = samples.input_ids_BL[:1], samples.position_ids_BL[:1]
    torch.testing.assert_close(student.body(*given), HuggingFaceLanguageModel(model).body(*given))
