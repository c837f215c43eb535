"""The proposal: an experiment for a card, the user's data and wishes, which a forecast has shown to fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from distill.errors import UserError
from distill.experiment.configuration import EvaluateConfig, Experiment, StudentConfig, TrainConfig
from distill.experiment.precision import with_types_of_card, with_types_of_machine
from distill.experiment.teacher_sections import CacheConfig, CorpusConfig, TeacherConfig
from distill.forecast.advice import advise, apply
from distill.forecast.forecast import MARGIN_BYTES, Forecast, Forecaster
from distill.forecast.machine.cards import Card
from distill.forecast.models import Models
from distill.forecast.phases.simulator import PHASES, Simulator
from distill.forecast.steps import step_samples
from distill.models.checkpoints import load_config
from distill.models.generation import context_of
from distill.models.huggingface import parameters_of
from distill.recipes.init import choices
from distill.recipes.init.choices import Goal
from distill.recipes.init.data import Data, held_out_share
from distill.system.memory import memory_of_host
from distill.system.progress import say
from distill.system.quiet import quiet, quiet_transformers
from distill.system.units import duration

HUB_TOKENS = 100_000_000
"""Tokens of a hub's data set that are read at most, if `--hours` does not say less."""
TOKENS_A_STEP = (4_096, 131_072)
"""Smallest and largest optimiser step, in tokens."""
STEPS = 500
"""Optimiser steps that a training is given, if the text suffices for steps of that size."""
REPEATED = ((20_000_000, 1), (5_000_000, 2))
"""Tokens from which on text is read so many times; less text is read four times."""
CONTROL_SECONDS = 2 * 3600
"""Time up to which a control is trained too, if no `--hours` say otherwise."""
FEWEST_SAMPLES = 32
FEW_SAMPLES = 64
"""Training samples below which a student is cut out by fewer of them than usual: their number is an estimate."""


_STRONGEST = {
    "train.batch_size": 1,
    "train.activation_checkpointing": True,
    "train.optimizer": "adamw_8bit",
    "loss.chunk_size": 64,
}
_PURE_BFLOAT16 = {"train.precision": "bf16-true", "train.rounding": "stochastic"}


@dataclass(frozen=True)
class Proposal:
    """An experiment that fits, and its forecast."""

    experiment: Experiment
    forecast: Forecast
    teacher_parameters: int

    @property
    def seconds(self) -> float:
        """Seconds of all phases."""
        return sum(phase.seconds or 0.0 for phase in self.forecast.phases.values())


@dataclass(frozen=True)
class Frame:
    """Starting point of a proposal: data, card and wishes."""

    data: Data
    card: Card
    is_here: bool
    """True if the card is this machine's, so that its disks and host memory count."""
    goal: Goal
    hours: float | None
    teacher: str | None
    student: str | None
    run_dir: str


def propose(frame: Frame) -> Proposal:
    """Return the proposal with the largest teacher that fits. Raises UserError if none does, or for unknown models."""
    names = [frame.teacher] if frame.teacher is not None else choices.teachers(frame.card, frame.goal)
    reason = ""
    with Simulator(frame.card) as simulator:
        # The allowances for context and fragmentation are guesses, so a card is not filled to the last byte.
        spare = MARGIN_BYTES if frame.card.is_cuda else 0
        forecaster = Forecaster(frame.card, frame.card.memory_bytes - spare, simulator=simulator)
        for name in names:
            say(f"init: forecasts with {name} as the teacher ...")
            for experiment, parameters in _starts(frame, name):
                try:
                    return _worked_out(frame, forecaster, experiment, parameters)
                except UserError as error:
                    reason = reason or str(error)
    if frame.teacher is not None:
        raise UserError(f"init: {frame.teacher} on {frame.card.name}: {reason}")
    raise UserError(
        f"init: no teacher that ships suits {frame.card.name} ({reason}): choose with --teacher and --student"
    )


