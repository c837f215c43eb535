"""`distill plan`: will it fit, how long does it take, how much disk; and if it does not fit, what would make it."""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distill.errors import UserError
from distill.experiment.configuration import Experiment
from distill.experiment.file import to_dict
from distill.experiment.last_steps import check_last_steps
from distill.experiment.precision import with_types_of_card, with_types_of_machine
from distill.forecast.advice import Advice, advise, as_options
from distill.forecast.ahead import check_student_ahead
from distill.forecast.forecast import Forecast, Forecaster
from distill.forecast.machine.calibration import find, kind_of
from distill.forecast.machine.cards import Card, find_card, this_machine
from distill.forecast.micro_batch import with_micro_batches
from distill.forecast.phases.simulator import PHASES, Phase, Simulator
from distill.forecast.sizes import memory_limit
from distill.models.devices import check_number, pick_device
from distill.system.units import duration, size

DOES_NOT_FIT = 3


def main(experiment: Experiment, card: str | None = None, as_json: bool = False, fit: str | None = None) -> int:
    """Print the plan, and return 0 if it fits, on the disks too, and 3 if not.

    fit: a new file for the experiment, changed so that the memory suffices.
    card: a name (`rtx-3060`) or a size (`12GiB`); default: this machine's CUDA device, else its processor.
    Raises UserError for an unknown card or model, for a `fit` that exists already, and in the end for a phase that
    cannot be simulated.
    """
    if fit is not None and Path(fit).exists():
        raise UserError(f"--fit {fit}: is there already: choose another name, or remove it")
    if fit is not None and not Path(fit).absolute().parent.is_dir():
        raise UserError(f"--fit {fit}: there is no folder {Path(fit).parent}: make it, or choose another place")
    made = planned(experiment, card)
    forecast, advice, changed = made.forecast, made.advice, made.changed
    written = None
    if fit is not None and (advice is None or advice.fits):
        written = _write(fit, advice.experiment if advice else made.experiment, advice, forecast.card)
    # Another card may stand in another machine, whose disks are not known.
    shortages = forecast.shortages if card is None else []
    if as_json:
        print(json.dumps(_as_json(forecast, advice, changed, written, shortages), indent=2))
    else:
        _print(forecast, advice, changed, shortages)
        if fit is not None:
            print(f"\nwritten: {written}" if written else f"\n--fit {fit}: not written, for it would not fit either")
    if forecast.failures:
        raise UserError("; ".join(forecast.failures))
    return 0 if forecast.fits and not shortages else DOES_NOT_FIT


@dataclass(frozen=True)
class Plan:
    """The forecast of an experiment on a card, and what would make it fit."""

    experiment: Experiment
    """The experiment with the types and micro-batches that its `auto` takes there."""
    forecast: Forecast
    advice: Advice | None
    """Changes that make it fit, or the strongest there are; None if it fits as it is."""
    changed: Forecast | None
    """Forecast with these changes."""


def planned(experiment: Experiment, card: str | None = None) -> Plan:
    """Return the plan of an experiment on a card, by default this machine's. Raises UserError as `main` does."""
    found = find_card(card) if card is not None else this_machine(pick_device(experiment.train.accelerator).type)
    if card is None:
        check_number(experiment.train.devices, pick_device(experiment.train.accelerator).type, "train.devices")
    asked, experiment = experiment, _with_types(experiment, None if card is None else found)
    check_last_steps(experiment, kind_of(found))
    untried = check_student_ahead(experiment, found, with_weights=False)
    with _shown() as show, Simulator(found, show) as simulator:
        forecaster = Forecaster(found, memory_limit(experiment), simulator=simulator)
        experiment = with_micro_batches(forecaster, experiment, PHASES)
        forecast = forecaster.forecast(experiment)
        forecast.notes[:0] = [*_choices(asked, experiment), *([] if untried is None else [untried])]
        advice = None if forecast.fits else advise(forecaster, experiment, tuple(forecast.phases))
        changed = forecaster.forecast(advice.experiment) if advice else None
    return Plan(experiment, forecast, advice, changed)


@contextlib.contextmanager
def _shown() -> Iterator[Callable[[Phase], None]]:
    """Show in a terminal which phase is simulated, in a line that goes when all of them are done."""
    numbers, is_shown = itertools.count(1), sys.stderr.isatty()

    def show(phase: Phase) -> None:
        if is_shown:
            print(f"\r\x1b[Kplan: {phase}, simulation {next(numbers)}", end="", file=sys.stderr, flush=True)

    try:
        yield show
    finally:
        if is_shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _with_types(experiment: Experiment, card: Card | None) -> Experiment:
    """Return the experiment with the types that its `auto` stands for: here, or on a card that is named."""
    if card is None:
        return with_types_of_machine(experiment)
    return with_types_of_card(experiment, card.is_cuda, card.has_bf16)


def _choices(asked: Experiment, experiment: Experiment) -> list[str]:
    """Return a note for each type and micro-batch that was chosen."""
    found = []
    if asked.teacher.compute_dtype == "auto":
        found.append(f"teacher.compute_dtype: auto takes {experiment.teacher.compute_dtype}")
    if asked.train.precision == "auto":
        found.append(f"train.precision: auto takes {experiment.train.precision}")
    if asked.cache.batch_size == "auto":
        found.append(f"cache.batch_size: auto takes {experiment.cache.micro_batch}")
    if asked.train.batch_size == "auto":
        train = experiment.train
        found.append(
            f"train.batch_size: auto takes {train.micro_batch}, with accumulate_grad_batches "
            f"{train.accumulate_grad_batches}"
        )
    return found


