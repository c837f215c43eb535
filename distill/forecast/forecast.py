"""Forecast of an experiment on a card: memory, time and disk, before any weight is loaded."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from distill.experiment.configuration import Experiment, TrainConfig
from distill.experiment.folders import Folders
from distill.experiment.precision import with_types_of_card
from distill.experiment.roles import roles
from distill.experiment.search import asked, with_found_sizes
from distill.forecast.ahead import student_sizes
from distill.forecast.fetched import models_to_come
from distill.forecast.machine.calibration import kind_of
from distill.forecast.machine.cards import GIB, Card, this_machine
from distill.forecast.phases.simulator import PHASES, NoForecast, Phase, Piece, Simulator
from distill.forecast.room import free_bytes, needs, shortages
from distill.forecast.rounds import RoundsForecast, rounds_of
from distill.forecast.sizes import Amount, amount_of, bytes_a_token, cache_bytes, corpus_work, moment_bytes
from distill.forecast.steps import Training, searched, step_samples, steps
from distill.forecast.writing import is_asked, looks_seconds, seconds_of, writing_of
from distill.system.units import duration, size
from distill.training.learning_curve import SAMPLES, measured_steps

CONTEXT_BYTES = int(0.6 * GIB)
"""Memory of a card that a process takes beside torch's allocator: the CUDA context and the kernels of torch, cuBLAS
and bitsandbytes, 0.3 to 0.6 GiB depending on card and driver (`nvidia-smi` less `torch.cuda.memory_reserved`)."""
DRIVER_BYTES = int(0.25 * GIB)
"""Memory that a driver keeps for itself: a card sold with 12 GiB offers 11.75 GiB. A card of this machine reports the
memory that it really has.
"""
MARGIN_BYTES = int(0.7e9)
"""Spare memory below which a note is printed."""
FRAGMENTATION = 0.05
"""Share of the peak that the allocator holds without using it: it takes memory in pieces of 2 MiB (20 MiB from 1 MiB
up), and freed pieces do not always suit later tensors. Five per cent is usual if all steps have one shape.
"""
LIBRARIES_BYTES = {"cuda": int(2.5 * GIB), "cpu": int(0.9 * GIB)}
"""Resident memory of a process that has imported everything, and on CUDA has begun to use it."""
WORKER_BYTES = int(0.4 * GIB)
"""Host memory of a process that reads the cache (`train.num_workers`)."""
LARGEST_TENSORS_BYTES = 2 * GIB
"""Host memory while a checkpoint is read tensor by tensor to a device: twice the largest tensor is below that."""


@dataclass(frozen=True)
class PhaseForecast:
    """Needs of one phase."""

    phase: Phase
    peak_bytes: int
    """Largest number of bytes in use on the device at one time."""
    parts: dict[str, int]
    """Bytes at the peak by their kind; they sum to it."""
    context_bytes: int
    """Driver, CUDA context and libraries on the device."""
    fragmentation_bytes: int
    host_bytes: int
    """Host memory, roughly. On a CPU it is `needed_bytes`."""
    seconds: float | None
    """Seconds of the whole phase. None means that the amount of text is not known."""
    seconds_each: float
    """Seconds of a batch, or of an optimiser step."""
    count: int | None
    """Batches, or optimiser steps of all trainings."""

    @property
    def needed_bytes(self) -> int:
        """Bytes of the device, all in all."""
        return self.peak_bytes + self.context_bytes + self.fragmentation_bytes


@dataclass(frozen=True)
class Forecast:
    """Needs of an experiment on a card."""

    card: Card
    limit_bytes: int
    """Device memory that may be used."""
    phases: dict[Phase, PhaseForecast]
    """Phases that could be simulated."""
    failures: list[str]
    """Reasons why the others could not."""
    disk: dict[str, int | None]
    """Bytes of `cache`, `checkpoints` and `student`, of the teacher's `head` beside hidden states, of its copy for
    streaming (`quantised teacher`), of the checkpoints that are still to come from the hub (`fetched models`), of the
    texts that are to be `written`, and of the `rounds`. None means that the amount of text is not known."""
    free_disk_bytes: int
    """Free bytes on the disk of the run's folder."""
    shortages: list[str]
    """Disks of this machine that lack room for what is still to be written, a line each."""
    notes: list[str] = field(default_factory=list)
    """Assumptions that were made."""
    training: Training | None = None
    """Amount of the student's training; None if the amount of text is not known."""
    rounds: RoundsForecast | None = None
    """Rounds after it; None without any, or if the amount of text is not known."""

    def spare_bytes(self, phase: Phase) -> int:
        """Return the bytes left on the device at the phase's peak; below 0 it does not fit."""
        return self.limit_bytes - self.phases[phase].needed_bytes

    @property
    def fits(self) -> bool:
        return all(self.spare_bytes(phase) >= 0 for phase in self.phases)


