"""`distill evaluate`: the student, before and after training, and the control beside their live teacher."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset

from distill import settings
from distill.config import Experiment
from distill.corpus import SampleSets
from distill.errors import UserError
from distill.evaluation.fidelity import covered, dropped_mass, student_fidelity, teacher_likelihood, teacher_states
from distill.evaluation.metrics import perplexity
from distill.files import sha256_of
from distill.models.saving import load_language_model, recover
from distill.models.vocabulary import Vocabulary
from distill.progress import Progress, say
from distill.workspace.checks import check_model
from distill.workspace.folders import Folders, make_run_folder, write_json
from distill.workspace.student import Calibration, build_student
from distill.workspace.teacher import Teacher, open_samples

_OF_A_SAMPLE = ("input_ids", "position_ids", "loss_mask")
_OF_THE_BEGINNING = ("student.", "train.seed:")
_MEASURED = ["nll", "kl", "top1_agreement", "acceptance", "ece"]


def main(experiment: Experiment) -> int:
    """Measure, write `evaluation.json`, print the table."""
    folders = Folders.of(experiment)
    make_run_folder(folders)
    roles = ["student", "control"] if experiment.evaluate.control else ["student"]
    for role in roles:
        recover(folders.model(role))
        if not folders.model(role).exists():
            raise UserError(f"{folders.model(role)}: no trained {role} here: run `distill train-student` first")
        _check_student(experiment, folders.model(role))
    teacher = Teacher(experiment)
    samples = open_samples(experiment, teacher)
    inputs = _inputs(experiment, folders, teacher, samples.fingerprint, roles)
    found = _earlier(folders.evaluation, inputs)
    if found is not None:
        say(f"evaluation: {folders.evaluation} is there; nothing to do")
        _print_table(found)
        _say_what_is_missing(found)
        return 0
    if not len(samples.held_out):
        raise UserError("nothing to evaluate on: corpus.held_out is 0")
    limit = experiment.evaluate.max_samples or len(samples.held_out)
    held_out = Subset(samples.held_out, range(min(limit, len(samples.held_out))))
    vocabulary = _vocabulary(experiment, folders, roles)
    if vocabulary is not None:
        held_out = _covered(held_out, vocabulary)
    calibration = _calibration(samples, experiment.cache.max_samples)
    result = _measure(experiment, folders, teacher, held_out, roles, vocabulary, calibration)
    if vocabulary is not None:
        result["left_out_samples"] = min(limit, len(samples.held_out)) - len(held_out)
    write_json(folders.evaluation, {**result, "inputs": inputs})
    _print_table(result)
    _say_what_is_missing(result)
    say(f"evaluation: {folders.evaluation}")
    return 0


def _earlier(path: Path, inputs: dict[str, Any]) -> dict[str, Any] | None:
    """The evaluation in a file, if it is one of the same inputs."""
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if found["inputs"] == inputs else None
    except (ValueError, TypeError, KeyError):
        say(f"evaluation: {path} is damaged: measuring anew")
        return None


def _calibration(samples: SampleSets, max_samples: int | None) -> Calibration:
    """The first training samples, as the student saw them in the cache while it was made; no cache is needed."""

    def first(count: int) -> tuple[Tensor, Tensor, Tensor]:
        rows = [samples.train[index] for index in range(min(count, len(samples.train), max_samples or count))]
        ids_BL, positions_BL, mask_BL = (torch.stack([row[name] for row in rows]) for name in _OF_A_SAMPLE)
        return ids_BL, positions_BL, mask_BL

    return first


def _vocabulary(experiment: Experiment, folders: Folders, roles: list[str]) -> Vocabulary | None:
    """The tokens of students that have only some of the teacher's. Raises UserError when they have not the same."""
    if experiment.student.vocabulary == "full":
        return None
    vocabularies = [Vocabulary.load(folders.model(role)) for role in roles]
    if len({vocabulary.fingerprint for vocabulary in vocabularies}) > 1:
        raise UserError(f"{folders.run}: student and control have other tokens: train the control again")
    return vocabularies[0]


def _covered(held_out: Subset, vocabulary: Vocabulary) -> Subset:
    """The samples that all models can read, so that all are measured on the same text."""
    left = covered(held_out, vocabulary)
    if not len(left):
        raise UserError(
            f"nothing to evaluate on: each of the {len(held_out)} held-out samples has a token that the students lack: "
            "cache more held-out samples (cache.held_out_samples), or use student.vocabulary full"
        )
    return left


def _say_what_is_missing(result: dict[str, Any]) -> None:
    if "dropped_mass" in result:
        say(
            f"evaluation: over the tokens that the students have: {result['dropped_mass']:.2%} of the teacher's "
            f"probability is on others; {result['left_out_samples']} samples with others in them are left out"
        )


