"""Predictions of the held-out KL beside the ends that came, over trainings of different students and schedules.

    python tests/benchmarks/predictions.py --work build/predictions

Ten trainings from one cache of the demo's teacher and corpus (352 samples of 256 tokens), a few minutes each.
A training that is finished in `--work` is not made again. `--only demo wsd` takes some of them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SHARED = ["--cache.max_samples", "352", "--cache.held_out_samples", "16", "--evaluate.control", "false"]
COMPACT = ["--student.class_path", "compact", "--student.options", "{hidden_size: 256, layers: 6, heads: 4}"]
RUNS = {
    "demo": ["--train.max_steps", "176"],
    "13 layers": [
        *("--student.options", "{layers: 13, depth: importance, intermediate_size: 768, calibration_samples: 4}"),
        *("--train.max_steps", "176"),
    ],
    "four samples a step": ["--train.batch_size", "4", "--train.max_steps", "88", "--train.learning_rate", "1.5e-3"],
    "fresh": [*COMPACT, "--train.max_steps", "352", "--train.learning_rate", "1e-3"],
    "8 layers": [
        *("--student.options", "{layers: 8}", "--train.max_steps", "176"),
        *("--train.learning_rate", "1e-3"),
    ],
    "wsd": ["--train.max_steps", "176", "--train.schedule", "wsd"],
    "24 layers": [
        *("--student.options", "{layers: 24, depth: importance, calibration_samples: 4}"),
        *("--train.max_steps", "120", "--train.learning_rate", "3e-4"),
    ],
    "slow": ["--train.max_steps", "352", "--train.learning_rate", "4e-4"],
    "from the text": ["--loss.alpha", "1", "--train.max_steps", "176"],
    "long": ["--train.max_steps", "352", "--train.seed", "3"],
}
AIMS = {"0.1": 0.15, "0.5": 0.05}
"""Share of the steps → error of the predicted KL that is allowed, as a share of the KL that came."""


def main() -> None:
    """Train what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "build/predictions")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), metavar="NAME")
    options = parser.parse_args()
    work = options.work.resolve()
    cached = [*SHARED, "--cache.dir", str(work / "cache")]
    _distill("cache-teacher", "--run_dir", str(work / "of-cache"), *cached)
    found = {}
    for name in options.only:
        run = work / name.replace(" ", "-")
        _distill("train-student", "--run_dir", str(run), *cached, *RUNS[name], "--resume")
        found[name] = json.loads((run / "logs/student/prediction.json").read_text())
    print("\n".join(table(found)))


def _distill(command: str, *arguments: str) -> None:
    line = [sys.executable, "-m", "distill.cli", command, "configs/demo.yaml", *arguments]
    subprocess.run(line, cwd=ROOT, check=True, stdout=sys.stderr)


def table(found: dict[str, dict[str, Any]]) -> list[str]:
    """Return the rows, and how many predictions were within their aims and their own intervals."""
    lines = [
        "| training | KL before | KL at the end |" + "".join(f" at {float(share):.0%} | error |" for share in AIMS)
    ]
    lines.append("|---|" + "---:|" * (2 + 2 * len(AIMS)))
    within = dict.fromkeys(AIMS, 0)
    inside = dict.fromkeys(AIMS, 0)
    for name, one in found.items():
        end, cells = one["end"], ""
        for share, aim in AIMS.items():
            if share not in one["predicted"]:  # it fell too steeply
                cells += " none | |"
                continue
            told = one["predicted"][share]["1"]
            error = told["kl"] / end - 1
            within[share] += abs(error) <= aim
            inside[share] += told["low"] <= end <= told["high"]
            cells += f" {told['kl']:.3f} ({told['low']:.3f} to {told['high']:.3f}) | {error:+.1%} |"
        lines.append(f"| {name} | {one['points'][0][1]:.3f} | {end:.3f} |{cells}")
    for share, aim in AIMS.items():
        made = sum(share in one["predicted"] for one in found.values())
        lines.append(
            f"at {float(share):.0%} of the steps: {within[share]} of {made} within {aim:.0%}, "
            f"{inside[share]} inside their interval"
        )
    return lines


if __name__ == "__main__":
    main()
