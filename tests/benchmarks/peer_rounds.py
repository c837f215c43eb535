"""On-policy rounds beside TRL's DistillationTrainer: the student of rounds.py's round 0, the same prompts and steps.

    make build/peers/.installed
    build/peers/bin/python tests/benchmarks/rounds.py --work runs/rounds-table
    build/peers/bin/python tests/benchmarks/peer_rounds.py --work runs/rounds-table

It takes the arguments with which rounds.py was called. Each side begins with the student that learned the fixed corpus
there, writes on from the same prompts and trains for `steps` × `rounds` steps on its own texts alone, as many of them a
step, with the same peak learning rate (ours with a warm-up each round) and the teacher in the same type. Ours writes
and scores a round's texts at once, each model alone; TRL writes before each step, the teacher beside the student. Both
are measured by `distill evaluate`'s own code on the same held-out beginnings. Memory and processor time are those of a
process that does all of it from its start, without the evaluation. What is finished is not made again. Prints the
table, and writes it as peers.md, with all figures and their intervals as peers.json.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from paired import Cost, cost_apart
from rounds import Table, arguments, measure

from distill.cache.format.folder import read_manifest
from distill.experiment.configuration import Experiment
from distill.experiment.stages import stages
from distill.models import checkpoints, tokenizers
from distill.models.devices import pick_device
from distill.models.huggingface import load_pretrained
from distill.models.tokenizers import load_folder_tokenizer
from distill.system.memory import free_memory

BETAS = {"reverse_kl": 1.0, "forward_kl": 0.0}
"""TRL's beta of each divergence."""
SCHEMES = {"reverse_kl": "hidden", "forward_kl": "varopt"}
"""Our targets of each divergence."""


