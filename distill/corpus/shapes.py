"""Shapes of rows: which columns hold a document, recognised by their names or named with `corpus.columns`."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from distill.corpus.messages import messages_of, options_of, parsed, text_of, tools_of
from distill.corpus.written import COLUMN, Text
from distill.errors import UserError, did_you_mean

MEANINGS = ("text", "messages", "prompt", "completion", "input", "chosen", "system", "tools", "chat_template_kwargs")
"""Meanings that `corpus.columns` can give to a column."""

NAMES = (
    "plain text",
    "conversations",
    "ShareGPT conversations",
    "pairs of prompt and completion",
    "chosen answers of preferences",
    "prompts",
    "texts of a model",
)
"""Shapes of rows, by the number that a document carries."""
TEXT, MESSAGES, SHAREGPT, PAIR, CHOSEN, PROMPT, WRITTEN = range(len(NAMES))

_PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("question", "response"),
    ("query", "response"),
    ("query", "answer"),
    ("problem", "solution"),
)
_OPTIONAL = ("system", "input")
"""Meanings that a row may be without, though the user named a column."""
_PROMPTS = tuple(dict.fromkeys(prompt for prompt, _ in _PAIRS))
_INPUTS = ("input", "context")
_SYSTEMS = ("system", "system_prompt")
_OTHER = "other "
"""Beginning of the meaning of a second column with the same meaning."""


@dataclass(frozen=True)
class Columns:
    """Columns that the user named by their meaning. Without any, rows are recognised by their columns' names."""

    named: tuple[tuple[str, str], ...] = ()
    prompts: bool = False
    """True if only the questions of rows are wanted: a row needs no answer."""

    @classmethod
    def of(cls, columns: Mapping[str, str], prompts: bool = False) -> Columns:
        """Check the names. Raises UserError for a meaning that is unknown or lacks its partner."""
        for meaning in columns:
            if meaning not in MEANINGS:
                raise UserError(
                    f"corpus.columns: '{meaning}' is no meaning of a column{did_you_mean(meaning, MEANINGS)}"
                )
        main = [meaning for meaning in ("text", "messages", "chosen", "completion") if meaning in columns]
        if prompts and not main and "prompt" in columns:
            main = ["prompt"]
        if columns and len(main) != 1:
            raise UserError(
                "corpus.columns: name one of text, messages, chosen, or prompt and completion "
                f"(named: {', '.join(columns)})"
            )
        if ("completion" in columns) and "prompt" not in columns:
            raise UserError("corpus.columns: a completion needs a prompt: name its column too")
        return cls(tuple(sorted(columns.items())), prompts)

    def key(self) -> list[Any]:
        """Return what identifies the choice, as JSON values."""
        return [*(list(pair) for pair in self.named), *(["prompts"] if self.prompts else [])]

    @property
    def may_lack(self) -> frozenset[str]:
        """The named columns that a row may be without."""
        return frozenset(column for meaning, column in self.named if meaning in _OPTIONAL)

    @property
    def text_column(self) -> str:
        """The column that the text of a text file is given."""
        return dict(self.named).get("text", "text")


BY_NAME = Columns()
"""Columns are recognised by their names."""


