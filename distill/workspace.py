"""From an experiment to the things it names: folders, tokenizer, samples, models. What several recipes need."""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill import plugins
from distill.cache import token_order
from distill.cache.format import Manifest, differences
from distill.cache.reader import CacheReader
from distill.cache.storage import Storage, UrlStorage, is_url, open_storage
from distill.cache.token_order import TokenOrder, token_counts
from distill.config import Experiment
from distill.corpus import SampleSets, open_corpus
from distill.errors import UserError
from distill.models import checkpoints, devices, tokenizers
from distill.models.isolation import isolates_documents
from distill.models.vocabulary import Vocabulary
from distill.progress import say
from distill.targets import schemes


@dataclass(frozen=True)
class Folders:
    """Where an experiment keeps what it makes."""

    run: Path
    cache: Path

    @classmethod
    def of(cls, experiment: Experiment) -> Folders:
        run = Path(experiment.run_dir)
        return cls(run, Path(experiment.cache.dir) if experiment.cache.dir else run / "cache")

    @property
    def evaluation(self) -> Path:
        return self.run / "evaluation.json"

    def model(self, role: str) -> Path:
        """The finished `student` or `control`."""
        return self.run / role

    def checkpoints(self, role: str) -> Path:
        return self.run / "checkpoints" / role

    def logs(self, role: str) -> Path:
        return self.run / "logs" / role


def make_run_folder(folders: Folders) -> None:
    """Raises UserError when the run folder cannot be written."""
    try:
        folders.run.mkdir(parents=True, exist_ok=True)
        probe = folders.run / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"run_dir {folders.run}: cannot be written ({error.strerror}): choose another") from None


class Teacher:
    """The experiment's teacher: what is cheap to know at once, the model itself when it is asked for."""

    def __init__(self, experiment: Experiment) -> None:
        self.config = experiment.teacher
        self.checkpoint = checkpoints.resolve(self.config.model, self.config.revision, self.config.trust_remote_code)
        self.tokenizer = tokenizers.load_tokenizer(
            self.checkpoint, self.config.tokenizer, self.config.trust_remote_code
        )
        self.vocab_size = tokenizers.vocab_size(self.tokenizer)
        self.device = devices.pick_device(experiment.train.accelerator)
        self.compute_dtype = devices.compute_dtype(self.config.compute_dtype, self.device)
        config = checkpoints.load_config(self.checkpoint, self.config.trust_remote_code)
        config = getattr(config, "text_config", config)
        self.hidden_size: int = config.hidden_size
        self._check_length(experiment.corpus.sequence_length, getattr(config, "max_position_embeddings", None))

    def _check_length(self, sequence_length: int, limit: int | None) -> None:
        if limit is not None and sequence_length > limit:
            raise UserError(
                f"corpus.sequence_length: {sequence_length} is beyond the {limit} tokens of {self.checkpoint.name}"
            )

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """teacher_config, teacher_weights, quantization, tokenizer, chat_template."""
        weights = checkpoints.fingerprints(self.checkpoint)
        return {
            "teacher_config": weights["config"],
            "teacher_weights": weights["weights"],
            "quantization": f"{self.config.quantization}, {self.compute_dtype}",
            **tokenizers.tokenizer_fingerprint(self.tokenizer),
        }

    def load(self, pack: bool) -> Any:
        """The model on its device; checked that it can read the vocabulary and, packed, keeps documents apart."""
        offered = {
            "model": self.config.model,
            "quantization": self.config.quantization,
            "compute_dtype": self.compute_dtype,
            "device": str(self.device),
            "revision": self.config.revision,
            "trust_remote_code": self.config.trust_remote_code,
        }
        model = plugins.build(self.config.class_path, "teacher", self.config.options, offered)
        check_model(model, f"teacher {self.config.model}", self.vocab_size, self.device, pack)
        return model


