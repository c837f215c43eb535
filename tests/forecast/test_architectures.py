"""The published dimensions add up to the published numbers of parameters."""

from __future__ import annotations

import pytest
import torch

from distill.forecast.published import Published, published_models

MODELS = {model.names[0]: model for model in published_models().values()}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_the_dimensions_make_the_published_number_of_parameters(model: Published) -> None:
    import transformers

    config = transformers.AutoConfig.for_model(**model.config)
    with torch.device("meta"):
        made = transformers.AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in made.parameters()) == model.parameters


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_the_head_has_a_row_for_every_token(model: Published) -> None:
    """But for Gemma 3 1B, whose tokenizer has a token of its larger siblings."""
    rows = {**model.config, **model.config.get("text_config", {})}["vocab_size"]
    assert (model.sentencepiece_tokens or model.tokens) <= rows


def test_no_name_is_taken_twice() -> None:
    names = [name for model in MODELS.values() for name in model.names]
    assert len(names) == len(set(names)) == len(published_models())
