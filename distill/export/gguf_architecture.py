"""A language model's hyperparameters in GGUF, under llama.cpp's names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distill.errors import UserError
from distill.export.gguf_families import MIXTURES, Plan, global_head, ropes
from distill.models.traits import neurons

if TYPE_CHECKING:
    from gguf import GGUFWriter

NO_CAP = 1e6
"""A soft cap that does nothing in float32, because llama.cpp's Gemma 2 always has one."""


def _neurons_of_layers(config: Any) -> int | list[int]:
    """Return the number of neurons, of Gemma 4 in each layer: twice as many where keys are borrowed, if it says so."""
    if config.model_type != "gemma4_text" or not config.use_double_wide_mlp:
        return neurons(config)
    own = config.num_hidden_layers - config.num_kv_shared_layers
    return [neurons(config) * (1 if layer < own else 2) for layer in range(config.num_hidden_layers)]


def _add_gemma4(writer: GGUFWriter, plan: Plan) -> None:
    config = plan.config
    writer.add_embedding_length_per_layer_input(config.hidden_size_per_layer_input or 0)
    writer.add_shared_kv_layers(config.num_kv_shared_layers)
    writer.add_key_length_swa(plan.head)
    writer.add_value_length_swa(plan.head)
    writer.add_rope_dimension_count_swa(plan.head)


def _key_value_heads(config: Any) -> int | list[int]:
    """Return the number of key-value heads: of Gemma 4 in each layer, and of LFM 2, which has none in a convolution."""
    if config.model_type == "gemma4_text":
        return [int(layer.num_key_value_heads) for layer in config.per_layer_config]
    if config.model_type != "lfm2":
        return int(config.num_key_value_heads)
    return [config.num_key_value_heads if kind == "full_attention" else 0 for kind in config.layer_types]


def add_hyperparameters(writer: GGUFWriter, plan: Plan, vocabulary: int) -> None:
    """Write everything that llama.cpp needs of an architecture; `vocabulary` is the number of tokens."""
    config, family = plan.config, plan.family
    writer.add_context_length(plan.context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(_neurons_of_layers(config))
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(_key_value_heads(config))
    head = global_head(config) or plan.head
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.norm_eps if config.model_type == "lfm2" else config.rms_norm_eps)
    rotations = ropes(config)
    # Gemma 4 rotates the rest of a head by nothing: `rope_freqs`.
    part = 1.0 if config.model_type == "gemma4_text" else rotations[0].get("partial_rotary_factor", 1.0)
    writer.add_rope_dimension_count(int(head * part))
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
    if config.model_type == "gemma4_text":
        _add_gemma4(writer, plan)
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
    is_irregular = windows != [(layer + 1) % period != 0 for layer in range(len(windows))]
    if is_irregular or plan.config.model_type == "gemma4_text":
        writer.add_sliding_window_pattern(windows)
        if plan.config.model_type != "gemma4_text":  # of which llama.cpp knows no rule
            plan.notes.append("its windowed layers are irregular: only a recent llama.cpp reads that")
    if len(rotations) > 1:
        if rotations[1].get("rope_type", "default") != "default":
            raise UserError("gguf: scaled rotary positions in windowed layers cannot be written")
        writer.add_rope_freq_base_swa(rotations[1]["rope_theta"])
