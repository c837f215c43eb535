"""Only as much of a stream is read as is needed: the same tokens on every machine, more of them behind the same."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

from distill.corpus import SampleSets, open_corpus, reading, streams, windows
from distill.errors import UserError

FILES, ROWS = 200, 50
OPENED: set[str] = set()


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 200 parquet files, as the hub has them."""
    folder = tmp_path_factory.mktemp("hub")
    for number in range(FILES):
        texts = [f"file {number} row {row}: the lazy dog " + "jumps " * (row % 9) for row in range(ROWS)]
        name = folder / f"data/train-{number:05d}-of-{FILES:05d}.parquet"
        name.parent.mkdir(exist_ok=True)
        pa.parquet.write_table(pa.table({"text": texts, "url": ["somewhere"] * ROWS}), name)
    return folder


@pytest.fixture
def stream(hub: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., SampleSets]:
    """`stream(most)`: open the data set as one of the hub, with windows of 40 rows."""
    monkeypatch.setattr(streams, "local_files", lambda path, *rest: None)
    monkeypatch.setattr(windows, "ROWS", 40)
    options = {"sequence_length": 32, "held_out": 0.1, "most_held_out": 4}
    return lambda most, **more: open_corpus(str(hub), tokenizer, **{**options, "most": most, **more})


@pytest.fixture
def opened(hub: Path) -> Iterator[set[str]]:
    """Names of the data set's files that are opened."""
    if not OPENED:
        OPENED.add("")
        sys.addaudithook(lambda event, given: OPENED.add(str(given[0])) if event == "open" else None)
    OPENED.intersection_update({""})
    yield OPENED
    assert "" in OPENED


def tokens(sets: SampleSets, count: int) -> list[torch.Tensor]:
    return [sets.train[index]["input_ids"] for index in range(count)]


def test_one_part_in_a_hundred_is_read_of_a_few_files(
    stream: Callable[..., SampleSets], opened: set[str], tokenizer: Any
) -> None:
    whole = FILES * ROWS * 30 / 32
    sets = stream(round(whole / 100))
    with sets.ahead():
        texts = tokenizer.decode(torch.cat(tokens(sets, len(sets.train))))
    files = {name for name in opened if name.endswith(".parquet")}
    assert 2 <= len(files) <= 0.03 * FILES
    assert len(sets.train) == round(whole / 100) and len(sets.held_out) >= 4
    assert texts.count("row") > ROWS and len(sets.sources) == FILES
    assert sets.rendering["reading"].startswith("shuffled files in windows of 40 rows")


def test_one_long_document_is_not_all_that_can_be_held_out(
    stream: Callable[..., SampleSets], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first window may be one document, which is not held out, and have samples enough."""
    monkeypatch.setattr(windows, "ROWS", 1)
    sets = stream(3, most_held_out=0)
    assert len(sets.train) == 3 and len(sets.held_out) > 0


def test_more_samples_come_behind_the_same_ones_wherever_they_are_read(
    stream: Callable[..., SampleSets], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import datasets

    one = stream(60)
    first = tokens(one, 60)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)  # another machine
    two = stream(120)
    assert two.fingerprint == one.fingerprint and two.rendering == one.rendering
    both = tokens(two, 120)
    assert all(torch.equal(here, there) for here, there in zip(first, both, strict=False))
    held = [sets.held_out[index]["input_ids"] for sets in (one, two) for index in range(4)]
    assert all(torch.equal(here, there) for here, there in zip(held[:4], held[4:], strict=True))
    assert stream(60, seed=1).fingerprint != one.fingerprint
    hashes = {
        int(value)
        for sets in (one, two)
        for sample in (sets.train[0], sets.train[59])
        for value in sample["document_hash"]
    }
    kept = {int(value) for index in range(len(two.held_out)) for value in two.held_out[index]["document_hash"]} - {0}
    assert not hashes & kept


def test_what_was_read_before_is_not_read_again(
    stream: Callable[..., SampleSets], opened: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens(stream(60), 60)
    opened.intersection_update({""})
    again = tokens(stream(60), 60)
    assert sum(name.endswith(".parquet") for name in opened) <= 1 and len(again) == 60, "one tells the columns"
    tokens(stream(200), 200)
    assert sum(name.endswith(".parquet") for name in opened) > 2


def test_a_short_stream_is_read_to_its_end(
    stream: Callable[..., SampleSets], hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = streams.open_stream

    def few(*arguments: Any) -> streams.Stream:
        found = real(*arguments)
        return streams.Stream(found.files[:3], "3", "3", found.names[:3], found.sizes[:3])

    monkeypatch.setattr("distill.corpus.streaming.open_stream", few)
    sets = stream(10_000)
    assert sets.counts[0].documents == 3 * ROWS and len(sets.train) == len(stream(None).train) < 200
    assert sum(sets.shapes.values()) == 3 * ROWS


def test_a_stream_that_ends_early_says_how_much_there_is(stream: Callable[..., SampleSets]) -> None:
    sets = stream(60)
    assert sets.gatherer is not None
    sets.gatherer.take = lambda: None
    sets.train.fix(10_000)
    with pytest.raises(UserError, match=r"has \d+ training samples, not 10,000: give --cache.max_samples \d+"):
        sets.train[9_999]


def test_a_document_is_learned_once_across_windows(
    tokenizer: Any, write: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large files of this machine are a stream too; the second window has nothing new."""
    monkeypatch.setattr(streams, "LARGE", 1)
    monkeypatch.setattr(windows, "ROWS", 40)
    path = write("a.jsonl", [{"text": f"the dog {number % 50}"} for number in range(100)])
    sets = open_corpus(path, tokenizer, sequence_length=16, held_out=0)
    assert sets.counts[0].documents == 50 and sets.counts[0].left_out == {"exact duplicate": 50}
    assert sets.gatherer is not None and len(sets.gatherer.windows) == 3
    whole = open_corpus(path, tokenizer, sequence_length=16, held_out=0, is_streamed=False)
    assert whole.counts[0].documents == 50 and whole.gatherer is None


def test_rows_of_two_kinds_are_bad_whatever_was_read_before(
    tokenizer: Any, write: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "LARGE", 1)
    monkeypatch.setattr(windows, "ROWS", 40)
    messages = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "The fox."}]
    path = write("a.jsonl", [{"text": f"the dog {number}"} for number in range(40)] + [{"messages": messages}] * 3)
    for _ in range(2):
        with pytest.raises(UserError, match=r"is a conversation, but .*row 1 is plain text"):
            open_corpus(path, tokenizer, sequence_length=16, held_out=0)
    skipped = open_corpus(path, tokenizer, sequence_length=16, held_out=0, bad_rows="skip")
    assert skipped.counts[0].documents == 40


def test_only_the_hub_has_revisions(tokenizer: Any, write: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = write("a.jsonl", [{"text": "the dog"}])
    for large in (2**40, 1):
        monkeypatch.setattr(streams, "LARGE", large)
        with pytest.raises(UserError, match=r"corpus\.revision: main: "):
            open_corpus(path, tokenizer, sequence_length=16, held_out=0, revision="main")


def test_where_reading_knows_no_hub(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        streams.is_stream(str(tmp_path / "nowhere"), "train")
    assert reading.local_files("owner/name") is None and streams.is_stream("owner/name", "train")
