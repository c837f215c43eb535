"""The places in a rendered conversation at which it may be split, if it is longer than a sample."""

from __future__ import annotations

from distill.corpus.answers import Answers, Unfit
from distill.corpus.conversations import Conversation
from distill.models.chat_templates import Span


def find_turns(
    answers: Answers, conversation: Conversation, spans: list[Span], text: str
) -> tuple[list[int], list[int]]:
    """Return the characters at which a turn begins after an answer, and those behind the system's and the first
    user's message.

    A message ends with its end-of-turn token and the blanks behind. One that is not written is passed over.
    """
    turns: list[int] = []
    openings: list[int] = []
    messages = conversation.messages
    first = next((index for index, message in enumerate(messages) if message["role"] == "user"), -1)
    for index, message in enumerate(messages):
        is_answer = message["role"] == "assistant" and index + 1 < len(messages)
        if not (is_answer and messages[index + 1]["role"] == "user") and index > first:
            continue
        try:
            end = answers.end(index, spans)
        except Unfit:
            continue
        end += len(text) - end - len(text[end:].lstrip())
        (openings if index <= first else turns).append(end)
    return turns, openings
