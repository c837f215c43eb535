"""Conversations reach samples whole; long ones are split at turns, behind their first question."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch

from distill.corpus import Samples, SampleSets, open_corpus
from distill.corpus.packing import Packing

Write = Callable[..., str]


def chat(number: int, turns: int = 1, system: bool = False) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": f"You are fox {number}."}] if system else []
    for turn in range(turns):
        messages += [
            {"role": "user", "content": f"Question {number}.{turn}?"},
            {"role": "assistant", "content": f"Answer {number}.{turn}, " + "the lazy dog " * (number % 5)},
        ]
    return messages


def pieces(samples: Samples) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids and loss mask of each stretch of positions that count up from 0, without padding."""
    found = []
    for index in range(len(samples)):
        sample = samples[index]
        starts = [*(sample["position_ids"] == 0).nonzero().flatten().tolist(), len(sample["input_ids"])]
        for begin, end in pairwise(starts):
            if sample["document_hash"][begin]:
                found.append((sample["input_ids"][begin:end], sample["loss_mask"][begin:end]))
    return found


def texts(sets: SampleSets, tokenizer: Any) -> list[str]:
    return [tokenizer.decode(ids) for ids, _ in pieces(sets.train)]


def learned(sets: SampleSets, tokenizer: Any) -> list[str]:
    return [tokenizer.decode(ids[1:][mask[:-1]]) for ids, mask in pieces(sets.train)]


def test_a_conversation_that_fits_is_never_cut(tokenizer: Any, write: Write) -> None:
    chats = [chat(number, 1 + number % 2, system=number % 3 == 0) for number in range(40)]
    path = write("a.jsonl", [{"messages": messages} for messages in chats])
    sets = open_corpus(path, tokenizer, sequence_length=200, held_out=0)
    whole = sorted(tokenizer.apply_chat_template(messages, tokenize=False) for messages in chats)
    assert sorted(texts(sets, tokenizer)) == whole and sets.packing == Packing("documents", "split")
    assert len(sets.train) < 40 and not sets.long_documents
    cut = open_corpus(path, tokenizer, sequence_length=200, pack="stream", held_out=0)
    assert sorted(texts(cut, tokenizer)) != whole


def test_a_long_conversation_is_split_at_its_turns(tokenizer: Any, write: Write) -> None:
    messages = chat(1, turns=12, system=True)
    path = write("a.jsonl", [{"messages": messages}, {"messages": chat(2)}])
    sets = open_corpus(path, tokenizer, sequence_length=200, pack="none", held_out=0)
    long = [text for text in texts(sets, tokenizer) if "fox 1" in text]
    first = tokenizer.apply_chat_template(messages[:2], tokenize=False)
    assert len(long) > 2 and all(text.startswith(first) for text in long)
    assert "".join([long[0], *(text[len(first) :] for text in long[1:])]) == tokenizer.apply_chat_template(
        messages, tokenize=False
    )
    assert all(text.endswith("<|im_end|>\n") and text.count("answer") == text.count("question") for text in long)
    answers = "".join(learned(sets, tokenizer))
    assert sum(answers.count(m["content"] + "<|im_end|>") for m in messages if m["role"] == "assistant") == 12
    assert answers.count("<|im_end|>") == 13 and "Question" not in answers
    assert sets.long_documents == "1 documents split"
    skipped = open_corpus(path, tokenizer, sequence_length=200, long="skip", held_out=0)
    assert texts(skipped, tokenizer) == [tokenizer.apply_chat_template(chat(2), tokenize=False)]
    assert skipped.long_documents == "1 documents left out"
    assert skipped.counts[0].left_out == {"longer than a sample": 1} and skipped.counts[0].documents == 1


def test_what_begins_inside_a_document_begins_as_the_tokenizer_begins_texts(
    make: Callable[..., Any], write: Write
) -> None:
    path = write("a.jsonl", [{"text": f"{number} the lazy dog " * (3 + number)} for number in range(9)])
    named = make(bos_token="<|begin|>")
    assert named.bos_token_id not in torch.cat([ids for ids, _ in pieces(opened(path, named, "stream").train)])
    begins = make(bos=True, bos_token="<|begin|>")
    whole = "".join(f"{number} the lazy dog " * (3 + number) + "<|end|>" for number in range(9))
    for pack in ("stream", "documents", "none"):
        sets = opened(path, begins, pack)
        found = pieces(sets.train)
        assert all(ids[0] == begins.bos_token_id and begins.bos_token_id not in ids[1:] for ids, _ in found)
        assert sum(len(ids) for ids, _ in found) > sets.train.tokens, "some begin inside a document"
        assert sum(int(mask.sum()) for _, mask in found) == sets.train.tokens - len(found)
        assert sorted("".join(begins.decode(ids[1:]) for ids, _ in found)) == sorted(whole)


def opened(path: str, tokenizer: Any, pack: str) -> SampleSets:
    return open_corpus(path, tokenizer, sequence_length=24, pack=pack, held_out=0)


def test_documents_of_plain_text_are_packed_whole(tokenizer: Any, write: Write) -> None:
    documents = [f"{number} the lazy dog " * (1 + number % 4) for number in range(30)]
    path = write("a.jsonl", [{"text": text} for text in documents])
    sets = open_corpus(path, tokenizer, sequence_length=128, pack="documents", held_out=0)
    assert sorted(texts(sets, tokenizer)) == sorted(text + "<|end|>" for text in documents)
    hashes = {int(value) for index in range(len(sets.train)) for value in sets.train[index]["document_hash"]} - {0}
    assert len(hashes) == 30
