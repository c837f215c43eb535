"""Lines that tell which teacher reads which corpus, and the size of the cache that was made of it."""

from __future__ import annotations

from distill.cache.format.folder import Manifest, read_journal
from distill.cache.format.part import Part
from distill.corpus import SampleSets
from distill.corpus.summary import left_out_in_words
from distill.experiment.configuration import Experiment
from distill.experiment.folders import Folders
from distill.system import units
from distill.system.progress import say


def named(folders: Folders, part: Part | None) -> str:
    """Return the cache's folder, and its part, for messages."""
    return f"part {part} in {folders.cache}" if part else str(folders.cache)


def describe(experiment: Experiment, manifest: Manifest, asked: dict[str, int], samples: SampleSets) -> None:
    """Tell the teacher and the corpus: samples, their form, and the rows that are left out."""
    train, held_out = asked["train"], asked["held_out"]
    teacher = experiment.teacher
    say(f"teacher: {teacher.model}, {manifest.fingerprints['quantization']}, {manifest.vocab_size:,} tokens")
    say(
        f"corpus: {experiment.corpus.named}, {train:,} of {len(samples.train):,} training samples and "
        f"{held_out:,} held out, {manifest.sequence_length} tokens each"
    )
    if samples.gatherer is not None:
        say(f"corpus: a stream of {len(samples.sources):,} shuffled files, read as far as it is needed")
    for line in samples.written:
        say(f"corpus: {line}")
    say(f"corpus: {', '.join(f'{kind}, {rows:,} rows' for kind, rows in samples.shapes.items())}")
    if samples.thoughts_left_out:
        say(
            f"corpus: {samples.thoughts_left_out:,} thoughts of earlier turns are taken out by the chat template's rule"
        )
    if samples.endless:
        say(f"corpus: {samples.endless_in_words}")
    if "date" in samples.rendering:
        say(f"corpus: the chat template's today is {samples.rendering['date']} (corpus.date)")
    if samples.packing.words:
        say(f"corpus: packed as {samples.packing.words} (corpus.pack)")
    if long := samples.long_documents:
        say(f"corpus: {long} that are longer than a sample (corpus.long)")
    for counts in samples.counts:
        name = f"corpus: {counts.name}: " if len(samples.counts) > 1 else "corpus: "
        say(f"{name}{counts.described()}")
        if counts.left_out:
            say(f"{name}{sum(counts.left_out.values()):,} rows left out: {left_out_in_words(counts.left_out)}")


def summarise(folders: Folders, part: Part | None) -> None:
    """Tell the size of the cache."""
    entries = read_journal(folders.cache).values()
    size, positions = sum(entry.bytes for entry in entries), sum(entry.positions for entry in entries)
    kept = sum(entry.entries for entry in entries)
    say(
        f"cache: {named(folders, part)}, {positions:,} positions, {units.size(size)}, "
        f"{size / max(positions, 1):.1f} bytes and {kept / max(positions, 1):.1f} entries a position"
    )
