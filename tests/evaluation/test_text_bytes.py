"""Bytes of the text that the positions with loss predict: against counts by hand, for two kinds of tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from distill.evaluation.held_out import text_bytes

TEXT = "Grüße, 世界! The naïve café costs 5 € 😀 and no more."
END = 0


class Samples(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Documents side by side in one sample each; `masked` says which places carry no loss, a document's last never."""

    def __init__(self, *samples: list[list[int]], masked: Callable[[int], bool] = lambda place: False) -> None:
        self.rows = []
        for documents in samples:
            ids_L = torch.tensor([token for document in documents for token in document])
            positions_L = torch.cat([torch.arange(len(document)) for document in documents])
            mask_L = torch.tensor([not masked(place) for place in range(len(ids_L))])
            ends = torch.tensor([len(document) for document in documents]).cumsum(0) - 1
            mask_L[ends] = False
            self.rows.append({"input_ids": ids_L, "position_ids": positions_L, "loss_mask": mask_L})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.rows[index]


@pytest.fixture(scope="module")
def bytelevel(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """Byte-level BPE, as GPT-2's and most since: a character may be several tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        [TEXT] * 3,
        trainers.BpeTrainer(vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False),
    )
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>").save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def metaspace() -> PreTrainedTokenizerBase:
    """As SentencePiece's: a space belongs to the word after it, and the first one is taken off when decoding."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = ["<s>", *(f"▁{word}" for word in ("the", "cat", "sat", "on", "a", "mat")), "."]
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="."))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", unk_token=".")


def test_a_whole_document_is_its_text_without_the_first_token(bytelevel: PreTrainedTokenizerBase) -> None:
    ids = bytelevel(TEXT).input_ids
    first = len(bytelevel.decode(ids[:1]).encode())
    assert text_bytes(Samples([ids]), bytelevel) == len(TEXT.encode()) - first
    assert len(TEXT.encode()) > len(TEXT) > len(ids)


def test_documents_samples_and_masked_places_by_hand(bytelevel: PreTrainedTokenizerBase) -> None:
    """Every token decoded alone: ASCII, so that no character is cut."""
    texts = ["The costs and", " no more.", "The more", "and costs 5 more"]
    a, b, c, d = (bytelevel(text).input_ids for text in texts)
    samples = Samples([a, b], [c, d], masked=lambda place: place % 4 == 1)
    expected = 0
    for row in samples.rows:
        for place in row["loss_mask"].nonzero().flatten().tolist():
            expected += len(bytelevel.decode([int(row["input_ids"][place + 1])]))
    assert 0 < expected < sum(map(len, texts))
    assert text_bytes(samples, bytelevel) == expected


def test_special_tokens_have_no_text(bytelevel: PreTrainedTokenizerBase) -> None:
    ids = bytelevel("The costs").input_ids
    plain = text_bytes(Samples([ids]), bytelevel)
    assert text_bytes(Samples([[*ids, END]]), bytelevel) == plain
    assert text_bytes(Samples([[END, *ids, END]]), bytelevel) == len("The costs")
    assert text_bytes(Samples([[END, END]]), bytelevel) == 0


def test_a_character_that_the_loss_cuts_counts_roughly(bytelevel: PreTrainedTokenizerBase) -> None:
    """Each end of a run may miss by the replacement character's 3 bytes, whatever the text between."""
    ids = bytelevel("世界" * 20).input_ids
    assert len(ids) > 20
    for cut in range(1, 8):
        whole = len(bytelevel.decode(ids[cut + 1 :]).encode())
        assert abs(text_bytes(Samples([ids], masked=lambda place: place < cut), bytelevel) - whole) <= 6  # noqa: B023


def test_the_space_before_a_run_is_part_of_it(metaspace: PreTrainedTokenizerBase) -> None:
    def ids(text: str) -> Any:
        return metaspace(text).input_ids

    sentence = "the cat sat on a mat"
    assert metaspace.decode(ids(sentence)[1:]) == "cat sat on a mat", "a decoder that keeps the space tests nothing"
    assert text_bytes(Samples([ids(sentence)]), metaspace) == len(" cat sat on a mat")
    later = Samples([ids(sentence)], masked=lambda place: place < 2)
    assert text_bytes(later, metaspace) == len(" on a mat")
    assert text_bytes(Samples([[0, *ids(sentence)]]), metaspace) == len("the cat sat on a mat")


def test_nothing_with_loss_has_no_bytes(bytelevel: PreTrainedTokenizerBase) -> None:
    ids = bytelevel(TEXT).input_ids
    assert text_bytes(Samples([ids], masked=lambda place: True), bytelevel) == 0
    assert text_bytes(Samples(), bytelevel) == 0
