"""`distill sweep`: runs that differ in a few settings and share one cache, in a table with means over seeds."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distill.errors import UserError
from distill.experiment.configuration import Experiment
from distill.experiment.file import load_experiment
from distill.experiment.folders import Folders
from distill.experiment.last_steps import check_held_out, check_last_steps
from distill.report.compare import MADE_BY, compare
from distill.report.facts import RunFacts
from distill.report.page import check_own_page, write_own_page
from distill.report.runs import as_csv, as_json, print_settings, run_rows
from distill.system.files import write_durably
from distill.system.progress import say

SECTIONS = ("student", "loss", "train")
"""Sections whose keys may vary. Other keys would make another cache, or measure in another way."""


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep."""

    name: str
    """The varied keys and their values, as the name of a folder."""
    overrides: list[str]
    """All overrides of the experiment file that make it."""
    folder: Path


def prepared(path: str, overrides: list[str], vary: Sequence[str]) -> list[SweepRun]:
    """Return the runs of a sweep, each checked as far as that needs no model.

    vary: texts such as `loss.alpha=0,0.3`. Raises UserError for a text of another form, a key that may not vary or
    stands twice, and for all that a run would be refused for.
    """
    base = load_experiment(path, overrides)
    check_held_out(base)
    check_own_page(Path(base.run_dir) / "compare.html", MADE_BY, "--run_dir")
    choices = [_choice(text) for text in vary]
    keys = [key for key, _ in choices]
    if not choices:
        raise UserError("sweep: what varies? For example: --vary loss.alpha=0,0.3 --vary train.seed=0,1,2")
    if twice := next((key for key in keys if keys.count(key) > 1), None):
        raise UserError(f"--vary {twice}: stands twice: give all its values at once, with commas between them")
    runs = []
    for values in itertools.product(*(values for _, values in choices)):
        own = [f"--{key}={value}" for key, value in zip(keys, values, strict=True)]
        name = ",".join(re.sub(r"[^\w.=+-]", "_", text.removeprefix("--")) for text in own)
        folder = Path(base.run_dir) / name
        places = ["--run_dir", str(folder), "--cache.dir", str(Folders.of(base).cache)]
        runs.append(SweepRun(name, [*overrides, *own, *places], folder))
    for run in runs:
        if sum(other.name == run.name for other in runs) > 1:
            raise UserError(f"sweep: two runs would be in the folder {run.folder}: give values that differ by letters")
        _check(run, load_experiment(path, run.overrides))
    return runs


def _choice(text: str) -> tuple[str, list[str]]:
    """Return key and values of `loss.alpha=0,0.3`. Commas inside brackets belong to a value."""
    key, has_values, rest = text.partition("=")
    values = [value.strip() for value in re.split(r",(?![^\[{(]*[\]})])", rest)]
    if not has_values or not all(values) or "." not in key:
        raise UserError(f"--vary {text}: give a key and its values: --vary loss.alpha=0,0.3")
    key = key.strip().removeprefix("--")
    if key.partition(".")[0] not in SECTIONS:
        raise UserError(
            f"--vary {key}: the runs share one cache and one way of measuring, so only keys of {', '.join(SECTIONS)} "
            "vary: make a sweep for each value of the others, with another --run_dir"
        )
    if len(set(values)) < len(values):
        raise UserError(f"--vary {text}: has a value twice")
    return key, values


def _check(run: SweepRun, experiment: Experiment) -> None:
    try:
        check_last_steps(experiment)
    except UserError as error:
        raise UserError(f"sweep: {run.name}: {error}") from error


def summarise(experiment_dir: str, runs: Sequence[SweepRun]) -> None:
    """Print the table of finished runs, and write it as sweep.csv and sweep.json, with their page compare.html."""
    folder = Path(experiment_dir)
    keys, rows = run_rows([RunFacts.read(run.folder) for run in runs], [run.name for run in runs])
    print_settings(keys, rows)
    try:
        write_durably(folder / "sweep.csv", as_csv(rows).encode())
        write_durably(folder / "sweep.json", as_json(keys, rows).encode())
    except OSError as error:
        raise UserError(f"{folder}: the table cannot be written ({error.strerror})") from None
    say(f"sweep: {folder / 'sweep.csv'}, sweep.json")
    if len(runs) > 1:
        write_own_page(folder / "compare.html", compare([run.folder for run in runs]), "--run_dir")
        say(f"sweep: {folder / 'compare.html'}")
