"""`distill evaluate`: the student, before and after training, and the control beside their live teacher."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch.utils.data import Subset

from distill.cache.format import sha256_of
from distill.config import Experiment
from distill.errors import UserError
from distill.evaluation.fidelity import student_fidelity, teacher_likelihood, teacher_states
from distill.evaluation.metrics import perplexity
from distill.models.saving import load_language_model
from distill.progress import Progress, say
from distill.workspace import Folders, Teacher, build_student, check_model, make_run_folder, open_samples, write_json


def main(experiment: Experiment) -> int:
    """Measure, write `evaluation.json`, print the table."""
    folders = Folders.of(experiment)
    make_run_folder(folders)
    roles = ["student", "control"] if experiment.evaluate.control else ["student"]
    for role in roles:
        if not folders.model(role).exists():
            raise UserError(f"{folders.model(role)}: no trained {role} here: run `distill train-student` first")
        _check_student(experiment, folders.model(role))
    teacher = Teacher(experiment)
    samples = open_samples(experiment, teacher)
    inputs = _inputs(experiment, folders, teacher, samples.fingerprint, roles)
    if folders.evaluation.exists():
        found = json.loads(folders.evaluation.read_text(encoding="utf-8"))
        if found.get("inputs") == inputs:
            say(f"evaluation: {folders.evaluation} is there; nothing to do")
            _print_table(found)
            return 0
    if not len(samples.held_out):
        raise UserError("nothing to evaluate on: corpus.held_out is 0")
    limit = experiment.evaluate.max_samples or len(samples.held_out)
    held_out = Subset(samples.held_out, range(min(limit, len(samples.held_out))))
    result = _measure(experiment, folders, teacher, held_out, roles)
    write_json(folders.evaluation, {**result, "inputs": inputs})
    _print_table(result)
    say(f"evaluation: {folders.evaluation}")
    return 0


def _measure(
    experiment: Experiment, folders: Folders, teacher: Teacher, held_out: Subset, roles: list[str]
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
            "teacher": {"nll": likelihood["nll"], "perplexity": likelihood["perplexity"]},
        }
        for name in ["before", *roles]:
            student = (
                build_student(experiment, teacher.vocab_size)[0].to(teacher.device).eval()
                if name == "before"
                else load_language_model(folders.model(name), teacher.device)
            )
            what = f"student {experiment.student.class_path}"
            check_model(student, what, teacher.vocab_size, teacher.device, experiment.corpus.pack)
            result["parameters"][name] = _parameters(student)
            measured = student_fidelity(
                student, states, held_out, batch_size, chunk_size, teacher.device, progress.advance
            )
            result[name] = {key: measured[key] for key in ("nll", "kl", "top1_agreement", "acceptance")}
    result["seconds"] = round(time.monotonic() - started, 1)
    return result


def _check_student(experiment: Experiment, folder: Path) -> None:
    """Raises UserError when the folder's student is another than the experiment's, which is the one `before`."""
    try:
        trained = json.loads((folder / "settings.json").read_text(encoding="utf-8"))["student"]
    except (OSError, ValueError, KeyError):
        raise UserError(f"{folder}: its settings.json is missing or damaged: remove it and train again") from None
    if trained != json.loads(json.dumps(asdict(experiment.student))):
        raise UserError(f"{folder} holds a student trained as {trained}: give the student that it was trained with")


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
        "corpus": corpus,
        "corpus_settings": asdict(experiment.corpus),
        "max_samples": experiment.evaluate.max_samples,
    }


def _print_table(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"on {result['tokens']:,} held-out positions (nats; KL is teacher || student)")
    table.add_column("model")
    for heading in ("parameters", "nll", "perplexity", "KL", "top-1 agreement", "acceptance"):
        table.add_column(heading, justify="right")
    teacher = result["teacher"]
    table.add_row(
        "teacher", _millions(result, "teacher"), f"{teacher['nll']:.3f}", f"{teacher['perplexity']:.1f}", "", "", ""
    )
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
            )
    Console(width=None if Console().is_terminal else 100).print(table)


def _millions(result: dict[str, Any], name: str) -> str:
    return f"{result['parameters'][name] / 1e6:,.1f} M"
