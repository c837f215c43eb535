"""Conversations with one private-use character in place of each piece of text, and the places where the pieces land.

A template that renders marked messages shows its own text, the *skeleton*, and where it writes each piece. Aligned with
the rendering of the real messages, the skeleton gives every piece its characters there, or tells that the two differ in
more than the pieces.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from distill.corpus.conversations import THOUGHT_END, Conversation, Message, function_of, said, thought_of
from distill.models.chat_templates import Span

Part = Literal["content", "thought", "call", "name", "tools"]

FIRST = 0xF0000
"""First mark, in the supplementary private use area A, of which no template writes a character of its own accord."""
MOST = 0xFFFD
"""Largest number of pieces."""
_NUMBER = 907_305_518  # begins the numbers that stand for numbers: a template may ask if an argument is one
_STEPS = 10_000
"""Most attempts at an alignment, beside ten a piece. Without backslashes in the text each piece takes one."""
_MARK = re.compile(f"([{chr(FIRST)}-{chr(FIRST + MOST)}]|{_NUMBER}[0-9]{{6}}(?:\\.5)?)")


@dataclass(frozen=True)
class Piece:
    """A stretch of a conversation's text."""

    message: int
    """Number of its message; -1 for a tool's schema."""
    part: Part
    text: str
    before: str = ""
    """Text of the same field between the piece before and this one: blanks and marks that the template may look at."""
    number: int | float | None = None
    """The number that the piece stands for."""

    def forms(self) -> list[str]:
        """Return the texts that a template may write for the piece: as it is, or inside JSON strings."""
        if self.number is not None:
            return _unique([json.dumps(self.number), str(self.number)])
        if not self.text.strip():
            return _unique([self.text, "", json.dumps(self.text)[1:-1]])
        inner = json.dumps(self.text, ensure_ascii=False)[1:-1]
        twice = json.dumps(inner, ensure_ascii=False)[1:-1]
        return _unique([self.text, inner, json.dumps(self.text)[1:-1], twice])


@dataclass(frozen=True)
class Form:
    """The way in which a conversation is handed to a template. Templates differ in what they can read."""

    parts: bool = False
    """Contents are lists of one text part, instead of texts."""
    json_arguments: bool = False
    """Arguments of calls are JSON text, instead of objects."""


@dataclass(frozen=True)
class Marking:
    """A choice of what is marked. Templates differ in what they look at."""

    empties: bool = True
    """Mark contents that are empty or blank, which else nothing would locate."""
    names: bool = True
    """Mark the names of called functions."""


@dataclass(frozen=True)
class Marked:
    """A marked conversation, and its pieces by the number of their mark."""

    conversation: Conversation
    pieces: list[Piece]


def shaped(conversation: Conversation, form: Form) -> Conversation:
    """Return the messages as the template gets them, in one form."""
    return Conversation(
        [_shaped(said(message), form) for message in conversation.messages], conversation.tools, conversation.options
    )


def mark(conversation: Conversation, kept: re.Pattern[str], marking: Marking) -> Marked:
    """Mark every piece of a conversation, except text that matches `kept`, at which the template may look."""
    marker = _Marker(kept, marking)
    messages = [marker.message(index, said(message)) for index, message in enumerate(conversation.messages)]
    tools = conversation.tools and [marker.tool(tool) for tool in conversation.tools]
    return Marked(Conversation(messages, tools, conversation.options), marker.pieces)


def split(skeleton: str) -> tuple[list[str], list[int]]:
    """Return a skeleton's own texts, and the numbers of the pieces between them (one fewer)."""
    fields = _MARK.split(skeleton)
    return fields[::2], [_index(found) for found in fields[1::2]]


def align(literals: list[str], pieces: list[Piece], text: str) -> list[Span] | None:
    """Return the place of each piece in `text`, which is the skeleton with text for its marks; None if it is not.

    `literals` are the skeleton's own texts around the `pieces`. A piece may be written in several forms, so this tries
    them in turn, and goes back where one leads nowhere.
    """
    if not text.startswith(literals[0]):
        return None
    if not pieces:
        return [] if text == literals[0] else None
    spans: list[Span] = []
    trying = [_places(pieces[0], literals[1], text, len(literals[0]))]
    for _ in range(_STEPS + 10 * len(pieces)):
        span = next(trying[-1], None)
        if span is None:
            trying.pop()
            if not spans:
                return None
            spans.pop()
            continue
        after = len(trying)
        end = span[1] + len(literals[after])
        if after < len(pieces):
            spans.append(span)
            trying.append(_places(pieces[after], literals[after + 1], text, end))
        elif end == len(text):
            return [*spans, span]
    return None


