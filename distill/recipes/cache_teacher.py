"""`distill cache-teacher`: the teacher reads the corpus once and its answers go to disk."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch.utils.data import ConcatDataset, Subset

from distill.cache.format import version1
from distill.cache.format.folder import MANIFEST, SPLITS, Manifest, differences, read_journal, read_manifest
from distill.cache.format.head import HEAD, save_head
from distill.cache.format.leftovers import is_unused
from distill.cache.format.part import Part
from distill.cache.format.token_order import TokenOrder, save_order
from distill.cache.format.tokenizer_files import save_tokenizer
from distill.cache.making.growing import joined
from distill.cache.making.parts import claim_part
from distill.cache.making.writer import CacheWriter
from distill.cache.reading.storage import is_url
from distill.cache.reading.verify import shards_of
from distill.corpus import SampleSets
from distill.corpus.summary import left_out_in_words
from distill.errors import UserError
from distill.experiment.cache import (
    as_begun,
    as_packed,
    begun_in,
    check_tokens,
    make_manifest,
    make_token_order,
    sample_numbers,
    with_budgeted_threshold,
)
from distill.experiment.configuration import Experiment
from distill.experiment.folders import Folders, make_run_folder
from distill.experiment.place import Place
from distill.experiment.precision import with_types_of_machine
from distill.experiment.teacher import NOTHING_BEGUN, Teacher, open_samples
from distill.forecast.machine.cards import this_machine
from distill.models import devices
from distill.system import interrupt, ledger, units
from distill.system.locks import cannot_write, sole_writer
from distill.system.progress import Progress, be_quiet, say
from distill.system.rank import is_first_process
from distill.system.units import parse_duration, parse_size
from distill.targets.schemes import VarOpt

if TYPE_CHECKING:  # by statement these take seconds, which a finished cache does not need
    import lightning.pytorch as pl

    from distill.cache.making.predict import TeacherModule


def main(experiment: Experiment, following: tuple[str, ...] = ()) -> int:
    """Make the cache, or its missing shards; with `cache.devices` or `cache.num_nodes`, one of their processes.

    `following`: phases that run next, and that must fit too.
    """
    cache = experiment.cache
    limit = math.inf if cache.max_time is None else parse_duration(cache.max_time, "cache.max_time")
    deadline = time.monotonic() + limit
    _check_budget_options(experiment)
    if cache.dir and is_url(cache.dir):
        raise UserError(f"cache.dir: {cache.dir}: a cache is made in a local folder; copy it there when it is finished")
    part = Part.parse(cache.part) if cache.part else None
    experiment = with_types_of_machine(experiment, "teacher.compute_dtype")
    folders = Folders.of(experiment)
    work = None
    if _is_begun(experiment, folders):
        experiment = as_packed(experiment, begun_in(folders).packing)
    if _is_begun(experiment, folders) and cache.devices * cache.num_nodes == 1:
        work = _Work.of(experiment, folders, Teacher(experiment, Place.of(experiment)), part)
        if _is_of_version_1(experiment, folders):
            work.describe()
            return _accept_version_1(folders, work.manifest)
        with sole_writer(folders.cache):
            if not work.missing() and not _lacks_head(folders, work.manifest):
                work.describe()
                work.say_complete()
                return 0
    return _make(experiment, folders, part, deadline, following, work)


@dataclass(frozen=True)
class _Work:
    """The cache that the experiment asks for: its text, its manifest, and the shards that this command makes."""

    experiment: Experiment
    folders: Folders
    teacher: Teacher
    samples: SampleSets
    order: TokenOrder
    manifest: Manifest
    """Manifest of the cache, which may have more samples than the experiment asks for."""
    asked: dict[str, int]
    """Numbers of samples that the experiment asks for, by split."""
    part: Part | None
    shards: Collection[int]

    @classmethod
    def of(cls, experiment: Experiment, folders: Folders, teacher: Teacher, part: Part | None) -> _Work:
        """Open the corpus, and find the threshold of a budget."""
        samples = open_samples(
            experiment, teacher, begun_in(folders) if _is_begun(experiment, folders) else NOTHING_BEGUN
        )
        order = make_token_order(experiment, teacher, samples)
        experiment = _within_budget(experiment, folders, teacher, samples, order)
        manifest = make_manifest(experiment, teacher, samples, order)
        asked = manifest.splits
        if _is_begun(experiment, folders):
            found = read_manifest(folders.cache)
            manifest = joined(as_begun(manifest, found), found)
            if part and manifest.splits != found.splits:
                raise UserError(
                    f"cache {folders.cache} has {found.samples:,} samples, and grows as a whole: merge its parts, and "
                    "give no --cache.part"
                )
            check_tokens(folders.cache, manifest, samples)
        shards = part.shards(manifest.shards) if part else manifest.shards_with(asked)
        return cls(experiment, folders, teacher, samples, order, manifest, asked, part, shards)

    def missing(self) -> list[int]:
        """Begin the folder, or open it, and return the shards to make."""
        folder = self.folders.cache
        overwrite = self.experiment.cache.overwrite or is_unused(folder)
        writer = CacheWriter(folder, self.manifest, overwrite=overwrite)
        claim_part(folder, self.part)
        save_tokenizer(folder, self.teacher.tokenizer)
        save_order(folder, self.order)
        return [shard for shard in writer.missing() if shard in self.shards]

    def describe(self) -> None:
        """Tell the teacher and the corpus."""
        _describe(self.experiment, self.manifest, self.asked, self.samples)

    def say_complete(self) -> None:
        say(f"cache: {_name(self.folders, self.part)} is complete ({len(self.shards)} shards); nothing to do")


def _make(
    experiment: Experiment,
    folders: Folders,
    part: Part | None,
    deadline: float,
    following: tuple[str, ...],
    work: _Work | None,
) -> int:
    """Make the cache, or its missing shards, as one of the job's processes. `work` is known for one that was begun."""
    from distill.cache.making.processes import make_trainer
    from distill.forecast.ahead import check_student_ahead, check_tokens_ahead
    from distill.forecast.preflight import Preflight

    cache, is_new = experiment.cache, not _is_begun(experiment, folders)
    if is_first_process() and (following or is_new):
        _check_ahead(experiment, following)
    make_run_folder(folders)
    device_type = devices.pick_device(experiment.train.accelerator).type
    devices.check_number(cache.devices, device_type, "cache.devices")
    trainer = make_trainer(device_type, cache.devices, cache.num_nodes)
    if not trainer.is_global_zero:
        be_quiet()
    preflight = Preflight(experiment, "cache-teacher", following)
    if is_new:
        if is_first_process():
            card = this_machine("cuda" if preflight.device.type == "cuda" else "cpu")
            untried = check_student_ahead(experiment, card, with_weights=True)
            if untried is not None:
                say(untried)
        preflight.check()  # before a teacher of many gigabytes is fetched
    if work is None:
        teacher = Teacher(experiment, replace(Place.of(experiment), device=trainer.strategy.root_device))
        work = _Work.of(experiment, folders, teacher, part)
        if is_new and is_first_process():
            check_tokens_ahead(experiment, teacher.tokenizer)  # which may have come from the hub just now
    work.describe()
    if _is_of_version_1(experiment, folders):
        return _accept_version_1(folders, work.manifest)
    # The process of rank 0 holds the folder for all of them, and opens it before they do.
    with sole_writer(folders.cache) if trainer.is_global_zero else contextlib.nullcontext():
        if trainer.is_global_zero:
            missing = work.missing()
            if not missing and not _lacks_head(folders, work.manifest):
                work.say_complete()
                return 0
            if len(missing) < len(work.shards):
                say(f"cache: {len(work.shards) - len(missing)} of {len(work.shards)} shards are there; continuing")
        elif _is_finished(folders, work.manifest, work.shards):
            return 0
        with preflight, ledger.phase(folders.run, "cache-teacher"):
            _predict(work, trainer, deadline)
    _summarise(folders, part)
    return 0


