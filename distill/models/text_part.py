"""The language model in a multimodal checkpoint: its configuration, its tensors' names, its class without eyes."""

from __future__ import annotations

import copy
import functools
import inspect
import re
import sys
from collections.abc import Collection
from typing import Any

from torch import nn

_EMBEDDING = re.compile(
    r"^(?P<before>(?:.*\.)?(?:language_model|text_model|llm|language)\.(?:model\.)?)embed\w*\.weight$"
)
_SEES = re.compile(
    r"vis|image|audio|video|speech|projector|connector|aligner|resampler|qformer|perceiver|embed_tokens_ext"
)
"""Names of the modules that make pictures or sound into hidden states."""


def sees(name: str) -> bool:
    """Tell whether a module or tensor of this name makes pictures or sound into hidden states."""
    return _SEES.search(name) is not None


TRANSFORMATIONS = (
    "logit_scale",
    "logits_scaling",
    "final_logit_softcapping",
    "logits_soft_cap",
    "output_logit_soft_cap",
)
"""Names of the transformations of a head in configurations, as `huggingface.transformation` reads them."""


def text_config(config: Any) -> Any:
    """Return the configuration of the language model in a multimodal one, if its family is one of transformers' own.

    The result is then a model of text, as Mistral in Mistral 3, and all that is possible with that family is possible
    here. Any other configuration comes back as it is.
    """
    text = _inner(config)
    if text is None or not _is_causal(text) or not _transforms_alike(config, text):
        return config
    text = copy.deepcopy(text)
    if getattr(config, "tie_word_embeddings", None) is not None:  # it is the outer one that counts
        text.tie_word_embeddings = config.tie_word_embeddings
    for name in ("quantization_config", "dtype", "bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(text, name, None) is None and getattr(config, name, None) is not None:
            setattr(text, name, getattr(config, name))
    return text


def _inner(config: Any) -> Any | None:
    """Return the text part of a multimodal configuration; None without exactly one."""
    try:
        text = config.get_text_config()
    except ValueError:  # several
        return None
    return None if text is config or getattr(text, "is_encoder_decoder", False) else text


def _is_causal(config: Any) -> bool:
    import transformers

    return type(config) in transformers.AutoModelForCausalLM._model_mapping


def _transforms_alike(config: Any, text: Any) -> bool:
    """Tell whether the outer family's code knows the transformations of the text family's head.

    Aya Vision's, for one, leaves out the scale of Cohere's logits: the text family alone would be another model.
    """
    return all(reads(config, name) for name in TRANSFORMATIONS if getattr(text, name, None) not in (None, 1, 1.0))


def reads(config: Any, name: str) -> bool:
    """Tell whether the code of a multimodal configuration's family knows a setting of its text part."""
    import transformers

    try:
        return name in _source(transformers.AutoModelForImageTextToText._model_mapping[type(config)])
    except KeyError:  # a family of sound, or whatever else has a text part
        return True


@functools.cache
def _source(family: Any) -> str:
    return inspect.getsource(sys.modules[family.__module__])


def renaming(config: Any, names: Collection[str]) -> dict[str, str]:
    """Return prefixes of a checkpoint's tensors and those that the text model of `text_config` gives them.

    `config` is the checkpoint's own. The result is empty where nothing is to be renamed; a tensor with none of the
    prefixes belongs to the other parts.
    """
    import transformers

    text = text_config(config)
    if text is config:
        return {}
    base = base_name(transformers.AutoModelForCausalLM._model_mapping[type(text)])
    found = {match["before"] for name in names if (match := _EMBEDDING.match(name)) is not None}
    if len(found) != 1:
        return {}
    before = found.pop()
    heads = [name.removesuffix("weight") for name in names if name.endswith("lm_head.weight")]
    return {before: f"{base}.", **dict.fromkeys(heads, "lm_head.")}


def base_name(family: Any) -> str:
    """Return the name of the base model in a causal language model; Llama 4's class gives that of its wrapper."""
    prefix: str = getattr(family, "base_model_prefix", "")
    return "model" if prefix == "language_model" else prefix


def model_class(config: Any) -> Any:
    """Return the class that loads a configuration's language model: of transformers, and never with eyes or ears."""
    import transformers

    causal, seeing = transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText
    is_wrapper = type(config) not in causal._model_mapping or _inner(config) is not None
    if is_wrapper and type(config) in seeing._model_mapping:
        return _without_eyes(seeing._model_mapping[type(config)])
    return causal


def is_of_text(config: Any) -> bool:
    """Tell whether transformers has a class of text for a configuration's language model."""
    import transformers

    return model_class(config) is transformers.AutoModelForCausalLM


def construct(config: Any, dtype: Any, trust_remote_code: bool) -> Any:
    """Make the language model of a configuration, with random weights."""
    family = model_class(config)
    if hasattr(family, "from_config"):
        return family.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    return family._from_config(config, dtype=dtype)


@functools.cache
def _without_eyes(family: Any) -> Any:
    """Return a family whose models lose what makes pictures into hidden states before a weight is read for it."""

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        family.__init__(self, config, *args, **kwargs)
        for owner in (self, getattr(self, self.base_model_prefix, self)):
            for name, module in list(owner.named_children()):
                embeds = any(inner is self.get_input_embeddings() for inner in module.modules())
                if not embeds and sees(name):
                    setattr(owner, name, nn.Identity())

    # Configurations and transformers' tables of names know the family by its name.
    return type(family.__name__, (family,), {"__init__": __init__, "__module__": family.__module__})