def _measure(
    experiment: Experiment,
    folders: Folders,
    teacher: Teacher,
    held_out: Subset,
    roles: list[str],
    vocabulary: Vocabulary | None,
    calibration: Calibration,
) -> dict[str, Any]:
    started = time.monotonic()
    batch_size, chunk_size = experiment.evaluate.batch_size, experiment.loss.chunk_size
    walks = 2 + len(roles)
    total = walks * len(held_out) * experiment.corpus.sequence_length
    with Progress("evaluate", total, "tokens") as progress:
        model = teacher.load(experiment.corpus.pack)
        teacher_parameters = _parameters(model)
        progress.start(done=0)
        states = teacher_states(model, held_out, batch_size, teacher.vocab_size, teacher.device, progress.advance)
        del model
        likelihood = teacher_likelihood(states, held_out, batch_size, chunk_size, teacher.device)
        result: dict[str, Any] = {
            "tokens": likelihood["tokens"],
            "parameters": {"teacher": teacher_parameters},
            "teacher": {key: likelihood[key] for key in ("nll", "perplexity", "ece")},
        }
        if vocabulary is not None:
            result["dropped_mass"] = dropped_mass(states, vocabulary, chunk_size, teacher.device)
        for name in ["before", *roles]:
            student = (
                build_student(experiment, teacher.vocab_size, calibration, vocabulary)[0].to(teacher.device).eval()
                if name == "before"
                else load_language_model(folders.model(name), teacher.device)
            )
            what = f"student {experiment.student.class_path}"
            tokens = teacher.vocab_size if vocabulary is None else len(vocabulary)
            check_model(student, what, tokens, teacher.device, experiment.corpus.pack)
            result["parameters"][name] = _parameters(student)
            measured = student_fidelity(
                student, states, held_out, batch_size, chunk_size, teacher.device, progress.advance, vocabulary
            )
            result[name] = {key: measured[key] for key in _MEASURED}
    result["seconds"] = round(time.monotonic() - started, 1)
    return result


def _check_student(experiment: Experiment, folder: Path) -> None:
    """Raises UserError when the folder's student did not begin as the experiment's, which is the one `before`."""
    beginning = {"student": asdict(experiment.student), "train": {"seed": experiment.train.seed}}
    different = [line for line in settings.differences(folder, beginning) if line.startswith(_OF_THE_BEGINNING)]
    if different:
        raise UserError(
            f"{folder} holds another student ({'; '.join(different)}): give the options that it was trained with"
        )


def _parameters(model: Any) -> int:
    """Parameters of a model; 4-bit weights are stored two to a byte and counted as what they stand for."""
    return sum(p.numel() * (2 if type(p).__name__ == "Params4bit" else 1) for p in model.parameters())


def _inputs(
    experiment: Experiment, folders: Folders, teacher: Teacher, corpus: str, roles: list[str]
) -> dict[str, Any]:
    """What the evaluation depends on: as long as it is the same, nothing is measured twice."""
    models = {
        role: {file.name: sha256_of(file) for file in sorted(folders.model(role).glob("*.safetensors"))}
        for role in roles
    }
    return {
        "models": models,
        **teacher.fingerprints,
        "teacher_plugin": {"class_path": experiment.teacher.class_path, "options": experiment.teacher.options},
        "before": {
            "student": asdict(experiment.student),
            "seed": experiment.train.seed,
            "calibration_samples": experiment.cache.max_samples,
        },
        "corpus": corpus,
        "corpus_settings": asdict(experiment.corpus),
        "max_samples": experiment.evaluate.max_samples,
        "measured": _MEASURED,
    }


def _print_table(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"on {result['tokens']:,} held-out positions (nats; KL is teacher || student)")
    table.add_column("model")
    for heading in ("parameters", "nll", "perplexity", "KL", "top-1 agreement", "acceptance", "ECE"):
        table.add_column(heading, justify="right")
    teacher = result["teacher"]
    alone = (f"{teacher['nll']:.3f}", f"{teacher['perplexity']:.1f}", "", "", "", f"{teacher['ece']:.1%}")
    table.add_row("teacher", _millions(result, "teacher"), *alone)
    for name in ("before", "student", "control"):
        if name in result:
            row = result[name]
            table.add_row(
                name,
                _millions(result, name),
                f"{row['nll']:.3f}",
                f"{perplexity(row['nll']):.1f}",
                f"{row['kl']:.3f}",
                f"{row['top1_agreement']:.1%}",
                f"{row['acceptance']:.1%}",
                f"{row['ece']:.1%}",
            )
    Console(width=None if Console().is_terminal else 100).print(table)


def _millions(result: dict[str, Any], name: str) -> str:
    return f"{result['parameters'][name] / 1e6:,.1f} M"
