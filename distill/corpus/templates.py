"""Rendering of conversations with the tokenizer's chat template, and the learned stretches of the rendered text."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from distill.corpus.answers import Answers, Skeleton, Unfit
from distill.corpus.conversations import Conversation
from distill.corpus.faults import RowError
from distill.corpus.marks import MOST, Form, Marked, Marking, align, mark, shaped, split
from distill.corpus.turns import find_turns
from distill.errors import UserError
from distill.models.chat_templates import (
    GENERATION,
    BrokenTemplateError,
    Request,
    Span,
    TemplateError,
    TemplateLimitError,
    render,
    render_many,
)

_QUOTED = re.compile(r"'((?:[^'\\]|\\.)*)'|\"((?:[^\"\\]|\\.)*)\"")
_DATA = re.compile(r"""["']type["']: ["']text["']|\\U000f[0-9a-f]{4}""", re.IGNORECASE)
"""A content's parts written as JSON or Python: by their keys, or by a mark that Python's `repr` has escaped."""
_SKELETONS = 1024
"""Skeletons that are kept. Conversations of the same form have the same ones."""

MEND = "mend it, or name another file with corpus.chat_template"
"""Remedy for a template with a mistake."""

Turns = Literal["assistant", "last", "all"]


@dataclass(frozen=True)
class Learning:
    """Choice of the turns that are learned, and of the text around them."""

    turns: Turns = "assistant"
    """Turns that are learned: the assistant's, the assistant's last one, or all that is said."""
    keep_thoughts: bool = True
    """Render the assistant's thoughts too."""
    date: str | None = None
    """The day that the template takes for today, YYYY-MM-DD; None for the clock's."""

    @property
    def words(self) -> str:
        """The choice in words."""
        return f"learn {self.turns}, thoughts {'keep' if self.keep_thoughts else 'drop'}"

    def described(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
        """Return what differs from the defaults, and the day if the tokenizer's template prints one, in words."""
        found = {}
        if self.turns != "assistant" or not self.keep_thoughts:
            found["conversations"] = self.words
        if self.date and prints_the_date(tokenizer):
            found["date"] = self.date
        return found


DEFAULTS = Learning()


@dataclass(frozen=True)
class Rendered:
    """A conversation as text."""

    text: str
    spans: list[Span]
    """The characters to learn: answers, each with its end-of-turn token."""
    thoughts_left_out: int = 0
    """Thoughts of earlier turns that the template takes out by its own rule."""
    is_endless: bool = False
    """True if the last learned answer does not end with a token of the tokenizer's own, such as `<|im_end|>`."""
    turns: list[int] = field(default_factory=list)
    """The characters at which a turn begins after an answer."""
    openings: list[int] = field(default_factory=list)
    """The characters behind the system's message and behind the first user's."""


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template, as a function from conversations to text and the character spans to learn in it."""

    source: str
    special_tokens: dict[str, str]
    added_tokens: tuple[str, ...]
    learning: Learning = DEFAULTS
    with_tools: ChatTemplate | None = None
    """The tokenizer's template for conversations with tools, if it has one of its own."""
    _skeletons: dict[str, Skeleton | Unfit] = field(default_factory=dict, compare=False, repr=False)
    _texts: dict[str, tuple[str, list[Span]]] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, learning: Learning = DEFAULTS) -> ChatTemplate:
        """Return the default chat template of `tokenizer`. Raises UserError if it or character offsets are missing."""
        if not tokenizer.chat_template:
            raise UserError(
                "the corpus holds conversations, but the tokenizer has no chat template: take the instruction-tuned "
                "version of the teacher, name a template file with corpus.chat_template, or take a corpus of plain text"
            )
        if not tokenizer.is_fast:
            raise UserError(
                f"the corpus holds conversations, but {type(tokenizer).__name__} cannot tell which characters a token "
                "stands for, so the answers cannot be found: take a tokenizer folder with a tokenizer.json"
            )
        added = tuple(token.content for token in tokenizer.added_tokens_decoder.values() if not token.content.isspace())
        special = dict(tokenizer.special_tokens_map)
        with_tools = None
        if isinstance(tokenizer.chat_template, dict) and (source := tokenizer.chat_template.get("tool_use")):
            with_tools = cls(source, special, added, learning)
        return cls(tokenizer.get_chat_template(), special, added, learning, with_tools)

    def render(self, conversation: Conversation, where: str) -> Rendered:
        """Return the conversation as text, and the characters of it that are learned.

        Every content, thought and call of a message is found in the text, or RowError tells which is not. Each way of
        handing the messages over is tried in turn, since templates differ in what they can read. Raises UserError for a
        template that exceeds a limit.
        """
        if conversation.tools and self.with_tools is not None:
            return self.with_tools.render(conversation, where)
        if not self.learning.keep_thoughts:
            conversation = conversation.without_thoughts()
        reasons: list[Unfit] = []
        for form in _forms(conversation):
            for marking in _markings(conversation):
                try:
                    return self._rendered(conversation, form, marking)
                except Unfit as reason:
                    reason.weight -= form.parts / 2
                    reasons.append(reason)
                except TemplateLimitError as error:
                    raise UserError(f"{where}: the chat template cannot be rendered: {error}") from error
                except BrokenTemplateError as error:
                    raise UserError(f"the chat template has a mistake, {error}: {MEND}") from error
        raise RowError(f"{where}: {max(reasons, key=lambda reason: reason.weight)}")

    def render_ahead(self, conversations: Sequence[Conversation]) -> None:
        """Let these conversations' texts be there for the `render` of each that follows: many at once cost less."""
        if self.with_tools is not None:
            self.with_tools.render_ahead([each for each in conversations if each.tools])
            conversations = [each for each in conversations if not each.tools]
        self._texts.clear()
        if not self.learning.keep_thoughts:
            conversations = [conversation.without_thoughts() for conversation in conversations]
        handed = [shaped(conversation, Form()) for conversation in conversations]
        requests = [Request(each.messages, each.tools, each.options) for each in handed]
        found = render_many(self.source, requests, self.special_tokens, marked=self._is_marked, date=self.learning.date)
        texts = zip(map(_key, handed), found, strict=True)
        self._texts.update((key, text) for key, text in texts if text is not None)

    def _rendered(self, conversation: Conversation, form: Form, marking: Marking) -> Rendered:
        marked = mark(conversation, self._kept, marking)
        if len(marked.pieces) > MOST:
            raise Unfit(f"more than {MOST:,} pieces of text in one conversation: split it", 5)
        marked = Marked(shaped(marked.conversation, form), marked.pieces)
        answers = Answers(marked, self._skeleton, self._units)
        if form.parts and _DATA.search(answers.whole.text):
            raise Unfit("the chat template writes a content's parts as data")
        left_out = answers.check_all_is_written()
        text, generated = self._text(shaped(conversation, form))
        skeleton = answers.whole
        spans = align(skeleton.literals, [marked.pieces[number] for number in skeleton.numbers], text)
        if spans is None:
            raise Unfit("the chat template does not write the messages' text as it is, so the answers cannot be found")
        learned = self._learned(conversation, answers, spans, text, generated)
        is_endless = bool(learned) and not text[slice(*learned[-1])].rstrip().endswith(self._ends)
        return Rendered(text, learned, left_out, is_endless, *find_turns(answers, conversation, spans, text))

    @property
    def _ends(self) -> tuple[str, ...]:
        special = (token for token in self.special_tokens.values() if isinstance(token, str))
        return tuple(token.rstrip() for token in (*self.added_tokens, *special) if token.strip())

    def _learned(
        self, conversation: Conversation, answers: Answers, spans: list[Span], text: str, generated: list[Span]
    ) -> list[Span]:
        if self.learning.turns == "all":
            return answers.all_but_unlearned(conversation, spans, len(text))
        chosen = answers.chosen(conversation, only_last=self.learning.turns == "last")
        if not self._is_marked:
            return [span for index in chosen for span in answers.learned(index, spans)]
        everything = [index for index, message in enumerate(conversation.messages) if message["role"] == "assistant"]
        if chosen == everything:
            return generated
        places = [answers.place(index, spans) for index in chosen]
        return [span for span in generated if any(span[0] < end and start < span[1] for start, end in places)]

    @property
    def _kept(self) -> re.Pattern[str]:
        return _kept_marks(self.source)

    @property
    def _units(self) -> re.Pattern[str]:
        return _units_of(self.added_tokens)

    @property
    def _is_marked(self) -> bool:
        return GENERATION.search(self.source) is not None

    def _text(self, conversation: Conversation) -> tuple[str, list[Span]]:
        if found := self._texts.get(_key(conversation)):
            return found
        try:
            return self._render(conversation, marked=self._is_marked)
        except BrokenTemplateError:
            raise
        except TemplateError as error:
            raise Unfit(f"the chat template refuses the conversation: {error}", 2) from error

    def _skeleton(self, conversation: Conversation, prompt: bool) -> Skeleton:
        """Return what the template renders of marked messages. Raises Unfit if it refuses them."""
        key = f"{prompt} {_key(conversation)}"
        found = self._skeletons.get(key)
        if found is None:
            try:
                text, _ = self._render(conversation, add_generation_prompt=prompt)
                found = Skeleton(text, *split(text))
            except BrokenTemplateError:
                raise
            except TemplateError as error:
                found = Unfit(f"the chat template refuses the conversation: {error}", 2)
            if len(self._skeletons) >= _SKELETONS:
                self._skeletons.clear()
            self._skeletons[key] = found
        if isinstance(found, Unfit):
            raise Unfit(str(found), found.weight)
        return found

    def _render(self, conversation: Conversation, **how: bool) -> tuple[str, list[Span]]:
        return render(
            self.source,
            conversation.messages,
            self.special_tokens,
            tools=conversation.tools,
            options=conversation.options,
            date=self.learning.date,
            **how,
        )


def _key(conversation: Conversation) -> str:
    return json.dumps(conversation.document())


def prints_the_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return True if what the tokenizer's chat template renders may depend on the day."""
    return "strftime_now" in str(tokenizer.chat_template)


def _forms(conversation: Conversation) -> Iterator[Form]:
    has_calls = any(message.get("tool_calls") for message in conversation.messages)
    for parts in (False, True):
        for json_arguments in (False, True)[: 1 + has_calls]:
            yield Form(parts, json_arguments)


def _markings(conversation: Conversation) -> Iterator[Marking]:
    has_empty = any(not str(message.get("content", "")).strip() for message in conversation.messages)
    has_calls = any(message.get("tool_calls") for message in conversation.messages)
    for empties in (True, False)[: 1 + has_empty]:
        for names in (True, False)[: 1 + has_calls]:
            yield Marking(empties, names)


@functools.lru_cache(maxsize=8)
def _kept_marks(source: str) -> re.Pattern[str]:
    """Return a pattern of the marks at which a template may look in a content, such as `</think>`.

    They are words of the template's own quoted texts, of three characters or more, with a bracket or a bar in them.
    """
    words: set[str] = {"<think>", "</think>"}
    for single, double in _QUOTED.findall(source):
        words.update((single or double).replace("\\n", " ").split())
    marks = [word for word in words if 3 <= len(word) <= 64 and set("<>[]|") & set(word) and "\\" not in word]
    return re.compile("|".join(re.escape(word) for word in sorted(marks, key=len, reverse=True)))


@functools.lru_cache(maxsize=8)
def _units_of(added_tokens: tuple[str, ...]) -> re.Pattern[str]:
    """Return a pattern of the units in which a template's own texts are compared: tokens, tags, words, characters."""
    tokens = "|".join(re.escape(token) for token in sorted(added_tokens, key=len, reverse=True) if token)
    group = f"({tokens})" if tokens else "((?!))"
    return re.compile(rf"{group}|<[^<>\s]{{1,64}}>|\[[^\[\]\s]{{1,64}}\]|\w+|.", re.DOTALL)


def tokens_from(offsets_N2: np.ndarray, characters: list[int]) -> list[int]:
    """Return the first token at or behind each of the characters. `offsets_N2` are the tokens' characters (int64)."""
    starts = np.maximum.accumulate(offsets_N2[:, 0])
    return np.searchsorted(starts, characters).tolist()


def tokens_in_spans(offsets_N2: np.ndarray, spans: list[Span]) -> np.ndarray:
    """Return a mask (bool [tokens]) of the tokens that share at least one character with a span.

    transformers' own mask is not used. It looks up the span's first character alone. If no token covers that character
    (a blank that the tokenizer trims off), it gives up the conversation's remaining answers without a message.
    """
    starts, ends = offsets_N2.T
    inside = np.zeros(len(starts), dtype=bool)
    for start, end in spans:
        inside |= (ends > start) & (starts < end)
    return inside
