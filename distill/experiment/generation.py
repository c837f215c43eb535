"""The experiment's writer of texts, its prompts, and the manifest of the folder that it writes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from distill.corpus.own_reader import load_reader
from distill.corpus.reading import local_files
from distill.corpus.shapes import Columns
from distill.corpus.sources import TextSource
from distill.corpus.templates import prints_the_date
from distill.corpus.written import MANIFEST, Manifest, is_written, read_manifest
from distill.errors import UserError
from distill.experiment.configuration import Experiment
from distill.experiment.folders import Folders
from distill.experiment.roles import roles
from distill.experiment.subjects import Loaded, Subject, fresh_subject, teacher_subject, trained_subject
from distill.experiment.teacher import Teacher, day_of
from distill.experiment.teacher_sections import GenerateConfig, SourceConfig
from distill.generation.authors import LocalAuthor
from distill.generation.prompts import Asking, Prompts, read_prompts
from distill.generation.sampling import Sampling
from distill.generation.server import ServerAuthor
from distill.models import tokenizers
from distill.models.generation import context_length, context_of, end_of_turn, ending_tokens
from distill.models.vocabulary import FILE as VOCABULARY
from distill.models.vocabulary import Vocabulary
from distill.system.staging import recover

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "seed")
_SETTINGS = (*_SAMPLING, "max_new_tokens", "prompt_tokens", "system", "thinking")
"""Keys of `generate` that determine the texts, beside those that are numbers of the manifest itself."""


def folder_of(experiment: Experiment) -> Path:
    """Return the folder that the texts are written into. Raises UserError for a file."""
    generate = experiment.generate
    folder = Path(generate.to).expanduser() if generate.to else Folders.of(experiment).written
    if folder.exists() and not folder.is_dir():
        raise UserError(f"generate.to: {folder} is a file: name a folder")
    return folder


def prompt_sources(experiment: Experiment) -> list[TextSource]:
    """Return the sources of the prompts.

    Raises UserError for a folder of written texts, a file that is not there, and a hub data set without a limit.
    """
    generate, corpus = experiment.generate, experiment.corpus
    sources = corpus.all_sources
    if generate.prompts is not None:
        sources = [SourceConfig(generate.prompts, columns=generate.columns)]
    elif generate.columns:
        raise UserError("generate.columns: describes generate.prompts, which is not given: use corpus.columns")
    for path in (source.path for source in sources):
        if is_written(path) or Path(path).expanduser().resolve() == folder_of(experiment).resolve():
            raise UserError(f"generate.prompts: {path} is a folder of written texts: name the prompts to start from")
    is_here = {source.path: local_files(source.path, source.split, source.reader) is not None for source in sources}
    for source in sources:
        if source.revision is not None:
            raise UserError(f"generate.prompts: {source.path}: is read at its newest revision: leave the revision out")
        # Of a data set on the hub, no more is fetched than is written on.
        if not is_here[source.path] and not (source.limit or generate.max_prompts):
            raise UserError(
                f"generate.max_prompts: {source.path} is a hub data set, which would be read whole: give the number of "
                "prompts, or a file"
            )
    return [
        TextSource(
            source.path,
            source.name,
            source.split,
            Columns.of(source.columns, prompts=True),
            limit=source.limit or (None if is_here[source.path] else generate.max_prompts),
            reader=load_reader(source.reader),
        )
        for source in sources
    ]


def sampling_of(experiment: Experiment) -> Sampling:
    """Return the way of choosing tokens."""
    return Sampling(**{name: getattr(experiment.generate, name) for name in _SAMPLING})


@dataclass(frozen=True)
class Writer:
    """The model that writes, and the tokens in which it does."""

    experiment: Experiment
    teacher: Teacher

    @cached_property
    def _subject(self) -> Subject:
        if self.experiment.generate.by == "teacher":
            return teacher_subject(self.experiment, self.teacher)
        if self.experiment.generate.by == "fresh":
            return fresh_subject(self.experiment, self.teacher)
        name, folders = self.experiment.generate.by, Folders.of(self.experiment)
        found = [role for role in roles(self.experiment) if role.name == name]
        if not found:
            raise UserError(f"generate.by: {name}: this experiment trains none: give --evaluate.control true")
        recover(self._folder)
        if not self._folder.exists():
            raise UserError(f"{self._folder}: no trained {name} here: run `distill train-student` first")
        return trained_subject(self.experiment, folders, found[0], self.teacher, self._vocabulary)

    @property
    def _folder(self) -> Path:
        return Folders.of(self.experiment).model(self.experiment.generate.by)

    @cached_property
    def _vocabulary(self) -> Vocabulary | None:
        """The tokens of a student that has only some of the teacher's."""
        is_trained = self.experiment.generate.by in ("student", "control")
        is_trimmed = is_trained and (self._folder / VOCABULARY).exists()
        return Vocabulary.load(self._folder) if is_trimmed else None

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of the prompts: the teacher's, or that of a student of fewer tokens, with its template."""
        if self._vocabulary is None:
            return self.teacher.tokenizer
        tokenizer = tokenizers.load_folder_tokenizer(self._folder)
        tokenizer.chat_template = self.teacher.tokenizer.chat_template
        return tokenizer

    @cached_property
    def loaded(self) -> Loaded:
        """The model on its device."""
        return self._subject.load()

    @property
    def limit(self) -> int | None:
        """Tokens that the model can read; None if it does not say."""
        if self.experiment.generate.by == "teacher":
            return context_of(self.teacher.shape)
        return context_length(self.loaded.model)

    def in_teachers_ids(self, ids: list[int]) -> list[int]:
        """Return tokens of the writer under the teacher's numbers."""
        return ids if self._vocabulary is None else self._vocabulary.kept_ids[ids].tolist()

    @cached_property
    def server(self) -> ServerAuthor | None:
        """The server that writes in the teacher's place, or None. Raises UserError if it cannot."""
        generate, tokenizer = self.experiment.generate, self.teacher.tokenizer
        if generate.server is None:
            if generate.server_model is not None:
                raise UserError("generate.server_model: names a model of generate.server, which is not given")
            return None
        if generate.by != "teacher":
            raise UserError(f"generate.server: writes as the teacher; with generate.by {generate.by} leave it out")
        if not _is_address(generate.server):
            raise UserError(f"generate.server: {generate.server} is no address, such as http://127.0.0.1:8080/v1")
        return ServerAuthor(
            generate.server,
            generate.server_model,
            tokenizer=tokenizer,
            end_ids=(end_of_turn(tokenizer), tokenizer.eos_token_id),
            sampling=sampling_of(self.experiment),
            max_new_tokens=generate.max_new_tokens,
            batch_size=generate.batch_size,
        )

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """Fingerprints of the writer, and of the teacher's tokenizer and template, whose ids are stored."""
        teacher = tokenizers.tokenizer_fingerprint(self.teacher.tokenizer)
        if self.server is not None:  # whose weights nobody sees
            return {"writer": "server", "server_model": self.server.model, **teacher}
        found = {name: value for name, value in self._subject.identity.items() if isinstance(value, str)}
        others = {name: value for name, value in self._subject.identity.items() if name not in found}
        digest = hashlib.sha256(json.dumps([found, others], sort_keys=True).encode()).hexdigest()
        named = found if self.experiment.generate.by == "teacher" else {}
        return {"writer": self.experiment.generate.by, **named, "model": digest, **teacher}

    def author(self) -> LocalAuthor | ServerAuthor:
        """Return the writer, ready."""
        if self.server is not None:
            return self.server
        generate, loaded = self.experiment.generate, self.loaded
        return LocalAuthor(
            loaded.model,
            vocab_size=loaded.vocab_size,
            stop_ids=ending_tokens(loaded.model, self.tokenizer),
            sampling=sampling_of(self.experiment),
            max_new_tokens=generate.max_new_tokens,
            batch_size=generate.batch_size,
        )


