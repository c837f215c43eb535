"""Tensors of a checkpoint that is quantised already, each dequantised when it is read.

A tensor of the model lies in several of the checkpoint: codes, scales, zero points. Shapes: O outputs and I inputs of a
layer, E experts, G groups of inputs that share a scale.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from distill.errors import UserError
from distill.models.checkpoints import Checkpoint
from distill.models.dequantizing import (
    from_awq,
    from_bitsandbytes_4bit,
    from_blocks,
    from_gptq,
    from_int8_rows,
    from_mxfp4,
    from_packed_integers,
)
from distill.models.gguf_tensors import GGUFTensors
from distill.models.stored_types import check_stored_types
from distill.models.streaming import Source
from distill.models.tensors import tensors
from distill.system.files import read_bounded

Parts = Callable[[str], Tensor]
Make = Callable[[], Tensor]
Settings = dict[str, Any]
INPUT_SCALES = ("input_scale", "activation_scale", "input_zero_point", "input_global_scale", "k_scale", "v_scale")
"""Endings of tensors that quantise activations, which are not needed where weights are dequantised."""
_CODES = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
"""Types of weights that mean nothing without their scale."""
_OTHERS = {
    "aqlm": "aqlm",
    "hqq": "hqq",
    "quanto": "optimum-quanto",
    "torchao": "torchao",
    "vptq": "vptq",
    "eetq": "eetq",
    "quark": "amd-quark",
}
READ = "bitsandbytes, fp8, fbgemm_fp8, mxfp4, gptq, awq, compressed-tensors"


def quantization_of(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """Return the part of a folder's configuration that says how its weights are quantised, or None."""
    if checkpoint.gguf_file is not None:
        return None
    config = json.loads(read_bounded(checkpoint.folder / "config.json"))
    places = [config, config.get("text_config") or {}]
    found = [place.get(key) for place in places for key in ("quantization_config", "compression_config")]
    return next((each for each in found if isinstance(each, dict)), None)


class DequantizedTensors:
    """The tensors of a model by name, made of those of its checkpoint on request."""

    def __init__(self, source: Source, settings: Mapping[str, Any], name: str) -> None:
        """Look up what each tensor is made of. Raises UserError for a format that cannot be read here."""
        self._source, self._name = source, name
        method = str(settings.get("quant_method", "")).lower().replace("_", "-")
        stored = set(source.names())
        if method not in _MAKERS:
            package = _OTHERS.get(method)
            raise UserError(
                f"{name} is quantised as {method or 'nobody knows'}, which is not read here (known: {READ}): name the "
                "checkpoint that it was made of"
                + (f", or dequantise it with its own package ({package}) and save that" if package else "")
            )
        self._makes: dict[str, Make] = {}
        used = _MAKERS[method](self._makes, stored, source.read, dict(settings), name)
        plain = stored - used
        self._makes.update({each: partial(self._plain, each) for each in plain if not each.endswith(INPUT_SCALES)})

    def names(self) -> list[str]:
        return sorted(self._makes)

    @torch.no_grad()
    def read(self, name: str) -> Tensor:
        """Return one tensor: float32 where it was quantised, else as it is stored."""
        return self._makes[name]()

    def _plain(self, name: str) -> Tensor:
        """Return a tensor as it is stored. Raises UserError for a matrix of codes, which are no weights."""
        tensor = self._source.read(name)
        if tensor.dim() > 1 and tensor.dtype in _CODES:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UserError(
                f"{self._name}: {name} is in {kind}, without a scale that is known here: name the unquantised one"
            )
        return tensor


Maker = Callable[[dict[str, Make], "set[str]", Parts, Settings, str], "set[str]"]
"""Makes by name, stored names, reader, settings, the checkpoint's name -> stored names that are used."""


def _bitsandbytes(
    makes: dict[str, Make], stored: set[str], read: Parts, settings: dict[str, Any], name: str
) -> set[str]:
    used: set[str] = set()
    for state in [each for each in stored if ".quant_state.bitsandbytes__" in each]:
        base = state.partition(".quant_state.")[0]
        own = {each for each in stored if each.startswith(f"{base}.")} | {base}
        makes[base] = partial(from_bitsandbytes_4bit, base, sorted(own - {base}), read)
        used |= own
    for scales in [each for each in stored if each.endswith(".SCB")]:
        layer = scales.removesuffix(".SCB")
        makes[f"{layer}.weight"] = partial(_of, from_int8_rows, read, f"{layer}.weight", scales)
        used |= {scales, f"{layer}.weight", f"{layer}.weight_format"}
    return used


def _fp8(makes: dict[str, Make], stored: set[str], read: Parts, settings: Settings, name: str) -> set[str]:
    """Add weights in eight bits whose scale, of a tensor, a row or a block, they are multiplied by."""
    block = tuple(settings.get("weight_block_size") or (128, 128))
    used: set[str] = set()
    for ending in ("_scale_inv", "_scale"):
        for scale in [each for each in stored if each.endswith(ending) and not each.endswith(INPUT_SCALES)]:
            base = scale.removesuffix(ending)
            if base in stored:
                makes[base] = partial(_of, partial(from_blocks, block=block), read, base, scale)
                used |= {base, scale}
    return used


