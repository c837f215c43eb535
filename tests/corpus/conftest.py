"""A small real tokenizer made offline, a private cache folder, and a writer of corpora."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LINES = [
    "The quick brown fox jumps over the lazy dog.",
    "Pack my box with five dozen liquor jugs!",
    "naïve café 12 345",
]


def make_tokenizer(chat_template: str | None = CHATML, bos: bool = False, **special: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer (offsets trimmed like GPT-2's), optionally with a beginning-of-text token."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    names = ["<|end|>", "<|begin|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=names, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(LINES, trainer)
    core.post_processor = processors.ByteLevel(trim_offsets=True)
    if bos:
        begin = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 1)])
        core.post_processor = processors.Sequence([core.post_processor, begin])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, chat_template=chat_template, **({"eos_token": "<|end|>"} | special)
    )


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees what another stored, nor the user's own cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """`write("a.jsonl", rows)` or `write("a.txt", "text")`: make a file under the test's folder, return its path."""

    def write_file(name: str, content: list[Any] | str | bytes) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        data = content.encode() if isinstance(content, str) else content
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return str(path)

    return write_file


@pytest.fixture
def make() -> Callable[..., PreTrainedTokenizerFast]:
    return make_tokenizer
