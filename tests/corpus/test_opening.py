"""From a path to two sets of samples: what goes in comes out, on one side, and says so when it cannot."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.corpus import Samples, SampleSets, open_corpus
from distill.errors import UserError

Write = Callable[..., str]
TEXTS = [f"document {i}: " + "the lazy dog " * (i % 7) for i in range(200)]
CHAT = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "The fox."}]


def chat(number: int) -> list[dict[str, str]]:
    """A conversation of its own with the answer of all."""
    return [{"role": "user", "content": f"Who? {number}"}, CHAT[1]]


def unpadded(samples: Samples, tokenizer: Any) -> list[str]:
    """The documents again, from the samples' tokens; the end-of-text token is also the padding here."""
    ids = [token for sample in map(samples.__getitem__, range(len(samples))) for token in sample["input_ids"].tolist()]
    return [text for text in tokenizer.decode(ids).split("<|end|>") if text]


@pytest.mark.parametrize("pack", [True, False])
def test_every_document_comes_back_whole_on_one_side(tokenizer: Any, write: Write, pack: bool) -> None:
    path = write("a.jsonl", [{"text": text} for text in TEXTS])
    sets = open_corpus(path, tokenizer, sequence_length=16, pack=pack, held_out=0.2)
    train, held = unpadded(sets.train, tokenizer), unpadded(sets.held_out, tokenizer)
    assert sorted(train + held) == sorted(TEXTS)
    assert held == [text for text in TEXTS if text in set(held)], "held-out documents keep the file's order"
    assert train != [text for text in TEXTS if text in set(train)], "training documents are shuffled"
    assert (sets.train.documents, sets.held_out.documents) == (len(train), len(held))


def test_sides_survive_another_order_file_and_seed(tokenizer: Any, write: Write) -> None:
    rows = [{"text": text} for text in TEXTS]
    first = open_corpus(write("a.jsonl", rows), tokenizer, sequence_length=16, held_out=0.2)
    second = open_corpus(write("b.jsonl.gz", rows[50:][::-1]), tokenizer, sequence_length=32, held_out=0.2, seed=3)
    held = set(unpadded(first.held_out, tokenizer))
    assert set(unpadded(second.held_out, tokenizer)) == held & set(TEXTS[50:])


def test_same_arguments_same_samples_and_the_seed_reorders(tokenizer: Any, write: Write) -> None:
    path = write("a.jsonl", [{"text": text} for text in TEXTS])
    first, again, other = (open_corpus(path, tokenizer, sequence_length=16, seed=seed) for seed in (0, 0, 1))
    tokens = [torch.cat([s.train[i]["input_ids"] for i in range(len(s.train))]) for s in (first, again, other)]
    assert torch.equal(tokens[0], tokens[1])
    assert not torch.equal(tokens[0], tokens[2])
    assert first.fingerprint == other.fingerprint


def test_an_edited_corpus_is_never_stale(tokenizer: Any, write: Write) -> None:
    path = write("a.jsonl", [{"text": "the old fox"}])
    old = open_corpus(path, tokenizer, sequence_length=16, held_out=0)
    write("a.jsonl", [{"text": "the new fox"}])
    new = open_corpus(path, tokenizer, sequence_length=16, held_out=0)
    assert unpadded(new.train, tokenizer) == ["the new fox"]
    assert old.fingerprint != new.fingerprint


def test_fingerprint_does_not_depend_on_the_tokenizer(make: Callable[..., Any], write: Write) -> None:
    path = write("a.jsonl", [{"text": text} for text in TEXTS])
    one, other = (open_corpus(path, make(**kw), sequence_length=16) for kw in ({}, {"eos_token": "<|im_end|>"}))
    assert one.fingerprint == other.fingerprint
    assert not torch.equal(one.train[0]["input_ids"], other.train[0]["input_ids"])


