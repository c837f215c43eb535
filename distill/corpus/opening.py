"""The way from the user's path to samples that can be indexed: the one entry point of this room."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from distill.corpus.documents import corpus_fingerprint, document_hashes, load_documents
from distill.corpus.encoding import encode
from distill.corpus.packing import Samples
from distill.corpus.reading import find_sources
from distill.corpus.shapes import BY_NAME, NAMES, Columns
from distill.corpus.splitting import check_sides, split_rows
from distill.corpus.templates import DEFAULTS, Learning
from distill.errors import UserError
from distill.system.files import last_part
from distill.system.quiet import quiet_datasets


@dataclass(frozen=True)
class SampleSets:
    """A corpus as samples, in two sets that share no document."""

    train: Samples
    """Samples to train on. Their documents are shuffled."""
    held_out: Samples
    """Samples that are never trained on, with their documents in file order. Empty if none were asked for."""
    fingerprint: str
    """The sha256 (hex) of the documents' content in file order, before tokenising: the same for every tokenizer."""
    empty_documents: int = 0
    """Documents left out because they hold nothing but white space, or no message."""
    unlearnable_documents: int = 0
    """Documents left out because no position in them carries loss: conversations without an answer, single tokens."""
    sources: tuple[str, ...] = ()
    """Names of the files (below the corpus's folder) or of the data set, by the number that samples give."""
    shapes: dict[str, int] = field(default_factory=dict)
    """Number of rows of each shape (`distill.corpus.shapes.NAMES`)."""
    thoughts_left_out: int = 0
    """Thoughts of earlier turns that the chat template takes out by its own rule."""
    rendering: dict[str, str] = field(default_factory=dict)
    """Settings that the text of conversations depends on beside the tokenizer, in words; empty at the defaults."""


def open_corpus(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    sequence_length: int,
    name: str | None = None,
    split: str = "train",
    columns: Columns = BY_NAME,
    learning: Learning = DEFAULTS,
    pack: bool = True,
    held_out: float = 0.05,
    seed: int = 0,
) -> SampleSets:
    """Read, tokenise, split and pack a corpus. The arguments are those of the configuration's `CorpusConfig`, with its
    names of columns as `columns` and its keys for conversations as `learning`.

    Tables of text and of tokens are kept in the cache folder of `datasets` (`HF_DATASETS_CACHE`). Their keys are the
    files' bytes and the tokenizer's content, so a second opening is quick and never stale.
    Raises UserError if anything is wrong with the corpus.
    """
    if not 0 <= held_out <= 0.5:
        raise UserError(f"corpus.held_out: {held_out} is not a share from 0 to 0.5")
    if sequence_length < 2:
        raise UserError(f"corpus.sequence_length: {sequence_length} is too short; a sample needs 2 tokens at least")
    if seed < 0:
        raise UserError(f"corpus.seed: {seed} is negative; give 0 or more")
    sources = find_sources(path, name, split, columns)
    with quiet_datasets():
        documents = load_documents(sources, columns)
        shares = _numbers(documents, "share")
        empty = int((shares > 1).sum())
        if empty == len(shares):
            raise UserError(f"{path}: no document with any text in it ({empty} empty ones)")
        train_rows, held_rows = split_rows(shares, held_out, seed)
        check_sides(path, train_rows, held_rows, held_out)
        encoded = encode(documents, tokenizer, [source.label for source in sources], learning)
    learnable = _numbers(encoded, "learned") > 0
    if not learnable.any():
        lacking = "an answer of the assistant" if documents[0]["conversation"] else "a second token"
        raise UserError(f"{path}: nothing to learn: none of the {len(shares) - empty} documents has {lacking}")
    train_rows, held_rows = train_rows[learnable[train_rows]], held_rows[learnable[held_rows]]
    check_sides(path, train_rows, held_rows, held_out)
    train, held = (
        Samples(
            encoded,
            rows,
            hashes=document_hashes(documents),
            sources=_numbers(documents, "source"),
            sequence_length=sequence_length,
            pack=pack,
            pad_token_id=_pad_token_id(tokenizer),
        )
        for rows in (train_rows, held_rows)
    )
    unlearnable = len(shares) - empty - train.documents - held.documents
    names = tuple(_name_below(path, source.label) for source in sources)
    return SampleSets(
        train,
        held,
        corpus_fingerprint(documents),
        empty,
        unlearnable,
        names,
        shapes={NAMES[kind]: int(count) for kind, count in zip(*_counted(documents, "shape"), strict=True)},
        thoughts_left_out=int(_numbers(encoded, "thoughts").sum()),
        rendering=learning.described(tokenizer) if documents[0]["conversation"] else {},
    )


def _counted(table: datasets.Dataset, column: str) -> tuple[np.ndarray, np.ndarray]:
    values, counts = np.unique(_numbers(table, column), return_counts=True)
    return values, counts


def _name_below(path: str, label: str) -> str:
    """Return a source's name as it is on every machine: below the corpus's folder, or the last part of its path."""
    root = Path(path).expanduser()
    return Path(label).relative_to(root).as_posix() if root.is_dir() else last_part(label) if root.exists() else label


def _numbers(table: datasets.Dataset, column: str) -> np.ndarray:
    return table.data.column(column).to_numpy()


def _pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token that fills a short sample. It is never learned; its positions isolate it from the text."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in candidates if token is not None)
