"""Chat templates render as transformers renders them, and stop at limits of time, memory and size."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from distill.models import chat_templates
from distill.models.chat_templates import TemplateError, render, render_with

CHAT = [
    {"role": "system", "content": "Be brief.\n"},
    {"role": "user", "content": "What \ud800 costs it? \u2028 naïve 😀"},
    {"role": "assistant", "content": "4 €", "tool_calls": [{"name": "sum", "arguments": {"b": 1.5, "a": [2, None]}}]},
]
MARKED = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}:{% generation %}{{ m.content | trim }}{% endgeneration %}\n"
    "{%- if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("marked", [False, True])
def test_text_and_spans_are_those_of_transformers(prompt: bool, marked: bool) -> None:
    options: Any = {"return_assistant_tokens_mask": marked, "add_generation_prompt": prompt, "bos_token": "<s>"}
    texts, spans = render_jinja_template([CHAT], chat_template=MARKED, **options)
    found = render(MARKED, CHAT, {"bos_token": "<s>"}, add_generation_prompt=prompt, marked=marked)
    assert found == (texts[0], [tuple(span) for span in spans[0]] if marked else [])
    assert len(found[1]) == 3 * marked


def test_a_tokenizers_own_template(world: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(Path(world.folder) / "teacher")
    expected = tokenizer.apply_chat_template(CHAT[:2], tokenize=False, add_generation_prompt=True)
    assert render_with(tokenizer, CHAT[:2], add_generation_prompt=True) == expected
    tokenizer.chat_template = {"tool_use": "x"}
    with pytest.raises(TemplateError):
        render_with(tokenizer, CHAT[:2])


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ raise_exception('only users here') }}", "only users here"),
        ("{% for %}", "Expected"),
        ("{{ messages[9].role }}", "no element"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe|undefined"),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "without end"),
        ("{{ 'x' * 10 ** 11 }}", "memory"),
        ("{% set n = namespace(x='x' * 999) %}{% for i in range(40) %}{% set n.x = n.x * 2 %}{% endfor %}", "memory"),
        ("{{ '%1000000000d' % 3 }}", "memory"),
        ("{{ 'x' * 70000000 }}", "text of more than"),
        ("x" * (2**20 + 1), "more than 1 Mi characters"),
    ],
)
def test_what_a_template_may_not_is_told(template: str, why: str) -> None:
    with pytest.raises(TemplateError, match=why):
        render(template, CHAT, {})
    assert render("{{ messages[2].content }}", CHAT, {})[0] == "4 €", "and the next one is rendered"


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for i in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 9 ** (9 ** 9) }}",  # is computed while the template is compiled, and no signal is looked at
        "{% set all = namespace(x=messages) %}{% for i in range(60) %}{% set all.x = [all.x, all.x] %}{% endfor %}"
        "{{ all.x | string | length }}",
    ],
)
def test_a_template_without_end_is_stopped(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_templates, "SECONDS", 1)
    began = time.monotonic()
    with pytest.raises(TemplateError, match=r"more than 1 seconds|memory"):
        render(template, CHAT, {})
    assert time.monotonic() - began < 60
    monkeypatch.undo()
    assert render("{{ messages[2].content }}", CHAT, {})[0] == "4 €"


def test_a_pause_between_two_conversations_may_be_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_templates, "SECONDS", 1)
    chat_templates._own_processes()[0].end()
    assert render("one", CHAT, {})[0] == "one"
    started = chat_templates._own_processes()[0]._process
    time.sleep(2.5)
    assert render("two", CHAT, {})[0] == "two" and chat_templates._own_processes()[0]._process is started
    assert started is not None
    started.kill()
    started.wait()
    assert render("three", CHAT, {})[0] == "three", "and one that was killed is started again"


def test_after_an_interruption_no_answer_is_another_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the middle of a template: its text must not be the next conversation's."""
    render("", CHAT, {})

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(KeyboardInterrupt):
            render("{% for i in range(99999) %}{% for i in range(99999) %}{% endfor %}{% endfor %}late", CHAT, {})
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)  # one that came later would end the test process
        signal.signal(signal.SIGALRM, before)
    assert render("next", CHAT, {})[0] == "next"


def test_a_forked_process_has_a_renderer_of_its_own() -> None:
    render("", CHAT, {})
    ours = chat_templates._own_processes()[0]
    child = os.fork()
    if child == 0:
        os._exit(
            0 if render("theirs", CHAT, {})[0] == "theirs" and chat_templates._own_processes()[0] is not ours else 1
        )
    assert os.waitpid(child, 0)[1] == 0
    assert render("ours", CHAT, {})[0] == "ours" and chat_templates._own_processes()[0] is ours


def test_nothing_is_left_when_its_parent_is_killed() -> None:
    code = (
        "import os\nfrom distill.models import chat_templates as c\nc.render('', [], {})\n"
        "print(c._own_processes()[0]._process.pid, flush=True)\nos.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    deadline = time.monotonic() + 60
    while Path(f"/proc/{done.stdout.strip()}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{done.stdout.strip()}").exists()
