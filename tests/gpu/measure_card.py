"""One run on a CUDA card for every figure that documents give of cards: python tests/gpu/measure_card.py (ten minutes).

First come three experiment files of `configs/`, without their data and weights: teachers and students have published
shapes with weights of a random table, the text is the demo's. Each is cached and trained for a few steps, and what the
commands forecast is put beside what they measured (memory, time, disk), after a calibration. Then comes every row of
`make bench` on the card. What does not fit into the time says so. `--device cpu --tiny` tries the script itself.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests" / "benchmarks"))  # the script runs alone: these are found only from here on

import bench  # noqa: E402
from paired import Row, Setup, not_measured, number_row  # noqa: E402
from random_checkpoints import write_checkpoint  # noqa: E402

RECIPES = ("smollm2-1.7b-to-360m-6gb", "qwen3-1.7b-to-0.6b-8gb", "llama-8b-to-1b-12gb")
SECONDS = 600
RECIPE_SECONDS = 300
"""Time after which no further recipe begins."""
SAMPLES, ACCUMULATE = 32, 4

Command = Callable[..., None]
"""Function that runs `distill` with some arguments, and raises SystemExit if it fails."""


def main() -> None:
    """Read the command line, measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="shapes and sizes of a test: the figures mean nothing")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time for all of it")
    parser.add_argument("--repeats", type=int, default=3, help="pairs of each row of the benchmark")
    parser.add_argument("--out", type=Path, default=ROOT / "build", help="folder of card.json and card.md")
    options = parser.parse_args()
    if reason := why_not(options.device):
        print(f"skipped: {reason}")
        return
    setup = Setup(options.device, options.tiny, options.repeats)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for row in measure(setup, time.monotonic() + options.seconds, Path(folder), distill):
            rows.append(row)
            bench.write(rows, setup, options.out / "card.json", options.out / "card.md")  # a stop loses nothing
    print((options.out / "card.md").read_text(encoding="utf-8"))


def why_not(device: str) -> str | None:
    """Return the reason why this machine cannot be measured, or None."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        return "needs a CUDA device, and there is none here"
    return None


def measure(setup: Setup, deadline: float, folder: Path, command: Command) -> Iterator[Row]:
    """Yield the rows of recipes, then of benchmarks, as long as there is time."""
    if setup.device == "cuda":
        with contextlib.suppress(SystemExit):  # its exit status tells of findings too
            command("doctor", "--calibrate")
    recipes_end = deadline - SECONDS + RECIPE_SECONDS
    for number, name in enumerate(RECIPES):
        if number and time.monotonic() > recipes_end:
            yield not_measured("forecast", name, "forecast", "no time was left")
            continue
        try:
            yield from recipe_rows(name, setup, folder / name, command)
        except (SystemExit, Exception) as error:  # a recipe that this card cannot run must not end the others
            yield not_measured(
                "forecast", name, "forecast", (str(error).strip() or type(error).__name__).splitlines()[-1]
            )
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in bench.BENCHES:
        found = bench.measure_apart(name, setup, max(0.0, deadline - time.monotonic()))
        yield from found.rows
        if found.failure:
            yield not_measured(name, "the rest" if found.rows else "all of it", "", found.failure)


def recipe_rows(name: str, setup: Setup, folder: Path, command: Command) -> Iterator[Row]:
    """Cache and train a few samples of an experiment file; yield what was forecast beside what was measured."""
    content = experiment(name, setup, folder)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "experiment.yaml"
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    for phase in ("cache-teacher", "train-student"):
        command(phase, str(file))
    for row in json.loads((folder / "run" / "forecast.json").read_text(encoding="utf-8"))["rows"]:
        scale, form = (1e9, "{:.2f} GB") if row["unit"] == "bytes" else (1, "{:.1f} s")
        figures = row["measured"] / scale, row["forecast"] / scale
        yield number_row("forecast", name, f"{row['what']}, measured of forecast", *figures, form)


def experiment(name: str, setup: Setup, folder: Path) -> dict[str, Any]:
    """Return the experiment file with weights and text that are here, and few samples."""
    content = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text(encoding="utf-8"))
    length = 64 if setup.tiny else content["corpus"]["sequence_length"]
    content["corpus"] = {"path": str(ROOT / "data" / "sotu.jsonl"), "sequence_length": length, "held_out": 0}
    for section in (content["teacher"], content["student"].get("options", {})):
        if "model" in section:
            section["model"] = str(write_checkpoint(section["model"], folder / "models", setup.tiny))
    samples = 4 if setup.tiny else SAMPLES
    content["cache"] |= {"max_samples": samples, "held_out_samples": 0, "shard_samples": samples}
    content["train"] |= {"accumulate_grad_batches": 1 if setup.tiny else ACCUMULATE, "num_workers": 0, "loggers": []}
    if setup.device == "cpu":
        mixed = {"precision": "bf16-mixed"} if content["train"]["precision"] == "16-mixed" else {}
        content["train"] |= {"accelerator": "cpu", **mixed}
    return {**content, "run_dir": str(folder / "run")}


def distill(*arguments: str) -> None:
    """Run a command in a process of its own."""
    done = subprocess.run([sys.executable, "-m", "distill.cli", *arguments], stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)


if __name__ == "__main__":
    main()