def _check_ahead(experiment: Experiment, following: tuple[str, ...]) -> None:
    """Raise UserError for all that training and evaluation would refuse on settings alone, after the teacher's hours.

    A student that does not train here may train on a device that this machine lacks.
    """
    from distill.experiment.last_steps import check_held_out, check_last_steps

    if "evaluate" in following:
        check_held_out(experiment)
    elif not experiment.corpus.held_out:
        say("corpus.held_out is 0: `distill evaluate` will have no text to measure students of this cache on")
    here = devices.pick_device(experiment.train.accelerator).type
    elsewhere = "cuda" if experiment.train.accelerator == "auto" else here
    check_last_steps(experiment, None if "train-student" in following else elsewhere)


def _is_begun(experiment: Experiment, folders: Folders) -> bool:
    is_there = (folders.cache / MANIFEST).exists() and not is_unused(folders.cache)
    return is_there and not experiment.cache.overwrite


def _is_of_version_1(experiment: Experiment, folders: Folders) -> bool:
    return _is_begun(experiment, folders) and read_manifest(folders.cache).version == version1.VERSION


def _accept_version_1(folders: Folders, manifest: Manifest) -> int:
    """Say that a finished cache of an earlier release is complete. Raises UserError for any other: it is only read."""
    found = read_manifest(folders.cache)
    shards = shards_of(folders.cache, found)
    if differences(manifest, found) or any(shard not in read_journal(folders.cache, found) for shard in shards):
        CacheWriter(folders.cache, manifest)  # which says what is the matter
    say(f"cache: {folders.cache} is complete ({len(shards)} shards, format version {found.version}); nothing to do")
    return 0


