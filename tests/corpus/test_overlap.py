"""A text that stands in the corpus is found, whatever its case and punctuation; one that only resembles it is not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from distill.corpus import open_corpus, overlap
from distill.corpus.overlap import LEAST_WORDS, WORDS, Overlaps

GENERATOR = np.random.default_rng(0)
VOCABULARY = [f"w{number}" for number in range(500)]


def text(words: int) -> list[str]:
    return GENERATOR.choice(VOCABULARY, words).tolist()


def naive(item: list[list[str]], corpus: list[list[str]]) -> bool:
    """The definition: a run of words that some text of the corpus has too."""
    for words in item:
        size = min(len(words), WORDS)
        runs = [words[start : start + size] for start in range(len(words) - size + 1)]
        for run in runs if size >= LEAST_WORDS else []:
            if any(run == each[at : at + size] for each in corpus for at in range(len(each) - size + 1)):
                return True
    return False


def test_equals_the_naive_program() -> None:
    corpus = [text(length) for length in GENERATOR.integers(0, 120, 40)]
    items = []
    for number in range(120):
        source = corpus[number % 40]
        length = int(GENERATOR.integers(5, 30))
        start = int(GENERATOR.integers(0, max(len(source) - length, 1)))
        taken = source[start : start + length]
        if number % 3 == 0 and len(taken) > 4:
            taken = [*taken]
            taken[len(taken) // 2] = "other"
        items.append([taken if number % 5 else text(length), text(4)])
    expected = [naive(item, corpus) for item in items]
    assert 20 < sum(expected) < 100
    looked = Overlaps([[" ".join(each) for each in item] for item in items]).look(" ".join(each) for each in corpus)
    assert looked.tolist() == expected


SENTENCE = "The quick brown fox jumps over the lazy dog near the quiet river bank"


@pytest.mark.parametrize(
    ("sought", "found"),
    [
        (SENTENCE.upper().replace(" ", ", "), True),
        (" ".join(SENTENCE.split()[:8]), True),
        (" ".join(SENTENCE.split()[:7]), False),
        ("A " + SENTENCE, True),
        (SENTENCE.replace("lazy", "sleepy"), False),
        ("", False),
    ],
)
def test_case_punctuation_and_length(sought: str, found: bool) -> None:
    assert Overlaps([["none of these words is there at all, not one"], [sought]]).look(
        [f"x. {SENTENCE}\ny"]
    ).tolist() == [
        False,
        found,
    ]


def test_words_are_forgotten_and_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory does not grow with the corpus."""
    monkeypatch.setattr(overlap, "_KNOWN_WORDS", 50)
    corpus = [" ".join(text(40)) for _ in range(50)]
    sought = Overlaps([[corpus[40]], [" ".join(text(40))]])
    assert sought.look(corpus).tolist() == [True, False]
    assert len(sought._words._known) < 150


def test_nothing_to_look_for() -> None:
    assert Overlaps([]).look(["text"]).tolist() == []
    assert Overlaps([["short"]]).look(["short"]).tolist() == [False]


@pytest.mark.parametrize("is_streamed", [False, True])
def test_the_texts_of_a_corpus_are_those_that_are_learned(tokenizer: Any, write: Any, is_streamed: bool) -> None:
    """None of a held-out document, and of conversations what is said."""
    rows = [{"prompt": f"Who {number}?", "completion": f"The fox {number}."} for number in range(40)]
    path = write("a.jsonl", rows)
    sets = open_corpus(path, tokenizer, sequence_length=64, held_out=0.3, is_streamed=is_streamed)
    texts = set(sets.texts())
    assert len(texts) == 2 * sets.train.documents < 80
    assert {f"The fox {number}." for number in range(40) if f"Who {number}?" in texts} <= texts
