"""A callback for `train.callbacks` that notes the time of every epoch."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl


class EpochClock(pl.Callback):
    """Wall and processor seconds of every epoch of a training, as JSON in a file."""

    def __init__(self, file: str) -> None:
        self.file, self.epochs = Path(file), []

    def on_train_epoch_start(self, *_: Any) -> None:
        self.begin = time.perf_counter(), time.process_time()

    def on_train_epoch_end(self, *_: Any) -> None:
        wall, processor = self.begin
        self.epochs.append((time.perf_counter() - wall, time.process_time() - processor))
        self.file.write_text(json.dumps(self.epochs))
