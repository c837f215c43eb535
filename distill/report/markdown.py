"""A page as Markdown that a model hub shows as the model's card: the same tables, texts and settings."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from markupsafe import escape

from distill.report.contents import Cell, Content, Listing, Note, Page, Prompt, Table
from distill.report.facts import RunFacts

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_SPECIAL = re.compile(r"([\\`*_{}\[\]|~#$])")


def model_card(page: Page, facts: RunFacts, generator: str) -> str:
    """Return the page under the front matter that model hubs read."""
    parts = [front_matter(facts), f"# {text(page.title)}", text(page.subtitle), f"**{text(page.verdict)}**"]
    parts += [f"> {text(warning)}" for warning in page.warnings]
    for section in page.sections:
        contents = [in_markdown(each) for each in section.contents]
        parts += [f"## {text(section.title)}", *(each for each in contents if each)]
    parts.append(f"Made by {text(generator)}; the charts are in report.html.")
    return "\n\n".join(parts) + "\n"


def front_matter(facts: RunFacts) -> str:
    """Return the hub's metadata. The user chooses the licence, which depends on the teacher's and the text's."""
    content: dict[str, Any] = {}
    student = facts.run / "student"
    if (student / "config.json").is_file() or not student.is_dir():  # else it is a class of the user's own
        content["library_name"] = "transformers"
    content |= {"pipeline_tag": "text-generation", "tags": ["distillation"]}
    if name := hub_name(facts.section("experiment")):
        content["base_model"] = name
    licence = "# license: choose one; the teacher's licence and that of the text bind it too"
    return f"---\n{licence}\n{yaml.safe_dump(content, sort_keys=False)}---"


def hub_name(experiment: Mapping[str, Any]) -> str:
    """Return the teacher's name on the hub; empty if it is a folder, a file or the demo's."""
    teacher = experiment.get("teacher")
    name = teacher.get("model") if isinstance(teacher, dict) else None
    if not isinstance(name, str) or not _HUB_NAME.fullmatch(name):
        return ""
    return "" if name.endswith(".gguf") or Path(name).exists() else name


def in_markdown(content: Content) -> str:
    """Return one content of a section. Charts are left out, since a table has their numbers."""
    if isinstance(content, Table):
        return _folded(content.summary, table(content)) if content.summary else table(content)
    if isinstance(content, Note):
        return text(content.text)
    if isinstance(content, Prompt):
        parts = [f"### Prompt {content.number}", fenced(content.text)]
        for each in content.continuations:
            parts += [f"{text(each.name)}:", fenced(each.text)]
        return "\n\n".join(parts)
    if isinstance(content, Listing):
        return _folded(content.summary, fenced(content.text, content.language))
    return ""


def table(content: Table) -> str:
    """Return a table with its caption above it."""
    align = "|".join([":--", *([":--" if content.wraps else "--:"] * (len(content.head) - 1))])
    lines = [_line(content.head), f"|{align}|", *(_line(row) for row in content.rows)]
    caption = f"**{text(content.caption)}**\n\n" if content.caption else ""
    return caption + "\n".join(lines)


def _line(cells: Sequence[Cell]) -> str:
    return "| " + " | ".join(_cell(cell) for cell in cells) + " |"


def _cell(cell: Cell) -> str:
    shown = f"**{text(cell.text)}**" if cell.best and cell.text else text(cell.text)
    return f"{shown} ({text(cell.small)})" if cell.small and cell.text else shown or text(cell.small)


def text(words: str) -> str:
    """Return the words unchanged on one line: neither Markdown nor HTML in them counts."""
    escaped = str(escape(_SPECIAL.sub(r"\\\1", " ".join(words.split()))))
    return escaped.replace("&#39;", "'").replace("&#34;", '"')


def fenced(words: str, language: str = "text") -> str:
    """Return the words unchanged, in lines, between fences that they do not contain."""
    longest = max(map(len, re.findall("`+", words)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{words.rstrip()}\n{fence}"


def _folded(summary: str, content: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>\n\n{content}\n\n</details>"
