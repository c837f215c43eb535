"""`distill generate`: a model writes on from prompts, into a folder that `corpus.path` reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distill.corpus.written import Manifest
from distill.experiment.configuration import Experiment
from distill.experiment.folders import Folders, make_run_folder
from distill.experiment.generation import Writer, folder_of, open_prompts
from distill.experiment.place import Place
from distill.experiment.precision import with_types_of_machine
from distill.experiment.teacher import Teacher
from distill.generation.authors import Answer, Asked, Author
from distill.generation.folder import WrittenFolder
from distill.generation.prompts import Prompts, spread_over
from distill.generation.server import ServerAuthor
from distill.models.generation import decode_text
from distill.system import interrupt, ledger, units
from distill.system.locks import cannot_write, sole_writer
from distill.system.progress import Progress, say

TRIALS = 4
"""Prompts on which it is tried whether the model ends its answers at all."""

_NAMES = {"what": "texts", "option": "--generate.to"}
"""Names for messages about writing."""

_WRITERS = {"fresh": "fresh student"}


def main(experiment: Experiment, following: tuple[str, ...] = ()) -> int:
    """Write the texts, or the parts that are missing."""
    experiment = with_types_of_machine(experiment, "teacher.compute_dtype")
    folders, folder = Folders.of(experiment), folder_of(experiment)
    writer = Writer(experiment, Teacher(experiment, Place.of(experiment)))
    prompts, manifest = open_prompts(experiment, writer)
    _describe(experiment, prompts, manifest)
    make_run_folder(folders)
    with sole_writer(folder, **_NAMES):
        place = WrittenFolder(folder, manifest)
        missing = place.missing()
        if missing and len(missing) < manifest.parts:
            say(f"generate: {manifest.parts - len(missing)} of {manifest.parts} parts are there; continuing")
        if missing:
            with ledger.phase(folders.run, "generate"):
                _write_missing(experiment, place, missing, prompts, writer)
    _summarise(place, bool(missing))
    return 0


def _write_missing(
    experiment: Experiment, place: WrittenFolder, missing: list[int], prompts: Prompts, writer: Writer
) -> None:
    manifest, author = place.manifest, writer.author()
    if not author.is_cached:
        say("generate: this model has no key-value cache here, and reads its whole text again for each token: slow")
    if manifest.kind == "messages" and len(missing) == manifest.parts > 1:
        _try_endings(author, prompts, experiment.generate.max_new_tokens)
    _write(place, missing, author, prompts, writer)
    if isinstance(author, ServerAuthor) and author.other_counts:
        say(
            f"generate: {author.other_counts:,} texts have another number of tokens here than the server wrote "
            "them in: the local tokenizer splits them otherwise"
        )


def _describe(experiment: Experiment, prompts: Prompts, manifest: Manifest) -> None:
    generate = experiment.generate
    path = generate.prompts or experiment.corpus.named
    kind = "conversations" if prompts.kind == "messages" else "plain texts"
    say(
        f"generate: the {_WRITERS.get(generate.by, generate.by)} writes {manifest.texts:,} texts of at most "
        f"{generate.max_new_tokens:,} tokens, for {len(prompts):,} prompts of {path} ({kind})"
    )
    if prompts.left_out:
        told = ", ".join(f"{rows:,} {reason}" for reason, rows in prompts.left_out.items())
        say(f"generate: left out of the prompts: {told}")


def _asked(prompts: Prompts, numbers: Sequence[int], samples: int) -> list[Asked]:
    return [
        Asked(prompt.ids_L.tolist(), number, sample, prompt.is_conversation)
        for number, prompt in ((number, prompts.prompts[number]) for number in numbers)
        for sample in range(samples)
    ]


def _try_endings(author: Author, prompts: Prompts, limit: int) -> None:
    """Say if none of a few answers ends by itself: then the model hardly knows this chat template."""
    trials = author.write(_asked(prompts, list(spread_over(prompts.prompts, TRIALS)), 1), lambda answer: None)
    ended = sum(answer.ended for answer in trials)
    say(f"generate: {ended} of {len(trials)} answers that were tried end by themselves within {limit:,} tokens")
    if not ended:
        say(
            "generate: does this model know its chat template? Answers that are cut have no end to learn: look at some "
            "(--generate.max_prompts 4 --generate.to FOLDER), raise generate.max_new_tokens, or take an instruct model"
        )


def _write(place: WrittenFolder, missing: list[int], author: Author, prompts: Prompts, writer: Writer) -> None:
    manifest = place.manifest
    samples = manifest.samples_per_prompt
    total = sum(len(manifest.group_range(number)) for number in missing) * samples
    with Progress("generate", total=total, unit="texts") as progress:
        tokens = 0

        def report(answer: Answer) -> None:
            nonlocal tokens
            tokens += len(answer.ids)
            each = tokens / max(progress.done + 1, 1)
            progress.advance(1, tokens=f"{tokens:,}", tokens_per_second=f"{each * progress.rate():.0f}")

        for number in missing:
            asked = _asked(prompts, manifest.group_range(number), samples)
            answers = author.write(asked, report)
            rows = [_row(prompts, each, answer, writer) for each, answer in zip(asked, answers, strict=True)]
            with interrupt.held_back():
                try:
                    place.add(number, rows, author.batch_size)
                except OSError as error:
                    raise cannot_write(place.folder, error, None, **_NAMES) from None


def _row(prompts: Prompts, asked: Asked, answer: Answer, writer: Writer) -> dict[str, Any]:
    """Return a text as a part stores it: for people first, then its tokens, in the teacher's ids."""
    said = decode_text(writer.tokenizer, answer.ids[: -1 if answer.ended else None])
    ids = writer.in_teachers_ids([*asked.ids, *answer.ids])
    return {
        "prompt": asked.prompt,
        "sample": asked.sample,
        **prompts.shown(asked.prompt, said, writer.tokenizer),
        "ended": answer.ended,
        "prompt_tokens": len(asked.ids),
        "input_ids": ids,
        "document": prompts.prompts[asked.prompt].document,
    }


def _summarise(place: WrittenFolder, is_new: bool) -> None:
    parts = place.journal.values()
    texts, ended, tokens, held = (
        sum(getattr(part, name) for part in parts) for name in ("texts", "ended", "tokens", "bytes")
    )
    if not is_new:
        say(f"generate: {place.folder} is complete ({place.manifest.parts} parts); nothing to do")
    say(
        f"generate: {place.folder}, {texts:,} texts, {tokens:,} tokens, {units.size(held)}; {ended / texts:.0%} ended "
        f"by themselves, {texts - ended:,} were cut. To learn from them: --corpus.path {place.folder}"
    )
