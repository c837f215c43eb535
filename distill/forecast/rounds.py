"""Forecast of an experiment's rounds: the texts of each, their scoring and the trainings after the first, at most."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from distill.experiment.configuration import Experiment
from distill.experiment.roles import roles
from distill.experiment.stages import has_corpus, writing_settings
from distill.forecast.machine.cards import Card
from distill.forecast.phases.simulator import Phase, Piece
from distill.forecast.sizes import Amount, cache_bytes
from distill.forecast.steps import step_samples, steps
from distill.forecast.writing import PROMPT_TOKENS, Writing, looks_seconds, seconds_of, writing_of
from distill.system.units import duration


@dataclass(frozen=True)
class RoundsForecast:
    """Needs of all rounds after the first training, together."""

    rounds: int
    """Rounds in which the trained student writes."""
    texts: int
    """Texts of each round."""
    tokens: int
    """Tokens of these, without the prompts."""
    writing_seconds: float
    scoring_seconds: float
    training_seconds: float
    """Seconds of the trainings, and of a control's further steps."""
    bytes: int
    """Bytes of texts, caches and students, and of the checkpoints of two rounds instead of one."""

    @property
    def seconds(self) -> float:
        return self.writing_seconds + self.scoring_seconds + self.training_seconds

    def described(self) -> str:
        """Return the rounds in a line."""
        return (
            f"{self.rounds} more, up to {self.texts:,} texts and {self.tokens:,} tokens each: the student writes "
            f"{duration(self.writing_seconds)}, the teacher scores {duration(self.scoring_seconds)}, training "
            f"{duration(self.training_seconds)}: {duration(self.seconds)} at most, after the first training"
        )


def rounds_of(
    experiment: Experiment,
    found: dict[Phase, list[Piece]],
    amount: Amount,
    card: Card,
    bytes_a_token: float,
    disk: dict[str, int | None],
    notes: list[str],
) -> RoundsForecast | None:
    """Return the forecast of the rounds after the first training, and add their bytes to those on `disk`.

    None means that there are none, or that the phases or the amount of text are not known, which is noted.
    """
    left = experiment.rounds.count - (0 if has_corpus(experiment) else 1)
    if left < 1 or not {"cache-teacher", "train-student"} <= found.keys():
        return None
    asking = replace(experiment, generate=writing_settings(experiment, 1, "student"))
    writing = writing_of(asking)
    if writing is None or amount.train is None:
        notes.append("rounds: their time and size are not known: give generate.max_prompts and cache.max_samples")
        return None
    samples, models = _samples(experiment, writing), len(roles(experiment))
    teacher, student = found["cache-teacher"][0], found["train-student"][0]
    batches = -(-samples // (experiment.cache.micro_batch * experiment.cache.devices))
    trainings = [_steps(experiment, amount, samples * number) for number in range(1, left + 1)]
    if experiment.evaluate.control:
        trainings += [_steps(experiment, amount, 0)] * experiment.rounds.count
    checkpoints, model = ((disk.get(name) or 0) // models for name in ("checkpoints", "student"))
    each = writing.bytes + (cache_bytes(experiment, bytes_a_token, samples) or 0) + model
    total = disk["rounds"] = left * each + checkpoints
    return RoundsForecast(
        rounds=left,
        texts=writing.texts,
        tokens=writing.tokens,
        writing_seconds=left * seconds_of(writing, asking, card, student.sizes),
        scoring_seconds=left * batches * teacher.seconds,
        training_seconds=sum(
            count * student.seconds + looks_seconds(experiment, count, card, student.sizes) for count in trainings
        ),
        bytes=total,
    )


def _samples(experiment: Experiment, writing: Writing) -> int:
    """Return the training samples of a round's texts."""
    tokens = writing.tokens + writing.texts * PROMPT_TOKENS
    samples = tokens / experiment.corpus.sequence_length if experiment.corpus.shares_samples else writing.texts
    return max(1, math.ceil(samples * (1 - experiment.corpus.held_out)))


def _steps(experiment: Experiment, amount: Amount, written: int) -> float:
    """Return the work of a training on the first cache and so many written samples, in steps."""
    count = steps(experiment, replace(amount, train=(amount.train or 0) + written)) or 0
    held_out = (count // experiment.train.validate_every_steps + 1) * amount.held_out / step_samples(experiment) / 3
    return count + held_out
