"""Objectives through the commands: every divergence trains where it can be computed, or is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from distill.losses.objective import DIVERGENCES

pytestmark = pytest.mark.usefixtures("one_thread")

FEW_STEPS = ["--train.max_steps", "8", "--train.log_every_steps", "1", "--train.validate_every_steps", "4"]


@pytest.fixture(scope="module")
def exact(world: Any, distill: Any, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A cache of hidden states, and arguments for a training on it."""
    folder = tmp_path_factory.mktemp("hidden")
    file = world.write(folder / "experiment.yaml", cache={"scheme": "hidden", "max_samples": 32})
    distill("cache-teacher", file).done()
    return [file, "--cache.dir", str(folder / "run/cache"), *FEW_STEPS]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "student/model.safetensors")


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def default(exact: list[str], distill: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    run = tmp_path_factory.mktemp("default") / "run"
    distill("train-student", *exact, "--run_dir", run).done()
    return weights(run)


def test_each_divergence_is_a_training_of_its_own(
    exact: list[str], default: dict[str, torch.Tensor], distill: Any, tmp_path: Path
) -> None:
    seen = [default]
    for name in DIVERGENCES:
        run = tmp_path / name
        outcome = distill("train-student", *exact, "--run_dir", run, "--loss.divergence", name).done()
        losses = [float(line.split()[6]) for line in outcome.out.splitlines() if ": held-out KL" in line]
        assert len(losses) == 2 and all(math.isfinite(loss) for loss in losses) and losses[1] < losses[0], (
            name,
            losses,
        )
        found = weights(run)
        assert same(found, default) is (name == "forward_kl")
        assert name == "forward_kl" or not any(same(found, other) for other in seen), name
        seen.append(found)


@pytest.mark.parametrize("name", [name for name in DIVERGENCES if name != "forward_kl"])
def test_sparse_samples_do_not_pass_for_what_they_cannot_estimate(train: Any, tmp_path: Path, name: str) -> None:
    train("--loss.divergence", name).refused("loss.divergence", name, "varopt", "--cache.scheme hidden")
    assert not (tmp_path / "run/student").exists()


@pytest.mark.parametrize(
    "changed",
    [
        ["--loss.feature_weight", "2"],
        ["--loss.feature_weight", "2", "--loss.feature", "mse"],
        ["--loss.alpha_schedule", "with_learning_rate"],
        ["--loss.divergence", "jsd", "--loss.beta", "0.2"],
        ["--loss.divergence", "skewed_kl", "--loss.skew", "0.5"],
    ],
    ids=" ".join,
)
def test_each_option_does_something_and_survives_a_resumption(
    exact: list[str], default: dict[str, torch.Tensor], distill: Any, tmp_path: Path, changed: list[str]
) -> None:
    run = [*exact, "--run_dir", str(tmp_path / "run"), *changed]
    assert distill("train-student", *run, "--train.max_time", "0s").status == 130
    distill("train-student", *run, "--resume").done()
    found = weights(tmp_path / "run")
    assert found.keys() == default.keys(), "what the features were learned with is left behind"
    assert not same(found, default)
    whole = [*exact, "--run_dir", str(tmp_path / "whole"), *changed]
    distill("train-student", *whole).done()
    assert same(found, weights(tmp_path / "whole"))


def test_features_need_hidden_states(train: Any) -> None:
    train("--loss.feature_weight", "1").refused("loss.feature_weight", "varopt", "hidden")
