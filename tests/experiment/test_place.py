"""One way from the experiment to its objects, on a device or without memory."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.experiment.file import load_experiment
from distill.experiment.place import Place
from distill.experiment.roles import roles
from distill.experiment.student import make_student_to_train
from distill.experiment.teacher import Teacher
from distill.experiment.training import make_module
from distill.forecast.simulation.fake import without_memory
from distill.models.checkpoints import Checkpoint
from distill.models.shapes import finder

ROOT = Path(__file__).resolve().parents[2]


def nowhere(name: str, revision: str | None, trust_remote_code: bool) -> Checkpoint:
    raise AssertionError("a local folder is not looked for")


def calls(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)


@pytest.mark.parametrize(
    ("made_by", "files"),
    [
        ("plugins.build", {"experiment/student.py", "experiment/teacher.py"}),
        ("DistillationModule", {"experiment/training.py"}),
        # Of a cache and of written texts; the second and the last read one.
        (
            "Manifest",
            {"experiment/cache.py", "cache/format/manifest.py", "experiment/generation.py", "corpus/written.py"},
        ),
        ("open_corpus", {"experiment/teacher.py"}),
        ("dtype_of_card", {"experiment/place.py", "experiment/precision.py", "models/devices.py"}),
    ],
)
def test_each_object_is_made_in_one_place(made_by: str, files: set[str]) -> None:
    found = {
        path
        for path in (ROOT / "distill").rglob("*.py")
        if any(f".{call}".endswith(f".{made_by}") for call in calls(path))
    }
    assert {path.relative_to(ROOT / "distill").as_posix() for path in found} == files


@pytest.mark.parametrize(
    ("is_cuda", "has_bf16", "best"), [(True, True, "bfloat16"), (True, False, "float16"), (False, False, "float32")]
)
def test_an_imagined_card_has_its_own_best_type(is_cuda: bool, has_bf16: bool, best: str) -> None:
    place = Place.without_memory(is_cuda, has_bf16, nowhere)
    assert place.compute_dtype("auto") == best and place.compute_dtype("float16") == "float16"
    assert place.device_type == ("cuda" if is_cuda else "cpu") and place.device.type == "cpu"


def test_models_are_shapes_while_they_are_made_without_memory_and_not_after() -> None:
    place = Place.without_memory(True, True, nowhere)
    with place.making():
        assert finder() is nowhere
    assert finder() is None
    with Place.host().making():
        assert finder() is None


LEVERS: list[dict[str, Any]] = [
    {},
    {"precision": "bf16-true", "activation_checkpointing": True},
    {"optimizer": "adamw_8bit", "gradient_clip": 0.0},
]


@pytest.mark.parametrize("train", LEVERS, ids=lambda value: " ".join(value))
def test_the_objects_without_memory_are_the_real_ones(world: Any, tmp_path: Path, train: dict[str, Any]) -> None:
    experiment = load_experiment(world.write(tmp_path / "experiment.yaml", train=train), [])

    def made(place: Place) -> Callable[[], tuple[Any, Any]]:
        vocab_size = Teacher(experiment, place).vocab_size

        def make() -> tuple[Any, Any]:
            student, _, _ = make_student_to_train(experiment, place, vocab_size)
            return Teacher(experiment, place).load(), make_module(
                experiment, place, roles(experiment)[0], student, vocab_size
            )

        return make

    real = made(Place.host())()
    shapes = made(Place.without_memory(False, False, nowhere))
    with without_memory("cpu"):
        imagined = shapes()
        for ours, theirs in zip(imagined, real, strict=True):
            expected = {name: (weight.shape, weight.dtype) for name, weight in theirs.named_parameters()}
            assert {name: (weight.shape, weight.dtype) for name, weight in ours.named_parameters()} == expected
        assert all(
            torch.is_tensor(weight) and "Fake" in type(weight.data).__name__ for weight in imagined[0].parameters()
        )
