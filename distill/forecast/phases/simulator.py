"""The simulator of a forecast: a teacher's batch, a student's step and an evaluation's batch, each once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from distill.errors import UserError, first_line
from distill.experiment.cache import make_scheme
from distill.experiment.configuration import Experiment
from distill.experiment.roles import roles
from distill.experiment.training import check_training
from distill.forecast.child import Child
from distill.forecast.machine.calibration import Efficiency, find, kind_of, speed
from distill.forecast.machine.cards import Card
from distill.forecast.models import Models, size_of
from distill.forecast.phases.evaluation import simulate_fidelity, simulate_likelihood
from distill.forecast.phases.step import StepShape, simulate_step
from distill.forecast.phases.teacher import simulate_teacher
from distill.forecast.simulation.kernels import DeviceKind
from distill.forecast.simulation.result import Simulation
from distill.models.together import batches_for, most_samples, sample_bytes
from distill.system.quiet import quiet
from distill.system.units import size
from distill.targets.schemes import Hidden

Phase = str
PHASES: tuple[Phase, ...] = ("cache-teacher", "train-student", "evaluate")
PASSES = 2
"""Largest number of simulated passes of a step: from the second on each is like the one before."""
DOCUMENTS = 2
"""Documents in a packed sample: the mask that keeps them apart is as large for any number."""


class NoForecast(UserError):
    """Raised when a phase cannot be simulated: its student needs real tensors, or would fail in training."""


@dataclass(frozen=True)
class Piece:
    """One simulation of a phase."""

    what: str
    simulation: Simulation
    seconds: float
    """Seconds of a batch, or of a whole optimiser step."""
    sizes: dict[str, int]
    """Sizes of the model, from `size_of`."""
    loading_bytes: int = 0
    """Host memory while a model is loaded, if that is more than the largest tensor at a time."""


class Simulator:
    """A simulator of the phases of experiments on one card. It does nothing twice, and all in a child process."""

    def __init__(self, card: Card, told: Callable[[Phase], None] = lambda phase: None) -> None:
        """Set up the simulator; `told` is called before each simulation, with its phase."""
        self.card, self._told = card, told
        self._known: dict[str, tuple[list[Piece], list[str]]] = {}
        self._child: Child[[Experiment, Phase], tuple[list[Piece], list[str]]] | None = None

    def pieces(self, experiment: Experiment, phase: Phase, notes: list[str]) -> list[Piece]:
        """Return the phase's simulations. Its peak is the largest of theirs.

        Raises UserError if a model cannot be made, and NoForecast if the phase cannot be simulated.
        """
        key = f"{phase} {_relevant(experiment, phase)}"
        if key not in self._known:
            self._told(phase)
            if self._child is None:
                with contextlib.suppress(Exception):  # a large file is read once for all; its errors come again below
                    self.hidden_size(experiment)
                self._child = Child(partial(simulate, self.card, find(kind_of(self.card))))
            try:
                self._known[key] = self._child(experiment, phase)
            except RuntimeError as error:
                self.close()
                raise NoForecast(f"{phase}: no forecast ({error})") from None
        pieces, own = self._known[key]
        notes += [note for note in own if note not in notes]
        return pieces

    def hidden_size(self, experiment: Experiment) -> int:
        """Return the teacher's hidden size."""
        with quiet():
            return Models(experiment, self.card, []).hidden_size

    def close(self) -> None:
        """End the child; another begins when it is needed."""
        if self._child is not None:
            self._child.close()
            self._child = None

    def __enter__(self) -> Simulator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def simulate(card: Card, efficiency: Efficiency, experiment: Experiment, phase: Phase) -> tuple[list[Piece], list[str]]:
    """Simulate a phase in this process, and return its pieces and the assumptions. Raises as `Simulator.pieces`."""
    notes: list[str] = []
    try:
        with quiet():
            return _SIMULATE[phase](_Pace(card, efficiency), Models(experiment, card, notes)), notes
    except UserError:
        raise
    except Exception as error:  # a stranger's model may raise anything
        raise NoForecast(f"{phase}: no forecast ({type(error).__name__}: {first_line(error)})") from error


