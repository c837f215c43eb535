"""Finished students to export: tiny, random, with a tokenizer and a chat template."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from distill import plugins
from distill.models.checkpoints import Checkpoint
from distill.models.huggingface import HuggingFaceLanguageModel
from distill.models.saving import save_language_model
from distill.models.tokenizers import load_tokenizer, vocab_size
from distill.system.quiet import quiet_transformers

TEXT = "the state of the union and the people of the states, in the year of our Lord one thousand and one"
CHAT = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


@pytest.fixture(scope="session")
def tokenizer() -> Callable[[], Any]:
    """A byte-level tokenizer of about 280 tokens; each call makes another one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    def make() -> Any:
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        specials = ["<|end|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        core.train_from_iterator(
            [TEXT],
            trainers.BpeTrainer(
                vocab_size=280, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
            ),
        )
        return PreTrainedTokenizerFast(
            tokenizer_object=core,
            eos_token="<|im_end|>",
            pad_token="<|pad|>",
            additional_special_tokens=["<|im_start|>", "<|end|>"],
            chat_template=CHAT,
        )

    return make


@pytest.fixture(scope="session")
def hugging_face_student(tiny_model: Any, tokenizer: Any) -> Callable[..., Path]:
    """`hugging_face_student(folder, "llama")`: a finished student of a family; sizes as keywords."""

    def save(folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32, **sizes: Any) -> Path:
        made = tokenizer()
        with quiet_transformers():
            model = tiny_model(family, vocab_size=vocab_size(made) + 3, **sizes).to(dtype)
        return save_language_model(HuggingFaceLanguageModel(model), folder, "huggingface", {}, made)

    return save


@pytest.fixture(scope="session")
def custom_student(tokenizer: Any) -> Callable[..., Path]:
    """`custom_student(folder, class_path)`: a finished student of a plug-in; options as keywords."""

    def save(folder: Path, class_path: str, **options: Any) -> Path:
        made = tokenizer()
        options = {"vocab_size": vocab_size(made), **options}
        torch.manual_seed(0)
        model = plugins.build(class_path, "student", options, {})
        with torch.no_grad():  # away from small initial weights, behind which mistakes hide
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        return save_language_model(model, folder, class_path, options, made)

    return save


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of a Hugging Face folder without the process of its own, which takes seconds to start."""
    from safetensors.torch import load

    from distill.export import alone, hf

    monkeypatch.setattr(hf, "_ask", lambda request: load(alone.look(request)))


SMALL = {"hidden_size": 32, "layers": 2, "heads": 4}


@pytest.fixture
def compact(custom_student: Any, tmp_path: Path) -> Path:
    """The worked example as a finished student, its head tied."""
    return custom_student(tmp_path / "compact", "compact", **SMALL)


@pytest.fixture(scope="session")
def tokens_of() -> Callable[[Path], list[int]]:
    """`tokens_of(folder)`: a text's token ids."""

    def encode(folder: Path) -> list[int]:
        return list(load_tokenizer(Checkpoint(folder, None, "")).encode(TEXT))[:24]

    return encode


@pytest.fixture(scope="session")
def greedy() -> Callable[..., list[int]]:
    """`greedy(model, ids, count)`: the likeliest continuation by body and head, one token after another."""

    @torch.no_grad()
    def continue_(model: Any, ids: list[int], count: int) -> list[int]:
        ids = list(ids)
        for _ in range(count):
            ids_BL = torch.tensor([ids])
            ids.append(int(model.head(model.body(ids_BL, torch.arange(len(ids))[None]))[0, -1].argmax()))
        return ids

    return continue_


@pytest.fixture(scope="session")
def read() -> Callable[[Path], dict[str, Any]]:
    """`read(path)`: a JSON file."""
    return lambda path: json.loads(path.read_text(encoding="utf-8"))
