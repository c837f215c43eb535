"""A tokenizer, and a folder that holds it and a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import TokenizersBackend


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
def llama_folder(tiny_model: Any, tmp_path: Path) -> Path:
    folder = tmp_path / "models" / "tiny-llama"
    tiny_model("llama").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder
