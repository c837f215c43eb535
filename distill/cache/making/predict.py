"""The teacher under Lightning's `Trainer.predict`: batches that never straddle shards, and a prediction writer."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from distill.cache.format.folder import Manifest
from distill.cache.format.records import Documents, Record
from distill.cache.making.background import BackgroundWriter
from distill.cache.making.extract import Scratch, extract
from distill.models.language_model import Head, LanguageModel, hidden_states_of
from distill.models.micro_batches import no_room
from distill.models.together import Together, most_samples
from distill.system import interrupt
from distill.system.memory import free_memory, is_out_of_memory
from distill.system.progress import Progress, say
from distill.targets.schemes import AnyScheme

Place = tuple[int, int]
"""Place of a sample: the number of its batch among those that go together, and its row there."""
Batch = tuple[Tensor, Tensor, Tensor]
"""Token ids, position ids and loss mask `[B, L]`."""


class ShardBatches:
    """A batch sampler: the samples of the given shards in order. A batch depends on its shard and batch size alone.

    Args:
        batch_size: tells how many samples of a shard make a batch. If the answer has changed after a batch (the teacher
            ran out of memory), the shard begins anew, so that all its batches have one size.
        begun: tells how many samples of a shard are finished when its turn comes.
        together: tells how many batches come as one, because the teacher takes them through its layers together.
    """

    def __init__(
        self,
        manifest: Manifest,
        shards: list[int],
        batch_size: Callable[[int], int],
        begun: Callable[[int], int] = lambda shard: 0,
        together: Callable[[], int] = lambda: 1,
    ) -> None:
        self.manifest, self.shards, self.batch_size, self.begun = manifest, shards, batch_size, begun
        self.together = together

    def __iter__(self) -> Iterator[list[int]]:
        for shard in self.shards:
            samples, start = self.manifest.shard_range(shard), self.begun(shard)
            while start < len(samples):
                size = self.batch_size(shard)
                end = start + size * self.together()
                yield list(samples[start:end])
                start = end if self.batch_size(shard) == size else 0

    def __len__(self) -> int:
        """Return an upper bound of the number of batches, since batches that were too large come again in halves."""
        return 2 * sum(len(self.manifest.shard_range(shard)) for shard in self.shards)


def shard_loader(
    samples: Dataset,
    manifest: Manifest,
    shards: list[int],
    batch_size: Callable[[int], int],
    begun: Callable[[int], int] = lambda shard: 0,
    together: Callable[[], int] = lambda: 1,
    pin_memory: bool = False,
) -> DataLoader:
    """Return a loader of the samples of unfinished shards; for its functions see `ShardBatches`.

    `samples[i]` holds `input_ids`, `position_ids`, `loss_mask`, and, where a corpus made it, `document_hash` and
    `source` of each position. With `pin_memory`, Lightning's copies to a CUDA device do not wait for one another.
    """
    batches = ShardBatches(manifest, shards, batch_size, begun, together)
    return DataLoader(samples, batch_sampler=batches, pin_memory=pin_memory)


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
        chunk_size: int = 512,
        each: Callable[[Iterator[Place]], Iterator[Place]] = iter,
    ) -> None:
        """Set up the module; `each` is a hook around a batch's samples, by which a forecast leaves out repetitions."""
        super().__init__()
        self.teacher, self.vocab_size, self.scheme = teacher, vocab_size, scheme
        self.seed, self.temperature, self.chunk_size, self.each = seed, temperature, chunk_size, each
        self.block_bytes: int | None = None
        """Size of a block of `Scratch`; None for that of the device."""
        self.together = Together(teacher)
        self.batch_size: int | None = None
        """Samples of a forward pass; what `predict_step` gets may be several of them. None means all of it."""

    @classmethod
    def of_cache(cls, teacher: LanguageModel, manifest: Manifest, chunk_size: int) -> TeacherModule:
        """Make the module whose records a cache of this manifest holds."""
        return cls(
            teacher,
            manifest.vocab_size,
            manifest.make_scheme(),
            seed=manifest.seed,
            temperature=manifest.temperature,
            chunk_size=chunk_size,
        )

    @torch.no_grad()
    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> list[Record]:
        """Return the records of a batch's samples; none if memory ran out and a smaller batch may find room."""
        tensors = [batch[name] for name in ("input_ids", "position_ids", "loss_mask")]
        size = min(self.batch_size or len(tensors[0]), len(tensors[0]))
        batches: list[Batch] = list(zip(*(tensor.split(size) for tensor in tensors), strict=True))
        while True:
            count: int = self.together.batches
            records: list[Record] = []
            try:
                for start in range(0, len(batches), count):
                    records += self._records(batches[start : start + count])
                return records
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if size == 1 and count == 1:
                    raise no_room(tensors[0].shape[1]) from None
            free_memory()  # outside of `except`, which holds the tensors of the failed pass
            if not self.together.halve():
                return []

    def _records(self, batches: list[Batch]) -> list[Record]:
        """Return the records of the samples of batches whose forward passes go together."""
        read = []
        for ids_BL, positions_BL, mask_BL in batches:
            end = _read_length(mask_BL)
            read.append((ids_BL[:, :end], positions_BL[:, :end]))
        hidden = hidden_states_of(self.teacher, read)
        head = self.teacher.head.with_rows(self.vocab_size)
        size, length = batches[0][0].shape
        most = most_samples(length, hidden[0].shape[-1], hidden[0].itemsize)
        self.together.learn(len(batches), size, most)
        places = ((number, row) for number, hidden_BLD in enumerate(hidden) for row in range(len(hidden_BLD)))
        scratch = Scratch(self.block_bytes)  # of a batch: the body's activations take its place
        made = []
        for number, row in self.each(places):
            ids_L, positions_L, mask_L = (tensor_BL[row] for tensor_BL in batches[number])
            made.append(self._record(hidden[number][row], ids_L, positions_L, mask_L, head, scratch))
        return made

    def _record(
        self, hidden_LD: Tensor, ids_L: Tensor, positions_L: Tensor, mask_L: Tensor, head: Head, scratch: Scratch
    ) -> Record:
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
            scratch=scratch,
        )


