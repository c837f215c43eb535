"""Learning rate schedules and the groups of AdamW."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from distill.training.optimizer import Schedule, adamw


def curve(kind: str, total: int = 100, warmup: float = 0.1, decay: float = 0.2, final: float = 0.1) -> list[float]:
    schedule = Schedule(kind, total, warmup, decay, final)  # type: ignore[arg-type]
    return [schedule(step) for step in range(total + 1)]


@pytest.mark.parametrize("kind", ["cosine", "wsd"])
def test_the_warmup_rises_linearly_to_the_peak(kind: str) -> None:
    assert curve(kind)[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert max(curve(kind)) == 1


def test_cosine() -> None:
    rates = curve("cosine")
    assert rates[10] == 1 and rates[-1] == pytest.approx(0.1)
    assert rates[55] == pytest.approx(0.55)  # half way
    assert all(after < before for before, after in pairwise(rates[10:]))
    drops = [before - after for before, after in pairwise(rates[10:])]
    assert drops[0] < drops[45] > drops[-1]  # flat at both ends


def test_warmup_stable_decay() -> None:
    rates = curve("wsd")
    assert rates[9:81] == [1] * 72
    assert rates[80:] == pytest.approx([1 - 0.9 * step / 20 for step in range(21)])


@pytest.mark.parametrize("kind", ["cosine", "wsd"])
@pytest.mark.parametrize("total", [1, 2, 3])
@pytest.mark.parametrize(("warmup", "decay"), [(0, 0), (0.5, 0.5), (1, 0), (0, 1)])
def test_short_trainings_learn_at_every_step(kind: str, total: int, warmup: float, decay: float) -> None:
    rates = curve(kind, total, warmup, decay)[:total]
    assert all(0.1 <= rate <= 1 for rate in rates)


def test_after_the_end_it_stays() -> None:
    for kind in ("cosine", "wsd"):
        assert Schedule(kind, 10, 0.1, 0.2, 0.1)(15) == pytest.approx(0.1)  # type: ignore[arg-type]


def test_only_matrices_decay() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Embedding(5, 2), nn.Linear(4, 4))
    module[3].requires_grad_(False)
    optimizer = adamw(module, 0.3, 0.7, (0.8, 0.9))
    groups = {group["weight_decay"]: group for group in optimizer.param_groups}
    assert {p.data_ptr() for p in groups[0.7]["params"]} == {module[0].weight.data_ptr(), module[2].weight.data_ptr()}
    vectors = (module[0].bias, module[1].weight, module[1].bias)
    assert {p.data_ptr() for p in groups[0.0]["params"]} == {p.data_ptr() for p in vectors}
    assert all(group["lr"] == 0.3 and group["betas"] == (0.8, 0.9) for group in groups.values())


def test_a_module_of_matrices_alone() -> None:
    assert len(adamw(nn.Linear(2, 2, bias=False), 1e-3, 0.1, (0.9, 0.95)).param_groups) == 1


def test_a_shared_parameter_is_optimised_once() -> None:
    module = nn.Sequential(nn.Embedding(5, 5), nn.Linear(5, 5, bias=False))
    module[1].weight = module[0].weight
    (group,) = adamw(module, 1e-3, 0.1, (0.9, 0.95)).param_groups
    assert len(group["params"]) == 1 and isinstance(group["params"][0], torch.Tensor)
