"""Texts that a model wrote while it was trained, on the page: the same prompts at several steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from distill.errors import UserError
from distill.report.contents import Content, Continuation, Note, Prompt, Section
from distill.report.metrics import MODELS, model_name
from distill.report.numbers import number
from distill.report.schema import TEXTS_LINE, checked
from distill.system import json_lines

FILE = "texts.jsonl"
LIMIT = 256 << 20
"""Largest size in bytes of such a file."""
SHOWN = 5
"""Steps that are shown: the first, the last, and some between them."""

Line = Mapping[str, Any]
"""One look: `step`, `prompts` and `texts`."""


def read_texts(folder: Path) -> list[Line]:
    """Return the looks in a folder of logs by rising step; none if there are none.

    A start resumes at its checkpoint's step, and repeats all looks that earlier starts took behind it. Raises UserError
    for a file that is damaged or cannot be read.
    """
    path = folder / FILE
    found: list[Line] = []
    try:
        lines = json_lines.read(path, LIMIT)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    for each in lines:
        line = checked(each, TEXTS_LINE, str(path))
        if len(line["prompts"]) != len(line["texts"]):
            raise UserError(f"{path}: step {line['step']} has not one text for each prompt: the file is damaged")
        found = [*(earlier for earlier in found if earlier["step"] < line["step"]), line]
    return found


def section(texts: Mapping[str, Sequence[Line]]) -> Iterator[Section]:
    """Yield the texts of each model at some of the steps, by prompt. `texts` has the looks of each model."""
    models = [model for model in MODELS if texts.get(model)]
    if not models:
        return
    shown = {model: _some(texts[model]) for model in models}
    contents: list[Content] = []
    for index, prompt in enumerate(shown[models[0]][-1]["prompts"]):
        written = [
            Continuation(f"{model_name(model)}, step {number(line['step'])}", model, line["texts"][index])
            for model in models
            for line in shown[model]
            if line["prompts"][index : index + 1] == [prompt]
        ]
        contents.append(Prompt(index + 1, prompt, written))
    if not contents:
        return
    looks = max(len(texts[model]) for model in models)
    if looks > SHOWN:
        said = f"{number(SHOWN)} of {number(looks)} looks; all of them are in {FILE} among the run's logs."
        contents.append(Note(said, (SHOWN, looks)))
    yield Section("learning", "What they wrote while they learned", contents)


def _some(lines: Sequence[Line]) -> list[Line]:
    """Return `SHOWN` of the looks at most, evenly spread, with the first and the last."""
    most = min(SHOWN, len(lines))
    return [lines[round(place * (len(lines) - 1) / max(most - 1, 1))] for place in range(most)]
