"""What makes an experiment fit: its levers of memory, tried from the cheapest to the dearest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from distill.config import Experiment
from distill.errors import UserError
from distill.workspace.forecasting.phases import Part, Phase

Keys = dict[str, Any]
"""Changed keys of the experiment file and their new values, such as `{"train.batch_size": 2}`."""

SHORTEST, SMALLEST_CHUNK = 256, 64


class Forecasts(Protocol):
    """What `distill.workspace.forecast.Forecaster` offers."""

    limit_bytes: int

    def needed_bytes(self, experiment: Experiment, phase: Phase) -> int: ...

    @property
    def simulator(self) -> Any: ...


@dataclass(frozen=True)
class Step:
    """One change, made after those before it."""

    phase: Phase
    """For whose sake."""
    keys: Keys
    needed_bytes: int
    """Of the device, in that phase, from then on."""
    time_factor: float
    """Time for each token in that phase, of what it was before this change."""


@dataclass(frozen=True)
class Advice:
    """The changed experiment."""

    experiment: Experiment
    steps: list[Step]
    fits: bool

    @property
    def changes(self) -> Keys:
        """All of them, each key with its last value."""
        return {key: value for step in self.steps for key, value in step.keys.items()}


def advise(forecaster: Forecasts, experiment: Experiment, phases: tuple[Phase, ...]) -> Advice:
    """The cheapest levers after which all `phases` fit, or all levers when they do not even then."""
    steps: list[Step] = []
    fits = True
    for phase in sorted(phases, key=list(_LEVERS).index):
        needed = forecaster.needed_bytes(experiment, phase)
        for lever in _LEVERS[phase]:
            if needed <= forecaster.limit_bytes:
                break
            found = _weakest_that_fits(forecaster, experiment, phase, lever(experiment), needed)
            if found is None:
                continue
            keys, after = found
            changed = apply(experiment, keys)
            factor = _seconds(forecaster, changed, phase) / _seconds(forecaster, experiment, phase)
            steps.append(Step(phase, keys, after, factor))
            experiment, needed = changed, after
        fits = fits and needed <= forecaster.limit_bytes
    # A change for one phase can be felt in another, and never makes that larger.
    return Advice(experiment, steps, fits)


def _weakest_that_fits(
    forecaster: Forecasts, experiment: Experiment, phase: Phase, variants: list[Keys], needed: int
) -> tuple[Keys, int] | None:
    """Of one lever's settings, from weak to strong, the first that fits, else the strongest; None: it does not help."""
    if not variants:
        return None
    try:
        strongest = forecaster.needed_bytes(apply(experiment, variants[-1]), phase)
    except UserError:  # not for this student, such as checkpointing where there are no blocks
        return None
    if strongest >= needed:
        return None
    if strongest <= forecaster.limit_bytes:
        for keys in variants[:-1]:
            after = forecaster.needed_bytes(apply(experiment, keys), phase)
            if after <= forecaster.limit_bytes:
                return keys, after
    return variants[-1], strongest


def _seconds(forecaster: Forecasts, experiment: Experiment, phase: Phase) -> float:
    """For each token."""
    parts: list[Part] = forecaster.simulator.parts(experiment, phase, [])
    train = experiment.train
    samples = {
        "cache-teacher": experiment.cache.batch_size,
        "train-student": train.batch_size * train.accumulate_grad_batches,
        "evaluate": experiment.evaluate.batch_size,
    }[phase]
    return sum(part.seconds for part in parts) / (samples * experiment.corpus.sequence_length)


def apply(experiment: Experiment, keys: Keys) -> Experiment:
    """The experiment with other values of some keys, of any section but the free options."""
    for key, value in keys.items():
        section, name = key.split(".")
        experiment = replace(experiment, **{section: replace(getattr(experiment, section), **{name: value})})
    return experiment


def as_options(keys: Keys) -> str:
    """As they are given on the command line."""
    values = {key: str(value).lower() if isinstance(value, bool) else value for key, value in keys.items()}
    return " ".join(f"--{key} {value}" for key, value in values.items())


def _halves(value: int, least: int = 1) -> list[int]:
    """Half of it and so on, as long as it is a whole number and not below `least`."""
    found = []
    while value % 2 == 0 and value // 2 >= least:
        value //= 2
        found.append(value)
    return found


def _micro_batch(experiment: Experiment) -> list[Keys]:
    """Smaller passes, as many more of them: the same optimiser step."""
    train = experiment.train
    samples = train.batch_size * train.accumulate_grad_batches
    sizes = _halves(train.batch_size)
    if not sizes or sizes[-1] > 1:
        sizes += [1] if train.batch_size > 1 else []
    if train.step_in_backward:  # which updates after one pass
        return []
    return [{"train.batch_size": size, "train.accumulate_grad_batches": samples // size} for size in sizes]


def _checkpointing(experiment: Experiment) -> list[Keys]:
    train = experiment.train
    if not train.activation_checkpointing:
        return [{"train.activation_checkpointing": True}]
    return [{"train.checkpoint_every_k": 1}] if train.checkpoint_every_k > 1 else []


def _optimizer(experiment: Experiment) -> list[Keys]:
    return [{"train.optimizer": "adamw_8bit"}] if experiment.train.optimizer == "adamw" else []


def _pure_bfloat16(experiment: Experiment) -> list[Keys]:
    if experiment.train.precision == "bf16-true":
        return []
    return [{"train.precision": "bf16-true", "train.rounding": "stochastic"}]


def _four_bits(experiment: Experiment) -> list[Keys]:
    return [{"teacher.quantization": "nf4"}] if experiment.teacher.quantization == "none" else []


def _halved(key: str, least: int = 1) -> Callable[[Experiment], list[Keys]]:
    def lever(experiment: Experiment) -> list[Keys]:
        section, name = key.split(".")
        return [{key: size} for size in _halves(getattr(getattr(experiment, section), name), least)]

    return lever


_LENGTH = _halved("corpus.sequence_length", SHORTEST)
_LOSS_CHUNK = _halved("loss.chunk_size", SMALLEST_CHUNK)
_LEVERS: dict[Phase, list[Callable[[Experiment], list[Keys]]]] = {
    "train-student": [_micro_batch, _checkpointing, _LOSS_CHUNK, _optimizer, _pure_bfloat16, _LENGTH],
    "cache-teacher": [
        _halved("cache.batch_size"),
        _halved("cache.chunk_size", SMALLEST_CHUNK),
        _four_bits,
        _LENGTH,
    ],
    "evaluate": [_halved("evaluate.batch_size"), _LOSS_CHUNK, _four_bits, _LENGTH],
}
