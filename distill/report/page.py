"""The page of a run, made from its folder: report.html to look at, report.md as the model's card."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import jinja2

from distill import __version__
from distill.errors import UserError
from distill.losses.plausibility import implausible
from distill.report import benchmarks, fidelity, own_texts, provenance, speed, training_texts
from distill.report.contents import Continuation, Page, Prompt, Section
from distill.report.corpus import corpus_section
from distill.report.facts import LIMIT, RunFacts
from distill.report.markdown import model_card
from distill.report.metrics import model_name
from distill.report.verdict import verdict
from distill.system.files import read_bounded, write_durably
from distill.system.progress import say

GENERATOR = f"distill {__version__}"
"""Generator that a run's page names."""
_BEGINNING = 4096
"""Bytes at the beginning of a page that name its generator."""
_SEAL = "<!-- sha256 of what distill wrote above this line: {} -->\n"


def write_report(run: Path) -> tuple[Path, Path]:
    """Write report.md and report.html into a run folder, and return their paths. An edited report.md is kept.

    report.html is written last: where it is, both are there.

    Raises UserError if the folder is no run, or if a file in it is damaged.
    """
    facts = RunFacts.read(run)
    page = run_page(facts)
    html, markdown = run / "report.html", run / "report.md"
    if _is_changed(markdown):
        say(f"report: {markdown} was changed by hand and is kept; remove it to have it written anew")
    else:
        card = model_card(page, facts, GENERATOR).encode("utf-8", "replace")
        write_durably(markdown, card + _seal(card))
    write_durably(html, render(page).encode("utf-8", "replace"))
    return html, markdown


def _seal(content: bytes) -> bytes:
    """Return the last line of report.md, a checksum that tells if the file was edited, which it invites."""
    return _SEAL.format(hashlib.sha256(content).hexdigest()).encode()


def _is_changed(markdown: Path) -> bool:
    """Tell whether the file exists and its last line is not the seal of the text above it."""
    try:
        content = read_bounded(markdown, LIMIT)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise UserError(f"{markdown}: cannot be read ({error.strerror}): remove it to have it written anew") from None
    above = content[: -len(_seal(b""))]
    return content != above + _seal(above)


def run_page(facts: RunFacts) -> Page:
    """Return the page of a run. Its sections stand in the order in which readers ask for them."""
    sections = [
        *fidelity.main_section(facts),
        *fidelity.curve_section(facts),
        *fidelity.bin_section(facts),
        *benchmarks.section(facts),
        *speed.section(facts),
        *own_texts.rounds_section(facts),
        *own_texts.section(facts),
        *_text_section(facts),
        *training_texts.section(facts.texts),
        *corpus_section(facts),
        *provenance.search_section(facts),
        *provenance.cost_section(facts),
        *provenance.forecast_section(facts),
        *provenance.seed_section(facts),
        *provenance.setup_section(facts),
    ]
    return Page(facts.name, _subtitle(facts), verdict(facts), _warnings(facts), sections)


def _warnings(facts: RunFacts) -> list[str]:
    """Return warnings that stand before all figures: students that are too good to be true."""
    nlls = {name: facts.of("fidelity", name).get("nll") for name in ("teacher", "student", "control")}
    teacher = nlls.pop("teacher")
    doubts = [
        implausible(name, nll, teacher) for name, nll in nlls.items() if isinstance(nll, float) and teacher is not None
    ]
    return [doubt[0].upper() + doubt[1:] + "." for doubt in doubts if doubt]


def _subtitle(facts: RunFacts) -> str:
    experiment = facts.section("experiment")
    teacher, student = experiment.get("teacher"), experiment.get("student")
    names = [
        str(each[key])
        for each, key in ((teacher, "model"), (student, "class_path"))
        if isinstance(each, dict) and key in each
    ]
    return (
        f"Distilled from {names[0]} into a student of class {names[1]}"
        if len(names) == 2
        else "A student and its teacher"
    )


def _text_section(facts: RunFacts) -> Iterator[Section]:
    texts = facts.section("texts")
    samples = []
    for index, prompt in enumerate(texts.get("prompts", [])):
        written = [
            Continuation(
                "what really follows" if key == "truth" else model_name(key),
                "" if key == "truth" else key,
                texts[key][index],
            )
            for key in ("truth", "teacher", "student", "control")
            if index < len(texts.get(key, []))
        ]
        samples.append(Prompt(index + 1, prompt, written))
    if samples:
        yield Section("texts", "What they write", samples)


def check_own_page(page: Path, made_by: str, option: str) -> None:
    """Raise UserError for a place of a page that holds anything but a page of the same generator."""
    if page.is_dir():
        raise UserError(f"{page}: is a folder: name a file, for example {option} {page / 'page.html'}")
    try:
        with open(page, "rb") as file:
            is_ours = f'<meta name="generator" content="{made_by} '.encode() in file.read(_BEGINNING)
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{page}: cannot be read ({error.strerror}): choose another place with {option}") from None
    if not is_ours:
        raise UserError(f"{page}: is there already and is no page of {made_by}: choose another name with {option}")


def write_own_page(page: Path, html: str, option: str) -> None:
    """Write a page that stands by itself. Raises UserError if it cannot be written."""
    try:
        write_durably(page, html.encode("utf-8", "replace"))
    except OSError as error:
        raise UserError(f"{page}: cannot be written ({error.strerror}): choose another place with {option}") from None


def render(page: Page, generator: str = GENERATOR) -> str:
    """Return the page as one HTML file that needs nothing else, runs no script and loads nothing."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.get_template("page.html.jinja").render(page=page, generator=generator)
