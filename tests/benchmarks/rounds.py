"""Fixed text, text by the teacher, rounds, and rounds with half fixed text: one student, equal steps, in one table.

    python tests/benchmarks/rounds.py --work runs/rounds-table
    python tests/benchmarks/rounds.py --work runs/mine --file my.yaml --prompts prompts.jsonl --steps 100 --rounds 3

The experiment's student first learns the fixed corpus for `--heal` steps: the start of every way. Each then trains for
`steps` × (`rounds` + 1) steps: on the fixed corpus alone; on texts that the teacher wrote on from the prompts; on the
corpus for `steps` and then in rounds on its own texts (share 1); and in rounds of which half is its own texts. All are
measured together at the end, by the code of `distill evaluate`: on the corpus's held-out text, and on what they write
on from its beginnings themselves. A run that was stopped goes on. Prints the table, and writes it as table.md, with all
figures and their intervals as table.json. `peer_rounds.py` goes on from there.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from distill.experiment.cache import begun_for_run
from distill.experiment.configuration import Experiment
from distill.experiment.file import load_experiment
from distill.experiment.folders import Folders
from distill.experiment.place import Place
from distill.experiment.precision import with_types_of_machine
from distill.experiment.subjects import Loaded, Subject, teacher_subject
from distill.experiment.teacher import Teacher, open_samples
from distill.models.tokenizers import load_folder_tokenizer
from distill.plugins import load_language_model
from distill.recipes.evaluate.own_texts import OwnTexts
from distill.recipes.evaluate.to_teacher import FidelityToTeacher

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = {
    "held-out KL": ("fidelity", "kl"),
    "KL on own text": ("own_texts", "kl"),
    "ended": ("own_texts", "ended"),
    "repetition": ("own_texts", "repetition"),
}
TRAINING = ("generate", "cache-teacher", "train-student")
"""Phases whose memory counts: an evaluation has the teacher beside the student whatever the way was."""


class Table:
    """The runs of a table, in a folder."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.work = options, options.work.resolve()
        self.cache, self.healed = self.work / "cache", self.work / "healed"
        self.common = ["--cache.dir", str(self.cache), "--evaluate.own_texts", str(options.own_texts)]
        self.common += ["--generate.max_prompts", str(options.prompts_used)]
        for key, value in {"corpus.path": options.corpus, "generate.prompts": options.prompts}.items():
            self.common += [f"--{key}", str(value)] if value else []

    def distill(self, command: str, *overrides: str) -> None:
        """Run a command on the experiment. Raises CalledProcessError if it fails."""
        line = [sys.executable, "-m", "distill", command, str(self.options.file), *self.common, *self.options.more]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run([*line, *overrides], check=True, env=environment, stdout=sys.stderr)

    def train(self, name: str, *overrides: str) -> None:
        """Train one way. Its own evaluation is a glance, since all ways are measured together."""
        glance = ["--evaluate.own_texts", "0", "--evaluate.max_samples", "1", "--rounds.count", "0"]
        run = ["--run_dir", str(self.work / name), "--train.epochs", "100000"]
        self.distill("run", *run, *glance, *overrides)

    def peak(self, name: str) -> int:
        """Return the most bytes that a phase of a way's training held."""
        costs = [json.loads(line) for line in (self.work / name / "costs.jsonl").read_text().splitlines()]
        return max(line["peak_memory_bytes"] for line in costs if line["phase"] in TRAINING)

    def experiment(self, *overrides: str) -> Experiment:
        """Return the experiment with its cache and prompts, and with the types that it runs in."""
        given = [*self.common, *self.options.more, *overrides]
        return with_types_of_machine(load_experiment(str(self.options.file), given))

    def rows(self) -> dict[str, dict[str, Any]]:
        """Return the figures of the healed student and of each way."""
        steps, rounds = self.options.steps, self.options.rounds
        self.train("healed", "--train.max_steps", str(self.options.heal))
        from_healed = ["--student.class_path", "huggingface", "--train.learning_rate", str(self.options.learning_rate)]
        from_healed += ["--student.options", json.dumps({"model": str(self.healed / "student")})]
        whole = [*from_healed, "--train.max_steps", str(steps * (rounds + 1))]
        each = [*from_healed, "--train.max_steps", str(steps), "--rounds.count", str(rounds)]
        self.train("rounds", *each, "--rounds.share", "1")
        self.train("half", *each, "--rounds.share", "0.5")
        self.train("fixed", *whole)
        written, scored, teacher = self.work / "teacher/written", self.work / "teacher/cache", self.work / "teacher"
        many = ["--generate.samples_per_prompt", str(self.options.teacher_texts)]
        self.distill("generate", "--generate.to", str(written), "--run_dir", str(teacher), *many)
        other = ["--corpus.path", str(written), "--cache.dir", str(scored), "--cache.held_out_samples", "0"]
        self.distill("cache-teacher", *other, "--run_dir", str(teacher))
        caches = json.dumps({str(self.cache): 0, str(scored): 1})  # the first one has the held-out samples
        self.train("by-teacher", *whole, "--train.caches", caches)
        ways = {
            "the student before": "healed",
            "fixed text": "fixed",
            "text by the teacher": "by-teacher",
            f"{rounds} rounds": "rounds",
            f"{rounds} rounds, half fixed text": "half",
        }
        experiment = self.experiment("--run_dir", str(self.healed))
        found = measure(experiment, {way: self.work / name / "student" for way, name in ways.items()})
        return {way: {**found[way], "peak": self.peak(name)} for way, name in ways.items()}


