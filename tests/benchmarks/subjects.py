"""Teacher and student that the benchmarks share: the demo's teacher, and its first layers as a student."""

from __future__ import annotations

from pathlib import Path

import torch

from distill.models import checkpoints, tokenizers
from distill.models.huggingface import load_pretrained

LAYERS = 8
"""Layers of the student, the first of the teacher's 30."""


def save_subjects(folder: Path, weights: str) -> None:
    """Save `teacher` (weights of the type named) and `student` (float32) as folders that transformers reads."""
    checkpoint = checkpoints.resolve("smollm2-135m-demo")
    tokenizer = tokenizers.load_tokenizer(checkpoint)
    model = load_pretrained(checkpoint, torch.float32)
    model.to(getattr(torch, weights)).save_pretrained(folder / "teacher")
    model.float()
    model.model.layers = model.model.layers[:LAYERS]
    model.config.num_hidden_layers = LAYERS
    model.save_pretrained(folder / "student")
    for name in ("teacher", "student"):
        tokenizer.save_pretrained(folder / name)
