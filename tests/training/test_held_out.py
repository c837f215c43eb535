"""The message of a held-out measurement names a KL that is another than that of teacher and student."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from distill.training.held_out import MeasureHeldOut

VALUES = {"held_out_kl": 0.25, "held_out_loss": 0.5, "held_out_nll": 3.0, "teacher_nll": 2.9}


@pytest.mark.parametrize(
    ("qualifier", "said"),
    [
        ("", "step 5: held-out KL 0.2500, loss 0.5000 nats"),
        ("at temperature 2", "step 5: held-out KL 0.2500, loss 0.5000 nats (the KL is at temperature 2)"),
    ],
)
def test_the_kl_is_called_what_it_is(
    qualifier: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data: Any = SimpleNamespace(val_dataloader=list)
    module: Any = SimpleNamespace(
        measure=lambda batches: VALUES, steps_begun=5, objective=SimpleNamespace(temperature=2.0)
    )
    trainer: Any = SimpleNamespace(loggers=[], save_checkpoint=lambda *args, **kwargs: None)
    MeasureHeldOut(data, 5, "held_out_kl", tmp_path / "best", None, qualifier).on_train_end(trainer, module)
    assert said in [line.strip() for line in "".join(capsys.readouterr()).splitlines()]
