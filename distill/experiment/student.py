"""A fresh student of the experiment, to be measured or to be trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill import plugins
from distill.cache.reading.mixture import MixedReader
from distill.cache.reading.reader import CacheReader
from distill.errors import UserError
from distill.experiment.checks import check_length, check_model, offered_options
from distill.experiment.configuration import Experiment
from distill.experiment.place import Place
from distill.experiment.search import Search, asked, candidate_options, sized, with_found_sizes
from distill.models import checkpoints, tokenizers
from distill.models.contract import checked_head
from distill.models.generation import context_length
from distill.models.huggingface import HuggingFaceLanguageModel, parameters_of
from distill.models.vocabulary import Vocabulary
from distill.system.progress import say
from distill.system.quiet import quiet_transformers
from distill.system.seeds import seed_all
from distill.training.activation_checkpointing import checkpoint_blocks

FirstSamples = Callable[[int], tuple[Tensor, Tensor, Tensor]]
"""Function: count -> token ids, position ids and loss mask `[count, L]` of the first training samples."""


def first_samples(reader: CacheReader | MixedReader) -> FirstSamples:
    """Return the first training samples of a cache, for students that look at text while they are made."""

    def first(count: int) -> tuple[Tensor, Tensor, Tensor]:
        batch = reader.collate([reader[index] for index in range(min(count, len(reader)))])
        return batch.input_ids_BL, batch.position_ids_BL, batch.loss_mask_BL

    return first


def make_student(
    experiment: Experiment,
    place: Place,
    vocab_size: int,
    samples: FirstSamples | None = None,
    vocabulary: Vocabulary | None = None,
) -> tuple[Any, dict[str, Any]]:
    """Make a student from the experiment's seed, on the host; return it and the complete options it was made with.

    `vocab_size`: the teacher's tokens. With a `vocabulary` the student has only these tokens: made so, or trimmed.
    Raises UserError if it reads fewer tokens than a sample has, or its head has too few rows.
    """
    tokens = vocab_size if vocabulary is None else len(vocabulary)
    experiment = with_sizes(experiment, place, tokens)
    student, name = experiment.student, f"student {experiment.student.class_path}"
    with place.making():
        offered = offered_options(experiment, str(place.device), tokens, samples)
        options = plugins.arguments(student.class_path, "student", student.options, offered)
        seed_all(experiment.train.seed)
        model = plugins.build(student.class_path, "student", options, {})
    if vocabulary is not None:
        _trim(model, name, vocabulary)
    check_length(context_length(model), name, experiment.corpus.sequence_length)
    checked_head(model, name, tokens)
    return model, {**plugins.defaults(student.class_path, "student"), **options}


@dataclass(frozen=True)
class Pretrained:
    """The checkpoint that a student's weights come from, as the user names it."""

    option: str
    """The option that names it."""
    name: str
    revision: str | None

    @classmethod
    def of(cls, experiment: Experiment) -> Pretrained | None:
        """Return that of the experiment's student; None for a fresh one."""
        student = experiment.student
        option = plugins.declared(student.class_path, "student", "pretrained")
        name = student.options.get(option) if option else None
        revision = student.options.get("revision") or student.options.get("teacher_revision")
        return cls(option, name, revision) if isinstance(name, str) else None


def candidates(experiment: Experiment, place: Place, search: Search, vocab_size: int) -> list[dict[str, Any]]:
    """Return the sizes of the students that a search tries, as options, the largest to train first."""
    teacher, total = experiment.teacher, 0
    with place.making(), quiet_transformers():
        if search.share is not None:
            checkpoint = checkpoints.resolve(teacher.model, teacher.revision, teacher.trust_remote_code)
            total = parameters_of(checkpoint, teacher.trust_remote_code)
        return candidate_options(experiment, search, offered_options(experiment, str(place.device), vocab_size), total)


