"""`distill preview`: what will be learned, before anything is paid for."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from distill.corpus import SampleSets
from distill.corpus.summary import SourceCounts, together
from distill.errors import UserError
from distill.experiment.cache import as_packed, begun_in
from distill.experiment.configuration import Experiment
from distill.experiment.folders import Folders
from distill.experiment.place import Place
from distill.experiment.teacher import Teacher, open_samples
from distill.models import checkpoints
from distill.recipes.preview.page import MADE_BY, preview_page
from distill.recipes.preview.terminal import print_sample, source_lines
from distill.recipes.preview.tokens import ShownDocument, shown_documents
from distill.report.page import check_own_page, write_own_page
from distill.system.progress import say

_WITHOUT_WEIGHTS = [pattern for pattern in checkpoints.HUB_FILES if not pattern.endswith(".safetensors")]
_MOST_OF_A_STREAM = 1024
"""Training samples of a stream that are read at least, if there is no `cache.max_samples`."""


@dataclass(frozen=True)
class Preview:
    """The text that an experiment would learn, as far as it was read."""

    facts: list[str]
    """Lines about all of it."""
    counts: tuple[SourceCounts, ...]
    """Counts of each source."""
    total: int
    """Number of training samples."""
    samples: list[list[ShownDocument]]
    """The documents of the first training samples, token by token."""


def main(experiment: Experiment, samples: int = 2, html: str | None = None) -> int:
    """Print the counts of each source and the first training samples as tokens; write them to the page `html`.

    Of a teacher on the hub only the tokenizer and the configuration are fetched.
    """
    if samples < 0:
        raise UserError(f"--samples {samples}: is negative: give 0 or more")
    if html is not None:
        check_own_page(Path(html), MADE_BY, "--html")
    found = previewed(experiment, samples)
    for line in (*found.facts, *itertools.chain.from_iterable(map(source_lines, found.counts))):
        say(line)
    for number, documents in enumerate(found.samples):
        print_sample(documents, _title(number, found.total, documents))
    if html is not None:
        title = f"Preview of {', '.join(counts.name for counts in found.counts)}"
        write_own_page(Path(html), preview_page(title, found.facts, found.counts, found.samples), "--html")
        say(f"\npreview: {html}")
    return 0


def previewed(experiment: Experiment, samples: int) -> Preview:
    """Read the corpus, or the beginning of a stream, and return its first training samples. Raises UserError."""
    begun = begun_in(Folders.of(experiment))
    experiment = as_packed(experiment, begun.packing)
    find = partial(checkpoints.download, files=_WITHOUT_WEIGHTS)
    teacher = Teacher(experiment, Place.without_memory(is_cuda=False, has_bf16=False, find=find))
    cache = experiment.cache  # of a stream without an end in sight a beginning is shown
    opened = replace(experiment, cache=replace(cache, max_samples=cache.max_samples or _MOST_OF_A_STREAM))
    sets = open_samples(opened, teacher, begun)
    shown = [
        shown_documents(sets.train, number, teacher.tokenizer, sets.sources)
        for number in range(min(samples, len(sets.train)))
    ]
    return Preview(_facts(experiment, teacher.tokenizer, sets), sets.counts, len(sets.train), shown)


def _facts(experiment: Experiment, tokenizer: Any, sets: SampleSets) -> list[str]:
    wanted = experiment.cache.max_samples
    taken = len(sets.train) if wanted is None else min(wanted, len(sets.train))
    total = together(sets.counts)
    begins = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    bos = f"{tokenizer.bos_token}, {'' if begins else 'not '}put before a text" if tokenizer.bos_token else "none"
    facts = [
        f"The teacher will read {taken:,} of {len(sets.train):,} training samples of "
        f"{experiment.corpus.sequence_length:,} tokens; {total.share_learned:.1%} of all tokens are learned.",
        f"Shapes: {', '.join(f'{kind}, {rows:,} rows' for kind, rows in sets.shapes.items())}.",
        f"Special tokens: BOS {bos}; end of text {tokenizer.eos_token or 'none'}.",
    ]
    facts += [f"Written by a model: {line}." for line in sets.written]
    if sets.packing.words:
        facts.append(f"Packed as {sets.packing.words} (corpus.pack).")
    if sets.long_documents:
        facts.append(f"Longer than a sample: {sets.long_documents} (corpus.long).")
    if sets.thoughts_left_out:
        facts.append(f"The chat template takes out {sets.thoughts_left_out:,} thoughts of earlier turns.")
    if sets.endless:
        facts.append(f"{sets.endless_in_words.capitalize()}.")
    if "date" in sets.rendering:
        facts.append(f"The chat template's today is {sets.rendering['date']} (corpus.date).")
    return facts


def _title(number: int, total: int, documents: Sequence[ShownDocument]) -> str:
    learned, tokens = (sum(getattr(each, name) for each in documents) for name in ("learned", "tokens"))
    return f"training sample {number} of {total:,}: {learned:,} of {tokens:,} tokens are learned"
