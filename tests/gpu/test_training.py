"""Training on a CUDA device, with the levers that exist only there: it learns, and it resumes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none here"),
]

LEVERS: dict[str, list[str]] = {
    "plain": [],
    "float16": ["--train.precision", "16-mixed"],
    "bf16-true, stochastic": ["--train.precision", "bf16-true", "--train.rounding", "stochastic"],
    "offloaded": ["--train.offload_activations", "true", "--train.activation_checkpointing", "true"],
    "8 bits": ["--train.optimizer", "adamw_8bit"],
    "paged": ["--train.optimizer", "paged_adamw_8bit"],
    "step in backward": ["--train.step_in_backward", "true", "--train.gradient_clip", "0"],
}


@pytest.fixture(scope="module")
def cached(world: Any, distill: Any, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments for a training on a finished cache."""
    folder = tmp_path_factory.mktemp("cuda")
    file = world.write(folder / "experiment.yaml", train={"accelerator": "cuda"})
    distill("cache-teacher", file).done()
    return [file, "--cache.dir", str(folder / "run/cache"), "--evaluate.control", "false"]


@pytest.mark.parametrize("lever", LEVERS.values(), ids=LEVERS.keys())
def test_a_lever_trains_and_resumes(cached: list[str], distill: Any, tmp_path: Path, lever: list[str]) -> None:
    own = [*cached, "--run_dir", str(tmp_path / "run"), *lever]
    assert distill("train-student", *own, "--train.max_time", "0s").status == 130
    distill("train-student", *own, "--resume").done()
    distill("evaluate", *own).done()
    result = json.loads((tmp_path / "run/evaluation.json").read_text())
    assert result["fidelity"]["student"]["kl"] < 0.9 * result["fidelity"]["before"]["kl"]


def test_float16s_scaler_is_in_the_checkpoint(cached: list[str], distill: Any, tmp_path: Path) -> None:
    distill("train-student", *cached, "--run_dir", tmp_path / "run", "--train.precision", "16-mixed").done()
    last = max((tmp_path / "run/checkpoints/student").glob("step-*.ckpt"))
    content = torch.load(last, map_location="cpu", weights_only=True)
    assert content["MixedPrecision"]["scale"] > 0