def with_sizes(experiment: Experiment, place: Place, vocab_size: int) -> Experiment:
    """Return the experiment with a student of known sizes: given, found by a search, or its largest candidate."""
    experiment = with_found_sizes(experiment)
    search = asked(experiment)
    if search is None:
        return experiment
    return sized(experiment, candidates(experiment, place, search, vocab_size)[0])


def check_tokens(experiment: Experiment, place: Place, tokenizer: Any) -> None:
    """Raise UserError if the student is a pretrained one whose tokens are not those of the teacher's `tokenizer`.

    Its folder's own tokenizer is compared. One without a tokenizer is believed, and said.
    """
    student, pretrained = experiment.student, Pretrained.of(experiment)
    if pretrained is None or (pretrained.name == experiment.teacher.model and experiment.teacher.tokenizer is None):
        return
    name = pretrained.name
    is_trusted = student.options.get("trust_remote_code") is True
    with place.making(), quiet_transformers():
        checkpoint = checkpoints.resolve(name, pretrained.revision, is_trusted)
    if not tokenizers.is_here(checkpoint):
        if place.has_memory:
            say(f"student {student.class_path}: {name} has no tokenizer, so its tokens are taken to be the teacher's")
        return
    with quiet_transformers():
        theirs = tokenizers.load_tokenizer(checkpoint, trust_remote_code=is_trusted)
    if (difference := tokenizers.difference(theirs, tokenizer)) is not None:
        raise UserError(
            f"student {student.class_path}: {name} has another tokenizer than the teacher ({difference}): it cannot "
            "learn from this teacher; give a model of the teacher's own family, or a fresh student of any architecture "
            "(student.class_path compact, or huggingface with student.options.config)"
        )


def make_student_to_train(
    experiment: Experiment,
    place: Place,
    vocab_size: int,
    samples: FirstSamples | None = None,
    vocabulary: Vocabulary | None = None,
) -> tuple[Any, dict[str, Any], int]:
    """Make a student as `make_student` does, tried out, with the levers of its training.

    Return also the number of blocks whose activations are recomputed. Raises UserError as well for a student that
    breaks the contract of body and head, and for a lever that it cannot take.
    """
    config, name = experiment.train, f"student {experiment.student.class_path}"
    model, options = make_student(experiment, place, vocab_size, samples, vocabulary)
    if place.has_memory:
        tokens, corpus = vocab_size if vocabulary is None else len(vocabulary), experiment.corpus
        check_model(model, name, tokens, corpus.shares_samples, length=corpus.sequence_length, trains=True)
        for note in getattr(model, "notes", ()):
            say(f"{name}: {note}")
    recomputed = 0
    if config.activation_checkpointing:
        try:
            recomputed = checkpoint_blocks(model, config.checkpoint_every_k)
        except ValueError as error:
            raise UserError(f"{name}: {error}: leave --train.activation_checkpointing off") from None
    if config.precision == "bf16-true":
        model.to(torch.bfloat16)
    return model, options, recomputed


def _trim(model: Any, name: str, vocabulary: Vocabulary) -> None:
    """Cut a student of all the teacher's tokens down to the kept ones; one made with these alone has them already.

    Raises UserError for a head of any other size, whose rows are another tokenizer's tokens, and for students that
    would be cut and could not be made again so from their options.
    """
    rows, kept, full = model.head.weight_VD.shape[0], len(vocabulary), vocabulary.full_size
    if rows == kept or rows >= full == kept:
        return
    if rows < full:
        raise UserError(
            f"{name}: its head has {rows} rows; student.vocabulary corpus takes all of the teacher's {full} tokens, to "
            f"be trimmed, or the {kept} kept ones: set no size for a fresh student; a pretrained one of another "
            "tokenizer cannot learn from this teacher"
        )
    if not isinstance(model, HuggingFaceLanguageModel):
        raise UserError(
            f"{name}: its head has all of the teacher's tokens, and only Hugging Face models are trimmed: build it "
            "with the vocab_size that it is given, or use --student.vocabulary full"
        )
    model.keep_tokens(vocabulary.kept_ids)
