"""The whole of a distillation against the online alternative, from the shell (`--only end_to_end`).

Ours are `distill cache-teacher` and `distill train-student` on speeches, with everything that they do by the way:
checks, forecast, checkpoints, the saved student. The alternative is a plain loop in PyTorch (`online` below) on
the same samples: teacher and student forward at every step, full logits of both, forward KL, AdamW; it saves nothing.
The second case is `distill run configs/demo.yaml`, evaluation included, against the time that we aim at.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import yaml
from paired import Cost, Pairs, Row, Setup, cost_apart, number_row, ratio_row
from subjects import save_subjects

ROOT = Path(__file__).resolve().parents[2]
LENGTH, PER_STEP, EPOCHS = 256, 4, 3
DEMO_SECONDS = 210
"""Aim for the demo, once it is installed, on two cores of a server of 2024."""
DISTILL = [sys.executable, "-m", "distill.cli"]


def rows(setup: Setup) -> Iterator[Row]:
    """Yield whole commands against the online loop, then the demo."""
    samples = 4 if setup.tiny else 32
    case = f"{samples} x {LENGTH} tokens, {EPOCHS} epochs, bf16"
    if setup.wants(case):
        with tempfile.TemporaryDirectory() as folder:
            pairs = _compared(Path(folder), samples, setup)
        yield pairs.time_row("end_to_end", case, "time of an online teacher in plain PyTorch")
        peaks = [[cost.peak_bytes / 1e9 for cost in side] for side in (pairs.ours, pairs.peer)]
        yield ratio_row("end_to_end", case, "peak memory of the same", *peaks, "{:.2f} GB")
    if setup.wants("make demo") and not setup.tiny:
        with tempfile.TemporaryDirectory() as folder:
            whole = cost_apart([*DISTILL, "run", str(ROOT / "configs" / "demo.yaml"), "--run_dir", folder], cwd=ROOT)
        yield number_row("end_to_end", "make demo", "time of the aim", whole.wall, DEMO_SECONDS, "{:.0f} s", "≤ 1")


def _compared(folder: Path, samples: int, setup: Setup) -> Pairs:
    save_subjects(folder, "bfloat16")
    file, run = folder / "experiment.yaml", folder / "run"
    content = {
        "corpus": {"path": str(ROOT / "data" / "sotu.jsonl"), "sequence_length": LENGTH, "held_out": 0},
        "teacher": {"model": str(folder / "teacher"), "quantization": "none", "compute_dtype": "bfloat16"},
        "cache": {"max_samples": samples, "held_out_samples": 0, "shard_samples": 16},
        "student": {"class_path": "huggingface", "options": {"model": str(folder / "student")}},
        "train": {"epochs": EPOCHS, "batch_size": PER_STEP, "precision": "bf16-mixed", "learning_rate": 1e-4},
        "run_dir": str(run),
    }
    content["train"]["accelerator"] = "gpu" if setup.device == "cuda" else "cpu"
    file.write_text(yaml.safe_dump(content))
    environment = {"HF_DATASETS_CACHE": str(folder / "tables")}

    def ours() -> Cost:
        shutil.rmtree(run, ignore_errors=True)
        shutil.rmtree(folder / "tables", ignore_errors=True)
        both = [
            cost_apart([*DISTILL, command, str(file)], environment) for command in ("cache-teacher", "train-student")
        ]
        walls, processor, peaks = zip(*((cost.wall, cost.processor, cost.peak_bytes) for cost in both), strict=True)
        return Cost(sum(walls), sum(processor), max(peaks))

    def theirs() -> Cost:
        return cost_apart([sys.executable, __file__, str(folder), setup.device])

    found = Pairs([ours()], [theirs()])
    for _ in range(1, setup.repeats):
        found.peer.append(theirs())
        found.ours.append(ours())
    return found


def online(folder: Path, device: str) -> None:
    """Train on the samples of the finished cache with the teacher beside the student."""
    import torch
    from torch.nn.functional import kl_div, log_softmax
    from transformers import AutoModelForCausalLM

    from distill.cache.reading.reader import CacheReader
    from distill.training.data import CacheDataModule

    load = AutoModelForCausalLM.from_pretrained
    teacher = load(folder / "teacher", dtype=torch.bfloat16).to(device).eval()
    student = load(folder / "student", dtype=torch.float32).to(device).train()
    reader = CacheReader(folder / "run" / "cache", "train")
    data = CacheDataModule(reader, None, step_samples=PER_STEP, batch_size=PER_STEP, seed=0)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)
    for _ in range(EPOCHS):
        for batch in data.train_dataloader():
            ids_BL, mask_BL = batch.input_ids_BL.to(device), batch.loss_mask_BL.to(device)
            places_BL = batch.position_ids_BL.to(device)
            with torch.no_grad():
                teacher_BLV = teacher(ids_BL, position_ids=places_BL, use_cache=False).logits
            with torch.autocast(device, torch.bfloat16):
                student_BLV = student(ids_BL, position_ids=places_BL, use_cache=False).logits
            logp_NV, logq_NV = (log_softmax(z_BLV[mask_BL].float(), -1) for z_BLV in (teacher_BLV, student_BLV))
            kl_div(logq_NV, logp_NV, reduction="batchmean", log_target=True).backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()


if __name__ == "__main__":
    online(Path(sys.argv[1]), sys.argv[2])
