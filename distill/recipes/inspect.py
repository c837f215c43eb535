"""`distill inspect`: a cache's content, and a check that it is whole."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from distill.cache.format.folder import MANIFEST, read_journal, read_manifest
from distill.cache.format.head import load_head
from distill.cache.format.tokenizer_files import checked_tokenizer
from distill.cache.making.repair import repair as repair_cache
from distill.cache.reading.batches import Batch
from distill.cache.reading.reader import CacheReader
from distill.cache.reading.statistics import alternatives, document_lines, gather, histogram
from distill.cache.reading.storage import Storage, is_url, open_storage
from distill.cache.reading.verify import verify as verify_cache
from distill.errors import UserError
from distill.experiment.configuration import Experiment
from distill.experiment.folders import cache_in
from distill.experiment.place import Place
from distill.experiment.teacher import Teacher
from distill.experiment.teacher_sections import CorpusConfig, TeacherConfig
from distill.losses.chunks import ChunkTarget, DenseChunk, SparseChunk
from distill.losses.divergences import forward_kl
from distill.models import checkpoints
from distill.models.language_model import Head, hidden_states
from distill.models.tokenizers import load_folder_tokenizer
from distill.system import units
from distill.system.progress import say
from distill.targets.hidden import HiddenTargets
from distill.targets.next_token import next_ids

_MOST_LINES = 50
_COMPARED = 8
"""Samples that are compared with the teacher."""


def main(
    cache: str, verify: bool = False, repair: bool = False, sample: int | None = None, teacher: str | None = None
) -> int:
    """Describe the cache in a folder, in a run folder or at a URL.

    `verify` reads all of it (exit status 1 on a difference), `repair` drops what is bad.

    `sample` prints a training sample with the teacher's alternatives instead; `teacher` (its name) has some targets
    compared with the dense distributions they stand for.
    """
    if is_url(cache) and (verify or repair):
        raise UserError(
            f"{cache}: --verify and --repair read a folder: copy the cache there first. What is read from a URL is "
            "checked against its hashes each time that it is copied"
        )
    if not is_url(cache) and not Path(cache).is_dir():
        raise UserError(f"{cache}: no such folder")
    storage = open_storage(cache if is_url(cache) else cache_in(Path(cache)))
    folder = storage.folder
    if (sample is not None) + (teacher is not None) + (verify or repair) > 1:
        raise UserError("--sample, --teacher, and --verify or --repair: give one at a time")
    if sample is not None:
        return _show_sample(storage, sample)
    if repair:
        _repair(folder)
    if verify:
        return _verify(folder)
    if not repair:
        _describe(storage)
    if teacher is not None:
        _compare(storage, teacher)
    return 0


def _describe(storage: Storage) -> None:
    manifest, journal = read_manifest(storage.folder), read_journal(storage.folder)
    entries = journal.values()
    positions = max(sum(entry.positions for entry in entries), 1)
    size = sum(entry.bytes for entry in entries)
    parameters = ", ".join(f"{name} {value}" for name, value in manifest.scheme_parameters.items())
    say(f"cache            {storage.name}")
    say(f"scheme           {manifest.scheme} ({parameters}), temperature {manifest.temperature}, seed {manifest.seed}")
    say(f"format version   {manifest.version}")
    for name, count in sorted(manifest.splits.items()):
        say(f"{name:<16} {count:,} samples of {manifest.sequence_length} tokens")
    say(f"vocabulary       {manifest.vocab_size:,} tokens")
    say(f"shards           {len(journal)} of {manifest.shards}")
    say(f"positions        {sum(entry.positions for entry in entries):,}")
    say(f"size             {units.size(size)}, {size / positions:.1f} bytes a position")
    say(f"entries          {sum(entry.entries for entry in entries) / positions:.1f} a position")
    for name, value in sorted(manifest.fingerprints.items()):
        say(f"{name:<16} {value}")
    for name, value in sorted(manifest.made_with.items()):
        say(f"{name:<16} {value}")
    if len(journal) == manifest.shards:
        _describe_samples(CacheReader(storage, "train"))


def _describe_samples(reader: CacheReader) -> None:
    statistics = gather(reader)
    n = max(statistics.positions, 1)
    say(f"\nof {statistics.samples:,} training samples, {statistics.positions:,} positions with loss:")
    say(f"entropy          {statistics.entropy:.3f} nats")
    say(f"teacher's nll    {statistics.surprisal:.3f} nats")
    if statistics.exact_mass is not None:
        say(f"exact mass       {statistics.exact_mass:.1%} kept as it is, the rest sampled or in a bucket")
    for name, size in statistics.bytes_by_field.items():
        say(f"  {name:<22} {size / n:6.2f} bytes a position")
    for entries, share in histogram(statistics.entries):
        say(f"  {entries:>9} entries {share:6.1%}  {'#' * round(40 * share)}")


def _show_sample(storage: Storage, number: int) -> int:
    reader = CacheReader(storage, "train")
    if not 0 <= number < len(reader):
        raise UserError(f"--sample {number}: the cache has training samples 0 to {len(reader) - 1}")
    tokenizer = load_folder_tokenizer(checked_tokenizer(storage.folder))
    for line in (*document_lines(reader, number), *alternatives(reader, number, tokenizer)):
        say(line)
    return 0


def _compare(storage: Storage, name: str) -> None:
    """Print the distance of the targets' KL from that of the dense distributions, if student = teacher."""
    import torch

    reader = CacheReader(storage, "train")
    manifest = reader.manifest
    checkpoint = checkpoints.resolve(name)
    found, expected = checkpoints.fingerprints(checkpoint)["weights"], manifest.fingerprints["teacher_weights"]
    if found != expected:
        raise UserError(f"{name} is not this cache's teacher (expected sha256 {expected[:12]}…, found {found[:12]}…)")
    as_it_is, _, compute_dtype = manifest.fingerprints["quantization"].rpartition(", ")
    quantization = as_it_is.partition("+")[0].partition(" ")[0]
    experiment = Experiment(
        CorpusConfig("", sequence_length=manifest.sequence_length, pack=manifest.pack),
        TeacherConfig(name, quantization, compute_dtype),  # type: ignore[arg-type]  # as the cache's teacher had them
    )
    teacher = Teacher(experiment, Place.host()).load()
    head = load_head(storage.folder) if manifest.scheme == "hidden" else None
    errors = []
    for index in range(min(len(reader), _COMPARED)):
        batch = reader.collate([reader[index]])
        with torch.no_grad():
            hidden_ND = hidden_states(teacher, batch.input_ids_BL, batch.position_ids_BL)[batch.loss_mask_BL]
            logits_NV = teacher.head.with_rows(manifest.vocab_size)(hidden_ND).float() / manifest.temperature
            true_ids_N = next_ids(batch.input_ids_BL, batch.loss_mask_BL)
            errors.append(forward_kl(logits_NV, _chunk(batch, true_ids_N, head, manifest.temperature)))
    errors_N = torch.cat(errors)
    say(f"\nagainst the dense distributions of {name}, {len(errors_N):,} positions, student = teacher:")
    say(f"KL               {errors_N.mean():+.4f} nats on average (exact: 0)")
    say(f"KL, a position   {errors_N.square().mean().sqrt():.4f} nats root mean square")


def _chunk(batch: Batch, true_ids_N: Tensor, head: Head | None, temperature: float) -> ChunkTarget:
    targets = batch.targets
    if isinstance(targets, HiddenTargets):
        assert head is not None
        return DenseChunk(targets.hidden_ND, head, true_ids_N, temperature)
    return SparseChunk(*targets.padded(), batch.entropy_N, true_ids_N, targets.rest_N)


def _repair(folder: Path) -> None:
    actions = repair_cache(folder)
    for action in actions:
        say(action)
    say("repaired: run `distill cache-teacher` again, it makes what is missing" if actions else "nothing to repair")


def _verify(folder: Path) -> int:
    try:
        report = verify_cache(folder)
    except UserError as error:
        if not (folder / MANIFEST).exists():
            raise
        say(str(error))
        return 1
    for problem in report.problems[:_MOST_LINES]:
        say(f"{problem.file} {problem.problem}: {problem.remedy}")
    if len(report.problems) > _MOST_LINES:
        say(f"... and {len(report.problems) - _MOST_LINES} more")
    not_made = f", {report.to_do} not made yet" if report.to_do else ""
    say(f"verified: {report.whole} shards whole, {report.bad} not{not_made}")
    return 1 if report.problems else 0