@dataclass(frozen=True)
class Shape:
    """The columns of one row that make a document."""

    kind: int
    """Number in `NAMES`."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Column of each meaning."""

    @property
    def is_conversation(self) -> bool:
        return self.kind != TEXT

    def document(self, row: Mapping[str, Any], where: str) -> tuple[Any, int]:
        """Return the row's text, or its conversation as JSON values, and the shape's number. Raises UserError."""
        columns, row = self.columns, _one_of_twins(self.columns, row, where)
        if self.kind == WRITTEN:
            text = Text.of(row[COLUMN], where)
            return {"input_ids": text.input_ids, "prompt_tokens": text.prompt_tokens}, WRITTEN
        if self.kind == TEXT:
            return text_of(row[columns["text"]], where, columns["text"]), TEXT
        kind = self.kind
        if kind == PAIR:
            if row.get(columns.get("label", "")) is False:  # a set for KTO
                raise UserError(
                    f"{where}: column 'label' is false: an answer that is not wanted; to learn it all the same, name "
                    "prompt and completion with corpus.columns"
                )
            messages = _pair(row, columns, where, "completion")
        elif kind == PROMPT:
            messages = _asked(row, columns, where)
        elif kind == CHOSEN:
            chosen = parsed(row[columns["chosen"]])
            is_whole = isinstance(chosen, list) and _is_whole(chosen)
            messages = messages_of(chosen, where) if is_whole else _pair(row, columns, where, "chosen")
        else:
            value = parsed(row[columns["messages"]])
            messages = messages_of(value, where)
            if isinstance(value, list) and value and "from" in value[0]:
                kind = SHAREGPT
        if (system := columns.get("system")) and row.get(system) and messages:
            messages = _with_system(messages, text_of(row[system], where, system), f"{where}: column '{system}'")
        tools = tools_of(row.get(columns.get("tools", "")), where)
        options = options_of(row.get(columns.get("chat_template_kwargs", "")), where)
        if not messages or (tools is None and not options):
            return messages, kind
        content: dict[str, Any] = {"messages": messages}
        if tools is not None:
            content["tools"] = tools
        if options:
            content["chat_template_kwargs"] = options
        return content, kind


@functools.lru_cache(maxsize=4096)
def find_shape(names: tuple[str, ...], wanted: Columns) -> Shape | None:
    """Return the shape of rows with columns of these names, or None if they are not told."""
    if names == (COLUMN,):
        return Shape(WRITTEN)
    own = dict(wanted.named)
    extras: dict[str, str] = {meaning: meaning for meaning in ("tools", "chat_template_kwargs") if meaning in names}
    extras |= _first("system", _SYSTEMS, names)
    if own:
        extras = {meaning: column for meaning, column in extras.items() if meaning.removeprefix(_OTHER) not in own}
        columns = extras | own
        if any(column not in names for meaning, column in own.items() if meaning not in _OPTIONAL):
            return None
        kind = next(kind for meaning, kind in _KINDS.items() if meaning in own)
        return Shape(PROMPT if wanted.prompts and kind == PAIR else kind, columns)
    for name in ("messages", "conversations", "conversation"):
        if name in names:
            return Shape(MESSAGES, extras | {"messages": name})
    if "text" in names:
        return Shape(TEXT, {"text": "text"})
    if "chosen" in names:
        prompt = _first("prompt", ("prompt", "instruction", "question"), names)
        return Shape(CHOSEN, extras | prompt | {"chosen": "chosen"})
    for prompt_name, completion in _PAIRS:
        if prompt_name in names and completion in names:
            more = _first("input", _INPUTS, names) | _first("history", ("history",), names)
            if (prompt_name, completion) == _PAIRS[0]:
                more |= _first("label", ("label",), names)
            found = extras | more | {"prompt": prompt_name, "completion": completion}
            return Shape(PROMPT if wanted.prompts else PAIR, found)
    if wanted.prompts and (prompt := _first("prompt", _PROMPTS, names)):
        more = _first("input", _INPUTS, names) | _first("history", ("history",), names)
        return Shape(PROMPT, extras | more | prompt)
    return None


def shape_of(row: Mapping[str, Any], wanted: Columns) -> Shape | None:
    """Return the shape of a row, or None if it is not told. A column that is null in it is as good as not there."""
    shape = find_shape(tuple(row), wanted)
    if shape is None or wanted.named or all(row[column] is not None for column in shape.columns.values()):
        return shape
    return find_shape(tuple(name for name, value in row.items() if value is not None), wanted) or shape


