"""Prompts made of a corpus: conversations without their last answer, questions, or the beginnings of plain texts."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import datasets
import numpy as np

from distill.corpus.conversations import Conversation
from distill.corpus.documents import load_documents
from distill.corpus.faults import Fault, RowError, refusal
from distill.corpus.selecting import BadRows
from distill.corpus.sources import TextSource
from distill.corpus.templates import MEND
from distill.errors import UserError
from distill.models.chat_templates import BrokenTemplateError, TemplateError, TemplateLimitError, render
from distill.models.generation import decode_text, encode_prompt
from distill.system.quiet import quiet_datasets

THINKING = "enable_thinking"
"""Variable with which chat templates turn thinking on or off."""


@dataclass(frozen=True)
class Asking:
    """The way from a document to a prompt."""

    prompt_tokens: int = 64
    """Tokens of a plain text's beginning."""
    system: str | None = None
    """System message of conversations that have none."""
    thinking: bool | None = None
    """Value of the template's variable; None leaves it to the template."""
    date: str | None = None
    """The day that the template takes for today, YYYY-MM-DD."""


@dataclass(frozen=True)
class Prompt:
    """One prompt."""

    ids_L: np.ndarray
    """Tokens, int32."""
    document: str
    """The sha256 (hex) of its document."""
    place: int
    """Row of its document."""
    is_conversation: bool


@dataclass(frozen=True)
class Prompts:
    """All prompts of a source, no two of them alike."""

    prompts: list[Prompt]
    left_out: dict[str, int] = field(default_factory=dict)
    """Numbers of rows that gave no prompt, by reason."""
    _documents: datasets.Dataset | None = None
    _asking: Asking = Asking()

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def kind(self) -> Literal["messages", "text"]:
        """Form of the prompts, or of some of them: conversations, or the beginnings of plain texts."""
        return "messages" if any(prompt.is_conversation for prompt in self.prompts) else "text"

    @property
    def fingerprint(self) -> str:
        """The sha256 (hex) of the prompts' tokens in order."""
        digest = hashlib.sha256()
        for prompt in self.prompts:
            digest.update(len(prompt.ids_L).to_bytes(4, "little") + prompt.ids_L.astype("<i4").tobytes())
        return digest.hexdigest()

    def shown(self, number: int, answer: str, tokenizer: Any) -> dict[str, Any]:
        """Return a text for people to read: the conversation with the answer, or the text with its continuation."""
        assert self._documents is not None
        prompt = self.prompts[number]
        if not prompt.is_conversation:
            return {"text": decode_text(tokenizer, prompt.ids_L.tolist()) + answer}
        asked = _asked(self._documents[prompt.place]["document"], self._asking)
        return {"messages": [*asked.messages, {"role": "assistant", "content": answer}]}


def read_prompts(
    sources: Sequence[TextSource],
    tokenizer: Any,
    asking: Asking,
    *,
    bad_rows: BadRows = "refuse",
    limit: int | None = None,
    most: int | None = None,
) -> Prompts:
    """Read the prompts of a corpus: at most `most`, each shorter than the `limit` tokens that the writer can read.

    Raises UserError if rows give no prompt, unless they are skipped,
    and if there is no prompt at all.
    """
    path = ", ".join(source.path for source in sources)
    files = [
        file for owner, source in enumerate(sources) for file in source.open(owner, 0, is_alone=source.limit is None)
    ]
    with quiet_datasets():
        documents = load_documents(files)
    prompts, faults = _prompts(documents, _Encoder(tokenizer, asking, limit), most)
    labels = [file.label for file in files]
    if faults and (bad_rows == "refuse" or not prompts):
        raise refusal(faults, len(documents), labels)
    kept, repeated = _without_repeated(prompts)
    if not kept:
        raise UserError(f"{path}: no prompt in it: all {len(documents):,} rows are empty")
    left_out = {"bad rows": len(faults), "repeated": repeated}
    left_out = {reason: rows for reason, rows in left_out.items() if rows}
    return Prompts(kept, left_out, documents, asking)


