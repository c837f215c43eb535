"""evaluation.json while it comes to be: what is there and still holds, what is missing, what was measured now."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from distill.progress import say
from distill.workspace.folders import Folders, write_json
from distill.workspace.measurements import Measurement
from distill.workspace.subjects import Subject

_ABOUT_ALL = ("parameters", "text", "student_against_control", "versions", "machine", "fingerprints")


class Record:
    """Results by section, model and item, each with what it was made from.

    What was measured of the same model in the same way is not measured again. What a stopped evaluation has measured
    lies in a hidden file beside evaluation.json, which is written when all is there.
    """

    def __init__(self, folders: Folders, subjects: list[Subject], measurements: list[Measurement]) -> None:
        self.path, self.unfinished = folders.evaluation, folders.run / ".evaluation.json"
        identities = {subject.name: _digest(subject.identity) for subject in subjects}
        self.wanted = {
            _key(subject, measurement): [identities[subject.name], _digest(measurement.inputs)]
            for subject in subjects
            for measurement in measurements
            if measurement.wanted_of(subject)
        }
        earlier = _read(self.unfinished) or _read(self.path)
        holds = {
            key: made_from
            for key, made_from in earlier.get("made_from", {}).items()
            if made_from == self.wanted.get(key)
            # Benchmarks take hours: one that is not asked for this time stays while its model is the same.
            or (
                key.startswith("benchmarks:")
                and key not in self.wanted
                and made_from[0] == identities.get(_parts(key)[2])
            )
        }
        for measurement in measurements:
            keys = {_key(subject, measurement) for subject in subjects if measurement.wanted_of(subject)}
            if measurement.together and not keys <= holds.keys():
                holds = {key: made_from for key, made_from in holds.items() if key not in keys}
        about_all = _ABOUT_ALL if any(key.startswith("fidelity:") for key in holds) else ()
        self.result: dict[str, Any] = {name: earlier[name] for name in about_all if name in earlier}
        self.made_from: dict[str, list[str]] = {}
        for key, made_from in holds.items():
            section, item, name = _parts(key)
            found = earlier[section][name]
            self._put(key, made_from, found[item] if item else found)
            if section == "texts":
                self.result[section] |= {more: earlier[section][more] for more in ("prompts", "truth")}
        if "control" not in self.result.get("fidelity", {}):
            self.result.pop("student_against_control", None)

    @property
    def is_complete(self) -> bool:
        return self.wanted.keys() <= self.made_from.keys()

    def lacks(self, subject: Subject, measurement: Measurement) -> bool:
        """Whether this is still to be measured."""
        key = _key(subject, measurement)
        return key in self.wanted and key not in self.made_from

    def put(self, subject: Subject, measurement: Measurement, found: Any) -> None:
        """Keep what was measured, on disk too."""
        key = _key(subject, measurement)
        self._put(key, self.wanted[key], found)
        for name, facts in measurement.about_all().items():
            self.result[name] = {**self.result.get(name, {}), **facts}
        write_json(self.unfinished, self.result | {"made_from": self.made_from})

    def _put(self, key: str, made_from: list[str], found: Any) -> None:
        section, item, name = _parts(key)
        entries = self.result.setdefault(section, {})
        if item:
            entries.setdefault(name, {})[item] = found
        else:
            entries[name] = found
        self.made_from[key] = made_from

    def finish(self, more: dict[str, Any]) -> tuple[dict[str, Any], bool]:
        """Write evaluation.json with `more` in it; all that is in it, and whether anything of it is new."""
        result = json.loads(json.dumps(self.result | more | {"made_from": self.made_from}))
        is_new = result != _read(self.path)
        if is_new:
            write_json(self.path, result)
        self.unfinished.unlink(missing_ok=True)
        return result, is_new


def _key(subject: Subject, measurement: Measurement) -> str:
    return f"{measurement.section}:{measurement.item}:{subject.name}"


def _parts(key: str) -> tuple[str, str, str]:
    section, rest = key.split(":", 1)
    item, name = rest.rsplit(":", 1)
    return section, item, name


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _read(path: Path) -> dict[str, Any]:
    """What a file holds; nothing where there is none, or a damaged one."""
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        for key in found["made_from"]:
            section, item, name = _parts(key)
            entry = found[section][name]
            _ = entry[item] if item else entry
        return found
    except (ValueError, TypeError, KeyError):
        say(f"evaluation: {path} is damaged, or of an earlier version: measuring anew")
        return {}