def _check_budget_options(experiment: Experiment) -> None:
    cache = experiment.cache
    if cache.max_size is not None:
        parse_size(cache.max_size, "cache.max_size")
    if cache.bytes_per_token is None:
        return
    if cache.scheme != "varopt":
        raise UserError(f"cache.bytes_per_token: it chooses varopt's threshold; scheme {cache.scheme} has none")
    if cache.part or cache.devices * cache.num_nodes > 1:
        raise UserError(
            "cache.bytes_per_token: parts and processes must share one threshold: let one process choose it on a few "
            "samples (--cache.max_samples 8, without --cache.part), then give it as --cache.threshold"
        )


def _within_budget(
    experiment: Experiment, folders: Folders, teacher: Teacher, samples: SampleSets, order: TokenOrder
) -> Experiment:
    """Return the experiment with the threshold of its budget. Raises UserError if the cache would be too large.

    An earlier start's choice stays: the first samples are measured only when the cache is begun.
    """
    cache = experiment.cache
    begun = _is_begun(experiment, folders)
    if begun or (cache.bytes_per_token is None and cache.max_size is None):
        return with_budgeted_threshold(experiment, read_manifest(folders.cache)) if begun else experiment
    from distill.cache.making.budget import SizeProbe

    manifest = make_manifest(experiment, teacher, samples, order)
    module = _teacher_module(experiment, teacher.load(), manifest)
    probe = SizeProbe(module, order, samples.train, manifest.splits["train"], cache.batch_size, teacher.device)
    scheme = manifest.make_scheme()
    if cache.bytes_per_token is not None:
        assert isinstance(scheme, VarOpt)
        scheme = probe.threshold_for(cache.bytes_per_token, scheme)
        say(f"cache: threshold {scheme.threshold:g} takes about {cache.bytes_per_token:g} bytes a token")
        experiment = replace(experiment, cache=replace(cache, threshold=scheme.threshold))
    if cache.max_size is not None:
        size = probe.check_size(scheme, manifest, cache.max_size)
        tokens = manifest.samples * manifest.sequence_length
        say(f"cache: forecast {units.size(size * tokens)}, {size:.1f} bytes for each of {tokens:,} tokens")
    return experiment