def _prompts(documents: datasets.Dataset, encoder: _Encoder, most: int | None) -> tuple[list[Prompt], list[Fault]]:
    prompts: list[Prompt] = []
    faults: list[Fault] = []
    for place, row in enumerate(documents):
        reason = row["fault"]
        if not reason and not row["document"]:
            continue
        if not reason:
            try:
                ids = encoder.encode(row["document"], row["conversation"])
                prompts.append(Prompt(np.asarray(ids, dtype=np.int32), row["digest"].hex(), place, row["conversation"]))
            except RowError as error:
                reason = str(error)
        if reason:
            faults.append(Fault(place, row["source"], row["row"], reason))
        if most is not None and len(prompts) == most:
            break
    return prompts, faults


def _without_repeated(prompts: Sequence[Prompt]) -> tuple[list[Prompt], int]:
    first = {prompt.ids_L.tobytes(): prompt for prompt in reversed(prompts)}
    kept = [prompt for prompt in prompts if first[prompt.ids_L.tobytes()] is prompt]
    return kept, len(prompts) - len(kept)


def _asked(document: str, asking: Asking) -> Conversation:
    """Return a conversation up to the answer that is asked for. Raises RowError if nothing asks for one."""
    found = Conversation.parse(document)
    messages = list(found.messages)
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not any(message["role"] == "user" for message in messages):
        raise RowError("has no user's message, so nothing asks for an answer")
    if messages[-1]["role"] not in ("user", "tool", "function"):
        raise RowError(f"ends with a message of role {messages[-1]['role']}, which asks for no answer")
    if asking.system is not None and messages[0]["role"] not in ("system", "developer"):
        messages.insert(0, {"role": "system", "content": asking.system})
    options = found.options if asking.thinking is None else {**found.options, THINKING: asking.thinking}
    return Conversation(messages, found.tools, options)


class _Encoder:
    """A tokenizer with its chat template, as a function from documents to the tokens of prompts."""

    def __init__(self, tokenizer: Any, asking: Asking, limit: int | None) -> None:
        self._tokenizer, self._asking, self._limit = tokenizer, asking, limit

    @functools.cached_property
    def _template(self) -> str:
        """The chat template. Raises UserError if there is none, and for settings that it has no place for."""
        template = getattr(self._tokenizer, "chat_template", None)
        if not template:
            raise UserError(
                "the prompts are conversations, but the writer has no chat template: take an instruction-tuned model, "
                "name a template file with corpus.chat_template, or take prompts of plain text (corpus.columns)"
            )
        if self._asking.thinking is not None and THINKING not in str(template):
            raise UserError(f"generate.thinking: the writer's chat template has no {THINKING}: leave the key out")
        return str(template)

    def encode(self, document: str, is_conversation: bool) -> list[int]:
        """Return the tokens of a document's prompt. Raises RowError if it has none, or too many."""
        ids = self._answer_asked(document) if is_conversation else self._beginning(document)
        if not ids:
            raise RowError("has no token")
        if self._limit is not None and len(ids) >= self._limit:
            raise RowError(f"its prompt has {len(ids):,} tokens, and the writer reads {self._limit:,} with its answer")
        return ids

    def _beginning(self, document: str) -> list[int]:
        return encode_prompt(self._tokenizer, document)[: self._asking.prompt_tokens]

    def _answer_asked(self, document: str) -> list[int]:
        assert self._template
        asked = _asked(document, self._asking)
        try:
            text, _ = render(
                self._tokenizer.get_chat_template(tools=asked.tools),
                asked.messages,
                dict(self._tokenizer.special_tokens_map),
                add_generation_prompt=True,
                tools=asked.tools,
                options=asked.options,
                date=self._asking.date,
            )
        except TemplateLimitError as error:
            raise UserError(f"the chat template cannot be rendered: {error}") from error
        except BrokenTemplateError as error:
            raise UserError(f"the chat template has a mistake, {error}: {MEND}") from error
        except (TemplateError, ValueError) as error:
            raise RowError(f"the chat template refuses the conversation: {error}") from error
        return list(self._tokenizer.encode(text, add_special_tokens=False, verbose=False))


def spread_over(prompts: Sequence[Prompt], count: int) -> Iterator[int]:
    """Yield the numbers of a few prompts that lie evenly among all."""
    step = max(1, len(prompts) // count)
    yield from range(0, min(len(prompts), step * count), step)
