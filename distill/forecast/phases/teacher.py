"""The teacher phase's memory and work: its real walk over one batch, on tensors without memory.

Shapes: B samples of a batch, L sequence length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import cast

import torch
from torch import Tensor, nn

from distill.cache.making.extract import SCRATCH_BYTES
from distill.cache.making.predict import Place, TeacherModule
from distill.forecast.simulation.blocks import alike_once
from distill.forecast.simulation.fake import tracked
from distill.forecast.simulation.kernels import DeviceKind
from distill.forecast.simulation.repetition import first_two_alike
from distill.forecast.simulation.result import Simulation, result_of, tag_model
from distill.forecast.simulation.tracker import Tracker
from distill.targets.schemes import AnyScheme, VarOpt


def simulate_teacher(
    make_teacher: Callable[[], nn.Module],
    *,
    batch_size: int,
    length: int,
    vocab_size: int,
    scheme: AnyScheme,
    chunk_size: int = 512,
    documents: int = 1,
    device: DeviceKind = "cpu",
    alike_blocks_once: bool = True,
) -> Simulation:
    """Simulate one batch of the teacher that `make_teacher` makes: body, head and targets.

    Every position carries loss and, under varopt, has as many entries as a target may have. So all samples are alike,
    and two of them get their targets. For `alike_blocks_once` see `distill.forecast.simulation.blocks`; without it
    every block runs.
    """
    widest = scheme.most_atoms if isinstance(scheme, VarOpt) else max(scheme.most_entries, 1)
    with tracked(make_batch(batch_size, length, documents), device, widest) as (batch, tracker):
        module = TeacherModule(make_teacher(), vocab_size, scheme, seed=0, chunk_size=chunk_size)  # type: ignore[arg-type]
        module.block_bytes = SCRATCH_BYTES[device]
        module.each = lambda places: _in_loss(first_two_alike(places, tracker), tracker)
        return run_tracked(module, batch, tracker, alike_blocks_once)


def run_tracked(
    module: TeacherModule, batch: dict[str, Tensor], tracker: Tracker, alike_blocks_once: bool = False
) -> Simulation:
    """Make one batch's targets under a tracker that has been entered, on tensors of any kind."""
    tag_model(tracker, module)
    tracker.tag(batch.values(), "buffers and batch")
    tracker.forget()
    with alike_once(cast(nn.Module, module.teacher), tracker) as blocks:
        if not alike_blocks_once:
            blocks.run_all()
        module.predict_step(batch, 0)
    return result_of(tracker)


def make_batch(batch_size: int, length: int, documents: int = 1, vocab_size: int = 2) -> dict[str, Tensor]:
    """Return a batch as the corpus gives it, of real tensors."""
    document = -(-length // documents)
    return {
        "input_ids": torch.randint(vocab_size, (batch_size, length)),
        "position_ids": (torch.arange(length) % document).repeat(batch_size, 1),
        "loss_mask": torch.ones(batch_size, length, dtype=torch.bool),
    }


def _in_loss(places: Iterator[Place], tracker: Tracker) -> Iterator[Place]:
    """Yield the samples' places; the tensors made of each count as head and loss."""
    for place in places:
        with tracker.loss():
            yield place
