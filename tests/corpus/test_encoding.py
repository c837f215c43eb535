"""Tokens are the tokenizer's own; the mask says which next tokens are learned; nothing is stale, truncated or noisy."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from transformers import SentencePieceBackend

from distill.corpus import open_corpus
from distill.corpus.documents import load_documents
from distill.corpus.encoding import encode
from distill.corpus.reading import find_sources
from distill.errors import UserError

Write = Callable[..., str]
TEXTS = ["The fox.", "", "naïve café " * 40, "  dog\n\n"]
CHAT = [
    {"role": "user", "content": "Who jumps?"},
    {"role": "assistant", "content": "The fox."},
    {"role": "user", "content": "Over whom?"},
    {"role": "assistant", "content": "The lazy dog."},
]
SPACED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %} {{ m['content'] }}<|im_end|>"
    "{% endgeneration %}{% else %}{{ m['role'] }}:{{ m['content'] }}{% endif %}{% endfor %}"
)


def encoded_rows(path: str, tokenizer: Any) -> list[dict[str, Any]]:
    documents = load_documents(find_sources(path, None, "train"))
    return list(encode(documents, tokenizer, [path]))


def learned(row: dict[str, Any], tokenizer: Any) -> str:
    return tokenizer.decode([row["input_ids"][i + 1] for i, learn in enumerate(row["loss_mask"]) if learn])


def test_text_is_whole_and_ends_in_one_end_of_text(tokenizer: Any, write: Write) -> None:
    rows = encoded_rows(write("a.jsonl", [{"text": text} for text in TEXTS]), tokenizer)
    for text, row in zip(TEXTS, rows, strict=True):
        assert tokenizer.decode(row["input_ids"]) == (text + "<|end|>" if text else "")
        assert row["loss_mask"] == ([True] * (len(row["input_ids"]) - 1) + [False] if text else [])
        assert row["learned"] == sum(row["loss_mask"])


def test_special_tokens_of_the_tokenizer(make: Callable[..., Any], write: Write) -> None:
    path = write("a.jsonl", [{"text": "The fox."}, {"text": "dog<|end|>"}])
    begin, plain = make(bos=True, bos_token="<|begin|>"), make(eos_token=None)
    assert [begin.decode(r["input_ids"]) for r in encoded_rows(path, begin)] == [
        "<|begin|>The fox.<|end|>",
        "<|begin|>dog<|end|>",
    ]
    assert [plain.decode(r["input_ids"]) for r in encoded_rows(path, plain)] == ["The fox.", "dog<|end|>"]


def test_conversations_learn_answers_only(make: Callable[..., Any], write: Write) -> None:
    tokenizer = make(bos=True, bos_token="<|begin|>")
    (row,) = encoded_rows(write("a.jsonl", [{"messages": CHAT}]), tokenizer)
    assert tokenizer.decode(row["input_ids"]) == tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert learned(row, tokenizer) == "The fox.<|im_end|>The lazy dog.<|im_end|>"


def test_an_answer_that_begins_with_a_trimmed_blank_is_learned(make: Callable[..., Any], write: Write) -> None:
    """transformers' mask loses every answer here: no token claims the blank at the span's start."""
    tokenizer = make(SPACED)
    (row,) = encoded_rows(write("a.jsonl", [{"messages": CHAT}]), tokenizer)
    assert learned(row, tokenizer) == " The fox.<|im_end|> The lazy dog.<|im_end|>"
    theirs = tokenizer.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    assert theirs["input_ids"] == row["input_ids"]


def test_another_tokenizer_or_template_is_never_served_old_tokens(make: Callable[..., Any], write: Write) -> None:
    path = write("a.jsonl", [{"messages": CHAT}])
    first, template, special = make(), make(SPACED), make(eos_token="<|im_end|>")
    assert encoded_rows(path, first) != encoded_rows(path, template)
    same_size = make(SPACED.replace("}}:{{", "}};{{"))
    assert encoded_rows(path, same_size) != encoded_rows(path, template)
    text = write("b.jsonl", [{"text": "The fox."}])
    assert encoded_rows(text, first) != encoded_rows(text, special)


def test_second_opening_does_not_tokenise_again(
    make: Callable[..., Any], write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write("a.jsonl", [{"text": text} for text in TEXTS])
    first = encoded_rows(path, make())
    again = make()
    monkeypatch.setattr(type(again), "__call__", lambda *_, **__: pytest.fail("tokenised again"))
    assert encoded_rows(path, again) == first


def test_a_truncating_tokenizer_does_not_truncate(make: Callable[..., Any], write: Write) -> None:
    tokenizer = make(pad_token="<|pad|>")
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=8)
    tokenizer.model_max_length = 4
    rows = encoded_rows(write("a.jsonl", [{"text": text} for text in TEXTS]), tokenizer)
    assert [tokenizer.decode(row["input_ids"]) for row in rows] == [t + "<|end|>" if t else "" for t in TEXTS]


def test_quiet(
    make: Callable[..., Any], write: Write, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """No warning that a document is longer than the model's context, and no progress bar."""
    tokenizer = make()
    tokenizer.model_max_length = 4
    logging.getLogger("transformers").propagate = True
    open_corpus(write("a.jsonl", [{"text": t} for t in TEXTS]), tokenizer, sequence_length=8, held_out=0)
    assert (caplog.text, capfd.readouterr()) == ("", ("", ""))


@pytest.fixture(scope="module")
def sentencepiece_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> SentencePieceBackend:
    folder = tmp_path_factory.mktemp("spm")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the quick brown fox jumps over the lazy dog", "who jumps over whom"] * 20),
        model_prefix=str(folder / "tokenizer"), vocab_size=60, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return SentencePieceBackend(
        vocab_file=str(folder / "tokenizer.model"), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def test_sentencepiece_without_offsets_reads_plain_text(
    sentencepiece_tokenizer: SentencePieceBackend, write: Write, tmp_path: Path
) -> None:
    texts = ["the quick fox", "", "who jumps over the dog"]
    rows = encoded_rows(write("a.jsonl", [{"text": text} for text in texts]), sentencepiece_tokenizer)
    eos = sentencepiece_tokenizer.eos_token_id
    for text, row in zip(texts, rows, strict=True):
        assert row["input_ids"][-1:] == ([eos] if text else [])
        assert sentencepiece_tokenizer.decode(row["input_ids"], skip_special_tokens=True) == text


def test_sentencepiece_without_offsets_refuses_conversations(
    sentencepiece_tokenizer: SentencePieceBackend, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sentencepiece_tokenizer, "chat_template", SPACED)
    with pytest.raises(UserError, match="which characters a token"):
        encoded_rows(write("a.jsonl", [{"messages": CHAT}]), sentencepiece_tokenizer)
