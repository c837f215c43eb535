"""Masks of published chat templates: template by shape, what is learned right, refused with a reason, or wrong.

    python tests/benchmarks/masks.py FOLDER [--show]

FOLDER holds `*.jinja` files. The PyPI package `axolotl` carries 36 published ones; `pip download --no-deps axolotl`
fetches it, and none of its code is needed. Right means: each answer's text, thought and call is learned, with an end
token where the template writes one, and nothing else but the template's own marks. `--show` prints every learned text.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from distill.corpus.conversations import Conversation
from distill.corpus.templates import ChatTemplate
from distill.errors import UserError

TOKEN = re.compile(
    r"<\|[^|<>'\"]{1,40}\|?>|<｜[^｜]{1,40}｜>|</?[a-z_]{3,30}(?:_of_turn)?>|\[/?[A-Z_]{3,30}\]|\[\|[a-z]+\|\]|<[a-z_]+\|>"
)
"""Added tokens, as far as a template's text tells them."""


def user(number: int) -> dict[str, Any]:
    return {"role": "user", "content": f"Quaere{number}, please?"}


def answer(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


SYSTEM = {"role": "system", "content": "Systema brevis."}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Tells of rain",
            "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "A town"}}},
        },
    }
]
CALL = {
    "id": "abcdefghi",
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": 'Graz "West"', "days": 3}},
}
RESULT = {"role": "tool", "name": "weather", "tool_call_id": "abcdefghi", "content": '{"resultat": 7}'}
THINKING = "<think>\nCogito.\n</think>\n\nErgo."

SHAPES: dict[str, dict[str, Any]] = {
    "1 turn": {"messages": [user(1), answer("Elbe.")]},
    "2 turns": {"messages": [user(1), answer("Elbe."), user(2), answer("Oder.")]},
    "3 turns": {"messages": [user(1), answer("Elbe."), user(2), answer("Oder."), user(3), answer("Spree.")]},
    "system": {"messages": [SYSTEM, user(1), answer("Elbe."), user(2), answer("Oder.")]},
    "thought": {"messages": [user(1), answer("Elbe.", reasoning_content="Cogito.")]},
    "2 thoughts": {
        "messages": [
            user(1), answer("Elbe.", reasoning_content="Cogito."), user(2), answer("Oder.", reasoning_content="Puto.")
        ]
    },
    "<think>": {"messages": [user(1), answer(THINKING), user(2), answer("<think>\nPuto.\n</think>\n\nOder.")]},
    "blanks": {"messages": [user(1), answer(" Elbe.\n"), user(2), answer("\n\nOder. ")]},
    "empty": {"messages": [user(1), answer(""), user(2), answer("Oder.")]},
    "end": {"messages": [user(1), answer("end"), user(2), answer("|")]},
    "call": {"messages": [user(1), answer("", tool_calls=[CALL]), RESULT, answer("Septem.")]},
    "tools": {
        "messages": [user(1), answer("", tool_calls=[CALL]), RESULT, answer("Septem.")],
        "tools": TOOLS,
    },
}  # fmt: skip


def make(source: str) -> ChatTemplate:
    """Return a template with special tokens as far as they can be told without its tokenizer."""
    found = dict.fromkeys([*TOKEN.findall(source), "<BOS>", "<EOS>"])
    return ChatTemplate(source, {"bos_token": "<BOS>", "eos_token": "<EOS>"}, tuple(found))


def said(message: dict[str, Any]) -> list[str]:
    """Return the texts of a message, without marks and blanks."""
    texts = [str(message.get("content") or ""), str(message.get("reasoning_content") or "")]
    for call in message.get("tool_calls", []):
        texts += [call["function"]["name"], "Graz", "days", "3"]
    return [part.strip() for text in texts for part in re.split(r"</?think>", text) if part.strip()]


def judge(template: ChatTemplate, shape: dict[str, Any]) -> tuple[str, str]:
    """Return "right", "refused" or "WRONG", and the learned text or the reason."""
    conversation = Conversation(json.loads(json.dumps(shape["messages"])), shape.get("tools"))
    try:
        rendered = template.render(conversation, "row 1")
    except UserError as error:
        return "refused", str(error)
    learned = [rendered.text[start:end] for start, end in rendered.spans]
    shown = " + ".join(map(repr, learned))
    answers = [message for message in shape["messages"] if message["role"] == "assistant"]
    others = [part for message in shape["messages"] if message["role"] != "assistant" for part in said(message)]
    together = "".join(learned)
    if any(part in together for part in others):
        return "WRONG", f"learns the user's words: {shown}"
    if len(learned) != len(answers) and len(learned) == len(answers) - rendered.thoughts_left_out:
        answers = answers[-len(learned) :]  # the prompt opens a thought, so an answer without its own is context
    if len(learned) != len(answers):
        return "WRONG", f"{len(learned)} of {len(answers)} answers: {shown}"
    missing = 0
    for message, text in zip(answers, learned, strict=True):
        rest = text
        for part in said(message):
            missing += part not in rest
            rest = rest.replace(part, "", 1)
        if re.search(r"assistant|user|model|ASSISTANT|USER|### |START_OF_TURN|response:", rest):
            return "WRONG", f"learns a header: {shown}"
    if inside := [text for text in learned if re.match(r"[\w\s]*\"", text)]:
        return "WRONG", f"begins inside a call: {inside}"
    if missing > rendered.thoughts_left_out:
        return "WRONG", f"{missing} texts are missing: {shown}"
    return "right", f"{shown} ({rendered.thoughts_left_out} thoughts left out)"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--show", action="store_true")
    arguments = parser.parse_args()
    files = sorted(arguments.folder.rglob("*.jinja"))
    counts = {shape: Counter[str]() for shape in SHAPES}
    print(f"{'template':22}" + " ".join(f"{shape:>10}" for shape in SHAPES))
    for file in files:
        template = make(file.read_text(encoding="utf-8"))
        found = {name: judge(template, shape) for name, shape in SHAPES.items()}
        for name, (verdict, _) in found.items():
            counts[name][verdict] += 1
        print(f"{file.stem:22}" + " ".join(f"{found[name][0]:>10}" for name in SHAPES))
        for name, (verdict, text) in found.items():
            if arguments.show or verdict == "WRONG":
                print(f"    {name}: {text}")
    for verdict in ("right", "refused", "WRONG"):
        print(f"{verdict:22}" + " ".join(f"{counts[name][verdict]:>10}" for name in SHAPES))
    return 1 if any(count["WRONG"] for count in counts.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
