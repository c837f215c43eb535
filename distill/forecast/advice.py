"""Advice that makes an experiment fit: its levers of memory, tried from the cheapest to the dearest."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from distill import plugins
from distill.errors import UserError
from distill.experiment.configuration import Experiment
from distill.forecast.machine.cards import Card
from distill.forecast.phases.simulator import Phase, Piece

Keys = dict[str, Any]
"""Changed keys of the experiment file and their new values, such as `{"train.batch_size": 2}`."""

Lever = Callable[[Experiment], list[Keys]]
"""Function that returns the changes it can make, from the weakest to the strongest; none if it is pulled already."""

SHORTEST, SMALLEST_CHUNK = 256, 64


class Forecasts(Protocol):
    """Interface of `distill.forecast.forecast.Forecaster`."""

    card: Card
    limit_bytes: int

    def needed_bytes(self, experiment: Experiment, phase: Phase) -> int: ...

    @property
    def simulator(self) -> Any: ...


@dataclass(frozen=True)
class Step:
    """One change, made after the earlier ones."""

    phase: Phase
    """Phase that needed the change."""
    keys: Keys
    needed_bytes: int
    """Bytes of the device in that phase, from this change on."""
    time_factor: float
    """Ratio of the times for each token in that phase, after and before this change."""


@dataclass(frozen=True)
class Advice:
    """The changed experiment."""

    experiment: Experiment
    steps: list[Step]
    fits: bool

    @property
    def changes(self) -> Keys:
        """All changes, each key with its last value."""
        return {key: value for step in self.steps for key, value in step.keys.items()}


def advise(forecaster: Forecasts, experiment: Experiment, phases: tuple[Phase, ...]) -> Advice:
    """Return the changes that make all `phases` fit, or the strongest of all levers if none suffice.

    Levers are pulled from the cheapest to the dearest, each to its end, until a phase fits; then each is let go as far
    as it still fits, the dearest first.
    """
    search, levers = _Search(forecaster, experiment), _levers(forecaster.card)
    fits = True
    for phase in sorted(phases, key=list(levers).index):
        search.phases.append(phase)
        for lever in levers[phase]:
            if search.needed(phase) <= forecaster.limit_bytes:
                break
            search.pull(phase, lever)
        fits = fits and search.needed(phase) <= forecaster.limit_bytes
    if fits:
        costs = [step.time_factor for step in search.steps()]
        for number in sorted(range(len(costs)), key=lambda number: -costs[number]):
            search.let_go(search.pulled[number])
    return Advice(search.changed(), [step for step in search.steps() if step.keys], fits)


@dataclass
class _Pulled:
    """A lever, as far as it is pulled."""

    phase: Phase
    settings: list[Keys]
    """Changes from none to the strongest."""
    at: int

    @property
    def keys(self) -> Keys:
        return self.settings[self.at]


class _Search:
    """Levers pulled so far; simulations are remembered by the forecaster."""

    def __init__(self, forecaster: Forecasts, experiment: Experiment) -> None:
        self.forecaster, self.experiment = forecaster, experiment
        self.phases: list[Phase] = []
        self.pulled: list[_Pulled] = []

    def changed(self, count: int | None = None) -> Experiment:
        """Return the experiment after the first `count` levers, by default all."""
        experiment = self.experiment
        for pulled in self.pulled[:count]:
            experiment = apply(experiment, pulled.keys)
        return experiment

    def needed(self, phase: Phase, count: int | None = None) -> int:
        return self.forecaster.needed_bytes(self.changed(count), phase)

    def pull(self, phase: Phase, lever: Lever) -> None:
        """Pull a lever to its end, if that helps. One that does not suit this student or teacher does not."""
        before, settings = self.needed(phase), lever(self.changed())
        if not settings:
            return
        self.pulled.append(_Pulled(phase, [{}, *settings], len(settings)))
        try:
            helps = self.needed(phase) < before
        except UserError:  # such as checkpointing where there are no blocks
            helps = False
        if not helps:
            self.pulled.pop()

    def let_go(self, pulled: _Pulled) -> None:
        """Go back to the weakest setting with which all phases still fit."""
        settings = range(pulled.at + 1)
        pulled.at = bisect_left(settings, True, key=lambda at: self._fits(pulled, at))

    def _fits(self, pulled: _Pulled, at: int) -> bool:
        before, pulled.at = pulled.at, at
        try:
            return all(self.needed(phase) <= self.forecaster.limit_bytes for phase in self.phases)
        finally:
            pulled.at = before

    def steps(self) -> list[Step]:
        found = []
        for number, pulled in enumerate(self.pulled, start=1):
            before, after = self.changed(number - 1), self.changed(number)
            factor = _seconds(self.forecaster, after, pulled.phase) / _seconds(self.forecaster, before, pulled.phase)
            found.append(Step(pulled.phase, pulled.keys, self.needed(pulled.phase, number), factor))
        return found


def _seconds(forecaster: Forecasts, experiment: Experiment, phase: Phase) -> float:
    """Return the seconds a token takes."""
    pieces: list[Piece] = forecaster.simulator.pieces(experiment, phase, [])
    train = experiment.train
    samples = {
        "cache-teacher": experiment.cache.micro_batch,
        "train-student": train.samples_of_step,
        "evaluate": experiment.evaluate.batch_size,
    }[phase]
    return sum(piece.seconds for piece in pieces) / (samples * experiment.corpus.sequence_length)


def apply(experiment: Experiment, keys: Keys) -> Experiment:
    """Return the experiment with other values of some keys, of any section and of a section's free options."""
    for key, value in keys.items():
        section, name, *option = key.split(".")
        own = getattr(experiment, section)
        if option:
            value = {**getattr(own, name), option[0]: value}
        experiment = replace(experiment, **{section: replace(own, **{name: value})})
    return experiment


