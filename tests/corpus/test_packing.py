"""Samples hold every token once, restart positions at every seam, and carry loss only where the next token is known."""

from __future__ import annotations

import pickle
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from distill.corpus.encoding import FEATURES
from distill.corpus.packing import Packing
from distill.corpus.samples import Samples

COLUMNS = ("input_ids", "position_ids", "loss_mask", "document_hash", "source")
PAD = 9999


def encoded(lengths: list[int], seed: int = 0) -> datasets.Dataset:
    """Documents of these lengths with numbered tokens, about a third of them without loss, stored in several chunks."""
    random = np.random.default_rng(seed)
    begins = np.cumsum([0, *lengths])
    ids = [list(range(begin, begin + length)) for begin, length in zip(begins, lengths, strict=False)]
    masks = [[*(random.random(length - 1) > 0.3).tolist(), False] for length in lengths]
    rows = [
        {"input_ids": i, "loss_mask": m, "learned": sum(m), "turns": [], "openings": []}
        | {"thoughts": 0, "endless": 0, "fault": ""}
        for i, m in zip(ids, masks, strict=True)
    ]
    chunks = [datasets.Dataset.from_list(rows[i : i + 3], features=FEATURES) for i in range(0, len(rows), 3)]
    return datasets.concatenate_datasets(chunks)


def make_samples(table: datasets.Dataset, rows: np.ndarray, **options: Any) -> Samples:
    """Samples of documents whose hash is -1 - row, of source row % 3, as a stream or (`pack=False`) one each."""
    every = np.arange(len(table))
    packing = Packing.parse("", options.pop("pack"))
    return Samples(table, rows, hashes=-1 - every, sources=every % 3, packing=packing, pad_token_id=PAD, **options)


def naive(table: datasets.Dataset, rows: np.ndarray, length: int, pack: bool) -> list[dict[str, list]]:
    """The specification, token by token: cut the stream (or each document), restart positions, pad on the right."""
    documents = [[(int(r), j) for j in range(len(table[int(r)]["input_ids"]))] for r in rows]
    streams = [[token for document in documents for token in document]] if pack else documents
    samples = []
    for stream in streams:
        for begin in range(0, len(stream), length):
            cut = stream[begin : begin + length]
            sample: dict[str, list] = {name: [] for name in COLUMNS}
            position = 0
            for i, (row, j) in enumerate(cut):
                position = position + 1 if i and cut[i - 1][0] == row else 0
                followed = i + 1 < len(cut) and cut[i + 1][0] == row
                sample["input_ids"].append(table[row]["input_ids"][j])
                sample["position_ids"].append(position)
                sample["loss_mask"].append(table[row]["loss_mask"][j] and followed)
                sample["document_hash"].append(-1 - row)
                sample["source"].append(row % 3)
            padding = length - len(cut)
            sample["input_ids"] += [PAD] * padding
            sample["position_ids"] += list(range(padding))
            sample["loss_mask"] += [False] * padding
            for name in ("document_hash", "source"):
                sample[name] += [0] * padding
            samples.append(sample)
    return samples


CASES = [
    ([1], 2),
    ([5], 5),
    ([5], 2),
    ([3, 1, 1, 1, 7, 2], 4),
    ([4, 4, 4], 4),
    ([40, 1, 3], 7),
    ([2, 3, 5, 7, 11, 13, 17, 19, 23], 10),
    ([1] * 11, 3),
]


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize(("lengths", "sequence_length"), CASES)
def test_equals_the_naive_program(lengths: list[int], sequence_length: int, pack: bool) -> None:
    table = encoded(lengths)
    rows = np.random.default_rng(1).permutation(len(lengths))
    samples = make_samples(table, rows, sequence_length=sequence_length, pack=pack)
    expected = naive(table, rows, sequence_length, pack)
    assert len(samples) == len(expected)
    for i, sample in enumerate(expected):
        assert {key: value.tolist() for key, value in samples[i].items()} == sample
    assert samples.tokens == sum(lengths)
    assert samples.documents == len(lengths)


@pytest.mark.parametrize("pack", [True, False])
def test_no_token_is_lost_or_doubled(pack: bool) -> None:
    random = np.random.default_rng(7)
    for trial in range(25):
        lengths = random.integers(1, 30, size=random.integers(1, 12)).tolist()
        rows = random.permutation(len(lengths))[: random.integers(1, len(lengths) + 1)]
        table = encoded(lengths, trial)
        samples = make_samples(table, rows, sequence_length=int(random.integers(2, 20)), pack=pack)
        kept = [token for i in range(len(samples)) for token in samples[i]["input_ids"].tolist() if token != PAD]
        assert kept == [token for row in rows for token in table[int(row)]["input_ids"]]


def test_types_and_indexing() -> None:
    samples = make_samples(encoded([5, 6]), np.arange(2), sequence_length=4, pack=True)
    assert [samples[0][key].dtype for key in ("input_ids", "position_ids", "loss_mask")] == [
        torch.int64,
        torch.int64,
        torch.bool,
    ]
    assert torch.equal(samples[-1]["input_ids"], samples[len(samples) - 1]["input_ids"])
    for index in (len(samples), -len(samples) - 1):
        with pytest.raises(IndexError):
            samples[index]


def test_a_batch_written_to_does_not_reach_the_table() -> None:
    samples = make_samples(encoded([8]), np.arange(1), sequence_length=4, pack=True)
    samples[0]["input_ids"].fill_(-1)
    assert samples[0]["input_ids"].tolist() == [0, 1, 2, 3]


def test_nothing_to_hold_is_no_sample() -> None:
    for pack in (True, False):
        assert len(make_samples(encoded([3]), np.arange(0), sequence_length=4, pack=pack)) == 0


def test_a_copy_for_a_worker_process_gives_the_same_samples() -> None:
    samples = make_samples(encoded([5, 6, 9]), np.array([2, 0, 1]), sequence_length=4, pack=False)
    copy = pickle.loads(pickle.dumps(samples))
    assert all(torch.equal(copy[i][key], samples[i][key]) for i in range(len(samples)) for key in samples[i])