def _teacher_module(experiment: Experiment, model: Any, manifest: Manifest) -> TeacherModule:
    from distill.cache.making.predict import TeacherModule

    return TeacherModule(
        model,
        manifest.vocab_size,
        manifest.make_scheme(),
        seed=manifest.seed,
        temperature=manifest.temperature,
        chunk_size=experiment.cache.chunk_size,
    )


def _lacks_head(folders: Folders, manifest: Manifest) -> bool:
    """Tell whether hidden states are cached whose head is not there yet."""
    return manifest.scheme == "hidden" and not (folders.cache / HEAD).exists()


def _is_finished(folders: Folders, manifest: Manifest, shards: Collection[int]) -> bool:
    """Tell whether the process of rank 0, on another machine, found nothing to do."""
    try:
        found = read_manifest(folders.cache)
    except UserError:
        return False
    journal = read_journal(folders.cache, found)
    done = not differences(manifest, found) and all(shard in journal for shard in shards)
    return done and not _lacks_head(folders, manifest)


def _name(folders: Folders, part: Part | None) -> str:
    return f"part {part} in {folders.cache}" if part else str(folders.cache)


def _describe(experiment: Experiment, manifest: Manifest, asked: dict[str, int], samples: SampleSets) -> None:
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


def _predict(work: _Work, trainer: pl.Trainer, deadline: float) -> None:
    from distill.cache.making.processes import ShardShares, predict

    folders, manifest = work.folders, work.manifest
    splits = {"held_out": work.samples.held_out, "train": work.samples.train}
    numbers = sample_numbers(manifest, work.samples)
    numbered: ConcatDataset = ConcatDataset([Subset(splits[name], numbers[name]) for name in SPLITS if numbers[name]])
    model = work.teacher.load()
    if is_unused(folders.cache):
        _check_begin_token(work, model)
    if trainer.is_global_zero and _lacks_head(folders, manifest):
        try:
            save_head(folders.cache, model.head.with_rows(manifest.vocab_size))
        except OSError as error:
            raise cannot_write(folders.cache, error) from None
    module = _teacher_module(work.experiment, model, manifest)
    world = trainer.world_size
    title = f"cache-teacher, process 1 of {world}" if world > 1 else "cache-teacher"
    with work.samples.ahead(), Progress(title, total=0, unit="tokens") as progress, interrupt.deferred():

        def open_writer() -> CacheWriter:
            return CacheWriter(folders.cache, manifest, batch_size=work.experiment.cache.batch_size)

        predict(trainer, module, ShardShares(numbered, open_writer, work.shards, progress, deadline))


def _check_begin_token(work: _Work, model: Any) -> None:
    """Raise UserError for a teacher that needs a beginning-of-text token which the samples do not have."""
    from distill.cache.making.begin_token import check_begin_token

    tokenizer, cache = work.teacher.tokenizer, work.experiment.cache
    if tokenizer.bos_token_id is None:
        return
    where = "give a corpus.chat_template" if work.samples.is_conversations else "take a tokenizer (teacher.tokenizer)"
    check_begin_token(
        model,
        work.samples.train,
        tokenizer.bos_token_id,
        f"teacher {work.experiment.teacher.model}",
        vocab_size=work.manifest.vocab_size,
        batch_tokens=cache.batch_size * work.manifest.sequence_length,
        remedy=f"{where} that begins with {tokenizer.bos_token}",
    )


def _summarise(folders: Folders, part: Part | None) -> None:
    entries = read_journal(folders.cache).values()
    size, positions = sum(entry.bytes for entry in entries), sum(entry.positions for entry in entries)
    kept = sum(entry.entries for entry in entries)
    say(
        f"cache: {_name(folders, part)}, {positions:,} positions, {units.size(size)}, "
        f"{size / max(positions, 1):.1f} bytes and {kept / max(positions, 1):.1f} entries a position"
    )
