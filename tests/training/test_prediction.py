"""A training says early where it will end, and says so plainly when that is hardly worth it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from distill.training.optimizers.schedule import Schedule
from distill.training.prediction import FILE, PredictEnd

STEPS = 200
Trained = Callable[..., str]


@pytest.fixture
def trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Trained:
    """Drives the callback through a training with a given KL after each step, and returns what was said."""

    def run(kl: Callable[[int], float], name: str = "student", steps: int = STEPS, stop: int | None = None) -> str:
        capsys.readouterr()
        values: Any = lambda step: {"held_out_kl": kl(step), "held_out_nll": 5.0, "teacher_nll": 4.0}  # noqa: E731
        module: Any = SimpleNamespace(
            steps_begun=0,
            measure=lambda batches: values(module.steps_begun) if batches else {},
            make_schedule=lambda total: Schedule("cosine", total, 0.05, 0.2, 0.1),
        )
        data: Any = SimpleNamespace(some_held_out=lambda count: [1])
        trainer: Any = SimpleNamespace(estimated_stepping_batches=float(steps))
        callback = PredictEnd(data, name, tmp_path / name, tmp_path / "student" if name == "control" else None)
        callback.on_train_start(trainer, module)
        for step in range(1, (stop or steps) + 1):
            module.steps_begun = step
            callback.on_train_batch_end(trainer, module, None, None, 0)
        callback.on_train_end(trainer, module)
        return "".join(capsys.readouterr())

    return run


def file_of(folder: Path) -> Any:
    return json.loads((folder / FILE).read_text())


def learns(step: int) -> float:
    return 4.0 * (step + 5) ** -0.25


def test_a_training_says_where_it_begins_and_where_it_will_end(trained: Trained, tmp_path: Path) -> None:
    said = trained(learns)
    assert f"before the first step, on held-out text: {learns(0):.3f} nats from its teacher" in said
    assert "after 10% of the steps" in said and "after 50% of the steps" in said and "little to gain" not in said
    found = file_of(tmp_path / "student")
    assert found["end"] == pytest.approx(learns(STEPS))
    for share in ("0.1", "0.5"):
        at = found["predicted"][share]
        assert at["1"]["low"] < at["1"]["kl"] < at["1"]["high"] and at["10"]["kl"] < at["3"]["kl"] < at["1"]["kl"]


def test_a_steep_beginning_tells_no_end_yet(trained: Trained, tmp_path: Path) -> None:
    said = trained(lambda step: 8.0 / (1 + step / 10) ** 0.8)
    assert "after 10% of the steps: the held-out KL fell from 8.000 to" in said and "too steeply" in said
    assert [*file_of(tmp_path / "student")["predicted"]] == ["0.5"]


def test_a_student_that_hardly_moves_is_told_of(trained: Trained) -> None:
    assert "there is little to gain from this teacher on this text" in trained(lambda step: 0.2 - 1e-5 * step)


def test_a_control_that_comes_as_near_is_told_of(trained: Trained) -> None:
    trained(learns)
    assert "come as near to the teacher as the student did" in trained(lambda step: 0.9 * learns(step), "control")
    assert "come as near" not in trained(lambda step: 1.5 * learns(step), "control")


def test_a_training_that_was_stopped_has_no_end(trained: Trained, tmp_path: Path) -> None:
    trained(learns, stop=150)
    assert file_of(tmp_path / "student")["end"] is None


def test_too_few_steps_predict_nothing(trained: Trained) -> None:
    assert "predicted" not in trained(learns, steps=5)
