"""Families of language models that llama.cpp computes as transformers does, and what it would compute otherwise."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from distill.errors import UserError

NO_ROPE_PERIOD = 4
"""Number of layers of which llama.cpp's SmolLM3 leaves the last one without positions."""
BIASES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LLAMA_ROPES = ("default", "linear", "yarn", "llama3")
EXPERT_BIASES = ("mlp.experts.gate_proj", "mlp.experts.up_proj", "mlp.experts.down_proj")
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
    rope_kinds: tuple[str, ...] = ("default", "linear", "yarn")
    rotates_part: bool = False
    """True if llama.cpp can rotate a part of each head."""


FAMILIES = {
    "llama": Family("llama", interleaved=True, biases=BIASES + MLP_BIASES, rope_kinds=LLAMA_ROPES),
    "mistral": Family("llama", interleaved=True, biases=BIASES + MLP_BIASES, rope_kinds=LLAMA_ROPES),
    "mixtral": Family("llama", interleaved=True, rope_kinds=LLAMA_ROPES),
    "ministral3": Family("mistral3", interleaved=True),
    "qwen2": Family("qwen2", biases=BIASES[:3]),
    "qwen3": Family("qwen3"),
    "qwen3_moe": Family("qwen3moe"),
    "qwen3_5_text": Family(
        "qwen35", norm_offset=1.0, biases=("linear_attn.dt_proj",), rope_kinds=("default",), rotates_part=True
    ),
    "gpt_oss": Family("gpt-oss", window_period=2, biases=(*BIASES, "mlp.router", *EXPERT_BIASES)),
    "lfm2": Family("lfm2", rope_kinds=("default", "linear")),
    "smollm3": Family("smollm3", interleaved=True, biases=BIASES + MLP_BIASES),
    "olmo2": Family("olmo2"),
    "olmo3": Family("olmo2", window_period=4),
    "granite": Family("granite", interleaved=True),
    "phi3": Family("phi3", rope_kinds=("default",)),
    "glm4": Family("glm4", biases=BIASES[:3], rope_kinds=("default",), rotates_part=True),
    "gemma": Family("gemma", "gelu_pytorch_tanh", norm_offset=1.0),
    "gemma2": Family("gemma2", "gelu_pytorch_tanh", norm_offset=1.0, window_period=2, layers_of_27b=46),
    "gemma4_text": Family(
        "gemma4", "gelu_pytorch_tanh", window_period=6, rope_kinds=("default", "proportional"), rotates_part=True
    ),
    "gemma3_text": Family("gemma3", "gelu_pytorch_tanh", norm_offset=1.0, window_period=6, layers_of_27b=62),
}
"""Families by `model_type`."""
MIXTURES = ("qwen3_moe", "gpt_oss", "mixtral")


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
        return head_size(self.config)

    @property
    def windows(self) -> list[bool]:
        """Flags of the layers that see a window only."""
        return [kind == "sliding_attention" for kind in getattr(self.config, "layer_types", None) or []]


def plan(config: Any) -> Plan:
    """Plan the file of a model with this `transformers` configuration. Raises UserError if llama.cpp lacks it."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UserError(f"gguf: a model of family {config.model_type} cannot be written (known: {', '.join(FAMILIES)})")
    if family.architecture == "qwen2" and config.num_attention_heads * head_size(config) != config.hidden_size:
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
    if config.model_type == "gpt_oss" and ropes(config)[0].get("truncate") is False:
        notes.append("llama.cpp rounds the ends of yarn's ramp, and this model does not: answers differ a little")
    return Plan(config, family, context, notes)


def head_size(config: Any) -> int:
    own = vars(config).get("head_dim")  # Gemma 4 forbids to ask for it, because it differs between its layers
    return int(own or config.hidden_size // config.num_attention_heads)


def _refuse(config: Any, family: Family) -> None:
    if config.model_type == "smollm3" and [bool(rotates) for rotates in config.no_rope_layers] != [
        (layer + 1) % NO_ROPE_PERIOD != 0 for layer in range(config.num_hidden_layers)
    ]:
        raise UserError("gguf: llama.cpp's SmolLM3 rotates all layers but each fourth one, this model others")
    _refuse_of_family(config, family)
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None) or family.activation
    if activation != family.activation:
        raise UserError(f"gguf: llama.cpp computes {config.model_type} with {family.activation}, not {activation}")
    if family.architecture == "gemma3" and getattr(config, "attn_logit_softcapping", None):
        raise UserError("gguf: llama.cpp's Gemma 3 has no soft cap on attention")
    if family.architecture == "gemma" and getattr(config, "final_logit_softcapping", None):
        raise UserError("gguf: llama.cpp's Gemma has no soft cap on logits")
    if getattr(config, "use_bidirectional_attention", None):
        raise UserError("gguf: this model reads its text in both directions, which llama.cpp does not")
    for rope in ropes(config):
        kind = rope.get("rope_type", "default")
        is_partial = rope.get("partial_rotary_factor", 1.0) != 1.0
        if kind not in family.rope_kinds or (is_partial and not family.rotates_part):
            raise UserError(
                f"gguf: rotary positions of kind {kind} cannot be written for {config.model_type} "
                f"(known: {', '.join(family.rope_kinds)}{'' if family.rotates_part else ', over whole heads'})"
            )


def _refuse_of_family(config: Any, family: Family) -> None:
    if family.architecture == "qwen3moe":
        if not config.norm_topk_prob:
            raise UserError(
                "gguf: llama.cpp's Qwen 3 makes the weights of a token's experts sum to 1, this model does not"
            )
        if config.mlp_only_layers or config.decoder_sparse_step != 1:
            raise UserError("gguf: llama.cpp's Qwen 3 with experts has them in each layer, this model in some")
    if family.architecture == "qwen35":
        if config.linear_key_head_dim != config.linear_value_head_dim:
            raise UserError(
                "gguf: llama.cpp's Qwen 3.5 has keys and values of one size in linear attention, this one two"
            )
        if "linear_attention" not in config.layer_types:
            raise UserError("gguf: llama.cpp's Qwen 3.5 needs a layer of linear attention, and this model has none")
    if family.architecture == "gemma4":
        if config.enable_moe_block:
            raise UserError("gguf: Gemma 4 with experts cannot be written")
        for rope in ropes(config):
            is_partial = rope.get("partial_rotary_factor", 1.0) != 1.0
            is_default = rope.get("rope_type", "default") == "default"
            if rope.get("factor", 1.0) != 1.0 or (is_default and is_partial):
                raise UserError("gguf: llama.cpp's Gemma 4 has no scaled rotary positions, and whole heads in windows")
    if family.architecture == "lfm2" and config.conv_bias:
        raise UserError("gguf: llama.cpp's LFM 2 has no biases at its convolutions")


def ropes(config: Any) -> list[dict[str, Any]]:
    """Return the rotary positions: first of the layers that see the whole text, then of the windowed ones."""
    rope = config.rope_parameters
    if "full_attention" in rope:
        return [rope["full_attention"], rope["sliding_attention"]]
    return [rope]


def global_head(config: Any) -> int | None:
    """Return the size of a head in Gemma 4's layers that see the whole text; None for other families."""
    if config.model_type != "gemma4_text":
        return None
    kinds = zip(config.layer_types, config.per_layer_config, strict=True)
    return next(int(layer.head_dim) for kind, layer in kinds if kind == "full_attention")
