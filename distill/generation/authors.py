"""Authors: whatever continues prompts. The one here is a model of this process.

Shapes: B texts written together, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from distill.generation.decoding import CachedTexts, RereadTexts, Texts, pads_well
from distill.generation.sampling import Sampling, choose, uniforms
from distill.models.generation import context_length, has_cache
from distill.models.huggingface import HuggingFaceLanguageModel
from distill.models.language_model import LanguageModel
from distill.models.micro_batches import no_room
from distill.system import interrupt
from distill.system.memory import free_memory, is_out_of_memory
from distill.system.progress import say

KEPT = 0.75
"""Share of unfinished texts below which the finished ones are taken out of the batch."""


@dataclass(frozen=True)
class Asked:
    """One text to write."""

    ids: list[int]
    """Tokens of the prompt."""
    prompt: int
    """Number of the prompt."""
    sample: int
    """Number of the text among those of its prompt."""
    is_answer: bool = False
    """True for the next turn of a conversation."""


@dataclass(frozen=True)
class Answer:
    """One text that was written."""

    ids: list[int]
    """New tokens; the last one is the ending token if the model ended the text."""
    ended: bool


Report = Callable[[Answer], None]
"""Function that is called with each text as soon as it is written."""


class Author(Protocol):
    """A writer of texts."""

    batch_size: int
    """Texts that are written at one time at most."""

    def write(self, asked: Sequence[Asked], report: Report) -> list[Answer]:
        """Return the texts in the order in which they were asked for."""
        ...


class LocalAuthor:
    """A model of this process, in evaluation mode."""

    def __init__(
        self,
        model: LanguageModel,
        *,
        vocab_size: int,
        stop_ids: frozenset[int],
        sampling: Sampling,
        max_new_tokens: int,
        batch_size: int,
    ) -> None:
        """Look at how the model decodes. `stop_ids` end a text; each text has at most `max_new_tokens` new tokens."""
        self._model, self._vocab_size, self._stop_ids = model, vocab_size, stop_ids
        self._sampling, self._most = sampling, max_new_tokens
        self._limit = context_length(model)
        self.batch_size = batch_size
        self.is_cached = has_cache(model)
        """False for a model that reads its whole text again for each token."""
        self._pads = isinstance(model, HuggingFaceLanguageModel) and self.is_cached and pads_well(model, vocab_size)

    def write(self, asked: Sequence[Asked], report: Report) -> list[Answer]:
        """Write the longest prompts first: if memory does not suffice, that shows at once.

        Raises UserError for logits that are not finite, and if one text alone finds no room.
        """
        answers: dict[int, Answer] = {}
        waiting = sorted(range(len(asked)), key=lambda place: (-len(asked[place].ids), place))
        while waiting:
            places = waiting[: self._together(asked, waiting)]
            try:
                answers |= self._write([asked[place] for place in places], places, report)
                waiting = waiting[len(places) :]
                continue
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if len(places) == 1:
                    raise no_room(len(asked[places[0]].ids) + self._most) from None
            free_memory()  # outside of `except`, which holds the tensors of the failed pass
            self.batch_size = -(-len(places) // 2)
            say(f"out of memory with {len(places)} texts at once; from here on {self.batch_size}")
        return [answers[place] for place in range(len(asked))]

    def _together(self, asked: Sequence[Asked], waiting: list[int]) -> int:
        """Return how many of the waiting texts, which stand in falling length, are written together."""
        if self._pads or not self.is_cached:
            return self.batch_size
        length = len(asked[waiting[0]].ids)
        return sum(len(asked[place].ids) == length for place in waiting[: self.batch_size])

    @torch.no_grad()
    def _write(self, asked: list[Asked], places: list[int], report: Report) -> Iterator[tuple[int, Answer]]:
        """Return each text with its place."""
        texts = self._begin()
        logits_BV = texts.begin([each.ids for each in asked])
        written: list[list[int]] = [[] for _ in asked]
        done: dict[int, Answer] = {}
        rows = list(range(len(asked)))  # the texts in the batch; finished ones run along until they are taken out
        for position in range(self._most):
            interrupt.stop_if_asked()
            prompts_B, samples_B = ([getattr(asked[row], name) for row in rows] for name in ("prompt", "sample"))
            draws_B = uniforms(self._sampling.seed, prompts_B, samples_B, position)
            tokens_B = choose(logits_BV, draws_B, self._sampling)
            for row, token in zip(rows, tokens_B.tolist(), strict=True):
                if row in done:
                    continue
                written[row].append(token)
                if token in self._stop_ids or len(written[row]) == self._room(asked[row]):
                    done[row] = Answer(written[row], token in self._stop_ids)
                    report(done[row])
            if len(done) == len(asked):
                break
            alive = [place for place, row in enumerate(rows) if row not in done]
            if len(alive) <= KEPT * len(rows) and texts.keep(alive):
                rows, tokens_B = [rows[place] for place in alive], tokens_B[alive]
            logits_BV = texts.advance(tokens_B)
        return ((places[row], answer) for row, answer in done.items())

    def _begin(self) -> Texts:
        if not self.is_cached:
            return RereadTexts(self._model, self._vocab_size)
        assert isinstance(self._model, HuggingFaceLanguageModel)
        return CachedTexts(self._model, self._vocab_size, self._pads)

    def _room(self, asked: Asked) -> int:
        """Return the most tokens that may follow a prompt: those who learn from the text must be able to read it."""
        return self._most if self._limit is None else min(self._most, self._limit - len(asked.ids))
