"""Results of a run's measurements: an append-only list, and evaluation.json, the view of those asked for."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
from typing import Any

from distill.experiment.folders import Folders, write_json
from distill.experiment.subjects import Subject
from distill.recipes.evaluate.measurement import Measurement
from distill.system import json_lines
from distill.system.files import read_bounded

_LIMIT = 1 << 30
"""Largest size of the list in bytes."""


class Results:
    """The measurements of a run, each under a key of everything that it depends on.

    A measurement is a line of `measured.jsonl` as soon as it is made, and stays. If it is asked for again, after other
    options or models in between, it is not made again. Each line carries its own hash: a damaged one does not count,
    and is measured again. Lines of the teacher alone are kept beside the cache as well, for all runs that share it.
    """

    def __init__(self, folders: Folders, subjects: list[Subject], measurements: list[Measurement]) -> None:
        self.lines, self.evaluation, self.report = folders.run / "measured.jsonl", folders.evaluation, folders.report
        self.subjects, self.measurements = subjects, measurements
        self.teacher = subjects[0].identity
        self.everyone = {subject.name: subject.identity for subject in subjects}
        self.shared = folders.measured / "teacher.jsonl"
        lines = [*json_lines.read(self.shared, _LIMIT), *json_lines.read(self.lines, _LIMIT)]
        whole = (line for line in lines if line.get("digest") == _digest([line.get("key"), line.get("found")]))
        self.found = {line["key"]: line["found"] for line in whole}
        for measurement in measurements:
            parts = [self._key(each, measurement) for each in subjects if measurement.wanted_of(each)]
            if measurement.together and not set(parts) <= self.found.keys():  # one model's line is damaged
                for key in (*parts, self._key_of_all(measurement)):
                    self.found.pop(key, None)

    @property
    def is_complete(self) -> bool:
        return not any(self.missing(subject) for subject in self.subjects)

    def missing(self, subject: Subject) -> list[Measurement]:
        """Return the measurements of a model that are still to be made."""
        return [each for each in self.measurements if each.wanted_of(subject) and self._lacks(subject, each)]

    def _lacks(self, subject: Subject, measurement: Measurement) -> bool:
        key = self._key_of_all(measurement) if measurement.together else self._key(subject, measurement)
        return key not in self.found

    def put(self, subject: Subject, measurement: Measurement, found: Any) -> None:
        """Keep a measurement, on disk too. Measurements that belong together count once the last of them is there."""
        key = self._key(subject, measurement)
        self._append(key, found)
        # A speed is no fact about the teacher alone: it is measured in turn with the students, on one machine.
        if subject.identity == self.teacher and not measurement.together and measurement.rounds == 1:
            self._share(key, found)
        last = [each for each in self.subjects if measurement.wanted_of(each)][-1]
        if not measurement.together or subject.name == last.name:
            self._append(self._key_of_all(measurement), measurement.about_all())

    def _append(self, key: str, found: Any) -> None:
        self.found[key] = found
        found = json.loads(json.dumps(found))  # as it is read
        json_lines.append(self.lines, {"key": key, "found": found, "digest": _digest([key, found])})

    def _share(self, key: str, found: Any) -> None:
        """Keep a measurement beside the cache too, if that can be written."""
        found = json.loads(json.dumps(found))
        with contextlib.suppress(OSError):
            json_lines.append(self.shared, {"key": key, "found": found, "digest": _digest([key, found])})

    def _key(self, subject: Subject, measurement: Measurement) -> str:
        made_from = [self.teacher if measurement.together else None, subject.identity, measurement.inputs]
        return f"{measurement.section}:{measurement.item}:{subject.name}:{_digest(made_from)}"

    def _key_of_all(self, measurement: Measurement) -> str:
        made_from = [self.everyone if measurement.together else None, measurement.inputs]
        return f"{measurement.section}:{measurement.item}::{_digest(made_from)}"

    def view(self) -> dict[str, Any]:
        """Return everything that was asked for, by section, model and item."""
        result: dict[str, Any] = {}
        for measurement in self.measurements:
            result |= copy.deepcopy(self.found.get(self._key_of_all(measurement), {}))
            for subject in filter(measurement.wanted_of, self.subjects):
                entries = result.setdefault(measurement.section, {})
                found = self.found[self._key(subject, measurement)]
                if measurement.item:
                    entries.setdefault(subject.name, {})[measurement.item] = found
                else:
                    entries[subject.name] = found
        return result

    def write(self, result: dict[str, Any]) -> None:
        """Write evaluation.json if it is new. The page of the one before goes first.

        Otherwise a process that is killed between the two would leave a page of other figures for good.
        """
        result = json.loads(json.dumps(result))
        try:
            if json.loads(read_bounded(self.evaluation)) == result:
                return
        except (OSError, ValueError):
            pass
        self.report.unlink(missing_ok=True)
        write_json(self.evaluation, result)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:20]
