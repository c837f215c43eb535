"""The measurement of every model on the held-out text, beside the teacher."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Subset

from distill.corpus import SampleSets
from distill.corpus.splitting import spread
from distill.errors import UserError
from distill.evaluation import held_out, statistics
from distill.experiment.configuration import Experiment
from distill.experiment.subjects import Loaded, Subject
from distill.experiment.teacher import Teacher
from distill.experiment.teacher_sections import CorpusConfig
from distill.models.vocabulary import Vocabulary
from distill.recipes.evaluate.measurement import Measurement
from distill.system.machine import machine, versions
from distill.system.progress import Progress

if TYPE_CHECKING:  # by statement this takes seconds, which a finished evaluation does not need
    from distill.evaluation.fidelity import TeacherStates


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
            self.sources = held_out.Sources(names, torch.tensor(samples.owners))
        self.documents = held_out.documents_of(self.samples)
        self.resampled = self.documents if len(self.documents) >= statistics.MINIMUM_DOCUMENTS else None
        self.progress = Progress("evaluate", models * len(self.samples) * experiment.corpus.sequence_length, "tokens")
        self.states: TeacherStates | None = None
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
        from distill.evaluation import fidelity

        batch_size, chunk_size = self.experiment.evaluate.batch_size, self.experiment.loss.chunk_size
        device = self.teacher.device
        self.parameters[subject.name] = parameters(loaded.model)
        with self.progress:
            if subject.name == "teacher":
                self.states = fidelity.teacher_states(
                    loaded.model, self.samples, batch_size, loaded.vocab_size, device, self.progress.advance
                )
                size = held_out.text_bytes(self.samples, loaded.tokenizer)
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


def _covered(samples: Subset, vocabulary: Vocabulary) -> Subset:
    """Return the samples that all models can read, so that all are measured on the same text."""
    left = held_out.covered(samples, vocabulary)
    if not len(left):
        raise UserError(
            f"nothing to evaluate on: each of the {len(samples)} held-out samples has a token that the students lack: "
            "cache more held-out samples (cache.held_out_samples), or use student.vocabulary full"
        )
    return left