def _starts(frame: Frame, teacher: str) -> Iterator[tuple[Experiment, int]]:
    """Yield the experiments to try with a teacher, and the teacher's parameters."""
    data, card = frame.data, frame.card
    bare = Experiment(CorpusConfig(data.path, sequence_length=2), TeacherConfig(teacher), run_dir=frame.run_dir)
    with quiet(), quiet_transformers():
        models = Models(bare, card, [])
        with models.place.making():
            parameters = parameters_of(models.checkpoint)
            context = context_of(load_config(models.checkpoint))
    length = choices.sequence_length(card, data.is_conversation, data.tokens, context)
    for student in choices.students(frame.student, teacher, parameters, card, frame.goal, data.tokens):
        yield _start(frame, teacher, student, length), parameters


def _start(frame: Frame, teacher: str, student: StudentConfig, length: int) -> Experiment:
    """Return the experiment before its levers of memory and its amounts are set."""
    cuda = frame.card.is_cuda
    size = student.search.get("parameters", 0)
    return Experiment(
        CorpusConfig(frame.data.path, sequence_length=length),
        TeacherConfig(teacher),
        student,
        CacheConfig(batch_size=8, shard_samples=64),
        train=TrainConfig(
            batch_size=8,
            learning_rate=choices.learning_rate(student, size),
            schedule="wsd" if student.class_path != "pruned" else "cosine",
            num_workers=1 if cuda else 0,
        ),
        evaluate=EvaluateConfig(batch_size=4, max_samples=256, cost_batch_sizes=[1]),
        run_dir=frame.run_dir,
    )


def _worked_out(frame: Frame, forecaster: Forecaster, experiment: Experiment, parameters: int) -> Proposal:
    """Set the levers, then the amounts. Raises UserError if it does not fit."""
    samples = _all_samples(frame, experiment)
    experiment = apply(experiment, {"corpus.held_out": held_out_share(frame.data, samples)})
    typed = experiment = _with_types(frame, experiment)
    # One forecast with the strongest levers tells what many would find out one by one.
    strongest = {**_STRONGEST, **({} if frame.card.is_cuda and not frame.card.has_bf16 else _PURE_BFLOAT16)}
    if forecaster.needed_bytes(apply(experiment, strongest), "train-student") > forecaster.limit_bytes:
        raise UserError(f"a student of {_size(experiment)} is too large")
    advice = advise(forecaster, experiment, PHASES)
    if not advice.fits:
        raise UserError(f"a student of {_size(experiment)} is too large")
    experiment = advice.experiment
    samples = _all_samples(frame, experiment)
    samples, epochs = _within_hours(frame, forecaster, experiment, samples)
    experiment = _with_amounts(frame, experiment, samples, epochs)
    found = _checked(frame, forecaster, experiment)
    for _ in range(3):
        seconds = Proposal(experiment, found, 0).seconds
        if frame.hours is None or seconds <= frame.hours * 3600:
            break
        samples = int(0.95 * samples * frame.hours * 3600 / seconds)
        if samples < FEWEST_SAMPLES:
            raise UserError(
                f"--hours {frame.hours:g}: reading {FEWEST_SAMPLES} samples and learning from them takes about "
                f"{duration(seconds)}: give more hours, or a smaller --teacher"
            )
        experiment = _with_amounts(frame, experiment, samples, epochs)
        found = _checked(frame, forecaster, experiment)
    found_out = _with_control(frame, forecaster, Proposal(experiment, found, parameters))
    return replace(found_out, experiment=_with_auto(found_out.experiment, typed))


def _with_types(frame: Frame, experiment: Experiment) -> Experiment:
    if frame.is_here:
        return with_types_of_machine(experiment)
    return with_types_of_card(experiment, frame.card.is_cuda, frame.card.has_bf16)


def _with_auto(experiment: Experiment, typed: Experiment) -> Experiment:
    """Return the experiment with `auto` in place of the types that it stands for, where no lever chose another."""
    teacher, train = experiment.teacher, experiment.train
    if teacher.compute_dtype == typed.teacher.compute_dtype:
        teacher = replace(teacher, compute_dtype="auto")
    if train.precision == typed.train.precision:
        train = replace(train, precision="auto")
    return replace(experiment, teacher=teacher, train=train)


