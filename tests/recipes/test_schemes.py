"""Every scheme through the commands: cached, read back, learned from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

SCHEMES: dict[str, dict[str, Any]] = {
    "varopt": {"scheme": "varopt", "threshold": 0.02},
    "top_k": {"scheme": "top_k", "entries": 12},
    "random": {"scheme": "random", "entries": 20},
    "hidden": {"scheme": "hidden"},
    "hidden, warm": {"scheme": "hidden", "temperature": 2.0},
}


@pytest.mark.parametrize("cache", SCHEMES.values(), ids=SCHEMES.keys())
def test_a_student_learns_from_it(cache: dict[str, Any], world: Any, distill: Any, tmp_path: Path) -> None:
    file = world.write(tmp_path / "experiment.yaml", cache=cache, train={"epochs": 3})
    outcome = distill("run", file)
    assert outcome.status == 0, outcome.text
    result = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert result["fidelity"]["student"]["kl"] < 0.9 * result["fidelity"]["before"]["kl"]


def _exact(world: Any, batch: Any, reader: Any) -> torch.Tensor:
    """The teacher's distributions at the batch's positions, float32."""
    from distill.models import checkpoints
    from distill.models.huggingface import HuggingFaceLanguageModel, load_pretrained

    checkpoint = checkpoints.resolve(world.content["teacher"]["model"])
    teacher = HuggingFaceLanguageModel(load_pretrained(checkpoint, torch.float32)).eval()
    with torch.no_grad():
        hidden_ND = teacher.body(batch.input_ids_BL, batch.position_ids_BL)[batch.loss_mask_BL]
        return torch.softmax(teacher.head.with_rows(reader.manifest.vocab_size)(hidden_ND), dim=-1)


def _cached(name: str, world: Any, distill: Any, folder: Path) -> tuple[Any, Any, torch.Tensor]:
    from distill.cache.reading.reader import CacheReader

    file = world.write(folder / "experiment.yaml", cache=SCHEMES[name])
    outcome = distill("cache-teacher", file)
    assert outcome.status == 0, outcome.text
    reader = CacheReader(folder / "run" / "cache", "train")
    batch = reader.collate([reader[index] for index in range(8)])
    return reader, batch, _exact(world, batch, reader)


def test_the_rest_of_top_k_is_the_mass_without_an_entry(world: Any, distill: Any, tmp_path: Path) -> None:
    _, batch, exact_NV = _cached("top_k", world, distill, tmp_path)
    ids_NK, weights_NK = batch.targets.padded()
    kept_N = exact_NV.gather(1, ids_NK).sum(-1)
    torch.testing.assert_close(weights_NK.sum(-1) + batch.targets.rest_N, torch.ones_like(kept_N))
    # Codes are in steps of 2 %, rounded at random: exact on average, within a step each.
    assert ((batch.targets.rest_N - (1 - kept_N)).abs() <= 0.021 * (1 - kept_N) + 1e-6).all()


def test_hidden_states_give_the_exact_distributions_back(world: Any, distill: Any, tmp_path: Path) -> None:
    from distill.cache.format.head import load_head
    from distill.losses.chunks import DenseChunk
    from distill.losses.divergences import forward_kl

    _, batch, exact_NV = _cached("hidden", world, distill, tmp_path)
    head = load_head(tmp_path / "run" / "cache")
    true_ids_N = torch.zeros(len(exact_NV), dtype=torch.long)
    chunk = DenseChunk(batch.targets.hidden_ND, head, true_ids_N)
    # bfloat16 keeps 8 bits of a hidden state: far below what any sparse target loses.
    assert forward_kl(exact_NV.log(), chunk).mean() < 1e-3
    own_N = -(chunk.log_probs_NV().exp() * chunk.log_probs_NV()).sum(-1)
    assert (own_N - batch.entropy_N).abs().max() <= 1 / 128 + 1e-4
    same_logits_NV = head(batch.targets.hidden_ND.float())
    assert forward_kl(same_logits_NV, chunk).abs().max() < 1e-5


@pytest.mark.parametrize("key", ["draws", "exponent"])
def test_settings_that_are_gone_say_what_to_do(world: Any, distill: Any, tmp_path: Path, key: str) -> None:
    file = world.write(tmp_path / "experiment.yaml", cache={key: 2})
    distill("cache-teacher", file).refused(f"cache.{key}", "gone", "remove it")
    distill("cache-teacher", world.write(tmp_path / "e.yaml"), f"--cache.{key}", "2").refused(f"--cache.{key}", "gone")
