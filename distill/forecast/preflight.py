"""Guard of a phase: memory and disk must hold it before it runs; it keeps to `memory_limit`; forecasts are compared."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch

from distill.cache.format.folder import read_journal
from distill.errors import UserError
from distill.experiment.configuration import Experiment
from distill.experiment.folders import Folders, write_json
from distill.experiment.micro_batch import Key
from distill.forecast.advice import advise, as_options
from distill.forecast.forecast import CONTEXT_BYTES, DRIVER_BYTES, Forecast, Forecaster
from distill.forecast.machine.cards import Card, this_machine
from distill.forecast.micro_batch import begin, with_micro_batches
from distill.forecast.phases.simulator import Phase, Simulator
from distill.forecast.sizes import memory_limit
from distill.models.devices import pick_device
from distill.system import ledger
from distill.system.files import read_bounded
from distill.system.memory import held_memory
from distill.system.progress import say
from distill.system.rank import is_first_process
from distill.system.units import duration, size

FILE = "forecast.json"


def with_micro_batch(experiment: Experiment, key: Key) -> Experiment:
    """Return the experiment of a phase that begins here with a number in place of the `auto` of its batches.

    Raises UserError for a device or a model of which there is no forecast, and where several machines must agree.
    """
    device = pick_device(experiment.train.accelerator)
    if device.type == "mps":
        raise UserError(f"{key}: auto needs a forecast, and there is none for Apple's GPUs: give a number")
    card = this_machine(device.type)
    with _simulator(card) as simulator:
        return begin(Forecaster(card, memory_limit(experiment), held_memory(), simulator), experiment, key)


class Preflight:
    """A phase that is about to begin. `with Preflight(…):` runs it, if it fits.

    Inside, on a CUDA device, torch's allocator keeps to `memory_limit`. At the end the forecast and the measurement are
    printed, and kept in the run's forecast.json.
    """

    def __init__(self, experiment: Experiment, phase: Phase, following: tuple[Phase, ...] = ()) -> None:
        """Prepare; `following` are phases that the same command runs next, which must fit as well."""
        self.experiment, self.phase, self.phases = experiment, phase, (phase, *following)
        self.folders = Folders.of(experiment)
        self.device = pick_device(experiment.train.accelerator)
        self.limit = memory_limit(experiment)
        self.expected: Forecast | None = None
        self._is_checked = False

    def check(self) -> None:
        """Make the forecast, once, and in the first of several processes alone.

        Raises UserError if a phase does not fit, with the change that makes it fit, and if a disk lacks room for what
        is still to be written. A student that cannot be simulated can still be trained, so that is only a message.
        """
        if self._is_checked or not self.experiment.preflight or self.device.type == "mps" or not is_first_process():
            return
        self._is_checked = True
        card = this_machine(self.device.type)
        with _simulator(card) as simulator:
            forecaster = Forecaster(card, self.limit, held_memory(), simulator)
            experiment = with_micro_batches(forecaster, self.experiment, self.phases)
            self.expected = forecaster.forecast(experiment, self.phases)
            for failure in self.expected.failures:
                say(f"{failure}; going on without one")
            if not self.expected.fits:
                raise UserError(_refusal(experiment, self.expected, forecaster))
        if self.expected.shortages:
            raise UserError(
                f"{'; '.join(self.expected.shortages)}: make room there, or point --run_dir or --cache.dir to another "
                "disk (--preflight false tries all the same)"
            )
        if self.device.type == "cuda":
            _say_what_others_hold(self.expected, self.device)

    def __enter__(self) -> Preflight:
        self.check()
        if self.limit is not None and self.device.type == "cuda":
            _hold_to(self.limit, self.device)
        self._earlier = self._lines()
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: Any) -> None:
        if failure is None and self.expected is not None and self.phase in self.expected.phases:
            self._compare(self.expected)

    def _lines(self) -> list[dict[str, Any]]:
        """Return the costs of this phase so far, an entry an invocation."""
        return [line for line in ledger.read(self.folders.run) if line["phase"] == self.phase]

    def _compare(self, forecast: Forecast) -> None:
        """Write rows of forecast and measurement; those of other phases stay."""
        expected, lines = forecast.phases[self.phase], self._lines()[len(self._earlier) :]
        rows: list[tuple[str, str, float | None, float | None]] = []
        if self.device.type == "cuda":
            rows.append(("peak device memory", "bytes", expected.peak_bytes, _largest(lines, "peak_device_bytes")))
        rows.append(("peak host memory", "bytes", expected.host_bytes, _largest(lines, "peak_memory_bytes")))
        # Times of a phase that was begun earlier, or of an evaluation with its benchmarks, cannot be compared.
        if lines and not self._earlier and self.phase != "evaluate":
            rows.append(("time", "s", expected.seconds, sum(line["seconds"] for line in lines)))
        if self.phase == "cache-teacher" and self.experiment.cache.part is None:
            shards = read_journal(self.folders.cache).values()
            rows.append(("size on disk", "bytes", forecast.disk["cache"], sum(shard.bytes for shard in shards)))
        known: list[dict[str, Any]] = [
            {"what": f"{self.phase}: {what}", "unit": unit, "forecast": expectation, "measured": measured}
            for what, unit, expectation, measured in rows
            if expectation is not None and measured
        ]
        for row in known:
            form = size if row["unit"] == "bytes" else duration
            say(f"forecast: {row['what']} {form(row['forecast'])}, measured {form(row['measured'])}")
        others = [row for row in _rows(self.folders.run) if not row["what"].startswith(f"{self.phase}: ")]
        write_json(self.folders.run / FILE, {"rows": [*others, *known]})


@functools.lru_cache(maxsize=1)
def _simulator(card: Card) -> Simulator:
    """Return one simulator for all phases of a command: none is simulated twice."""
    return Simulator(card)


def _refusal(experiment: Experiment, forecast: Forecast, forecaster: Forecaster) -> str:
    advice = advise(forecaster, experiment, tuple(forecast.phases))
    remedy = (
        f"give {as_options(advice.changes)}" if advice.fits else "no change known here makes it fit: smaller models"
    )
    worst = min(forecast.phases, key=forecast.spare_bytes)
    needed, limit = forecast.phases[worst].needed_bytes, forecaster.limit_bytes
    assumed = "".join(f"; {note}" for note in forecast.notes if note.startswith("student.vocabulary"))
    return (
        f"{worst}: needs {size(needed)} of {forecaster.card.name}'s {size(limit)}: {remedy} "
        f"(`distill plan` shows more; --preflight false tries all the same{assumed})"
    )


def _say_what_others_hold(forecast: Forecast, device: torch.device) -> None:
    """Tell if a desktop or another training leaves too little of a card that is large enough."""
    if not forecast.phases:
        return
    free, total = torch.cuda.mem_get_info(device)  # this call creates the context, whose memory is taken from now on
    free += torch.cuda.memory_reserved(device)
    worst = min(forecast.phases, key=forecast.spare_bytes)
    needed = forecast.phases[worst].needed_bytes - forecast.phases[worst].context_bytes
    if needed > free:
        say(
            f"{worst}: may run out of memory: it takes {size(needed)}, and other programs leave {size(free)} of this "
            f"card's {size(total)}: end some (nvidia-smi lists them)"
        )


def _hold_to(limit: int, device: torch.device) -> None:
    """Limit torch's allocator to a card of that size, less the memory of driver and context."""
    total = torch.cuda.get_device_properties(device).total_memory
    if limit > total:
        raise UserError(f"memory_limit: {size(limit)} is more than this card's {size(total)}")
    torch.cuda.set_per_process_memory_fraction(max(limit - CONTEXT_BYTES - DRIVER_BYTES, 0) / total, device)


def _largest(lines: list[dict[str, Any]], key: str) -> int | None:
    return max((line[key] for line in lines if key in line), default=None)


def _rows(run: Path) -> list[dict[str, Any]]:
    try:
        return json.loads(read_bounded(run / FILE))["rows"]
    except (OSError, ValueError, KeyError):
        return []
