"""The experiment's teacher, and its corpus in the teacher's tokens."""

from __future__ import annotations

import datetime
import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from distill import plugins
from distill.corpus import SampleSets, open_corpus
from distill.corpus.own_reader import load_reader
from distill.corpus.packing import Packing
from distill.corpus.shapes import Columns
from distill.corpus.sources import TextSource
from distill.corpus.templates import Learning, prints_the_date
from distill.errors import UserError, nearest_path
from distill.experiment.checks import check_length, check_model, run_apart
from distill.experiment.configuration import Experiment
from distill.experiment.folders import Folders
from distill.experiment.place import Place
from distill.models import checkpoints, packing, tokenizers
from distill.models.chat_templates import LONGEST_TEMPLATE
from distill.models.generation import context_of
from distill.system.files import last_part, names_only, read_bounded
from distill.system.quiet import quiet_transformers


class Teacher:
    """The experiment's teacher: cheap facts at once, tokenizer and model on request."""

    def __init__(self, experiment: Experiment, place: Place) -> None:
        """Find the checkpoint. Raises UserError if it is missing, or reads fewer tokens than a sample has."""
        self.config, self.place, self.device = experiment.teacher, place, place.device
        self._copy = Folders.of(experiment).quantized_teacher
        self.corpus, self._is_checked, self._runs_apart = experiment.corpus, False, False
        with place.making(), quiet_transformers():
            self.checkpoint = checkpoints.resolve(
                self.config.model, self.config.revision, self.config.trust_remote_code
            )
            self.shape = checkpoints.load_config(self.checkpoint, self.config.trust_remote_code).get_text_config()
        self.compute_dtype = place.compute_dtype(self.config.compute_dtype)
        check_length(context_of(self.shape), self.checkpoint.name, self.corpus.sequence_length)

    @property
    def hidden_size(self) -> int:
        """Size D of the final hidden states."""
        return int(self.shape.hidden_size)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer that the experiment names, else the checkpoint's own, with the corpus's chat template."""
        tokenizer = tokenizers.load_tokenizer(self.checkpoint, self.config.tokenizer, self.config.trust_remote_code)
        if self.corpus.chat_template is not None:
            tokenizer.chat_template = read_template(self.corpus.chat_template)
        return tokenizer

    @cached_property
    def vocab_size(self) -> int:
        """Size V of the tokenizer's vocabulary; the head may have more rows."""
        return tokenizers.vocab_size(self.tokenizer)

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """Fingerprints teacher_config, teacher_weights, quantization, tokenizer, chat_template."""
        weights = checkpoints.fingerprints(self.checkpoint, self.config.trust_remote_code)
        return {
            "teacher_config": weights["config"],
            "teacher_weights": weights["weights"],
            "quantization": f"{self._quantization()}, {self.compute_dtype}",
            **tokenizers.tokenizer_fingerprint(self.tokenizer),
            **self._own_class(),
        }

    def _quantization(self) -> str:
        """Return the quantisation as it really is; a class of the user's own quantises as it likes."""
        if not plugins.is_built_in(self.config.class_path, "teacher"):
            return self.config.quantization
        with quiet_transformers():
            return packing.described(self.checkpoint, self.config.quantization, self.config.trust_remote_code)

    def _own_class(self) -> dict[str, str]:
        """Return the fingerprint of a class of the user's own: its name, its code and all of its options."""
        name = self.config.class_path
        if plugins.is_built_in(name, "teacher"):
            return {}
        options = names_only({**plugins.defaults(name, "teacher"), **self.config.options})
        text = json.dumps([last_part(name), plugins.source_of(name, "teacher"), options], sort_keys=True)
        return {"teacher_class": hashlib.sha256(text.encode()).hexdigest()}

    def load(self) -> Any:
        """Make the model on its device. The first one that has values is tried for the contract of body and head."""
        offered = {
            "model": self.config.model,
            "quantization": self.config.quantization,
            "compute_dtype": self.compute_dtype,
            "device": str(self.place.device),
            "revision": self.config.revision,
            "trust_remote_code": self.config.trust_remote_code,
            "quantized_copy": str(self._copy),
        }
        with self.place.making():
            model = plugins.build(self.config.class_path, "teacher", self.config.options, offered)
        if self.place.has_memory and not self._is_checked:  # every pass of a streamed teacher reads all weights
            name, corpus = f"teacher {self.config.model}", self.corpus
            self._runs_apart = check_model(
                model, name, self.vocab_size, corpus.shares_samples, length=corpus.sequence_length
            )
            self._is_checked = True
        if self._runs_apart:
            run_apart(model)
        return model


@dataclass(frozen=True)
class Begun:
    """Facts of a cache that was begun, where the experiment leaves its text open."""

    date: str | None = None
    """The day that its chat template prints."""
    packing: Packing | None = None
    corpus: str | None = None
    """Fingerprint of its corpus."""
    is_streamed: bool | None = None
    """True if it is of a stream, which is read in part; None without a cache."""
    revision: str | None = None
    """Commit of its hub data set."""


NOTHING_BEGUN = Begun()


def open_samples(
    experiment: Experiment, teacher: Teacher, begun: Begun = NOTHING_BEGUN, evaluated: int | None = None
) -> SampleSets:
    """Open the corpus as samples of the teacher's tokens, as a cache that was begun has them.

    A stream is read as far as the cache needs it, and so many `evaluated` held-out samples.
    """
    corpus = experiment.corpus
    return open_corpus(
        [
            TextSource(
                source.path,
                source.name,
                source.split,
                Columns.of(source.columns),
                source.weight,
                source.limit,
                source.revision,
                load_reader(source.reader),
            )
            for source in corpus.all_sources
        ],
        teacher.tokenizer,
        sequence_length=corpus.sequence_length,
        learning=Learning(
            corpus.learn,
            corpus.thoughts == "keep",
            day_of(corpus.date or begun.date) if prints_the_date(teacher.tokenizer) else None,
        ),
        pack=corpus.pack,
        long=corpus.long,
        begun=begun.packing,
        bad_rows=corpus.bad_rows,
        cut=corpus.cut_texts,
        held_out=corpus.held_out,
        seed=corpus.seed,
        begun_with=begun.corpus,
        is_streamed=begun.is_streamed,
        revision=corpus.revision or begun.revision,
        most=experiment.cache.max_samples,
        most_held_out=max(experiment.cache.held_out_samples, evaluated or 0),
    )


def read_template(path: str) -> str:
    """Return the text of a chat template's file. Raises UserError if it cannot be read."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"corpus.chat_template: {path}: no such file{nearest_path(file, cutoff=0.5)}")
    try:
        return read_bounded(file, LONGEST_TEMPLATE).decode("utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"corpus.chat_template: {path}: cannot be read as UTF-8 text ({error})") from error


def day_of(text: str | None) -> str:
    """Return a day as YYYY-MM-DD, today's for None. Raises UserError for a text that is none."""
    if text is None:
        return datetime.date.today().isoformat()
    try:
        return datetime.date.fromisoformat(text).isoformat()
    except ValueError as error:
        raise UserError(f"corpus.date: '{text}' is no day: write it as 2026-11-30") from error
