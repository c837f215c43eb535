"""Checkpoints that are quantised already, of each format, against a dequantisation in float64 written out here."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes.functional as F
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill.errors import UserError
from distill.models.checkpoints import resolve
from distill.models.dequantized import full_tensors
from students.pruned import prune_teacher
from teachers.huggingface import load_teacher
from teachers.streamed import load_streamed_teacher

pytestmark = pytest.mark.usefixtures("one_thread")

Written = tuple[dict[str, Tensor], np.ndarray]
"""Tensors of a layer by their endings, and the weight `[O, I]` (experts `[E, I, O]`) that they stand for."""
G, AWQ = 16, [0, 2, 4, 6, 1, 3, 5, 7]


def words(numbers: np.ndarray, bits: int, along: int, order: list[int] | None = None) -> Tensor:
    """Pack whole numbers into 32-bit words, lowest bits first."""
    count = 32 // bits
    rows = np.moveaxis(numbers, along, 0).astype(np.uint64)
    packed = np.zeros((rows.shape[0] // count, *rows.shape[1:]), dtype=np.uint64)
    for place in range(count):
        packed |= rows[(order or range(count))[place] :: count][: len(packed)] << np.uint64(bits * place)
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(packed, 0, along)).astype(np.uint32).view(np.int32))


def whole_numbers(weight_OI: Tensor, bits: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return codes `[O, I]`, zero points and scales `[O, I / G]`."""
    rng, (rows, columns) = np.random.default_rng(seed), weight_OI.shape
    codes = rng.integers(0, 1 << bits, (rows, columns))
    zeros = rng.integers(0, 1 << bits, (rows, columns // G))
    return codes, zeros, rng.uniform(0.001, 0.01, (rows, columns // G)).astype(np.float16)


def gptq(weight_OI: Tensor, bits: int = 4, shuffled: bool = False, adds_one: bool = True) -> Written:
    codes, zeros, scales = whole_numbers(weight_OI, bits)
    group = np.arange(weight_OI.shape[1]) // G
    if shuffled:
        group = np.random.default_rng(1).permutation(group)
    kept = (zeros - int(adds_one)) % (1 << bits)
    parts = {
        "qweight": words(codes.T, bits, 0),
        "qzeros": words(kept.T, bits, 1),
        "scales": torch.from_numpy(scales.T.copy()),
        "g_idx": torch.from_numpy(group.astype(np.int32)),
    }
    return parts, (codes - zeros[:, group]) * scales[:, group].astype(np.float64)


def awq(weight_OI: Tensor) -> Written:
    codes, zeros, scales = whole_numbers(weight_OI, 4)
    group = np.arange(weight_OI.shape[1]) // G
    parts = {
        "qweight": words(codes.T, 4, 1, AWQ),
        "qzeros": words(zeros.T, 4, 1, AWQ),
        "scales": torch.from_numpy(scales.T.copy()),
    }
    return parts, (codes - zeros[:, group]) * scales[:, group].astype(np.float64)


def compressed(weight_OI: Tensor, asymmetric: bool = False) -> Written:
    codes, zeros, scales = whole_numbers(weight_OI, 4)
    group = np.arange(weight_OI.shape[1]) // G
    parts = {
        "weight_packed": words(codes, 4, 1),
        "weight_scale": torch.from_numpy(scales),
        "weight_shape": torch.tensor(weight_OI.shape),
    }
    if asymmetric:
        parts["weight_zero_point"] = words(zeros, 4, 0)
    shift = zeros[:, group] if asymmetric else 8
    return parts, (codes - shift) * scales[:, group].astype(np.float64)


def fp8(weight_OI: Tensor, kind: str) -> Written:
    codes = (weight_OI * 8).to(torch.float8_e4m3fn)
    rows, columns = weight_OI.shape
    shape = {"block": (-(-rows // 24), -(-columns // 24)), "row": (rows, 1), "tensor": ()}[kind]
    scale = torch.rand(shape, generator=torch.Generator().manual_seed(0)) + 0.5
    full = scale.double().numpy()
    if kind == "block":
        full = full.repeat(24, 0)[:rows].repeat(24, 1)[:, :columns]
    ending = "weight_scale_inv" if kind == "block" else "weight_scale"
    return {"weight": codes, ending: scale, "input_scale": torch.ones(())}, codes.double().numpy() * full


def bitsandbytes(weight_OI: Tensor, quant_type: str) -> Written:
    if quant_type == "int8":
        codes, scale, _ = F.int8_vectorwise_quant(weight_OI.half())
        parts = {"weight": codes, "SCB": scale, "weight_format": torch.tensor(0, dtype=torch.uint8)}
        return parts, codes.double().numpy() * scale.double().numpy()[:, None] / 127
    packed, state = F.quantize_4bit(weight_OI, quant_type=quant_type, compress_statistics=quant_type == "nf4")
    parts = {"weight": packed, **{f"weight.{name}": value for name, value in state.as_dict(packed=True).items()}}
    codes = packed.numpy().ravel()
    numbers = np.stack([codes >> 4, codes & 15], 1).ravel()
    scales = state.absmax.double().numpy()
    if state.nested:
        scales = state.state2.code.double().numpy()[state.absmax.numpy()]
        scales = scales * state.state2.absmax.double().numpy().repeat(256)[: len(scales)] + float(state.offset)
    full = state.code.double().numpy()[numbers] * scales.repeat(64)[: len(numbers)]
    return parts, full.reshape(weight_OI.shape)


def groups(bits: int = 4) -> dict[str, Any]:
    return {"group_0": {"weights": {"num_bits": bits, "group_size": G}, "targets": ["Linear"]}}


FORMATS: dict[str, tuple[Callable[[Tensor], Written], dict[str, Any]]] = {
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": G}),
    "gptq act-order": (lambda w: gptq(w, shuffled=True), {"quant_method": "gptq", "bits": 4, "group_size": G}),
    "gptq 8 bits v2": (
        lambda w: gptq(w, 8, adds_one=False),
        {"quant_method": "gptq", "bits": 8, "checkpoint_format": "gptq_v2"},
    ),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "version": "gemm", "group_size": G}),
    "compressed int4": (
        compressed,
        {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups()},
    ),
    "compressed int4 with zero points": (
        lambda w: compressed(w, asymmetric=True),
        {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups()},
    ),
    "compressed fp8": (
        lambda w: fp8(w, "row"),
        {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": groups(8)},
    ),
    "fp8 blocks": (lambda w: fp8(w, "block"), {"quant_method": "fp8", "weight_block_size": [24, 24]}),
    "fp8 tensor": (lambda w: fp8(w, "tensor"), {"quant_method": "fp8"}),
    "bitsandbytes nf4": (lambda w: bitsandbytes(w, "nf4"), {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "bitsandbytes fp4": (lambda w: bitsandbytes(w, "fp4"), {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "bitsandbytes int8": (lambda w: bitsandbytes(w, "int8"), {"quant_method": "bitsandbytes", "load_in_8bit": True}),
}


@pytest.fixture(scope="module")
def plain(tiny_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    tiny_model("llama", hidden_size=64, intermediate_size=80).to(torch.bfloat16).save_pretrained(folder)
    return folder


def quantise(plain: Path, folder: Path, write: Callable[[Tensor], Written], settings: dict[str, Any]) -> dict[str, Any]:
    """Write the checkpoint with its linear layers in a format. Returns the full weights."""
    shutil.copytree(plain, folder)
    stored, expected = load_file(plain / "model.safetensors"), {}
    for name in [name for name in stored if name.endswith("_proj.weight")]:
        parts, expected[name] = write(stored.pop(name).float())
        stored |= {name.removesuffix("weight") + part: tensor for part, tensor in parts.items()}
    save_file({k: v.contiguous() for k, v in stored.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))
    return expected


@torch.no_grad()
def answer(teacher: Any) -> Tensor:
    return teacher.body(torch.arange(24).reshape(2, 12), torch.arange(12).expand(2, -1))


@pytest.mark.parametrize("form", FORMATS)
def test_a_quantised_checkpoint_is_the_weights_it_stands_for(form: str, plain: Path, tmp_path: Path) -> None:
    write, settings = FORMATS[form]
    expected = quantise(plain, tmp_path / "quantised", write, settings)
    found = full_tensors(resolve(str(tmp_path / "quantised")))
    assert set(found.names()) == set(load_file(plain / "model.safetensors"))
    for name, weight in expected.items():
        np.testing.assert_allclose(found.read(name).double().numpy(), weight, rtol=2e-6, atol=1e-9)
    # The same weights, unquantised: all teachers of one say what those of the other say.
    shutil.copytree(plain, tmp_path / "full")
    weights = load_file(plain / "model.safetensors") | {n: torch.from_numpy(w).float() for n, w in expected.items()}
    save_file(weights, tmp_path / "full/model.safetensors", metadata={"format": "pt"})
    quantised, full = str(tmp_path / "quantised"), str(tmp_path / "full")
    # Class huggingface takes bitsandbytes' int8 as it is, and multiplies in it.
    for quantization in ("nf4",) if "int8" in form else ("none", "nf4"):
        one, other = (load_teacher(folder, quantization, "float32") for folder in (quantised, full))  # type: ignore[arg-type]
        torch.testing.assert_close(answer(one), answer(other), rtol=1e-3, atol=1e-3)
        streamed = load_streamed_teacher(
            quantised,
            quantization,  # type: ignore[arg-type]
            "float32",
            quantized_copy=str(tmp_path / "copy"),
        )
        torch.testing.assert_close(answer(streamed), answer(one), rtol=1e-5, atol=1e-5)


def test_gpt_oss_in_mxfp4(tiny_model: Any, tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2}
    tiny_model("gpt_oss", **sizes).save_pretrained(tmp_path)
    stored, expected, rng = load_file(tmp_path / "model.safetensors"), {}, np.random.default_rng(0)
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values = np.concatenate([values, -values])
    for name in [name for name in stored if name.endswith("_proj") and "experts" in name]:
        experts, inputs, outputs = stored.pop(name).shape
        codes = rng.integers(0, 16, (experts, outputs, inputs // 32, 32))
        exponents = rng.integers(120, 126, (experts, outputs, inputs // 32))
        stored[f"{name}_blocks"] = torch.from_numpy((codes[..., 0::2] | codes[..., 1::2] << 4).astype(np.uint8))
        stored[f"{name}_scales"] = torch.from_numpy(exponents.astype(np.uint8))
        full = values[codes] * 2.0 ** (exponents[..., None] - 127)
        expected[name] = full.reshape(experts, outputs, inputs).transpose(0, 2, 1)
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = full_tensors(resolve(str(tmp_path)))
    assert len(expected) == 4
    for name, weight in expected.items():
        assert np.array_equal(found.read(name).double().numpy(), weight)
    teacher = load_teacher(str(tmp_path), "none", "float32")
    for name, weight in expected.items():
        assert np.array_equal(teacher.model.get_parameter(name).double().numpy(), weight)
    answer(load_teacher(str(tmp_path), "nf4", "bfloat16"))
    lost = {name: tensor for name, tensor in stored.items() if not name.endswith("down_proj_scales")}
    save_file(lost, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for load in (load_teacher, load_streamed_teacher):
        with pytest.raises(UserError, match="down_proj has blocks without scales: fetch the checkpoint again"):
            load(str(tmp_path), "none", "float32")  # type: ignore[operator]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quant_method": "aqlm"}, r"quantised as aqlm, which is not read here .*own package \(aqlm\)"),
        ({"quant_method": "gptq", "bits": 3}, "GPTQ in 3 bits"),
        ({"quant_method": "awq", "version": "gemv"}, "AWQ in 4 bits, version gemv"),
        ({"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}}, "as sparse"),
        ({}, "quantised as nobody knows"),
    ],
)
def test_what_cannot_be_read_is_refused(settings: dict[str, Any], words: str, plain: Path, tmp_path: Path) -> None:
    shutil.copytree(plain, tmp_path / "model")
    config = json.loads((plain / "config.json").read_text()) | {"quantization_config": settings}
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    for load in (load_teacher, load_streamed_teacher):
        for quantization in ("none", "nf4"):
            with pytest.raises(UserError, match=words):
                load(str(tmp_path / "model"), quantization, "float32")  # type: ignore[operator]


def test_codes_without_a_scale_are_no_weights(plain: Path, tmp_path: Path) -> None:
    def write(weight_OI: Tensor) -> Written:
        parts, full = fp8(weight_OI, "tensor")
        return {"weight": parts["weight"], "weight_factor": parts["weight_scale"]}, full

    quantise(plain, tmp_path / "model", write, {"quant_method": "fp8"})
    for load, quantization in ((load_teacher, "none"), (load_teacher, "nf4"), (load_streamed_teacher, "none")):
        with pytest.raises(UserError, match=r"weight is in float8_e4m3fn, without a scale that is known here"):
            answer(load(str(tmp_path / "model"), quantization, "float32"))  # type: ignore[operator]
    quantise(plain, tmp_path / "gptq", lambda w: ({"qweight": w.int()}, w.numpy()), {"quant_method": "gptq"})
    with pytest.raises(UserError, match="has qweight without qzeros and scales: fetch the checkpoint again"):
        load_teacher(str(tmp_path / "gptq"), "none", "float32")


def test_codes_that_no_configuration_explains_are_no_weights(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def store(name: str, change: Callable[[Tensor], Written]) -> str:
        quantise(plain, tmp_path / name, change, {})
        shutil.copy(plain / "config.json", tmp_path / name / "config.json")
        return str(tmp_path / name)

    int8 = store("int8", lambda w: ({"weight": (w * 99).to(torch.int8)}, w.numpy()))
    scaled = store("scaled", lambda w: fp8(w, "row"))
    packed = store("packed", gptq)
    for folder, words in ((int8, "is stored as I8"), (scaled, "F8_E4M3, with .*scale beside"), (packed, "as I32")):
        for load, quantization in ((load_teacher, "none"), (load_teacher, "nf4"), (load_streamed_teacher, "none")):
            with pytest.raises(UserError, match=f"_proj.*{words}.* has no quantization_config that explains it"):
                load(folder, quantization, "float32")  # type: ignore[operator]
        with pytest.raises(UserError, match=words):
            prune_teacher(folder, 1)
    cast = store("cast", lambda w: ({"weight": w.to(torch.float8_e4m3fn)}, w.numpy()))
    capsys.readouterr()
    one, other = load_teacher(cast, "none", "float32"), load_streamed_teacher(cast, "none", "float32")
    assert capsys.readouterr().out.count("14 weights are in fp8 without scales: they are taken as they are") == 2
    torch.testing.assert_close(answer(one), answer(other))


def test_a_configuration_that_says_bitsandbytes_of_plain_weights_is_refused(plain: Path, tmp_path: Path) -> None:
    shutil.copytree(plain, tmp_path / "model")
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    config = json.loads((plain / "config.json").read_text()) | {"quantization_config": settings}
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"says bitsandbytes, but .*weight is not quantised: take quantization_config"):
        load_teacher(str(tmp_path / "model"), "none", "float32")
