"""The cache against an online teacher: TRL's GKDTrainer on the same conversations, teacher, student and precision.

`make bench-peers ARGS="--only peer_trl"`. GKDTrainer runs with lmbda 0 and beta 0: the forward KL on the given answers,
the teacher beside the student at every step, full logits of both. It has no gradient checkpointing here, as ours has
none. Both make about as many optimiser steps. Ours are the commands `cache-teacher` and `train-student`: their own
time as `costs.jsonl` has it, checkpoints and saving included; TRL's is that of `trainer.train()`, which saves nothing.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from paired import Cost, Pairs, Row, Setup, cost_apart, cpu_seconds, ratio_row
from subjects import save_subjects

ROOT = Path(__file__).resolve().parents[2]
CONVERSATIONS, TINY_CONVERSATIONS = 64, 4
LENGTH, PER_STEP = 512, 4
"""Tokens of a conversation at most, and conversations of TRL's steps."""


@dataclass(frozen=True)
class Precision:
    """One precision, in the words of each side."""

    name: str
    weights: str
    lightning: str


PRECISIONS = (Precision("bf16", "bfloat16", "bf16-mixed"), Precision("fp32", "float32", "32-true"))


def rows(setup: Setup) -> Iterator[Row]:
    """Yield first epoch, further epoch, peak memory and whole commands of each precision."""
    for precision in PRECISIONS:
        if setup.wants(case := f"{CONVERSATIONS} conversations, {precision.name}"):
            with tempfile.TemporaryDirectory() as folder:
                yield from _rows(setup, Path(folder), precision, case)


def _rows(setup: Setup, folder: Path, precision: Precision, case: str) -> Iterator[Row]:
    number = TINY_CONVERSATIONS if setup.tiny else CONVERSATIONS
    (folder / "conversations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in conversations(number)))
    save_subjects(folder, precision.weights)
    ours, theirs = [], []
    for repeat in range(setup.repeats):
        sides = ((_ours, ours), (_theirs, theirs))
        for run, found in sides if repeat % 2 == 0 else sides[::-1]:
            found.append(run(setup, folder, precision))

    def pairs(key: str) -> Pairs:
        return Pairs([mine[key] for mine in ours], [other[key] for other in theirs])

    peer = "TRL GKDTrainer"
    yield pairs("first").time_row("peer_trl", case, f"first epoch with caching, time of {peer}'s", "≤ 0.45")
    yield pairs("further").speed_row("peer_trl", case, f"each further epoch, speed of {peer}'s", "≥ 4")
    memory = [[cost["whole"].peak_bytes / 1e9 for cost in side] for side in (ours, theirs)]
    yield ratio_row("peer_trl", case, f"peak memory of {peer}'s", *memory, "{:.2f} GB", "≤ 0.5")
    yield pairs("whole").time_row("peer_trl", case, f"whole commands, from their start, of {peer}'s")


def conversations(number: int) -> list[dict[str, Any]]:
    """Return questions and answers cut from the demo's speeches: 10 to 60 words asked, 40 to 160 answered."""
    with (ROOT / "data" / "sotu.jsonl").open(encoding="utf-8") as file:
        words = [word for line, _ in zip(file, range(20), strict=False) for word in json.loads(line)["text"].split()]
    chance, found, place = random.Random(0), [], 0
    for _ in range(number):
        asked, answered = chance.randrange(10, 60), chance.randrange(40, 160)
        question = "Continue this speech: " + " ".join(words[place : place + asked])
        answer = " ".join(words[place + asked : place + asked + answered])
        place += asked + answered
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        found.append({"messages": turns})
    return found


def _ours(setup: Setup, folder: Path, precision: Precision) -> dict[str, Cost]:
    """Run both commands in a new run folder, two epochs, and return the costs of the epochs and of all."""
    run, clock = folder / "run", folder / "epochs.json"
    shutil.rmtree(run, ignore_errors=True)
    content = {
        "corpus": {"path": str(folder / "conversations.jsonl"), "sequence_length": LENGTH, "held_out": 0},
        "teacher": {"model": str(folder / "teacher"), "quantization": "none", "compute_dtype": precision.weights},
        "cache": {"held_out_samples": 0, "batch_size": 4},
        "student": {"class_path": "huggingface", "options": {"model": str(folder / "student")}},
        "train": {
            **{"epochs": 2, "batch_size": 2, "precision": precision.lightning, "learning_rate": 1e-4},
            **{"loggers": ["csv"], "accelerator": "gpu" if setup.device == "cuda" else "cpu"},
            "callbacks": [
                {
                    "class_path": str(Path(__file__).with_name("epoch_clock.py")) + ":EpochClock",
                    "init_args": {"file": str(clock)},
                }
            ],
        },
        "run_dir": str(run),
    }
    (folder / "experiment.yaml").write_text(yaml.safe_dump(content))
    command = [sys.executable, "-m", "distill.cli"]
    cached = cost_apart([*command, "cache-teacher", str(folder / "experiment.yaml")])
    trained = cost_apart([*command, "train-student", str(folder / "experiment.yaml")])
    noted = {line["phase"]: line for line in map(json.loads, (run / "costs.jsonl").read_text().splitlines())}
    second = Cost(*json.loads(clock.read_text())[1])
    # The processor time of a phase alone is not known: for the first epoch both sides count their whole programs'.
    seconds = noted["cache-teacher"]["seconds"] + noted["train-student"]["seconds"] - second.wall
    processor = cached.processor + trained.processor - second.processor
    whole = Cost(cached.wall + trained.wall - second.wall, processor, max(cached.peak_bytes, trained.peak_bytes))
    return {"first": Cost(seconds, processor), "further": second, "whole": whole}


def _theirs(setup: Setup, folder: Path, precision: Precision) -> dict[str, Cost]:
    line = [sys.executable, __file__, str(folder), precision.weights, setup.device]
    whole = cost_apart(line)
    epoch = Cost(*json.loads((folder / "gkd.json").read_text()))
    return {"first": Cost(epoch.wall, whole.processor), "further": epoch, "whole": whole}


def gkd(folder: Path, weights: str, device: str) -> None:
    """Train one epoch with TRL's GKDTrainer and write its wall and processor seconds."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    tokenizer = AutoTokenizer.from_pretrained(folder / "teacher")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    settings = GKDConfig(
        output_dir=str(folder / "gkd"),
        lmbda=0.0,
        beta=0.0,
        max_length=LENGTH,
        num_train_epochs=1,
        per_device_train_batch_size=PER_STEP,
        learning_rate=1e-4,
        weight_decay=0.1,
        gradient_checkpointing=False,
        bf16=weights == "bfloat16",
        use_cpu=device == "cpu",
        save_strategy="no",
        report_to="none",
        logging_steps=10,
    )
    lines = (folder / "conversations.jsonl").read_text(encoding="utf-8").splitlines()
    trainer = GKDTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "student", dtype=torch.float32),
        teacher_model=AutoModelForCausalLM.from_pretrained(folder / "teacher", dtype=getattr(torch, weights)),
        args=settings,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list([json.loads(line) for line in lines]),
    )
    begin, processor = time.perf_counter(), cpu_seconds()
    trainer.train()
    (folder / "gkd.json").write_text(json.dumps([time.perf_counter() - begin, cpu_seconds() - processor]))


if __name__ == "__main__":
    gkd(Path(sys.argv[1]), *sys.argv[2:])
