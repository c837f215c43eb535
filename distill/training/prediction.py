"""A word early: the student beside its teacher before the first step, and the held-out KL it will end at."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from distill.system.files import make_folder, read_bounded, write_durably
from distill.system.progress import say
from distill.system.rank import is_first_process
from distill.training.data import CacheDataModule
from distill.training.learning_curve import FEWEST, SAMPLES, LearningCurve, Place, Prediction, measured_steps, places

FILE = "prediction.json"
"""Points, predictions and the end, beside the logs of a training."""
TOLD = (0.1, 0.5)
"""Shares of a training after which its end is predicted."""
FURTHER = (3, 10)
"""Multiples of the tokens for which the end is predicted too."""
STEEP = 0.5
"""Share of the first KL below which an early point tells no end: a student that knew nothing (or was cut so far) falls
steeply first, on another curve than later. One such prediction was wrong by half."""
LITTLE = 0.05
"""Share of the first KL below which a predicted gain is little."""


class PredictEnd(pl.Callback):
    """A callback that measures a few held-out samples early and says what KL the training will end at.

    Place it before the callback that writes checkpoints, which hold its state. A training of so few steps that its
    first tenth has no points says nothing.

    Args:
        data: data module with the held-out samples.
        name: the role, `student` or `control`.
        logs: the training's folder of logs, for the predictions as JSON.
        student: the student's folder of logs, with which a control is compared.
    """

    def __init__(self, data: CacheDataModule, name: str, logs: Path, student: Path | None = None) -> None:
        self.data, self.name, self.logs, self.student = data, name, logs, student
        self.total = 0
        self.points: dict[int, float] = {}
        self.told: dict[str, dict[str, dict[str, float]]] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.total = int(trainer.estimated_stepping_batches)
        if pl_module.steps_begun == 0 and (values := self._measure(pl_module)):
            say(
                f"{self.name}: before the first step, on held-out text: {values['held_out_kl']:.3f} nats from its "
                f"teacher (KL), nll {values['held_out_nll']:.3f} where the teacher has {values['teacher_nll']:.3f}"
            )

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = pl_module.steps_begun
        if step in measured_steps(self.total):
            self._measure(pl_module)
            for share in TOLD:
                if step == round(share * self.total) and len(self.points) >= FEWEST:
                    self._predict(share, pl_module.make_schedule(self.total))

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._write()

    def _measure(self, module: Any) -> dict[str, float]:
        """Measure, and keep the point; nothing is returned where there is no held-out text."""
        values: dict[str, float] = module.measure(self.data.some_held_out(SAMPLES))
        if values:
            self.points[module.steps_begun] = values["held_out_kl"]
        return values

    def _predict(self, share: float, rate: Callable[[int], float]) -> None:
        first, now = self.points.get(0, 0.0), self.points[round(share * self.total)]
        if share == TOLD[0] and now < STEEP * first:
            say(
                f"{self.name}: after {share:.0%} of the steps: the held-out KL fell from {first:.3f} to {now:.3f}, too "
                "steeply to tell where it will end"
            )
            return
        after = places(rate, self.total)
        curve = LearningCurve({after[step]: kl for step, kl in self.points.items()})
        end = after[-1]
        # A longer training's rate is this one's, stretched: it ends as far below its peak.
        found = {factor: curve.at(Place(end.work * factor, end.decay)) for factor in (1, *FURTHER)}
        self.told[f"{share:g}"] = {str(factor): asdict(one) for factor, one in found.items()}
        further = ", ".join(f"{found[factor].kl:.3f} with {factor} × the tokens" for factor in FURTHER)
        say(
            f"{self.name}: after {share:.0%} of the steps: the held-out KL is predicted to end at {_said(found[1])}; "
            f"{further}"
        )
        self._warn(found[1])
        self._write()

    def _warn(self, end: Prediction) -> None:
        """Say that little is to be gained, if the prediction says so."""
        first = self.points.get(0)
        if first is not None and end.kl > (1 - LITTLE) * first:
            say(
                f"{self.name}: that is hardly below the {first:.3f} it began with: there is little to gain from this "
                "teacher on this text"
            )
        others = _end_of(self.student)
        if others is not None and end.kl <= others:
            say(
                f"{self.name}: it learns from the text alone, and yet is predicted to come as near to the teacher as "
                f"the student did ({others:.3f}): the teacher's targets give little here"
            )

    def _write(self) -> None:
        if self.points and is_first_process():
            end = self.points.get(self.total)
            content = {"steps": self.total, "points": [*self.points.items()], "predicted": self.told, "end": end}
            make_folder(self.logs)
            write_durably(self.logs / FILE, (json.dumps(content, indent=1) + "\n").encode())

    def state_dict(self) -> dict[str, Any]:
        return {"points": self.points, "told": self.told}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.points, self.told = dict(state_dict["points"]), dict(state_dict["told"])


def _said(one: Prediction) -> str:
    return f"{one.kl:.3f} ({one.low:.3f} to {one.high:.3f})"


def _end_of(logs: Path | None) -> float | None:
    """Return the KL that another training ended at; None if that is not known."""
    if logs is None:
        return None
    try:
        end = json.loads(read_bounded(logs / FILE))["end"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return end if isinstance(end, float) else None
