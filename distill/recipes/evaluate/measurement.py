"""The form of a measurement: what each thing that is measured of a model tells of itself."""

from __future__ import annotations

from typing import Any

from distill.experiment.subjects import Loaded, Subject


class Measurement:
    """One thing to measure of every model that it is wanted of. The teacher comes first."""

    section: str
    """Key in evaluation.json."""
    item: str = ""
    """Key below the model's, if a section has several."""
    together: bool = False
    """True if it compares the models, so that all of them must be measured if one of them is."""

    rounds: int = 1
    """Rounds in which the models are measured in turn, each loaded again in every round."""

    @property
    def inputs(self) -> dict[str, Any]:
        """The settings that it depends on beside the models. While they are the same, nothing is measured twice."""
        raise NotImplementedError

    def wanted_of(self, subject: Subject) -> bool:
        """Tell whether the model is measured. By default it is for teacher, student and control.

        Trainings with further seeds are there for the metrics' spread alone.
        """
        return subject.name in ("teacher", "student", "control")

    def takes_part(self, subject: Subject, number: int) -> bool:
        """Tell whether a model is loaded in a round (counted from 0) of those in which the models take turns."""
        return True

    def measure(self, subject: Subject, loaded: Loaded) -> Any:
        """Return the model's entry."""
        raise NotImplementedError

    def join(self, entries: list[Any]) -> Any:
        """Return the model's entry of all rounds."""
        (entry,) = entries
        return entry

    def about_all(self) -> dict[str, Any]:
        """Return the results beside the models' own entries, for the top of evaluation.json."""
        return {}
