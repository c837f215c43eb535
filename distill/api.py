"""The commands as functions of an experiment, for notebooks and programs: the same recipes, with values for results."""

from __future__ import annotations

import contextlib
import importlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.errors import UserError
from distill.experiment import file
from distill.experiment.stages import Stage, stages
from distill.system import interrupt
from distill.system.memory import free_memory
from distill.system.progress import say
from distill.system.quiet import quiet_command

if TYPE_CHECKING:  # by statement these take seconds, which `load_experiment` does not need
    from distill.experiment.configuration import Experiment
    from distill.forecast.forecast import Forecast
    from distill.recipes.preview.command import Preview
    from distill.report.frames import Results


def load_experiment(source: str | Path | Mapping[str, Any], changes: Mapping[str, Any] | None = None) -> Experiment:
    """Return the checked experiment of a YAML file, or of a mapping such as `{"corpus": {"path": …}, …}`.

    changes: values by dotted key that replace the file's, such as `{"train.seed": 1, "run_dir": "runs/second"}`.
    Raises UserError for a missing file, an unknown key (with the nearest known one), and a wrong type or value.
    """
    name = "experiment" if isinstance(source, Mapping) else str(source)
    content = _plain(source, name) if isinstance(source, Mapping) else file.read_content(name)
    return file.experiment_of(name, file.with_changes(content, _plain(changes or {}, name), name), [])


def generate(experiment: Experiment) -> Path:
    """Let a model write on from prompts, as `distill generate` does, and return the folder of its texts.

    What is written already is not written again. Ctrl-C keeps every finished part, and raises KeyboardInterrupt.
    Raises UserError for all that the command refuses.
    """
    _run(experiment, _one("generate"))
    from distill.experiment.generation import folder_of

    return folder_of(experiment)


def cache_teacher(experiment: Experiment) -> Path:
    """Let the teacher read the corpus, as `distill cache-teacher` does, and return the folder of its cache.

    What is there already is not made again. Ctrl-C keeps every finished batch, and raises KeyboardInterrupt.
    Raises UserError for all that the command refuses.
    """
    _run(experiment, _one("cache-teacher"))
    from distill.experiment.folders import Folders

    return Folders.of(experiment).cache


def train_student(experiment: Experiment, resume: bool = False) -> Path:
    """Train the student (and the control) from the cache, as `distill train-student` does; return the student's folder.

    resume: continue from the last checkpoint of this run. Ctrl-C leaves one, and raises KeyboardInterrupt.
    Raises UserError for all that the command refuses.
    """
    _run(_resuming(experiment) if resume else experiment, _one("train-student"))
    from distill.experiment.folders import Folders

    return Folders.of(experiment).model("student")


def evaluate(experiment: Experiment) -> Results:
    """Measure the student beside its teacher, as `distill evaluate` does, and return all that is known of the run.

    Raises UserError for all that the command refuses.
    """
    _run(experiment, _one("evaluate"))
    from distill.report.frames import Results

    return Results.read(experiment.run_dir)


def run(experiment: Experiment) -> Results:
    """Do all three, as `distill run` does: nothing twice, and unfinished work is continued.

    Raises UserError for all that the command refuses.
    """
    _run(_resuming(experiment), stages)
    from distill.report.frames import Results

    return Results.read(experiment.run_dir)


def plan(experiment: Experiment, card: str | None = None) -> Forecast:
    """Return the forecast of memory, time and disk, as `distill plan` prints it; `fits` is its verdict on memory.

    card: a name (`rtx-3060`) or a size (`12GiB`); default: this machine.
    Raises UserError for an unknown card or model.
    """
    with _as_a_command():
        from distill.recipes import plan as recipe

        return recipe.planned(experiment, card).forecast


def preview(experiment: Experiment, samples: int = 2) -> Preview:
    """Return the text that would be learned, as `distill preview` prints it: counts, and the first samples' tokens.

    Raises UserError for all that the command refuses.
    """
    if samples < 0:
        raise UserError(f"samples: {samples} is negative: give 0 or more")
    with _as_a_command():
        from distill.recipes.preview.command import previewed

        return previewed(experiment, samples)


def load_student(
    run: str | Path, device: str = "cpu", dtype: str = "float32", class_path: str | None = None
) -> tuple[Any, Any]:
    """Return the finished student of a run (or of a model's folder) and its tokenizer.

    The student has `body` and `head`; one that is a model of transformers has it as `.model`.
    class_path: the student's class, where it is your own, as for `distill chat`.
    Raises UserError for a folder without a student.
    """
    import torch

    from distill import plugins
    from distill.experiment.folders import finished_model
    from distill.models.devices import DTYPES
    from distill.models.tokenizers import load_folder_tokenizer

    folder = finished_model(run)
    if dtype not in DTYPES:
        raise UserError(f"load_student: dtype {dtype!r} is none of {', '.join(DTYPES)}")
    model = plugins.load_language_model(folder, torch.device(device), DTYPES[dtype], class_path)
    return model, load_folder_tokenizer(folder)


def _plain(value: Any, where: str) -> Any:
    """Return a value as YAML has it: paths are texts, tuples lists, numbers of numpy numbers. Raises UserError else."""
    if isinstance(value, Mapping):
        return {name: _plain(inner, f"{where}: {name}") for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner, where) for inner in value]
    if isinstance(value, Path):
        return str(value)
    if callable(item := getattr(value, "item", None)) and getattr(value, "shape", None) == ():
        value = item()
    if value is not None and not isinstance(value, (bool, int, float, str)):
        raise UserError(f"{where}: {value!r} is no plain value: give a text, a number, a list or a mapping")
    return value


def _one(command: str) -> Callable[[Experiment], Iterator[Stage]]:
    return lambda experiment: iter([Stage(command, experiment)])


def _run(experiment: Experiment, made: Callable[[Experiment], Iterator[Stage]]) -> None:
    _check_is_alone(experiment)
    with _as_a_command():
        for stage in made(experiment):
            interrupt.stop_if_asked()  # a signal may have come in the last batch of the stage before
            if stage.title:
                say(f"\n{stage.title}")
            recipe = importlib.import_module(f"distill.recipes.{stage.command.replace('-', '_')}")
            recipe.main(stage.experiment, stage.following)
            free_memory()  # the next stage's model is alone


def _resuming(experiment: Experiment) -> Experiment:
    return replace(experiment, train=replace(experiment.train, resume=True))


def _check_is_alone(experiment: Experiment) -> None:
    """Raise UserError for several processes: each of them is started with the command line of this one."""
    for section in ("cache", "train"):
        for key in ("devices", "num_nodes"):
            number = getattr(getattr(experiment, section), key)
            if number > 1:
                raise UserError(
                    f"{section}.{key}: {number}: from Python one process does the work: "
                    "for several use the command line, such as distill run FILE"
                )


@contextlib.contextmanager
def _as_a_command() -> Iterator[None]:
    """Silence the libraries inside, and let Ctrl-C wait for the batch's end as it does in a command."""
    with warnings.catch_warnings(), interrupt.taken_over():
        quiet_command()
        yield