def _within_hours(frame: Frame, forecaster: Forecaster, experiment: Experiment, samples: int) -> tuple[int, int]:
    """Return samples and epochs that take about the hours, by the time of a batch and of a step."""
    epochs = next((times for least, times in REPEATED if samples * experiment.corpus.sequence_length >= least), 4)
    if frame.hours is None:
        return samples, epochs
    found = forecaster.forecast(apply(experiment, {"cache.max_samples": samples}))
    teacher, train = (found.phases[phase].seconds_each for phase in ("cache-teacher", "train-student"))
    teacher /= experiment.cache.micro_batch
    train *= 1.5 / step_samples(experiment)  # the search takes about half as long as the training
    while epochs > 1 and samples * (teacher + epochs * train) > frame.hours * 3600:
        epochs -= 1
    most = int(frame.hours * 3600 / (teacher + epochs * train))
    return max(FEWEST_SAMPLES, min(samples, most)), epochs


def _all_samples(frame: Frame, experiment: Experiment) -> int:
    return max(1, (frame.data.tokens or HUB_TOKENS) // experiment.corpus.sequence_length)


def _with_amounts(frame: Frame, experiment: Experiment, samples: int, epochs: int) -> Experiment:
    """Return the experiment with its numbers of samples, passes and steps, which change no phase's memory."""
    length = experiment.corpus.sequence_length
    all_samples = _all_samples(frame, experiment)
    least, most = (max(1, tokens // length) for tokens in TOKENS_A_STEP)
    held_out = experiment.corpus.held_out
    train_samples = max(1, min(samples, int(all_samples * (1 - held_out))))
    wanted = min(most, max(least, train_samples * epochs // STEPS))
    micro_batch = min(experiment.train.micro_batch, wanted)
    passes = max(1, round(wanted / micro_batch))
    steps = max(1, train_samples * epochs // (micro_batch * passes))
    watched = max(1, min(128, round(all_samples * held_out)))
    is_whole = frame.data.tokens is not None and samples >= all_samples
    if experiment.student.search and train_samples < FEW_SAMPLES:  # it looks at 16 of them, if nothing is said
        experiment = apply(experiment, {"student.options.calibration_samples": max(1, train_samples // 4)})
    return apply(
        experiment,
        {
            "cache.max_samples": None if is_whole else train_samples,
            "cache.held_out_samples": watched,
            "cache.threshold": 0.01 if epochs > 1 else 0.02,
            "train.epochs": epochs,
            "train.batch_size": micro_batch,
            "train.accumulate_grad_batches": passes,
            "train.validate_every_steps": max(1, min(100, steps // 10)),
            "train.checkpoint_every_steps": max(10, min(200, steps // 10)),
            "train.log_every_steps": max(1, min(10, steps // 20)),
        },
    )


def _checked(frame: Frame, forecaster: Forecaster, experiment: Experiment) -> Forecast:
    """Return the forecast of an experiment. Raises UserError if something of it does not fit."""
    found = forecaster.forecast(experiment)
    if found.failures:
        raise UserError("; ".join(found.failures))
    if not found.fits:
        raise UserError(f"a student of {_size(experiment)} is too large")
    if frame.is_here and found.shortages:
        raise UserError(f"{found.shortages[0]}: make room, or give --to in a folder on another disk")
    host = max(phase.host_bytes for phase in found.phases.values())
    if frame.is_here and frame.card.is_cuda and host > memory_of_host():
        raise UserError(f"the teacher needs {host / 1e9:.1f} GB of host memory")
    return found


def _with_control(frame: Frame, forecaster: Forecaster, proposal: Proposal) -> Proposal:
    """Return the proposal with a control, if there is time and room for another training."""
    most = CONTROL_SECONDS if frame.hours is None else frame.hours * 3600
    if proposal.seconds + (proposal.forecast.phases["train-student"].seconds or 0.0) > most:
        return proposal
    experiment = apply(proposal.experiment, {"evaluate.control": True})
    try:
        return replace(proposal, experiment=experiment, forecast=_checked(frame, forecaster, experiment))
    except UserError:
        return proposal


def _size(experiment: Experiment) -> str:
    student = experiment.student
    if student.search:
        return f"{student.search['parameters'] / 1e6:,.0f} M parameters"
    return str(student.options.get("model", "fresh weights"))


def free_run_dir(file: Path) -> str:
    """Return a run folder that is not there yet, named after the experiment's file."""
    name, number = f"runs/{file.stem}", 1
    while Path(name).exists():
        number += 1
        name = f"runs/{file.stem}-{number}"
    return name
