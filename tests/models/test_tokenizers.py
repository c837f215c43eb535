"""Tokenizers from folders and SentencePiece models, and their fingerprints."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from distill.errors import UserError
from distill.models.checkpoints import Checkpoint, resolve
from distill.models.tokenizers import PROBES, begin_token_id, load_tokenizer, tokenizer_fingerprint, vocab_size

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "while",
    "rain",
    "fell",
    "over",
    "old",
    "stone",
    "bridges",
    "and",
    "children",
    "ran",
    "home",
    "laughing",
    "café",
    "123",
]


def sentencepiece_model(folder: Path, **options: Any) -> Path:
    text = folder / "text.txt"
    choose = random.Random(0)
    text.write_text("\n".join(" ".join(choose.choices(WORDS, k=12)) for _ in range(200)), encoding="utf-8")
    settings = {"vocab_size": 340, "byte_fallback": True, "hard_vocab_limit": False, "minloglevel": 2, **options}
    sentencepiece.SentencePieceTrainer.train(input=str(text), model_prefix=str(folder / "own"), **settings)
    return folder / "own.model"


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"remove_extra_whitespaces": False, "normalization_rule_name": "identity"},
        {"add_dummy_prefix": False, "remove_extra_whitespaces": False, "user_defined_symbols": ["<tool>"]},
        {"byte_fallback": False, "control_symbols": ["<|user|>"], "pad_id": 3},
    ],
)
def test_a_sentencepiece_model_encodes_as_sentencepiece_does(
    model_type: str, options: dict[str, Any], tmp_path: Path, llama_folder: Path
) -> None:
    path = sentencepiece_model(tmp_path, model_type=model_type, **options)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    tokenizer = load_tokenizer(resolve(str(llama_folder)), str(path))
    choose = random.Random(1)
    texts = [*PROBES, "the <tool> cat", *(" ".join(choose.choices(WORDS, k=9)) for _ in range(20))]
    for text in texts:
        ids = processor.encode(text)
        assert tokenizer.encode(text, add_special_tokens=False) == ids
        if processor.unk_id() not in ids:  # SentencePiece prints its own sign for an unknown piece
            assert tokenizer.decode(ids) == processor.decode(ids)
    assert tokenizer.is_fast
    assert vocab_size(tokenizer) == processor.vocab_size()
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (processor.bos_id(), processor.eos_id())
    tokenizer.save_pretrained(tmp_path / "saved")
    again = load_tokenizer(resolve(str(llama_folder)), str(tmp_path / "saved"))
    assert all(again.encode(text) == tokenizer.encode(text) for text in texts)


@pytest.mark.parametrize(
    ("settings", "begins"), [({"add_bos_token": True}, True), ({"add_bos_token": False}, False), (None, True)]
)
def test_a_sentencepiece_model_begins_texts_as_the_models_own_configuration_says(
    settings: dict[str, Any] | None, begins: bool, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "bos_token_id": 1}))
    if settings is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "elsewhere").mkdir()
    model = sentencepiece_model(tmp_path / "elsewhere")
    tokenizer = load_tokenizer(Checkpoint(tmp_path, None, "own"), str(model))
    assert begin_token_id(tokenizer) == (tokenizer.bos_token_id if begins else None)
    plain = tokenizer.encode("the cat", add_special_tokens=False)
    assert tokenizer.encode("the cat") == ([1] if begins else []) + plain


def test_a_sentencepiece_model_begins_texts_as_the_checkpoints_own_tokenizer(
    tmp_path: Path, llama_folder: Path
) -> None:
    own = load_tokenizer(resolve(str(llama_folder)))
    tokenizer = load_tokenizer(resolve(str(llama_folder)), str(sentencepiece_model(tmp_path)))
    assert (begin_token_id(tokenizer) is None) == (begin_token_id(own) is None)


def test_a_sentencepiece_model_that_cannot_be_imitated_is_refused(tmp_path: Path, llama_folder: Path) -> None:
    path = sentencepiece_model(tmp_path, user_defined_symbols=["<tool>"])  # blanks around it are not the fast way's
    with pytest.raises(UserError, match="the <tool> cat"):
        load_tokenizer(resolve(str(llama_folder)), str(path))
    with pytest.raises(UserError, match="type word or char"):
        load_tokenizer(resolve(str(llama_folder)), str(sentencepiece_model(tmp_path, model_type="char")))


def test_wrong_tokenizers_are_refused(tmp_path: Path, llama_folder: Path) -> None:
    checkpoint = resolve(str(llama_folder))
    (tmp_path / "broken.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match="not a readable SentencePiece model"):
        load_tokenizer(checkpoint, str(tmp_path / "broken.model"))
    with pytest.raises(UserError, match=r"did you mean '.*broken\.model'"):
        load_tokenizer(checkpoint, str(tmp_path / "brokn.model"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no tokenizer in"):
        load_tokenizer(checkpoint, str(tmp_path / "empty"))


def test_vocab_size_counts_added_tokens(tokenizer: Any) -> None:
    before = vocab_size(tokenizer)
    assert before == len(tokenizer)
    tokenizer.add_tokens(["<extra>"])
    assert vocab_size(tokenizer) == before + 1


def test_fingerprint_follows_content(llama_folder: Path) -> None:
    tokenizer = load_tokenizer(resolve(str(llama_folder)))
    first = tokenizer_fingerprint(tokenizer)
    tokenizer(["a", "a longer text"], padding=False, truncation=True, max_length=1)  # leaves state behind
    assert tokenizer_fingerprint(tokenizer) == first
    tokenizer.chat_template = "{{ messages }}"
    changed = tokenizer_fingerprint(tokenizer)
    assert changed["tokenizer"] == first["tokenizer"] and changed["chat_template"] != first["chat_template"]
    tokenizer.add_tokens(["<extra>"])
    assert tokenizer_fingerprint(tokenizer)["tokenizer"] != first["tokenizer"]


def test_fingerprint_is_the_same_in_another_process_and_place(llama_folder: Path) -> None:
    here = tokenizer_fingerprint(load_tokenizer(resolve(str(llama_folder))))
    elsewhere = llama_folder.rename(llama_folder.with_name("moved"))
    code = (
        "from distill.models.checkpoints import Checkpoint, resolve\n"
        "from distill.models.tokenizers import load_tokenizer, tokenizer_fingerprint\n"
        f"print(tokenizer_fingerprint(load_tokenizer(resolve({str(elsewhere)!r}))))"
    )
    root = Path(__file__).parents[2]
    found = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == str(here)


def test_a_gguf_file_has_the_tokens_of_its_own_list(tokenizer: Any, tmp_path: Path) -> None:
    """transformers adds GPT-2's `<|endoftext|>` to byte-level files that lack it, a token without a row in the head."""
    gguf = pytest.importorskip("gguf")
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    writer = gguf.GGUFWriter(tmp_path / "own.gguf", "llama")
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in ("<s>", "</s>") else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in content["model"]["merges"]])
    writer.add_bos_token_id(tokens.index("<s>"))
    writer.add_eos_token_id(tokens.index("</s>"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    found = load_tokenizer(resolve(str(tmp_path / "own.gguf")))
    assert vocab_size(found) == len(tokens) and "<|endoftext|>" not in found.get_vocab()
    assert found.bos_token == "<s>" and found.eos_token == "</s>"
    text = "the cat sat on the mat and the rain fell"
    assert found.encode(text, add_special_tokens=False) == tokenizer.encode(text, add_special_tokens=False)
