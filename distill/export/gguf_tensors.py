"""A language model's tensors in GGUF: their names, and the layout in which llama.cpp computes what transformers does.

Shapes: V vocabulary, D hidden size, E size of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from distill.errors import UserError
from distill.export.gguf_families import FAMILIES, Plan, global_head, head_size, ropes
from distill.models.checkpoints import Checkpoint
from distill.models.language_model import check_rows
from distill.models.streaming import Weights, without_weights
from distill.models.tensors import Tensors

UNROTATED = 1e30
"""Divisor of a frequency that leaves none of it in float32."""
BY_TOKEN = ("token_embd.weight", "output.weight", "per_layer_token_embd.weight")
"""Tensors with a row for each token."""
Read = Callable[[], Tensor]
"""Function that reads and converts one tensor, in float32."""


def converted(plan: Plan, checkpoint: Checkpoint, vocab_size: int) -> Iterator[tuple[str, tuple[int, ...], Read]]:
    """Yield name, shape and content of every tensor of the file.

    Rows of the vocabulary beyond `vocab_size` are left out, because they stand for no token. Raises UserError for a
    tensor that llama.cpp's architecture does not know.
    """
    import gguf

    config, family = plan.config, plan.family
    # Names in memory, where a mixture's experts are one tensor, as they are in llama.cpp.
    model = without_weights(config, torch.float32, trust_remote_code=False)
    weights = Weights(model, Tensors(checkpoint), checkpoint.name)
    if unknown := [name for name in weights.unknown if not name.endswith("rotary_emb.inv_freq")]:
        raise UserError(f"gguf: the tensor {unknown[0]} has no place in a {config.model_type}")
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family.architecture)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    if (factors := _frequency_factors(plan)) is not None:
        yield "rope_freqs.weight", tuple(factors.shape), lambda: factors
    for name in sorted(shapes):
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        for stored, shape, part in parts(plan, name, shapes[name]):
            base, _, kind = stored.rpartition(".")
            is_known = kind in ("weight", "A_log") or (kind == "bias" and base.split(".", 3)[-1] in family.biases)
            new = names.get_name(stored, try_suffixes=(".weight", ".bias")) if is_known else None
            if new is None:
                raise UserError(f"gguf: llama.cpp's {family.architecture} has no place for the tensor {name}")
            rows = vocab_size if new in BY_TOKEN else None
            if rows is not None:
                try:
                    check_rows(shape[0], rows)
                except ValueError as error:
                    raise UserError(f"gguf: {name}: {error}") from None
                shape = (rows, *shape[1:])
            yield new, shape, _reader(plan, weights, name, stored, part, rows)


Part = Callable[[Tensor], Tensor]
"""Function that makes llama.cpp's tensor of one in memory."""


