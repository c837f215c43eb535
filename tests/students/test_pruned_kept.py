"""Importances of a teacher are kept, found again for the same samples, and never trusted when they are damaged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distill.models.checkpoints import Checkpoint
from students.pruning_importance import Importance, Samples, Wanted
from students.pruning_kept import kept_importance

WIDTHS = ("hidden_ID", "groups_IG", "neurons_IF", "experts_IE")


class Measured:
    """A measurement that tells how often it was made, of numbers that differ each time."""

    def __init__(self) -> None:
        self.asked: list[Wanted] = []

    def __call__(self, wanted: Wanted) -> Importance:
        self.asked.append(wanted)
        made = {name: torch.full((3, 4), float(len(self.asked))) for name in WIDTHS}
        return Importance(depth_I=torch.arange(3.0) if wanted.depth else None, **made)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    (tmp_path / "model.gguf").write_bytes(b"weights")
    return Checkpoint(tmp_path, "model.gguf", "teacher")


def samples(first: int = 1) -> Samples:
    ids = torch.arange(first, first + 8).view(2, 4)
    return Samples(ids, torch.arange(4).expand(2, 4).contiguous(), torch.ones(2, 4, dtype=torch.bool))


def test_a_second_student_measures_nothing_and_depth_adds_to_what_is_known(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    measure, folder = Measured(), str(tmp_path / "measured")
    first = kept_importance(folder, checkpoint, samples(), Wanted(hidden=True), measure)
    again = kept_importance(folder, checkpoint, samples(), Wanted(neurons=True), measure)
    assert len(measure.asked) == 1 and first.neurons_IF is None and again.hidden_ID is None
    assert torch.equal(again.neurons_IF, torch.ones(3, 4))
    deep = kept_importance(folder, checkpoint, samples(), Wanted(depth=True), measure)
    assert measure.asked[1].depth and torch.equal(deep.depth_I, torch.arange(3.0))
    kept_importance(folder, checkpoint, samples(), Wanted(True, True, True, True), measure)
    assert len(measure.asked) == 2


def test_other_samples_other_weights_and_damage_are_measured_again(checkpoint: Checkpoint, tmp_path: Path) -> None:
    measure, folder = Measured(), tmp_path / "measured"
    wanted = Wanted(neurons=True)
    kept_importance(str(folder), checkpoint, samples(), wanted, measure)
    kept_importance(str(folder), checkpoint, samples(2), wanted, measure)
    assert len(measure.asked) == 2
    checkpoint.path.write_bytes(b"other weights")
    kept_importance(str(folder), checkpoint, samples(), wanted, measure)
    assert len(measure.asked) == 3
    for count, place in enumerate((9, -3), start=4):
        for file in folder.iterdir():
            content = bytearray(file.read_bytes())
            content[place] ^= 1
            file.write_bytes(content)
        found = kept_importance(str(folder), checkpoint, samples(), wanted, measure)
        assert len(measure.asked) == count and torch.equal(found.neurons_IF, torch.full((3, 4), float(count)))


def test_a_folder_that_cannot_be_written_is_not_missed(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    found = kept_importance(str(tmp_path / "file"), checkpoint, samples(), Wanted(groups=True), Measured())
    assert found.groups_IG is not None and (tmp_path / "file").read_text() == "no folder"