def _mxfp4(makes: dict[str, Make], stored: set[str], read: Parts, settings: Settings, name: str) -> set[str]:
    used: set[str] = set()
    for blocks in [each for each in stored if each.endswith("_blocks")]:
        base = blocks.removesuffix("_blocks")
        if f"{base}_scales" not in stored:
            raise UserError(f"{name}: {base} has blocks without scales: fetch the checkpoint again")
        makes[base] = partial(_of, from_mxfp4, read, blocks, f"{base}_scales")
        used |= {blocks, f"{base}_scales"}
    return used


def _gptq(makes: dict[str, Make], stored: set[str], read: Parts, settings: Settings, name: str) -> set[str]:
    bits = int(settings.get("bits", 4))
    if bits not in (2, 4, 8):
        raise UserError(f"{name} is GPTQ in {bits} bits, of which 2, 4 and 8 are read here: name the unquantised one")
    adds_one = settings.get("checkpoint_format", "gptq") != "gptq_v2"
    make = partial(from_gptq, bits=bits, adds_one=adds_one, group=int(settings.get("group_size", 128)))
    return _packed_linear(makes, stored, read, make, ("qweight", "qzeros", "scales", "g_idx"))


def _awq(makes: dict[str, Make], stored: set[str], read: Parts, settings: Settings, name: str) -> set[str]:
    bits = int(settings.get("bits") or settings.get("w_bit") or 4)
    version = str(settings.get("version", "gemm")).lower()
    if bits != 4 or version != "gemm":
        raise UserError(
            f"{name} is AWQ in {bits} bits, version {version}: 4 bits, gemm are read here: name the unquantised one"
        )
    return _packed_linear(makes, stored, read, from_awq, ("qweight", "qzeros", "scales"))


def _packed_linear(
    makes: dict[str, Make], stored: set[str], read: Parts, make: Callable[..., Tensor], parts: tuple[str, ...]
) -> set[str]:
    used: set[str] = set()
    for codes in [each for each in stored if each.endswith(f".{parts[0]}")]:
        layer = codes.removesuffix(f".{parts[0]}")
        there = {part: f"{layer}.{part}" for part in parts if f"{layer}.{part}" in stored}
        if missing := {"qzeros", "scales"} - there.keys():
            raise UserError(
                f"{layer} has {parts[0]} without {' and '.join(sorted(missing))}: fetch the checkpoint again"
            )
        makes[f"{layer}.weight"] = partial(_of_named, make, read, there)
        used |= set(there.values())
    return used


def _compressed(makes: dict[str, Make], stored: set[str], read: Parts, settings: Settings, name: str) -> set[str]:
    form = str(settings.get("format", ""))
    if (settings.get("sparsity_config") or {}).get("format", "dense") not in ("dense", ""):
        raise UserError(f"{name} is compressed as sparse, which is not read here: name the unquantised checkpoint")
    packed = [each for each in stored if each.endswith(".weight_packed")]
    if packed and form != "pack-quantized":
        raise UserError(f"{name} is compressed as {form}, which is not read here: name the unquantised checkpoint")
    used: set[str] = set()
    for codes in packed:
        layer = codes.removesuffix(".weight_packed")
        endings = ("packed", "scale", "zero_point", "shape", "g_idx")
        there = {e: f"{layer}.weight_{e}" for e in endings if f"{layer}.weight_{e}" in stored}
        makes[f"{layer}.weight"] = partial(_of_named, partial(from_packed_integers, bits=_bits(settings)), read, there)
        used |= set(there.values())
    shifted = [each for each in stored - used if each.endswith(".weight_zero_point")]
    if shifted:
        raise UserError(f"{name} is compressed as {form} with zero points, which is not read here")
    block = next((group["block_structure"] for group in _groups(settings) if group.get("block_structure")), None)
    return used | _fp8(makes, stored - used, read, {"weight_block_size": block}, name)


def _bits(settings: Settings) -> int:
    found = [group["num_bits"] for group in _groups(settings) if group.get("num_bits")]
    return int(found[0]) if found else 4


def _groups(settings: Settings) -> list[Settings]:
    """Return the ways in which groups of layers keep their weights."""
    groups: Settings = settings.get("config_groups") or {}
    return [group.get("weights") or {} for group in groups.values()]


def _of(make: Callable[..., Tensor], read: Parts, *names: str) -> Tensor:
    return make(*(read(name) for name in names))


def _of_named(make: Callable[..., Tensor], read: Parts, names: Mapping[str, str]) -> Tensor:
    return make(**{part: read(name) for part, name in names.items()})


_MAKERS: dict[str, Maker] = {
    "bitsandbytes": _bitsandbytes,
    "fp8": _fp8,
    "fbgemm-fp8": _fp8,
    "modelopt": _fp8,
    "mxfp4": _mxfp4,
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed,
}


def full_tensors(checkpoint: Checkpoint) -> Source:
    """Open a checkpoint's tensors, dequantised where it is quantised already. Raises UserError where that fails."""
    if checkpoint.gguf_file is not None:
        return GGUFTensors(checkpoint)
    settings = quantization_of(checkpoint)
    found = tensors(checkpoint)
    if settings is None:
        check_stored_types(checkpoint)
        return found
    return DequantizedTensors(found, settings, checkpoint.name)


def check_format(checkpoint: Checkpoint) -> None:
    """Raise UserError for a checkpoint whose format is not read here, from its configuration."""
    settings = quantization_of(checkpoint)
    if settings is not None:
        DequantizedTensors(_Nothing(), settings, checkpoint.name)


class _Nothing:
    """A source without tensors."""

    def names(self) -> list[str]:
        return []

    def read(self, name: str) -> Tensor:
        raise KeyError(name)
