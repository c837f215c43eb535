"""Table of the largest published models that a device can take, by simulations as `distill plan` makes them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from distill.experiment.configuration import Experiment, StudentConfig, TrainConfig
from distill.experiment.teacher_sections import CacheConfig, CorpusConfig, TeacherConfig
from distill.forecast.advice import Keys, apply
from distill.forecast.forecast import Forecaster
from distill.forecast.machine.cards import this_machine
from distill.forecast.phases.simulator import Phase, Simulator
from distill.forecast.published import Published, published_models
from distill.forecast.simulation.kernels import DeviceKind

METHOD = "of the architectures that ship here, with one sample of 1,024 tokens a pass"

WAYS: dict[str, tuple[Phase, float, Keys]] = {
    "teacher in NF4": ("cache-teacher", 0.5, {"teacher.quantization": "nf4"}),
    "teacher in bfloat16": ("cache-teacher", 2, {}),
    "teacher in bfloat16, streamed": ("cache-teacher", 0, {"teacher.class_path": "streamed"}),
    "student, plain AdamW": ("train-student", 16, {"train.precision": "32-true"}),
    "student, bf16-mixed, adamw_8bit": (
        "train-student",
        10,
        {"train.precision": "bf16-mixed", "train.optimizer": "adamw_8bit"},
    ),
    "student, bf16-true": ("train-student", 8, {"train.precision": "bf16-true"}),
}
"""Ways to run a teacher or train a student: the phase, bytes that a parameter takes at least, and the settings."""


def table(device: DeviceKind, budget: float, ways: Iterable[str] = WAYS) -> list[dict[str, Any]]:
    """Return a row for each way: the largest published model that fits in `budget` bytes, or None, and its need."""
    published = {model.names[0]: model for model in published_models().values()}
    models = sorted(published.values(), key=lambda model: -model.parameters)
    rows: list[dict[str, Any]] = []
    with Simulator(this_machine(None if device == "cuda" else "cpu")) as simulator:
        forecaster = Forecaster(simulator.card, simulator=simulator)
        for way in ways:
            phase, least, keys = WAYS[way]
            row: dict[str, Any] = {"way": way, "model": None, "parameters": 0, "needed_bytes": 0}
            for model in models:
                if least * model.parameters > budget:  # not worth a simulation
                    continue
                needed = forecaster.needed_bytes(apply(_experiment(model), keys), phase)
                if needed <= budget:
                    row |= {"model": model.names[0], "parameters": model.parameters, "needed_bytes": needed}
                    break
            rows.append(row)
    return rows


def _experiment(model: Published) -> Experiment:
    """Return an experiment in which the model is teacher and student."""
    name, tokenizer = model.names[0], "tokenizer.model" if model.sentencepiece_tokens else None
    return Experiment(
        CorpusConfig("", sequence_length=1024, pack="none"),
        TeacherConfig(name, "none", "bfloat16", tokenizer),
        StudentConfig("huggingface", {"model": name}),
        CacheConfig(batch_size=1),
        train=TrainConfig(batch_size=1, activation_checkpointing=True),
    )
