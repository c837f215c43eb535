"""A language model's hyperparameters in GGUF, under llama.cpp's names, for the families that it computes alike."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from distill.errors import UserError
from distill.models.huggingface import neurons

if TYPE_CHECKING:
    from gguf import GGUFWriter

NO_CAP = 1e6
"""A soft cap that does nothing in float32, because llama.cpp's Gemma 2 always has one."""
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
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _refuse(config: Any, family: Family) -> None:
    if config.model_type == "smollm3" and [bool(rotates) for rotates in config.no_rope_layers] != [
        (layer + 1) % NO_ROPE_PERIOD != 0 for layer in range(config.num_hidden_layers)
    ]:
        raise UserError("gguf: llama.cpp's SmolLM3 rotates all layers but each fourth one, this model others")
    _refuse_mixture(config, family)
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


def _refuse_mixture(config: Any, family: Family) -> None:
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
    if family.architecture == "lfm2" and config.conv_bias:
        raise UserError("gguf: llama.cpp's LFM 2 has no biases at its convolutions")


def ropes(config: Any) -> list[dict[str, Any]]:
    """Return the rotary positions: first of the layers that see the whole text, then of the windowed ones."""
    rope = config.rope_parameters
    if "full_attention" in rope:
        return [rope["full_attention"], rope["sliding_attention"]]
    return [rope]


def _key_value_heads(config: Any) -> int | list[int]:
    """Return the number of key-value heads, of LFM 2 in each layer: none where there is a convolution."""
    if config.model_type != "lfm2":
        return int(config.num_key_value_heads)
    return [config.num_key_value_heads if kind == "full_attention" else 0 for kind in config.layer_types]


def add_hyperparameters(writer: GGUFWriter, plan: Plan, vocabulary: int) -> None:
    """Write everything that llama.cpp needs of an architecture; `vocabulary` is the number of tokens."""
    config, family = plan.config, plan.family
    writer.add_context_length(plan.context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(neurons(config))
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(_key_value_heads(config))
    writer.add_key_length(plan.head)
    writer.add_value_length(plan.head)
    writer.add_layer_norm_rms_eps(config.norm_eps if config.model_type == "lfm2" else config.rms_norm_eps)
    rotations = ropes(config)
    writer.add_rope_dimension_count(int(plan.head * rotations[0].get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(rotations[0]["rope_theta"])
    _add_scaling(writer, rotations[0], config)
    if config.model_type == "granite":
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    if config.model_type in MIXTURES:
        writer.add_expert_count(config.num_local_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(getattr(config, "moe_intermediate_size", config.intermediate_size))
    if config.model_type == "ministral3" and "llama_4_scaling_beta" in rotations[0]:
        writer.add_attn_temperature_scale(rotations[0]["llama_4_scaling_beta"])
    if config.model_type == "qwen3_5_text":
        _add_linear_attention(writer, plan, rotations[0])
    if config.model_type == "lfm2":
        writer.add_vocab_size(vocabulary)
        writer.add_shortconv_l_cache(config.conv_L_cache)
    if config.model_type == "phi3":  # it asks for a window; the context ends where the model's own does
        writer.add_sliding_window(0)
    if family.window_period is not None:
        _add_windows(writer, plan, rotations)
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
        if config.model_type == "ministral3" and rope.get("mscale") == rope.get("mscale_all_dim"):
            del usual["mscale"], usual["mscale_all_dim"]  # they cancel, in llama.cpp as well
        if config.model_type == "gpt_oss":
            del usual["truncate"]  # llama.cpp rounds the ends of the ramp, and so the published files do
        if unusual := [key for key, values in usual.items() if rope.get(key) not in values]:
            raise UserError(f"gguf: rotary positions of kind yarn cannot be written with a {unusual[0]} of their own")
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        if rope.get("mscale_all_dim"):
            writer.add_rope_scaling_yarn_log_mul(rope["mscale_all_dim"])
        writer.add_rope_scaling_orig_ctx_len(
            rope.get("original_max_position_embeddings") or config.max_position_embeddings
        )


def _add_linear_attention(writer: GGUFWriter, plan: Plan, rotation: dict[str, Any]) -> None:
    """Write the sizes of linear attention, the layers that have it, and the parts of a rotation by picture's axes."""
    config = plan.config
    writer.add_ssm_conv_kernel(config.linear_conv_kernel_dim)
    writer.add_ssm_state_size(config.linear_key_head_dim)
    writer.add_ssm_group_count(config.linear_num_key_heads)
    writer.add_ssm_time_step_rank(config.linear_num_value_heads)
    writer.add_ssm_inner_size(config.linear_value_head_dim * config.linear_num_value_heads)
    pairs = int(plan.head * rotation.get("partial_rotary_factor", 1.0)) // 2
    # The axes take turns. In a text all are the position; a pair beyond the three counts would not be rotated.
    writer.add_rope_dimension_sections([(pairs + 2) // 3, (pairs + 1) // 3, pairs // 3, 0])
    full = [kind == "full_attention" for kind in config.layer_types]
    interval = full.index(True) + 1 if any(full) else len(full) + 1
    writer.add_full_attention_interval(interval)
    if full != [(layer + 1) % interval == 0 for layer in range(len(full))]:
        writer.add_array(f"{plan.family.architecture}.attention.recurrent_layers", [not each for each in full])
        plan.notes.append("its layers of linear attention are irregular: only a recent llama.cpp reads that")


def _add_windows(writer: GGUFWriter, plan: Plan, rotations: list[dict[str, Any]]) -> None:
    """Write the windowed layers: by llama.cpp's own rule if they follow it, which any version reads, else singly."""
    period, windows = plan.family.window_period, plan.windows
    assert period is not None
    writer.add_sliding_window(plan.config.sliding_window)
    if windows != [(layer + 1) % period != 0 for layer in range(len(windows))]:
        writer.add_sliding_window_pattern(windows)
        plan.notes.append("its windowed layers are irregular: only a recent llama.cpp reads that")
    if len(rotations) > 1:
        if rotations[1].get("rope_type", "default") != "default":
            raise UserError("gguf: scaled rotary positions in windowed layers cannot be written")
        writer.add_rope_freq_base_swa(rotations[1]["rope_theta"])
