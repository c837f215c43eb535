"""A forecast needs configurations alone, follows every lever, and refuses what cannot fit with advice that helps."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from distill.config import Experiment
from distill.errors import UserError
from distill.experiment_file import load_experiment
from distill.memory.cards import Card, find_card
from distill.workspace.cache import make_scheme
from distill.workspace.forecast import Forecaster, refuse_what_cannot_fit
from distill.workspace.forecasting import sizes
from distill.workspace.forecasting.advice import advise, apply, as_options
from distill.workspace.forecasting.models import Models, local_checkpoints
from distill.workspace.forecasting.phases import PHASES
from distill.workspace.student import build_student

CARD = find_card("12GiB")


@pytest.fixture
def experiment(world: Any, tmp_path: Path) -> Callable[..., Experiment]:
    """An experiment of the tiny world with some sections changed."""

    def make(**sections: dict[str, Any]) -> Experiment:
        return load_experiment(world.write(tmp_path / "experiment.yaml", **sections), [])

    return make


@pytest.fixture
def bare(world: Any, tmp_path: Path) -> str:
    """The world's teacher as a folder with a `config.json` and nothing else."""
    (tmp_path / "bare").mkdir()
    shutil.copy(Path(world.content["teacher"]["model"]) / "config.json", tmp_path / "bare")
    return str(tmp_path / "bare")


def peaks(experiment: Experiment, card: Card = CARD) -> dict[str, int]:
    return {name: phase.peak_bytes for name, phase in Forecaster(card).forecast(experiment).phases.items()}


def test_a_configuration_is_enough(experiment: Callable[..., Experiment], bare: str) -> None:
    forecast = Forecaster(CARD).forecast(experiment(teacher={"model": bare}))
    for phase in forecast.phases.values():
        assert sum(phase.parts.values()) == phase.peak_bytes > 0
        assert phase.needed_bytes > phase.peak_bytes + phase.fragmentation_bytes > phase.peak_bytes
        assert phase.seconds is not None and phase.seconds > 0
    assert forecast.fits and list(forecast.phases) == list(PHASES)
    assert any("no tokenizer here" in note for note in forecast.notes)
    assert all(size is not None and size > 0 for size in forecast.disk.values())


def test_a_hub_name_that_is_nowhere_is_refused_without_the_network(experiment: Callable[..., Experiment]) -> None:
    with pytest.raises(UserError, match=r"meta-llama/Llama-3.1-9B.*did you mean 'meta-llama/Llama-3.1-8B'"):
        peaks(experiment(teacher={"model": "meta-llama/Llama-3.1-9B"}))


def test_int8_is_not_forecast_and_says_so(experiment: Callable[..., Experiment]) -> None:
    with pytest.raises(UserError, match=r"int8.*nf4"):
        peaks(experiment(teacher={"quantization": "int8"}))


STUDENTS: dict[str, Callable[[str], dict[str, Any]]] = {
    "depth": lambda teacher: {"class_path": "pruned", "options": {"layers": 2}},
    "width": lambda teacher: {
        "class_path": "pruned",
        "options": {"layers": [0, 3], "hidden_size": 24, "intermediate_size": 40, "key_value_groups": 1},
    },
    "huggingface": lambda teacher: {"class_path": "huggingface", "options": {"model": teacher}},
    "config": lambda teacher: {
        "class_path": "huggingface",
        "options": {"config": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}},
    },
    "compact": lambda teacher: {"class_path": "compact", "options": {"hidden_size": 32, "layers": 2, "heads": 2}},
    "lora": lambda teacher: {"class_path": "lora", "options": {"model": teacher, "rank": 4}},
    "qlora": lambda teacher: {"class_path": "lora", "options": {"model": teacher, "quantization": "nf4"}},
}


@pytest.mark.parametrize("name", STUDENTS)
def test_every_student_is_made_without_weights(name: str, experiment: Callable[..., Experiment], bare: str) -> None:
    phases = Forecaster(CARD).forecast(experiment(teacher={"model": bare}, student=STUDENTS[name](bare))).phases
    assert phases["train-student"].parts["weights"] > 0 and phases["train-student"].parts["optimizer states"] > 0
    assert ("quantized weights" in phases["train-student"].parts) == (name == "qlora")


@pytest.mark.parametrize("name", ["depth", "width", "compact"])
def test_the_student_has_the_real_ones_shapes(name: str, world: Any, experiment: Callable[..., Experiment]) -> None:
    made = experiment(student=STUDENTS[name](world.content["teacher"]["model"]))
    with local_checkpoints([]):
        models = Models(made, CARD, [])
        shapes = {key: tensor.shape for key, tensor in models.student().state_dict().items()}
    real, _ = build_student(made, models.vocab_size, _samples)
    assert shapes == {key: tensor.shape for key, tensor in real.state_dict().items()}


