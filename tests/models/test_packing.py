"""Matrices in few bits: experts, families' own linear layers, shared layers; and what stays as it is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_families import in_full
from torch import Tensor
from transformers import CONFIG_MAPPING

from distill.errors import UserError
from distill.forecast.simulation.fake import without_memory
from distill.models.checkpoints import resolve
from distill.models.packed import PackedWeight
from distill.models.packing import described, multiplied_outside, packing_of
from distill.models.quantization import full_weight, load_quantized
from distill.models.streaming import Weights
from teachers.huggingface import load_teacher

pytestmark = pytest.mark.usefixtures("one_thread")

ZAMBA = {
    "num_hidden_layers": 6,
    "layers_block_type": ["mamba", "mamba", "hybrid"] * 2,
    "mamba_dt_rank": 4,
    "intermediate_size": 768,
    "mamba_d_state": 4,
}
LATENT = {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "kv_lora_rank": 16, "q_lora_rank": 16}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {},
    "mixtral": {},
    "gpt_oss": {},  # transposed, with biases and a gate of its own
    "deepseek_v3": {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "head_dim": 8, **LATENT},
    "llama4_text": {},  # all experts in one product
    "nemotron_h": {"layers_block_type": ["attention", "moe"], "num_hidden_layers": 2},  # no gate
    "jetmoe": {},  # asks for one expert at a time itself
    "falcon": {},
    "zamba": ZAMBA,
}
KINDS = {"falcon": "nf4+linear", "zamba": "nf4+shared"}
SIZES = {
    "hidden_size": 64,
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "intermediate_size": 96,
}


@pytest.fixture(scope="module")
def folder(tiny_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """A family's checkpoint."""
    made: dict[str, str] = {}

    def find(family: str) -> str:
        if family not in made:
            made[family] = str(tmp_path_factory.mktemp(family))
            tiny_model(family, **{**SIZES, **FAMILIES[family]}).save_pretrained(made[family])
        return made[family]

    return find


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=torch.arange(24).reshape(2, 12) * 3, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_model_computes_with_its_dequantised_weights(folder: Any, family: str) -> None:
    checkpoint = resolve(folder(family))
    packed = load_quantized(checkpoint, "nf4", torch.float32)
    plain = load_quantized(checkpoint, "none", torch.float32)
    before = logits(plain)
    torch.testing.assert_close(logits(packed), logits(in_full(packed, plain)), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(packed), before, rtol=1e-3), "nothing was quantised"
    assert described(checkpoint, "nf4") == KINDS.get(family, "nf4+experts")
    left = packing_of(load_quantized(checkpoint, "none", torch.float32)).share_left
    assert left < 0.1 and sum(isinstance(module, PackedWeight) for module in packed.modules()) >= 2


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])  # the last: products of 4 dimensions
def test_int8_is_nearer_than_nf4(folder: Any, family: str) -> None:
    checkpoint = resolve(folder(family))
    plain, eight, four = (logits(load_quantized(checkpoint, name, torch.float32)) for name in ("none", "int8", "nf4"))
    assert 0 < (eight - plain).norm() < 0.5 * (four - plain).norm()


def test_experts_that_lie_one_by_one_are_quantised_one_by_one(folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer's experts never lie in memory together unquantised."""
    seen: list[tuple[int | None, int]] = []
    read = Weights.read_in_slices

    def watching(self: Weights, *args: Any) -> Any:
        for name, index, tensor in read(self, *args):
            if ".experts." in name:
                seen.append((index, tensor.numel()))
            yield name, index, tensor

    monkeypatch.setattr(Weights, "read_in_slices", watching)
    packed = load_quantized(resolve(folder("qwen3_moe")), "nf4", torch.float32)
    assert sorted({index for index, _ in seen}) == [0, 1, 2, 3] and max(size for _, size in seen) == 2 * 32 * 64
    whole = load_quantized(resolve(folder("qwen3_moe")), "none", torch.float32)
    alike = copy.deepcopy(packed.model.layers[0].mlp.experts.gate_up_proj)
    alike.fill(whole.model.layers[0].mlp.experts.gate_up_proj.data)
    assert torch.equal(alike.codes, packed.model.layers[0].mlp.experts.gate_up_proj.codes)


@pytest.mark.parametrize("family", ["qwen3_moe", "falcon", "zamba"])
def test_a_forecast_counts_the_bytes_that_are_loaded(folder: Any, family: str) -> None:
    def held(model: Any) -> int:
        weights = sum(parameter.nbytes for parameter in model.parameters())
        return weights + sum(
            part.nbytes for m in model.modules() if isinstance(m, PackedWeight) for part in m.buffers()
        )

    loaded = held(load_teacher(folder(family), "nf4", "float32"))
    with without_memory("cpu"):
        assert held(load_teacher(folder(family), "nf4", "float32")) == loaded


def test_much_that_stays_unquantised_is_refused(
    tiny_model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model("qwen3_moe", **SIZES).save_pretrained(tmp_path)
    monkeypatch.setattr("distill.models.packing.holds_experts", lambda module: False)  # a family that nobody knows
    with pytest.raises(
        UserError, match=r"kB of its matrices stay unquantised .*Experts.gate_up_proj.*allow_unquantized"
    ):
        load_teacher(str(tmp_path), "nf4", "float32")
    load_teacher(str(tmp_path), "nf4", "float32", allow_unquantized=True)
    assert "stay unquantised" in capsys.readouterr().out
    assert " but " in described(resolve(str(tmp_path)), "nf4")


def test_a_layer_whose_weights_type_is_asked_for_is_not_packed() -> None:
    """An indexer casts hidden states to its weight's type; of a packed weight that would be whole numbers."""
    assert "weights_proj" in multiplied_outside(CONFIG_MAPPING["dots3_note_text"]())
    assert not multiplied_outside(CONFIG_MAPPING["qwen3_moe"]())


def test_a_dense_family_keeps_its_name(tiny_model: Any, tmp_path: Path) -> None:
    """A cache that a dense teacher made stays that teacher's."""
    tiny_model("qwen3").save_pretrained(tmp_path)
    assert described(resolve(str(tmp_path)), "nf4") == "nf4" and described(resolve(str(tmp_path)), "int8") == "int8"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_that_are_no_whole_number_of_blocks(dtype: str, tiny_model: Any, tmp_path: Path) -> None:
    """bitsandbytes' own kernel for processors takes other blocks' scales for them."""
    tiny_model("llama", hidden_size=48, num_attention_heads=4, intermediate_size=80).save_pretrained(tmp_path)
    kind = getattr(torch, dtype)
    packed = load_quantized(resolve(str(tmp_path)), "nf4", kind)
    plain = load_quantized(resolve(str(tmp_path)), "none", kind)
    weight = plain.get_submodule("model.layers.0.mlp.down_proj").weight.float()
    lost = full_weight(packed.get_submodule("model.layers.0.mlp.down_proj")).float() - weight
    assert lost.norm() < 0.12 * weight.norm(), "as four bits lose"
    torch.testing.assert_close(logits(packed), logits(in_full(packed, plain)), rtol=1e-5, atol=1e-5)
