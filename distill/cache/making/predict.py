"""The teacher under Lightning's `Trainer.predict`: batches that never straddle shards, and a prediction writer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from distill.cache.format.folder import Manifest
from distill.cache.format.records import Documents, Record
from distill.cache.making.background import BackgroundWriter
from distill.cache.making.extract import extract
from distill.models.language_model import LanguageModel, hidden_states
from distill.system import interrupt
from distill.system.progress import Progress
from distill.targets.schemes import AnyScheme

Sample = tuple[Tensor, Tensor, Tensor, Tensor]
"""Hidden states, token ids, position ids and loss mask of one sample."""


class ShardBatches:
    """A batch sampler: the samples of the given shards in order. A batch depends on its shard alone."""

    def __init__(self, manifest: Manifest, shards: list[int], batch_size: Callable[[int], int]) -> None:
        """Set up the batches; `batch_size` tells how many samples of a shard make a batch."""
        self.batches = [
            list(samples[start : start + batch_size(shard)])
            for shard in shards
            for samples in [manifest.shard_range(shard)]
            for start in range(0, len(samples), batch_size(shard))
        ]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def shard_loader(
    samples: Dataset, manifest: Manifest, shards: list[int], batch_size: Callable[[int], int]
) -> DataLoader:
    """Return a loader of the samples of unfinished shards.

    `samples[i]` holds `input_ids`, `position_ids`, `loss_mask`, and, where a corpus made it, `document_hash` and
    `source` of each position.
    """
    return DataLoader(samples, batch_sampler=ShardBatches(manifest, shards, batch_size))


class TeacherModule(pl.LightningModule):
    """The teacher under Lightning, from samples to records: the body on the batch, then head and scheme in chunks."""

    def __init__(
        self,
        teacher: LanguageModel,
        vocab_size: int,
        scheme: AnyScheme,
        *,
        seed: int,
        temperature: float = 1.0,
        chunk_size: int = 256,
        each: Callable[[Iterator[Sample]], Iterator[Sample]] = iter,
    ) -> None:
        """Set up the module; `each` is a hook around a batch's samples, by which a forecast leaves out repetitions."""
        super().__init__()
        self.teacher, self.vocab_size, self.scheme = teacher, vocab_size, scheme
        self.seed, self.temperature, self.chunk_size, self.each = seed, temperature, chunk_size, each

    @torch.no_grad()
    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> list[Record]:
        ids_BL, positions_BL, mask_BL = batch["input_ids"], batch["position_ids"], batch["loss_mask"]
        hidden_BLD = hidden_states(self.teacher, ids_BL, positions_BL)
        head = self.teacher.head.with_rows(self.vocab_size)
        samples = zip(hidden_BLD, ids_BL, positions_BL, mask_BL, strict=True)
        return [self._record(*sample, head) for sample in self.each(samples)]

    def _record(self, hidden_LD: Tensor, ids_L: Tensor, positions_L: Tensor, mask_L: Tensor, head: Any) -> Record:
        return extract(
            hidden_LD,
            head,
            ids_L,
            positions_L,
            mask_L,
            self.scheme,
            seed=self.seed,
            temperature=self.temperature,
            chunk_size=self.chunk_size,
        )


class ShardWriter(BasePredictionWriter):
    """A callback that collects records and hands a shard over as soon as it is whole; it stops if the writer fails."""

    def __init__(self, writer: BackgroundWriter, shards: list[int], progress: Progress) -> None:
        super().__init__(write_interval="batch")
        self.writer, self.progress = writer, progress
        self._shards = iter(shards)
        self._pending: list[Record] = []
        self._shard: int | None = next(self._shards, None)

    def write_on_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        self._pending += _with_documents(prediction, batch)
        assert self._shard is not None
        if len(self._pending) == len(self.writer.manifest.shard_range(self._shard)):
            self.writer.write(self._shard, self._pending)
            self._shard, self._pending = next(self._shards, None), []
        self.writer.check()
        interrupt.stop_if_asked()
        size, positions = self.writer.bytes, self.writer.positions
        written = f"{size / positions:.1f} bytes/position" if positions else ""
        self.progress.advance(sum(len(record.input_ids_L) for record in prediction), written=written)


def _with_documents(records: list[Record], batch: dict[str, Tensor]) -> list[Record]:
    """Return a batch's records with the documents that their positions come from, if the batch knows them."""
    if "document_hash" not in batch:
        return records
    hash_BL, source_BL = (batch[name].cpu().numpy() for name in ("document_hash", "source"))
    made = []
    for record, hash_L, source_L in zip(records, hash_BL, source_BL, strict=True):
        starts = record.position_ids_L == 0
        documents = Documents(hash_L[starts].view(np.uint64), source_L[starts].astype(np.uint32))
        made.append(replace(record, documents=documents))
    return made
