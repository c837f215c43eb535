"""`distill cache-teacher`: the teacher reads the corpus once and its answers go to disk."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
from torch.utils.data import ConcatDataset, Subset

from distill import interrupt
from distill.cache.format import Manifest, read_journal
from distill.cache.head import save_head
from distill.cache.predict import ShardWriter, TeacherModule, shard_loader
from distill.cache.writer import CacheWriter
from distill.config import Experiment
from distill.corpus import SampleSets
from distill.progress import Progress, say
from distill.workspace import Folders, Teacher, make_manifest, make_run_folder, open_samples


def main(experiment: Experiment) -> int:
    """Make the cache, or what is missing of it."""
    folders = Folders.of(experiment)
    make_run_folder(folders)
    teacher = Teacher(experiment)
    samples = open_samples(experiment, teacher)
    manifest = make_manifest(experiment, teacher, samples)
    _describe(experiment, manifest, samples)
    writer = CacheWriter(folders.cache, manifest, overwrite=experiment.cache.overwrite)
    _save_tokenizer(teacher, folders.cache / "tokenizer")
    shards = writer.missing()
    if not shards:
        say(f"cache: {folders.cache} is complete ({manifest.shards} shards); nothing to do")
        return 0
    if len(shards) < manifest.shards:
        say(f"cache: {manifest.shards - len(shards)} of {manifest.shards} shards are there; continuing")
    _predict(experiment, teacher, samples, writer, shards)
    _summarise(folders, manifest)
    return 0


def _save_tokenizer(teacher: Teacher, folder: Path) -> None:
    """Beside the cache, once: it is the cache's own, as its fingerprint says."""
    if folder.exists():
        return
    unfinished = folder.with_name("tokenizer.tmp")
    teacher.tokenizer.save_pretrained(unfinished)
    unfinished.rename(folder)


def _describe(experiment: Experiment, manifest: Manifest, samples: SampleSets) -> None:
    train, held_out = (stop - start for start, stop in (manifest.splits["train"], manifest.splits["held_out"]))
    teacher = experiment.teacher
    say(f"teacher: {teacher.model}, {manifest.fingerprints['quantization']}, {manifest.vocab_size:,} tokens")
    say(
        f"corpus: {experiment.corpus.path}, {train:,} of {len(samples.train):,} training samples and "
        f"{held_out:,} held out, {manifest.sequence_length} tokens each"
    )
    left_out = samples.empty_documents + samples.unlearnable_documents
    if left_out:
        say(f"corpus: {left_out:,} documents left out ({samples.empty_documents} empty, others with no token to learn)")


def _predict(
    experiment: Experiment, teacher: Teacher, samples: SampleSets, writer: CacheWriter, shards: list[int]
) -> None:
    manifest = writer.manifest
    splits = {"held_out": samples.held_out, "train": samples.train}
    numbered: ConcatDataset = ConcatDataset(
        [Subset(splits[name], range(stop - start)) for name, (start, stop) in manifest.splits.items() if stop > start]
    )
    loader = shard_loader(numbered, manifest, shards, experiment.cache.batch_size)
    model = teacher.load(experiment.corpus.pack)
    if manifest.scheme == "hidden":
        save_head(writer.folder, model.head.with_rows(manifest.vocab_size))
    module = TeacherModule(
        model,
        manifest.vocab_size,
        writer.scheme,
        seed=manifest.seed,
        temperature=manifest.temperature,
        chunk_size=experiment.cache.chunk_size,
    )
    total = manifest.samples * manifest.sequence_length
    to_do = sum(len(manifest.shard_range(shard)) for shard in shards) * manifest.sequence_length
    with Progress("cache-teacher", total, "tokens", done=total - to_do) as progress, interrupt.deferred():
        trainer = pl.Trainer(
            accelerator=teacher.device.type,
            devices=1,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            inference_mode=False,
            callbacks=[ShardWriter(writer, shards, progress)],
        )
        trainer.predict(module, loader, return_predictions=False)


def _summarise(folders: Folders, manifest: Manifest) -> None:
    entries = read_journal(folders.cache).values()
    size, positions = sum(entry.bytes for entry in entries), sum(entry.positions for entry in entries)
    kept = sum(entry.entries for entry in entries)
    say(
        f"cache: {folders.cache}, {positions:,} positions, {size / 1e6:,.1f} MB, "
        f"{size / max(positions, 1):.1f} bytes and {kept / max(positions, 1):.1f} entries a position"
    )
