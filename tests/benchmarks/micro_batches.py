"""Processor seconds of the teacher phase for a sample, by micro-batch: the sizes that are worth it on a processor.

    python tests/benchmarks/micro_batches.py --sizes 1,2,4,8 --length 256 --dtype bfloat16

The demo's teacher, unquantised, one thread. The sizes take turns, and each is compared with the first in its own turn.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch

from distill.cache.making.predict import TeacherModule
from distill.experiment.file import load_experiment
from distill.experiment.place import Place
from distill.experiment.teacher import Teacher
from distill.forecast.phases.teacher import make_batch
from distill.system.machine import processor_name
from distill.targets.schemes import VarOpt

DEMO = Path(__file__).resolve().parents[2] / "configs" / "demo.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", default="1,2,4,8")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--turns", type=int, default=2)
    asked = parser.parse_args()
    sizes = [int(size) for size in asked.sizes.split(",")]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    options = ["--teacher.quantization", "none", "--teacher.compute_dtype", asked.dtype]
    experiment = load_experiment(str(DEMO), [*options, "--corpus.sequence_length", str(asked.length)])
    teacher = Teacher(experiment, Place.of(experiment))
    module = TeacherModule(teacher.load(), teacher.vocab_size, VarOpt(0.02), seed=0)
    most = max(sizes)
    samples = make_batch(most, asked.length, vocab_size=teacher.vocab_size)

    def seconds(size: int) -> float:
        begin = time.process_time()
        for start in range(0, most, size):
            module.predict_step({name: tensor[start : start + size] for name, tensor in samples.items()}, 0)
        return (time.process_time() - begin) / most

    seconds(sizes[0])
    turns = [{size: seconds(size) for size in order} for order in (sizes, sizes[::-1]) * -(-asked.turns // 2)]
    print(f"{processor_name()}, one thread, {asked.dtype}, samples of {asked.length} tokens")
    for size in sizes:
        each = statistics.median(turn[size] for turn in turns)
        ratios = ", ".join(f"{turn[size] / turn[sizes[0]]:.3f}" for turn in turns)
        print(f"micro-batch {size}: {each:.3f} s a sample, × {ratios}")


if __name__ == "__main__":
    main()
