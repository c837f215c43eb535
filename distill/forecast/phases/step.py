"""A training step's memory and work: the real trainer makes two steps with the real module on tensors without memory.

Shapes: B samples of an optimiser step, L sequence length, N positions, K entries of a target, D hidden size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from distill.cache.reading.batches import Batch
from distill.forecast.simulation.blocks import AlikeBlocks, NotAlike, alike_once
from distill.forecast.simulation.cuda import optimizer_on_cuda
from distill.forecast.simulation.fake import tracked
from distill.forecast.simulation.kernels import DeviceKind
from distill.forecast.simulation.repetition import EachKindOnce, first_two_alike
from distill.forecast.simulation.result import Simulation, all_tensors, result_of, tag_model
from distill.forecast.simulation.tracker import Tracker
from distill.forecast.simulation.work import Work
from distill.losses.fused import SCRATCH, Walk
from distill.targets.hidden import HiddenTargets
from distill.targets.sparse import SparseTargets
from distill.training.module import DistillationModule
from distill.training.optimizers.chunked_adamw import ChunkedAdamW
from distill.training.optimizers.step_in_backward import StepInBackward
from distill.training.trainer import make_trainer

STEPS = 2
"""Number of simulated steps. The first makes the optimiser's states; all others are like the second."""


@dataclass(frozen=True)
class StepShape:
    """One optimiser step's samples. The module's `micro_batch` determines the number of its passes."""

    samples: int
    length: int
    entries: int = 40
    """Entries of the step's longest sparse target."""
    hidden_size: int | None = None
    """Hidden size of the teacher, if its hidden states are the targets."""
    has_rest: bool = False
    """True if a target has a bucket for all other tokens (top_k)."""
    documents: int = 1
    """Documents packed into one sample."""


def simulate_step(
    make_module: Callable[[], DistillationModule],
    shape: StepShape,
    *,
    precision: str = "32-true",
    device: DeviceKind = "cpu",
    shortcuts: bool = True,
    alike_blocks_once: bool = True,
) -> Simulation:
    """Simulate memory and work of a training step, without memory for it.

    `make_module` builds student, optimiser and levers as for a training on a CPU. All tensors that it makes are fake,
    and checkpoints give their shapes alone. `precision` is the trainer's. With `shortcuts` the moments are made before
    the step, by an update that is forgotten, and alike chunks of an update run once; otherwise two whole steps run. For
    `alike_blocks_once` see `distill.forecast.simulation.blocks`; otherwise every block runs. The module's errors are
    raised.
    """
    # bfloat16 has the same size. Fake tensors are on a CPU, which has no float16 autocast.
    fake_precision = "bf16-mixed" if precision == "16-mixed" else precision
    try:
        with tracked(make_batch(shape), device) as (batch, tracker):
            return run_tracked(make_module, batch, tracker, fake_precision, shortcuts, alike_blocks_once)
    except NotAlike:
        return simulate_step(
            make_module, shape, precision=precision, device=device, shortcuts=shortcuts, alike_blocks_once=False
        )


def run_tracked(
    make_module: Callable[[], DistillationModule],
    batch: Batch,
    tracker: Tracker,
    precision: str,
    shortcuts: bool = False,
    alike_blocks_once: bool = False,
) -> Simulation:
    """Make the steps under a tracker that has been entered, on tensors of any kind."""
    with tracker.host() if tracker.device == "cuda" else nullcontext():  # where it waits for its passes
        tracker.tag(all_tensors(batch), "buffers and batch")
    module = make_module()
    tag_model(tracker, module)
    if module.teacher_head is not None:
        tracker.tag([module.teacher_head.weight_VD], "weights")
    module.make_optimizer = partial(_watched_optimizer, tracker, module.make_optimizer)
    module.loss_context = tracker.loss
    each = partial(first_two_alike, tracker=tracker, kind=lambda rows: rows.stop - rows.start) if shortcuts else iter
    module.loss_walk = Walk(SCRATCH[tracker.device], each)
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]  # copies tensors past torch
    # Lightning's last call after an error. It fails among tensors without memory, and its error would hide the first.
    module.cpu = lambda: module  # type: ignore[method-assign]
    tracker.forget()
    with alike_once(module.student, tracker) as blocks:
        # Offloaded tensors leave the device at moments that only blocks which run have.
        if not alike_blocks_once or module.saved_activations is not nullcontext:
            blocks.run_all()
        watch = _Watch(tracker, blocks, shortcuts)
        run_steps(module, batch, precision, [watch], steps=1 if shortcuts else STEPS)
    return result_of(tracker, watch.work, watch.update)


def run_steps(
    module: DistillationModule,
    batch: Batch,
    precision: str,
    callbacks: list[pl.Callback] | None = None,
    accelerator: str = "cpu",
    steps: int = STEPS,
) -> None:
    """Run optimiser steps of Lightning's trainer, as every training here uses it, on one batch again and again."""
    trainer = make_trainer(
        accelerator=accelerator,
        devices=1,
        num_nodes=1,
        strategy="auto",
        precision=precision,
        epochs=1,
        max_steps=steps,
        log_every_steps=steps + 1,
        loggers=[],
        callbacks=callbacks or [],
    )
    trainer.fit(module, _Repeat(batch, steps))


def make_batch(shape: StepShape, vocab_size: int = 2) -> Batch:
    """Return a step's samples as real tensors; every position carries loss."""
    B, L, K = shape.samples, shape.length, shape.entries
    document = -(-L // shape.documents)
    positions_BL = (torch.arange(L) % document).repeat(B, 1)
    N = B * L
    targets: SparseTargets | HiddenTargets
    if shape.hidden_size is not None:
        targets = HiddenTargets(torch.zeros(N, shape.hidden_size, dtype=torch.bfloat16))
    else:
        rest_N = torch.full((N,), 0.1) if shape.has_rest else None
        counts_N = torch.full((N,), K)
        ids_T = torch.randint(vocab_size, (N * K,))
        targets = SparseTargets(ids_T, torch.full((N * K,), 0.9 / K), counts_N, counts_N.clone(), rest_N)
    ids_BL, mask_BL = torch.randint(vocab_size, (B, L)), torch.ones(B, L, dtype=torch.bool)
    return Batch(ids_BL, positions_BL, mask_BL, targets, torch.ones(N), torch.ones(N))


class _Repeat:
    """A loader of one batch."""

    def __init__(self, batch: Batch, times: int) -> None:
        self.batch, self.times = batch, times

    def __iter__(self) -> Iterator[Batch]:
        return iter([self.batch] * self.times)

    def __len__(self) -> int:
        return self.times


class _Watch(pl.Callback):
    """Callback that tags an optimiser's states, and counts the work of the last step and of its update."""

    def __init__(self, tracker: Tracker, blocks: AlikeBlocks, shortcuts: bool) -> None:
        self.tracker, self.blocks, self.shortcuts = tracker, blocks, shortcuts
        self.work, self.update = Counter[Work](), Counter[Work]()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        for optimizer in trainer.optimizers:
            inner = optimizer
            if isinstance(optimizer, StepInBackward):
                self.blocks.run_all()  # each weight is updated inside its block's backward pass
                inner = optimizer.optimizer
            if self.shortcuts:
                self._make_moments(inner)

    def _make_moments(self, optimizer: torch.optim.Optimizer) -> None:
        """Update once with gradients of any value, and forget it."""
        if isinstance(optimizer, ChunkedAdamW):
            optimizer.walk = walk = EachKindOnce(optimizer.walk, self.tracker)
            optimizer.register_step_pre_hook(lambda *_: walk.seen.clear())
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        for weight in weights:
            weight.grad = torch.empty_like(weight)
        optimizer.step()
        for weight in weights:
            weight.grad = None
        self.tracker.forget()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.tracker.work.clear()
        self.blocks.begin_step()

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        self._passed = Counter(self.tracker.work)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.work = Counter(self.tracker.work)
        self.update = self.work - self._passed  # after the last pass: the norm of the gradients and the clipping too
        self.blocks.end_step()
        for optimizer in trainer.optimizers:
            self.tracker.tag(all_tensors(dict(optimizer.state)), "optimizer states")


def _watched_optimizer(
    tracker: Tracker, make: Callable[[nn.Module], torch.optim.Optimizer], module: nn.Module
) -> torch.optim.Optimizer:
    """Make the optimiser; a gradient, which may live for a moment only, is tagged as soon as it is complete."""

    def tag(parameter: Tensor) -> None:
        if parameter.grad is not None:
            tracker.tag([parameter.grad], "gradients")

    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(tag)
    return optimizer_on_cuda(make, module) if tracker.device == "cuda" else make(module)
