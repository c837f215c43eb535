"""The models that an evaluation measures: the teacher, the student before and after training, the controls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill import plugins
from distill.corpus import SampleSets
from distill.errors import UserError
from distill.experiment import settings
from distill.experiment.cache import packing_fingerprint
from distill.experiment.checks import check_model, offered_options, run_apart
from distill.experiment.configuration import Experiment
from distill.experiment.folders import Folders
from distill.experiment.plugin_files import without_place
from distill.experiment.roles import Role, own_settings, roles
from distill.experiment.stages import round_folder
from distill.experiment.student import FirstSamples, make_student
from distill.experiment.teacher import Teacher
from distill.models.checkpoints import weight_files
from distill.models.contract import in_type
from distill.models.tokenizers import load_folder_tokenizer
from distill.models.vocabulary import Vocabulary
from distill.plugins import load_language_model
from distill.system.files import sha256_of
from distill.system.staging import recover

ROUND = "round"
"""First word of the names of students of earlier rounds."""
_OF_A_SAMPLE = ("input_ids", "position_ids", "loss_mask")


@dataclass(frozen=True)
class Loaded:
    """A model on its device, and its own tokenizer: a student of fewer tokens has another than the teacher."""

    model: Any
    tokenizer: Any
    vocab_size: int


@dataclass(frozen=True)
class Subject:
    """One model to measure."""

    name: str
    """Name: teacher, before, student, control, a further seed's such as seeds/1/student, or an earlier `round 0`."""
    identity: dict[str, Any]
    """Values that change whenever the model does. Measurements of the same identity stay."""
    weights: list[Path]
    """Files of its weights; none if it was not saved."""
    load: Callable[[], Loaded]


def trained_roles(experiment: Experiment, folders: Folders, corpus: str) -> list[Role]:
    """Return the trained roles, none of which has seen held-out text of the experiment (`corpus` is its fingerprint).

    Raises UserError if a model is missing, was trained with other settings, or has seen the text to be measured on.
    """
    found = roles(experiment)
    for role in found:
        folder = folders.model(role.name)
        recover(folder)
        if not folder.exists():
            raise UserError(f"{folder}: no trained {role.name} here: run `distill train-student` first")
        own = own_settings(role.own(experiment), role)
        different = [line for line in settings.differences(folder, own) if line.split(".")[0].split(":")[0] in own]
        different = [line for line in different if not line.startswith(settings.SOURCE)]  # said on loading
        if different:
            raise UserError(
                f"{folder} was trained with other settings ({'; '.join(different)}): give those of its training"
            )
        _check_held_out(experiment, folder, corpus)
    return found


def _check_held_out(experiment: Experiment, folder: Path, corpus: str) -> None:
    made_from = settings.read(folder)["cache"]["fingerprints"]
    split = packing_fingerprint(experiment)
    if made_from["corpus"] == corpus and made_from["packing"] != split:
        raise UserError(
            f"{folder} was trained with '{made_from['packing']}' of this corpus, here it is '{split}': it has "
            "seen what would be held out: give the corpus.held_out and corpus.seed of its training"
        )


def kept_vocabulary(experiment: Experiment, folders: Folders) -> Vocabulary | None:
    """Return the tokens of students that have only some of the teacher's. Raises UserError if the students' differ."""
    if experiment.student.vocabulary == "full":
        return None
    vocabularies = [Vocabulary.load(folders.model(role.name)) for role in roles(experiment)]
    if len({vocabulary.fingerprint for vocabulary in vocabularies}) > 1:
        raise UserError(f"{folders.run}: student and control have other tokens: train the control again")
    return vocabularies[0]


def all_subjects(
    experiment: Experiment, folders: Folders, teacher: Teacher, samples: SampleSets, vocabulary: Vocabulary | None
) -> list[Subject]:
    """Return the teacher first, then the student before training, those of earlier rounds, and the trained models."""
    trained = [trained_subject(experiment, folders, role, teacher, vocabulary) for role in roles(experiment)]
    role, earlier = roles(experiment)[0], []
    for name, folder in earlier_rounds(experiment).items():
        subject = trained_subject(experiment, Folders.of_training(folder), role, teacher, vocabulary)
        earlier.append(replace(subject, name=name))
    return [teacher_subject(experiment, teacher), _before(experiment, teacher, samples, vocabulary), *earlier, *trained]


def earlier_rounds(experiment: Experiment) -> dict[str, Path]:
    """Return the folders of the rounds before the last whose students are there, by name: `round 0`, `round 1`, …"""
    folders = {number: round_folder(experiment, number) for number in range(experiment.rounds.count)}
    return {f"{ROUND} {number}": folder for number, folder in folders.items() if (folder / "student").is_dir()}


