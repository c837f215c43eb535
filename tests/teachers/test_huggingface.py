"""The quantised teacher computes with exactly its quantised weights, from a folder and from a GGUF file."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from distill.models import devices
from distill.models.huggingface import HuggingFaceLanguageModel
from distill.models.quantization import full_weight, quantize_linears
from teachers.huggingface import load_teacher, resolve_dtype
from teachers.streamed import load_streamed_teacher

PACKED = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
SIZES: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}


def tiny(family: str = "qwen2") -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def write_gguf(model: Any, path: Path) -> None:
    """A Qwen 2 GGUF file: of all families the one whose tensors GGUF keeps in their own order."""
    config = model.config
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{index}" for index in range(config.vocab_size)])
    writer.add_token_merges([])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        stem, _, suffix = name.rpartition(".")
        writer.add_tensor(f"{names.get_name(stem)}.{suffix}", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(params=["folder", "gguf"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "folder":
        tiny().save_pretrained(tmp_path)
        return str(tmp_path)
    write_gguf(tiny(), tmp_path / "tiny.gguf")
    return str(tmp_path / "tiny.gguf")


def logits(model: Any) -> torch.Tensor:
    ids_BL = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        return model.head(model.body(ids_BL, torch.arange(12).expand(2, -1)))


def test_unquantised_is_the_checkpoint_itself(source: str) -> None:
    teacher = load_teacher(source, "none", "float32")
    with torch.no_grad():
        expected = tiny()(input_ids=torch.arange(24).reshape(2, 12)).logits
    torch.testing.assert_close(logits(teacher), expected, rtol=1e-5, atol=1e-5)
    assert not teacher.training and not any(parameter.requires_grad for parameter in teacher.parameters())


def test_nf4_computes_with_the_dequantised_weights(source: str) -> None:
    teacher = load_teacher(source, "nf4", "float32")
    reference = tiny()
    replaced = 0
    for name, module in teacher.model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            state = module.weight.quant_state
            assert (state.quant_type, state.nested, module.weight.dtype) == ("nf4", True, torch.uint8)
            plain = reference.get_submodule(name)
            dequantised = bnb.functional.dequantize_4bit(module.weight.data, state)
            assert not torch.equal(dequantised, plain.weight)
            plain.weight.data = dequantised
            replaced += 1
    assert replaced == 2 * 7 and type(teacher.model.lm_head) is torch.nn.Linear
    with torch.no_grad():
        expected = reference(input_ids=torch.arange(24).reshape(2, 12)).logits
    torch.testing.assert_close(logits(teacher), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(teacher), expected, rtol=1e-5, atol=1e-5)  # no repacking at the first pass
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_folder_and_gguf_quantise_alike(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    write_gguf(tiny(), tmp_path / "tiny.gguf")
    one, other = load_teacher(str(tmp_path), "nf4"), load_teacher(str(tmp_path / "tiny.gguf"), "nf4")
    torch.testing.assert_close(logits(one), logits(other), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_gguf_file_is_streamed_to_the_same_bits(quantization: Any, tmp_path: Path) -> None:
    """Layer by layer, and from a copy that opens by itself; never is the file dequantised as a whole."""
    write_gguf(tiny(), tmp_path / "tiny.gguf")
    file, copy = str(tmp_path / "tiny.gguf"), tmp_path / "copy"
    expected = logits(load_teacher(file, quantization, "float32"))
    streamed = load_streamed_teacher(file, quantization, "float32", quantized_copy=str(copy))
    assert torch.equal(logits(streamed), expected) and torch.equal(logits(streamed), expected)
    assert streamed.bytes_read > 0
    if quantization == "nf4":
        again = load_streamed_teacher(str(copy), quantization, "float32")
        assert torch.equal(logits(again), expected)


def test_int8_is_nearer_than_nf4(source: str) -> None:
    plain, eight, four = (logits(load_teacher(source, name)) for name in ("none", "int8", "nf4"))  # type: ignore[arg-type]
    assert 0 < (eight - plain).norm() < 0.5 * (four - plain).norm()


def test_conv1d_layers_are_quantised_too() -> None:
    config = AutoConfig.for_model("gpt2", vocab_size=99, n_embd=64, n_layer=2, n_head=4, n_positions=64)
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    quantised = copy.deepcopy(plain)
    quantize_linears(quantised, "int8", torch.float32, "cpu")
    assert sum(isinstance(module, bnb.nn.Linear8bitLt) for module in quantised.modules()) == 2 * 4
    ids_BL = torch.arange(10)[None]
    with torch.no_grad():
        expected, found = plain(input_ids=ids_BL).logits, quantised(input_ids=ids_BL).logits
    assert 0 < (found - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_a_quantised_folder_computes_in_the_type_asked_for(compute_dtype: str, tmp_path: Path) -> None:
    """A 4-bit folder of bfloat16, whose weights stay; all else is as in an unquantised folder of the same weights."""
    tiny().to(torch.bfloat16).save_pretrained(tmp_path / "plain")
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    packed = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=settings, device_map={"": "cpu"}, dtype=torch.bfloat16
    )
    packed.save_pretrained(tmp_path / "packed")
    teacher = load_teacher(str(tmp_path / "packed"), "none", compute_dtype)
    dtype = getattr(torch, compute_dtype)
    plain = load_teacher(str(tmp_path / "plain"), "none", compute_dtype)
    seen = set()
    for module in teacher.model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    with torch.no_grad():
        for name, module in plain.model.named_modules():
            if isinstance(found := teacher.model.get_submodule(name), bnb.nn.Linear4bit):
                module.weight.copy_(full_weight(found))
                assert found.compute_dtype == dtype
    assert {each.dtype for each in teacher.parameters() if each.is_floating_point()} == {dtype}
    torch.testing.assert_close(logits(teacher), logits(plain), rtol=0, atol=0)
    assert seen == {dtype}


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16", "float16"])
def test_an_fp8_folder_on_a_device_without_fp8(compute_dtype: str, tmp_path: Path) -> None:
    sizes = {**SIZES, "hidden_size": 128}
    plain = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **sizes), dtype=torch.float32)
    plain.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    for name in [name for name in stored if name.endswith("_proj.weight")]:
        blocks = (-(-size // 128) for size in stored[name].shape)
        stored[f"{name}_scale_inv"] = torch.full(tuple(blocks), 0.5)
        stored[name] = (stored[name] / 0.5).to(torch.float8_e4m3fn)
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    teacher = load_teacher(str(tmp_path), "none", compute_dtype)
    assert {each.dtype for each in teacher.parameters()} == {getattr(torch, compute_dtype)}
    weight = teacher.model.model.layers[0].mlp.up_proj.weight.float()
    expected = stored["model.layers.0.mlp.up_proj.weight"].float() * 0.5
    torch.testing.assert_close(weight, expected, rtol=2**-7, atol=0)


def test_an_overflow_is_called_one(tmp_path: Path) -> None:
    model = tiny()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e4)
        model.model.norm.weight.mul_(1e3)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"not finite.*float16.*wider type"):
        load_teacher(str(tmp_path), "none", "float16")
    load_teacher(str(tmp_path), "none", "float32")


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("family", ["mamba", "falcon_mamba"])
def test_a_weight_that_is_multiplied_outside_its_layer_is_not_packed(
    family: str, quantization: Any, tmp_path: Path
) -> None:
    config = AutoConfig.for_model(family, vocab_size=99, hidden_size=64, num_hidden_layers=2, state_size=4)
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.save_pretrained(tmp_path)
    teacher = load_teacher(str(tmp_path), quantization, "float32")
    packed = {name.rpartition(".")[2] for name, module in teacher.named_modules() if isinstance(module, PACKED)}
    assert packed == {"in_proj", "x_proj", "out_proj"}
    in_memory = copy.deepcopy(plain)
    quantize_linears(in_memory, quantization, torch.float32, "cpu")
    torch.testing.assert_close(logits(HuggingFaceLanguageModel(in_memory.eval())), logits(teacher))


def test_mistakes_are_named(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="compute_dtype 'float8' is unknown"):
        load_teacher(str(tmp_path), "none", compute_dtype="float8")


@pytest.mark.parametrize(("has_it", "expected"), [(True, torch.bfloat16), (False, torch.float16)])
def test_the_compute_dtype_fits_the_device(
    has_it: bool, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_it)
    assert resolve_dtype("auto", "cuda:0") is expected
    monkeypatch.setattr(devices, "bfloat16_speed", lambda: 2.0 if has_it else 0.5)
    assert resolve_dtype("auto", "cpu") is (torch.bfloat16 if has_it else torch.float32)
    assert resolve_dtype("float16", "cpu") is torch.float16
