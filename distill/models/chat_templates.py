"""Chat templates rendered in a process of their own, under limits of time, memory and size."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import re
import select
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from distill.models import template_process

SECONDS = 10
"""Longest time that a template may take for one conversation. Real templates take milliseconds."""
START_SECONDS = 300
_TOGETHER = 32
"""Conversations in a request."""
_MOST_PROCESSES = 4
"""Renderers at most: the process that reads what they write does not keep up with more."""
LONGEST_TEMPLATE = 2**20
"""Characters of a template. Real templates have up to 20,000."""

GENERATION = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")
"""Tags with which a template marks what is generated. Only programs that train models know them."""

Span = tuple[int, int]


class TemplateError(ValueError):
    """Reason why a template gives no text for a conversation."""


class BrokenTemplateError(TemplateError):
    """Fault of the template itself, which other conversations would meet again."""


class TemplateLimitError(BrokenTemplateError):
    """Limit that a template exceeds, and would exceed again for other conversations."""


def render_with(tokenizer: Any, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool = False) -> str:
    """Return the conversation as the tokenizer's default chat template renders it. Raises TemplateError."""
    special_tokens = dict(tokenizer.special_tokens_map)
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:
        raise TemplateError(str(error)) from error
    return render(template, messages, special_tokens, add_generation_prompt=add_generation_prompt)[0]


@dataclass(frozen=True)
class Request:
    """A conversation to render: messages of JSON, the schemas of tools, and further variables of the template."""

    messages: Sequence[dict[str, Any]]
    tools: Sequence[dict[str, Any]] | None = None
    options: dict[str, Any] = field(default_factory=dict)


def render(
    template: str,
    messages: Sequence[dict[str, Any]],
    special_tokens: dict[str, Any],
    *,
    add_generation_prompt: bool = False,
    marked: bool = False,
    tools: Sequence[dict[str, Any]] | None = None,
    options: dict[str, Any] | None = None,
    date: str | None = None,
) -> tuple[str, list[Span]]:
    """Return the conversation as text, and if the template is `marked`, the spans in it that it marks as generated.

    `tools` are the schemas of the functions that the model may call, `options` further variables of the template (such
    as `enable_thinking`), and `date` (YYYY-MM-DD) the day that the template takes for today.
    Equals transformers' `render_jinja_template` for messages of JSON. Raises TemplateError for a template that refuses
    the conversation, or exceeds a limit.
    """
    if len(template) > LONGEST_TEMPLATE:
        raise TemplateLimitError(f"it has more than {LONGEST_TEMPLATE >> 20} Mi characters")
    how: dict[str, Any] = {"add_generation_prompt": add_generation_prompt, "marked": marked, "date": date}
    try:
        line = _line(template, [Request(messages, tools, options or {})], special_tokens, **how)
    except (ValueError, RecursionError) as error:
        raise TemplateError(f"the messages are no JSON: {error}") from error
    (answer,) = _own_processes()[0].ask(line, 1)
    if "limit" in answer:
        raise TemplateLimitError(answer["limit"])
    if "broken" in answer:
        raise BrokenTemplateError(answer["broken"])
    if "error" in answer:
        raise TemplateError(answer["error"])
    return _text_of(answer)


def render_many(
    template: str, requests: Sequence[Request], special_tokens: dict[str, Any], *, marked: bool, date: str | None
) -> list[tuple[str, list[Span]] | None]:
    """Return what `render` returns for each of many conversations, rendered in one process for each core.

    None stands for a conversation that `render` may refuse: ask it for the reason.
    """
    processes = _own_processes()
    chunks = [range(first, min(first + _TOGETHER, len(requests))) for first in range(0, len(requests), _TOGETHER)]
    found: list[tuple[str, list[Span]] | None] = [None] * len(requests)

    def work(worker: int) -> None:
        for chunk in chunks[worker :: len(processes)]:
            with contextlib.suppress(TemplateError, ValueError, RecursionError):
                line = _line(template, [requests[number] for number in chunk], special_tokens, marked=marked, date=date)
                for number, answer in zip(chunk, processes[worker].ask(line, len(chunk)), strict=True):
                    found[number] = _text_of(answer) if "text" in answer else None

    if len(template) <= LONGEST_TEMPLATE:
        with ThreadPoolExecutor(len(processes)) as pool:
            list(pool.map(work, range(len(processes))))
    return found


