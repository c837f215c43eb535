"""Kills a sweep of 2 × 3 runs, lets it go on, and compares all students and figures with an undisturbed one.

    python tests/benchmarks/sweep_kills.py --kills 4

Each kill is a SIGKILL at a random moment. Prints what was compared; exit status 1 when a byte of a student or a figure
differs, or when the teacher was measured more often than once and once for each kill.
"""

from __future__ import annotations

import argparse
import csv
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from forked import write_experiment

ROOT = Path(__file__).resolve().parents[2]
VARY = ["--vary", "loss.alpha=0,0.3", "--vary", "train.seed=0,1,2"]
SMALL = {
    "corpus": {"sequence_length": 48},
    "teacher": {"compute_dtype": "float32"},
    "cache": {"batch_size": 4, "shard_samples": 8, "held_out_samples": 4, "max_samples": 16},
    "train": {"batch_size": 4, "max_steps": 6, "precision": "32-true", "checkpoint_every_steps": 2},
    "evaluate": {"cost": False, "texts": 1, "text_tokens": 4, "max_samples": 4},
    "preflight": False,
}
SAME = ("nll", "kl", "top1_agreement", "acceptance", "ece")
"""Figures that are compared; the others are times."""


def sweep(file: Path, run: Path) -> subprocess.Popen[str]:
    """Start the sweep in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "distill", "sweep", str(file), "--run_dir", str(run), *VARY]
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def students(run: Path) -> dict[str, bytes]:
    return {path.parent.parent.name: path.read_bytes() for path in run.glob("*/student/model.safetensors")}


def figures(run: Path) -> list[list[str]]:
    rows = csv.DictReader((run / "sweep.csv").read_text().splitlines())
    return [[row["run"], *(row[name] for name in SAME if name in row)] for row in rows]


def measurements(run: Path) -> int:
    """Return how often the teacher's texts were measured, in all folders."""
    lines = [line for path in run.rglob("measured.jsonl") for line in path.read_text().splitlines()]
    return sum("texts:" in line and ":teacher:" in line for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draws = random.Random(options.seed)
    work = Path(tempfile.mkdtemp(prefix="sweep-"))
    file = write_experiment(work, **SMALL)
    began = time.monotonic()
    said = sweep(file, work / "whole").communicate()[0]
    seconds = time.monotonic() - began
    if "sweep: " not in said:
        print(said[-2000:])
        return 1
    for number in range(options.kills):
        process = sweep(file, work / "killed")
        try:
            process.communicate(timeout=draws.uniform(0.2, 0.7) * seconds)
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            print(f"kill {number + 1}: {len(students(work / 'killed'))} of 6 students were finished", flush=True)
    said = sweep(file, work / "killed").communicate()[0]
    whole, killed = students(work / "whole"), students(work / "killed")
    same = len(whole) == 6 and whole == killed
    print(f"students: {len(whole)} and {len(killed)}, {'the same bytes' if same else 'OTHERS'}")
    are_alike = (work / "killed/sweep.csv").is_file() and figures(work / "whole") == figures(work / "killed")
    print(f"figures: {'the same' if are_alike else 'OTHERS'}")
    times = measurements(work / "whole"), measurements(work / "killed")
    print(f"the teacher's texts were measured {times[0]} time undisturbed, {times[1]} times with kills")
    if not same or not are_alike:
        print(said[-2000:])
    return 0 if same and are_alike and times[0] == 1 and times[1] <= 1 + options.kills else 1


if __name__ == "__main__":
    sys.exit(main())