class Peers:
    """Both sides, in the folder of a table."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.table = Table(options)
        self.work, self.options = self.table.work / "peers", options
        self.round = self.table.work / "rounds/rounds/1"
        self.start = self.table.work / "rounds/rounds/0/student"
        if not (self.round / "cache/manifest.json").is_file():
            raise SystemExit(f"{self.round}: has no cache: run rounds.py with these arguments first")

    def experiment(self, *overrides: str) -> Experiment:
        """Return the table's experiment with the student of round 0 as the one to train."""
        student = ["--student.class_path", "huggingface", "--student.options", json.dumps({"model": str(self.start)})]
        return self.table.experiment(*student, *overrides)

    def folder(self, side: str) -> Path:
        """Return the folder of a side, such as `ours-reverse_kl`; its `student` is the trained one."""
        return self.work / side

    def texts_a_step(self) -> int:
        """Return the texts in a step of ours: those of a sample, times the samples of a step."""
        train = self.experiment().train
        texts = len(self.prompts()) * (1 - self.experiment().corpus.held_out)
        samples = read_manifest(self.round / "cache").splits["train"]
        return max(1, round(texts / samples * train.batch_size * train.accumulate_grad_batches))

    def prompts(self) -> list[list[dict[str, str]]]:
        """Return the prompts of a round, as the messages before the answer that was written."""
        files = sorted((self.round / "written/parts").glob("*.jsonl"))
        rows = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
        if any("messages" not in row for row in rows):
            raise SystemExit("peer_rounds: TRL's prompts are conversations here: give --prompts of questions")
        return [row["messages"][:-1] for row in rows if row["sample"] == 0]

    def cost(self, side: str) -> Cost:
        """Return what a side costs in a process of its own. A finished one is not run again."""
        found = self.folder(side) / "cost.json"
        if not found.is_file():
            shutil.rmtree(self.folder(side), ignore_errors=True)
            cost = cost_apart([sys.executable, __file__, "--side", side, *sys.argv[1:]])
            found.write_text(json.dumps(asdict(cost)))
        return Cost(**json.loads(found.read_text()))

    def save_teacher(self) -> Path:
        """Save the teacher as a folder that transformers reads, in the type in which ours computes."""
        folder, teacher = self.work / "teacher", self.experiment().teacher
        if not (folder / "config.json").is_file():
            checkpoint = checkpoints.resolve(teacher.model)
            load_pretrained(checkpoint, getattr(torch, teacher.compute_dtype)).save_pretrained(folder)
            tokenizers.load_tokenizer(checkpoint).save_pretrained(folder)
        return folder

    def run_ours(self, divergence: str) -> None:
        """Make the rounds without a fixed corpus: the fresh student, that of round 0, writes first."""
        options = self.options
        changes = {
            "corpus.path": "null",
            "cache.dir": "null",
            "cache.scheme": SCHEMES[divergence],
            "loss.divergence": divergence,
            "rounds.count": str(options.rounds),
            "rounds.share": "1",
            "train.max_steps": str(options.steps),
            "train.epochs": "100000",
            "train.learning_rate": str(options.learning_rate),
            "run_dir": str(self.folder(f"ours-{divergence}")),
        }
        experiment = self.experiment(*(word for key, value in changes.items() for word in (f"--{key}", value)))
        for stage in stages(experiment):
            if stage.command != "evaluate":
                recipe = importlib.import_module(f"distill.recipes.{stage.command.replace('-', '_')}")
                recipe.main(stage.experiment, stage.following)
                free_memory()

    def run_trl(self, divergence: str) -> None:
        """Train with DistillationTrainer, which writes, scores and learns in every step."""
        from datasets import Dataset
        from transformers import AutoModelForCausalLM
        from trl import DistillationConfig, DistillationTrainer

        experiment, folder, steps = self.experiment(), self.folder(f"trl-{divergence}"), self.options.steps
        train, generate, steps = experiment.train, experiment.generate, steps * self.options.rounds
        settings = DistillationConfig(
            output_dir=str(folder),
            beta=BETAS[divergence],
            max_steps=steps,
            per_device_train_batch_size=self.texts_a_step(),
            max_completion_length=generate.max_new_tokens,
            temperature=generate.temperature,
            learning_rate=self.options.learning_rate,
            lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs={"min_lr_rate": train.final_learning_rate},
            warmup_steps=round(steps * train.warmup_fraction),
            weight_decay=train.weight_decay,
            adam_beta2=train.beta2,
            max_grad_norm=train.gradient_clip,
            gradient_checkpointing=False,
            bf16=train.precision == "bf16-mixed",
            use_cpu=pick_device(train.accelerator).type == "cpu",
            save_strategy="no",
            report_to="none",
            logging_steps=10,
        )
        trainer = DistillationTrainer(
            model=AutoModelForCausalLM.from_pretrained(self.start, dtype=torch.float32),
            teacher_model=AutoModelForCausalLM.from_pretrained(
                self.work / "teacher", dtype=getattr(torch, experiment.teacher.compute_dtype)
            ),
            args=settings,
            processing_class=load_folder_tokenizer(self.start),
            train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in self.prompts()]),
        )
        trainer.train()
        trainer.save_model(str(folder / "student"))
        lengths = [line["completions/mean_length"] for line in trainer.state.log_history if "loss" in line]
        (folder / "lengths.json").write_text(json.dumps(lengths))

    def rows(self) -> tuple[dict[str, dict[str, Any]], dict[str, Cost]]:
        """Return figures and costs of all sides by name; the student that they begin with has no costs."""
        self.save_teacher()
        sides = [f"{who}-{divergence}" for divergence in self.options.divergences for who in ("ours", "trl")]
        costs = {side: self.cost(side) for side in sides}
        students = {"the student of round 0": self.start} | {side: self.folder(side) / "student" for side in sides}
        return measure(self.experiment("--run_dir", str(self.table.work / "rounds")), students), costs


def as_markdown(found: dict[str, dict[str, Any]], costs: dict[str, Cost]) -> str:
    """Return the table of all sides."""
    lines = ["| side | KL on own text | held-out KL | ended | peak memory | processor time |"]
    lines.append("|---|---:|---:|---:|---:|---:|")
    for name, figures in found.items():
        own = figures["own_texts"]
        spent = "| |"
        if name in costs:
            spent = f"| {costs[name].peak_bytes / 1e9:.2f} GB | {costs[name].processor:.0f} s |"
        lines.append(f"| {name} | {own['kl']:.4f} | {figures['fidelity']['kl']:.4f} | {own['ended']:.4f} {spent}")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Make the table, or run one side of it."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--divergences", nargs="+", choices=list(BETAS), default=list(BETAS), help="of both sides")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    options = parser.parse_args()
    peers = Peers(options)
    if options.side:
        who, divergence = options.side.split("-")
        peers.folder(options.side).mkdir(parents=True)
        (peers.run_ours if who == "ours" else peers.run_trl)(divergence)
        return
    found, costs = peers.rows()
    table = as_markdown(found, costs)
    (peers.work / "peers.json").write_text(json.dumps(found, indent=1))
    (peers.work / "peers.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
