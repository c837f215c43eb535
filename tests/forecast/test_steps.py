"""The amount of a training: its steps and tokens, and the words when they are too few."""

from __future__ import annotations

from dataclasses import replace

import pytest

from distill.experiment.configuration import Experiment, StudentConfig, TrainConfig
from distill.experiment.teacher_sections import CorpusConfig, TeacherConfig
from distill.forecast.sizes import Amount
from distill.forecast.steps import Training

ENOUGH = Amount(4000, 8, 8)


def training(amount: Amount = ENOUGH, parameters: int | None = 20_000, **train: int) -> Training | None:
    experiment = Experiment(
        CorpusConfig("text.txt", sequence_length=100),
        TeacherConfig("teacher"),
        StudentConfig("compact", {"hidden_size": 8}),
        train=TrainConfig(**{"batch_size": 2, **train}),  # type: ignore[arg-type]
    )
    return Training.of(experiment, amount, parameters)


def test_the_tokens_are_those_of_whole_steps_in_all_epochs() -> None:
    found = training(Amount(7, 0, 0), accumulate_grad_batches=2, epochs=3)
    assert found is not None and (found.steps, found.tokens) == (5, 5 * 4 * 100)
    words = "7 samples of 100 tokens, 3 epochs: 5 optimiser steps of 4 samples in 2 passes, 2,000 tokens in all"
    assert found.described() == words


def test_enough_text_has_no_shortcomings() -> None:
    found = training()
    assert found is not None and (found.steps, found.shortcomings()) == (2000, [])


def test_few_chats_are_one_step_and_the_remedies_say_how_many_they_make() -> None:
    found = training(Amount(60, 0, 0), None, accumulate_grad_batches=32)
    assert found is not None
    (line,) = found.shortcomings()
    assert line.startswith("few steps: 1 optimiser step, where 200 and more are usual: ")
    assert "--train.accumulate_grad_batches 1 makes 30, --train.epochs 4 makes 3" in line
    asked = training(Amount(60, 0, 0), None, accumulate_grad_batches=1)
    assert asked is not None and asked.steps == 30


def test_a_large_fresh_student_is_told_its_tokens_and_a_pretrained_one_is_not() -> None:
    found = training(parameters=10**6)
    assert found is not None and found.shortcomings()[0].startswith("few tokens: 0.4 for each of the student's 1.0 M")
    assert replace(found, is_pretrained=True).shortcomings() == []


def test_an_early_end_is_the_reason_for_few_steps() -> None:
    found = training(max_steps=5)
    assert found is not None and found.shortcomings()[0].endswith("train.max_steps ends it there")


@pytest.mark.parametrize(("max_steps", "steps"), [(None, None), (7, 7)])
def test_text_of_unknown_size_is_known_by_the_steps_alone(max_steps: int | None, steps: int | None) -> None:
    found = training(Amount(None, 0, None), max_steps=max_steps)  # type: ignore[arg-type]
    assert (None if found is None else found.steps) == steps
    assert found is None or found.described().startswith("1 epoch: 7 optimiser steps")