def check_model(model: Any, name: str, vocab_size: int, device: torch.device, pack: bool) -> None:
    """Raises UserError when the head lacks tokens, or documents packed into one sample see one another."""
    rows = model.head.weight_VD.shape[0]
    if rows < vocab_size:
        raise UserError(f"{name}: its head has {rows} rows, the tokenizer {vocab_size} tokens: not the same vocabulary")
    if pack and not isolates_documents(model, vocab_size, device):
        raise UserError(
            f"{name}: packed documents see one another in this model (its state runs across position_ids that restart "
            "at 0): cache and train with --corpus.pack false"
        )


def check_length(model: Any, name: str, sequence_length: int) -> None:
    """Raises UserError when samples are longer than a Hugging Face model says it can read."""
    config = getattr(getattr(model, "model", None), "config", None)
    limit = getattr(config, "max_position_embeddings", None)
    if isinstance(limit, int) and sequence_length > limit:
        raise UserError(f"{name}: it reads {limit} tokens, the cache has samples of {sequence_length} tokens")


def open_samples(experiment: Experiment, teacher: Teacher) -> SampleSets:
    """The corpus as samples of the teacher's tokens."""
    corpus = experiment.corpus
    return open_corpus(
        corpus.path,
        teacher.tokenizer,
        sequence_length=corpus.sequence_length,
        name=corpus.name,
        split=corpus.split,
        text_field=corpus.text_field,
        messages_field=corpus.messages_field,
        pack=corpus.pack,
        held_out=corpus.held_out,
        seed=corpus.seed,
    )


def make_scheme(experiment: Experiment, hidden_size: int) -> schemes.AnyScheme:
    """The scheme of the experiment's cache. Raises UserError for an option that the scheme does not have."""
    cache = experiment.cache
    if cache.draws > 1 and cache.scheme != "varopt":
        raise UserError(f"cache.draws: {cache.draws} draws go with scheme varopt, not {cache.scheme}")
    parameters: dict[str, dict[str, Any]] = {
        "varopt": {"threshold": cache.threshold, "draws": cache.draws},
        "top_k": {"entries": cache.entries},
        "random": {"entries": cache.entries, "exponent": cache.exponent},
        "hidden": {"size": hidden_size},
    }
    return schemes.make(cache.scheme, **parameters[cache.scheme])


def with_budgeted_threshold(experiment: Experiment, found: Manifest) -> Experiment:
    """The experiment with the threshold that was chosen for its `cache.bytes_per_token` when `found` was made."""
    cache = experiment.cache
    if cache.bytes_per_token is None or found.made_with.get("bytes_per_token") != f"{cache.bytes_per_token:g}":
        return experiment
    threshold = found.scheme_parameters.get("threshold", cache.threshold)
    return replace(experiment, cache=replace(cache, threshold=threshold))


def make_token_order(experiment: Experiment, teacher: Teacher, samples: SampleSets) -> TokenOrder:
    """The order of the tokens in the experiment's cache: by their frequency in its training samples."""
    count = min(len(samples.train), experiment.cache.max_samples or len(samples.train))
    return TokenOrder.by_frequency(token_counts(samples.train, count, teacher.vocab_size))


def make_manifest(experiment: Experiment, teacher: Teacher, samples: SampleSets, order: TokenOrder) -> Manifest:
    """What the experiment's cache must be."""
    corpus, cache = experiment.corpus, experiment.cache
    held_out = min(len(samples.held_out), cache.held_out_samples)
    train = len(samples.train) if cache.max_samples is None else min(len(samples.train), cache.max_samples)
    scheme = make_scheme(experiment, teacher.hidden_size)
    return Manifest(
        scheme=scheme.name,
        scheme_parameters=schemes.parameters(scheme),
        temperature=cache.temperature,
        seed=cache.seed,
        vocab_size=teacher.vocab_size,
        sequence_length=corpus.sequence_length,
        pack=corpus.pack,
        shard_samples=cache.shard_samples,
        splits={"held_out": [0, held_out], "train": [held_out, held_out + train]},
        fingerprints={
            **teacher.fingerprints,
            "corpus": samples.fingerprint,
            token_order.FINGERPRINT: order.fingerprint,
            "packing": f"held out {corpus.held_out}, seed {corpus.seed}",
        },
        made_with={name: importlib.metadata.version(name) for name in ("torch", "transformers", "bitsandbytes")}
        | ({"bytes_per_token": f"{cache.bytes_per_token:g}"} if cache.bytes_per_token is not None else {}),
    )


