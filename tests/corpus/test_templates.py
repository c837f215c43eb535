"""The answers, and only they, are found in what any chat template renders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from distill.corpus.templates import ChatTemplate, tokens_in_spans
from distill.errors import UserError

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "The fox."},
    {"role": "user", "content": "The fox."},
    {"role": "assistant", "content": "Yes, naïve fox!"},
]
HEADER = "<|im_start|>{{ m['role'] }}\n"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
GENERATION = (
    "{% for m in messages %}" + HEADER + "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>"
    "{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}" + PROMPT
)
# Qwen3's way: an empty block of thoughts before the last answer, taken away once the conversation goes on.
THINKING = (
    "{% for m in messages %}" + HEADER + "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n"
    "{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}" + PROMPT
)
# Nothing but a line end says that a turn is over: it has to be learned.
LINES = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def answers(tokenizer: Any, messages: list[dict[str, str]] = CHAT) -> list[str]:
    text, spans = ChatTemplate.of(tokenizer).render(messages, "here")
    return [text[start:end] for start, end in spans]


def test_rendered_prefixes_give_the_answers_and_their_end(make: Callable[..., Any]) -> None:
    assert answers(make()) == ["The fox.<|im_end|>", "Yes, naïve fox!<|im_end|>"]


def test_generation_marks_are_obeyed(make: Callable[..., Any]) -> None:
    assert answers(make(GENERATION)) == ["The fox.<|im_end|>", "Yes, naïve fox!<|im_end|>"]


def test_both_ways_agree_with_the_text_that_the_tokenizer_renders(make: Callable[..., Any]) -> None:
    for tokenizer in (make(), make(GENERATION), make(THINKING), make(LINES)):
        text, _ = ChatTemplate.of(tokenizer).render(CHAT, "here")
        assert text == tokenizer.apply_chat_template(CHAT, tokenize=False)


def test_thoughts_before_the_last_answer_only(make: Callable[..., Any]) -> None:
    assert answers(make(THINKING)) == ["The fox.<|im_end|>", "<think>\n\n</think>\n\nYes, naïve fox!<|im_end|>"]


def test_a_line_end_that_ends_the_turn_is_learned(make: Callable[..., Any]) -> None:
    assert answers(make(LINES)) == ["The fox.\n", "Yes, naïve fox!\n"]


def test_two_answers_in_a_row(make: Callable[..., Any]) -> None:
    chat = [CHAT[1], CHAT[2], CHAT[4]]
    assert answers(make(), chat) == ["The fox.<|im_end|>", "Yes, naïve fox!<|im_end|>"]


def test_no_answer_no_span(make: Callable[..., Any]) -> None:
    assert answers(make(), CHAT[:2]) == []


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        ("{{ messages | length }}" + LINES, CHAT, "message 3.*another way.*generation"),
        (THINKING.replace("{{ m['content'] }}", "{{ m['content'] if loop.last else 'cut' }}"), CHAT[1:], "another way"),
        ("{{ raise_exception('roles must alternate') }}", CHAT, "refuses the conversation: roles must alternate"),
        ("{% for m in messages %}{{ m['role'] }", CHAT, "refuses the conversation"),
        (THINKING, CHAT[2:], "begins with the assistant"),
        (None, CHAT, "no chat template"),
    ],
)
def test_what_a_template_must_not_do(
    make: Callable[..., Any], template: str | None, messages: Any, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        answers(make(template), messages)


def test_tokens_that_touch_a_span() -> None:
    offsets = [(0, 2), (2, 4), (4, 4), (4, 6), (6, 9)]
    assert tokens_in_spans(offsets, [(3, 5), (8, 9)]).tolist() == [False, True, True, True, True]
    assert tokens_in_spans(offsets, []).tolist() == [False] * 5
    assert tokens_in_spans([], [(0, 1)]).tolist() == []
