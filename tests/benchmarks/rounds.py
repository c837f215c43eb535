"""Fixed text, text by the teacher, rounds, and rounds with half fixed text: one student, equal steps, in one table.

    python tests/benchmarks/rounds.py --work runs/rounds-table
    python tests/benchmarks/rounds.py --work runs/mine --file my.yaml --prompts prompts.jsonl --steps 100 --rounds 3

Every way trains the experiment's student for `steps` × (`rounds` + 1) steps: on the cache of the fixed corpus alone; on
texts that the teacher wrote on from the prompts; on the corpus for `steps` and then in rounds on its own texts (share
1); and in rounds of which half is its own texts. All are measured on the corpus's held-out text, and on what they write
on from its beginnings themselves. A run that was stopped goes on. Prints the table, and writes it as table.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = {
    "held-out KL": ("fidelity", "kl"),
    "KL on own text": ("own_texts", "kl"),
    "ended": ("own_texts", "ended"),
    "repetition": ("own_texts", "repetition"),
}


class Table:
    """The runs of a table, in a folder."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.work = options, options.work
        self.cache = self.work / "cache"
        self.common = ["--cache.dir", str(self.cache), "--evaluate.control", "false", "--evaluate.cost", "false"]
        self.common += [
            "--evaluate.tasks",
            "[]",
            "--evaluate.texts",
            "0",
            "--evaluate.own_texts",
            str(options.own_texts),
        ]
        self.common += ["--generate.max_new_tokens", str(options.new_tokens)]
        self.common += ["--generate.max_prompts", str(options.prompts_used)]
        if options.prompts:
            self.common += ["--generate.prompts", str(options.prompts)]

    def distill(self, command: str, *overrides: str) -> None:
        """Run a command on the experiment. Raises CalledProcessError if it fails."""
        line = [sys.executable, "-m", "distill", command, str(self.options.file), *self.common, *self.options.more]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run([*line, *overrides], check=True, env=environment, stdout=sys.stderr)

    def train(self, name: str, *overrides: str) -> dict[str, dict[str, dict[str, float]]]:
        """Train and measure one way; return its evaluation."""
        run = self.work / name
        self.distill("run", "--run_dir", str(run), *overrides)
        return json.loads((run / "evaluation.json").read_text())

    def rows(self) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
        """Return the evaluation of each way."""
        steps, rounds = self.options.steps, self.options.rounds
        whole = ["--train.max_steps", str(steps * (rounds + 1)), "--train.epochs", "100000", "--rounds.count", "0"]
        each = ["--train.max_steps", str(steps), "--train.epochs", "100000", "--rounds.count", str(rounds)]
        found = {"fixed text": self.train("fixed", *whole)}
        written, scored = self.work / "teacher/written", self.work / "teacher/cache"
        self.distill("generate", "--generate.to", str(written), "--run_dir", str(self.work / "teacher"))
        # The cache of the corpus comes first, for its held-out samples.
        own = ["--corpus.path", str(written), "--cache.dir", str(scored), "--cache.held_out_samples", "0"]
        self.distill("cache-teacher", *own, "--run_dir", str(self.work / "teacher"))
        caches = json.dumps({str(self.cache): 0, str(scored): 1})
        found["text by the teacher"] = self.train("by-teacher", *whole, "--train.caches", caches)
        found[f"{rounds} rounds"] = self.train("rounds", *each, "--rounds.share", "1")
        found[f"{rounds} rounds, half fixed text"] = self.train("half", *each, "--rounds.share", "0.5")
        return found


def as_markdown(rows: dict[str, dict[str, dict[str, dict[str, float]]]]) -> str:
    """Return the table of all ways, the student before training first."""
    before = next(iter(rows.values()))["fidelity"]["before"]["kl"]
    lines = [f"| way | {' | '.join(COLUMNS)} |", f"|---|{'---|' * len(COLUMNS)}", f"| before | {before:.4f} | | | |"]
    for name, found in rows.items():
        figures = [f"{found[section]['student'][key]:.4f}" for section, key in COLUMNS.values()]
        lines.append(f"| {name} | {' | '.join(figures)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Make the table that the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--file", type=Path, default=ROOT / "configs" / "demo.yaml", help="experiment file")
    parser.add_argument("--prompts", type=Path, help="prompts; default: the corpus")
    parser.add_argument("--prompts-used", type=int, default=256, help="prompts at most")
    parser.add_argument("--steps", type=int, default=40, help="steps of one round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens of a text at most")
    parser.add_argument("--own-texts", type=int, default=32, help="texts that are measured")
    parser.add_argument("--work", type=Path, required=True, help="folder of all runs")
    parser.add_argument("more", nargs="*", help="further overrides, behind --")
    options = parser.parse_args()
    table = as_markdown(Table(options).rows())
    (options.work / "table.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
