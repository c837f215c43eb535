"""The teacher under Lightning's `Trainer.predict`: batches that never straddle shards, and a prediction writer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from distill.cache.format.folder import Manifest
from distill.cache.format.records import Record
from distill.cache.making.background import BackgroundWriter
from distill.cache.making.extract import extract
from distill.models.language_model import LanguageModel, hidden_states
from distill.system import interrupt
from distill.system.progress import Progress
from distill.targets.schemes import AnyScheme

Sample = tuple[Tensor, Tensor, Tensor, Tensor]
"""Hidden states, token ids, position ids and loss mask of one sample."""


class ShardBatches:
    """Batch sampler: the samples of the given shards in order; a batch depends on its shard alone."""

    def __init__(self, manifest: Manifest, shards: list[int], batch_size: int) -> None:
        self.batches = [
            list(samples[start : start + batch_size])
            for shard in shards
            for samples in [manifest.shard_range(shard)]
            for start in range(0, len(samples), batch_size)
        ]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def shard_loader(samples: Dataset, manifest: Manifest, shards: list[int], batch_size: int) -> DataLoader:
    """Loader of the samples of unfinished shards. `samples[i]` holds `input_ids`, `position_ids`, `loss_mask`."""
    return DataLoader(samples, batch_sampler=ShardBatches(manifest, shards, batch_size))


class TeacherModule(pl.LightningModule):
    """Samples to records: the body on the batch, then head and scheme sample by sample in chunks."""

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
        """`each`: hook around the samples of a batch; a forecast leaves out those that are like earlier ones."""
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
    """Collects records and hands a shard over as soon as it is whole; stops when the writer could not go on."""

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
        self._pending.extend(prediction)
        assert self._shard is not None
        if len(self._pending) == len(self.writer.manifest.shard_range(self._shard)):
            self.writer.write(self._shard, self._pending)
            self._shard, self._pending = next(self._shards, None), []
        self.writer.check()
        interrupt.stop_if_asked()
        size, positions = self.writer.bytes, self.writer.positions
        written = f"{size / positions:.1f} bytes/position" if positions else ""
        self.progress.advance(sum(len(record.input_ids_L) for record in prediction), written=written)