class Forecaster:
    """A forecaster of experiments, and changed ones, on one card."""

    def __init__(
        self,
        card: Card,
        limit_bytes: int | None = None,
        process_bytes: int = 0,
        simulator: Simulator | None = None,
    ) -> None:
        """Set the limits.

        `limit_bytes`: use no more of the card's memory; default: all of it.
        `process_bytes`: host memory that the process already holds in which the phases will run.
        `simulator`: one that knows some of the phases already.
        """
        self.card, self.simulator = card, simulator or Simulator(card)
        self.limit_bytes = min(limit_bytes or card.memory_bytes, card.memory_bytes)
        kind = kind_of(card)
        self.process_bytes = max(process_bytes, LIBRARIES_BYTES[kind]) if kind == "cpu" else LIBRARIES_BYTES[kind]

    def forecast(self, experiment: Experiment, phases: tuple[Phase, ...] = PHASES) -> Forecast:
        """Return the forecast. Raises UserError for models that are neither here nor known, or cannot be made."""
        experiment = with_types_of_card(experiment, self.card.is_cuda, self.card.has_bf16)
        notes: list[str] = []
        failures: list[str] = []
        found: dict[Phase, list[Piece]] = {}
        for phase in phases:
            try:
                found[phase] = self.simulator.pieces(experiment, phase, notes)
            except NoForecast as error:
                failures.append(str(error))
        amount = amount_of(experiment, notes)
        made = {phase: self._phase(experiment, phase, pieces, amount) for phase, pieces in found.items()}
        disk = self._disk(experiment, found, amount, notes)
        if is_asked(experiment):
            disk["written"] = self._writing(experiment, found, notes)
        each = bytes_a_token(experiment, self.simulator.hidden_size(experiment), [])
        rounds = rounds_of(experiment, found, amount, self.card, each, disk, notes)
        config = experiment.evaluate
        if config.tasks or config.cost or config.texts or config.own_texts:
            notes.append("evaluate: time of the text alone; benchmarks, cost and texts come on top, and shrink to fit")
        if self.card.is_cuda and not self.card.has_bf16 and experiment.train.precision.startswith("bf16"):
            notes.append(
                f"train.precision {experiment.train.precision}: {self.card.name} has no bfloat16: take 16-mixed"
            )
        if "evaluate" in phases and not experiment.corpus.held_out:
            notes.append("evaluate: corpus.held_out is 0, which leaves no text to evaluate on")
        notes += _left_out(experiment.train)
        if (search := asked(with_found_sizes(experiment))) is not None:
            notes.append(
                f"student.search: {search.candidates} candidates are tried when the training begins; the largest is "
                "assumed"
            )
        small = [phase for phase, one in made.items() if 0 <= self.limit_bytes - one.needed_bytes < MARGIN_BYTES]
        if small and self.card.is_cuda:
            notes.append(f"{', '.join(small)}: less than {size(MARGIN_BYTES)} to spare, and the allowances are guesses")
        free, short = free_bytes(Folders.of(experiment).run), shortages(needs(experiment, disk, amount.cached))
        sizes = found["train-student"][0].sizes if "train-student" in found else None
        training = Training.of(experiment, amount, None if sizes is None else sizes["trained_parameters"])
        return Forecast(self.card, self.limit_bytes, made, failures, disk, free, short, notes, training, rounds)

    def needed_bytes(self, experiment: Experiment, phase: Phase) -> int:
        """Return the device memory that a phase needs."""
        experiment = with_types_of_card(experiment, self.card.is_cuda, self.card.has_bf16)
        peak = max(piece.simulation.peak_bytes for piece in self.simulator.pieces(experiment, phase, []))
        return peak + round(FRAGMENTATION * peak) + self._context_bytes()

    def _context_bytes(self) -> int:
        if not self.card.is_cuda:
            return self.process_bytes
        is_whole = _is_here(self.card) and self.limit_bytes == self.card.memory_bytes
        return CONTEXT_BYTES if is_whole else CONTEXT_BYTES + DRIVER_BYTES

    def _phase(self, experiment: Experiment, phase: Phase, pieces: list[Piece], amount: Amount) -> PhaseForecast:
        peak = max((piece.simulation for piece in pieces), key=lambda simulation: simulation.peak_bytes)
        seconds, each, count = _time(experiment, phase, pieces, amount)
        if phase == "train-student" and seconds is not None and count is not None:
            seconds += looks_seconds(experiment, count, self.card, pieces[0].sizes)
        needed = peak.peak_bytes + round(FRAGMENTATION * peak.peak_bytes) + self._context_bytes()
        return PhaseForecast(
            phase=phase,
            peak_bytes=peak.peak_bytes,
            parts={kind: held for kind, held in peak.parts.items() if held},
            context_bytes=self._context_bytes(),
            fragmentation_bytes=round(FRAGMENTATION * peak.peak_bytes),
            host_bytes=self._host_bytes(experiment, pieces, amount, needed, phase),
            seconds=seconds,
            seconds_each=each,
            count=count,
        )

    def _host_bytes(
        self, experiment: Experiment, pieces: list[Piece], amount: Amount, needed: int, phase: Phase
    ) -> int:
        loading = max(piece.loading_bytes + piece.sizes.get("host_bytes", 0) for piece in pieces)
        states = 0
        if phase == "evaluate":  # the teacher's, of all samples
            each = self.simulator.hidden_size(experiment) * (2 if self.card.is_cuda else 4)
            states = (amount.evaluated or 0) * experiment.corpus.sequence_length * each
        if not self.card.is_cuda:
            return max(needed, self.process_bytes + loading) + states
        if phase == "train-student":
            sizes = pieces[0].sizes
            # The whole student is made in host memory before it moves: in float32, except for a frozen base.
            made = sizes["bytes"] if sizes["trained_parameters"] < sizes["parameters"] else 4 * sizes["parameters"]
            return self.process_bytes + made + WORKER_BYTES * experiment.train.num_workers
        students = 4 * pieces[1].sizes["parameters"] if phase == "evaluate" else 0
        return self.process_bytes + max(LARGEST_TENSORS_BYTES, loading, students) + states

    def _disk(
        self, experiment: Experiment, found: dict[Phase, list[Piece]], amount: Amount, notes: list[str]
    ) -> dict[str, int | None]:
        teachers = [pieces[0].sizes for pieces in found.values() if pieces[0].sizes.get("copy_bytes")]
        disk: dict[str, int | None] = {**models_to_come(experiment, found, teachers[0] if teachers else None, notes)}
        if "cache-teacher" in found:
            each = bytes_a_token(experiment, self.simulator.hidden_size(experiment), notes)
            disk["cache"] = cache_bytes(experiment, each, amount.cached)
            if (work := corpus_work(experiment, amount)) is not None:
                disk["corpus"] = work.table_bytes
                notes.append(f"corpus {experiment.corpus.named}: {work.described()}")
            if experiment.cache.scheme == "hidden":
                disk["head"] = found["cache-teacher"][0].sizes["head_bytes"]
        sizes = self._student_sizes(experiment, found)
        if sizes is not None:
            train = experiment.train
            trained = sizes["trained_bytes"]
            moments = moment_bytes(experiment, sizes["trained_parameters"], trained)
            whole, models = train.keep_checkpoints + 1, len(roles(experiment))  # one more while it is written
            if (count := steps(experiment, amount)) is not None:
                whole = min(whole, -(-count // train.checkpoint_every_steps))
            disk["checkpoints"] = models * (whole * (trained + moments) + trained)  # and the best weights
            disk["student"] = models * _student_bytes(experiment, sizes)
        return disk

    def _writing(self, experiment: Experiment, found: dict[Phase, list[Piece]], notes: list[str]) -> int | None:
        """Return the bytes of the texts that a model is to write, and note their time."""
        writing = writing_of(experiment)
        if writing is None:
            notes.append("generate: the number of prompts is not known here; with generate.max_prompts it is told")
            return None
        time = "its time is not known here"
        pieces = found.get("cache-teacher" if experiment.generate.by == "teacher" else "train-student")
        if pieces is not None:
            seconds = seconds_of(writing, experiment, self.card, pieces[0].sizes)
            time = f"about {duration(seconds)} at most, if no text ends before its limit"
        notes.append(
            f"generate: up to {writing.texts:,} texts and {writing.tokens:,} tokens of the {experiment.generate.by}; "
            f"{time}; the memory of its key-value cache is not counted (generate.batch_size is halved where it lacks)"
        )
        return writing.bytes

    def _student_sizes(self, experiment: Experiment, found: dict[Phase, list[Piece]]) -> dict[str, int] | None:
        """Return the student's sizes if a training follows, also one that another command begins later."""
        if "train-student" in found:
            return found["train-student"][0].sizes
        return student_sizes(experiment, self.card) if set(found) == {"cache-teacher"} else None


def _left_out(train: TrainConfig) -> list[str]:
    """Return notes on the memory and time that the forecast of a training leaves out."""
    found = []
    if train.strategy == "fsdp":
        found.append("train.strategy fsdp: forecast as if each device had the whole student")
    if train.offload_activations:
        found.append("train.offload_activations: neither the way to the host and back nor its memory there is counted")
    if train.optimizer.startswith("paged"):
        found.append(f"train.optimizer {train.optimizer}: the time of its update and its pages are not counted")
    return found


def _is_here(card: Card) -> bool:
    return card.is_cuda and torch.cuda.is_available() and card == this_machine()


def _time(
    experiment: Experiment, phase: Phase, pieces: list[Piece], amount: Amount
) -> tuple[float | None, float, int | None]:
    """Return the seconds of a phase, those of one of its batches or steps, and their number."""
    train = experiment.train
    if phase == "cache-teacher":
        processes = experiment.cache.devices * experiment.cache.num_nodes
        count = None if amount.cached is None else -(-amount.cached // (experiment.cache.micro_batch * processes))
        each = pieces[0].seconds
    elif phase == "evaluate":
        batches = None if amount.evaluated is None else -(-amount.evaluated // experiment.evaluate.batch_size)
        models = 1 + experiment.rounds.count + len(roles(experiment))  # before its training too
        each = pieces[0].seconds + models * pieces[1].seconds
        count = batches
    else:
        each, count = pieces[0].seconds, steps(experiment, amount)
        if count is None:
            return None, each, None
        # A held-out sample needs only a forward pass, about a third of a training sample's work.
        looks = (count // train.validate_every_steps + 1) * amount.held_out
        looks += len(measured_steps(count)) * min(SAMPLES, amount.held_out)
        held_out = looks / step_samples(experiment) / 3
        trainings = len(roles(experiment))
        tries = searched(with_found_sizes(experiment), amount, count)
        return (trainings * (count + held_out) + tries) * each, each, trainings * count
    return None if count is None else count * each, each, count


def _student_bytes(experiment: Experiment, sizes: dict[str, int]) -> int:
    """Return the bytes of the finished folder: the weights as trained, or all weights with adapters merged."""
    if sizes["trained_parameters"] == sizes["parameters"]:
        return sizes["bytes"]
    each = 4 if experiment.student.options.get("export_dtype", "float32") == "float32" else 2
    return each * (sizes["parameters"] + sizes["packed_parameters"])