def _read_length(mask_BL: Tensor) -> int:
    """Return how many positions of a batch the teacher reads: up to the last one with loss, in multiples of 64.

    What follows, such as the padding of short documents, changes nothing before it.
    """
    with_loss = mask_BL.any(0).nonzero()
    last = int(with_loss[-1]) + 1 if len(with_loss) else 1
    return min(-(-last // 64) * 64, mask_BL.shape[1])


class ShardWriter(BasePredictionWriter):
    """A callback that hands each batch of records to the writer. It stops on request, late, or if the writer fails.

    `deadline` is the `time.monotonic()` after which no further batch begins.
    """

    def __init__(self, background: BackgroundWriter, progress: Progress, deadline: float = math.inf) -> None:
        super().__init__(write_interval="batch")
        self.background, self.writer, self.progress = background, background.writer, progress
        self.deadline = deadline
        self._shard, self._tokens = -1, 0
        """Shard of the last batch, and the tokens of it that were advanced by."""

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        interrupt.retake()

    def on_predict_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        first = trainer.predict_loop.current_batch_indices[0]
        cast(TeacherModule, pl_module).batch_size = self.writer.batch_size(self.writer.manifest.place(first)[0])

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
        assert batch_indices, "the batches are those of a `ShardBatches`"
        shard = self.writer.manifest.place(batch_indices[0])[0]
        if shard != self._shard:
            self._shard, self._tokens = shard, 0
        if prediction:
            self.background.add(shard, _with_documents(prediction, batch), self.writer.batch_size(shard))
        self._advance(batch["input_ids"].numel() if prediction else -self._tokens)
        if not prediction:
            before = min(self.writer.batch_size(shard), len(batch_indices))
            say(f"out of memory with {before} samples a forward pass; from here on {self.writer.halve(before)}")
        self.background.check()
        interrupt.stop_if_asked()
        if time.monotonic() >= self.deadline:
            say("cache.max_time is over")
            raise interrupt.Interrupted("cache.max_time is over")

    def _advance(self, tokens: int) -> None:
        self._tokens += tokens
        size, positions = self.background.bytes, self.background.positions
        self.progress.advance(tokens, written=f"{size / positions:.1f} bytes/position" if positions else "")


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
