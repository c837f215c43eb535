"""Advice makes an experiment fit, pulls no lever further than needed, and says so when nothing helps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.errors import UserError
from distill.experiment.configuration import EvaluateConfig, Experiment, StudentConfig, TrainConfig
from distill.experiment.file import load_experiment
from distill.experiment.teacher_sections import CacheConfig, CorpusConfig, TeacherConfig
from distill.forecast.advice import Advice, _levers, advise, apply, as_options
from distill.forecast.forecast import Forecaster
from distill.forecast.machine.cards import Card, find_card
from distill.forecast.phases.simulator import PHASES

CARD = find_card("12GiB")
PLAIN = Experiment(
    corpus=CorpusConfig(path="text", sequence_length=1024),
    teacher=TeacherConfig(model="large", quantization="none"),
    cache=CacheConfig(batch_size=8),
    student=StudentConfig("compact"),
    train=TrainConfig(batch_size=8, optimizer="adamw", precision="bf16-mixed"),
    evaluate=EvaluateConfig(batch_size=8),
)


class Rules:
    """A forecaster by rules of thumb, in which every lever saves; bytes in units of a million."""

    def __init__(self, limit: int, has_blocks: bool = True, card: Card = CARD) -> None:
        self.limit_bytes, self.has_blocks, self.card = limit, has_blocks, card
        self.simulator = SimpleNamespace(pieces=lambda experiment, phase, notes: [SimpleNamespace(seconds=1.0)])

    def needed_bytes(self, experiment: Experiment, phase: str) -> int:
        train, length = experiment.train, experiment.corpus.sequence_length
        if phase == "train-student":
            if train.activation_checkpointing and not self.has_blocks:
                raise UserError("no blocks")
            weights = 4000 if train.precision == "bf16-mixed" else 2000
            moments = 8000 if train.optimizer == "adamw" else 2000
            each = 2 if not train.activation_checkpointing else 0.2
            return round(weights + moments + train.batch_size * length * each + 2 * experiment.loss.chunk_size)
        student = 8000 if experiment.evaluate.student_dtype == "float32" else 4000
        held = {"none": 16_000, "int8": 8000, "nf4": 5000}[experiment.teacher.quantization]
        if experiment.teacher.class_path == "streamed":
            held = 1000
        config: Any = experiment.cache if phase == "cache-teacher" else experiment.evaluate
        chunk = experiment.cache.chunk_size if phase == "cache-teacher" else experiment.loss.chunk_size
        return round(max(held, student if phase == "evaluate" else 0) + config.batch_size * length * 0.1 + 2 * chunk)


def check(forecaster: Any, experiment: Experiment, advice: Advice) -> None:
    """It fits, by the steps that are told, of which none can be left out."""
    changed = apply(experiment, advice.changes)
    assert changed == advice.experiment
    fits = [forecaster.needed_bytes(changed, phase) <= forecaster.limit_bytes for phase in PHASES]
    assert advice.fits == all(fits)
    assert not advice.fits or not any(
        all(
            forecaster.needed_bytes(_without(experiment, advice, left_out), phase) <= forecaster.limit_bytes
            for phase in PHASES
        )
        for left_out in range(len(advice.steps))
    )


def _without(experiment: Experiment, advice: Advice, left_out: int) -> Experiment:
    for number, step in enumerate(advice.steps):
        experiment = experiment if number == left_out else apply(experiment, step.keys)
    return experiment


@given(limit=st.integers(1000, 40_000), has_blocks=st.booleans())
@settings(max_examples=60, deadline=None)
def test_it_fits_and_no_change_is_idle(limit: int, has_blocks: bool) -> None:
    forecaster = Rules(limit, has_blocks)
    advice = advise(forecaster, PLAIN, PHASES)
    check(forecaster, PLAIN, advice)
    strongest = replace(PLAIN, corpus=replace(PLAIN.corpus, sequence_length=256))
    for keys in ({"train.batch_size": 1}, {"train.optimizer": "adamw_8bit"}, {"train.precision": "bf16-true"}):
        strongest = apply(strongest, {**keys, "loss.chunk_size": 64})
    if has_blocks:
        strongest = apply(strongest, {"train.activation_checkpointing": True})
    assert advice.fits == all(
        forecaster.needed_bytes(strongest, phase) <= limit for phase in ("train-student",)
    )  # a streamed teacher fits where such a student does


def test_what_fits_is_left_alone() -> None:
    advice = advise(Rules(40_000), PLAIN, PHASES)
    assert advice.fits and advice.steps == [] and advice.experiment == PLAIN


def test_an_early_lever_is_let_go_when_a_later_one_suffices() -> None:
    """4 bits alone are enough: neither the batch nor the chunk has to be smaller."""
    forecaster = Rules(28_500)
    advice = advise(forecaster, apply(PLAIN, {"cache.batch_size": 128}), ("cache-teacher",))
    assert advice.fits and list(advice.changes) == ["cache.batch_size"]
    forecaster.limit_bytes = 10_000
    advice = advise(forecaster, PLAIN, ("cache-teacher",))
    assert advice.changes == {"teacher.quantization": "nf4"}


def test_a_student_too_large_to_be_measured_in_float32() -> None:
    """Teacher and student are not in memory together: of two that are too large both are made smaller."""
    advice = advise(Rules(8_000), PLAIN, ("evaluate",))
    assert advice.fits and set(advice.changes) == {"teacher.quantization", "evaluate.student_dtype"}
    small_teacher = apply(PLAIN, {"teacher.quantization": "nf4"})
    assert advise(Rules(8_000), small_teacher, ("evaluate",)).changes == {"evaluate.student_dtype": "bfloat16"}


def test_any_size_can_be_made_smaller() -> None:
    """An odd batch of the teacher; a student's step keeps its samples, and is cut into equal passes alone."""
    odd = apply(PLAIN, {"cache.batch_size": 31, "train.batch_size": 12, "train.accumulate_grad_batches": 2})
    assert advise(Rules(19_000), odd, ("cache-teacher",)).changes == {"cache.batch_size": 15}
    assert advise(Rules(21_000), odd, ("train-student",)).changes == {
        "train.batch_size": 4,
        "train.accumulate_grad_batches": 6,
    }


