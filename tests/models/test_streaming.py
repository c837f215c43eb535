"""A model's weights, read from a checkpoint a few at a time, are the model's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from distill.errors import UserError
from distill.models.checkpoints import resolve
from distill.models.streaming import Weights, without_weights
from distill.models.tensors import tensors

SIZES = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 11}


@pytest.fixture(params=[("llama", {}), ("mixtral", {"num_local_experts": 3})], ids=lambda param: param[0])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A tiny model and its checkpoint; a mixture's experts are stored one by one."""
    family, more = request.param
    config = AutoConfig.for_model(family, **SIZES, num_key_value_heads=2, **more)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return model, tensors(resolve(str(folder)))


class Changed:
    """A source with some tensors replaced, added, or (None) gone."""

    def __init__(self, source: Any, **changes: Tensor | None) -> None:
        self._source, self._changes = source, {name.replace("__", "."): value for name, value in changes.items()}

    def names(self) -> list[str]:
        names = {*self._source.names(), *self._changes}
        return sorted(name for name in names if self._changes.get(name, ...) is not None)

    def read(self, name: str) -> Tensor:
        changed = self._changes.get(name)
        return self._source.read(name) if changed is None else changed


def test_each_layer_comes_with_its_own_weights(saved: tuple[Any, Any]) -> None:
    model, source = saved
    expected = model.state_dict()
    empty = without_weights(model.config, torch.float32, trust_remote_code=False)
    assert all(parameter.is_meta for parameter in empty.parameters())
    weights = Weights(empty, source, "it")
    assert weights.missing == set() and weights.unknown == []
    for layer in range(3):
        names = [name for name in expected if name.startswith(f"model.layers.{layer}.")]
        read = dict(weights.read(names))
        assert read.keys() == set(names) and all(torch.equal(read[name], expected[name]) for name in names)


def test_a_checkpoint_that_is_another_models_is_found_out(saved: tuple[Any, Any]) -> None:
    model, source = saved
    empty = without_weights(model.config, torch.float32, trust_remote_code=False)
    weights = Weights(empty, Changed(source, model__norm__weight=None, model__extra=torch.ones(1)), "it")
    assert weights.missing == {"model.norm.weight"} and weights.unknown == ["model.extra"]
    with pytest.raises(UserError, match=r"it: the checkpoint lacks model\.norm\.weight"):
        list(weights.read(["model.norm.weight"]))
    weights = Weights(empty, Changed(source, model__norm__weight=torch.ones(7)), "it")
    with pytest.raises(UserError, match=r"has model\.norm\.weight as \[7\], where its configuration wants"):
        list(weights.read(["model.norm.weight"]))