def test_what_is_left_out_is_counted(tokenizer: Any, write: Write) -> None:
    rows = [
        {"messages": chat(0)},
        {"messages": []},
        {"messages": CHAT[:1]},
        {"messages": chat(1)},
        {"messages": chat(0)},
    ]
    sets = open_corpus(write("a.jsonl", rows), tokenizer, sequence_length=64, held_out=0)
    (counts,) = sets.counts
    assert (sets.train.documents, counts.rows, counts.documents, counts.name) == (2, 5, 2, "a.jsonl")
    assert counts.left_out == {"empty": 1, "no token to learn": 1, "exact duplicate": 1}
    assert counts.tokens == sets.train.tokens == 60 and counts.lengths == {16: 2}


def test_loss_of_a_packed_conversation(tokenizer: Any, write: Write) -> None:
    sets = open_corpus(
        write("a.jsonl", [{"messages": chat(i)} for i in range(3)]), tokenizer, sequence_length=512, held_out=0
    )
    (sample,) = [sets.train[i] for i in range(len(sets.train))]
    learned = sample["input_ids"][1:][sample["loss_mask"][:-1]]
    assert tokenizer.decode(learned) == "The fox.<|im_end|>" * 3
    assert int((sample["position_ids"] == 0).sum()) == 4, "three documents and the padding"


@pytest.mark.parametrize(("special", "pad"), [({"pad_token": "<|pad|>"}, 4), ({}, 0), ({"eos_token": None}, 0)])
def test_padding_token(make: Callable[..., Any], write: Write, special: dict[str, Any], pad: int) -> None:
    sets = open_corpus(write("a.txt", "fox"), make(**special), sequence_length=32, held_out=0)
    assert sets.train[0]["input_ids"][-1] == pad
    assert not sets.train[0]["loss_mask"][-20:].any()


WRONG: list[tuple[dict[str, Any], list[Any], str]] = [
    ({"held_out": 0.6}, [{"text": "a"}], r"corpus\.held_out: 0\.6 is not a share from 0 to 0\.5"),
    ({"held_out": -0.1}, [{"text": "a"}], r"corpus\.held_out"),
    ({"sequence_length": 1}, [{"text": "a"}], r"corpus\.sequence_length: 1 is too short"),
    ({"seed": -1}, [{"text": "a"}], r"corpus\.seed"),
    ({}, [], r"a\.jsonl: no document in it"),
    ({}, [{"text": " "}], r"no document with any text in it \(1 empty"),
    ({"held_out": 0.05}, [{"text": "one"}], r"none of the 1 documents falls into the held-out share of 0\.05: raise"),
    ({}, [{"messages": CHAT[:1]}], r"nothing to learn: none of the 1 documents has an answer of the assistant"),
]


