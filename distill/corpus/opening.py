"""The way from the user's path to samples that can be indexed: the one entry point of this room."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from distill.corpus.documents import are_conversations, document_hashes, load_documents
from distill.corpus.encoding import encode
from distill.corpus.packing import STREAM, Packing
from distill.corpus.reading import find_sources
from distill.corpus.samples import Samples
from distill.corpus.selecting import BadRows, check_reading, select
from distill.corpus.shapes import BY_NAME, NAMES, Columns
from distill.corpus.splitting import check_sides, split_rows
from distill.corpus.summary import SourceCounts
from distill.corpus.templates import DEFAULTS, Learning
from distill.errors import UserError
from distill.models.tokenizers import begin_token_id
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
    counts: tuple[SourceCounts, ...] = ()
    """Counts of each source: what was read, and what was left out."""
    sources: tuple[str, ...] = ()
    """Names of the files (below the corpus's folder) or of the data set, by the number that samples give."""
    shapes: dict[str, int] = field(default_factory=dict)
    """Number of rows of each shape (`distill.corpus.shapes.NAMES`)."""
    thoughts_left_out: int = 0
    """Thoughts of earlier turns that the chat template takes out by its own rule."""
    rendering: dict[str, str] = field(default_factory=dict)
    """Settings that the text of conversations depends on beside the tokenizer, in words; empty at the defaults."""
    packing: Packing = STREAM
    """Way from documents to samples."""
    is_conversations: bool = False
    """True if the documents are conversations, false if they are plain texts."""

    @property
    def long_documents(self) -> str:
        """The documents longer than a sample, counted in words. Empty without one, and for a stream."""
        layouts = (self.train.layout, self.held_out.layout)
        split, turns, left_out = (
            sum(counts) for counts in zip(*((_.split, _.split_turns, _.left_out) for _ in layouts), strict=True)
        )
        found = [f"{left_out:,} documents left out"] if left_out else []
        if split:
            found.append(f"{split:,} documents split" + (f" ({turns:,} times inside a turn)" if turns else ""))
        return "" if self.packing.way == "stream" else ", ".join(found)


def open_corpus(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    sequence_length: int,
    name: str | None = None,
    split: str = "train",
    columns: Columns = BY_NAME,
    learning: Learning = DEFAULTS,
    pack: bool | str = "auto",
    long: str = "split",
    begun: Packing | None = None,
    bad_rows: BadRows = "refuse",
    held_out: float = 0.05,
    seed: int = 0,
    begun_with: str | None = None,
) -> SampleSets:
    """Read, tokenise, split and pack a corpus. The arguments are those of the configuration's `CorpusConfig`, with its
    names of columns as `columns` and its keys for conversations as `learning`. Of a cache of it that was begun,
    `begun` is the packing, and `begun_with` the fingerprint of the corpus (see `select`).

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
        labels = [source.label for source in sources]
        check_reading(path, documents, labels, bad_rows)
        encoded = encode(documents, tokenizer, labels, learning)
    chosen = select(path, documents, encoded, labels, bad_rows, begun_with)
    sides = split_rows(np.where(chosen.kept, _numbers(documents, "share"), 2.0), held_out, seed)
    train_rows, held_rows = (rows[chosen.learnable[rows]] for rows in sides)
    check_sides(path, train_rows, held_rows, held_out)
    begin, conversations = begin_token_id(tokenizer), are_conversations(documents)
    packing = Packing.of(pack, long, conversations=conversations, begin=begin is not None, begun=begun)
    train, held = (
        Samples(
            encoded,
            rows,
            hashes=document_hashes(documents),
            sources=_numbers(documents, "source"),
            sequence_length=sequence_length,
            packing=packing,
            pad_token_id=_pad_token_id(tokenizer),
            begin_token_id=begin,
        )
        for rows in (train_rows, held_rows)
    )
    for rows, samples, side in ((train_rows, train, "training"), (held_rows, held, "held-out")):
        if len(rows) and not len(samples):
            raise UserError(
                f"{path}: all {len(rows)} {side} documents are longer than {sequence_length} tokens, and corpus.long: "
                "skip leaves them out: raise corpus.sequence_length, or give --corpus.long split"
            )
    owners = np.zeros(len(documents), dtype=np.int64)
    names = tuple(_name_below(path, source.label) for source in sources)
    return SampleSets(
        train,
        held,
        chosen.fingerprint,
        chosen.counts([_name_of(path)], owners, encoded, held_rows, sequence_length),
        names,
        shapes=_shapes(documents),
        thoughts_left_out=int(_numbers(encoded, "thoughts").sum()),
        rendering=learning.described(tokenizer) if conversations else {},
        packing=packing,
        is_conversations=conversations,
    )


def _shapes(documents: datasets.Dataset) -> dict[str, int]:
    kinds = np.unique(_numbers(documents, "shape"), return_counts=True)
    return {NAMES[kind]: int(rows) for kind, rows in zip(*kinds, strict=True) if kind >= 0}


def _name_of(path: str) -> str:
    return last_part(path) if Path(path).expanduser().exists() else path


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
