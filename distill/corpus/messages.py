"""Messages, tools and texts as the rows of data sets have them, brought to one form and checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from distill.corpus.conversations import LOSS_KEYS
from distill.errors import UserError, did_you_mean

ROLES = ("system", "developer", "user", "assistant", "tool", "function")

_SPEAKERS = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
"""Other names of the roles, as ShareGPT's data and its descendants have them."""
_CALLS = ("function_call", "tool_call")
"""Speakers whose text is a call as JSON."""
_ARGUMENTS = ("arguments", "parameters")
"""Keys of a call that hold its arguments."""
_NO_ARGUMENTS = ("id", "type", "name", "index", "call_id", "tool_call_id", "description", "function")
"""Keys of a call that are there beside its arguments."""
_RESERVED = (
    "messages",
    "conversations",
    "tools",
    "documents",
    "chat_template",
    "add_generation_prompt",
    "return_assistant_tokens_mask",
    "continue_final_message",
)
"""Variables of a template that a row cannot set with `chat_template_kwargs`."""


def text_of(value: Any, where: str, column: str) -> str:
    """Return a column's text, "" if it is blank. Raises UserError for anything else."""
    if not isinstance(value, str):
        found = "null" if value is None else type(value).__name__
        raise UserError(f"{where}: column '{column}' is {found}, not text: mend or remove the row")
    return value if value.strip() else ""


def parsed(value: Any) -> Any:
    """Return a list that is kept as JSON text; any other value as it is."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            found = json.loads(value)
        except (ValueError, RecursionError):
            return value
        if isinstance(found, list) and all(isinstance(entry, Mapping) for entry in found):
            return found
    return value


def without_nulls(value: Any) -> Any:
    """Return a value without keys that are null, at every depth: tables fill them in, and a template may ask for keys.

    Nulls in lists stay, since a list's places count.
    """
    if isinstance(value, Mapping):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def messages_of(value: Any, where: str) -> list[dict[str, Any]]:
    """Return messages of `role` and `content`. Raises UserError for anything that is not a conversation."""
    if not isinstance(value, list):
        raise UserError(f"{where}: messages are a {type(value).__name__}, not a list of objects with role and content")
    return [_message(message, f"{where}: message {position}") for position, message in enumerate(value, start=1)]


def tools_of(value: Any, where: str) -> list[dict[str, Any]] | None:
    """Return the schemas of a row's tools, a list or JSON text; None if it has none."""
    if isinstance(value, str):
        value = _json(value, f"{where}: tools") if value.strip() else None
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise UserError(f"{where}: tools are no list of objects (schemas of functions)")
    tools: list[dict[str, Any]] = without_nulls(value)
    for number, tool in enumerate(tools, start=1):
        function = tool.get("function", tool)
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
            raise UserError(f"{where}: tool {number} has no name")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]


def options_of(value: Any, where: str) -> dict[str, Any]:
    """Return the variables that a row gives to the chat template, an object or JSON text."""
    if isinstance(value, str):
        value = _json(value, f"{where}: chat_template_kwargs") if value.strip() else None
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise UserError(f"{where}: chat_template_kwargs are a {type(value).__name__}, not an object")
    if taken := [key for key in value if key in _RESERVED]:
        raise UserError(f"{where}: chat_template_kwargs: '{taken[0]}' cannot be set by a row: remove it")
    options: dict[str, Any] = without_nulls(value)
    return options


def _message(message: Any, place: str) -> dict[str, Any]:
    role = (message.get("role") or message.get("from")) if isinstance(message, Mapping) else None
    if not isinstance(role, str):
        keys = ", ".join(map(str, message)) if isinstance(message, Mapping) else type(message).__name__
        raise UserError(f"{place}: needs a role and a content, both text (found: {keys})")
    found = {key: without_nulls(entry) for key, entry in message.items() if entry is not None}
    if "from" in found and "role" not in found:
        found = {"role": role, **{key: entry for key, entry in found.items() if key != "from"}}
        if "value" in found and "content" not in found:
            found["content"] = found.pop("value")
    if role in _CALLS:
        calls = _json(str(found.get("content", "")), f"{place}: {role}")
        found |= {"role": "assistant", "content": "", "tool_calls": calls if isinstance(calls, list) else [calls]}
    if (call := found.pop("function_call", None)) and not found.get("tool_calls"):  # one call, as OpenAI first had it
        found["tool_calls"] = [_json(call, f"{place}: function_call") if isinstance(call, str) else call]
    found["role"] = _SPEAKERS.get(found["role"], found["role"])
    if found["role"] not in ROLES:
        raise UserError(f"{place}: unknown role '{role}'{did_you_mean(role, ROLES)}")
    if isinstance(found.get("content"), list):
        found["content"] = _joined(found["content"], place)
    if "tool_calls" in found:
        found["tool_calls"] = _calls(found["tool_calls"], place)
        if not found["tool_calls"]:
            del found["tool_calls"]
    if not isinstance(found.get("content"), str) and not ("content" not in found and found.get("tool_calls")):
        kind = "null" if found.get("content") is None else type(found["content"]).__name__
        raise UserError(f"{place}: content is {kind}, not text")
    _check_loss(found, place)
    return found


def _check_loss(message: Mapping[str, Any], place: str) -> None:
    for key in LOSS_KEYS:
        allowed = (0, 1) if key == "weight" else (False, True)
        if key in message and message[key] not in allowed:
            raise UserError(f"{place}: {key} is {message[key]!r}, not {allowed[0]} or {allowed[1]}")


def _joined(parts: list[Any], place: str) -> str:
    """Return the text of a content's parts. Raises UserError for an image or another part that is no text."""
    texts = []
    for part in parts:
        text = part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else part
        if not isinstance(text, str):
            kind = part.get("type", "unknown") if isinstance(part, Mapping) else type(part).__name__
            raise UserError(f"{place}: content has a part of type '{kind}', not text: remove the row")
        texts.append(text)
    return "".join(texts)


def _calls(value: Any, place: str) -> list[dict[str, Any]]:
    """Return tool calls with their arguments as objects. Arguments as JSON text are decoded once."""
    calls = _json(value, f"{place}: tool_calls") if isinstance(value, str) else value
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise UserError(f"{place}: tool_calls are no list of objects with a name and arguments")
    return [_call(call, f"{place}: tool call {number}") for number, call in enumerate(calls, start=1)]


def _call(call: Mapping[str, Any], place: str) -> dict[str, Any]:
    function = call.get("function", call)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise UserError(f"{place}: has no name")
    key = next((key for key in _ARGUMENTS if key in function), None)
    if key is None and (others := [str(other) for other in function if other not in _NO_ARGUMENTS]):
        raise UserError(f"{place}: has no arguments (found: {', '.join(others)}): name them arguments")
    arguments = {} if key is None else function[key]
    if isinstance(arguments, str):
        arguments = _json(arguments, f"{place}: arguments") if arguments.strip() else {}
    if not isinstance(arguments, Mapping):
        raise UserError(f"{place}: arguments are a {type(arguments).__name__}, not an object")
    function = {**{name: value for name, value in function.items() if name != key}, "arguments": arguments}
    return {**call, "function": function} if "function" in call else {"type": "function", "function": function}


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place} is no JSON ({error}): mend or remove the row") from error