def as_options(keys: Keys) -> str:
    """Return the changes as the command line takes them."""
    values = {key: str(value).lower() if isinstance(value, bool) else value for key, value in keys.items()}
    return " ".join(f"--{key} {value}" for key, value in values.items())


def _micro_batch(experiment: Experiment) -> list[Keys]:
    """Make smaller passes, and as many more of them: the same optimiser step."""
    train = experiment.train
    if train.step_in_backward:  # which updates after one pass
        return []
    samples = train.samples_of_step
    sizes = [size for size in range(train.micro_batch // 2, 0, -1) if train.micro_batch % size == 0]
    return [{"train.batch_size": size, "train.accumulate_grad_batches": samples // size} for size in sizes]


def _checkpointing(experiment: Experiment) -> list[Keys]:
    train = experiment.train
    if not train.activation_checkpointing:
        return [{"train.activation_checkpointing": True}]
    return [{"train.checkpoint_every_k": 1}] if train.checkpoint_every_k > 1 else []


def _instead(key: str, values: tuple[str, ...], keys: Keys) -> Lever:
    """Return the lever that sets `keys` where `key` has one of these values."""

    def lever(experiment: Experiment) -> list[Keys]:
        section, name = key.split(".")
        return [keys] if getattr(getattr(experiment, section), name) in values else []

    return lever


def _layer_by_layer(experiment: Experiment) -> list[Keys]:
    """Read weights anew for every batch, quantised as they are: the larger that is, the less the reading costs."""
    class_path = plugins.declared(experiment.teacher.class_path, "teacher", "layer_by_layer")
    if class_path is None:
        return []
    sizes = [size for size in (64, 32, 16, 8) if size <= experiment.cache.shard_samples]  # no batch straddles shards
    common = {"teacher.class_path": class_path, "teacher.options.micro_batch": 1}
    return [{**common, "cache.batch_size": size, "evaluate.batch_size": size} for size in sizes]


def _less_of_streamed(name: str, least: int) -> Lever:
    """Return the lever that halves an option of a teacher that goes layer by layer, again and again."""

    def lever(experiment: Experiment) -> list[Keys]:
        teacher = experiment.teacher
        offers = name in plugins.defaults(teacher.class_path, "teacher")
        value = teacher.options.get(name) or (experiment.cache.micro_batch if name == "micro_batch" else 0)
        key = f"teacher.options.{name}"
        values = [value >> times for times in range(1, value.bit_length() + 1)] if isinstance(value, int) else []
        return [{key: value} for value in values if value >= least] if offers else []

    return lever


def _halved(key: str, least: int = 1) -> Lever:
    """Return the lever that halves a number, rounded down, again and again, but not below `least`."""

    def lever(experiment: Experiment) -> list[Keys]:
        section, name = key.split(".")
        value = getattr(getattr(experiment, section), name)
        return [{key: value >> times} for times in range(1, value.bit_length()) if value >> times >= least]

    return lever


def _levers(card: Card) -> dict[Phase, list[Lever]]:
    """Return each phase's levers, from the cheapest to the dearest."""
    loss_chunk = _halved("loss.chunk_size", SMALLEST_CHUNK)
    length = _halved("corpus.sequence_length", SHORTEST)
    four_bits = _instead("teacher.quantization", ("none", "int8"), {"teacher.quantization": "nf4"})
    fewer_at_a_time, fewer_kept = _less_of_streamed("micro_batch", 1), _less_of_streamed("keep_layers", 0)
    has_bf16 = card.has_bf16 or not card.is_cuda
    pure = {"train.precision": "bf16-true", "train.rounding": "stochastic"}
    half = {"evaluate.student_dtype": "bfloat16" if has_bf16 else "float16"}
    return {
        "train-student": [
            _micro_batch,
            _checkpointing,
            loss_chunk,
            _instead("train.optimizer", ("adamw",), {"train.optimizer": "adamw_8bit"}),
            *([_instead("train.precision", ("32-true", "bf16-mixed", "16-mixed"), pure)] if has_bf16 else []),
            length,
        ],
        "cache-teacher": [
            fewer_at_a_time,
            fewer_kept,
            _halved("cache.batch_size"),
            _halved("cache.chunk_size", SMALLEST_CHUNK),
            four_bits,
            _layer_by_layer,
            length,
        ],
        "evaluate": [
            fewer_at_a_time,
            fewer_kept,
            _halved("evaluate.batch_size"),
            loss_chunk,
            four_bits,
            _layer_by_layer,
            _instead("evaluate.student_dtype", ("float32",), half),
            length,
        ],
    }