@pytest.mark.parametrize(("options", "rows", "message"), WRONG)
def test_mistakes(tokenizer: Any, write: Write, options: dict[str, Any], rows: list[Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_corpus(write("a.jsonl", rows), tokenizer, **({"sequence_length": 8, "held_out": 0} | options))


def test_a_row_that_the_template_refuses_is_named(make: Callable[..., Any], write: Write) -> None:
    path = write("a.jsonl", [{"messages": []}, {"messages": CHAT}, {"messages": CHAT[1:]}])
    with pytest.raises(UserError, match=r"a\.jsonl: row 3: the conversation begins with the assistant"):
        open_corpus(path, make(), sequence_length=8, held_out=0)


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Graz"}}}
BAD_ROWS: list[tuple[Any, str]] = [
    ({"messages": [{"role": "narrator", "content": "x"}, CHAT[1]]}, "unknown role 'narrator'"),
    ({"messages": [*CHAT, {"role": "hooman", "content": "x"}]}, "unknown role"),
    ({"messages": CHAT[1:]}, "begins with the assistant"),
    ("no object", "a str, not an object"),
    ({"messages": [CHAT[0], {"role": "assistant", "content": None, "tool_calls": [CALL]}]}, "write its tool call"),
    ({"messages": [CHAT[0], {**CHAT[1], "reasoning_content": "Hm."}]}, "does not write its thought"),
    ({"messages": CHAT, "tools": [{"name": "weather"}]}, "does not write the row's tools"),
    ({"text": "plain"}, "is plain text"),
]


def mixed(write: Write, bad: list[Any]) -> str:
    """A file with a good row before, between and behind bad ones, and a line that was cut off."""
    rows = [{"messages": chat(0)}]
    for number, row in enumerate(bad, start=1):
        rows += [row, {"messages": chat(number)}]
    path = Path(write("a.jsonl", rows))
    path.write_text(path.read_text() + '{"messages": [{"role"')
    return str(path)


def test_bad_rows_are_refused_all_together(tokenizer: Any, write: Write) -> None:
    path = mixed(write, [row for row, _ in BAD_ROWS])
    with pytest.raises(UserError) as refused:
        open_corpus(path, tokenizer, sequence_length=64, held_out=0)
    message = str(refused.value)
    assert message.startswith("9 of 18 rows cannot be learned: ") and message.count("\n") == 0
    assert "a.jsonl: rows 2, 4 (2): message 1: unknown role 'narrator'" in message, "the same fault is told once"
    for word in (*(reason for _, reason in BAD_ROWS), "row 18 (1): not JSON", "corpus.bad_rows skip"):
        assert word in message, (word, message)


def test_bad_rows_are_skipped_and_counted(tokenizer: Any, write: Write) -> None:
    path = mixed(write, [row for row, _ in BAD_ROWS])
    sets = open_corpus(path, tokenizer, sequence_length=64, bad_rows="skip", held_out=0)
    good = open_corpus(
        write("b.jsonl", [{"messages": chat(number)} for number in range(9)]), tokenizer, sequence_length=64, held_out=0
    )
    assert sets.fingerprint == good.fingerprint, "it is that of the rows that are learned"
    assert torch.equal(sets.train[0]["input_ids"], good.train[0]["input_ids"])
    (counts,) = sets.counts
    assert sum(counts.left_out.values()) == 9 and counts.rows == 18
    assert counts.left_out["message N: unknown role '…'"] == 2
    with pytest.raises(UserError, match=r"2 of 2 rows .*rows 1, 2 \(2\): a int, not an object.*no row is left$"):
        open_corpus(write("c.jsonl", [3, 4]), tokenizer, sequence_length=64, bad_rows="skip", held_out=0)


def test_a_template_without_end_is_no_fault_of_a_row(make: Callable[..., Any], write: Write) -> None:
    """Each row would take as long again."""
    path = write("a.jsonl", [{"messages": chat(number)} for number in range(3)])
    with pytest.raises(UserError, match="row 1: the chat template cannot be rendered: it makes a text of more than"):
        open_corpus(path, make("{{ 'x' * 70000000 }}"), sequence_length=8, bad_rows="skip", held_out=0)


def test_a_cache_that_was_begun_with_duplicates_goes_on_with_them(tokenizer: Any, write: Write) -> None:
    texts = [f"text {number}" for number in range(8)]
    twice = write("a.jsonl", [{"text": text} for text in [*texts, *texts[:3]]])
    once = open_corpus(write("b.jsonl", [{"text": text} for text in texts]), tokenizer, sequence_length=16, held_out=0)
    dropped = open_corpus(twice, tokenizer, sequence_length=16, held_out=0)
    assert dropped.fingerprint == once.fingerprint and unpadded(dropped.train, tokenizer) == unpadded(
        once.train, tokenizer
    )
    digests = [hashlib.sha256(text.encode()).digest() for text in [*texts, *texts[:3]]]
    earlier = hashlib.sha256(b"text" + b"".join(digests)).hexdigest()
    kept = open_corpus(twice, tokenizer, sequence_length=16, held_out=0, begun_with=earlier)
    assert kept.fingerprint == earlier and kept.train.documents == 11
    assert open_corpus(twice, tokenizer, sequence_length=16, held_out=0, begun_with="other").train.documents == 8


def test_the_demo_corpus(tokenizer: Any) -> None:
    path = Path(__file__).parents[2] / "data" / "sotu.jsonl"
    sets: SampleSets = open_corpus(str(path), tokenizer, sequence_length=512, held_out=0.1)
    assert (sets.train.documents, sets.held_out.documents) == (26, 3)
    assert unpadded(sets.held_out, tokenizer)[0].startswith("Thank you very much. Mr. Speaker, Vice President Cheney")
