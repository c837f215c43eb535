"""The way from the user's path to samples that can be indexed: the one entry point of this room."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
from transformers import PreTrainedTokenizerBase

from distill.corpus.documents import are_conversations, load_documents, texts_of
from distill.corpus.encoding import encode
from distill.corpus.packing import Packing
from distill.corpus.sample_sets import SampleSets, check_samples, numbers, shapes_of
from distill.corpus.samples import document_lengths
from distill.corpus.sampling import Sampling
from distill.corpus.selecting import BadRows, check_reading, select
from distill.corpus.sources import TextSource, check_all_are_there, check_weights, file_names, labels_of
from distill.corpus.splitting import check_sides, mix
from distill.corpus.streaming import Streaming
from distill.corpus.streams import is_stream
from distill.corpus.templates import DEFAULTS, Learning
from distill.corpus.written_parts import Cut, check_written
from distill.errors import UserError
from distill.system.quiet import quiet_datasets


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
    cut: Cut = "keep",
    held_out: float = 0.05,
    seed: int = 0,
    begun_with: str | None = None,
    is_streamed: bool | None = None,
    revision: str | None = None,
    most: int | None = None,
    most_held_out: int = 0,
) -> SampleSets:
    """Read, tokenise, split and pack a corpus, a path or several sources.

    The arguments are those of the configuration's `CorpusConfig`, with its keys for conversations as `learning` and
    `cut_texts` as `cut`. Of a cache of it that was begun, `begun` is the packing, and `begun_with` the fingerprint of
    the corpus (see `select`).

    A large corpus of one source, or one of the hub, is a stream (unless a cache that was begun is of one that was not:
    `is_streamed`). It is read as far as `most` training samples and `most_held_out` held-out ones need it, a hub data
    set at a `revision`.

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
    sampling = Sampling(tokenizer, sequence_length, pack, long, begun, held_out)
    first = sources[0]
    if len(sources) == 1 and (is_stream(path, first.split, first.reader) if is_streamed is None else is_streamed):
        streaming = Streaming(first, learning, bad_rows, sampling, seed, revision or first.revision)
        return streaming.gathered(most, most_held_out)
    if revision is not None:
        raise UserError(f"corpus.revision: {revision}: only a hub data set has revisions")
    is_alone = len(sources) == 1
    files = [file for owner, source in enumerate(sources) for file in source.open(owner, seed, is_alone=is_alone)]
    files, written = check_written(files, tokenizer, cut)
    with quiet_datasets():
        documents = load_documents(files)
        labels = [file.label for file in files]
        check_reading(path, documents, labels, bad_rows)
        encoded = encode(documents, tokenizer, labels, learning)
    chosen = select(path, documents, encoded, labels, bad_rows, begun_with)
    owners = np.array([file.owner for file in files])[numbers(documents, "source")]
    conversations = are_conversations(documents)
    packing = sampling.packing(conversations)
    train_rows, held_rows = sampling.rows(documents, chosen.kept, chosen.learnable, seed)
    # Whether one of a few prompts is held out is chance, which must not end a round of which no held-out text is read.
    by_chance = bool(written) and not most_held_out and len(train_rows) > 0
    if not by_chance:
        check_sides(path, len(train_rows), len(held_rows), held_out)
    if weights is not None:
        lengths = document_lengths(encoded)
        is_left_out = (lengths[train_rows] > sequence_length) & (packing.long == "skip")
        fitting, too_long = train_rows[~is_left_out], train_rows[is_left_out]  # what is not read has no weight
        check_all_are_there(sources, owners[fitting])
        train_rows = np.concatenate([mix(fitting, owners, lengths, weights), too_long])
    train, held = (sampling.samples(documents, encoded, rows, packing) for rows in (train_rows, held_rows))
    check_samples(path, (len(train_rows), len(held_rows)), (len(train), len(held)), sampling)
    return SampleSets(
        train,
        held,
        chosen.fingerprint,
        chosen.counts(labels_of(sources), owners, encoded, (train_rows, held_rows), sequence_length, long == "skip"),
        file_names(sources, files),
        tuple(file.owner for file in files),
        shapes=shapes_of(documents),
        thoughts_left_out=int(numbers(encoded, "thoughts").sum()),
        endless=int(numbers(encoded, "endless")[chosen.kept].sum()),
        rendering=learning.described(tokenizer) if conversations else {},
        packing=packing,
        written=written,
        is_conversations=conversations,
        texts=partial(texts_of, documents, train_rows, tokenizer),
    )
