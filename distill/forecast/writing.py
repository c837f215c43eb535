"""Forecast of the texts that a model writes: their number, tokens, time and bytes, at most."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from distill.corpus.reading import kind_of, local_files
from distill.corpus.text_files import open_text
from distill.corpus.written import is_written, read_journal, read_manifest
from distill.errors import UserError
from distill.experiment.configuration import Experiment
from distill.experiment.generation import folder_of
from distill.forecast.machine.calibration import speed
from distill.forecast.machine.cards import Card
from distill.models.devices import DTYPES

BYTES_A_TOKEN = 11
"""Bytes of a token in a part: its id as a number, and its text."""
PROMPT_TOKENS = 100
"""Tokens of a conversation's prompt, assumed."""
_LINES = (".jsonl", ".csv", ".tsv")
_MOST_BYTES = 2**28
"""Size of the files whose rows are counted for a forecast."""


@dataclass(frozen=True)
class Writing:
    """Texts to write, at most."""

    texts: int
    tokens: int
    """Tokens of them, without the prompts."""
    bytes: int
    passes: int
    """Forward passes that write a token of each text in a batch."""


def is_asked(experiment: Experiment) -> bool:
    """Tell whether the experiment names prompts, and its texts are not all there yet.

    Prompts of rounds are not written on before them, unless the corpus is made so.
    """
    if experiment.generate.prompts is None:
        return False
    folder = folder_of(experiment)
    paths = [Path(source.path).expanduser().resolve() for source in experiment.corpus.all_sources]
    if experiment.rounds.count and folder.resolve() not in paths:
        return False
    if not is_written(folder):
        return True
    manifest = read_manifest(folder)
    return len(read_journal(folder, manifest)) < manifest.parts


def writing_of(experiment: Experiment) -> Writing | None:
    """Return the texts to write; None if the number of prompts is not known here."""
    generate = experiment.generate
    prompts = _prompts(experiment)
    if prompts is None:
        return None
    texts = prompts * generate.samples_per_prompt
    tokens = texts * generate.max_new_tokens
    each_group = -(-generate.group * generate.samples_per_prompt // generate.batch_size)
    passes = -(-prompts // generate.group) * each_group * generate.max_new_tokens
    return Writing(texts, tokens, BYTES_A_TOKEN * (tokens + texts * PROMPT_TOKENS), passes)


def _prompts(experiment: Experiment) -> int | None:
    most, prompts = experiment.generate.max_prompts, experiment.generate.prompts
    paths = [source.path for source in experiment.corpus.all_sources] if prompts is None else [prompts]
    if prompts is None and any(source.reader for source in experiment.corpus.all_sources):
        return most
    try:
        found = [local_files(path) for path in paths]
    except UserError:
        return most
    files = [file for each in found for file in each or ()] if all(found) else []
    if not files or sum(file.stat().st_size for file in files) > _MOST_BYTES:
        return most
    if any(kind_of(file) not in _LINES for file in files):
        return most
    rows = 0
    for file in files:
        with open_text(file) as text:
            rows += sum(1 for line in text if line.strip())
    return rows if most is None else min(rows, most)


def seconds_of(writing: Writing, experiment: Experiment, card: Card, sizes: Mapping[str, int]) -> float:
    """Return the time of the writing by a model of these sizes (`size_of`): each pass reads all weights once.

    It is the larger of the time of reading them and that of the products, without attention and the prompts.
    """
    pace = speed(card)
    parameters = sizes["parameters"] + sizes.get("packed_parameters", 0)
    name = (
        experiment.teacher.compute_dtype if experiment.generate.by == "teacher" else experiment.evaluate.student_dtype
    )
    products = 2 * parameters * experiment.generate.batch_size / pace.flops[DTYPES[name]]
    return writing.passes * max(sizes["bytes"] / pace.bytes, products)


def looks_seconds(experiment: Experiment, steps: float, card: Card, sizes: Mapping[str, int]) -> float:
    """Return the time of the texts that a student of these sizes writes in a training of so many steps.

    Each token of each text is a pass of its own that reads all weights.
    """
    if experiment.train.texts_every_steps is None:
        return 0.0
    looks = steps // experiment.train.texts_every_steps + 1
    tokens = looks * experiment.evaluate.texts * experiment.evaluate.text_tokens
    return tokens * sizes["bytes"] / speed(card).bytes


def written_tokens(experiment: Experiment, path: str) -> int | None:
    """Return the tokens of a source that a model wrote, or is to write at most; None for any other source."""
    folder = Path(path).expanduser()
    if is_written(path):
        parts = read_journal(folder, read_manifest(folder)).values()
        return sum(part.tokens + part.prompt_tokens for part in parts)
    if experiment.generate.prompts is None or folder.resolve() != folder_of(experiment).resolve():
        return None
    writing = writing_of(experiment)
    return None if writing is None else writing.tokens + writing.texts * PROMPT_TOKENS
