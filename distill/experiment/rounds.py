"""Rounds: the student writes, the teacher scores its texts, the student learns on; the same phases with other folders.

In the run's folder, `rounds/R` holds the texts (`written`), their `cache` and the student of round R. The last round's
student is the run's own. Round 0 is the training on the corpus.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from distill.cache.format.folder import MANIFEST, read_manifest
from distill.corpus import written
from distill.experiment.cache import with_budgeted_threshold
from distill.experiment.configuration import Experiment, RoundsConfig
from distill.experiment.folders import Folders
from distill.experiment.generation import Writer, prompt_sources, prompts_of
from distill.experiment.last_steps import check_held_out, check_last_steps
from distill.experiment.micro_batch import with_recorded
from distill.experiment.place import Place
from distill.experiment.precision import with_types_of_machine
from distill.experiment.search import with_found_sizes
from distill.experiment.stages import STEPS, Stage, has_corpus, round_folder, writing_settings
from distill.experiment.teacher import Teacher
from distill.models import checkpoints
from distill.system import ledger
from distill.system.progress import say
from distill.system.units import duration

_KINDS = {"generate": "the student writes", "cache-teacher": "the teacher reads it", "train-student": "training"}


def stages_of_rounds(experiment: Experiment) -> Iterator[Stage]:
    """Yield the stages of a run with rounds. Each is yielded when the one before is done.

    A round's checkpoints are removed when the next one, which begins with them, has its student. Raises UserError for
    rounds that cannot be made.
    """
    rounds = Rounds(experiment)
    rounds.check()
    if rounds.first:
        yield rounds.stage("generate", rounds.first, rounds.writing(rounds.first))
    yield rounds.stage("cache-teacher", rounds.first, experiment, STEPS[1:])
    rounds.check_prompts()
    for number in range(rounds.first, rounds.count + 1):
        if number > rounds.first:
            yield rounds.stage("generate", number, rounds.writing(number))
            yield rounds.stage("cache-teacher", number, rounds.scoring(number))
        yield rounds.stage("train-student", number, rounds.training(number))
        if number > rounds.first:
            shutil.rmtree(Folders.of_training(rounds.folder(number - 1)).checkpoints("student"), ignore_errors=True)
    yield Stage("evaluate", experiment, title="evaluation")


class Rounds:
    """The rounds of an experiment, as experiments of their own."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment, self.count = experiment, experiment.rounds.count
        self.first = 0 if has_corpus(experiment) else 1
        """Number of the first training: 0 on the corpus, 1 on texts of the fresh student."""
        self.cache = Folders.of(experiment).cache
        """Cache of the first training."""

    def folder(self, number: int) -> Path:
        """Return the folder of a round."""
        return round_folder(self.experiment, number)

    def check(self) -> None:
        """Raise UserError for all that the rounds would refuse on settings alone."""
        check_last_steps(self.experiment)
        check_held_out(self.experiment)
        prompt_sources(self.writing(max(1, self.first)))
        if _is_here(self.experiment):  # else they are read when the teacher has been fetched
            self.check_prompts()

    def check_prompts(self) -> None:
        """Read the prompts in the teacher's tokens. Raises UserError for those that cannot be written on."""
        number = max(1, self.first)
        if (self.folder(number) / "written" / written.MANIFEST).is_file():
            return
        asking = self.writing(number)
        asking = replace(asking, generate=replace(asking.generate, by="teacher"))
        prompts_of(asking, Writer(asking, Teacher(asking, Place.of(asking))))

    def stage(self, command: str, number: int, experiment: Experiment, following: tuple[str, ...] = ()) -> Stage:
        """Return a stage with its title: the round, and the time that is left as far as earlier rounds tell."""
        what = "the teacher reads the corpus" if command == "cache-teacher" and not number else _KINDS[command]
        left = self._seconds_left(command, number)
        told = "" if left is None else f"; about {duration(left)} left up to the evaluation"
        return Stage(command, experiment, following, f"round {number} of {self.count}: {what}{told}")

    def _seconds_left(self, command: str, number: int) -> float | None:
        """Return the time from the beginning of a stage, by the latest one of each kind; None before all are known."""
        order = list(_KINDS)
        known = {kind: _latest_seconds(Path(self.experiment.run_dir), kind) for kind in order}
        if number <= self.first or any(seconds is None for seconds in known.values()):
            return None
        left = [each for each in range(number, self.count + 1) if not self._student(each).exists()]
        if not left:
            return None
        whole = sum(seconds or 0.0 for seconds in known.values())
        here = sum(known[kind] or 0.0 for kind in order[order.index(command) :])
        return whole * (len(left) - (number in left)) + (here if number in left else 0.0)

    def _student(self, number: int) -> Path:
        """Return the folder of a round's student, which is there when the round is done."""
        folders = Folders.of(self.experiment)
        return (folders if number == self.count else Folders.of_training(self.folder(number))).model("student")

    def writing(self, number: int) -> Experiment:
        """Return the experiment in which the student of the round before writes, or the fresh one."""
        if number == self.first:
            own, folder = self.experiment.generate, self.folder(number) / "written"
            fresh = own if own.to == str(folder) else writing_settings(self.experiment, number, "fresh")
            return _plain(replace(self.experiment, generate=fresh))
        train = replace(self.experiment.train, dir=str(self.folder(number - 1)))
        generate = writing_settings(self.experiment, number, "student")
        return _plain(replace(self.experiment, generate=generate, train=train))

    def scoring(self, number: int) -> Experiment:
        """Return the experiment in which the teacher scores a round's texts, as it did those of the first cache."""
        known = with_recorded(with_types_of_machine(self.experiment))  # `auto` takes what the first cache says
        experiment, folder = with_budgeted_threshold(self.experiment, read_manifest(self.cache)), self.folder(number)
        corpus = replace(
            experiment.corpus,
            path=str(folder / "written"),
            name=None,
            revision=None,
            split="train",
            columns={},
            reader=None,
            sources=[],
        )
        cache = replace(
            experiment.cache,
            dir=str(folder / "cache"),
            bytes_per_token=None,
            max_samples=None,
            max_size=None,
            held_out_samples=0,  # those of the first cache are measured on in every round
            overwrite=False,
            batch_size=known.cache.batch_size,
        )
        train = replace(experiment.train, early_stopping=None, texts_every_steps=None)
        student = with_found_sizes(self.experiment).student  # its search needs held-out samples, and is done
        return _plain(
            replace(experiment, corpus=corpus, teacher=known.teacher, cache=cache, train=train, student=student)
        )

    def training(self, number: int) -> Experiment:
        """Return the experiment in which the student learns on. The last one trains the control too."""
        experiment, is_last = self.experiment, number == self.count
        train = experiment.train if is_last else replace(experiment.train, dir=str(self.folder(number)))
        if number > self.first:
            train = replace(train, caches=self._mixed(number), begin_from=str(self.folder(number - 1)))
            experiment = replace(experiment, cache=replace(experiment.cache, max_samples=self._most_samples()))
        experiment = replace(experiment, train=train)
        if is_last and number > self.first:
            return experiment
        return _plain(replace(experiment, evaluate=replace(experiment.evaluate, control=False)))

    def _mixed(self, number: int) -> dict[str, float]:
        """Return the caches of a round with their weights."""
        share = self.experiment.rounds.share
        earlier = [self.cache, *(self.folder(each) / "cache" for each in range(self.first + 1, number))]
        if share == 1:  # the first cache has the held-out samples
            earlier = earlier[:1]
        return {str(cache): (1 - share) / len(earlier) for cache in earlier} | {
            str(self.folder(number) / "cache"): share
        }

    def _most_samples(self) -> int | None:
        """Return the limit of each cache's samples, None if the first cache has no more than were asked for."""
        most = self.experiment.cache.max_samples
        if most is None or read_manifest(self.cache).splits["train"] <= most:
            return None
        say(f"cache.max_samples: {most:,} of {self.cache}, which has more, and so many of each round's texts at most")
        return most


def _plain(experiment: Experiment) -> Experiment:
    """Return an experiment of one phase, which asks for no rounds itself."""
    return replace(experiment, rounds=RoundsConfig())


def _is_here(experiment: Experiment) -> bool:
    """Tell whether the teacher is on this machine, so that nothing is fetched to look at its tokens."""
    if (Folders.of(experiment).cache / MANIFEST).is_file():
        return True
    name = experiment.teacher.model
    if name == checkpoints.DEMO_NAME or Path(name).expanduser().exists():
        return True
    found = checkpoints.kept(name, experiment.teacher.revision)
    return found is not None and checkpoints.has_weights(found)


def _latest_seconds(run: Path, command: str) -> float | None:
    """Return the time of a command's latest finished work in a run, its interrupted starts included."""
    total, latest = 0.0, None
    for line in ledger.read(run):
        if line.get("phase") == command:
            total += line["seconds"]
            if line["ended"] == "done":
                total, latest = 0.0, total
    return latest
