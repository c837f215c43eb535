"""A long text has the tokens that the tokenizer gives it whole, though it is read in pieces."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import sentencepiece
import torch

from distill.corpus import encoding, long_texts, open_corpus
from distill.corpus.long_texts import long_ids
from distill.models.tokenizers import from_sentencepiece

WORDS = [
    "the ",
    "lazy",
    "dog\n",
    "  ",
    "naïve",
    " café",
    "1234",
    "日本語",
    "😀",
    "don't ",
    "jumps over",
    "\r\n\n",
    "x" * 50,
]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_texts, "PIECE", 1000)
    monkeypatch.setattr(long_texts, "OVERLAP", 400)
    monkeypatch.setattr(long_texts, "AGREEING", 16)


def texts() -> list[str]:
    choose = random.Random(0)
    return ["".join(choose.choices(WORDS, k=3000)) for _ in range(4)] + ["the fox", "a" * 999, "dog " * 2000]


def test_pieces_give_the_tokens_of_the_whole(make: Callable[..., Any]) -> None:
    for tokenizer in (make(), make(bos=True, bos_token="<|begin|>")):
        for text in texts():
            whole = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert long_ids(tokenizer, text) == whole


def test_a_long_document_is_the_same_one(
    make: Callable[..., Any], write: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"text": text} for text in (*texts()[:2], "the fox")]
    tokens = []
    for piece in (10**9, 1000):
        monkeypatch.setattr(encoding, "PIECE", piece)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", Path(write(f"{piece}.txt", "")).parent / str(piece))
        tokenizer = make(bos=True, bos_token="<|begin|>")
        sets = open_corpus(write("a.jsonl", rows), tokenizer, sequence_length=64, held_out=0)
        tokens.append(torch.stack([sets.train[number]["input_ids"] for number in range(len(sets.train))]))
    assert torch.equal(*tokens)


def test_also_of_sentencepiece_models(tmp_path: Any) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the lazy dog jumps over the naïve café 1234"] * 40),
        model_prefix=str(tmp_path / "own"), vocab_size=330, hard_vocab_limit=False, byte_fallback=True, minloglevel=2,
    )  # fmt: skip
    tokenizer = from_sentencepiece(tmp_path / "own.model")
    for text in texts():
        found = long_ids(tokenizer, text)
        assert found is None or found == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_pieces_that_do_not_agree_are_no_text(make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_texts, "AGREEING", 10_000)
    assert long_ids(make(), texts()[0]) is None
