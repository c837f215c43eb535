"""A training that keeps freed memory beside one that gives it back: `python tests/benchmarks/freed_memory.py`.

The student is that of `train_step`, in bfloat16 on a processor. Each side trains in processes of its own, in turn.
Printed are processor time and its part in the system, pages mapped anew, and the most memory that was resident. glibc
keeps it by its settings in the environment.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from train_step import Size, make_cache, make_module

from distill.cache.reading.reader import CacheReader
from distill.system.memory import peak_memory, reset_peak_memory
from distill.training.data import CacheDataModule
from distill.training.module import DistillationModule
from distill.training.trainer import make_trainer

SIDES = {"kept": {"MALLOC_MMAP_THRESHOLD_": str(2**31), "MALLOC_TRIM_THRESHOLD_": str(2**34)}, "given back": {}}
"""Settings of glibc in the environment of each side."""


def main() -> None:
    """Read the command line and print a line for each side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1, help="samples of 512 tokens a step")
    parser.add_argument("--steps", type=int, default=8, help="steps that are measured, after one that is not")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        print(json.dumps(measure(options.samples, options.steps)))
        return
    found: dict[str, list[list[float]]] = {side: [] for side in SIDES}
    for repeat in range(options.repeats):
        for side in list(SIDES) if repeat % 2 == 0 else reversed(SIDES):
            line = [sys.executable, __file__, "--here", *sys.argv[1:]]
            own = {**os.environ, **SIDES[side]}
            done = subprocess.run(line, env=own, check=True, capture_output=True, text=True)
            found[side].append(json.loads(done.stdout.splitlines()[-1]))
    for side, runs in found.items():
        seconds, system, pages, peak = (statistics.median(values) for values in zip(*runs, strict=True))
        print(f"{side}: {seconds:.3f} s a step, {system:.3f} s in the system, {pages:,.0f} pages, {peak / 1e6:,.0f} MB")


class Costs(pl.Callback):
    """Resources at each step's end."""

    def __init__(self) -> None:
        self.ends: list[Any] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.ends.append(resource.getrusage(resource.RUSAGE_SELF))


def measure(samples: int, steps: int) -> list[float]:
    """Return a step's processor time, its part in the system and its new pages, and the training's peak in bytes."""
    warnings.filterwarnings("ignore")
    costs = Costs()
    with tempfile.TemporaryDirectory() as folder:
        reader = CacheReader(make_cache(Path(folder), Size(samples=samples)), "train")
        trainer = make_trainer(
            accelerator="cpu",
            devices=1,
            num_nodes=1,
            strategy="auto",
            precision="bf16-mixed",
            epochs=steps + 1,
            max_steps=steps + 1,
            log_every_steps=steps + 2,
            loggers=[],
            callbacks=[costs],
        )
        data = CacheDataModule(reader, None, step_samples=samples, batch_size=samples, seed=0)
        module = make_module(DistillationModule, Size(samples=samples))
        reset_peak_memory()
        trainer.fit(module, datamodule=data)
    first, last = costs.ends[0], costs.ends[-1]
    user, system = last.ru_utime - first.ru_utime, last.ru_stime - first.ru_stime
    pages = last.ru_minflt - first.ru_minflt
    return [(user + system) / steps, system / steps, pages / steps, peak_memory() or 0]


if __name__ == "__main__":
    main()
