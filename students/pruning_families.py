"""Families whose width can be pruned: the meaning of each dimension of their tensors, and the sizes that must stay."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

# What each dimension of a tensor counts: D channels of the hidden size, Q rows of all query heads, H those heads, K
# rows of all key-value heads, F neurons of the MLP, P the rows of query, key and value in one matrix, U those of gate
# and up, W the rows of query heads with a gate each, E experts. A dot: a dimension that no pruning touches.
AXES = {
    "embed_tokens.weight": ".D",
    "lm_head.weight": ".D",
    "norm.weight": "D",
    "input_layernorm.weight": "D",
    "post_attention_layernorm.weight": "D",
    "pre_feedforward_layernorm.weight": "D",
    "post_feedforward_layernorm.weight": "D",
    "self_attn.q_proj.weight": "QD",
    "self_attn.q_proj.bias": "Q",
    "self_attn.k_proj.weight": "KD",
    "self_attn.k_proj.bias": "K",
    "self_attn.v_proj.weight": "KD",
    "self_attn.v_proj.bias": "K",
    "self_attn.qkv_proj.weight": "PD",
    "self_attn.o_proj.weight": "DQ",
    "self_attn.o_proj.bias": "D",
    "self_attn.q_norm.weight": ".",
    "self_attn.k_norm.weight": ".",
    "mlp.gate_proj.weight": "FD",
    "mlp.gate_proj.bias": "F",
    "mlp.up_proj.weight": "FD",
    "mlp.up_proj.bias": "F",
    "mlp.gate_up_proj.weight": "UD",
    "mlp.down_proj.weight": "DF",
    "mlp.down_proj.bias": "D",
}
_ALL_HEADS = {"self_attn.q_norm.weight": "Q", "self_attn.k_norm.weight": "K"}  # normalised as one vector
_MIXTURE = {
    "mlp.gate.weight": "ED",
    "mlp.gate.e_score_correction_bias": "E",
    "mlp.experts.gate_up_proj": "E.D",
    "mlp.experts.down_proj": "ED.",
}
_SHARED = {
    f"mlp.{name}.{leaf}.weight": axes
    for name in ("shared_expert", "shared_experts")
    for leaf, axes in (("gate_proj", ".D"), ("up_proj", ".D"), ("down_proj", "D."))
} | {"mlp.shared_expert_gate.weight": ".D"}
_LINEAR_ATTENTION = {
    **{f"linear_attn.in_proj_{part}.weight": ".D" for part in ("qkv", "z", "b", "a", "qkvz", "ba")},
    "linear_attn.conv1d.weight": "...",
    **dict.fromkeys(("linear_attn.dt_bias", "linear_attn.A_log", "linear_attn.norm.weight"), "."),
    "linear_attn.out_proj.weight": "D.",
    "self_attn.q_proj.weight": "WD",
}
_LATENT_ATTENTION = {
    **{f"self_attn.{part}.weight": ".D" for part in ("q_proj", "q_a_proj", "kv_a_proj_with_mqa")},
    **{f"self_attn.{part}.weight": "." for part in ("q_a_layernorm", "kv_a_layernorm")},
    **{f"self_attn.{part}.weight": ".." for part in ("q_b_proj", "kv_b_proj")},
    "self_attn.o_proj.weight": "D.",
}
_CONVOLUTIONS = {
    "embedding_norm.weight": "D",
    "operator_norm.weight": "D",
    "ffn_norm.weight": "D",
    "self_attn.out_proj.weight": "DQ",
    "self_attn.q_layernorm.weight": ".",
    "self_attn.k_layernorm.weight": ".",
    "conv.conv.weight": "...",
    "conv.conv.bias": ".",
    "conv.in_proj.weight": "..",
    "conv.in_proj.bias": ".",
    "conv.out_proj.weight": "..",
    "conv.out_proj.bias": ".",
    "feed_forward.w1.weight": "FD",
    "feed_forward.w3.weight": "FD",
    "feed_forward.w2.weight": "DF",
}
_MIXTURE_OF_CONVOLUTIONS = {
    "feed_forward.gate.weight": "ED",
    "feed_forward.expert_bias": "E",
    "feed_forward.experts.gate_up_proj": "E..",
    "feed_forward.experts.down_proj": "E..",
}
_EMBEDDINGS_A_LAYER = {
    **{f"self_attn.{name}_proj.weight": ".." for name in ("q", "k", "v", "o")},
    "embed_tokens_per_layer.weight": "..",
    "per_layer_model_projection.weight": "..",
    "per_layer_projection_norm.weight": ".",
    "per_layer_input_gate.weight": "..",
    "per_layer_projection.weight": "..",
    "post_per_layer_input_norm.weight": "D",
    "layer_scalar": ".",
}
_SCALES = "its embedding is scaled by the hidden size"
_EXPERTS_NEURONS = "the neurons of experts stay: give experts"
_ONE_NORM = "its norm of all heads has the hidden size"
_LATENT = "its heads share one latent vector"


@dataclass(frozen=True)
class Family:
    """A family whose tensors are known."""

    axes: dict[str, str] = field(default_factory=dict)
    """Axes of tensors that `AXES` lacks, or that differ here, by their names in memory."""
    fixed: dict[str, str] = field(default_factory=dict)
    """Options that this family has no use for, each with the reason."""

    def axes_of(self, name: str) -> str | None:
        """Return the axes of a tensor by its name within its layer, or the model; None if it is not known."""
        return self.axes.get(name) or AXES.get(name)

    @property
    def is_mixture(self) -> bool:
        return any("E" in axes for axes in self.axes.values())


def _mixture(axes: dict[str, str] | None = None, **fixed: str) -> Family:
    return Family({**_MIXTURE, **(axes or {})}, {"intermediate_size": _EXPERTS_NEURONS, **fixed})


FAMILIES = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "granite", "phi3", "smollm3", "ministral3"), Family()),
    **dict.fromkeys(("olmo2", "olmo3"), Family(_ALL_HEADS)),
    **dict.fromkeys(("gemma2", "gemma3_text"), Family(fixed={"hidden_size": _SCALES})),
    "gemma4_text": Family(
        _EMBEDDINGS_A_LAYER,
        {"hidden_size": _SCALES, "key_value_groups": "its layers have heads of two sizes"},
    ),
    "glm4": Family({"post_self_attn_layernorm.weight": "D", "post_mlp_layernorm.weight": "D"}),
    "lfm2": Family(_CONVOLUTIONS, {"hidden_size": "its convolutions have as many channels as the hidden size"}),
    "qwen3_5_text": Family(_LINEAR_ATTENTION),
    **dict.fromkeys(("mixtral", "qwen3_moe"), _mixture()),
    "olmoe": _mixture(_ALL_HEADS, hidden_size=_ONE_NORM, key_value_groups=_ONE_NORM),
    "qwen2_moe": _mixture(_SHARED),
    "glm4_moe": _mixture(_SHARED),
    **dict.fromkeys(("qwen3_next", "qwen3_5_moe_text"), _mixture({**_SHARED, **_LINEAR_ATTENTION})),
    **dict.fromkeys(
        ("deepseek_v2", "deepseek_v3"), _mixture({**_SHARED, **_LATENT_ATTENTION}, key_value_groups=_LATENT)
    ),
    "ernie4_5_moe": _mixture({**_SHARED, "mlp.gate.moe_statics.e_score_correction_bias": ".E"}),
    "lfm2_moe": Family(
        _CONVOLUTIONS | _MIXTURE_OF_CONVOLUTIONS,
        {
            "hidden_size": "its convolutions have as many channels as the hidden size",
            "intermediate_size": _EXPERTS_NEURONS,
        },
    ),
    "gpt_oss": _mixture(
        {
            "mlp.router.weight": "ED",
            "mlp.router.bias": "E",
            "mlp.experts.gate_up_proj": "ED.",
            "mlp.experts.gate_up_proj_bias": "E.",
            "mlp.experts.down_proj": "E.D",
            "mlp.experts.down_proj_bias": "ED",
            "self_attn.sinks": "H",
        }
    ),
    "phimoe": _mixture(
        {
            "mlp.router.weight": "ED",
            **dict.fromkeys(("norm.bias", "input_layernorm.bias", "post_attention_layernorm.bias"), "D"),
            "lm_head.bias": ".",
        },
        hidden_size="its norms take the mean of all channels",
    ),
}
"""Families by `model_type`."""
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Names of the number of experts in configurations."""
CHOSEN = ("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts")
"""Names of the number of experts that a token is given to."""


def setting(config: Any, names: tuple[str, ...]) -> str | None:
    """Return the first of the names that a configuration has, None if it has none."""
    return next((name for name in names if getattr(config, name, None) is not None), None)
