"""A language model in GGUF: its hyperparameters under llama.cpp's names, and its tensors in llama.cpp's layout.

Shapes: V vocabulary, D hidden size, E size of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor

from distill.errors import UserError
from distill.models.checkpoints import Checkpoint, weight_files
from distill.models.language_model import check_rows
from distill.models.tensors import Tensors

if TYPE_CHECKING:
    from gguf import GGUFWriter

NO_CAP = 1e6
"""A soft cap that does nothing in float32, because llama.cpp's Gemma 2 always has one."""
NO_ROPE_PERIOD = 4
"""Number of layers of which llama.cpp's SmolLM3 leaves the last one without positions."""
BIASES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP_BIASES = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


@dataclass(frozen=True)
class Family:
    """The differences between llama.cpp and transformers in the computation of a family."""

    architecture: str
    activation: str = "silu"
    interleaved: bool = False
    """True if llama.cpp rotates neighbouring channels. transformers rotates the two halves of a head instead."""
    norm_offset: float = 0.0
    """Offset that transformers adds to the weights of every norm, and that llama.cpp expects in the file."""
    biases: tuple[str, ...] = ()
    window_period: int | None = None
    """Number of layers of which one sees the whole text and the others a window. None means no windows."""
    layers_of_27b: int | None = None
    """Number of layers at which llama.cpp divides the queries by another root (Gemma's 27B models)."""


FAMILIES = {
    "llama": Family("llama", interleaved=True, biases=BIASES + MLP_BIASES),
    "mistral": Family("llama", interleaved=True, biases=BIASES + MLP_BIASES),
    "qwen2": Family("qwen2", biases=BIASES[:3]),
    "qwen3": Family("qwen3"),
    "smollm3": Family("smollm3", interleaved=True, biases=BIASES + MLP_BIASES),
    "olmo2": Family("olmo2"),
    "olmo3": Family("olmo2", window_period=4),
    "granite": Family("granite", interleaved=True),
    "phi3": Family("phi3"),
    "gemma": Family("gemma", "gelu_pytorch_tanh", norm_offset=1.0),
    "gemma2": Family("gemma2", "gelu_pytorch_tanh", norm_offset=1.0, window_period=2, layers_of_27b=46),
    "gemma3_text": Family("gemma3", "gelu_pytorch_tanh", norm_offset=1.0, window_period=6, layers_of_27b=62),
}
"""Families by `model_type`."""


@dataclass(frozen=True)
class Plan:
    """The plan of one model's file."""

    config: Any
    family: Family
    context: int
    notes: list[str] = field(default_factory=list)
    """Notes for the user, each a clause."""

    @property
    def head(self) -> int:
        return _head(self.config)

    @property
    def windows(self) -> list[bool]:
        """Flags of the layers that see a window only."""
        return [kind == "sliding_attention" for kind in getattr(self.config, "layer_types", None) or []]


