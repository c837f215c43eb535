"""The answers, and only they, are found in what any chat template renders; what it leaves out is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from distill.corpus.conversations import Conversation
from distill.corpus.templates import DEFAULTS, ChatTemplate, Learning, Rendered, tokens_in_spans
from distill.errors import UserError
from distill.models.chat_templates import render, untagged

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "The fox."},
    {"role": "user", "content": "The fox."},
    {"role": "assistant", "content": "Yes, naïve fox!"},
]
HEADER = "<|im_start|>{{ m['role'] }}\n"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATML = "{% for m in messages %}" + HEADER + "{{ m['content'] }}<|im_end|>\n{% endfor %}" + PROMPT
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
# Thoughts behind the last question alone; a content may hold its thought; calls and results; blanks at the edges go.
REWRITING = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% set ns = namespace(last=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% set content = m.content or '' %}{% set thought = m.reasoning_content or '' %}"
    "{% if '</think>' in content %}{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    + HEADER.replace("{{ m['role'] }}", "{{ 'user' if m.role == 'tool' else m.role }}")
    + "{% if m.role == 'assistant' and loop.index0 > ns.last and (loop.last or thought) %}"
    "<think>\n{{ thought }}\n</think>\n\n{% endif %}"
    "{% if m.role == 'tool' %}<tool_response>{{ content }}</tool_response>{% else %}{{ content }}{% endif %}"
    "{% for c in m.tool_calls or [] %}<tool_call>"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}</tool_call>{% endfor %}'
    "<|im_end|>\n{% endfor %}" + PROMPT
)
# R1's way: the prompt opens a thought that no rendering has.
OPENING = REWRITING.replace(PROMPT, PROMPT.replace("assistant\n", "assistant\n<think>\n")).replace(
    "{% if m.role == 'assistant' and loop.index0 > ns.last and (loop.last or thought) %}",
    "{% if m.role == 'assistant' and loop.index0 > ns.last and thought %}",
)
# gpt-oss's way: the last turn ends otherwise than the earlier ones.
CHANNELS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|begin|>assistant<|pad|>{{ m.content }}"
    "{% if loop.last %}<|end|>{% else %}<|im_end|>{% endif %}{% else %}<|begin|>{{ m.role }}<|pad|>{{ m.content }}"
    "<|im_end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|begin|>assistant{% endif %}"
)
# Phi-3's way: something more behind the last turn, and no generation prompt but the question's own end.
ENDING = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content | trim }}<|im_end|>\n{% else %}"
    "{{ m.role }}: {{ m.content }}<|im_end|>\n<|im_start|>\n{% endif %}{% endfor %}"
    "{% if not add_generation_prompt %}<|end|>{% endif %}"
)
# The system's words inside the first question, contents as parts alone.
PARTS = (
    "{% for m in messages %}{% if m.role != 'system' %}[{{ m.role }}]{% if loop.index0 == 1 and messages[0].role == "
    "'system' %}{{ messages[0].content[0].text }}; {% endif %}{% for part in m.content %}{{ part.text }}{% endfor %}"
    "<|im_end|>{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
# DeepSeek-V3's way: arguments are joined to text, so they must be text.
TEXT_ARGUMENTS = CHATML.replace(
    "{{ m['content'] }}",
    "{{ m['content'] }}{% for c in m.tool_calls or [] %}{{ c.function.name + ' ' + c.function.arguments }}{% endfor %}",
)
# Mistral's way: no generation prompt, and a call that begins with a mark.
BARE = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]{% elif m.tool_calls %}[CALLS][{"
    '"name": "{{ m.tool_calls[0].function.name }}", "arguments": {{ m.tool_calls[0].function.arguments | tojson }}}]'
    "<|end|>{% elif m.role == 'tool' %}[RESULT]{{ m.content }}[/RESULT]{% else %}{{ m.content }}<|end|>{% endif %}"
    "{% endfor %}"
)

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": 'Graz "W"', "days": 3, "now": True}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Tells of rain"}}]
WRITTEN = '<tool_call>{"name": "weather", "arguments": {"city": "Graz \\"W\\"", "days": 3, "now": true}}</tool_call>'


def said(*contents: Any) -> list[dict[str, Any]]:
    """Question, answer, question, answer …; an answer may be a whole message."""
    messages = []
    for index, content in enumerate(contents):
        message = content if isinstance(content, dict) else {"content": content}
        messages.append({"role": "user" if index % 2 == 0 else "assistant", **message})
    return messages


def thinking(thought: str, content: str) -> dict[str, Any]:
    return {"content": content, "reasoning_content": thought}


def rendered(
    tokenizer: Any, messages: list[dict[str, Any]] = CHAT, learning: Learning = DEFAULTS, **more: Any
) -> Rendered:
    return ChatTemplate.of(tokenizer, learning).render(Conversation(messages, **more), "here")


def answers(tokenizer: Any, messages: list[dict[str, Any]] = CHAT, **more: Any) -> list[str]:
    found = rendered(tokenizer, messages, **more)
    return [found.text[start:end] for start, end in found.spans]


def test_the_answers_and_their_end(make: Callable[..., Any]) -> None:
    assert answers(make()) == ["The fox.<|im_end|>", "Yes, naïve fox!<|im_end|>"]


@pytest.mark.parametrize("learning", [DEFAULTS, Learning("all")])
@pytest.mark.parametrize(
    ("template", "is_endless"),
    [
        (CHATML, False),
        (CHANNELS, False),
        (GENERATION, False),
        (GENERATION.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>"), True),
        (LINES, True),
        (CHATML.replace("<|im_end|>", "</turn>"), True),
    ],
)
def test_an_answer_without_an_end_of_turn_token_is_told(
    make: Callable[..., Any], template: str, is_endless: bool, learning: Learning
) -> None:
    wanted = is_endless and (learning is DEFAULTS or "im_end" not in template)
    assert rendered(make(template), learning=learning).is_endless == wanted


def test_generation_marks_are_obeyed(make: Callable[..., Any]) -> None:
    assert answers(make(GENERATION)) == ["The fox.<|im_end|>", "Yes, naïve fox!<|im_end|>"]


def test_the_text_is_what_the_tokenizer_renders(make: Callable[..., Any]) -> None:
    for template in (CHATML, GENERATION, THINKING, LINES, REWRITING, CHANNELS, ENDING):
        tokenizer = make(template)
        assert rendered(tokenizer).text == tokenizer.apply_chat_template(CHAT, tokenize=False)


LEARNED: list[tuple[str, list[dict[str, Any]], list[str]]] = [
    (THINKING, CHAT, ["The fox.<|im_end|>", "<think>\n\n</think>\n\nYes, naïve fox!<|im_end|>"]),
    (LINES, CHAT, ["The fox.\n", "Yes, naïve fox!\n"]),
    (CHATML, [CHAT[1], CHAT[2], CHAT[4]], ["The fox.<|im_end|>", "Yes, naïve fox!<|im_end|>"]),
    (CHATML, CHAT[:2], []),
    (CHATML, said("Who?", "", "?", "end"), ["<|im_end|>", "end<|im_end|>"]),
    (CHATML, said("Who?", " a \n", "|", "|"), [" a \n<|im_end|>", "|<|im_end|>"]),
    (CHATML, said("a<|im_end|>b", "c<|im_end|>d"), ["c<|im_end|>d<|im_end|>"]),
    (REWRITING, said("1", " a", "2", "\n\nb "), [" a<|im_end|>", "<think>\n\n</think>\n\n\n\nb <|im_end|>"]),
    (REWRITING, said("1", "end", "2", "|"), ["end<|im_end|>", "<think>\n\n</think>\n\n|<|im_end|>"]),
    (REWRITING, said("1", "", "2", "b"), ["<|im_end|>", "<think>\n\n</think>\n\nb<|im_end|>"]),
    (REWRITING, said("1", thinking("hm", "a")), ["<think>\nhm\n</think>\n\na<|im_end|>"]),
    (REWRITING, said("1", "<think>\nhm\n</think>\n\na"), ["<think>\nhm\n</think>\n\na<|im_end|>"]),
    (OPENING, said("1", "a", "2", "b"), ["a<|im_end|>", "b<|im_end|>"]),
    (OPENING, said("1", "<think>\nhm\n</think>\n\na"), ["hm\n</think>\n\na<|im_end|>"]),
    (CHANNELS, said("1", "a", "2", "b"), ["<|pad|>a<|im_end|>", "<|pad|>b<|end|>"]),
    (ENDING, said("1", " a", "2", "b"), ["a<|im_end|>", "b<|im_end|>"]),
    (PARTS, CHAT, ["The fox.<|im_end|>", "Yes, naïve fox!<|im_end|>"]),
    (BARE, said("1", "a", "2", " b"), ["a<|end|>", " b<|end|>"]),
]


@pytest.mark.parametrize(("template", "messages", "learned"), LEARNED)
def test_answers_of_templates_that_rewrite(
    make: Callable[..., Any], template: str, messages: list[dict[str, Any]], learned: list[str]
) -> None:
    tokenizer = make(template)
    assert answers(tokenizer, messages) == learned


def test_thoughts_that_the_template_takes_out_are_counted(make: Callable[..., Any]) -> None:
    """Qwen3's prompt opens no thought, so an earlier answer without its own is learned; after R1's it is context."""
    for messages in (
        said("1", thinking("hm", "a"), "2", thinking("so", "b")),
        said("1", "<think>\nhm\n</think>\n\na", "2", "<think>\nso\n</think>\n\nb"),
    ):
        found = rendered(make(REWRITING), messages)
        assert "hm" not in found.text and found.thoughts_left_out == 1
        assert answers(make(REWRITING), messages) == ["a<|im_end|>", "<think>\nso\n</think>\n\nb<|im_end|>"]
        assert answers(make(OPENING), messages) == ["so\n</think>\n\nb<|im_end|>"]


def test_thoughts_can_be_left_out_knowingly(make: Callable[..., Any]) -> None:
    messages = said("1", thinking("hm", "a"), "2", "<think>so</think>\nb")
    dropped = Learning(keep_thoughts=False)
    assert answers(make(), messages, learning=dropped) == ["a<|im_end|>", "b<|im_end|>"]


@pytest.mark.parametrize("arguments", [{"city": "Graz", "days": 3}, {}, {"on": True}, {"list": [{"a": "\n é"}]}])
def test_calls_are_learned(make: Callable[..., Any], arguments: dict[str, Any]) -> None:
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    messages = [*said("1", {"content": "", "tool_calls": [call, call]}), {"role": "tool", "content": "7"}]
    messages += [{"role": "assistant", "content": "Seven."}]
    found = answers(make(REWRITING), messages, tools=TOOLS)
    assert found[0].count('{"name": "weather", "arguments": {') == 2 and found[0].endswith("</tool_call><|im_end|>")
    assert found[1].endswith("Seven.<|im_end|>") and "7" not in "".join(found)


def test_a_call_without_content_and_its_result(make: Callable[..., Any]) -> None:
    messages = [*said("1", {"tool_calls": [CALL]}), {"role": "tool", "content": "7"}, *said("2", "Dry.")[1:]]
    learned = [WRITTEN + "<|im_end|>", "<think>\n\n</think>\n\nDry.<|im_end|>"]
    assert answers(make(REWRITING), messages, tools=TOOLS) == learned
    bare = answers(make(BARE), messages)
    assert (
        bare[0].startswith('[CALLS][{"name": "weather"') and bare[0].endswith("}]<|end|>") and bare[1] == "Dry.<|end|>"
    )


def test_a_template_of_its_own_for_tools(make: Callable[..., Any]) -> None:
    tokenizer = make({"default": CHATML, "tool_use": "{{ tools[0].function | tojson }}" + CHATML})
    assert rendered(tokenizer, CHAT, tools=TOOLS).text.startswith('{"name": "weather"')
    assert rendered(tokenizer).text.startswith("<|im_start|>")


def test_arguments_as_text_where_a_template_needs_it(make: Callable[..., Any]) -> None:
    (found,) = answers(make(TEXT_ARGUMENTS), said("1", {"content": "", "tool_calls": [CALL]}))
    assert found == 'weather {"city": "Graz \\"W\\"", "days": 3, "now": true}<|im_end|>'


def test_variables_of_a_row_reach_the_template(make: Callable[..., Any]) -> None:
    tokenizer = make("{{ mood }}" + CHATML)
    assert rendered(tokenizer, CHAT, options={"mood": "calm"}).text.startswith("calm<|im_start|>")


def test_the_day_is_the_one_that_is_given(make: Callable[..., Any]) -> None:
    tokenizer = make("{{ strftime_now('%d %b %Y') }}" + CHATML)
    for day, text in (("2024-07-26", "26 Jul 2024"), ("2025-01-02", "02 Jan 2025")):
        assert rendered(tokenizer, CHAT, Learning(date=day)).text.startswith(text)


def test_whose_turns_are_learned(make: Callable[..., Any]) -> None:
    tokenizer = make()
    assert answers(tokenizer, learning=Learning("last")) == ["Yes, naïve fox!<|im_end|>"]
    found = rendered(tokenizer, learning=Learning("all"))
    assert found.spans == [(0, len(found.text))]


@pytest.mark.parametrize("template", [CHATML, GENERATION])
@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"weight": 0.0}, {"loss": False}])
def test_a_message_without_weight_is_context(make: Callable[..., Any], template: str, mark: dict[str, Any]) -> None:
    tokenizer = make(template)
    messages = [*CHAT[:2], CHAT[2] | mark, CHAT[3], CHAT[4] | {"weight": 1, "train": True}]
    assert answers(tokenizer, messages) == ["Yes, naïve fox!<|im_end|>"]
    assert rendered(tokenizer, messages).text == rendered(tokenizer).text
    everything = "".join(answers(tokenizer, messages, learning=Learning("all")))
    assert everything.count("The fox.") == 1 and "Who?" in everything
    assert everything.count("<|im_end|>") == rendered(tokenizer).text.count("<|im_end|>") - 1
    begins = [messages[2], *CHAT[3:]]
    assert answers(tokenizer, begins) == ["Yes, naïve fox!<|im_end|>"], "an unlearned greeting needs no question"


def test_a_prompt_that_names_another_role_is_no_prompt_of_the_answer(make: Callable[..., Any]) -> None:
    other = CHATML.replace(PROMPT, PROMPT.replace("assistant", "model"))
    with pytest.raises(UserError, match="prompt has 'model' where what it renders has 'assistant'"):
        rendered(make(other))


REFUSED: list[tuple[str | None, list[dict[str, Any]], dict[str, Any], str]] = [
    (THINKING.replace("{{ m['content'] }}", "{{ m['content'] if loop.last else 'cut' }}"), CHAT, {},
     r"message 1 \(system\): the chat template does not write its content"),
    (CHATML.replace("{{ m['content'] }}", "{{ m['content'] | upper }}"), CHAT, {}, "does not write the messages' text"),
    (CHATML.replace("{{ m['content'] }}", "{{ m['content'] | e }}"), said("a & b"), {}, "not write the messages' text"),
    (CHATML, said("1", thinking("hm", "a")), {}, r"message 2: .* does not write its thought .corpus.thoughts: drop"),
    (CHATML, said("1", {"content": "", "tool_calls": [CALL]}), {}, r"message 2 .assistant.: .* write its tool call"),
    (CHATML.replace("{{ m['content'] }}", "{{ m.content }}{% if m.tool_calls %}weather{% endif %}"),
     said("1", {"content": "", "tool_calls": [CALL]}), {}, "does not write its tool call"),
    (CHATML.replace("{{ m['content'] }}", "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}"
     "{% endfor %}"), said("1", {"content": "", "tool_calls": [CALL]}), {}, "does not write its tool call's arguments"),
    (CHATML, CHAT, {"tools": TOOLS}, "does not write the row's tools"),
    (CHATML.replace("{% for m", "{{ tools[0].function.name if tools }}{% for m", 1), CHAT, {"tools": TOOLS},
     "does not write the row's tools"),
    ("{{ raise_exception('roles must alternate') }}", CHAT, {}, "refuses the conversation: roles must alternate"),
    ("{% for m in messages %}\n{{ m['role'] }", CHAT, {},
     "the chat template has a mistake, line 2: .*: mend it, or name"),
    (CHATML.replace("m['content']", "m.content | shout"), CHAT, {}, "mistake, line 2: No filter named 'shout'"),
    (CHATML.replace("m['content']", "shout(m.content)"), CHAT, {},
     r"mistake, line 2: it calls shout\(\), which nobody"),
    (GENERATION.replace("m['content']", "shout(m.content)"), CHAT, {}, r"mistake, line 2: it calls shout\(\)"),
    (CHATML.replace("m['content']", "m.content + mood.name"), CHAT, {},
     "refuses the conversation: 'mood' is undefined"),
    (THINKING, CHAT[2:], {}, "begins with the assistant"),
    ("{{ messages | length }}{{ messages[-1].content }}", CHAT, {}, "does not write its content"),
    (CHATML.replace("{{ m['content'] }}", "{{ m.content if m.content is not string else m.content | upper }}"), CHAT,
     {}, "does not write the messages' text"),
    (PARTS, said("1", thinking("hm", "a")), {}, "message 2: .* does not write its thought"),
    (None, CHAT, {}, "no chat template"),
]  # fmt: skip


@pytest.mark.parametrize(("template", "messages", "more", "reason"), REFUSED)
def test_what_a_template_leaves_out_is_refused(
    make: Callable[..., Any], template: str | None, messages: Any, more: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UserError, match=reason):
        answers(make(template), messages, **more)


def test_a_template_without_tags_renders_the_same(make: Callable[..., Any]) -> None:
    tagged = GENERATION.replace("{% generation %}", "{%- generation -%}")
    plain = untagged(tagged)
    assert "generation %}" not in plain.replace("add_generation_prompt %}", "")
    assert "{%- if true -%}" in plain and "{% endif %}" in plain
    assert render(plain, CHAT, {}) == render(tagged, CHAT, {})
    assert untagged({"default": tagged, "other": CHATML}) == {"default": plain, "other": CHATML}
    assert untagged(None) is None


def test_many_conversations_at_once_are_those_rendered_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that the template refuses keeps its own reason."""
    source = "{% if messages[0].content == 'no' %}{{ raise_exception('not this') }}{% endif %}" + CHATML
    said = [*(f"{number}?" for number in range(70)), "no"]
    rows = [
        Conversation([{"role": "user", "content": text}, {"role": "assistant", "content": "Yes."}]) for text in said
    ]
    alone, together = (ChatTemplate(source, {}, ("<|im_end|>",)) for _ in range(2))
    expected = [alone.render(row, "row") for row in rows[:-1]]
    together.render_ahead(rows)
    one_by_one = ChatTemplate._render
    asked: list[bool] = []

    def counted(self: ChatTemplate, conversation: Conversation, **how: bool) -> Any:
        asked.append("marked" in how)
        return one_by_one(self, conversation, **how)

    monkeypatch.setattr(ChatTemplate, "_render", counted)
    assert [together.render(row, "row") for row in rows[:-1]] == expected
    assert not any(asked)  # only skeletons
    with pytest.raises(UserError, match="not this"):
        together.render(rows[-1], "row")


def test_tokens_that_touch_a_span() -> None:
    offsets = np.array([(0, 2), (2, 4), (4, 4), (4, 6), (6, 9)])
    assert tokens_in_spans(offsets, [(3, 5), (8, 9)]).tolist() == [False, True, True, True, True]
    assert tokens_in_spans(offsets, []).tolist() == [False] * 5
    assert tokens_in_spans(offsets[:0], [(0, 1)]).tolist() == []
