"""A program of its own that renders chat templates: a template may come from anyone, loop for ever or take all memory.

Each line of standard input is a request as JSON, of one conversation or several, each line of standard output its
answers. It starts with a line for "ready", and ends with its input. Without torch it needs half a second to start.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

MEMORY = 2**30
"""Bytes that rendering may take beyond those of the program itself."""
LONGEST = 2**26
"""Characters of a rendered conversation."""


def main(seconds: int) -> None:
    here = str(Path(__file__).resolve().parent)
    sys.path[:] = [place for place in sys.path if place != here]  # where `tokenizers.py` is not the library
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends an answer of `chat`, and not its template
    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # a library's prints are no part of an answer
    from transformers.utils import chat_template_utils

    _limit_memory()
    print(json.dumps("ready"), file=answers, flush=True)
    alarm = getattr(signal, "alarm", lambda _: None)  # Windows has none
    for line in sys.stdin:
        request, found = json.loads(line), []
        for conversation in request["conversations"]:
            alarm(2 * seconds)  # whoever asked is gone if this ever rings
            found.append(_answer(chat_template_utils, request, conversation))
        alarm(0)  # it may be long until the next request
        print(json.dumps(found), file=answers, flush=True)


def _answer(library: Any, request: dict[str, Any], conversation: dict[str, Any]) -> dict[str, Any]:
    try:
        _set_today(library._compile_jinja_template(request["template"]), request["date"])
        texts, spans = library.render_jinja_template(
            conversations=[conversation["messages"]],
            tools=conversation["tools"],
            chat_template=request["template"],
            return_assistant_tokens_mask=request["marked"],
            add_generation_prompt=request["add_generation_prompt"],
            **{**request["special_tokens"], **conversation["options"]},
        )
    except (MemoryError, OverflowError):
        return {"limit": f"it takes more than {MEMORY >> 20} MiB of memory"}
    except RecursionError:
        return {"limit": "it calls itself without end"}
    except Exception as error:  # a template is a program
        if fault := _own_fault(error, request["template"]):
            return {"broken": fault[:1000]}
        return {"error": str(error)[:1000] or type(error).__name__}
    if len(texts[0]) > LONGEST:
        return {"limit": f"it makes a text of more than {LONGEST >> 20} Mi characters"}
    return {"text": texts[0], "spans": spans[0] if spans else []}


def _own_fault(error: Exception, template: str) -> str | None:
    """Return the fault that a template has whatever it is given: a wrong syntax, or a function that nobody defines.

    None for what the conversation may be the reason of.
    """
    import jinja2
    from jinja2 import nodes

    if isinstance(error, jinja2.TemplateSyntaxError):  # so are filters and tests that are not there
        return f"line {error.lineno}: {(error.message or 'wrong syntax').rstrip('.')}"
    if isinstance(error, jinja2.UndefinedError):
        calls = (
            jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_untagged(template)).find_all(nodes.Call)
        )
        for call in calls:
            if isinstance(call.node, nodes.Name) and str(error) == f"'{call.node.name}' is undefined":
                return f"line {call.lineno}: it calls {call.node.name}(), which nobody defines"
    is_missing = type(error) is jinja2.TemplateRuntimeError and re.match(r"No (filter|test) named", str(error))
    return str(error).rstrip(".") if is_missing else None


def _untagged(template: str) -> str:
    """Return a template without the tags of what is generated, which Jinja itself does not know."""
    return re.sub(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}", "", template)


def _set_today(template: Any, date: str | None) -> None:
    """Let `strftime_now` tell `date` (YYYY-MM-DD), or None for the clock's.

    The library keeps compiled templates, so this holds for its next rendering of the same source.
    """
    if date is None:
        template.globals.pop("strftime_now", None)
    else:
        template.globals["strftime_now"] = datetime.date.fromisoformat(date).strftime


def _limit_memory() -> None:
    with contextlib.suppress(ImportError, OSError, ValueError):  # Windows has no such limit, macOS does not keep it
        import resource

        with open("/proc/self/statm", encoding="ascii") as file:
            taken = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    main(int(sys.argv[1]))
