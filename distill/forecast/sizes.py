"""Amounts that an experiment reads, writes and keeps: samples, tokens, the cache, checkpoints, the student's folder."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distill.cache.format.folder import MANIFEST, read_journal, read_manifest
from distill.corpus.reading import local_files
from distill.corpus.streams import is_large
from distill.corpus.text_files import COMPRESSIONS
from distill.experiment.configuration import Experiment
from distill.experiment.folders import Folders
from distill.forecast.writing import written_tokens
from distill.system.units import duration, parse_size, size

# Bytes a token by threshold or entries: the largest of three corpora in the tables of distill/cache/README.md
# (OpenStax textbooks, every token with loss). A corpus of plainer text, or with masked questions, takes less.
_VAROPT: dict[float, float] = {1 / 200: 78.2, 1 / 100: 50.8, 1 / 50: 33.2, 1 / 25: 22.0}
_TOP_K: dict[float, float] = {12: 30.0, 32: 74.7, 64: 144.5, 128: 281.3}
_RANDOM: dict[float, float] = {50: 33.8}
_SCALARS = 8
"""Bytes beside hidden states: token, entropy, surprisal."""
_SHARD = 600
"""Bytes a shard beside its records: header, offsets of the samples, journal line."""
BYTES_A_TOKEN_OF_TEXT = 4.0
"""Bytes a token of English text with today's tokenizers, if a file's samples have not been counted."""
TABLE_BYTES_A_TOKEN = 9.1
"""Bytes a token of the tables of a corpus on disk: its text, its token ids and masks (42 MB for 4.6 M tokens)."""
TOKENS_A_SECOND = 250_000
"""Tokens of text that one core reads and tokenises in a second: 4.6 M tokens of English in 18 s."""
_COMPRESSION = 3.0


def memory_limit(experiment: Experiment) -> int | None:
    """Return the bytes of device memory that may be used, None for all. Raises UserError if the text is not a size."""
    return None if experiment.memory_limit is None else parse_size(experiment.memory_limit, "memory_limit")


@dataclass(frozen=True)
class Amount:
    """The amount of text in an experiment. None means unknown before the corpus is read."""

    train: int | None
    """Training samples in the cache."""
    held_out: int
    """Largest number of held-out samples in the cache."""
    evaluated: int | None
    """Held-out samples that the evaluation reads."""

    @property
    def cached(self) -> int | None:
        return None if self.train is None else self.train + self.held_out


@dataclass(frozen=True)
class CorpusWork:
    """The reading of a corpus."""

    tokens: int
    """Tokens that are read, held-out ones included."""
    is_fetched: bool
    """True if it is fetched from the hub."""

    @property
    def table_bytes(self) -> int:
        """Size of the tables of text and tokens on disk."""
        return round(TABLE_BYTES_A_TOKEN * self.tokens)

    def described(self) -> str:
        """Return the work in words."""
        fetched = f"about {size(self.tokens * BYTES_A_TOKEN_OF_TEXT)} of text fetched, " if self.is_fetched else ""
        return (
            f"{fetched}{self.tokens:,} tokens read, {duration(self.tokens / TOKENS_A_SECOND)} of one core, "
            f"{size(self.table_bytes)} of tables in the cache folder of `datasets`"
        )


def corpus_work(experiment: Experiment, amount: Amount) -> CorpusWork | None:
    """Return what reading the corpus takes: a stream as far as it is needed, all of any other. None if not known."""
    corpus = experiment.corpus
    if (Folders.of(experiment).cache / MANIFEST).is_file() or amount.train is None:
        return None
    if any(source.reader for source in corpus.all_sources):
        return None
    samples = amount.train / (1 - corpus.held_out)
    files = [
        local_files(source.path, source.split) if written_tokens(experiment, source.path) is None else []
        for source in corpus.all_sources
    ]
    if len(files) > 1 or (files[0] is not None and not is_large(files[0])):
        if (whole := _samples_in_files(experiment)) is None:
            return None
        samples = max(samples, whole)
    return CorpusWork(round(samples * corpus.sequence_length), is_fetched=files[0] is None)


def amount_of(experiment: Experiment, notes: list[str]) -> Amount:
    """Return the samples of a cache that was begun, else the allowed number, or an estimate by the files' size."""
    cache, corpus = experiment.cache, experiment.corpus
    folder = Folders.of(experiment).cache
    mixed = [Path(name) for name in experiment.train.caches]
    if mixed and all((each / MANIFEST).is_file() for each in mixed):
        found = [read_manifest(each).splits for each in mixed]
        held_out = min(found[0]["held_out"], cache.held_out_samples)
        weights = experiment.train.caches.values()
        train = sum(
            min(splits["train"], cache.max_samples or splits["train"])
            for splits, weight in zip(found, weights, strict=True)
            if weight
        )
        return Amount(train, held_out, experiment.evaluate.max_samples or held_out)
    if (folder / MANIFEST).is_file():
        splits = read_manifest(folder).splits
        train, held_out = splits["train"], min(splits["held_out"], cache.held_out_samples)
        if cache.max_samples is not None and cache.max_samples > train:  # it may grow, as far as there is text
            train = max(train, min(cache.max_samples, _samples_in_files(experiment) or cache.max_samples))
        train = min(train, cache.max_samples or train)
        return Amount(train, held_out, experiment.evaluate.max_samples or held_out)
    total = _samples_in_files(experiment)
    evaluated = experiment.evaluate.max_samples
    if total is None:
        if cache.max_samples is None:
            notes.append(f"corpus {corpus.named}: its size is not known here; with cache.max_samples the whole is told")
        return Amount(cache.max_samples, cache.held_out_samples, evaluated)
    text = f"about {total:,} samples, by the size of its files ({BYTES_A_TOKEN_OF_TEXT:g} bytes a token)"
    if any(written_tokens(experiment, source.path) is not None for source in corpus.all_sources):
        text = f"about {total:,} samples, by the tokens that a model wrote, or writes at most"
    if any(source.weight or source.limit for source in corpus.all_sources):
        text += ", fewer by their weights and limits"
    notes.append(f"corpus {corpus.named}: {text}")
    held_out = round(total * corpus.held_out)
    train = min(total - held_out, cache.max_samples or total)
    return Amount(train, min(held_out, cache.held_out_samples), min(held_out, evaluated or held_out))


