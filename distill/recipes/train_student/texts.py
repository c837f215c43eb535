"""Prompts of the texts that a student writes while it trains, and its way of writing them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from distill.cache.format.tokenizer_files import checked_tokenizer
from distill.cache.reading.reader import CacheReader
from distill.evaluation.own_texts import pick_questions
from distill.evaluation.texts import continue_tokens, split_text
from distill.experiment.configuration import Experiment
from distill.models.generation import context_length, ending_tokens
from distill.models.language_model import Head
from distill.models.tokenizer_trimming import trim_tokenizer
from distill.models.tokenizers import load_folder_tokenizer, vocab_size
from distill.models.vocabulary import Vocabulary
from distill.training.parallel import is_sharded
from distill.training.texts import FILE, WriteTexts

_DOCUMENTS = 2**24
"""More documents than a sample can have, to number those of a cache that does not name them."""


def make_texts(
    experiment: Experiment, held_out: CacheReader, vocabulary: Vocabulary | None, logs: Path
) -> list[WriteTexts]:
    """Return the callback that writes texts into a folder of logs, or none if the experiment asks for none.

    The prompts are the first held-out documents of the cache: of a conversation everything before its last answer.
    """
    every = experiment.train.texts_every_steps
    if every is None:
        return []
    tokenizer = load_folder_tokenizer(checked_tokenizer(held_out.storage.folder))
    new_tokens, prompt_tokens = experiment.evaluate.text_tokens, experiment.generate.prompt_tokens
    asked = pick_questions(_HeldOut(held_out), experiment.evaluate.texts, prompt_tokens)
    tokens = [torch.tensor(question.ids) for question in asked]
    if vocabulary is not None:
        tokens = [vocabulary.mapped(ids_L) for ids_L in tokens if vocabulary.covers(ids_L)]
        tokenizer = trim_tokenizer(tokenizer, vocabulary)
    prompts = [ids_L.tolist() for ids_L in tokens]
    size = vocab_size(tokenizer)

    def write(student: Any) -> list[str]:
        model = _Uncached(student) if is_sharded(student) else student
        written = continue_tokens(model, prompts, new_tokens, size, ending_tokens(student, tokenizer))
        return [split_text(tokenizer, [*ids, *new], len(ids))[1] for ids, new in zip(prompts, written, strict=True)]

    shown = [split_text(tokenizer, ids, len(ids))[0] for ids in prompts]
    return [WriteTexts(shown, write, logs / FILE, every)]


class _Uncached:
    """A student without its key-value cache: under fsdp its `body` alone gathers the weights of all devices."""

    def __init__(self, student: Any) -> None:
        self._student = student
        self.max_position_embeddings = context_length(student)

    def body(self, input_ids_BL: Tensor, position_ids_BL: Tensor) -> Any:
        return self._student.body(input_ids_BL, position_ids_BL)

    @property
    def head(self) -> Head:
        return self._student.head


class _HeldOut(Dataset):
    """The samples of a cache in the form in which a corpus gives them."""

    def __init__(self, reader: CacheReader) -> None:
        self.reader = reader

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        record = self.reader[index]
        positions_L = torch.from_numpy(record.position_ids_L.astype("int64"))
        number_L = (positions_L == 0).cumsum(0) - 1
        if record.documents is None:
            hashes_L = number_L + index * _DOCUMENTS
        else:
            hashes_L = torch.from_numpy(record.documents.hashes.view("int64"))[number_L]
        return {
            "input_ids": torch.from_numpy(record.input_ids_L.astype("int64")),
            "position_ids": positions_L,
            "loss_mask": torch.from_numpy(record.loss_mask_L),
            "document_hash": hashes_L,
        }