def parts(plan: Plan, name: str, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...], Part]]:
    """Return name, shape and content of the tensors that llama.cpp has in the place of one, under Hugging Face names.

    Experts' two matrices in one become two: one behind the other, or, in GPT-OSS, which has all matrices transposed,
    neuron by neuron in turn. A convolution of single channels loses the dimension of its one input.
    """
    base, _, leaf = name.rpartition(".")
    if base.endswith(".experts"):
        is_bias = leaf.endswith("_bias")
        ending, leaf = ("bias", leaf.removesuffix("_bias")) if is_bias else ("weight", leaf)
        in_turn = plan.config.model_type == "gpt_oss"
        turned = in_turn and not is_bias
        shape = (shape[0], shape[2], shape[1]) if turned else shape

        def rows(start: int, stop: int, step: int) -> Part:
            return lambda whole: (whole.transpose(1, 2) if turned else whole)[:, start:stop:step]

        if leaf == "down_proj":
            return [(f"{base}.down_proj.{ending}", shape, rows(0, shape[1], 1))]
        both, one = shape[1], (shape[0], shape[1] // 2, *shape[2:])
        gate, up = (rows(0, both, 2), rows(1, both, 2)) if in_turn else (rows(0, one[1], 1), rows(one[1], both, 1))
        return [(f"{base}.gate_proj.{ending}", one, gate), (f"{base}.up_proj.{ending}", one, up)]
    if leaf == "dt_bias":
        return [(f"{base}.dt_proj.bias", shape, lambda whole: whole)]
    if name.endswith((".sinks", ".layer_scalar")):
        return [(f"{name}.weight", shape, lambda whole: whole)]
    if len(shape) == 3 and shape[1] == 1:
        return [(name, (shape[0], shape[2]), lambda whole: whole[:, 0])]
    return [(name, shape, lambda whole: whole)]


def _reader(plan: Plan, weights: Weights, name: str, stored: str, part: Part, rows: int | None) -> Read:
    def read() -> Tensor:
        tensor = next(weights.read([name]))[1]
        return convert(plan, stored, part(tensor[:rows].to(torch.float32))).contiguous()

    return read


def convert(plan: Plan, name: str, tensor: Tensor) -> Tensor:
    """Return the tensor that makes llama.cpp compute the same as transformers does with the tensor of this name."""
    family, config = plan.family, plan.config
    layer_name = name.rpartition(".")[0].split(".", 3)[-1]
    if "linear_attn" in name:
        return _linear_attention(config, name.split(".linear_attn.")[1], tensor)
    if layer_name.endswith("norm"):
        tensor = tensor + family.norm_offset
    if family.interleaved and layer_name in ("self_attn.q_proj", "self_attn.k_proj"):
        tensor = tensor[interleaved_rows(len(tensor), plan.head)]
    # A norm of the queries would undo a scale of the projection, so there the scale goes into the norm.
    scaled = "self_attn.q_norm" if family.architecture == "gemma3" else "self_attn.q_proj"
    divisor = query_divisor(config)
    if divisor is not None and layer_name == scaled:
        tensor = tensor * math.sqrt(divisor / config.query_pre_attn_scalar)
    return tensor


def _linear_attention(config: Any, name: str, tensor: Tensor) -> Tensor:
    """Return a tensor of linear attention with its value heads in llama.cpp's order, and the decay as it multiplies.

    In transformers the value heads of one key head are neighbours: value head `i` goes with key head `i // each`. In
    llama.cpp the key heads take turns: `i % keys`.
    """
    keys, values, size = config.linear_num_key_heads, config.linear_num_value_heads, config.linear_value_head_dim
    order = torch.arange(values).view(keys, values // keys).T.flatten()
    channels = (order[:, None] * size + torch.arange(size)).flatten()
    if name in ("in_proj_a.weight", "in_proj_b.weight", "A_log", "dt_proj.bias"):
        tensor = tensor[order]
    elif name == "in_proj_z.weight":
        tensor = tensor[channels]
    elif name == "out_proj.weight":
        tensor = tensor[:, channels]
    elif name in ("in_proj_qkv.weight", "conv1d.weight"):
        before = 2 * keys * config.linear_key_head_dim
        tensor = torch.cat([tensor[:before], tensor[before:][channels]])
    return -tensor.exp() if name == "A_log" else tensor


def query_divisor(config: Any) -> int | None:
    """Return the number whose root divides queries in llama.cpp's Gemma, where a model may name another; else None."""
    family = FAMILIES[config.model_type]
    if family.layers_of_27b is None:
        return None
    is_27b = config.num_hidden_layers == family.layers_of_27b
    return int(config.hidden_size // config.num_attention_heads) if is_27b else head_size(config)


def interleaved_rows(rows: int, head: int) -> Tensor:
    """Return the order of a projection's rows that puts each channel of a head beside its partner in the rotation.

    Channel `i` of a head's first half is rotated with channel `i` of its second half: 0, E/2, 1, E/2 + 1, and so on.
    """
    return torch.arange(rows).view(-1, 2, head // 2).transpose(1, 2).flatten()


def _frequency_factors(plan: Plan) -> Tensor | None:
    """Return the divisors of the rotary frequencies in llama.cpp (Llama 3), `[E/2]`, or None if there are none."""
    if (size := global_head(plan.config)) is not None:
        rotated = int(ropes(plan.config)[0].get("partial_rotary_factor", 1.0) * size // 2)
        return torch.tensor([1.0] * rotated + [UNROTATED] * (size // 2 - rotated))
    if ropes(plan.config)[0].get("rope_type") != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](plan.config, torch.device("cpu"))
    theta, head = ropes(plan.config)[0]["rope_theta"], plan.head
    plain = 1.0 / theta ** (torch.arange(0, head, 2, dtype=torch.float32) / head)
    return plain / scaled
