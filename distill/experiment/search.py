"""A student by size: candidates of a wanted number of parameters, and the one that a search has found best.

The search itself is a step of the training. Here is what everybody asks before and after it: the candidates, and the
options of the experiment's student. The answer is a file of the run.
"""

from __future__ import annotations

import inspect
import json
import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from distill import plugins
from distill.errors import UserError, did_you_mean
from distill.experiment.configuration import Experiment
from distill.experiment.folders import Folders, write_json
from distill.system.files import names_only, read_bounded

FILE = "search.json"
DEFAULT_SHARE = 0.4
"""Share of the teacher's parameters that is searched for when a class of known sizes is given none."""
_MOST_BYTES = 2**24
_UNITS = {"K": 10**3, "M": 10**6, "B": 10**9}

Options = dict[str, Any]


@dataclass(frozen=True)
class Search:
    """Content of `student.search`, checked."""

    parameters: int | None = None
    """Parameters that the student has at most."""
    share: float | None = None
    """The same as a share of the teacher's parameters, from 0 to 1."""
    candidates: int = 6
    """Students that are tried."""
    steps: int | None = None
    """Optimiser steps of the first round, doubled in each further one. The default is a fortieth of the training's,
    at least 4.
    """

    def rounds(self, count: int, total: int) -> list[tuple[int, int]]:
        """Return for each round its steps, and the number of candidates that it keeps of the `count` of the first one.

        The better half goes on, and the last round keeps one. `total`: steps of the training. One candidate needs none.
        """
        steps, keeps = self.steps or max(4, total // 40), []
        while count > 1:
            count = (count + 1) // 2
            keeps.append(count)
        return [(steps * 2**number, keep) for number, keep in enumerate(keeps)]

    def tries(self, count: int, total: int) -> list[int]:
        """Return the steps of each short training of a search among `count` candidates."""
        found = []
        for steps, keep in self.rounds(count, total):
            found += [steps] * count
            count = keep
        return found


@dataclass
class Record:
    """A search as its file has it."""

    asked: dict[str, Any]
    """Settings that the candidates and their measurements depend on."""
    candidates: list[dict[str, Any]]
    """Sizes (`options`) of each candidate, its `parameters`, and the held-out KL by steps of its training (`kl`)."""
    chosen: Options | None = None
    """Options of the best one, once all rounds are done."""

    def best(self, count: int, steps: int) -> list[int]:
        """Return the numbers of the `count` candidates of the lowest KL after trainings of so many steps."""
        done = [number for number, one in enumerate(self.candidates) if str(steps) in one["kl"]]
        return sorted(done, key=lambda number: self.candidates[number]["kl"][str(steps)])[:count]

    def write(self, folder: Path) -> None:
        write_json(folder / FILE, asdict(self))


def asked(experiment: Experiment) -> Search | None:
    """Return the search that the experiment asks for; None if its student's sizes are given.

    A class that knows candidates and is given none of the options in which they differ is searched for at
    `DEFAULT_SHARE`. Raises UserError for wrong keys and values, and for a class that knows no candidates.
    """
    student = experiment.student
    has_candidates = plugins.declared(student.class_path, "student", "candidates") is not None
    if not student.search:
        sized = _size_options(student.class_path) & student.options.keys()
        return Search(share=DEFAULT_SHARE) if has_candidates and not sized else None
    if not has_candidates:
        raise UserError(
            f"student.search: {student.class_path} declares no candidates (see students/README.md): give its sizes in "
            "student.options"
        )
    search = Search(**{key: _checked(key, value) for key, value in student.search.items()})
    if (search.parameters is None) == (search.share is None):
        raise UserError("student.search: give parameters (such as 60M) or share (such as 0.4), one of them")
    if given := sorted(_size_options(student.class_path) & student.options.keys()):
        raise UserError(f"student.options: {', '.join(given)} is what student.search finds: give one of the two")
    if experiment.train.num_nodes > 1:
        raise UserError(
            "student.search: a search runs on one machine: run `train-student` on one first, and give its sizes"
        )
    return search


def _size_options(class_path: str) -> set[str]:
    """Return the options that candidates set."""
    return set(plugins.declared(class_path, "student", "sizes") or ())


def _checked(key: str, value: Any) -> Any:
    known = {field.name for field in fields(Search)}
    where = f"student.search.{key}"
    if key not in known:
        raise UserError(f"student.search: unknown key '{key}'{did_you_mean(key, known)}")
    if key == "parameters":
        return parse_parameters(value, where)
    number = _number(value)
    if key == "share":
        if number is None or not 0 < number < 1:
            raise UserError(f"{where}: {value!r} is not a share between 0 and 1, such as 0.4")
        return number
    low, high = (1, 64) if key == "candidates" else (1, 10**6)
    if number is None or number != int(number) or not low <= number <= high:
        raise UserError(f"{where}: {value!r} is not a whole number from {low} to {high:,}")
    return int(number)


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def parse_parameters(value: Any, where: str) -> int:
    """Return the number that `60M`, `1.5B` or 60000000 means. Raises UserError for anything else."""
    unit = 1
    text = str(value).strip()
    if isinstance(value, str) and text[-1:].upper() in _UNITS:
        unit, text = _UNITS[text[-1].upper()], text[:-1]
    number = None if isinstance(value, bool) else _number(text)
    if number is None or not 1 <= number * unit <= 10**13:
        raise UserError(f"{where}: {value!r} is not a number of parameters, such as 60M, 1.5B or 60000000")
    return int(number * unit)


def candidate_options(
    experiment: Experiment, search: Search, offered: Options, teacher_parameters: int
) -> list[Options]:
    """Return the sizes of each candidate, as options, the largest to train first.

    `offered`: arguments that the pipeline gives to a student. Raises UserError if no student has this size.
    """
    student = experiment.student
    function = plugins.declared(student.class_path, "student", "candidates")
    wanted = search.parameters or round((search.share or 0) * teacher_parameters)
    taken = inspect.signature(function).parameters
    given = {name: value for name, value in {**offered, **student.options}.items() if name in taken}
    try:
        return list(function(parameters=wanted, count=search.candidates, **given))
    except ValueError as error:
        raise UserError(f"student.search: {error}") from error


def sized(experiment: Experiment, sizes: Options) -> Experiment:
    """Return the experiment with a student of these sizes."""
    student = experiment.student
    return replace(experiment, student=replace(student, options={**student.options, **sizes}, search={}))


def identity(experiment: Experiment, cache: dict[str, str]) -> dict[str, Any]:
    """Return what a search depends on; `cache`: the fingerprints of the cache."""
    names = ("learning_rate", "optimizer", "batch_size", "accumulate_grad_batches")
    asked = {
        "student": asdict(experiment.student),
        "teacher": experiment.teacher.model,
        "train": {name: getattr(experiment.train, name) for name in names},
        "cache": cache,
    }
    return dict(names_only(asked))


def read(experiment: Experiment) -> Record | None:
    """Return the search of the experiment's run, finished or not. Raises UserError if its file is damaged."""
    file = Folders.of(experiment).run / FILE
    if not file.exists():
        return None
    try:
        found = json.loads(read_bounded(file, _MOST_BYTES))
        record = Record(**found)
        assert isinstance(record.asked, dict) and isinstance(record.chosen, dict | None)
        assert all(isinstance(one["options"], dict) and isinstance(one["kl"], dict) for one in record.candidates)
    except (OSError, ValueError, TypeError, KeyError, AssertionError):
        raise UserError(f"{file}: is damaged: remove it, and the search begins again") from None
    return record


def with_found_sizes(experiment: Experiment) -> Experiment:
    """Return the experiment with the sizes that its run's search has found; as it is if there are none."""
    if asked(experiment) is None:
        return experiment
    record = read(experiment)
    if record is None or record.chosen is None:
        return experiment
    there, here = record.asked.get("student"), names_only(asdict(experiment.student))
    if there != here:
        file = Folders.of(experiment).run / FILE
        raise UserError(
            f"{file}: is of a search for another student: choose another --run_dir, or remove it to search again"
        )
    return sized(experiment, record.chosen)
