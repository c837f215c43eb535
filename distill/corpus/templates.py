"""Rendering of conversations with the tokenizer's chat template, and the assistant's answers in the rendered text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from distill.errors import UserError
from distill.models.chat_templates import Span, TemplateError, render

GENERATION = re.compile(r"\{%[-+]?\s*generation\b")
REMEDY = "mark the answers in the chat template with {% generation %} and {% endgeneration %}"

Message = dict[str, Any]


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template, as a function from messages to text and the answers' character spans in it."""

    source: str
    special_tokens: dict[str, str]
    added_tokens: tuple[str, ...]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
        """Return the default chat template of `tokenizer`. Raises UserError if it or character offsets are missing."""
        if not tokenizer.chat_template:
            raise UserError(
                "the corpus holds conversations, but the tokenizer has no chat template: take the instruction-tuned "
                "version of the teacher, or a corpus of plain text"
            )
        if not tokenizer.is_fast:
            raise UserError(
                f"the corpus holds conversations, but {type(tokenizer).__name__} cannot tell which characters a token "
                "stands for, so the answers cannot be found: take a tokenizer folder with a tokenizer.json"
            )
        added = tuple(token.content for token in tokenizer.added_tokens_decoder.values() if not token.content.isspace())
        return cls(tokenizer.get_chat_template(), dict(tokenizer.special_tokens_map), added)

    def render(self, messages: Sequence[Message], where: str) -> tuple[str, list[Span]]:
        """Return the conversation as text, and the spans of the answers in it, each with its end-of-turn token.

        A template with `{% generation %}` marks the answers itself. Otherwise an answer is the text that the template
        adds for
        the assistant's message after the prompt, which is rendered from the messages before it.
        """
        if GENERATION.search(self.source):
            return self._rendered(messages, where)
        text, _ = self._rendered(messages, where)
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        return text, [self._answer_span(text, messages, i, where) for i in answers]

    def _answer_span(self, text: str, messages: Sequence[Message], i: int, where: str) -> Span:
        if i == 0:
            raise UserError(f"{where}: the conversation begins with the assistant; nothing asks for that answer")
        prompt, _ = self._rendered(messages[:i], where, add_generation_prompt=True)
        answered, _ = self._rendered(messages[: i + 1], where)
        if not (text.startswith(prompt) and answered.startswith(prompt)):
            raise UserError(
                f"{where}: message {i + 1}: the chat template renders the conversation so far in another way once it "
                f"goes on, so the answer cannot be told from the prompt: {REMEDY}"
            )
        answer = answered[len(prompt) :]
        if not text.startswith(answer, len(prompt)):
            answer = self._without_trimmings(answer, messages[i])
            if not answer or not text.startswith(answer, len(prompt)):
                raise UserError(
                    f"{where}: message {i + 1}: the chat template renders this answer in another way once the "
                    f"conversation goes on: {REMEDY}"
                )
        # A separator after the end-of-turn token ("\n" in ChatML) is never generated, so it is not learned either.
        ended = answer.rstrip()
        return len(prompt), len(prompt) + len(ended if ended.endswith(self.added_tokens) else answer)

    @staticmethod
    def _without_trimmings(answer: str, message: Message) -> str:
        """Return the bare content and the text after it: Qwen3 puts an empty `<think>` block before the last answer
        only.
        """
        content = str(message.get("content", "")).strip()
        return answer[answer.rindex(content) :] if content and content in answer else ""

    def _rendered(
        self, messages: Sequence[Message], where: str, add_generation_prompt: bool = False
    ) -> tuple[str, list[Span]]:
        marked = bool(GENERATION.search(self.source))
        try:
            return render(
                self.source,
                messages,
                self.special_tokens,
                add_generation_prompt=add_generation_prompt,
                marked=marked,
            )
        except TemplateError as error:
            raise UserError(f"{where}: the chat template refuses the conversation: {error}") from error


def tokens_in_spans(offsets: Sequence[Span], spans: Sequence[Span]) -> np.ndarray:
    """Return a mask (bool [tokens]) of the tokens that share at least one character with a span.

    transformers' own mask is not used. It looks up the span's first character alone. If no token covers that character
    (a
    blank that the tokenizer trims off), it gives up the conversation's remaining answers without a message.
    """
    starts, ends = np.asarray(offsets, dtype=np.int64).reshape(-1, 2).T
    inside = np.zeros(len(starts), dtype=bool)
    for start, end in spans:
        inside |= (ends > start) & (starts < end)
    return inside
