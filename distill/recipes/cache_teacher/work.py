"""The cache that an experiment asks for: its text, its manifest, and the shards that are missing."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from distill.cache.format import version1
from distill.cache.format.folder import MANIFEST, Manifest, differences, read_journal, read_manifest
from distill.cache.format.head import HEAD
from distill.cache.format.leftovers import is_unused
from distill.cache.format.part import Part
from distill.cache.format.token_order import TokenOrder, save_order
from distill.cache.format.tokenizer_files import save_tokenizer
from distill.cache.making.growing import joined
from distill.cache.making.parts import claim_part
from distill.cache.making.writer import CacheWriter
from distill.corpus import SampleSets
from distill.errors import UserError
from distill.experiment.cache import as_begun, begun_in, check_tokens, make_manifest, make_token_order
from distill.experiment.configuration import Experiment
from distill.experiment.folders import Folders
from distill.experiment.teacher import NOTHING_BEGUN, Teacher, open_samples
from distill.recipes.cache_teacher.budget import within_budget
from distill.recipes.cache_teacher.telling import describe, named
from distill.system.progress import say


@dataclass(frozen=True)
class Work:
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
    def of(cls, experiment: Experiment, folders: Folders, teacher: Teacher, part: Part | None) -> Work:
        """Open the corpus, and find the threshold of a budget."""
        found = read_manifest(folders.cache) if is_begun(experiment, folders) else None
        samples = open_samples(experiment, teacher, NOTHING_BEGUN if found is None else begun_in(folders))
        order = make_token_order(experiment, teacher, samples)
        experiment = within_budget(experiment, found, teacher, samples, order)
        manifest = make_manifest(experiment, teacher, samples, order)
        asked = manifest.splits
        if found is not None:
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
        describe(self.experiment, self.manifest, self.asked, self.samples)

    def say_complete(self) -> None:
        """Tell that no shard is missing."""
        say(f"cache: {named(self.folders, self.part)} is complete ({len(self.shards)} shards); nothing to do")


def is_begun(experiment: Experiment, folders: Folders) -> bool:
    """Tell whether the folder holds answers of a teacher that the experiment goes on with."""
    is_there = (folders.cache / MANIFEST).exists() and not is_unused(folders.cache)
    return is_there and not experiment.cache.overwrite


def is_of_version_1(experiment: Experiment, folders: Folders) -> bool:
    """Tell whether an earlier release began the cache, in a format that is read and not written."""
    return is_begun(experiment, folders) and read_manifest(folders.cache).version == version1.VERSION


def lacks_head(folders: Folders, manifest: Manifest) -> bool:
    """Tell whether hidden states are cached whose head is not there yet."""
    return manifest.scheme == "hidden" and not (folders.cache / HEAD).exists()


def is_finished(folders: Folders, manifest: Manifest, shards: Collection[int]) -> bool:
    """Tell whether the process of rank 0, on another machine, found nothing to do."""
    try:
        found = read_manifest(folders.cache)
    except UserError:
        return False
    journal = read_journal(folders.cache, found)
    done = not differences(manifest, found) and all(shard in journal for shard in shards)
    return done and not lacks_head(folders, manifest)
