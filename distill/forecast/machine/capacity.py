"""Largest teachers and students that a device can take: bytes a parameter, from simulations of a small llama.

A model of width 512 is simulated at three sizes. From these follow the bytes that a parameter of the layers and one of
the vocabulary cost. The memory of a pass beside them is kept in proportion to the width: a quarter as many tokens, a
sixteenth as many positions with logits. So a model of width 2,048 passes 512 tokens at a time.
"""

from __future__ import annotations

import json
import tempfile
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from distill.experiment.configuration import (
    CacheConfig,
    CorpusConfig,
    Experiment,
    LossConfig,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
)
from distill.forecast.machine.calibration import DEFAULTS
from distill.forecast.machine.cards import find_card, this_machine
from distill.forecast.phases.simulator import simulate
from distill.forecast.simulation.kernels import DeviceKind

_WIDTH, _LAYERS, _VOCABULARY = 512, 2, 4096


@dataclass(frozen=True)
class Shape:
    """A llama-like model."""

    width: int
    inner: int
    layers: int
    vocab_size: int

    @property
    def layer_parameters(self) -> int:
        """Parameters of all layers, with a quarter as many keys as queries."""
        return self.layers * (self.width * self.width * 5 // 2 + 3 * self.width * self.inner)

    @property
    def vocabulary_parameters(self) -> int:
        """Parameters of embedding and head; models below two thousand wide have one for both."""
        return self.width * self.vocab_size * (1 if self.width < 2048 else 2)

    @property
    def parameters(self) -> int:
        """Parameters without those of norms."""
        return self.layer_parameters + self.vocabulary_parameters


SHAPES = tuple(
    Shape(*sizes)
    for sizes in (
        (384, 1024, 8, 32_000),
        (576, 1536, 12, 49_152),
        (576, 1536, 30, 49_152),
        (768, 2048, 24, 49_152),
        (960, 2560, 32, 49_152),
        (1024, 3072, 28, 128_256),
        (1536, 4608, 28, 128_256),
        (2048, 8192, 16, 128_256),
        (2048, 8192, 24, 128_256),
        (3072, 8192, 28, 128_256),
        (3584, 9728, 32, 128_256),
        (4096, 14_336, 32, 128_256),
        (5120, 13_824, 40, 128_256),
        (5120, 17_408, 48, 128_256),
        (5120, 25_600, 64, 128_256),
        (8192, 28_672, 80, 128_256),
        (12_288, 28_672, 88, 128_256),
        (16_384, 53_248, 126, 128_256),
    )
)
"""Models from 20 M to 400 B parameters, near released ones."""


@dataclass(frozen=True)
class Way:
    """A way to run a teacher or to train a student."""

    name: str
    role: Literal["teacher", "student"]
    teacher: str = "huggingface"
    """Class path of the teacher."""
    streamed: bool = False
    """True if one layer at a time is on the device."""
    quantization: Literal["nf4", "none"] = "none"
    precision: Literal["32-true", "bf16-mixed", "bf16-true"] = "32-true"
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    checkpointing: bool = False


WAYS = (
    Way("teacher in NF4", "teacher", quantization="nf4"),
    Way("teacher in bfloat16", "teacher"),
    Way("teacher in bfloat16, streamed", "teacher", teacher="streamed", streamed=True),
    Way("student, plain AdamW, 32-true", "student"),
    Way("student, bf16-mixed, checkpointing", "student", precision="bf16-mixed", checkpointing=True),
    Way(
        "student, the same and adamw_8bit",
        "student",
        precision="bf16-mixed",
        checkpointing=True,
        optimizer="adamw_8bit",
    ),
    Way("student, bf16-true, checkpointing", "student", precision="bf16-true", checkpointing=True),
)


@dataclass(frozen=True)
class Cost:
    """Memory that a way takes."""

    base: float
    """Bytes of a model without any parameter."""
    layers: float
    """Bytes a parameter of the layers that are on the device."""
    vocabulary: float
    """Bytes a parameter of embedding and head."""
    streamed: bool = False

    def bytes_of(self, shape: Shape) -> float:
        """Return the forecast peak of a model."""
        here = replace(shape, layers=min(shape.layers, 1)) if self.streamed else shape
        return self.base + self.layers * here.layer_parameters + self.vocabulary * shape.vocabulary_parameters


def largest(cost: Cost, budget: float) -> Shape | None:
    """Return the model with most parameters in `budget` bytes: one of `SHAPES` with at least half of its layers.

    Returns None if not even the smallest fits.
    """
    return max(_fitting(cost, budget), key=lambda shape: shape.parameters, default=None)


def _fitting(cost: Cost, budget: float) -> Iterator[Shape]:
    for shape in SHAPES:
        counts = range((shape.layers + 1) // 2, shape.layers + 1)
        fitting = bisect_right(counts, budget, key=lambda count: cost.bytes_of(replace(shape, layers=count)))
        if fitting:
            yield replace(shape, layers=counts[fitting - 1])


def cost_of(way: Way, device: DeviceKind) -> Cost:
    """Return bytes a parameter, from three simulations: a small model, one of more and one of wider layers."""
    small = Shape(_WIDTH, 1408, _LAYERS, _VOCABULARY)
    larger = replace(small, inner=2 * small.inner) if way.streamed else replace(small, layers=2 * _LAYERS)
    wide = replace(small, vocab_size=2 * _VOCABULARY)
    peak, larger_peak, wide_peak = (_peak(way, shape, device) for shape in (small, larger, wide))
    here, more = (replace(shape, layers=1) if way.streamed else shape for shape in (small, larger))
    layers = (larger_peak - peak) / (more.layer_parameters - here.layer_parameters)
    # Here embedding and head are two.
    vocabulary = (wide_peak - peak) / (2 * _WIDTH * (wide.vocab_size - small.vocab_size))
    base = peak - layers * here.layer_parameters - vocabulary * 2 * _WIDTH * small.vocab_size
    return Cost(max(base, 0.0), layers, vocabulary, way.streamed)


def _peak(way: Way, shape: Shape, device: DeviceKind) -> int:
    """Return the peak of a phase of an experiment with such a model, as any experiment's is forecast."""
    card = find_card("rtx-3060") if device == "cuda" else this_machine("cpu")
    config = {
        "model_type": "llama",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.width,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.width // 64,
        "num_key_value_heads": shape.width // 256,
        "tie_word_embeddings": False,
    }
    chunk = shape.width // 16
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        experiment = Experiment(
            CorpusConfig("", sequence_length=shape.width // 4, pack=False),
            TeacherConfig(folder, way.quantization, "bfloat16", class_path=way.teacher),
            StudentConfig("huggingface", {"config": config}),
            CacheConfig(batch_size=1, chunk_size=chunk),
            LossConfig(chunk_size=chunk),
            TrainConfig(
                batch_size=1,
                precision=way.precision,
                optimizer=way.optimizer,
                activation_checkpointing=way.checkpointing,
            ),
        )
        phase = "cache-teacher" if way.role == "teacher" else "train-student"
        pieces, _ = simulate(card, DEFAULTS[device], experiment, phase)
    return pieces[0].simulation.peak_bytes


def table(device: DeviceKind, budget: float, ways: Sequence[Way] = WAYS) -> list[dict[str, Any]]:
    """Return each way's largest model in `budget` bytes (0 parameters: none), and the bytes a parameter of layers."""
    rows = []
    for way in ways:
        cost = cost_of(way, device)
        shape = largest(cost, budget) or Shape(0, 0, 0, 0)
        row: dict[str, Any] = {"way": way.name, "role": way.role, "parameters": shape.parameters}
        row |= {"layers": shape.layers, "width": shape.width, "bytes_a_parameter": cost.layers}
        rows.append(row)
    return rows
