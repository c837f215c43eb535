"""The teacher's reading: it predicts the shards that are missing, and they go to disk."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from torch.utils.data import ConcatDataset, Subset

from distill.cache.format.folder import SPLITS
from distill.cache.format.head import save_head
from distill.cache.format.leftovers import is_unused
from distill.cache.making.begin_token import check_begin_token
from distill.cache.making.predict import TeacherModule
from distill.cache.making.processes import ShardShares, predict
from distill.cache.making.writer import CacheWriter
from distill.experiment.cache import sample_numbers
from distill.recipes.cache_teacher.work import Work, lacks_head
from distill.system import interrupt
from distill.system.locks import cannot_write
from distill.system.progress import Progress


def predict_missing(work: Work, trainer: pl.Trainer, deadline: float) -> None:
    """Make the shards that are missing. Raises Interrupted when asked to stop, or at the `deadline`."""
    folders, manifest = work.folders, work.manifest
    splits = {"held_out": work.samples.held_out, "train": work.samples.train}
    numbers = sample_numbers(manifest, work.samples)
    numbered: ConcatDataset = ConcatDataset([Subset(splits[name], numbers[name]) for name in SPLITS if numbers[name]])
    model = work.teacher.load()
    if is_unused(folders.cache):
        _check_begin_token(work, model)
    if trainer.is_global_zero and lacks_head(folders, manifest):
        try:
            save_head(folders.cache, model.head.with_rows(manifest.vocab_size))
        except OSError as error:
            raise cannot_write(folders.cache, error) from None
    module = TeacherModule.of_cache(model, manifest, work.experiment.cache.chunk_size)
    world = trainer.world_size
    title = f"cache-teacher, process 1 of {world}" if world > 1 else "cache-teacher"
    with work.samples.ahead(), Progress(title, total=0, unit="tokens") as progress, interrupt.deferred():

        def open_writer() -> CacheWriter:
            return CacheWriter(folders.cache, manifest, batch_size=work.experiment.cache.micro_batch)

        predict(trainer, module, ShardShares(numbered, open_writer, work.shards, progress, deadline))


def _check_begin_token(work: Work, model: Any) -> None:
    """Raise UserError for a teacher that needs a beginning-of-text token which the samples do not have."""
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
        batch_tokens=cache.micro_batch * work.manifest.sequence_length,
        remedy=f"{where} that begins with {tokenizer.bos_token}",
    )
