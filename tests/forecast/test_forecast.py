"""A forecast needs configurations alone, and follows every lever."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from distill.errors import UserError
from distill.experiment.cache import make_scheme
from distill.experiment.configuration import Experiment
from distill.experiment.file import load_experiment
from distill.experiment.place import Place
from distill.experiment.student import make_student
from distill.forecast import sizes
from distill.forecast.advice import advise, apply
from distill.forecast.forecast import Forecaster
from distill.forecast.machine.cards import find_card
from distill.forecast.models import Models
from distill.forecast.phases.simulator import PHASES, NoForecast, Simulator
from distill.forecast.simulation.fake import without_memory

CARD = find_card("12GiB")


@pytest.fixture
def experiment(world: Any, tmp_path: Path) -> Callable[..., Experiment]:
    """An experiment of the tiny world with some sections changed."""

    def make(**sections: dict[str, Any]) -> Experiment:
        return load_experiment(world.write(tmp_path / "experiment.yaml", **sections), [])

    return make


@pytest.fixture
def bare(world: Any, tmp_path: Path) -> str:
    """The world's teacher as a folder with a `config.json` and nothing else."""
    (tmp_path / "bare").mkdir()
    shutil.copy(Path(world.content["teacher"]["model"]) / "config.json", tmp_path / "bare")
    return str(tmp_path / "bare")


def peaks(experiment: Experiment, phases: tuple[str, ...] = PHASES) -> dict[str, int]:
    return {name: phase.peak_bytes for name, phase in Forecaster(CARD).forecast(experiment, phases).phases.items()}


def test_a_configuration_is_enough(experiment: Callable[..., Experiment], bare: str) -> None:
    forecast = Forecaster(CARD).forecast(experiment(teacher={"model": bare}))
    for phase in forecast.phases.values():
        assert sum(phase.parts.values()) == phase.peak_bytes > 0
        assert phase.needed_bytes > phase.peak_bytes + phase.fragmentation_bytes > phase.peak_bytes
        assert phase.seconds is not None and phase.seconds > 0
    assert forecast.fits and list(forecast.phases) == list(PHASES)
    assert any("no tokenizer here" in note for note in forecast.notes)
    assert all(size is not None and size > 0 for size in forecast.disk.values())


def test_of_a_hub_name_the_configuration_alone_is_fetched(
    experiment: Callable[..., Experiment], bare: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def download(name: str, revision: str, allow_patterns: list[str], **more: Any) -> str:
        asked.append((name, revision, allow_patterns))
        return bare

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    teacher = {"model": "someone/something", "revision": "v2"}
    known = peaks(experiment(teacher={"model": bare}), PHASES[:1])
    assert peaks(experiment(teacher=teacher), PHASES[:1]) == known
    assert asked[0][2] == ["config.json"] and {(name, at) for name, at, _ in asked} == {("someone/something", "v2")}
    peaks(experiment(teacher={**teacher, "trust_remote_code": True}), PHASES[:1])
    assert asked[-1][2] == ["config.json", "*.py"]


def test_a_hub_name_that_is_nowhere_is_refused_with_the_nearest(experiment: Callable[..., Experiment]) -> None:
    """The published one is planned without asking the hub, which cannot be reached here."""
    with pytest.raises(UserError, match=r"Llama-3.1-9B: .*config.json.*did you mean 'meta-llama/Llama-3.1-8B'"):
        peaks(experiment(teacher={"model": "meta-llama/Llama-3.1-9B"}))
    assert peaks(experiment(teacher={"model": "meta-llama/Llama-3.1-8B"}, cache={"batch_size": 1}), PHASES[:1])


def test_an_int8_teacher_is_between_nf4_and_bfloat16(experiment: Callable[..., Experiment]) -> None:
    teacher = {"model": "Qwen/Qwen3-1.7B"}
    found = [
        Forecaster(CARD).forecast(experiment(teacher={**teacher, "quantization": quantization}), PHASES[:1])
        for quantization in ("nf4", "int8", "none")
    ]
    nf4, int8, plain = (forecast.phases["cache-teacher"] for forecast in found)
    assert nf4.parts["quantized weights"] < int8.parts["quantized weights"] < plain.parts["weights"]
    assert 0.5 * plain.seconds_each < int8.seconds_each < 2 * plain.seconds_each


STUDENTS: dict[str, Callable[[str], dict[str, Any]]] = {
    "depth": lambda teacher: {"class_path": "pruned", "options": {"layers": 2}},
    "width": lambda teacher: {
        "class_path": "pruned",
        "options": {"layers": [0, 3], "hidden_size": 24, "intermediate_size": 40, "key_value_groups": 1},
    },
    "huggingface": lambda teacher: {"class_path": "huggingface", "options": {"model": teacher}},
    "config": lambda teacher: {
        "class_path": "huggingface",
        "options": {"config": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}},
    },
    "compact": lambda teacher: {"class_path": "compact", "options": {"hidden_size": 32, "layers": 2, "heads": 2}},
    "lora": lambda teacher: {"class_path": "lora", "options": {"model": teacher, "rank": 4}},
    "qlora": lambda teacher: {"class_path": "lora", "options": {"model": teacher, "quantization": "nf4"}},
}


@pytest.mark.parametrize("name", STUDENTS)
def test_every_student_is_made_without_weights(name: str, experiment: Callable[..., Experiment], bare: str) -> None:
    phases = Forecaster(CARD).forecast(experiment(teacher={"model": bare}, student=STUDENTS[name](bare))).phases
    assert phases["train-student"].parts["weights"] > 0 and phases["train-student"].parts["optimizer states"] > 0
    assert ("quantized weights" in phases["train-student"].parts) == (name == "qlora")


@pytest.mark.parametrize("name", ["depth", "width", "compact"])
def test_the_student_has_the_real_ones_shapes(name: str, world: Any, experiment: Callable[..., Experiment]) -> None:
    made = experiment(student=STUDENTS[name](world.content["teacher"]["model"]))
    with without_memory("cpu"):
        models = Models(made, CARD, [])
        shapes = {key: tensor.shape for key, tensor in models.student().state_dict().items()}
    real, _ = make_student(made, Place.of(made), models.vocab_size, _samples)
    assert shapes == {key: tensor.shape for key, tensor in real.state_dict().items()}


def _samples(count: int) -> Any:
    import torch

    ids_BL = torch.arange(count * 16).reshape(count, 16) % 300
    return ids_BL, torch.arange(16).repeat(count, 1), torch.ones(count, 16, dtype=torch.bool)


def test_levers_move_the_forecast(experiment: Callable[..., Experiment]) -> None:
    plain = experiment(train={"batch_size": 8})
    before = peaks(plain)
    less = peaks(apply(plain, {"train.batch_size": 1, "cache.batch_size": 1, "train.optimizer": "adamw_8bit"}))
    assert less["train-student"] < 0.8 * before["train-student"]
    assert less["cache-teacher"] < before["cache-teacher"]
    shorter = peaks(apply(plain, {"corpus.sequence_length": 24}))
    assert all(shorter[phase] < before[phase] for phase in PHASES)


@pytest.mark.parametrize("name", ["compact", "lora"])
def test_a_student_is_measured_in_the_type_asked_for(
    name: str, world: Any, experiment: Callable[..., Experiment]
) -> None:
    student, forecaster = STUDENTS[name](world.content["teacher"]["model"]), Forecaster(CARD)
    whole, half = (
        forecaster.simulator.pieces(experiment(student=student, evaluate={"student_dtype": dtype}), "evaluate", [])[1]
        for dtype in ("float32", "bfloat16")
    )
    assert half.sizes["parameters"] == whole.sizes["parameters"]
    assert half.sizes["bytes"] == whole.sizes["bytes"] / 2
    saved = whole.simulation.parts["weights"] - half.simulation.parts["weights"]
    assert saved == pytest.approx(half.sizes["bytes"], rel=0.02)  # a card gives memory in blocks


def test_passes_of_a_step_cost_time_and_the_update_is_one(experiment: Callable[..., Experiment]) -> None:
    forecaster = Forecaster(CARD)
    each = [
        forecaster.forecast(experiment(train={"accumulate_grad_batches": passes}), ("train-student",))
        for passes in (2, 4, 8)
    ]
    two, four, eight = (forecast.phases["train-student"] for forecast in each)
    assert two.peak_bytes == four.peak_bytes == eight.peak_bytes
    assert eight.seconds_each - four.seconds_each == pytest.approx(2 * (four.seconds_each - two.seconds_each))
    assert eight.seconds_each < 4 * two.seconds_each


