"""Tiny random models of the supported families, a tokenizer, and folders that hold them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, TokenizersBackend

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": None,
}
EXTRA: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 2.0},  # low, so that the cap shows
    "gemma3_text": {"head_dim": 8, "final_logit_softcapping": 2.0},
    "qwen3": {"head_dim": 8},
    "granite": {"logits_scaling": 3.0},
    "cohere": {"logit_scale": 0.25},
    "mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 8, "expand": 2, "n_groups": 2, "chunk_size": 4},
}


def tiny_model(family: str, **sizes: Any) -> Any:
    config = AutoConfig.for_model(family, **{**SIZES, **EXTRA.get(family, {}), **sizes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():  # away from the initial weights, where biases are 0 and logits too small to show a mistake
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


@pytest.fixture(name="tiny_model", scope="session")
def _tiny_model() -> Callable[..., Any]:
    return tiny_model


def make_tokenizer() -> Any:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(["the cat sat on the mat and the rain fell"] * 3, trainer)
    return TokenizersBackend(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@pytest.fixture
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture
def llama_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "models" / "tiny-llama"
    tiny_model("llama").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder
