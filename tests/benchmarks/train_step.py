"""A training step from a cache beside the same step with materialised logits, through the same Trainer.

`python tests/benchmarks/bench.py --only train_step`. The student has the demo's sizes with any weights: 8 layers of
SmolLM2-135M. The peer learns from the text alone: all logits, cross-entropy with the true tokens, autograd. Both have
the same optimiser, clipping and guard. Data wait is the time from a step's end to the next one's begin, in which a
batch is read from disk and decoded.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from paired import Cost, Pairs, Row, Setup, allocator_peak, cost, number_row
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from distill.cache.format.folder import Manifest
from distill.cache.making.extract import extract
from distill.cache.making.writer import CacheWriter
from distill.cache.reading.reader import CacheReader
from distill.losses.objective import Mixture
from distill.models.huggingface import HuggingFaceLanguageModel
from distill.models.language_model import Head
from distill.targets.next_token import next_ids
from distill.training.data import CacheDataModule
from distill.training.module import DistillationModule
from distill.training.optimizers.adamw import make_optimizer
from distill.training.optimizers.schedule import Schedule
from distill.training.trainer import make_trainer

STEPS = 2
"""Steps that are measured, after one that is not."""


@dataclass(frozen=True)
class Size:
    """Sizes of the student and of a step."""

    vocabulary: int = 49_152
    hidden: int = 576
    layers: int = 8
    samples: int = 8
    length: int = 512


def rows(setup: Setup) -> Iterator[Row]:
    """Yield tokens a second, peak memory and data wait, in both precisions."""
    size = Size(512, 32, 2, 2, 32) if setup.tiny else Size()
    with tempfile.TemporaryDirectory() as folder:
        reader = CacheReader(make_cache(Path(folder), size), "train")
        for precision, speed in (("bf16-mixed", "≥ 1.2"), ("32-true", "≥ 1.05")):
            yield from _rows_of(Setting(setup, size, reader, precision), speed)


@dataclass(frozen=True)
class Setting:
    """One precision's measurements."""

    setup: Setup
    size: Size
    reader: CacheReader
    precision: str

    def train(self, kind: type[DistillationModule], steps: int) -> Clock:
        """Train for some steps."""
        clock = Clock(self.setup.device)
        trainer = make_trainer(
            accelerator=self.setup.device,
            devices=1,
            num_nodes=1,
            strategy="auto",
            precision=self.precision,
            epochs=steps,
            max_steps=steps,
            log_every_steps=steps + 1,
            loggers=[],
            callbacks=[clock],
        )
        data = CacheDataModule(self.reader, None, step_samples=self.size.samples, batch_size=self.size.samples, seed=0)
        trainer.fit(make_module(kind, self.size), datamodule=data)
        return clock


def _rows_of(setting: Setting, speed: str) -> Iterator[Row]:
    size, setup = setting.size, setting.setup
    case = f"{setting.precision}, {size.samples} x {size.length}, D {size.hidden}, V {size.vocabulary:,}"
    clocks: dict[type[DistillationModule], list[Clock]] = {DistillationModule: [], Materialised: []}
    for repeat in range(setup.repeats):
        for kind in list(clocks) if repeat % 2 == 0 else reversed(list(clocks)):
            clocks[kind].append(setting.train(kind, 1 + STEPS))
    ours, peer = ([clock.cost for clock in found] for found in clocks.values())
    yield Pairs(ours, peer).speed_row("train_step", case, "tokens/s of materialised logits", speed)
    peaks = [allocator_peak(lambda kind=kind: partial(setting.train, kind, 1), setup.device) for kind in clocks]
    yield number_row("train_step", case, "peak memory of materialised logits", *peaks, form="{:,.0f} B", aim="≤ 0.5")
    found = clocks[DistillationModule]
    waited = sum(clock.wait for clock in found) / len(found) / STEPS
    whole = sum(clock.cost.wall for clock in found) / len(found) / STEPS
    yield number_row("train_step", case, "data wait as a share of a step", waited, whole, "{:.4f} s", "≤ 0.02")


@dataclass
class Clock(pl.Callback):
    """The time of all steps but the first, from one step's end to the next one's."""

    device: str
    wait: float = 0.0
    cost: Cost = field(default_factory=lambda: Cost(0.0, 0.0))
    _begun: Any = field(default=None, repr=False)
    _ended: float = 0.0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self._begun is not None:
            self.wait += time.perf_counter() - self._ended

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        cost(lambda: None, self.device)  # waits for the device
        if self._begun is None:
            self._begun = _now()
        else:
            self.cost = Cost(*(b - a for a, b in zip(self._begun, _now(), strict=True)))
        self._ended = time.perf_counter()


def _now() -> Sequence[float]:
    return time.perf_counter(), time.process_time()


class Materialised(DistillationModule):
    """The plain way: logits of all positions, cross-entropy of the true tokens, everything else as ours."""

    def _losses(self, on_host: Any, objective: Mixture) -> tuple[Tensor, Tensor]:
        batch = on_host.to(self.device)
        hidden_BLD = self.student.body(batch.input_ids_BL, batch.position_ids_BL)
        logits_BLV = self.student.head(hidden_BLD)
        true_N = next_ids(batch.input_ids_BL, batch.loss_mask_BL)
        loss = nn.functional.cross_entropy(logits_BLV[batch.loss_mask_BL].float(), true_N, reduction="sum")
        return loss, torch.zeros_like(loss)


def make_module(kind: type[DistillationModule], size: Size) -> DistillationModule:
    """Make the module of a fresh student of the demo's shape."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.hidden * 8 // 3,
        num_hidden_layers=size.layers,
        num_attention_heads=max(size.hidden // 64, 1),
        num_key_value_heads=max(size.hidden // 192, 1),
        tie_word_embeddings=True,
    )
    optimizer: Callable[[nn.Module], Any] = partial(
        make_optimizer, name="adamw", learning_rate=1e-4, weight_decay=0.1, betas=(0.9, 0.95)
    )
    return kind(
        HuggingFaceLanguageModel(LlamaForCausalLM(config)),
        vocab_size=size.vocabulary,
        objective=Mixture(0.0),
        chunk_size=256,
        micro_batch=size.samples,
        make_optimizer=optimizer,
        make_schedule=lambda total: Schedule("cosine", total, 0.0, 0.2, 1.0),
        gradient_clip=1.0,
    )


def make_cache(folder: Path, size: Size) -> Path:
    """Write a cache of two steps: random text, two documents a sample, targets of sharpened random logits."""
    manifest = Manifest(
        scheme="varopt",
        scheme_parameters={"threshold": 0.02},
        temperature=1.0,
        seed=0,
        vocab_size=size.vocabulary,
        sequence_length=size.length,
        pack=True,
        shard_samples=2 * size.samples,
        splits={"held_out": 0, "train": 2 * size.samples},
        fingerprints={"teacher_weights": "synthetic"},
        made_with={},
    )
    generator, L = torch.Generator().manual_seed(0), size.length
    head, scheme = Head(torch.randn(size.vocabulary, 32, generator=generator)), manifest.make_scheme()
    hidden_LD = torch.randn(L, 32, generator=generator) * (0.6 + torch.rand(L, 1, generator=generator))
    ids_L = torch.randint(size.vocabulary, (L,), generator=generator)
    mask_L, positions_L = torch.arange(L) % (L // 2) < L // 2 - 1, torch.arange(L) % (L // 2)
    record = extract(hidden_LD, head, ids_L, positions_L, mask_L, scheme, seed=0)
    CacheWriter(folder / "cache", manifest).write(0, [record] * len(manifest.shard_range(0)))
    return folder / "cache"


if __name__ == "__main__":
    for row in rows(Setup(repeats=3)):
        print(row)