def _places(piece: Piece, literal: str, text: str, start: int) -> Iterator[Span]:
    for form in piece.forms():
        if text.startswith(form, start) and text.startswith(literal, start + len(form)):
            yield start, start + len(form)


def _shaped(message: Message, form: Form) -> Message:
    if form.parts and isinstance(message.get("content"), str):
        message = {**message, "content": [{"type": "text", "text": message["content"]}]}
    if form.json_arguments and message.get("tool_calls"):
        message = {**message, "tool_calls": [_in_call(call, _as_json) for call in message["tool_calls"]]}
    return message


def _as_json(function: Mapping[str, Any]) -> dict[str, Any]:
    return {**function, "arguments": json.dumps(function.get("arguments", {}), ensure_ascii=False)}


def _in_call(call: Mapping[str, Any], change: Callable[[Mapping[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    changed = change(function_of(call))
    return {**call, "function": changed} if isinstance(call.get("function"), Mapping) else changed


class _Marker:
    """The marks of one conversation, numbered in the order in which they are made."""

    def __init__(self, kept: re.Pattern[str], marking: Marking) -> None:
        self.pieces: list[Piece] = []
        self._kept, self._marking = kept, marking

    def message(self, index: int, message: Message) -> Message:
        """Return the message with marks for its thought, content and calls."""
        marked = dict(message)
        thought = thought_of(message)
        if thought is not None:
            marked[thought[0]] = self._text(index, "thought", thought[1])
        if message.get("tool_calls"):
            marked["tool_calls"] = [_in_call(call, self._function(index)) for call in message["tool_calls"]]
        content = message.get("content")
        if isinstance(content, str):
            locate = self._marking.empties and not message.get("tool_calls") and thought is None
            marked["content"] = self._content(index, message["role"], content, locate)
        return marked

    def tool(self, tool: dict[str, Any]) -> dict[str, Any]:
        """Return the schema of a tool with a mark for its description. Its name is looked for as it is."""
        description = function_of(tool).get("description")
        if not isinstance(description, str) or not description.strip():
            return tool
        return _in_call(tool, lambda function: {**function, "description": self._text(-1, "tools", description)})

    def _content(self, index: int, role: str, content: str, locate: bool) -> str:
        if not content.strip():
            return self._new(Piece(index, "content", content)) if locate else content
        thought, end, answer = content.rpartition(THOUGHT_END)
        if role != "assistant" or not end:
            return self._text(index, "content", content)
        return self._text(index, "thought", thought) + end + self._text(index, "content", answer, end)

    def _text(self, index: int, part: Part, text: str, before: str = "") -> str:
        """Return `text` with its blanks and kept marks, and one mark for each piece between them."""
        marked, begin = "", 0
        for kept in [*self._kept.finditer(text), None]:
            end = kept.start() if kept else len(text)
            bare = text[begin:end].strip()
            if bare:
                at = text.index(bare, begin)
                before += text[begin:at]
                marked += text[begin:at] + self._new(Piece(index, part, bare, before))
                begin, before = at + len(bare), ""
            kept_text = text[begin : kept.end()] if kept else text[begin:]
            marked, before, begin = marked + kept_text, before + kept_text, begin + len(kept_text)
        return marked

    def _function(self, index: int) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
        def mark_function(function: Mapping[str, Any]) -> dict[str, Any]:
            name = function.get("name")
            marked = dict(function)
            if self._marking.names and isinstance(name, str) and name:
                marked["name"] = self._new(Piece(index, "name", name))
            marked["arguments"] = self._value(index, function.get("arguments", {}))
            return marked

        return mark_function

    def _value(self, index: int, value: Any) -> Any:
        """Return a call's arguments with marks for their texts and numbers. Keys stay, because templates sort them."""
        if isinstance(value, Mapping):
            return {key: self._value(index, inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [self._value(index, inner) for inner in value]
        if isinstance(value, str) and value.strip():
            return self._text_of_call(index, value)
        if isinstance(value, int | float) and not isinstance(value, bool):
            self._new(Piece(index, "call", "", number=value))
            number = _NUMBER * 10**6 + len(self.pieces) - 1
            return number + 0.5 if isinstance(value, float) else number
        return value

    def _text_of_call(self, index: int, value: str) -> str:
        bare = value.strip()
        lead, _, trail = value.partition(bare)
        return lead + self._new(Piece(index, "call", bare, lead)) + trail

    def _new(self, piece: Piece) -> str:
        self.pieces.append(piece)
        return chr(FIRST + min(len(self.pieces) - 1, MOST))


def _index(found: str) -> int:
    return ord(found) - FIRST if len(found) == 1 else int(found[len(str(_NUMBER)) :].removesuffix(".5"))


def _unique(texts: list[str]) -> list[str]:
    return list(dict.fromkeys(texts))