def teacher_subject(experiment: Experiment, teacher: Teacher) -> Subject:
    """Return the teacher."""
    plugin = {"class_path": without_place(experiment.teacher.class_path), "options": experiment.teacher.options}

    def load() -> Loaded:
        return Loaded(teacher.load(), teacher.tokenizer, teacher.vocab_size)

    return Subject("teacher", {**teacher.fingerprints, "plugin": plugin}, weight_files(teacher.checkpoint), load)


def _before(experiment: Experiment, teacher: Teacher, samples: SampleSets, vocabulary: Vocabulary | None) -> Subject:
    first = _first_samples(samples, experiment.cache.max_samples)
    looked_at = [samples.fingerprint, experiment.cache.max_samples]
    return _untrained("before", experiment, teacher, first, looked_at, vocabulary)


def fresh_subject(experiment: Experiment, teacher: Teacher) -> Subject:
    """Return the student before any training, and before there is a corpus that its class could look at."""
    return _untrained("fresh", experiment, teacher, None, [], None)


def _untrained(
    name: str,
    experiment: Experiment,
    teacher: Teacher,
    first: FirstSamples | None,
    looked_at: list[Any],
    vocabulary: Vocabulary | None,
) -> Subject:
    def load() -> Loaded:
        def make(dtype: torch.dtype) -> Any:
            model = make_student(experiment, teacher.place, teacher.vocab_size, first, vocabulary)[0]
            return model.to(device=teacher.device, dtype=dtype).eval()

        model = in_type(make, _dtype(experiment), f"student {experiment.student.class_path}")
        return Loaded(model, teacher.tokenizer, _tokens(teacher, vocabulary))

    identity = {
        "teacher": teacher.fingerprints,
        "student": asdict(experiment.student),
        "seed": experiment.train.seed,
        "first_samples": looked_at,
        "dtype": experiment.evaluate.student_dtype,
        **_code(experiment.student.class_path),
    }
    return Subject(name, identity, [], _checked_once(experiment, load))


def trained_subject(
    experiment: Experiment, folders: Folders, role: Role, teacher: Teacher, vocabulary: Vocabulary | None
) -> Subject:
    """Return the finished model of a role. Its folder must be there."""
    folder = folders.model(role.name)
    weights = sorted(folder.glob("*.safetensors"))

    def load() -> Loaded:
        student = experiment.student
        options = {**offered_options(experiment, str(teacher.device), teacher.vocab_size), **student.options}
        model = load_language_model(folder, teacher.device, _dtype(experiment), student.class_path, options)
        return Loaded(model, load_folder_tokenizer(folder), _tokens(teacher, vocabulary))

    files = sorted(path for path in folder.iterdir() if path.is_file())
    identity = {file.name: sha256_of(file) for file in files} | _code(experiment.student.class_path)
    identity["dtype"] = experiment.evaluate.student_dtype
    return Subject(role.name, identity, weights, _checked_once(experiment, load))


def _dtype(experiment: Experiment) -> torch.dtype:
    return getattr(torch, experiment.evaluate.student_dtype)


def _code(class_path: str) -> dict[str, str]:
    """Return the hash of the source of the user's own class."""
    return {} if plugins.is_built_in(class_path, "student") else {"code": plugins.source_of(class_path, "student")}


def _tokens(teacher: Teacher, vocabulary: Vocabulary | None) -> int:
    return teacher.vocab_size if vocabulary is None else len(vocabulary)


def _checked_once(experiment: Experiment, load: Callable[[], Loaded]) -> Callable[[], Loaded]:
    """Return `load` with a check of the first model that it makes. It makes the same one each time."""
    runs_apart: bool | None = None  # until it is checked

    def load_checked() -> Loaded:
        nonlocal runs_apart
        loaded, corpus = load(), experiment.corpus
        if runs_apart is None:
            name = f"student {experiment.student.class_path}"
            length, packs = corpus.sequence_length, corpus.shares_samples
            runs_apart = check_model(loaded.model, name, loaded.vocab_size, packs, length=length, tells=False)
        if runs_apart:
            run_apart(loaded.model)
        return loaded

    return load_checked


def _first_samples(samples: SampleSets, max_samples: int | None) -> FirstSamples:
    """Return the first training samples, as the student saw them in the cache while it was made, without the cache."""

    def first(count: int) -> tuple[Tensor, Tensor, Tensor]:
        rows = [samples.train[index] for index in range(min(count, len(samples.train), max_samples or count))]
        ids_BL, positions_BL, mask_BL = (torch.stack([row[name] for row in rows]) for name in _OF_A_SAMPLE)
        return ids_BL, positions_BL, mask_BL

    return first
