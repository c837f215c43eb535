"""Blocks that are not run leave peak, parts and work as they are when all are run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill.forecast.phases.step import StepShape, simulate_step
from distill.forecast.phases.teacher import simulate_teacher
from distill.forecast.simulation.blocks import AlikeBlocks
from distill.forecast.simulation.result import Simulation
from distill.models.huggingface import HuggingFaceLanguageModel
from distill.models.language_model import Head
from distill.models.packed import PackedWeight
from distill.models.packed_formats import _scale_codes
from distill.models.packing import pack_in_place, packing_of
from distill.models.quantization import quantize_linears
from distill.targets import schemes
from distill.training.offload import offload_activations
from students.huggingface import load_student
from students.lora import LoraLanguageModel, add_adapters

V, LAYERS = 96, 7
SHAPE = StepShape(samples=4, length=32, entries=5, documents=2)
SIZES: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def llama() -> nn.Module:
    return load_student(config={"model_type": "llama", **SIZES})


def two_kinds() -> nn.Module:
    """Layers that look back a little way, and others that see all, in turn."""
    kinds = ["sliding_attention", "full_attention"] * 4
    sizes = {**SIZES, "num_hidden_layers": len(kinds), "layer_types": kinds, "head_dim": 16, "sliding_window": 8}
    return load_student(config={"model_type": "gemma3_text", **sizes})


def lora() -> nn.Module:
    import transformers

    base = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SIZES), dtype=torch.bfloat16)
    add_adapters(base, ["q_proj"], 4, 8.0, 0.0)
    return LoraLanguageModel(base)


class Mixed(nn.Module):
    """Blocks in an order of its own; with `tuples` each takes and gives one."""

    def __init__(self, order: Sequence[int], tuples: bool = False) -> None:
        super().__init__()
        self.tokens = nn.Embedding(V, 32)
        self.blocks = nn.ModuleList(_Block(tuples) for _ in range(LAYERS))
        self.order, self.tuples = order, tuples

    @property
    def head(self) -> Head:
        return Head(self.tokens.weight)

    def body(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        hidden: Any = self.tokens(input_ids)
        for index in self.order:
            hidden = self.blocks[index](hidden)[0] if self.tuples else self.blocks[index](hidden)
        return hidden


class Listed(nn.Module):
    """Layers that are lists of parts; one of them gives a function beside its tensor, and one may be None."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(V, 32)
        self.layers = nn.ModuleList(nn.ModuleList([_Branch(), _Block(False), None]) for _ in range(LAYERS))

    @property
    def head(self) -> Head:
        return Head(self.tokens.weight)

    def body(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        hidden = self.tokens(input_ids)
        for branch, block, nothing in self.layers:  # type: ignore[misc]
            assert nothing is None
            part, add = branch(hidden)
            hidden = add(block(part))
        return hidden


class _Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix, self.gate = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        gate = self.gate(hidden).sigmoid()
        return self.mix(hidden), lambda made: made + gate


class _Block(nn.Module):
    def __init__(self, tuples: bool) -> None:
        super().__init__()
        self.inner, self.outer, self.tuples = nn.Linear(32, 128), nn.Linear(128, 32), tuples

    def forward(self, hidden: Tensor) -> Any:
        made = hidden + self.outer(self.inner(hidden).sigmoid())
        return (made, None) if self.tuples else made


@pytest.fixture
def spared(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one for each call of a block that is not run."""
    seen: list[int] = []
    repeat = AlikeBlocks._repeat
    monkeypatch.setattr(AlikeBlocks, "_repeat", lambda *args: seen.append(1) or repeat(*args))
    return seen


def check_equal(once: Simulation, whole: Simulation) -> None:
    assert once.peak_bytes == pytest.approx(whole.peak_bytes, abs=1024)  # a scalar that is made a moment later
    assert once.parts == pytest.approx(whole.parts, abs=1024)
    assert once.work == whole.work


def both(make: Callable[[], Any], **options: Any) -> tuple[Simulation, Simulation]:
    once, whole = (simulate_step(make, SHAPE, alike_blocks_once=alike, **options) for alike in (True, False))
    return once, whole


DIVIDED = {"micro_batch": 2}


@pytest.mark.parametrize(
    ("student", "between", "precision", "levers"),
    [
        (llama, 4, "32-true", {}),
        (llama, 4, "bf16-mixed", {"checkpointing": True}),
        (llama, 1, "bf16-mixed", {"checkpointing": 2}),
        (llama, 4, "bf16-mixed", DIVIDED),
        (two_kinds, 2, "bf16-mixed", {"checkpointing": True, **DIVIDED}),
        (lora, 4, "bf16-mixed", DIVIDED),
        (lambda: Mixed(range(LAYERS), tuples=True), 4, "bf16-mixed", DIVIDED),
        (Listed, 4, "bf16-mixed", {}),
        (Listed, 4, "32-true", {"checkpointing": True}),
    ],
)
def test_a_step(
    maker: Callable[..., Any], spared: list[int], student: Any, between: int, precision: str, levers: dict[str, Any]
) -> None:
    check_equal(*both(maker(student, **levers), precision=precision))
    assert len(spared) == between * (4 // levers.get("micro_batch", 4))


@pytest.mark.parametrize("levers", [{"saved_activations": offload_activations}, {"step_in_backward": True}])
def test_levers_that_need_every_block(maker: Callable[..., Any], spared: list[int], levers: dict[str, Any]) -> None:
    check_equal(*both(maker(llama, **levers), precision="bf16-mixed", device="cuda"))
    assert not spared


@pytest.mark.parametrize(
    ("order", "calls"),
    [
        (range(LAYERS - 1, -1, -1), 4),
        (range(LAYERS - 1), 4),  # the last never runs: in the backward pass nothing is known, and all is begun anew
        ([number for number in range(LAYERS) for _ in range(2)], 8),  # each twice
    ],
)
def test_blocks_in_an_order_of_their_own(maker: Callable[..., Any], spared: list[int], order: Any, calls: int) -> None:
    check_equal(*both(maker(lambda: Mixed(order)), precision="bf16-mixed"))
    assert len(spared) == calls


def test_blocks_of_other_sizes_or_settings_are_not_alike(maker: Callable[..., Any], spared: list[int]) -> None:
    def uneven() -> nn.Module:
        student = Mixed(range(LAYERS))
        student.blocks[3].inner, student.blocks[3].outer = nn.Linear(32, 999), nn.Linear(999, 32)
        student.blocks[4].register_parameter("unused", nn.Parameter(torch.ones(3)))
        student.blocks[5].some_switch = True  # type: ignore[assignment]
        return student

    check_equal(*both(maker(uneven)))
    assert len(spared) == 1  # of the four that are alike, the third


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_teacher(spared: list[int], quantization: Any) -> None:
    def make() -> Any:
        import transformers

        model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SIZES), dtype=torch.bfloat16)
        if quantization == "nf4":
            quantize_linears(model, "nf4", torch.bfloat16, "cpu")
        return HuggingFaceLanguageModel(model).eval().requires_grad_(False)

    given: dict[str, Any] = {
        "batch_size": 2,
        "length": 64,
        "vocab_size": V,
        "scheme": schemes.make("varopt", threshold=0.1),
    }
    once = simulate_teacher(make, **given)
    assert len(spared) == LAYERS - 3
    check_equal(once, simulate_teacher(make, **given, alike_blocks_once=False))
    assert len(spared) == LAYERS - 3


@pytest.mark.parametrize(("experts", "run"), [(8, 3 * 2), (7, 3 * 7)], ids=["of as many tokens", "of other numbers"])
def test_a_mixture_in_few_bits(experts: int, run: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two experts that get as many tokens stand for all, in the three blocks that are run."""
    sizes = {**SIZES, "head_dim": 16, "moe_intermediate_size": 64, "num_experts": experts, "num_experts_per_tok": 2}

    def make() -> Any:
        import transformers

        config = transformers.Qwen3MoeConfig(**sizes)
        model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        pack_in_place(model, packing_of(model), "nf4", torch.bfloat16)
        return HuggingFaceLanguageModel(model).eval().requires_grad_(False)

    _scale_codes(torch.device("cpu"))  # which the first of all passes would make
    asked: list[int] = []
    whole_slice = PackedWeight.slice
    monkeypatch.setattr(PackedWeight, "slice", lambda self, index: asked.append(index) or whole_slice(self, index))
    given: dict[str, Any] = {"batch_size": 2, "length": 64, "vocab_size": V}
    given["scheme"] = schemes.make("varopt", threshold=0.1)
    once = simulate_teacher(make, **given)
    assert len(asked) == 2 * run  # both matrices of each
    check_equal(once, simulate_teacher(make, **given, alike_blocks_once=False))
    assert len(asked) == 2 * (run + LAYERS * experts)
