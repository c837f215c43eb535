"""Speakers of a chat: a model with its tokenizer, and the protocol that any other speaker meets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from distill.models.chat_templates import render_with
from distill.models.generation import HALF, context_length, decode_text, encode_prompt, ending_tokens, generate
from distill.models.tokenizers import vocab_size

Messages = list[dict[str, str]]
"""Messages of a conversation, each a role and a content, oldest first."""


class Speaker(Protocol):
    """Author of the answers in a chat."""

    has_template: bool
    """True if there is a chat template. Without one each line is continued as a text of its own."""
    context: int | None
    """Tokens that a conversation and its answer may have; None for any number."""

    def encode(self, messages: Messages) -> list[int]:
        """Return the tokens that ask for the next answer. Raises TemplateError if the template refuses the messages."""

    def encode_text(self, text: str) -> list[int]:
        """Return the tokens of a text that is to be continued."""

    def write(self, ids: list[int], max_new_tokens: int, sampling: dict[str, Any]) -> Iterator[str]:
        """Yield what follows the tokens, in pieces of text. `sampling` has `temperature`, `top_p` and a `generator`."""


class ModelSpeaker:
    """A language model and its tokenizer."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._stop_ids, self._vocab_size = ending_tokens(model, tokenizer), vocab_size(tokenizer)
        self.has_template = bool(getattr(tokenizer, "chat_template", None))
        self.context = context_length(model)

    def encode(self, messages: Messages) -> list[int]:
        text = render_with(self._tokenizer, messages, add_generation_prompt=True)
        return list(self._tokenizer.encode(text, add_special_tokens=False, verbose=False))

    def encode_text(self, text: str) -> list[int]:
        return encode_prompt(self._tokenizer, text)

    def write(self, ids: list[int], max_new_tokens: int, sampling: dict[str, Any]) -> Iterator[str]:
        text = GrowingText(self._tokenizer)
        for token in generate(
            self._model, ids, max_new_tokens, vocab_size=self._vocab_size, stop_ids=self._stop_ids, **sampling
        ):
            if piece := text.add(token):
                yield piece
        if piece := text.rest():
            yield piece


class GrowingText:
    """Text of tokens that come one by one. A piece is given out as soon as no later token can change it.

    A character's bytes may be several tokens. Until the last one is there, decoding shows replacement characters, with
    some tokenizers also for whole characters right before it.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self.shown = ""
        """Text given out so far."""

    def add(self, token: int) -> str:
        """Return the text that can be given out now."""
        self._ids.append(token)
        return self._new(decode_text(self._tokenizer, self._ids).rstrip(HALF))

    def rest(self) -> str:
        """Return the text that was held back, when no more tokens come."""
        return self._new(decode_text(self._tokenizer, self._ids))

    def _new(self, text: str) -> str:
        if not text.startswith(self.shown):
            return ""
        piece = text[len(self.shown) :]
        self.shown = text
        return piece