def _samples(count: int) -> Any:
    import torch

    ids_BL = torch.arange(count * 16).reshape(count, 16) % 300
    return ids_BL, torch.arange(16).repeat(count, 1), torch.ones(count, 16, dtype=torch.bool)


def test_levers_move_the_forecast(experiment: Callable[..., Experiment]) -> None:
    plain = experiment(train={"batch_size": 8})
    before = peaks(plain)
    less = peaks(apply(plain, {"train.batch_size": 1, "cache.batch_size": 1, "train.optimizer": "adamw_8bit"}))
    assert less["train-student"] < 0.8 * before["train-student"]
    assert less["cache-teacher"] < before["cache-teacher"]
    shorter = peaks(apply(plain, {"corpus.sequence_length": 24}))
    assert all(shorter[phase] < before[phase] for phase in PHASES)


def test_passes_of_a_step_cost_time_and_the_update_is_one(experiment: Callable[..., Experiment]) -> None:
    forecaster = Forecaster(CARD)
    each = [
        forecaster.forecast(experiment(train={"accumulate_grad_batches": passes}), ("train-student",))
        for passes in (2, 4, 8)
    ]
    two, four, eight = (forecast.phases["train-student"] for forecast in each)
    assert two.peak_bytes == four.peak_bytes == eight.peak_bytes
    assert eight.seconds_each - four.seconds_each == pytest.approx(2 * (four.seconds_each - two.seconds_each))
    assert eight.seconds_each < 4 * two.seconds_each


def test_disk_follows_the_tables_and_the_budget(experiment: Callable[..., Experiment]) -> None:
    plain = experiment()
    assert sizes.bytes_a_token(plain, 64, []) == pytest.approx(33.2)
    finer = apply(plain, {"cache.threshold": 0.01})
    assert sizes.bytes_a_token(finer, 64, []) == pytest.approx(50.8)
    between = sizes.bytes_a_token(apply(plain, {"cache.threshold": 0.015}), 64, [])
    assert 33.2 < between < 50.8
    assert sizes.bytes_a_token(apply(plain, {"cache.bytes_per_token": 30.0}), 64, []) == 30
    assert sizes.bytes_a_token(apply(plain, {"cache.scheme": "hidden"}), 64, []) == 136
    assert make_scheme(plain, 64).name == "varopt"
    unknown = replace(plain, corpus=replace(plain.corpus, path="someone/something"))
    notes: list[str] = []
    assert sizes.amount_of(unknown, notes).train is None and "cache.max_samples" in notes[0]


def test_no_limit_on_a_cpu_no_forecast(experiment: Callable[..., Experiment]) -> None:
    assert refuse_what_cannot_fit(experiment(), "train-student") is None


def test_a_phase_over_the_limit_is_refused_and_the_advice_helps(experiment: Callable[..., Experiment]) -> None:
    plain = experiment(corpus={"sequence_length": 256}, train={"batch_size": 8}, student=STUDENTS["compact"](""))
    forecaster = Forecaster(replace(CARD, is_cuda=False))
    small = apply(plain, {"train.batch_size": 2, "train.accumulate_grad_batches": 4})
    limit = forecaster.needed_bytes(small, "train-student")
    assert limit < forecaster.needed_bytes(plain, "train-student")
    with pytest.raises(
        UserError, match=r"train-student: needs .*--train.batch_size 2 --train.accumulate_grad_batches 4"
    ):
        refuse_what_cannot_fit(plain, "train-student", limit)
    assert refuse_what_cannot_fit(small, "train-student", limit) is not None


def test_what_no_lever_mends_is_said(experiment: Callable[..., Experiment]) -> None:
    with pytest.raises(UserError, match="smaller models"):
        refuse_what_cannot_fit(experiment(), "cache-teacher", 2**20)


def test_levers_are_tried_from_the_cheapest_and_only_as_far_as_needed(experiment: Callable[..., Experiment]) -> None:
    plain = experiment(
        corpus={"sequence_length": 256},
        train={"batch_size": 8},
        student={"class_path": "pruned", "options": {"layers": 4}},
    )
    forecaster = Forecaster(CARD)
    wanted = apply(plain, {"train.batch_size": 1, "train.accumulate_grad_batches": 8})
    forecaster.limit_bytes = forecaster.needed_bytes(apply(wanted, {"train.activation_checkpointing": True}), PHASES[1])
    advice = advise(forecaster, plain, ("train-student",))
    assert advice.fits
    assert list(advice.changes.items()) == [
        ("train.batch_size", 1),
        ("train.accumulate_grad_batches", 8),
        ("train.activation_checkpointing", True),
    ]
    assert advice.steps[-1].time_factor > 1
    assert as_options(advice.changes).endswith("--train.activation_checkpointing true")
