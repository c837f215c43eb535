"""A student that is any Hugging Face causal language model: pretrained, or fresh from a configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from distill.models.checkpoints import nearest, refuse_adapter, resolve
from distill.models.huggingface import HuggingFaceLanguageModel, load_pretrained, quiet_transformers
from distill.models.language_model import check_rows
from distill.models.shapes import declare


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

    given = dict(config) if isinstance(config, dict) else _read(config)
    given.pop("quantization_config", None)
    family = given.pop("model_type", None)
    if family not in transformers.CONFIG_MAPPING:
        raise ValueError(f"config: unknown model_type '{family}'{nearest(str(family), transformers.CONFIG_MAPPING)}")
    if isinstance(config, dict):  # a published file may have keys that its class lacks; a hand-written mapping may not
        _refuse_unknown(given, transformers.CONFIG_MAPPING[family])
    if vocab_size is not None:
        given.setdefault("vocab_size", vocab_size)
    given.setdefault("pad_token_id", None)  # a family's own padding id may lie outside this vocabulary
    with quiet_transformers():
        try:
            made = transformers.AutoConfig.for_model(family, **given)
            return transformers.AutoModelForCausalLM.from_config(
                made, dtype=torch.float32, trust_remote_code=trust_remote_code
            )
        except Exception as error:  # sizes that do not fit make a family's constructor raise errors of any kind
            raise ValueError(f"config of {family}: {error}") from error


def _read(path: str) -> dict[str, Any]:
    file = Path(path).expanduser()
    file = file / "config.json" if file.is_dir() else file
    if not file.is_file():
        raise ValueError(f"config: no such file: {file}")
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