def open_cache(experiment: Experiment) -> Storage:
    """The finished cache to read from: the folder that was made, or a URL."""
    cache = experiment.cache
    location = cache.dir if cache.dir and is_url(cache.dir) else Folders.of(experiment).cache
    storage = open_storage(location, local_copy_bytes=int(cache.local_copy_gb * 1e9))
    if isinstance(storage, UrlStorage) and storage.bytes > storage.limit:
        say(
            f"cache {storage.name}: {storage.bytes / 1e9:,.1f} GB, more than the local copies may take "
            "(cache.local_copy_gb): its shards will be fetched many times, as samples are read in random order"
        )
    return storage


def check_cache_settings(experiment: Experiment, found: Manifest, folder: str) -> None:
    """Raises UserError when the experiment asks for a cache other than `found`, as far as its own settings tell."""
    experiment = with_budgeted_threshold(experiment, found)
    scheme = make_scheme(experiment, found.scheme_parameters.get("size", 0))
    expected = Manifest(
        **{
            **found.__dict__,
            "scheme": scheme.name,
            "scheme_parameters": schemes.parameters(scheme),
            "temperature": experiment.cache.temperature,
            "seed": experiment.cache.seed,
            "sequence_length": experiment.corpus.sequence_length,
            "pack": experiment.corpus.pack,
        }
    )
    different = differences(expected, found)
    if different:
        raise UserError(
            f"cache {folder} was made with other settings ({'; '.join(different)}): "
            "give the settings it was made with, or point --cache.dir elsewhere"
        )


Calibration = Callable[[int], tuple[Tensor, Tensor, Tensor]]
"""count -> token ids, position ids and loss mask `[count, L]` of the first training samples."""


def calibration_samples(reader: CacheReader) -> Calibration:
    """The first training samples, for students that look at text while they are made."""

    def first(count: int) -> tuple[Tensor, Tensor, Tensor]:
        batch = reader.collate([reader[index] for index in range(min(count, len(reader)))])
        return batch.input_ids_BL, batch.position_ids_BL, batch.loss_mask_BL

    return first


def build_student(
    experiment: Experiment, vocab_size: int, calibration: Calibration, vocabulary: Vocabulary | None = None
) -> tuple[Any, dict[str, Any]]:
    """A fresh student from the experiment's seed, and the complete options it was made with.

    With a `vocabulary` it has these of the teacher's tokens alone: made so, or trimmed.
    """
    rows = vocab_size if vocabulary is None else len(vocabulary.kept_ids)
    offered = {
        "vocab_size": rows,
        "sequence_length": experiment.corpus.sequence_length,
        "teacher": experiment.teacher.model,
        "calibration": calibration,
        "device": str(devices.pick_device(experiment.train.accelerator)),
    }
    student = experiment.student
    options = plugins.arguments(student.class_path, "student", student.options, offered)
    torch.manual_seed(experiment.train.seed)
    model = plugins.build(student.class_path, "student", options, {})
    if vocabulary is not None and model.head.weight_VD.shape[0] >= vocabulary.full_size > rows:
        if not hasattr(model, "keep_tokens"):
            raise UserError(
                f"student {student.class_path}: its head has all of the teacher's tokens, and no method "
                "keep_tokens: build it with the vocab_size that it is given, or use --student.vocabulary full"
            )
        model.keep_tokens(vocabulary.kept_ids)
    return model, options


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content`, readable, all of it or nothing."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)