def _first(meaning: str, candidates: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """Return the first candidate that is a column, and for meanings with two usual names also the other one."""
    found = [name for name in candidates if name in names]
    if len(found) > 1 and candidates in (_SYSTEMS, _INPUTS):
        return {meaning: found[0], f"{_OTHER}{meaning}": found[1]}
    return {meaning: found[0]} if found else {}


def _one_of_twins(columns: Mapping[str, str], row: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """Return the row with the text of each meaning in its first column, where a set has two columns for it.

    Raises UserError if both say something, and not the same.
    """
    for meaning, other in columns.items():
        if meaning.startswith(_OTHER) and _says(row.get(other)):
            first = columns[meaning.removeprefix(_OTHER)]
            if _says(row.get(first)) and row[first] != row[other]:
                raise UserError(
                    f"{where}: columns '{first}' and '{other}' say different things: name one of them with "
                    f"corpus.columns, such as {{{meaning.removeprefix(_OTHER)}: {first}}}"
                )
            row = {**row, first: row[other]}
    return row


def _says(value: Any) -> bool:
    return bool(value.strip()) if isinstance(value, str) else bool(value)


_KINDS = {"text": TEXT, "messages": MESSAGES, "chosen": CHOSEN, "completion": PAIR, "prompt": PROMPT}


def columns_to_read(names: Sequence[str], wanted: Columns) -> list[str]:
    """Return the columns to read, or all of them if no shape is recognised, so that an error can name them.

    They are those of every shape that a row may have, since some columns may be null in it.
    """
    found: set[str] = set()
    rest = list(names)
    while (shape := find_shape(tuple(rest), wanted)) is not None:
        found.update(shape.columns.values())
        rest = [name for name in rest if name not in shape.columns.values()]
        if wanted.named:
            break
    return [name for name in names if name in found] if found else list(names)


def _is_whole(messages: list[Any]) -> bool:
    """Return True for messages with a question: some preference sets have the prompt in them, some beside them."""
    return any(isinstance(m, Mapping) and (m.get("role") or m.get("from")) in ("user", "human") for m in messages)


def _pair(row: Mapping[str, Any], columns: Mapping[str, str], where: str, answer: str) -> list[dict[str, Any]]:
    """Return prompt and completion, each a text or messages, as one conversation."""
    if "prompt" not in columns:
        raise UserError(
            f"{where}: column '{columns[answer]}' has no question, and there is no column with a prompt: "
            "name it with corpus.columns"
        )
    asked, completion = _asked(row, columns, where), parsed(row[columns[answer]])
    if isinstance(completion, list):
        return asked + messages_of(completion, where)
    said = text_of(completion, where, columns[answer])
    if said and not asked:
        raise UserError(
            f"{where}: column '{columns[answer]}' answers nothing, because '{columns['prompt']}' is blank: remove the "
            f"row, or learn it as plain text with corpus.columns {{text: {columns[answer]}}}"
        )
    return [*asked, {"role": "assistant", "content": said}] if said else []


def _earlier(history: Any, place: str) -> list[dict[str, Any]]:
    """Return the turns before a pair, from messages or pairs of texts."""
    if isinstance(history, list) and all(isinstance(turn, Mapping) for turn in history):
        return messages_of(history, place)
    is_pairs = isinstance(history, list) and all(
        isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) and text.strip() for text in turn)
        for turn in history
    )
    if not is_pairs:
        raise UserError(
            f"{place} is no list of pairs of question and answer: mend it, or name the columns with corpus.columns"
        )
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for turn in history for role, text in zip(roles, turn, strict=True)]


def _with_system(messages: list[dict[str, Any]], text: str, place: str) -> list[dict[str, Any]]:
    """Return messages with the system's in front. Raises UserError if they have another one."""
    if messages[0]["role"] not in ("system", "developer"):
        return [{"role": "system", "content": text}, *messages] if text else messages
    if text and text.strip() != str(messages[0].get("content", "")).strip():
        raise UserError(f"{place} and message 1 ({messages[0]['role']}) say different things: remove one of them")
    return messages


def _asked(row: Mapping[str, Any], columns: Mapping[str, str], where: str) -> list[dict[str, Any]]:
    """Return the prompt, a text or messages, as messages, with those before it."""
    prompt = parsed(row[columns["prompt"]])
    if isinstance(prompt, list):
        asked = messages_of(prompt, where)
    else:
        question = text_of(prompt, where, columns["prompt"])
        addition = row.get(columns.get("input", ""))
        if addition is not None and (more := text_of(addition, where, columns["input"])):
            question = f"{question}\n\n{more}" if question else more
        asked = [{"role": "user", "content": question}] if question else []
    if asked and (history := row.get(columns.get("history", ""))):
        return _earlier(parsed(history), f"{where}: column '{columns['history']}'") + asked
    return asked
