"""The stages of `distill run`: commands one after another, each with the experiment that it does. Nothing heavy."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from distill.experiment.configuration import Experiment, GenerateConfig

STEPS = ("cache-teacher", "train-student", "evaluate")
"""Commands of a run without rounds."""


@dataclass(frozen=True)
class Stage:
    """One command of a run."""

    command: str
    experiment: Experiment
    following: tuple[str, ...] = ()
    """Phases that run next with the same settings, and that must fit too."""
    title: str = ""
    """Line to show before it begins; none in a run without rounds."""


def stages(experiment: Experiment) -> Iterator[Stage]:
    """Return the stages of a run. Each is asked for when the one before is done.

    Raises UserError, with the first one, for rounds that cannot be made.
    """
    if experiment.rounds.count:
        from distill.experiment.rounds import stages_of_rounds

        return stages_of_rounds(experiment)
    return (Stage(step, experiment, STEPS[number:]) for number, step in enumerate(STEPS, start=1))


def round_folder(experiment: Experiment, number: int) -> Path:
    """Return the folder of a round: its texts, their cache, and its student unless it is the last."""
    return Path(experiment.run_dir) / "rounds" / str(number)


def with_first_texts(experiment: Experiment) -> Experiment:
    """Return an experiment of rounds without a corpus with the first round's texts and their cache in its place."""
    if experiment.corpus.all_sources or not experiment.rounds.count:
        return experiment
    folder, own = round_folder(experiment, 1), experiment.generate
    is_left_open = own.to is None and own.by == "teacher"
    return replace(
        experiment,
        corpus=replace(experiment.corpus, path=str(folder / "written")),
        cache=replace(experiment.cache, dir=experiment.cache.dir or str(folder / "cache")),
        generate=writing_settings(experiment, 1, "fresh") if is_left_open else own,
    )


def writing_settings(experiment: Experiment, number: int, by: Literal["student", "fresh"]) -> GenerateConfig:
    """Return the settings of the writing in a round. Each round draws other random numbers."""
    own, rounds = experiment.generate, experiment.rounds
    return replace(
        own,
        by=by,
        prompts=rounds.prompts or own.prompts,
        to=str(round_folder(experiment, number) / "written"),
        samples_per_prompt=rounds.samples_per_prompt,
        seed=(own.seed + number) % 2**63,
        server=None,
        server_model=None,
    )


def has_corpus(experiment: Experiment) -> bool:
    """Tell whether an experiment of rounds has a corpus beside the texts that its students write."""
    return experiment.corpus.path != str(round_folder(experiment, 1) / "written")


def as_overrides(changed: Experiment, base: Experiment) -> list[str]:
    """Return the command-line options that turn one experiment into another.

    The places of corpus and cache are always among them, because the experiment's file may leave them open.
    """
    base = replace(base, corpus=replace(base.corpus, path=None), cache=replace(base.cache, dir=None))
    there, here = (dict(_leaves(asdict(each))) for each in (base, changed))
    return [
        word
        for key, value in here.items()
        if value != there[key]
        for word in (f"--{key}", value if isinstance(value, str) else json.dumps(value))
    ]


def _leaves(content: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the values by dotted key. Sections are one level deep; a mapping in a section is a value."""
    for section, values in content.items():
        if not isinstance(values, dict):
            yield section, values
            continue
        yield from ((f"{section}.{key}", value) for key, value in values.items())
