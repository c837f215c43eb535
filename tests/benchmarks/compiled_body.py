"""The student's blocks compiled by torch beside the same blocks as they are: forward and backward of the body.

`python tests/benchmarks/bench.py --only compiled_body`. The student is that of `train_step`, on samples of two
documents. Attention stays outside: the lengths of documents change with every batch. The compiler's own time is that
of the first pass, with the processes that it starts.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from paired import Row, Setup, cost, not_measured, number_row, paired
from torch import Tensor
from train_step import Size, make_module
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from distill.training.activation_checkpointing import blocks
from distill.training.module import DistillationModule

SAMPLES = 2


def rows(setup: Setup) -> Iterator[Row]:
    """Yield the time of a pass, and of the first one."""
    size = Size(512, 64, 2, 2, 32) if setup.tiny else Size(samples=SAMPLES)
    case = f"bf16-mixed, {size.samples} x {size.length}, D {size.hidden}, {size.layers} blocks"
    plain = make_module(DistillationModule, size).student.to(setup.device)
    AttentionInterface.register("sdpa", torch.compiler.disable(ALL_ATTENTION_FUNCTIONS["sdpa"]))
    compiled = copy.deepcopy(plain)
    for block in blocks(compiled) or ():
        block.compile(dynamic=True)
    ids_BL = torch.randint(size.vocabulary, (size.samples, size.length), device=setup.device)
    positions_BL = (torch.arange(size.length, device=setup.device) % (size.length // 2)).expand_as(ids_BL)
    ours, peer = (partial(run, student, ids_BL, positions_BL) for student in (compiled, plain))
    peer()
    try:
        first = cost(ours, setup.device)
    except Exception as error:  # without a compiler for C++ or Triton
        yield not_measured("compiled_body", case, "time of the body as it is", str(error).strip().splitlines()[0])
        return
    pairs = paired(ours, peer, setup)
    yield pairs.time_row("compiled_body", case, "time of the body as it is")
    once = pairs.peer[-1].processor
    yield number_row("compiled_body", case, "processor time of the first pass", first.processor, once, "{:.3g} s")


def run(student: Any, ids_BL: Tensor, positions_BL: Tensor) -> None:
    """Run the body forward and backward."""
    with torch.autocast(ids_BL.device.type, torch.bfloat16, cache_enabled=False):
        hidden_BLD = student.body(ids_BL, positions_BL)
    hidden_BLD.float().square().mean().backward()
    student.zero_grad()


if __name__ == "__main__":
    for row in rows(Setup(repeats=3)):
        print(row)
