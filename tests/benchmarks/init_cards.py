"""Has `distill init` propose an experiment for the card and teacher of each file in configs/, and `plan` judge it.

    python tests/benchmarks/init_cards.py                 # about a minute of processor time a file
    python tests/benchmarks/init_cards.py t4 6gb          # those whose names have one of these words

The data are 300 short conversations, as somebody has them at first, or as many as `--rows N` says. Prints a table: the
student that was proposed, the memory of each phase, and whether `plan` says that it fits; exit status 1 if something
does not.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

from distill.cli import main as distill
from distill.experiment.file import load_experiment
from distill.recipes import plan

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def conversations(rows: int) -> str:
    """Return rows of a .jsonl file of conversations."""
    ask = "How do I reset the password of account {}? I tried it twice already."
    answer = "Open the settings, choose security, then press reset. A mail for account {} arrives within five minutes."
    return "".join(
        json.dumps(
            {
                "messages": [
                    {"role": "user", "content": ask.format(n)},
                    {"role": "assistant", "content": answer.format(n)},
                ]
            }
        )
        + "\n"
        for n in range(rows)
    )


def row(file: Path, data: Path, work: Path) -> tuple[str, bool]:
    """Return a file's row of the table, and whether what `init` proposes fits."""
    card = file.stem.rpartition("-")[2]
    teacher = str(load_experiment(str(file), []).teacher.model)
    to, began = work / f"{file.stem}.yaml", time.process_time()
    out, error, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            distill(["init", "--yes", "--data", str(data), "--card", card, "--teacher", teacher, "--to", str(to)])
        except SystemExit as ended:
            status = int(ended.code or 0)
    if status:
        return f"| {file.stem} | {card} | {teacher} | {error.getvalue().strip()} | | | |", False
    experiment = load_experiment(str(to), [])
    student = experiment.student
    what = student.options.get("model") or f"{student.search['parameters'] / 1e6:,.0f} M, cut"
    streamed = " (streamed)" if experiment.teacher.class_path == "streamed" else ""
    planned = plan.planned(experiment, card).forecast
    memory = " / ".join(f"{phase.needed_bytes / 1e9:.1f}" for phase in planned.phases.values())
    fits = planned.fits and not planned.failures
    seconds = time.process_time() - began + sum(os.times()[2:4])
    words = "it fits" if fits else "does not fit"
    return f"| {file.stem} | {card} | {teacher}{streamed} | {what} | {memory} | {words} | {seconds:.0f} |", fits


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--rows", type=int, default=300)
    options = parser.parse_args()
    files = sorted([*CONFIGS.glob("*-*gb.yaml"), *CONFIGS.glob("*-t4.yaml")])
    files = [file for file in files if not options.words or any(word in file.stem for word in options.words)]
    print("| file | card | teacher | student | GB: cache, train, evaluate | plan | processor s so far |")
    print("|---|---|---|---|---|---|---:|")
    status = 0
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "chats.jsonl"
        data.write_text(conversations(options.rows))
        for file in files:
            line, fits = row(file, data, Path(folder))
            print(line, flush=True)
            status = status if fits else 1
    return status


if __name__ == "__main__":
    sys.exit(main())