class _Pace:
    """The phases, and a card's speed for them."""

    def __init__(self, card: Card, efficiency: Efficiency) -> None:
        self.device: DeviceKind = kind_of(card)
        self.speed, self.reading = speed(card, efficiency), efficiency.reading

    def teacher(self, models: Models) -> list[Piece]:
        cache = models.experiment.cache
        make, sizes = _measured(models.teacher)
        simulation = simulate_teacher(
            make,
            batch_size=cache.micro_batch,
            vocab_size=models.vocab_size,
            scheme=make_scheme(models.experiment, models.hidden_size),
            chunk_size=cache.chunk_size,
            **self._text(models),
        )
        found = self._teacher_piece(models, simulation, sizes)
        return [self._in_groups(models, found) if sizes["bytes_read"] and sizes["goes_together"] else found]

    def _in_groups(self, models: Models, piece: Piece) -> Piece:
        """Let batches go through the layers of a streamed teacher together, as the cache's making lets them.

        Their number is measured there. As much memory is counted as it may take.
        """
        cache, length = models.experiment.cache, models.experiment.corpus.sequence_length
        itemsize = getattr(torch, models.compute_dtype).itemsize
        samples = min(most_samples(length, models.hidden_size, itemsize), cache.shard_samples)
        computing, reading = self.speed.seconds(piece.simulation.work), piece.sizes["bytes_read"] / self.reading
        batches = batches_for(computing, reading, samples // cache.micro_batch)
        if batches > 1:
            models.note(f"cache-teacher: {batches} batches, {batches * cache.micro_batch} samples, share one reading")
        more = max(samples - cache.micro_batch, 0) * sample_bytes(length, models.hidden_size, itemsize)
        parts = piece.simulation.parts
        simulation = replace(
            piece.simulation,
            peak_bytes=piece.simulation.peak_bytes + more,
            parts={**parts, "activations": parts.get("activations", 0) + more},
        )
        return replace(piece, simulation=simulation, seconds=max(computing, reading / batches))

    def _teacher_piece(self, models: Models, simulation: Simulation, sizes: dict[str, int]) -> Piece:
        """Time a batch of the teacher; weights that each batch reads from disk are read while it computes."""
        seconds = max(self.speed.seconds(simulation.work), sizes["bytes_read"] / self.reading)
        if sizes["bytes_read"]:
            models.note(f"teacher: every batch reads {size(sizes['bytes_read'])}, at {size(self.reading)} a second")
        loading = 0
        if models.checkpoint.gguf_file is not None and not sizes["goes_together"]:
            # It is dequantised as a whole: its tensors, and the model made of them.
            each = getattr(torch, models.compute_dtype).itemsize
            loading = 2 * each * (sizes["parameters"] + sizes["packed_parameters"])
        return Piece("teacher", simulation, seconds, sizes, loading)

    def _text(self, models: Models) -> dict[str, Any]:
        corpus = models.experiment.corpus
        return {
            "length": corpus.sequence_length,
            "documents": DOCUMENTS if corpus.shares_samples else 1,
            "device": self.device,
        }

    def student(self, models: Models) -> list[Piece]:
        experiment = models.experiment
        train, scheme = experiment.train, make_scheme(experiment, models.hidden_size)
        check_training(experiment, scheme.name, experiment.cache.held_out_samples, self.device)
        passes = min(train.accumulate_grad_batches, PASSES)
        shape = StepShape(
            samples=train.micro_batch * passes,
            length=self._text(models)["length"],
            entries=max(scheme.most_entries, 1),
            hidden_size=models.hidden_size if isinstance(scheme, Hidden) else None,
            has_rest=experiment.cache.scheme == "top_k",
            documents=self._text(models)["documents"],
        )
        make, sizes = _measured(lambda: models.module(roles(experiment)[0]))
        simulation = simulate_step(make, shape, precision=train.precision, device=self.device)
        passing = self.speed.seconds(simulation.work - simulation.update)
        seconds = passing * train.accumulate_grad_batches / passes + self.speed.seconds(simulation.update)
        return [Piece("a step of the student", simulation, seconds, sizes)]

    def evaluation(self, models: Models) -> list[Piece]:
        config, chunk_size = models.experiment.evaluate, models.experiment.loss.chunk_size
        text: dict[str, Any] = {
            "batch_size": config.batch_size,
            "vocab_size": models.vocab_size,
            "chunk_size": chunk_size,
        }
        text |= self._text(models)
        make, sizes = _measured(models.teacher)
        teacher = simulate_likelihood(make, **text)
        make, student_sizes = _measured(lambda: _trained(models))
        dtype = getattr(torch, models.compute_dtype)
        student = simulate_fidelity(make, teacher_hidden_size=models.hidden_size, teacher_dtype=dtype, **text)
        return [
            self._teacher_piece(models, teacher, sizes),
            Piece("student", student, self.speed.seconds(student.work), student_sizes),
        ]


_SIMULATE: dict[Phase, Callable[[_Pace, Models], list[Piece]]] = {
    "cache-teacher": _Pace.teacher,
    "train-student": _Pace.student,
    "evaluate": _Pace.evaluation,
}


def _measured(make: Callable[[], Any]) -> tuple[Callable[[], Any], dict[str, int]]:
    """Return the same function, and the sizes of the model that it makes, once it has made one."""
    sizes: dict[str, int] = {}

    def made() -> Any:
        model = make()
        sizes.update(size_of(getattr(model, "student", model)))
        return model

    return made, sizes


def _trained(models: Models) -> Any:
    """Make a student as it is loaded after its training: in the evaluation's type, with its adapters merged."""
    student = models.student()
    merged = getattr(student, "merged", None)
    return (student if merged is None else merged()).to(getattr(torch, models.experiment.evaluate.student_dtype))


def _relevant(experiment: Experiment, phase: Phase) -> str:
    """Describe the settings that a phase's simulations depend on, and few others."""
    same = {"max_samples": None, "held_out_samples": 0, "overwrite": False}
    cache = replace(experiment.cache, **same)  # type: ignore[arg-type]
    loss, student, evaluate = experiment.loss, experiment.student, experiment.evaluate
    if phase == "cache-teacher":
        return repr((experiment.corpus, experiment.teacher, cache))
    cache = replace(cache, batch_size=1, chunk_size=1)
    if phase == "evaluate":
        cache, own = replace(cache, scheme="varopt", threshold=0.02), (evaluate.batch_size, evaluate.student_dtype)
        return repr((experiment.corpus, experiment.teacher, cache, student, loss.chunk_size, own))
    train = replace(experiment.train, **_AMOUNTS)
    return repr((experiment.corpus, experiment.teacher, cache, student, loss, train))


_AMOUNTS: dict[str, Any] = {
    **dict.fromkeys(("epochs", "validate_every_steps", "checkpoint_every_steps", "log_every_steps"), 1),
    "num_workers": 0,
}
"""Settings of a training that change its length, and no step of it."""
