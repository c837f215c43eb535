"""A conversation: messages, the tools that they may call, and the variables that a row gives to the chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]

THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Keys of a message that hold its thought. The renderer offers each under the names that templates ask for."""
LOSS_KEYS = ("weight", "train", "training", "loss")
"""Keys of a message that say if it is learned, as OpenAI, axolotl and ms-swift name them."""
THOUGHT_END = "</think>"
"""The mark that ends a thought at the beginning of a content."""


@dataclass(frozen=True)
class Conversation:
    """One document of messages."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    """Schemas of the functions that may be called."""
    options: dict[str, Any] = field(default_factory=dict)
    """Variables of the chat template, such as `enable_thinking`."""

    @classmethod
    def parse(cls, document: str) -> Conversation:
        """Read what `document` wrote."""
        found = json.loads(document)
        if isinstance(found, list):
            return cls(found)
        return cls(found["messages"], found.get("tools"), found.get("chat_template_kwargs", {}))

    def document(self) -> Any:
        """Return the conversation as JSON values: the bare list of messages if there is nothing else."""
        if self.tools is None and not self.options:
            return self.messages
        found: dict[str, Any] = {"messages": self.messages}
        if self.tools is not None:
            found["tools"] = self.tools
        if self.options:
            found["chat_template_kwargs"] = self.options
        return found

    def without_thoughts(self) -> Conversation:
        """Return the conversation without the assistant's thoughts, in keys of their own or before `</think>`."""
        return Conversation([_without_thought(message) for message in self.messages], self.tools, self.options)


def is_learned(message: Message) -> bool:
    """Return False for a message that its row takes the loss from (`weight: 0`, `train: false` and the like)."""
    return all(message.get(key, True) for key in LOSS_KEYS)


def said(message: Message) -> Message:
    """Return the message as a template gets it, without the keys that only say if it is learned."""
    return {key: value for key, value in message.items() if key not in LOSS_KEYS}


def thought_of(message: Message) -> tuple[str, str] | None:
    """Return key and text of a message's thought, or None."""
    for key in THOUGHT_KEYS:
        if isinstance(message.get(key), str) and message[key].strip():
            return key, message[key]
    return None


def function_of(call: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a tool call that has name and arguments: its `function`, or the call itself."""
    function = call.get("function")
    return function if isinstance(function, Mapping) else call


def _without_thought(message: Message) -> Message:
    if message["role"] != "assistant":
        return message
    kept = {key: value for key, value in message.items() if key not in THOUGHT_KEYS}
    content = kept.get("content")
    if isinstance(content, str) and THOUGHT_END in content:
        kept["content"] = content.rsplit(THOUGHT_END, 1)[1].lstrip("\n")
    return kept
