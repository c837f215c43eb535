"""The way from the user's path to samples that can be indexed: the one entry point of this room."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from distill.corpus.documents import are_conversations, document_hashes, load_documents
from distill.corpus.encoding import encode
from distill.corpus.packing import STREAM, Packing
from distill.corpus.samples import Samples, document_lengths
from distill.corpus.selecting import BadRows, check_reading, select
from distill.corpus.shapes import NAMES
from distill.corpus.sources import TextSource, check_all_are_there, check_weights, file_names, labels_of
from distill.corpus.splitting import check_sides, mix, split_rows
from distill.corpus.summary import SourceCounts
from distill.corpus.templates import DEFAULTS, Learning
from distill.errors import UserError
from distill.models.tokenizers import begin_token_id
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
    owners: tuple[int, ...] = ()
    """Number of the source (in `counts`) of each of these files."""
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
    corpus: str | Sequence[TextSource],
    tokenizer: PreTrainedTokenizerBase,
    *,
    sequence_length: int,
    learning: Learning = DEFAULTS,
    pack: bool | str = "auto",
    long: str = "split",
    begun: Packing | None = None,
    bad_rows: BadRows = "refuse",
    held_out: float = 0.05,
    seed: int = 0,
    begun_with: str | None = None,
) -> SampleSets:
    """Read, tokenise, split and pack a corpus, a path or several sources.

    The arguments are those of the configuration's `CorpusConfig`, with its keys for conversations as `learning`. Of a
    cache of it that was begun, `begun` is the packing, and `begun_with` the fingerprint of the corpus (see `select`).

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
    sources = [TextSource(corpus)] if isinstance(corpus, str) else list(corpus)
    path, weights = ", ".join(source.path for source in sources), check_weights(sources)
    files = [file for owner, source in enumerate(sources) for file in source.open(owner)]
    with quiet_datasets():
        documents = load_documents(files)
        labels = [file.label for file in files]
        check_reading(path, documents, labels, bad_rows)
        encoded = encode(documents, tokenizer, labels, learning)
    chosen = select(path, documents, encoded, labels, bad_rows, begun_with)
    sides = split_rows(np.where(chosen.kept, _numbers(documents, "share"), 2.0), held_out, seed)
    train_rows, held_rows = (rows[chosen.learnable[rows]] for rows in sides)
    check_sides(path, train_rows, held_rows, held_out)
    owners = np.array([file.owner for file in files])[_numbers(documents, "source")]
    if weights is not None:
        check_all_are_there(sources, owners[train_rows])
        train_rows = mix(train_rows, owners, document_lengths(encoded), weights)
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
    return SampleSets(
        train,
        held,
        chosen.fingerprint,
        chosen.counts(labels_of(sources), owners, encoded, (train_rows, held_rows), sequence_length),
        file_names(sources, files),
        tuple(file.owner for file in files),
        shapes=_shapes(documents),
        thoughts_left_out=int(_numbers(encoded, "thoughts").sum()),
        rendering=learning.described(tokenizer) if conversations else {},
        packing=packing,
        is_conversations=conversations,
    )


def _shapes(documents: datasets.Dataset) -> dict[str, int]:
    kinds = np.unique(_numbers(documents, "shape"), return_counts=True)
    return {NAMES[kind]: int(rows) for kind, rows in zip(*kinds, strict=True) if kind >= 0}


def _numbers(table: datasets.Dataset, column: str) -> np.ndarray:
    return table.data.column(column).to_numpy()


def _pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token that fills a short sample. It is never learned; its positions isolate it from the text."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in candidates if token is not None)
