"""Tiny random models of every causal family that transformers knows, and of its multimodal wrappers, as folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

VOCABULARY = 320
"""Rows of each tiny model's embedding; the tokenizer beside it has fewer tokens."""
TOKENS = 290
LAYERS = 4
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embedding_size", "input_embedding_size"), 64),
    **dict.fromkeys(("output_embedding_size", "embedding_dim", "emb_dim", "word_embed_proj_dim", "lru_width"), 64),
    **dict.fromkeys(("attention_hidden_size", "backbone_hidden_size", "ple_embed_dim"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "dff", "dim_ff"), 128),
    **dict.fromkeys(("ffn_hidden_size", "d_inner", "feed_forward_size", "intermediate_size_mlp"), 128),
    **dict.fromkeys(("dense_intermediate_size", "block_ffn_size", "shared_intermediate_size"), 128),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "shared_expert_intermediate_size"), 64),
    **dict.fromkeys(("shared_experts_intermediate_size", "moe_shared_expert_intermediate_size"), 64),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "decoder_layers"), LAYERS),
    **dict.fromkeys(("encoder_layers", "num_decoder_layers", "num_encoder_layers", "num_blocks"), LAYERS),
    **dict.fromkeys(("num_layers_per_stack",), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("num_encoder_attention_heads", "swa_num_attention_heads", "num_query_groups"), 4),
    **dict.fromkeys(("linear_num_heads", "linear_num_value_heads", "index_n_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "swa_num_key_value_heads", "num_kv_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys(("head_dim", "global_head_dim", "swa_head_dim", "kv_channels", "attention_head_size"), 16),
    **dict.fromkeys(("d_head", "dim_head", "linear_head_dim", "linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "v_head_dim", "index_head_dim", "mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim",), 16),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank", "hc_lowrank", "laurel_rank"), 32),
    **dict.fromkeys(("hidden_size_global", "adapter_in_dim", "adapter_input_size"), 64),
    **dict.fromkeys(("adapter_rank", "gated_norm_rank", "router_hidden_size"), 16),
    **dict.fromkeys(("hidden_size_per_layer_input",), 8),
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size"), 16),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 8),
    **dict.fromkeys(("mamba_dt_rank", "time_step_rank"), 8),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size", "local_attn_chunk_length", "lsh_attn_chunk_length"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 8),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "n_groups", "mamba_n_groups"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers"), 1),
    **dict.fromkeys(("zero_expert_num",), 2),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "window_size", "attention_window_size"), 24),
    **dict.fromkeys(("local_attention", "attention_chunk_size", "index_topk", "local_attention_window_len"), 24),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_target_positions"), 256),
    **dict.fromkeys(("context_length", "model_max_length"), 256),
    **dict.fromkeys(("rotary_dim",), 16),
    **dict.fromkeys(("vocab_size", "decoder_vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("unpadded_vocab_size",), VOCABULARY),
    **dict.fromkeys(("num_kv_shared_layers",), 0),
    **dict.fromkeys(("num_nextn_predict_layers",), 0),
    **dict.fromkeys(("index_topk_blocks", "o_groups"), 2),
    **dict.fromkeys(("index_block_size", "block_size"), 16),
    **dict.fromkeys(("ngram_vocab_size_base",), 997),
    **dict.fromkeys(("encoder_hash_byte_group_vocab",), 500),
    **dict.fromkeys(("rel_extent",), 64),
    **dict.fromkeys(("pronunciation_embed_dim", "shape_embed_dim"), 16),
    "depth": 2,
    "image_size": 32,
    "patch_size": 8,
    "rope_head_dim": 16,
}
"""Sizes by their names in configurations: small, but several of each kind of thing that a family counts."""
NEED_TIMM = {"gemma3n": "gemma3n_text"}
"""Wrappers whose eyes come from a package that is not installed, and their text families."""
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
BY_FAMILY: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_group": 1, "n_group": 1},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0}, "ffn_config": {"hidden_size": 64}},
    "dots1": {
        "layer_types": ["full_attention"] * LAYERS,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
    },
    "dots3_note_text": {"num_key_value_heads": 4},
    "dots3_note": {"text_config": {"num_key_value_heads": 4}},
    "emu3": {"vocabulary_map": {"<image>": 300, "<|extra_200|>": 301, "<|visual token 000000|>": 302}},
    "falcon_h1": {"mamba_d_ssm": 128},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"]},
    **{name: {"text_config": {"rope_parameters": MROPE}} for name in ("glm4v", "glm46v")},
    "glm4v_moe": {"text_config": {"rope_parameters": {**MROPE, "mrope_section": [1, 1, 2]}}},
    "qwen2_vl": {"text_config": {"rope_parameters": MROPE}},
    "qwen2_5_vl": {"text_config": {"rope_parameters": MROPE}},
    "mamba": {"initializer_range": 0.02},  # five times as much, its default, makes a noise of 0.5 % one of 40 %
    "mamba2": {"head_dim": 16, "num_heads": 8},
    "gemma4_text": {"per_layer_config": {LAYERS - 1: {"head_dim": 32}}},
    "gemma4": {"text_config": {"per_layer_config": {LAYERS - 1: {"head_dim": 32}}}},
    "qwen3_moe": {"norm_topk_prob": True},  # as every published one
    "ministral": {"head_dim": 16, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "qwen4_exp_text": {"head_dim": 16},
    "reformer": {"is_decoder": True, "axial_pos_shape": [16, 16], "axial_pos_embds_dim": [32, 32]},
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "intermediate_size": [128] * LAYERS,
        "activation_sparsity_pattern": [0.0] * LAYERS,
    },
    "zamba": {"layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "attention_hidden_size": 128},
    "zamba2": {"attention_hidden_size": 128},
    "zaya": {"num_experts_per_tok": 1},
    **{
        name: {"is_decoder": True}
        for name in (
            "bert",
            "big_bird",
            "camembert",
            "data2vec-text",
            "electra",
            "ernie",
            "megatron-bert",
            "rembert",
            "roberta",
            "roberta-prelayernorm",
            "roc_bert",
            "roformer",
            "xlm-roberta",
            "xlm-roberta-xl",
            "xmod",
            "bert-generation",
        )
    },
}
"""Settings that a family needs besides, or instead: what its own checks ask for, and masks that look back only."""


def tiny_config(family: str) -> Any:
    """Return a small configuration of a family: every kind of layer that its own has, and text parts of 320 tokens."""
    from transformers import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[family]
    own = BY_FAMILY.get(family, {})
    small = _shrunk(config_class().to_dict())
    for part in (small, *(value for value in small.values() if isinstance(value, dict))):
        if "kv_lora_rank" in part:  # latent attention has no groups
            part["num_key_value_heads"] = SIZES["num_attention_heads"]
    for key, value in own.items():
        small[key] = {**small.get(key, {}), **value} if isinstance(value, dict) else value
    return config_class(**small)


def _shrunk(default: dict[str, Any]) -> dict[str, Any]:
    small: dict[str, Any] = {}
    total = next((default[key] for key in ("num_hidden_layers", "n_layer", "num_layers") if default.get(key)), None)
    for key, value in default.items():
        if key in ("model_type", "transformers_version", "architectures"):
            continue
        if isinstance(value, dict) and "model_type" in value:
            small[key] = {**_shrunk(value), "model_type": value["model_type"]}
        elif isinstance(value, bool):
            continue
        elif key in SIZES and isinstance(value, int) and value > 0:
            small[key] = SIZES[key]
        elif isinstance(value, list) and total and len(value) == total and total > LAYERS:
            small[key] = _each_kind(value)
        elif key.endswith(("token_id", "token_index")) and isinstance(value, int) and value >= VOCABULARY:
            small[key] = VOCABULARY - 1 - len(small) % 16
    return small


def _each_kind(values: list[Any]) -> list[Any]:
    """Return the entries of `LAYERS` layers: one of each kind in the order of the first of them, then the first."""
    kinds = sorted({str(value): index for index, value in reversed(list(enumerate(values)))}.values())
    more = [index for index in range(len(values)) if index not in kinds]
    return [values[index] for index in sorted([*kinds, *more][:LAYERS])]


def causal_families() -> list[str]:
    """Return the `model_type` of every causal language model of the installed transformers."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def seeing_families() -> list[str]:
    """Return the `model_type` of every model of images and text that writes text."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return sorted(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


def own_class(family: str) -> Any:
    """Return the auto class of transformers that makes the family whole, with eyes if it has any."""
    import transformers

    sees = family in seeing_families()
    return transformers.AutoModelForImageTextToText if sees else transformers.AutoModelForCausalLM


def write(family: str, folder: Path) -> Path:
    """Write a tiny random model of a family; raises as the family's own code does."""
    import torch

    from distill.system.quiet import quiet_transformers

    config = tiny_config(family)
    torch.manual_seed(0)
    if family in NEED_TIMM:
        return _write_wrapped(family, config, folder)
    with quiet_transformers():
        model = own_class(family).from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():  # answers that depend on the text, and no branch that does nothing
                if parameter.dim() > 1:
                    parameter.mul_(3)
                if not parameter.any():
                    parameter.normal_(std=0.05)
        model.save_pretrained(folder)
    return folder


def _write_wrapped(family: str, config: Any, folder: Path) -> Path:
    """Write the text model of a wrapper as the wrapper's checkpoint holds it, without eyes."""
    from safetensors.torch import load_file, save_file

    write(NEED_TIMM[family], folder)
    weights = load_file(folder / "model.safetensors")
    prefix = {name: name.replace("model.", "model.language_model.", 1) for name in weights}
    save_file(
        {prefix[name]: tensor for name, tensor in weights.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    config.text_config = tiny_config(NEED_TIMM[family])
    config.save_pretrained(folder)
    return folder


def whole(family: str, folder: Path) -> Any:
    """Return the family's own model, eyes and all, in evaluation mode."""
    import torch
    import transformers

    if family not in NEED_TIMM:
        return own_class(family).from_pretrained(folder, dtype=torch.float32).eval()
    mapping = {r"^model\.language_model\.": "model."}
    config = transformers.AutoConfig.from_pretrained(folder).text_config
    return transformers.AutoModelForCausalLM.from_pretrained(folder, config=config, key_mapping=mapping).eval()


def in_full(packed: Any, plain: Any) -> Any:
    """Give the plain model the values that the packed one, in nf4, computes with."""
    from torch import nn

    from distill.models.packed import PackedWeight
    from distill.models.quantization import full_weight, is_transposed

    for name, module in packed.named_modules():
        if isinstance(module, PackedWeight):
            given, owner, attribute = module.whole(), name.rpartition(".")[0], name.rpartition(".")[2]
        elif isinstance(module, nn.Linear) and hasattr(module.weight, "quant_state"):
            given, owner, attribute = full_weight(module), name, "weight"
        else:
            continue
        layer = plain.get_submodule(owner)
        getattr(layer, attribute).data = given.T if is_transposed(layer) else given
    return plain