def measure(experiment: Experiment, students: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """Return `fidelity` and `own_texts` of folders of Hugging Face students, on an experiment's held-out text."""
    teacher = Teacher(experiment, Place.of(experiment))
    samples = open_samples(experiment, teacher, begun_for_run(Folders.of(experiment)))
    fidelity = FidelityToTeacher(experiment, teacher, samples, None, len(students) + 1)
    own = OwnTexts(experiment, teacher, samples, None)
    of_teacher = teacher_subject(experiment, teacher)
    for measurement in (fidelity, own):
        measurement.measure(of_teacher, of_teacher.load())
    found, written = {}, {}
    for name, folder in students.items():
        subject = Subject(name, {}, [], _loader(folder, teacher))
        found[name] = fidelity.measure(subject, subject.load())
        written[name] = own.measure(subject, subject.load())
        gc.collect()
    own.measure(of_teacher, of_teacher.load())  # now the teacher reads what the students wrote
    return {name: {"fidelity": found[name], "own_texts": own.join([written[name]])} for name in students}


def _loader(folder: Path, teacher: Teacher) -> Callable[[], Loaded]:
    def load() -> Loaded:
        model = load_language_model(folder, teacher.device, torch.float32, "huggingface")
        return Loaded(model, load_folder_tokenizer(folder), teacher.vocab_size)

    return load


def as_markdown(rows: dict[str, dict[str, Any]]) -> str:
    """Return the table of all ways, the student before them first."""
    lines = [f"| way | {' | '.join(COLUMNS)} | peak memory |", f"|---|{'---:|' * len(COLUMNS)}---:|"]
    for name, found in rows.items():
        figures = [f"{found[section][key]:.4f}" for section, key in COLUMNS.values()]
        lines.append(f"| {name} | {' | '.join(figures)} | {found['peak'] / 1e9:.2f} GB |")
    return "\n".join(lines) + "\n"


def arguments(description: str) -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--file", type=Path, default=Path(__file__).with_suffix(".yaml"), help="experiment file")
    parser.add_argument("--corpus", type=Path, help="fixed corpus; default: the experiment's")
    parser.add_argument("--prompts", type=Path, help="prompts; default: the corpus")
    parser.add_argument("--prompts-used", type=int, default=96, help="prompts at most")
    parser.add_argument("--teacher-texts", type=int, default=1, help="texts that the teacher writes for each prompt")
    parser.add_argument("--heal", type=int, default=50, help="steps of the student before all ways")
    parser.add_argument("--steps", type=int, default=14, help="steps of one round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=2e-4, help="of the ways; healing has the experiment's")
    parser.add_argument("--own-texts", type=int, default=32, help="texts that are measured")
    parser.add_argument("--work", type=Path, required=True, help="folder of all runs")
    parser.add_argument("more", nargs="*", help="further overrides, behind --")
    return parser


def main() -> None:
    """Make the table that the command line asks for."""
    table = Table(arguments(__doc__ or "").parse_args())
    rows = table.rows()
    text = as_markdown(rows)
    (table.work / "table.json").write_text(json.dumps(rows, indent=1))
    (table.work / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
