"""The proposal as an experiment file, with a comment behind every line."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from distill.errors import UserError
from distill.experiment.configuration import Experiment
from distill.experiment.file import experiment_of, to_dict
from distill.forecast.machine.cards import Card
from distill.recipes.init.data import Data
from distill.recipes.init.proposal import Proposal

COLUMN = 52
"""Column at which comments begin, where a line leaves room."""

_ALWAYS = {
    "corpus.path": "file, folder or hub data set",
    "corpus.sequence_length": "tokens of a sample, the length that the student learns to read",
    "corpus.held_out": "share of the documents that is never trained on: the report measures on them",
    "teacher.model": "hub name, folder or GGUF file",
    "teacher.quantization": "weights in 4 bits; int8 or none need more memory",
    "teacher.compute_dtype": "the fastest type of the device",
    "cache.scheme": "unbiased sparse targets, some 30 bytes a token",
    "cache.threshold": "probabilities from here up are kept exactly; lower: larger and more exact",
    "cache.batch_size": "samples of one pass of the teacher",
    "cache.shard_samples": "samples of a file of the cache",
    "cache.max_samples": "as many as the time allows; more can be added later, and the cache grows",
    "cache.held_out_samples": "to watch the student while it trains",
    "student.class_path": "",
    "student.options": "",
    "student.search": "",
    "loss.alpha": "0: learn from the teacher alone; 1: from the text alone",
    "train.epochs": "times that the text is read",
    "train.batch_size": "samples of one pass (the micro-batch)",
    "train.accumulate_grad_batches": "passes of an optimiser step",
    "train.precision": "the fastest type of the device, with float32 weights",
    "train.optimizer": "",
    "train.learning_rate": "its peak: lower it if the loss jumps",
    "train.schedule": "the learning rate after the warm-up",
    "train.num_workers": "processes that read the cache",
    "train.validate_every_steps": "steps between two looks at held-out text",
    "train.checkpoint_every_steps": "a training that is killed repeats at most these",
    "train.log_every_steps": "steps between two lines of the log",
    "evaluate.control": "",
    "evaluate.max_samples": "held-out samples of the report's figures",
    "evaluate.batch_size": "samples of one pass",
    "evaluate.cost_batch_sizes": "sequences side by side when the speed is measured",
    "run_dir": "everything that is made goes there",
}
"""Keys that every file has, and their comments."""
_LEVERS = {
    "train.activation_checkpointing": "recompute activations: less memory, a third more time",
    "train.rounding": "keeps steps that are smaller than bfloat16's last digit",
    "loss.chunk_size": "positions whose logits exist at one time",
    "cache.chunk_size": "positions whose logits exist at one time",
    "evaluate.student_dtype": "half the memory of the student while it is measured",
    "teacher.class_path": "its layers pass through one buffer, for it is larger than the card",
    "teacher.options": "samples of one pass through each layer",
}
"""Keys that a file has where they make it fit, and their comments."""


def experiment_text(proposal: Proposal, data: Data, card: Card, goal: str) -> str:
    """Return the file's content: every line but a section's name has a comment."""
    experiment = proposal.experiment
    values, own = to_dict(experiment), _comments(proposal, data)
    lines = [f"# Made by `distill init` for {card.name}: {goal}.", f"# {data.described()}", ""]
    for section in fields(Experiment):
        content = values[section.name]
        if not isinstance(content, dict):
            if section.name in _ALWAYS:
                lines.append(_line("", section.name, content, _ALWAYS[section.name]))
            continue
        defaults = _defaults(experiment, section.name)
        shown = [
            _line("  ", key, value, comment)
            for key, value in content.items()
            if (comment := _comment(f"{section.name}.{key}", value, defaults.get(key), own)) is not None
        ]
        if shown:
            lines += [f"{section.name}:", *shown]
    text = "\n".join(lines) + "\n"
    assert experiment_of("init", yaml.safe_load(text), []) == experiment, "the file says what was proposed"
    return text


def _defaults(experiment: Experiment, section: str) -> dict[str, Any]:
    """Return a section's values where nothing is given."""
    kind = type(getattr(experiment, section))
    required = {"corpus": ("path",), "teacher": ("model",)}.get(section, ())
    return {key: value for key, value in vars(kind(*("" for _ in required))).items() if key not in required}


def _comment(key: str, value: Any, default: Any, own: dict[str, str]) -> str | None:
    """Return the comment of a key that the file has, or None for one that it leaves out."""
    if value == default and (key not in _ALWAYS or value in (None, {}, [])):
        return None
    return own.get(key) or _ALWAYS.get(key) or _LEVERS.get(key) or "so that it fits"


def _comments(proposal: Proposal, data: Data) -> dict[str, str]:
    """Return the comments that depend on the proposal."""
    experiment, found = proposal.experiment, {}
    student, train = experiment.student, experiment.train
    found["corpus.path"] = f"{data.shape or 'a hub data set'}; `distill preview` shows what is learned of it"
    if student.class_path == "pruned":
        found["student.class_path"] = "cut out of the teacher: fewer layers, channels, heads, neurons"
        share = student.search["parameters"] / proposal.teacher_parameters
        found["student.options"] = "training samples that tell which parts of the teacher matter"
        found["student.search"] = f"at most so many parameters, {share:.0%} of the teacher's; shapes are tried out"
    elif "config" in student.options:
        found["student.class_path"] = "begins from nothing: nothing so small can be cut out of this teacher"
        found["student.options"] = "any architecture of transformers, by its config"
    else:
        found["student.class_path"] = "a pretrained model of the same tokens"
        found["student.options"] = "hub name or folder"
    if experiment.cache.threshold < 0.02:
        found["cache.threshold"] = "probabilities from here up are exact; low, for the text is read several times"
    if train.precision == "bf16-true":
        found["train.precision"] = "bfloat16 weights alone, so that it fits"
    found["train.optimizer"] = "float32 moments" if train.optimizer == "adamw" else "moments in 8 bits, so that it fits"
    training = proposal.forecast.training
    if training is not None:
        found["train.accumulate_grad_batches"] = (
            f"passes of a step: {training.step_samples} samples, {training.steps:,} steps in all"
        )
    found["evaluate.control"] = (
        "the same student learns from the text alone too: what the teacher adds"
        if experiment.evaluate.control
        else "true: train the same student from the text alone too, for comparison"
    )
    if experiment.teacher.quantization == "none":
        found["teacher.quantization"] = "as it is"
    return found


def _line(indent: str, key: str, value: Any, comment: str) -> str:
    written = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000)
    text = f"{indent}{key}: {written.removesuffix('...' + chr(10)).strip()}"
    return f"{text.ljust(COLUMN - 1)} # {comment}"


def write_new(file: Path, text: str) -> None:
    """Write a new file. Raises UserError if it is there already, or cannot be written."""
    try:
        with open(file, "x", encoding="utf-8") as opened:
            opened.write(text)
    except FileExistsError:
        raise UserError(f"--to {file}: is there already: choose another name, or remove it") from None
    except OSError as error:
        raise UserError(f"--to {file}: cannot be written ({error.strerror}): choose another place") from None
