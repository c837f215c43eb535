"""Several sources are read as one corpus: of any kinds, in tokens by their weights, each counted and named apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill.corpus import open_corpus, reading, streams
from distill.corpus import sources as sources_module
from distill.corpus.shapes import Columns
from distill.corpus.sources import TextSource, labels_of
from distill.corpus.splitting import mix
from distill.errors import UserError

Write = Callable[..., str]


def chat(number: int) -> dict[str, Any]:
    return {"prompt": f"Who jumps {number}?", "completion": "The fox."}


@pytest.fixture
def both(write: Write) -> list[TextSource]:
    """Plain texts in a folder, and conversations in a file."""
    write("texts/a.jsonl", [{"body": f"The lazy dog {number}."} for number in range(30)])
    folder = Path(write("texts/b.jsonl", [{"body": f"The fox {number}."} for number in range(30)])).parent
    return [
        TextSource(str(folder), columns=Columns.of({"text": "body"})),
        TextSource(write("chats.jsonl", [chat(number) for number in range(40)])),
    ]


def test_texts_and_conversations_are_learned_each_in_their_own_way(tokenizer: Any, both: list[TextSource]) -> None:
    sets = open_corpus(both, tokenizer, sequence_length=64, held_out=0.2)
    texts, chats = sets.counts
    assert (texts.name, texts.rows, chats.name, chats.rows) == ("texts", 60, "chats.jsonl", 40)
    assert texts.share_learned > 0.8 > 0.6 > chats.share_learned and texts.held_out and chats.held_out
    assert sets.sources == ("texts/a.jsonl", "texts/b.jsonl", "chats.jsonl") and sets.owners == (0, 0, 1)
    seen = ""
    for index in range(len(sets.train)):
        sample = sets.train[index]
        learned = np.flatnonzero(sample["loss_mask"]) + 1
        of_chats = [place for place in learned.tolist() if sample["source"][place] == 2]
        seen += tokenizer.decode(sample["input_ids"][of_chats])
    assert set(seen.split("<|im_end|>")) == {"The fox.", ""}, "of conversations nothing but answers"
    alone = [open_corpus([source], tokenizer, sequence_length=64, held_out=0.2) for source in both]
    assert len({sets.fingerprint, *(each.fingerprint for each in alone)}) == 3
    assert sets.held_out.documents == sum(each.held_out.documents for each in alone), "each text stays on its side"


def test_a_document_of_two_sources_is_the_first_ones(tokenizer: Any, write: Write) -> None:
    one = write("a.jsonl", [{"text": "The fox."}, {"text": "A dog."}])
    other = write("b.jsonl", [{"text": "The fox."}, {"text": "Liquor jugs."}])
    sets = open_corpus([TextSource(one), TextSource(other)], tokenizer, sequence_length=16, held_out=0)
    assert [(each.documents, dict(each.left_out)) for each in sets.counts] == [(2, {}), (1, {"exact duplicate": 1})]


def test_a_limit_reads_so_many_rows(tokenizer: Any, both: list[TextSource]) -> None:
    limited = [TextSource(both[0].path, columns=both[0].columns, limit=40), TextSource(both[1].path, limit=3)]
    sets = open_corpus(limited, tokenizer, sequence_length=64, held_out=0)
    assert [each.rows for each in sets.counts] == [40, 3]


@pytest.mark.parametrize("weights", [(1.0, 1.0), (3.0, 1.0), (1.0, 9.0)])
def test_every_beginning_has_the_tokens_of_the_weights(weights: tuple[float, float]) -> None:
    """And the order ends where a source has no more."""
    generator = np.random.default_rng(5)
    owners = np.repeat([0, 1], [2_000, 1_000])
    tokens = generator.integers(1, 60, len(owners))
    rows = generator.permutation(len(owners))
    order = mix(rows, owners, tokens, weights)
    assert len(set(order.tolist())) == len(order)
    for owner in (0, 1):
        own = rows[owners[rows] == owner]
        assert np.array_equal(order[owners[order] == owner], own[: (owners[order] == owner).sum()]), "in their order"
    taken = [np.cumsum(np.where(owners[order] == owner, tokens[order], 0)) for owner in (0, 1)]
    gap = np.abs(taken[0] / weights[0] - taken[1] / weights[1])
    assert gap.max() <= 60 / min(weights), "never further apart than a document of the rarer source"
    totals = [tokens[owners == owner].sum() for owner in (0, 1)]
    assert any(whole - part[-1] == 0 for whole, part in zip(totals, taken, strict=True))


def test_weights_are_of_tokens_and_what_is_beyond_them_is_counted(tokenizer: Any, both: list[TextSource]) -> None:
    weighed = [TextSource(both[0].path, columns=both[0].columns, weight=1), TextSource(both[1].path, weight=1)]
    sets = open_corpus(weighed, tokenizer, sequence_length=64, held_out=0)
    texts, chats = sets.counts
    assert abs(texts.tokens - chats.tokens) < 40 and texts.documents == 60
    assert chats.left_out == {"beyond its weight": 40 - chats.documents}
    with pytest.raises(UserError, match=r"chats\.jsonl has no weight, and others have"):
        open_corpus([weighed[0], both[1]], tokenizer, sequence_length=64)


def test_documents_that_are_left_out_as_too_long_have_no_weight(
    tokenizer: Any, write: Write, both: list[TextSource]
) -> None:
    rows = [{"text": "The lazy dog. " * (99 if number % 2 else 1) + str(number)} for number in range(60)]
    weighed = [TextSource(write("long.jsonl", rows), weight=1), TextSource(both[1].path, weight=1)]
    sets = open_corpus(weighed, tokenizer, sequence_length=64, held_out=0, long="skip")
    long, chats = sets.counts
    assert abs(long.tokens - chats.tokens) < 40 and long.left_out == {"longer than a sample": 30}
    only_long = TextSource(write("only.jsonl", rows[1::2]), weight=1)
    with pytest.raises(UserError, match=r"only\.jsonl has a weight, but no document to train on"):
        open_corpus([only_long, weighed[1]], tokenizer, sequence_length=64, held_out=0, long="skip")


def test_sources_of_one_name_are_told_apart(write: Write) -> None:
    write("x/set/train.txt", "a")
    folder = str(Path(write("x/set/test.txt", "b")).parent)
    other = str(Path(write("y/set/train.txt", "c")).parent)
    sources = [TextSource(folder), TextSource(folder, split="test"), TextSource("owner/set", "tiny"), TextSource(other)]
    assert labels_of(sources) == ["set train 1", "set test", "owner/set/tiny", "set train 4"]


def test_of_a_hub_data_set_no_more_is_read_than_its_limit(
    tokenizer: Any, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(20):
        rows = [{"text": f"file {number} row {row} the lazy dog"} for row in range(10)]
        path = Path(write(f"hub/data/train-{number:05d}-of-00020.jsonl", rows))
    hub = str(path.parents[1])
    for module in (sources_module, streams):
        monkeypatch.setattr(
            module, "local_files", lambda path, *rest: None if path == hub else reading.local_files(path, *rest)
        )
    used: list[str] = []
    rows_of = streams.HubFile.rows

    def noted(file: streams.HubFile) -> Iterator[Any]:
        for row in rows_of(file):
            used.append(file.label)
            yield row

    monkeypatch.setattr(streams.HubFile, "rows", noted)
    local = TextSource(write("a.jsonl", [{"text": "The fox."}]))
    sets = open_corpus([local, TextSource(hub, limit=25)], tokenizer, sequence_length=16, held_out=0, seed=1)
    assert [each.rows for each in sets.counts] == [1, 25]
    assert len(sets.sources) == 21 and len(set(used)) == 3, "three files of ten rows"
    with pytest.raises(UserError, match="a hub data set beside other sources needs a limit"):
        open_corpus([local, TextSource(hub)], tokenizer, sequence_length=16, held_out=0)
