"""A stream's way to samples, window by window, as far as they are needed."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np

from distill.corpus.documents import are_conversations, document_hashes, texts_of
from distill.corpus.encoding import encode
from distill.corpus.gathering import Gatherer, Window
from distill.corpus.packing import Packing
from distill.corpus.sample_sets import READING, REVISION, SampleSets, check_samples, numbers, shapes_of
from distill.corpus.sampling import Sampling
from distill.corpus.selecting import BadRows, check_reading, select
from distill.corpus.sources import TextSource
from distill.corpus.splitting import check_sides
from distill.corpus.streams import open_stream
from distill.corpus.summary import together
from distill.corpus.templates import Learning
from distill.corpus.windows import Windows
from distill.errors import UserError
from distill.system.progress import Progress
from distill.system.quiet import quiet_datasets


class Streaming:
    """A stream's way to samples, window by window."""

    def __init__(
        self,
        source: TextSource,
        learning: Learning,
        bad_rows: BadRows,
        sampling: Sampling,
        seed: int,
        revision: str | None,
    ) -> None:
        self._source, self._path = source, source.path
        self._stream = open_stream(
            source.path, source.name, source.split, source.columns, seed, revision, source.reader
        )
        self._windows = Windows(self._stream, source.columns, source.limit)
        self._learning, self._bad_rows, self._sampling, self._seed = learning, bad_rows, sampling, seed
        self._labels = [file.label for file in self._stream.files]
        self._before = np.zeros(0, dtype=np.int64)
        self._packing: Packing | None = None
        self._conversations = False
        self._rows = (0, 0)
        self._number = 0

    def gathered(self, most: int | None, most_held_out: int) -> SampleSets:
        """Read as much as is needed, and return it as samples."""
        sampling = self._sampling
        gatherer = Gatherer(self._take, self._estimate, self._path, sampling.sequence_length)
        total, unit = (len(self._labels), "files") if most is None else (most, "samples")
        with Progress(f"corpus {self._source.label}", total, unit) as progress:

            def advance(samples: int) -> None:
                done = self._windows.files_begun - progress.done if most is None else samples
                progress.advance(min(done, total - progress.done))

            # One long document may be a window by itself, with nothing held out.
            gatherer.gather(most, max(most_held_out, 1) if sampling.held_out else 0, advance)
        if self._packing is None or not any(self._rows):
            raise UserError(f"{self._path}: nothing to learn: no document in it with a token to learn")
        check_sides(self._path, *self._rows, sampling.held_out)
        check_samples(self._path, self._rows, (len(gatherer.train), len(gatherer.held_out)), sampling)
        windows = list(gatherer.windows)
        shapes: Counter[str] = Counter()
        for window in windows:
            shapes.update(window.shapes)
        rendering = self._learning.described(sampling.tokenizer) if self._conversations else {}
        return SampleSets(
            gatherer.train,
            gatherer.held_out,
            self._stream.fingerprint,
            (replace(together([window.counts for window in windows]), name=self._source.label),),
            tuple(self._stream.names),
            (0,) * len(self._stream.names),
            shapes=dict(shapes),
            thoughts_left_out=sum(window.thoughts_left_out for window in windows),
            endless=sum(window.endless for window in windows),
            rendering=rendering | {READING: self._windows.words} | self._revision(),
            packing=self._packing,
            is_conversations=self._conversations,
            texts=lambda: itertools.chain.from_iterable(window.texts() for window in [*gatherer.windows]),
            gatherer=gatherer,
        )

    def _revision(self) -> dict[str, str]:
        return {REVISION: self._stream.revision} if self._stream.revision else {}

    def _estimate(self, samples: int) -> float:
        """Return about how many samples there are, if the files that were begun were read to their ends."""
        sizes = self._stream.sizes
        return samples * sum(sizes) / max(sum(sizes[: self._windows.files_begun]), 1)

    def _take(self) -> Window | None:
        sampling, labels = self._sampling, self._labels
        with quiet_datasets():
            documents = self._windows.take()
            if documents is None:
                return None
            check_reading(self._path, documents, labels, self._bad_rows, is_whole=False)
            encoded = encode(documents, sampling.tokenizer, labels, self._learning)
        chosen = select(self._path, documents, encoded, labels, self._bad_rows, None, self._before)
        self._before = np.union1d(self._before, document_hashes(documents)[chosen.kept])
        if self._packing is None:
            self._conversations = are_conversations(documents)
            self._packing = sampling.packing(self._conversations)
        train_rows, held_rows = sampling.rows(documents, chosen.kept, chosen.learnable, [self._seed, self._number])
        train, held_out = (
            sampling.samples(documents, encoded, rows, self._packing) for rows in (train_rows, held_rows)
        )
        self._number += 1
        self._rows = (self._rows[0] + len(train_rows), self._rows[1] + len(held_rows))
        owners = np.zeros(len(documents), dtype=np.int64)
        rows, length, skips = (train_rows, held_rows), sampling.sequence_length, sampling.long == "skip"
        (counts,) = chosen.counts([""], owners, encoded, rows, length, skips)
        thoughts = int(numbers(encoded, "thoughts").sum())
        endless = int(numbers(encoded, "endless")[chosen.kept].sum())
        return Window(
            train,
            held_out,
            counts,
            shapes_of(documents),
            thoughts,
            endless,
            partial(texts_of, documents, train_rows, self._sampling.tokenizer),
        )
