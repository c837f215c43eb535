"""Traits of single families of transformers: scales, positions and sizes that their code keeps in a way of its own."""

from __future__ import annotations

import inspect
import sys
from typing import Any

from distill.models.text_part import reads


def keep_scale(base: Any) -> None:
    """Leave a model's weights as they are, in every mode.

    RWKV's code halves weights and hidden states every few layers in evaluation mode, so that float16 suffices, and
    doubles them to train: the answers are the same. But it misses packed and streamed weights, packs NF4 ones anew in
    another type, and lets the halves be saved.
    """
    if hasattr(base, "_rescale_layers"):
        base._rescale_layers = _as_they_are


def _as_they_are() -> None:
    pass


def refuse_lengths(base: Any) -> None:
    """Raise ValueError for Reformer's code: it fails on positions with most lengths, and hashes by chance."""
    if hasattr(base, "_pad_to_mult_of_chunk_length"):
        raise ValueError(
            f"{type(base).__name__} takes positions only with texts of some lengths: not supported; "
            "choose a model of another family"
        )


def positions_before(config: Any) -> int:
    """Return the number of positions in a configuration that no text has: RoBERTa's and its kin's are padding's."""
    counts = "create_position_ids_from_input_ids" in source_of_family(config)
    return config.pad_token_id + 1 if counts and config.pad_token_id is not None else 0


def first_position(base: Any) -> int:
    """Return the position of a text's first token in a family: RoBERTa and its kin begin behind the padding token's."""
    table = getattr(getattr(base, "embeddings", None), "position_embeddings", None)
    padding = getattr(table, "padding_idx", None)
    return 0 if padding is None else padding + 1


def transformation(config: Any) -> dict[str, float]:
    """Return the head's `scale` and `soft_cap` from a configuration; of a multimodal one, from its text part.

    Granite divides by `logits_scaling`, HyperCLOVA X multiplies by it, Cohere multiplies by `logit_scale`, and Gemma 2
    caps with `final_logit_softcapping` (RecurrentGemma and xLSTM under other names). A wrapper's code may leave them
    out. `check` finds families that need anything else.
    """
    text = config.get_text_config()

    def given(name: str) -> Any:
        return getattr(text, name, None) if text is config or reads(config, name) else None

    scale, scaling = given("logit_scale"), given("logits_scaling")
    if scale is None and scaling is not None:
        scale = scaling if text.model_type.startswith("hyperclovax") else 1.0 / scaling
    names = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    soft_cap = next((cap for name in names if (cap := given(name)) is not None), None)
    found: dict[str, float] = {} if scale is None else {"scale": float(scale)}
    return found if soft_cap is None else {**found, "soft_cap": float(soft_cap)}


def neurons(config: Any) -> int:
    """Return the number of neurons of an MLP, which LFM 2 computes from another number.

    In a family whose every MLP is a mixture (Qwen 3.5's) it is that of an expert.
    """
    size: int = getattr(config, "intermediate_size", None) or config.moe_intermediate_size
    if not getattr(config, "block_auto_adjust_ff_dim", False):
        return size
    size = int(2 * size / 3)
    if config.block_ffn_dim_multiplier is not None:
        size = int(config.block_ffn_dim_multiplier * size)
        size = -(-size // config.block_multiple_of) * config.block_multiple_of
    return size


def source_of_family(config: Any) -> str:
    """Return the source of a family's modules in transformers; empty for a family that is not there."""
    import transformers

    for auto in (transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText):
        try:
            return inspect.getsource(sys.modules[auto._model_mapping[type(config)].__module__])
        except (KeyError, OSError):
            continue
    return ""
