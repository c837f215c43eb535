"""Checks of an experiment's values: types, limits, forms of texts, and keys that exclude or need one another."""

from __future__ import annotations

import dataclasses
import typing
import unicodedata
from collections.abc import Callable, Iterator
from typing import Any

from distill.errors import UserError, did_you_mean
from distill.experiment.configuration import DIVERGENCES, Experiment, TrainConfig
from distill.experiment.teacher_sections import Between
from distill.system.units import parse_duration, parse_size

NO_VALUE = "has no value: give it one, or leave the key out"


def check_values(experiment: Experiment) -> None:
    """Raise UserError for all values that are not of their keys' types, or beyond their limits, in one message."""
    wrong = []
    for section, kind in typing.get_type_hints(Experiment, include_extras=True).items():
        values = getattr(experiment, section)
        if not dataclasses.is_dataclass(kind):
            wrong += _wrong(section, values, kind)
            continue
        wrong += _wrong_in(section, values)
    wrong = wrong or [
        *_misspelt(experiment),
        *_contradictions(experiment),
        *_of_steps(experiment.train),
        *_of_rounds(experiment),
    ]
    if wrong:
        raise UserError("; ".join(wrong))


def _wrong_in(section: str, values: Any) -> list[str]:
    """Return the faults of a section's values, and of the values of each mapping in its lists."""
    wrong = []
    for name, hint in typing.get_type_hints(type(values), include_extras=True).items():
        value = getattr(values, name)
        wrong += _wrong(f"{section}.{name}", value, hint)
        for number, each in enumerate(value if isinstance(value, list) else [], start=1):
            if dataclasses.is_dataclass(each):
                wrong += _wrong_in(f"{section}.{name}[{number}]", each)
    return wrong


def _wrong(key: str, value: Any, hint: Any) -> list[str]:
    """Return the faults of a key's value."""
    if value is None:
        return [] if type(None) in typing.get_args(hint) else [f"{key}: {NO_VALUE}"]
    limits, faults = limits_of(hint), []
    if isinstance(value, dict):
        faults += [f"{key}: {name!r} is no text, as a name is" for name in value if not isinstance(name, str)]
    numbers = value.values() if isinstance(value, dict) and limits is not None else [value]
    for each in value if isinstance(value, list) else numbers:
        if isinstance(each, str) and not each.strip():
            faults.append(f"{key}: is empty: give it a value, or leave the key out")
        elif isinstance(each, str) and any(unicodedata.category(letter) in ("Cc", "Cs") for letter in each):
            faults.append(f"{key}: {each!r} has control characters: remove them")
        elif isinstance(value, list) and isinstance(each, str) and each.startswith(("[", "{")):
            faults.append(f"{key}: {each!r} is a list as text: give names")  # of an override that is no list of names
        elif limits is not None and not isinstance(each, str) and not limits.low <= each <= limits.high:
            faults.append(f"{key}: {each} is not {limits}")
    return faults


def _misspelt(experiment: Experiment) -> Iterator[str]:
    """Yield the faults of sizes, times and parts, which are texts of a form."""
    for key, parse in _FORMS.items():
        value: Any = experiment
        for name in key.split("."):
            value = getattr(value, name)
        try:
            if value is not None:
                parse(value, key)
        except UserError as error:
            yield str(error)


def _contradictions(experiment: Experiment) -> Iterator[str]:
    """Yield the faults of the ways to name a corpus: a path, or several sources. Rounds need none."""
    corpus = experiment.corpus
    if not corpus.all_sources and not experiment.rounds.count:
        yield "corpus.path: is missing: give a file, a folder or a hub data set's name (or several as corpus.sources)"
    if corpus.path is not None and corpus.sources:
        yield "corpus.path: stands beside corpus.sources: make it one of them"
    own = {
        "name": corpus.name is not None,
        "revision": corpus.revision is not None,
        "split": corpus.split != "train",
        "columns": bool(corpus.columns),
        "reader": corpus.reader is not None,
    }
    for key in (key for key, is_given in own.items() if is_given and corpus.sources):
        yield f"corpus.{key}: stands beside corpus.sources: give it to each source that it is meant for"


def _of_steps(train: TrainConfig) -> Iterator[str]:
    """Yield the faults of the two ways to give the samples of an optimiser step: as passes, or as a whole."""
    if train.batch_size != "auto":
        if train.step_samples is not None:
            yield (
                "train.step_samples: goes with train.batch_size auto; a step of numbers has batch_size × "
                "accumulate_grad_batches samples: leave it out"
            )
        return
    if train.step_samples is None:
        yield "train.batch_size: auto needs the samples of an optimiser step, which it divides: --train.step_samples 16"
    if train.accumulate_grad_batches != 1:
        yield (
            "train.accumulate_grad_batches: follows from train.step_samples where batch_size is auto: leave it out, "
            "or give 1"
        )


def _of_rounds(experiment: Experiment) -> Iterator[str]:
    """Yield the faults of settings that exclude rounds, or that rounds without a corpus lack."""
    rounds, train, evaluate = experiment.rounds, experiment.train, experiment.evaluate
    if not rounds.count:
        return
    if train.caches and train.begin_from is None:
        yield "train.caches: rounds choose the caches of each training: leave it out"
    if evaluate.seeds > 1:
        yield "evaluate.seeds: each seed's student would write texts of its own: give 1 with rounds, and a run a seed"
    if experiment.cache.part is not None or experiment.cache.num_nodes > 1 or train.num_nodes > 1:
        yield "rounds: one machine makes them: leave cache.part, cache.num_nodes and train.num_nodes out"
    if experiment.corpus.all_sources:
        return
    if rounds.prompts is None and experiment.generate.prompts is None:
        yield "rounds.prompts: is missing: without a corpus, give prompts for the student to write on"
    if evaluate.control:
        yield "evaluate.control: a control learns from the corpus, and there is none (corpus.path)"
    if experiment.student.search:
        yield "student.search: students are compared on a corpus, and there is none (corpus.path): give their sizes"


def _parse_part(text: str, key: str) -> object:
    from distill.cache.format.part import Part

    return Part.parse(text)


def _check_divergence(text: str, key: str) -> None:
    if ":" not in text and text not in DIVERGENCES:
        near = did_you_mean(text, DIVERGENCES)
        raise UserError(f"{key}: {text}: no such divergence{near}, or give one of your own, file.py:function")


_FORMS: dict[str, Callable[[str, str], object]] = {
    "loss.divergence": _check_divergence,
    "cache.part": _parse_part,
    "cache.max_size": parse_size,
    "cache.max_time": parse_duration,
    "train.max_time": parse_duration,
    "memory_limit": parse_size,
}


def limits_of(hint: Any) -> Between | None:
    """Return the limits that a field's type holds, also inside a union or a list."""
    found = [each for each in getattr(hint, "__metadata__", ()) if isinstance(each, Between)]
    found += [limits for inner in typing.get_args(hint) if (limits := limits_of(inner)) is not None]
    return found[0] if found else None
