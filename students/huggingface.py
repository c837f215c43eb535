"""A student that is any Hugging Face causal language model: pretrained, or fresh from a configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from distill.models.checkpoints import nearest, refuse_adapter, resolve
from distill.models.dequantized import check_format
from distill.models.huggingface import HuggingFaceLanguageModel, load_pretrained, quiet_transformers
from distill.models.language_model import check_rows
from distill.models.shapes import declare
from distill.models.text_part import construct, text_config


@declare(pretrained="model")
def load_student(
    model: str | None = None,
    config: dict[str, Any] | str | None = None,
    vocab_size: int | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> HuggingFaceLanguageModel:
    """Make a student with float32 weights, from exactly one of

    model: a pretrained folder, hub name, GGUF file or short name;
    config: a mapping with `model_type` and the family's sizes, or a folder or `config.json` with them: random weights
    (seed torch before). A configuration without `vocab_size` takes the tokenizer's, which the pipeline supplies.
    """
    if (model is None) == (config is None):
        raise ValueError("give either model (pretrained) or config (random weights)")
    if model is not None:
        checkpoint = resolve(model, revision, trust_remote_code)
        refuse_adapter(checkpoint)
        check_format(checkpoint)
        loaded = load_pretrained(checkpoint, torch.float32, trust_remote_code=trust_remote_code)
    else:
        assert config is not None
        loaded = _from_config(config, vocab_size, trust_remote_code)
    student = HuggingFaceLanguageModel(loaded)
    if vocab_size is not None:
        check_rows(student.head.weight_VD.shape[0], vocab_size)
    student.check()
    return student


def _from_config(config: dict[str, Any] | str, vocab_size: int | None, trust_remote_code: bool) -> Any:
    import transformers

    file = None if isinstance(config, dict) else _file(config)
    given = dict(config) if isinstance(config, dict) else _read(_file(config))
    family = given.pop("model_type", None)
    if family not in transformers.CONFIG_MAPPING:
        raise ValueError(f"config: unknown model_type '{family}'{nearest(str(family), transformers.CONFIG_MAPPING)}")
    if file is None:  # a published file may have keys that its class lacks; a hand-written mapping may not
        _refuse_unknown(given, transformers.CONFIG_MAPPING[family])
    with quiet_transformers():
        try:
            if file is None:
                made = transformers.AutoConfig.for_model(family, **given)
            else:  # transformers reads its own way of writing: infinities, settings of single layers
                made = transformers.AutoConfig.from_pretrained(file, trust_remote_code=trust_remote_code)
            return construct(_of_text(made, given, vocab_size), torch.float32, trust_remote_code)
        except Exception as error:  # sizes that do not fit make a family's constructor raise errors of any kind
            raise ValueError(f"config of {family}: {error}") from error


def _of_text(made: Any, given: dict[str, Any], vocab_size: int | None) -> Any:
    """Return the configuration of the language model in the one that was made of `given`, with our tokens."""
    text = text_config(made)
    if text is not made:
        given = next((part for part in given.values() if _is_of(part, text)), {})
    if getattr(text, "quantization_config", None) is not None:
        del text.quantization_config
    if "vocab_size" not in given and vocab_size is not None:
        text.vocab_size = vocab_size
    if "pad_token_id" not in given:
        text.pad_token_id = None  # a family's own padding id may lie outside this vocabulary
    return text


def _is_of(part: Any, config: Any) -> bool:
    return isinstance(part, dict) and part.get("model_type") == config.model_type


def _file(path: str) -> Path:
    """Return the path of a configuration in a folder or of its own."""
    file = Path(path).expanduser()
    file = file / "config.json" if file.is_dir() else file
    if not file.is_file():
        raise ValueError(f"config: no such file: {file}")
    return file


def _read(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, TypeError) as error:
        raise ValueError(f"config: {file} is not a JSON object: {error}") from error


def _refuse_unknown(given: dict[str, Any], config_class: Any) -> None:
    """Raise ValueError for a key that the family lacks: transformers stores any key, even a misspelt size."""
    known = set(config_class().to_dict()) | set(getattr(config_class, "attribute_map", {}))
    for key in given:
        if key not in known:
            raise ValueError(f"config: unknown key '{key}'{nearest(key, known)}")