def plan(config: Any) -> Plan:
    """Plan the file of a model with this `transformers` configuration. Raises UserError if llama.cpp lacks it."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UserError(f"gguf: a model of family {config.model_type} cannot be written (known: {', '.join(FAMILIES)})")
    if family.architecture == "qwen2" and config.num_attention_heads * _head(config) != config.hidden_size:
        # llama.cpp's Qwen 2 computes the head size from the hidden size. Its Llama stores it, and has the same biases.
        family = FAMILIES["llama"]
    _refuse(config, family)
    context, notes = config.max_position_embeddings, []
    result = Plan(config, family, context)
    window = getattr(config, "sliding_window", None)
    is_windowed = any(result.windows) if config.model_type != "mistral" else bool(window)
    if family.window_period is None and is_windowed and window < context:
        notes.append(f"the context ends at {window:,} tokens: llama.cpp knows no attention windows in this family")
        context = window
    return Plan(config, family, context, notes)


def _head(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _refuse(config: Any, family: Family) -> None:
    if config.model_type == "smollm3" and [bool(rotates) for rotates in config.no_rope_layers] != [
        (layer + 1) % NO_ROPE_PERIOD != 0 for layer in range(config.num_hidden_layers)
    ]:
        raise UserError("gguf: llama.cpp's SmolLM3 rotates all layers but each fourth one, this model others")
    if config.model_type == "phi3" and any(rope.get("rope_type", "default") != "default" for rope in _ropes(config)):
        raise UserError("gguf: scaled rotary positions of phi3 cannot be written")
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation != family.activation:
        raise UserError(f"gguf: llama.cpp computes {config.model_type} with {family.activation}, not {activation}")
    if family.architecture == "gemma3" and getattr(config, "attn_logit_softcapping", None):
        raise UserError("gguf: llama.cpp's Gemma 3 has no soft cap on attention")
    if family.architecture == "gemma" and getattr(config, "final_logit_softcapping", None):
        raise UserError("gguf: llama.cpp's Gemma has no soft cap on logits")
    if getattr(config, "use_bidirectional_attention", None):
        raise UserError("gguf: this model reads its text in both directions, which llama.cpp does not")
    for rope in _ropes(config):
        kind = rope.get("rope_type", "default")
        known = ["default", "linear", "yarn"] + (["llama3"] if family.architecture == "llama" else [])
        if kind not in known or rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise UserError(
                f"gguf: rotary positions of kind {kind} cannot be written for {config.model_type} "
                f"(known: {', '.join(known)}, over whole heads)"
            )


def _ropes(config: Any) -> list[dict[str, Any]]:
    """Return the rotary positions: first of the layers that see the whole text, then of the windowed ones."""
    rope = config.rope_parameters
    if "full_attention" in rope:
        return [rope["full_attention"], rope["sliding_attention"]]
    return [rope]


def add_hyperparameters(writer: GGUFWriter, plan: Plan) -> None:
    """Write everything that llama.cpp needs of an architecture, except the vocabulary."""
    config, family = plan.config, plan.family
    writer.add_context_length(plan.context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(plan.head)
    writer.add_value_length(plan.head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(plan.head)
    ropes = _ropes(config)
    writer.add_rope_freq_base(ropes[0]["rope_theta"])
    _add_scaling(writer, ropes[0], config)
    if config.model_type == "granite":
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    if config.model_type == "phi3":  # it asks for a window; the context ends where the model's own does
        writer.add_sliding_window(0)
    if family.window_period is not None:
        _add_windows(writer, plan, ropes)
    if family.architecture == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping or NO_CAP)
        writer.add_final_logit_softcapping(config.final_logit_softcapping or NO_CAP)
    elif getattr(config, "final_logit_softcapping", None):
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _add_scaling(writer: GGUFWriter, rope: dict[str, Any], config: Any) -> None:
    from gguf import RopeScalingType

    kind = rope.get("rope_type", "default")
    if kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind == "yarn":
        usual: dict[str, tuple[Any, ...]] = {
            "attention_factor": (None,),
            "mscale": (None,),
            "mscale_all_dim": (None,),
            "truncate": (None, True),
        }
        usual |= {"beta_fast": (None, 32), "beta_slow": (None, 1)}
        if unusual := [key for key, values in usual.items() if rope.get(key) not in values]:
            raise UserError(f"gguf: rotary positions of kind yarn cannot be written with a {unusual[0]} of their own")
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(
            rope.get("original_max_position_embeddings") or config.max_position_embeddings
        )


def _add_windows(writer: GGUFWriter, plan: Plan, ropes: list[dict[str, Any]]) -> None:
    """Write the windowed layers: by llama.cpp's own rule if they follow it, which any version reads, else singly."""
    period, windows = plan.family.window_period, plan.windows
    assert period is not None
    writer.add_sliding_window(plan.config.sliding_window)
    if windows != [(layer + 1) % period != 0 for layer in range(len(windows))]:
        writer.add_sliding_window_pattern(windows)
        plan.notes.append("its windowed layers are irregular: only a recent llama.cpp reads that")
    if len(ropes) > 1:
        if ropes[1].get("rope_type", "default") != "default":
            raise UserError("gguf: scaled rotary positions in windowed layers cannot be written")
        writer.add_rope_freq_base_swa(ropes[1]["rope_theta"])