def test_disk_follows_the_tables_and_the_budget(experiment: Callable[..., Experiment]) -> None:
    plain = experiment()
    assert sizes.bytes_a_token(plain, 64, []) == pytest.approx(33.2)
    finer = apply(plain, {"cache.threshold": 0.01})
    assert sizes.bytes_a_token(finer, 64, []) == pytest.approx(50.8)
    between = sizes.bytes_a_token(apply(plain, {"cache.threshold": 0.015}), 64, [])
    assert 33.2 < between < 50.8
    assert sizes.bytes_a_token(apply(plain, {"cache.bytes_per_token": 30.0}), 64, []) == 30
    assert sizes.bytes_a_token(apply(plain, {"cache.scheme": "hidden"}), 64, []) == 136
    assert make_scheme(plain, 64).name == "varopt"
    unknown = replace(plain, corpus=replace(plain.corpus, path="someone/something"))
    notes: list[str] = []
    assert sizes.amount_of(unknown, notes).train is None and "cache.max_samples" in notes[0]


@pytest.mark.parametrize(("card", "is_told"), [("t4", True), ("rtx-3060", False)])
def test_a_card_without_bfloat16_is_told_to_one_who_asks_for_it(
    card: str, is_told: bool, experiment: Callable[..., Experiment]
) -> None:
    asked = experiment(train={"precision": "bf16-mixed"})
    notes = Forecaster(find_card(card)).forecast(asked, ("train-student",)).notes
    assert any("has no bfloat16: take 16-mixed" in note for note in notes) == is_told


def test_a_plan_says_that_there_is_nothing_to_evaluate_on(experiment: Callable[..., Experiment]) -> None:
    class Nothing(Simulator):
        def pieces(self, *_: Any) -> Any:
            raise NoForecast("evaluate: no forecast")

    for share, is_told in ((0.0, True), (0.1, False)):
        forecast = Forecaster(CARD, simulator=Nothing(CARD)).forecast(experiment(corpus={"held_out": share}), PHASES)
        assert any("corpus.held_out is 0" in note for note in forecast.notes) == is_told


STRANGER = """
from distill.models.checkpoints import load_config, resolve
from distill.models.huggingface import HuggingFaceLanguageModel, load_pretrained, shape_of
from distill.models.shapes import declare
import torch


def shape(model, layers):
    config = load_config(resolve(model))
    config.num_hidden_layers = layers
    return HuggingFaceLanguageModel(shape_of(config, torch.float32))


@declare(without_weights=shape)
def first_layers(model: str, layers: int, vocab_size: int):
    raise RuntimeError("it looks at weights")


class Adapted(HuggingFaceLanguageModel):
    def merged(self):
        return HuggingFaceLanguageModel(self.model).half()


def adapted(model: str):
    return Adapted(load_pretrained(resolve(model), torch.float32))


@declare(layer_by_layer="streamed")
def load(model: str, quantization: str, compute_dtype: str):
    made = HuggingFaceLanguageModel(load_pretrained(resolve(model), getattr(torch, compute_dtype)))
    made.bytes_read = 10**12
    return made.eval().requires_grad_(False)
"""


def test_a_plug_in_from_a_file_is_equal_to_a_built_in(
    experiment: Callable[..., Experiment], bare: str, tmp_path: Path
) -> None:
    """Shapes without weights, what is merged, bytes a batch reads, and the teacher that goes layer by layer."""
    (tmp_path / "mine.py").write_text(STRANGER)

    def student(name: str, **options: Any) -> dict[str, Any]:
        return {"class_path": f"{tmp_path / 'mine.py'}:{name}", "options": {"model": bare, **options}}

    few, built_in = student("first_layers", layers=2), {"class_path": "pruned", "options": {"layers": 2}}
    assert peaks(experiment(teacher={"model": bare}, student=few), PHASES[1:]) == peaks(
        experiment(teacher={"model": bare}, student=built_in), PHASES[1:]
    )
    with Simulator(CARD) as simulator:
        asked = experiment(teacher={"model": bare}, student=student("adapted"))
        assert simulator.pieces(asked, "evaluate", [])[1].sizes["bytes"] > 0
        teacher = {"model": bare, "quantization": "none", "class_path": f"{tmp_path / 'mine.py'}:load"}
        slow = experiment(teacher=teacher)
        notes: list[str] = []
        assert simulator.pieces(slow, "cache-teacher", notes)[0].seconds >= 100
    assert any("every batch reads" in note for note in notes)
    changed = advise(Forecaster(replace(CARD, memory_bytes=1)), slow, PHASES[:1]).experiment
    assert changed.teacher.class_path == "streamed" and changed.teacher.options["micro_batch"] == 1