def test_a_card_without_bfloat16_is_not_told_to_use_it() -> None:
    """Nothing else suffices there."""
    for card, fits in ((find_card("rtx-3060"), True), (find_card("rtx-2060-12gb"), False)):
        advice = advise(Rules(4_800, card=card), PLAIN, ("train-student",))
        assert advice.fits == fits == ("train.precision" in advice.changes)
        held = advise(Rules(4_800, card=card), PLAIN, ("evaluate",)).changes["evaluate.student_dtype"]
        assert held == ("bfloat16" if fits else "float16")


def test_a_teacher_larger_than_the_card_is_streamed_in_large_batches(tmp_path: Path) -> None:
    advice = advise(Rules(4_500), PLAIN, ("cache-teacher",))
    assert advice.fits
    assert advice.changes["teacher.class_path"] == "streamed"
    for quantization in ("none", "nf4"):  # each lever moves alone: what the user asked for stays
        quantised = apply(PLAIN, {"teacher.quantization": quantization})
        changed = advise(Rules(4_500), quantised, ("cache-teacher",)).experiment.teacher
        assert (changed.class_path, changed.quantization) == ("streamed", quantization)
    assert advice.changes["cache.batch_size"] > 8 and advice.experiment.teacher.options == {"micro_batch": 1}
    assert "--teacher.options.micro_batch 1" in as_options(advice.changes)
    (tmp_path / "mine.py").write_text("from torch.nn import Module as Teacher")  # which declares nothing
    own = apply(PLAIN, {"teacher.class_path": f"{tmp_path / 'mine.py'}:Teacher"})
    assert not advise(Rules(4_500), own, ("cache-teacher",)).fits


def test_a_lever_that_a_student_has_not_is_passed_over() -> None:
    forecaster = Rules(10_000, has_blocks=False)
    advice = advise(forecaster, PLAIN, ("train-student",))
    assert advice.fits and "train.activation_checkpointing" not in advice.changes


def test_levers_keep_the_samples_of_a_step() -> None:
    for keys in _levers(CARD)["train-student"][0](apply(PLAIN, {"train.accumulate_grad_batches": 3})):
        assert keys["train.batch_size"] * keys["train.accumulate_grad_batches"] == 24


def test_options_are_those_of_the_command_line(world: Any, tmp_path: Any) -> None:
    """The advice can be given on the command line as it stands."""
    file = world.write(tmp_path / "experiment.yaml")
    changes = {
        "train.batch_size": 2,
        "train.activation_checkpointing": True,
        "teacher.class_path": "streamed",
        "teacher.options.micro_batch": 1,
    }
    assert load_experiment(file, as_options(changes).split()) == apply(load_experiment(file, []), changes)


@pytest.mark.usefixtures("one_thread")
def test_on_real_simulations(world: Any, tmp_path: Any) -> None:
    file = world.write(
        tmp_path / "experiment.yaml",
        corpus={"sequence_length": 256},
        train={"batch_size": 8},
        student={"class_path": "pruned", "options": {"layers": 4}},
    )
    plain, forecaster = load_experiment(file, []), Forecaster(find_card("12GiB"))
    changes = {"train.batch_size": 1, "train.accumulate_grad_batches": 8, "train.activation_checkpointing": True}
    forecaster.limit_bytes = forecaster.needed_bytes(apply(plain, changes), "train-student")
    advice = advise(forecaster, plain, ("train-student",))
    assert advice.fits and advice.changes == changes
    assert advice.steps[-1].time_factor > 1


def test_a_streamed_teacher_computes_fewer_at_a_time_before_its_batches_shrink() -> None:
    fewer, kept, batches = _levers(CARD)["cache-teacher"][:3]
    streamed = apply(PLAIN, {"teacher.class_path": "streamed", "teacher.options": {"keep_layers": 5}})
    assert fewer(streamed) == [{"teacher.options.micro_batch": size} for size in (4, 2, 1)]
    assert kept(streamed) == [{"teacher.options.keep_layers": layers} for layers in (2, 1, 0)]
    assert not fewer(PLAIN) and not kept(PLAIN) and batches(PLAIN)
