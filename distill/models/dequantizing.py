"""Weights of other libraries' formats in full: pure functions of their tensors, computed in float32.

Shapes: O outputs and I inputs of a layer, E experts, G groups of inputs that share a scale.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from distill.errors import UserError
from distill.models.packed_formats import dequantize

_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Values of a four-bit float (one sign, two exponent bits, one of mantissa) without its sign: OCP Microscaling 1.0."""
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Place of each of eight neighbouring outputs among the nibbles of an AWQ word."""


def from_bitsandbytes_4bit(base: str, parts: list[str], read: Callable[[str], Tensor]) -> Tensor:
    """Return a weight in NF4 or FP4, as bitsandbytes saves it: codes, and a state of several tensors."""
    from bitsandbytes.functional import QuantState

    state = QuantState.from_dict({part.removeprefix(f"{base}."): read(part) for part in parts}, torch.device("cpu"))
    state.dtype = torch.float32
    return dequantize(read(base), state)


def from_int8_rows(codes_OI: Tensor, scale_O: Tensor) -> Tensor:
    """Return `codes / 127 * scale`: bitsandbytes' int8."""
    return codes_OI.float() * (scale_O.float()[:, None] / 127)


def from_blocks(codes: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """Return `codes * scale`, whose scale is one number, one a row, one a group of a row, or one a block.

    `codes` `[.., O, I]`. Of a scale `[.., o, i]` with o < O each counts for `block` rows and columns; with o = O for
    I / i columns.
    """
    full, scale = codes.float(), scale.float()
    if scale.dim() < 2:
        return full * (scale if scale.numel() == 1 or codes.dim() != 2 else scale[:, None])
    rows, columns = full.shape[-2:]
    if scale.shape[-2] not in (1, rows):
        scale = scale.repeat_interleave(block[0], -2)[..., :rows, :].repeat_interleave(block[1], -1)[..., :columns]
    elif scale.shape[-1] not in (1, columns):
        scale = scale.repeat_interleave(-(-columns // scale.shape[-1]), -1)[..., :columns]
    return full * scale


def from_mxfp4(blocks_EOGB: Tensor, scales_EOG: Tensor) -> Tensor:
    """Return experts `[E, I, O]` of blocks of 32 four-bit floats, low nibble first, each block with a power of two.

    The exponent is kept plus 127 (OCP Microscaling 1.0, §6.3).
    """
    values = torch.tensor([*_FP4, *(-value for value in _FP4)])
    experts, outputs = blocks_EOGB.shape[:2]
    full = torch.empty(experts, outputs, blocks_EOGB.shape[2], 2 * blocks_EOGB.shape[3])
    for expert in range(experts):  # one at a time: indices take eight bytes a weight
        codes = blocks_EOGB[expert].int()
        full[expert, ..., 0::2], full[expert, ..., 1::2] = values[codes & 15], values[codes >> 4]
        full[expert] = torch.ldexp(full[expert], scales_EOG[expert, ..., None].int() - 127)
    return full.flatten(2).transpose(1, 2).contiguous()


def from_gptq(
    qweight: Tensor,
    scales: Tensor,
    bits: int,
    adds_one: bool,
    group: int,
    qzeros: Tensor,
    g_idx: Tensor | None = None,
) -> Tensor:
    """Return `[O, I]` of GPTQ's words: inputs packed along columns, `scale[g] * (code - zero[g])`.

    qweight `[I * bits / 32, O]`, scales `[G, O]`, qzeros `[G, O * bits / 32]`; g_idx `[I]` is each input's group, by
    default in order. `adds_one`: zeros are kept less 1 (the first version of the format).
    """
    codes_IO = _unpacked(qweight, bits, 0)
    zeros_GO = _unpacked(qzeros, bits, 1)[:, : scales.shape[1]] + int(adds_one)
    if adds_one:
        zeros_GO &= (1 << bits) - 1  # zero 2^bits - 1, less 1 and plus 1, has no carry
    inputs = codes_IO.shape[0]
    of_input_I = torch.arange(inputs) // (inputs if group == -1 else group) if g_idx is None else g_idx.long()
    return ((codes_IO - zeros_GO[of_input_I]) * scales.float()[of_input_I]).T.contiguous()


def from_awq(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Tensor:
    """Return `[O, I]` of AWQ's words (gemm): outputs packed along rows in an order of their own.

    qweight `[I, O / 8]`, qzeros `[G, O / 8]`, scales `[G, O]`: `scale[g] * (code - zero[g])`.
    """
    codes_IO, zeros_GO = (_unpacked(words, 4, 1, _AWQ_ORDER) for words in (qweight, qzeros))
    group = codes_IO.shape[0] // scales.shape[0]
    of_input_I = torch.arange(codes_IO.shape[0]) // group
    return ((codes_IO - zeros_GO[of_input_I]) * scales.float()[of_input_I]).T.contiguous()


def from_packed_integers(
    packed: Tensor,
    scale: Tensor,
    shape: Tensor,
    bits: int,
    zero_point: Tensor | None = None,
    g_idx: Tensor | None = None,
) -> Tensor:
    """Return `[O, I]` of compressed-tensors' words: inputs packed along rows, codes kept plus half their range.

    scale `[O, G]`, zero_point `[O * bits / 32, G]` packed along columns, `scale * (code - zero)`.
    """
    if bits not in (4, 8):
        raise UserError(f"compressed weights of {bits} bits are not read here: name the unquantised checkpoint")
    rows, columns = (int(size) for size in shape)
    half = 1 << (bits - 1)
    codes_OI = _unpacked(packed, bits, 1)[:, :columns] - half
    groups = scale.shape[1]
    of_input_I = torch.arange(columns) // -(-columns // groups) if g_idx is None else g_idx.long()
    if zero_point is not None:
        zeros_OG = _unpacked(zero_point, bits, 0)[:rows] - half if zero_point.dtype == torch.int32 else zero_point
        codes_OI = codes_OI - zeros_OG[:, of_input_I]
    return codes_OI * scale.float()[:, of_input_I]


def _unpacked(words: Tensor, bits: int, along: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Return the whole numbers of 32-bit words, lowest bits first, or number i from the place `order[i]`."""
    count = 32 // bits
    places = order or range(count)
    mask = (1 << bits) - 1
    numbers = torch.stack([(words >> (bits * place)) & mask for place in places], dim=along + 1)
    return numbers.flatten(along, along + 1)