def _line(
    template: str,
    requests: Sequence[Request],
    special_tokens: dict[str, Any],
    *,
    marked: bool,
    date: str | None,
    add_generation_prompt: bool = False,
) -> str:
    request = {
        "template": template,
        "conversations": [
            {
                "messages": list(each.messages),
                "tools": None if each.tools is None else list(each.tools),
                "options": each.options,
            }
            for each in requests
        ],
        "special_tokens": special_tokens,
        "add_generation_prompt": add_generation_prompt,
        "marked": marked,
        "date": date,
    }
    return json.dumps(request, default=str)


def _text_of(answer: dict[str, Any]) -> tuple[str, list[Span]]:
    return answer["text"], [(start, end) for start, end in answer["spans"]]


def untagged(template: Any) -> Any:
    """Return a template (or a dict of several, or None) that renders the same without `{% generation %}` tags."""
    if isinstance(template, str):
        return GENERATION.sub(lambda tag: f"{{%{tag[1]} {'endif' if tag[2] else 'if true'} {tag[3]}%}}", template)
    return {name: untagged(one) for name, one in template.items()} if isinstance(template, dict) else template


def save_untagged(tokenizer: Any, folder: Path) -> None:
    """Write the tokenizer's files, with a chat template without `{% generation %}` tags. It itself stays as it is."""
    template = getattr(tokenizer, "chat_template", None)
    if template is not None:
        tokenizer.chat_template = untagged(template)
    try:
        tokenizer.save_pretrained(folder)
    finally:
        if template is not None:
            tokenizer.chat_template = template


class _Process:
    """One `template_process`, started when it is first asked and again after it was ended."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, line: str, count: int) -> list[dict[str, Any]]:
        """Return the answers to a request of `count` conversations. Raises TemplateError if they take too long."""
        try:
            if self._process is None or self._process.poll() is not None:
                self.end()
                self._start()
            return list(self._exchange(line.encode() + b"\n", SECONDS * count))
        except BaseException:  # an interrupted exchange would leave its answer for the next one
            self.end()
            raise

    def _start(self) -> None:
        quiet = {"USE_TORCH": "0", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        self._process = subprocess.Popen(
            [sys.executable, template_process.__file__, str(SECONDS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **quiet},
        )
        assert self._exchange(b"", START_SECONDS) == "ready"

    def _exchange(self, line: bytes, seconds: float) -> Any:
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(line)
            process.stdin.flush()
            with _killed_after(process, process.stdout, seconds):
                answer = process.stdout.readline()
        except BrokenPipeError:
            answer = b""
        if not answer.endswith(b"\n"):
            raise TemplateLimitError(f"it takes more than {seconds:.0f} seconds, or more memory than it may")
        return json.loads(answer)

    def end(self) -> None:
        """End the process, if there is one."""
        if self._process is None:
            return
        process, self._process = self._process, None
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                assert pipe is not None
                pipe.close()


@contextlib.contextmanager
def _killed_after(process: subprocess.Popen[bytes], answers: IO[bytes], seconds: float) -> Iterator[None]:
    """Stop the process if its answer does not begin in time. The body reads the answer, and then its end."""
    if os.name != "nt":
        if not select.select([answers], [], [], seconds)[0]:
            process.kill()
        yield
        return
    timer = threading.Timer(seconds, process.kill)  # `select` knows no pipes on Windows, and a thread costs 0.1 ms
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


_processes: list[_Process] = []


def _own_processes() -> list[_Process]:
    """Return this process's renderers, one a core. A forked process has its parent's pipes, and starts its own."""
    global _processes
    if not _processes or _processes[0].pid != os.getpid():
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        _processes = [_Process() for _ in range(min(cores, _MOST_PROCESSES))]
        for process in _processes:
            atexit.register(process.end)
    return _processes
