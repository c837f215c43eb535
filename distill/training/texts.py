"""Sample texts while the student trains: the same prompts each time, in the log, the loggers and a file beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.seed import isolate_rng

from distill.system import json_lines
from distill.system.progress import say
from distill.training.loggers import log_texts
from distill.training.parallel import is_sharded

FILE = "texts.jsonl"
"""File among a training's logs: one line each time, with the step, the prompts and the texts."""
_SHOWN = 60
"""Characters of a prompt's end that the log shows before the text."""


class WriteTexts(pl.Callback):
    """A callback that has the student write on from prompts at intervals and at the end.

    The training does not notice it: random states and modes of modules are as before. Place it before the callback
    that writes checkpoints, so that a training that resumes at one has the texts up to it.

    Args:
        prompts: the prompts as text, for readers.
        write: function that returns the text after each prompt by the student, in evaluation mode.
        file: file to append to.
        every_steps: optimiser steps between two times.
    """

    def __init__(
        self, prompts: Sequence[str], write: Callable[[Any], Sequence[str]], file: Path, every_steps: int
    ) -> None:
        self.prompts, self.write, self.file, self.every_steps = list(prompts), write, file, every_steps
        self.written_at: int | None = None

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if pl_module.steps_begun % self.every_steps == 0:
            self._write(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self.written_at != pl_module.steps_begun:
            self._write(trainer, pl_module)

    def _write(self, trainer: pl.Trainer, module: Any) -> None:
        step = self.written_at = module.steps_begun
        # Under fsdp each pass gathers weights from all devices, so all of them write; else the first one does.
        if not (trainer.is_global_zero or is_sharded(module.student)):
            return
        modes = [(each, each.training) for each in module.student.modules()]
        module.student.eval()
        try:
            with torch.no_grad(), isolate_rng(), trainer.precision_plugin.val_step_context():
                texts = list(self.write(module.student))
        finally:
            for each, mode in modes:
                each.training = mode
        if not trainer.is_global_zero:
            return
        for prompt, text in zip(self.prompts, texts, strict=True):
            say(f"step {step}: {_end_of(prompt)} ▸ {' '.join(text.split()) or '(nothing)'}")
        json_lines.append(self.file, {"step": step, "prompts": self.prompts, "texts": texts})
        for logger in trainer.loggers:
            log_texts(logger, step, self.prompts, texts)


def _end_of(prompt: str) -> str:
    """Return the end of a prompt in one line."""
    line = " ".join(prompt.split())
    return line if len(line) <= _SHOWN else f"…{line[-_SHOWN:]}"
