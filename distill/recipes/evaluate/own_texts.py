"""The measurement of each model's own texts: it writes on from held-out prompts, and then the teacher reads them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from distill import plugins
from distill.corpus import SampleSets
from distill.errors import UserError
from distill.evaluation import own_texts
from distill.evaluation.own_texts import Question, Written
from distill.experiment.configuration import Experiment
from distill.experiment.generation import sampling_of
from distill.experiment.subjects import ROUND, Loaded, Subject
from distill.experiment.teacher import Teacher
from distill.generation.authors import Asked, LocalAuthor
from distill.models.generation import decode_text, ending_tokens
from distill.models.vocabulary import Vocabulary
from distill.recipes.evaluate.measurement import Measurement
from distill.system.blame import blame, failed
from distill.system.progress import Progress

if TYPE_CHECKING:  # by statement it takes a second, which a finished evaluation does not need
    from distill.evaluation.fidelity import TeacherStates


@dataclass(frozen=True)
class _Own:
    """A model's texts, and its states on them; the teacher has no states."""

    name: str
    texts: list[Written]
    states: TeacherStates | None


class OwnTexts(Measurement):
    """The models' own texts. In the first turn each writes, in the second the teacher reads what the others wrote."""

    section, together, rounds = "own_texts", True, 2

    def __init__(
        self, experiment: Experiment, teacher: Teacher, samples: SampleSets, vocabulary: Vocabulary | None
    ) -> None:
        config = experiment.evaluate
        self.experiment, self.teacher, self.vocabulary = experiment, teacher, vocabulary
        # Some of them may have tokens that the students lack.
        questions = own_texts.pick_questions(samples.held_out, config.own_texts, experiment.generate.prompt_tokens)
        self.questions = [each for each in questions if self._can_be_asked(each)]
        self.metric = None if config.metric is None else load_metric(config.metric)
        self._try_metric()
        self._own: dict[str, _Own] = {}
        self._read: dict[str, TeacherStates] = {}

    def _can_be_asked(self, question: Question) -> bool:
        import torch

        return self.vocabulary is None or self.vocabulary.covers(torch.tensor(question.ids))

    def _try_metric(self) -> None:
        """Give the user's metric a reference as its own answer: it had better fail now than after hours of writing."""
        asked = next((question for question in self.questions if question.is_answer), None)
        if self.metric is not None and asked is not None:
            reference = decode_text(self.teacher.tokenizer, asked.reference)
            self.metric(reference, reference)

    @property
    def inputs(self) -> dict[str, Any]:
        generate, metric = self.experiment.generate, self.experiment.evaluate.metric
        asked = json.dumps([asdict(question) for question in self.questions])
        return {
            "questions": hashlib.sha256(asked.encode()).hexdigest(),
            "sampling": asdict(sampling_of(self.experiment)),
            "max_new_tokens": generate.max_new_tokens,
            "metric": None if metric is None else [metric, plugins.source_of(metric, "metric")],
        }

    def wanted_of(self, subject: Subject) -> bool:
        is_of_a_round = subject.name.startswith(f"{ROUND} ")
        return bool(self.questions) and (is_of_a_round or super().wanted_of(subject))

    def takes_part(self, subject: Subject, number: int) -> bool:
        return number == 0 or subject.name == "teacher"

    def measure(self, subject: Subject, loaded: Loaded) -> Any:
        if subject.name in self._own:
            for own in [each for each in self._own.values() if each.states is not None]:
                samples = own_texts.as_samples(self.questions, own.texts, None)
                self._read[own.name] = self._states(loaded, samples)
            return None
        own = self._own[subject.name] = self._written(subject, loaded)
        return own

    def join(self, entries: list[Any]) -> Any:
        own: _Own = entries[0]
        divergences_N = None
        if own.states is not None:
            chunk, device = self.experiment.loss.chunk_size, self.teacher.device
            read = self._read[own.name]
            divergences_N = own_texts.own_divergences(own.states, read, chunk, device, self.vocabulary)
        return own_texts.summary(own.texts, divergences_N, self.metric)

    def _written(self, subject: Subject, loaded: Loaded) -> _Own:
        vocabulary = None if subject.name == "teacher" else self.vocabulary
        generate, tokenizer = self.experiment.generate, self.teacher.tokenizer
        author = LocalAuthor(
            loaded.model,
            vocab_size=loaded.vocab_size,
            stop_ids=ending_tokens(loaded.model, loaded.tokenizer),
            sampling=sampling_of(self.experiment),
            max_new_tokens=generate.max_new_tokens,
            batch_size=generate.batch_size,
        )
        asked = [
            Asked(_mapped(question.ids, vocabulary), number, 0, question.is_answer)
            for number, question in enumerate(self.questions)
        ]
        with Progress(f"own texts: {subject.name}", len(asked), "texts") as progress:
            answers = author.write(asked, lambda answer: progress.advance(1))
        texts = []
        for answer, question in zip(answers, self.questions, strict=True):
            ids = answer.ids if vocabulary is None else vocabulary.kept_ids[answer.ids].tolist()
            said = decode_text(tokenizer, ids[: -1 if answer.ended else None])
            reference = decode_text(tokenizer, question.reference) if question.is_answer else None
            texts.append(Written(ids, answer.ended, said, reference))
        if subject.name == "teacher":
            return _Own(subject.name, texts, None)
        return _Own(subject.name, texts, self._states(loaded, own_texts.as_samples(self.questions, texts, vocabulary)))

    def _states(self, loaded: Loaded, samples: list[Any]) -> TeacherStates:
        from distill.evaluation.fidelity import teacher_states

        size, device = self.experiment.evaluate.batch_size, self.teacher.device
        return teacher_states(loaded.model, samples, size, loaded.vocab_size, device, lambda tokens: None)  # type: ignore[arg-type]


def load_metric(name: str) -> own_texts.Metric:
    """Return the user's metric of an answer and its reference. Raises UserError if there is none of the name."""
    function = plugins.load(name, "metric")

    def metric(answer: str, reference: str) -> float:
        try:
            return float(function(answer, reference))
        except BaseException as error:
            if not failed(error) or isinstance(error, UserError):
                raise
            raise UserError(f"evaluate.metric: {name}: {blame(error, function)}") from error

    return metric


def _mapped(ids: list[int], vocabulary: Vocabulary | None) -> list[int]:
    if vocabulary is None:
        return ids
    import torch

    return vocabulary.mapped(torch.tensor(ids)).tolist()