Read = Callable[[], Tensor]
"""Function that reads and converts one tensor, in float32."""


def converted(plan: Plan, checkpoint: Checkpoint, vocab_size: int) -> Iterator[tuple[str, tuple[int, ...], Read]]:
    """Yield name, shape and content of every tensor of the file.

    Rows of the vocabulary beyond `vocab_size` are left out, because they stand for no token. Raises UserError for a
    tensor that llama.cpp's architecture does not know.
    """
    import gguf

    config, family = plan.config, plan.family
    tensors, shapes = Tensors(checkpoint), _shapes(checkpoint)
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family.architecture)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    if (factors := _frequency_factors(plan)) is not None:
        yield "rope_freqs.weight", tuple(factors.shape), lambda: factors
    for name in tensors.names():
        if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        base, _, kind = name.rpartition(".")
        is_known = kind == "weight" or (kind == "bias" and base.split(".", 3)[-1] in family.biases)
        new = names.get_name(name, try_suffixes=(".weight", ".bias")) if is_known else None
        if new is None:
            raise UserError(f"gguf: llama.cpp's {family.architecture} has no place for the tensor {name}")
        rows = vocab_size if new in ("token_embd.weight", "output.weight") else None
        shape = shapes[name]
        if rows is not None:
            try:
                check_rows(shape[0], rows)
            except ValueError as error:
                raise UserError(f"gguf: {name}: {error}") from None
        read = _reader(plan, tensors, name, rows)
        yield new, shape if rows is None else (rows, *shape[1:]), read


def _shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for file in weight_files(checkpoint):
        with safe_open(file, framework="pt") as opened:
            shapes.update({name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()})  # noqa: SIM118
    return shapes


def _reader(plan: Plan, tensors: Tensors, name: str, rows: int | None) -> Read:
    def read() -> Tensor:
        tensor = tensors.read(name)[:rows].to(torch.float32)
        return convert(plan, name, tensor).contiguous()

    return read


def convert(plan: Plan, name: str, tensor: Tensor) -> Tensor:
    """Return the tensor that makes llama.cpp compute the same as transformers does with the tensor of this name."""
    family, config = plan.family, plan.config
    layer_name = name.rpartition(".")[0].split(".", 3)[-1]
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


def query_divisor(config: Any) -> int | None:
    """Return the number whose root divides queries in llama.cpp's Gemma, where a model may name another; else None."""
    family = FAMILIES[config.model_type]
    if family.layers_of_27b is None:
        return None
    is_27b = config.num_hidden_layers == family.layers_of_27b
    return int(config.hidden_size // config.num_attention_heads) if is_27b else _head(config)


def interleaved_rows(rows: int, head: int) -> Tensor:
    """Return the order of a projection's rows that puts each channel of a head beside its partner in the rotation.

    Channel `i` of a head's first half is rotated with channel `i` of its second half: 0, E/2, 1, E/2 + 1, and so on.
    """
    return torch.arange(rows).view(-1, 2, head // 2).transpose(1, 2).flatten()


def _frequency_factors(plan: Plan) -> Tensor | None:
    """Return the divisors of the rotary frequencies in llama.cpp (Llama 3), `[E/2]`, or None if there are none."""
    if _ropes(plan.config)[0].get("rope_type") != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](plan.config, torch.device("cpu"))
    theta, head = _ropes(plan.config)[0]["rope_theta"], plan.head
    plain = 1.0 / theta ** (torch.arange(0, head, 2, dtype=torch.float32) / head)
    return plain / scaled