def _print(forecast: Forecast, advice: Advice | None, changed: Forecast | None, shortages: list[str]) -> None:
    card = forecast.card
    is_calibrated = find(kind_of(card)).is_measured
    timed = (
        "calibrated" if is_calibrated else "by default shares of its speed; `distill doctor --calibrate` measures them"
    )
    print(f"{card.name}, {size(forecast.limit_bytes)}; time {timed}\n")
    _print_phases(forecast)
    _print_disk(forecast)
    _print_training(forecast)
    for note in forecast.notes:
        print(f"- {note}")
    for shortage in shortages:
        print(f"\nit does not fit on the {shortage}: make room there, or point --run_dir or --cache.dir elsewhere")
    if advice is None:
        if not shortages:
            print("\nit fits" + (", as far as there is a forecast" if forecast.failures else ""))
        return
    assert changed is not None
    if not advice.fits:
        print("\nit does not fit, even with smaller passes, chunks and samples, and numbers of fewer bits:")
        _print_phases(changed)
        print(_FURTHER if card.is_cuda else "smaller models are what is left")
        return
    print("\nit does not fit. What makes it fit:")
    for step in advice.steps:
        took = f"{size(step.needed_bytes)} in {step.phase}, time × {step.time_factor:.2f}"
        print(f"  {as_options(step.keys)}   ({took})")
    print("\nwith all of that:")
    _print_phases(changed)
    for note in changed.notes:
        if note not in forecast.notes:
            print(f"- {note}")


_FURTHER = (
    "what is left: smaller models, adapters (student.class_path lora), train.step_in_backward, "
    "train.offload_activations, train.optimizer paged_adamw_8bit"
)
_SHORT = {
    "weights": "weights",
    "quantized weights": "quantised weights",
    "gradients": "gradients",
    "optimizer states": "optimiser",
    "activations": "activations",
    "head and loss": "head chunk",
    "temporaries": "temporaries",
    "buffers and batch": "buffers",
}


def _print_phases(forecast: Forecast) -> None:
    print(f"{'phase':<15}{'device':>10}{'verdict':>28}{'host':>10}{'time':>15}")
    for name, phase in forecast.phases.items():
        spare = forecast.spare_bytes(name)
        verdict = f"fits, {size(spare)} to spare" if spare >= 0 else f"does not fit by {size(-spare)}"
        time = f"{duration(phase.seconds_each)} each" if phase.seconds is None else duration(phase.seconds)
        print(f"{name:<15}{size(phase.needed_bytes):>10}{verdict:>28}{size(phase.host_bytes):>10}{time:>15}")
        parts = {_SHORT[kind]: held for kind, held in phase.parts.items()}
        parts |= {"context": phase.context_bytes, "fragmentation": phase.fragmentation_bytes}
        print("  " + ", ".join(f"{kind} {size(held)}" for kind, held in parts.items() if held >= 5e6))


def _print_training(forecast: Forecast) -> None:
    if forecast.training is not None:
        print(f"training: {forecast.training.described()}")
        for line in forecast.training.shortcomings():
            print(f"- {line}")
    if forecast.rounds is not None:
        print(f"rounds: {forecast.rounds.described()}")


def _print_disk(forecast: Forecast) -> None:
    told = [f"{name} {'unknown' if held is None else size(held)}" for name, held in forecast.disk.items()]
    print(f"disk: {', '.join(told)}; {size(forecast.free_disk_bytes)} are free")


def _as_json(
    forecast: Forecast, advice: Advice | None, changed: Forecast | None, written: str | None, shortages: list[str]
) -> dict[str, Any]:
    fits = forecast.fits and not shortages
    content = {"fits": fits, **_forecast(forecast), "shortages": shortages, "changes": [], "written": written}
    if advice is not None:
        content |= {"changes": [asdict(step) for step in advice.steps], "changes_suffice": advice.fits}
    if changed is not None:
        content["with_changes"] = _forecast(changed)
    return content


def _forecast(forecast: Forecast) -> dict[str, Any]:
    phases = {
        name: {**asdict(phase), "needed_bytes": phase.needed_bytes, "spare_bytes": forecast.spare_bytes(name)}
        for name, phase in forecast.phases.items()
    }
    return {
        "card": asdict(forecast.card),
        "limit_bytes": forecast.limit_bytes,
        "phases": phases,
        "disk": forecast.disk,
        "free_disk_bytes": forecast.free_disk_bytes,
        "training": _training(forecast),
        "rounds": None if forecast.rounds is None else asdict(forecast.rounds),
        "notes": forecast.notes,
        "failures": forecast.failures,
    }


def _training(forecast: Forecast) -> dict[str, Any] | None:
    training = forecast.training
    if training is None:
        return None
    return {**asdict(training), "tokens": training.tokens, "shortcomings": training.shortcomings()}


def _write(path: str, experiment: Experiment, advice: Advice | None, card: Card) -> str:
    """Write all keys with their values, so that the file is complete. Raises UserError if it cannot be written."""
    import yaml

    changes = as_options(advice.changes) if advice else "nothing had to change"
    head = f"# Made by `distill plan --fit` for {card.name}: {changes}\n"
    text = head + yaml.safe_dump(to_dict(experiment), sort_keys=False, allow_unicode=True, width=1000)
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        if not isinstance(error, FileExistsError):  # then the file is ours, and half of it would block the next attempt
            Path(path).unlink(missing_ok=True)
        raise UserError(f"--fit {path}: cannot be written ({error.strerror}): choose another place") from None
    return path