def _samples_in_files(experiment: Experiment) -> int | None:
    tokens = 0.0
    for source in experiment.corpus.all_sources:
        written = written_tokens(experiment, source.path)
        if written is not None:
            tokens += written
            continue
        files = local_files(source.path, source.split, source.reader)
        if files is None or source.reader is not None:  # nobody knows how much text a format of the user's own holds
            return None
        tokens += bytes_of_text(files) / BYTES_A_TOKEN_OF_TEXT
    return max(1, math.ceil(tokens / experiment.corpus.sequence_length))


def bytes_of_text(files: list[Path]) -> float:
    """Return the bytes of text in a corpus's files, compressed ones as they usually unpack."""
    return sum(
        file.stat().st_size * (_COMPRESSION if file.suffix in (*COMPRESSIONS, ".parquet") else 1) for file in files
    )


def bytes_a_token(experiment: Experiment, hidden_size: int, notes: list[str]) -> float:
    """Return the cache's bytes a token: of its finished shards, else of its budget, else of the measured tables."""
    cache, folder = experiment.cache, Folders.of(experiment).cache
    if (folder / MANIFEST).is_file():
        manifest = read_manifest(folder)
        entries = read_journal(folder, manifest).values()
        tokens = sum(entry.samples for entry in entries) * manifest.sequence_length
        if tokens:
            return sum(entry.bytes for entry in entries) / tokens
    if cache.bytes_per_token is not None:
        return cache.bytes_per_token
    notes.append(f"cache: bytes a token of scheme {cache.scheme} by the tables in distill/cache/README.md")
    if cache.scheme == "hidden":
        return 2.0 * hidden_size + _SCALARS
    if cache.scheme == "varopt":
        return _between(_VAROPT, cache.threshold)
    return _between(_TOP_K if cache.scheme == "top_k" else _RANDOM, cache.entries)


def _between(table: dict[float, float], at: float) -> float:
    """Return the value at `at`, linear on logarithmic scales; beyond the ends the last slope continues."""
    if len(table) == 1:
        return sum(value * at / place for place, value in table.items())
    places, values = (np.log(np.array(column)) for column in zip(*sorted(table.items()), strict=True))
    at = math.log(at)
    first = int(np.clip(np.searchsorted(places, at) - 1, 0, len(places) - 2))
    slope = (values[first + 1] - values[first]) / (places[first + 1] - places[first])
    return float(np.exp(values[first] + slope * (at - places[first])))


def cache_bytes(experiment: Experiment, each: float, samples: int | None) -> int | None:
    """Return the size of the whole cache."""
    if samples is None:
        return None
    shards = -(-samples // experiment.cache.shard_samples)
    return round(each * samples * experiment.corpus.sequence_length) + shards * _SHARD + 8 * samples


def moment_bytes(experiment: Experiment, trained_parameters: int, trained_bytes: int) -> int:
    """Return the size of both of AdamW's moments (and a compensation) on disk, wherever they are in memory."""
    each = {"adamw": 2.0 * trained_bytes / max(trained_parameters, 1), "adamw_4bit": 1 + 8 / 128}
    held = trained_parameters * each.get(experiment.train.optimizer, 2 + 8 / 256)
    return round(held + (2 * trained_parameters if experiment.train.rounding == "kahan" else 0))
