"""A simulated batch of the teacher is the real one without its memory, and needs no more than a configuration."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from distill import plugins
from distill.cache.making.predict import TeacherModule
from distill.forecast.phases.step import StepShape, simulate_step
from distill.forecast.phases.teacher import make_batch, run_tracked, simulate_teacher
from distill.forecast.simulation.result import Simulation
from distill.forecast.simulation.tracker import Tracker
from distill.models.huggingface import HuggingFaceLanguageModel
from distill.models.quantization import quantize_linears
from distill.targets import schemes
from students.huggingface import load_student
from students.lora import load_lora_student
from teachers.huggingface import load_teacher

V = 1000
SIZES = {
    "model_type": "llama",
    "vocab_size": V,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
VAROPT = schemes.make("varopt", threshold=0.02)


def teacher(quantization: str) -> Any:
    import transformers

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SIZES), dtype=torch.bfloat16)
    if quantization == "nf4":
        quantize_linears(model, "nf4", torch.bfloat16, "cpu")
    return HuggingFaceLanguageModel(model).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint of which there is nothing but its configuration."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(SIZES))
    return str(folder)


def simulated(make: Any, scheme: Any = VAROPT, **changes: Any) -> Simulation:
    settings: dict[str, Any] = {"batch_size": 2, "length": 64, "vocab_size": V, "scheme": scheme, "chunk_size": 32}
    return simulate_teacher(make, **{**settings, **changes})


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_the_simulation_is_the_real_batch(one_thread: None, quantization: str) -> None:
    tracker = Tracker("cpu")
    with tracker:
        module = TeacherModule(teacher(quantization), V, VAROPT, seed=0, chunk_size=32)
        real = run_tracked(module, make_batch(2, 64, vocab_size=V), tracker)
    found = simulated(lambda: teacher(quantization))
    assert found.peak_bytes == pytest.approx(real.peak_bytes, rel=0.02)
    assert found.flops == real.flops
    assert sum(found.parts.values()) == found.peak_bytes
    for kind in ("weights", "quantized weights"):
        assert found.parts[kind] == pytest.approx(real.parts[kind], rel=0.001, abs=256)  # type: ignore[index]


def test_a_batch_of_many_samples_takes_no_more_kernels_than_one_of_few(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = 0
    dispatch = Tracker.__torch_dispatch__

    def counted(self: Tracker, *args: Any, **kwargs: Any) -> Any:
        nonlocal kernels
        kernels += 1
        return dispatch(self, *args, **kwargs)

    monkeypatch.setattr(Tracker, "__torch_dispatch__", counted)
    few, took = simulated(lambda: teacher("none"), batch_size=4), kernels
    many = simulated(lambda: teacher("none"), batch_size=4096)
    assert kernels == 2 * took
    assert many.flops == 1024 * few.flops


@pytest.mark.parametrize(
    "scheme", [schemes.make("top_k", entries=8), schemes.make("random", entries=8), schemes.make("hidden", size=64)]
)
def test_every_scheme_is_simulated(scheme: Any) -> None:
    assert simulated(lambda: teacher("none"), scheme).parts["head and loss"] > 32 * V * 4


def test_a_configuration_is_enough(folder: str) -> None:
    """A configuration suffices for a teacher in 4 bits and unquantised, and for students made of a checkpoint."""
    plain = simulated(lambda: load_teacher(folder, "none", "bfloat16"))
    four_bits = simulated(lambda: load_teacher(folder, "nf4", "bfloat16"))
    eight_bits = simulated(lambda: load_teacher(folder, "int8", "bfloat16"))
    assert 0.45 < eight_bits.parts["quantized weights"] / (plain.parts["weights"] - eight_bits.parts["weights"]) < 0.6
    assert plain.parts["quantized weights"] == 0
    assert 0 < four_bits.parts["quantized weights"] < 0.4 * (plain.parts["weights"] - four_bits.parts["weights"])


@pytest.mark.parametrize("kind", ["pretrained", "lora", "lora on nf4", "pruned"])
def test_students_of_a_configuration(folder: str, maker: Any, kind: str) -> None:
    students = {
        "pretrained": lambda: load_student(folder),
        "lora": lambda: load_lora_student(folder, rank=2),
        "lora on nf4": lambda: load_lora_student(folder, rank=2, quantization="nf4"),
        "pruned": lambda: plugins.build("pruned", "student", {"teacher": folder, "layers": 2}, {}),
    }
    found = simulate_step(maker(students[kind], vocab_size=V), StepShape(4, 16, 5), precision="bf16-mixed")
    weights = sum(found.parts[part] for part in ("weights", "quantized weights"))
    parameters = 2 * V * 64 + (2 if kind == "pruned" else 3) * (64 * 64 * 2 + 64 * 32 * 2 + 64 * 128 * 3)
    bytes_each = 4 if kind in ("pretrained", "pruned") else 2
    assert weights == pytest.approx(bytes_each * parameters, rel=0.4 if "nf4" in kind else 0.1)


def test_a_teacher_of_8_billion_takes_no_memory(tmp_path: Path) -> None:
    """In 4 bits on a card; its weights alone would be 16 GB."""
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128_256}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8}
    (tmp_path / "config.json").write_text(json.dumps({**SIZES, **sizes, **heads}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    forecast = simulated(
        lambda: load_teacher(str(tmp_path), "nf4", "bfloat16"),
        batch_size=4,
        length=2048,
        vocab_size=128_256,
        chunk_size=512,
        device="cuda",
    )
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert 5.5e9 < forecast.peak_bytes < 9e9
    assert 1024 * grown < 0.5e9