def _is_address(server: str) -> bool:
    """Tell whether a text is the address of a server: http or https, a host, and a port if any."""
    try:
        parts = urllib.parse.urlsplit(server)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number
        return False


def open_prompts(experiment: Experiment, writer: Writer) -> tuple[Prompts, Manifest]:
    """Read the prompts, and return them with the manifest of their folder. Raises UserError as `prompts_of`."""
    generate = experiment.generate
    prompts, date = prompts_of(experiment, writer)
    settings = {name: getattr(generate, name) for name in _SETTINGS} | ({} if date is None else {"date": date})
    manifest = Manifest(
        kind=prompts.kind,
        prompts=len(prompts),
        samples_per_prompt=generate.samples_per_prompt,
        group=generate.group,
        fingerprints={**writer.fingerprints, "prompts": prompts.fingerprint},
        settings=settings,
    )
    return prompts, manifest


def prompts_of(experiment: Experiment, writer: Writer) -> tuple[Prompts, str | None]:
    """Read the prompts, and return them with the day that their chat template prints, if it does.

    That is the day on which their folder was begun. Raises UserError for prompts that cannot be written on.
    """
    generate, corpus = experiment.generate, experiment.corpus
    folder, date = folder_of(experiment), None
    if prints_the_date(writer.tokenizer):
        begun = read_manifest(folder).settings.get("date") if (folder / MANIFEST).exists() else None
        date = day_of(corpus.date or begun)
    with _named_as_given(generate):
        prompts = read_prompts(
            prompt_sources(experiment),
            writer.tokenizer,
            Asking(generate.prompt_tokens, generate.system, generate.thinking, date),
            bad_rows=corpus.bad_rows,
            limit=writer.limit,
            most=generate.max_prompts,
        )
    return prompts, date


@contextlib.contextmanager
def _named_as_given(generate: GenerateConfig) -> Iterator[None]:
    """Rename the key in messages about columns to the one that describes these prompts."""
    try:
        yield
    except UserError as error:
        if generate.prompts is None or "corpus.columns" not in str(error):
            raise
        raise UserError(str(error).replace("corpus.columns", "generate.columns")) from error
