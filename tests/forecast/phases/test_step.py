"""A simulated step is the real one without its memory: the same bytes, the same work, and every lever moves them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny_families
import torch

from distill.forecast.phases.step import StepShape, simulate_step
from distill.forecast.simulation.result import Simulation
from distill.losses.objective import Mixture
from distill.models.language_model import Head
from distill.training.offload import offload_activations
from students.compact import CompactDecoder
from students.huggingface import load_student

SHAPE = StepShape(samples=4, length=32, entries=5)
Maker = Callable[..., Any]


def check_alike(simulated: Simulation, real: Simulation) -> None:
    """But for a few small kernels that fake tensors do in another way."""
    assert simulated.peak_bytes == pytest.approx(real.peak_bytes, rel=0.005)
    for kind, size in real.parts.items():
        assert simulated.parts[kind] == pytest.approx(size, abs=0.01 * real.peak_bytes), kind
    assert simulated.flops == real.flops > 0
    assert simulated.bytes_moved == pytest.approx(real.bytes_moved, rel=0.05)


@pytest.mark.parametrize(
    ("precision", "levers"),
    [
        ("32-true", {}),
        ("bf16-mixed", {"checkpointing": True, "optimizer": "adamw_8bit"}),
        ("bf16-mixed", {"micro_batch": 1}),
        ("bf16-true", {"step_in_backward": True, "rounding": "stochastic"}),
    ],
)
def test_the_simulation_is_the_real_step(
    maker: Maker, real_step: Callable[..., Simulation], precision: str, levers: dict[str, Any]
) -> None:
    make_module = maker(**levers)
    check_alike(simulate_step(make_module, SHAPE, precision=precision), real_step(make_module, SHAPE, precision))


@pytest.mark.parametrize(
    ("family", "layers", "levers"),
    [("qwen3_moe", 1, {}), ("gpt_oss", 1, {"checkpointing": True}), ("longcat_flash", 2, {})],
    ids=["grouped", "grouped, with biases, recomputed", "one by one"],
)
def test_a_mixture_of_experts(
    maker: Maker, real_step: Callable[..., Simulation], family: str, layers: int, levers: dict[str, Any]
) -> None:
    """Experts in float32 among autocast layers, by one grouped product or each by itself, as the router chooses."""
    config = tiny_families.tiny_config(family)
    config.num_layers = config.num_hidden_layers = layers
    config.layer_types = (getattr(config, "layer_types", None) or [])[:layers] or None
    sizes = {name: value for name, value in config.to_dict().items() if name in type(config)().to_dict()}
    make_module = maker(lambda: load_student(config=sizes), **levers)
    simulated = simulate_step(make_module, SHAPE, precision="bf16-mixed")
    real = real_step(make_module, SHAPE, "bf16-mixed")
    assert simulated.peak_bytes == pytest.approx(real.peak_bytes, rel=0.05)
    assert simulated.flops == pytest.approx(real.flops, rel=0.05)


def test_the_first_error_of_a_step_is_raised(maker: Maker) -> None:
    """Not that of the trainer's end, which moves the student."""

    class Failing(CompactDecoder):
        def body(self, *args: Any) -> Any:
            super().body(*args)
            raise RuntimeError("a kernel of its own")

    with pytest.raises(RuntimeError, match="a kernel of its own"):
        simulate_step(maker(lambda: Failing(96, 64, 2, 4)), SHAPE, precision="bf16-mixed")


def test_packed_documents_are_simulated_with_their_mask(maker: Maker, real_step: Callable[..., Simulation]) -> None:
    packed = StepShape(4, 32, 5, documents=2)
    simulated = simulate_step(maker(), packed)
    check_alike(simulated, real_step(maker(), packed, "32-true"))
    assert simulated.peak_bytes > simulate_step(maker(), SHAPE).peak_bytes


def test_hidden_states_as_targets(maker: Maker) -> None:
    def with_teachers_head() -> Any:
        return maker(teacher_head=Head(torch.empty(96, 48)), feature_weight=1.0, objective=Mixture(0.0))()

    simulated = simulate_step(with_teachers_head, StepShape(4, 32, hidden_size=48))
    assert simulated.parts["weights"] > simulate_step(maker(), SHAPE).parts["weights"]


def test_parts_sum_to_the_peak(maker: Maker) -> None:
    simulated = simulate_step(maker(), SHAPE)
    assert sum(simulated.parts.values()) == simulated.peak_bytes
    parameters = sum(parameter.numel() for parameter in maker()().parameters())
    assert simulated.parts["weights"] == pytest.approx(4 * parameters, rel=0.01)
    assert simulated.parts["optimizer states"] == pytest.approx(8 * parameters, rel=0.02)


def test_every_lever_saves(maker: Maker) -> None:
    """Long samples, so that activations are the most of it."""
    shape = StepShape(samples=4, length=128, entries=5)

    def peak(**levers: Any) -> Simulation:
        return simulate_step(maker(**levers), shape)

    plain, recomputed, divided = peak(), peak(checkpointing=True), peak(micro_batch=1)
    assert recomputed.peak_bytes < 0.7 * plain.peak_bytes
    assert recomputed.parts["activations"] < 0.5 * plain.parts["activations"]
    assert recomputed.flops > plain.flops
    assert divided.peak_bytes < 0.6 * plain.peak_bytes
    assert peak(optimizer="adamw_8bit").parts["optimizer states"] < 0.4 * plain.parts["optimizer states"]
    larger = simulate_step(maker(micro_batch=8), StepShape(samples=8, length=128, entries=5))
    assert 1.6 * plain.peak_bytes < larger.peak_bytes < 2 * plain.peak_bytes
    assert larger.flops == 2 * plain.flops


def test_a_step_in_backward_keeps_no_gradients(maker: Maker) -> None:
    shape = StepShape(samples=1, length=8, entries=5)
    plain = simulate_step(maker(micro_batch=1), shape)
    early = simulate_step(maker(micro_batch=1, step_in_backward=True), shape)
    assert early.parts["gradients"] < 0.6 * plain.parts["gradients"]
    assert early.peak_bytes < 0.9 * plain.peak_bytes


def test_on_cuda_attention_makes_no_scores(maker: Maker) -> None:
    """Activations grow with the length, not with its square."""
    short, long = (
        simulate_step(
            maker(micro_batch=1, chunk_size=length), StepShape(1, length, 5), precision="bf16-mixed", device="cuda"
        )
        for length in (1024, 4096)
    )
    assert long.parts["activations"] == pytest.approx(4 * short.parts["activations"], rel=0.05)


def test_offloaded_activations_are_not_on_the_card(maker: Maker) -> None:
    """Activations of a mebibyte or more are offloaded."""
    levers = {"micro_batch": 1, "chunk_size": 8192}
    plain, offloaded = (
        simulate_step(maker(**levers, **more), StepShape(1, 8192, 5), precision="bf16-mixed", device="cuda")
        for more in ({}, {"saved_activations": offload_activations})
    )
    assert offloaded.parts["activations"] < 0.3 * plain.parts["activations"]


def test_on_cuda_an_optimizer_that_is_not_fused_takes_all_weights_at_once(maker: Maker) -> None:
    shape = StepShape(samples=1, length=8, entries=5)
    weights = simulate_step(maker(micro_batch=1), shape, device="cuda").parts["weights"]
    # By the scaler of float16: then it is not fused.
    scaled = simulate_step(maker(micro_batch=1, is_scaled=True), shape, device="cuda")
    assert scaled.parts["temporaries"] >= 0.9 * weights
    assert simulate_step(maker(micro_batch=1), shape, device="cuda").peak_bytes <= scaled.peak_bytes
    for levers in ({}, {"step_in_backward": True}):
        paged = maker(micro_batch=1, optimizer="paged_adamw_8bit", device_type="cuda", **levers)
        assert simulate_step(paged, shape, device="cuda").parts["optimizer states"] == 0


def test_on_cuda_an_update_in_8_bits_is_a_kernel_a_weight(maker: Maker) -> None:
    """bitsandbytes' fused one: the bytes of our own chunks, in a fraction of the kernels."""
    shape = StepShape(samples=1, length=8, entries=5)
    ours, fused = (
        simulate_step(maker(micro_batch=1, optimizer="adamw_8bit", device_type=device_type), shape, device="cuda")
        for device_type in ("cpu", "cuda")
    )
    assert fused.parts["optimizer states"] == pytest.approx(
        ours.parts["optimizer states"], abs=4096
    )  # the codes' values
    alike = fused.update & ours.update  # norm and clipping
    assert alike and sum((fused.update - alike).values()) < 0.2 * sum((ours.update - alike).values())
    weights = sum(parameter.numel() for parameter in maker()().parameters())
    moved = sum(work.bytes * count for work, count in fused.update.items())
    assert moved >= (4 + 2 * (4 + 2)) * weights  # the gradient is read, weight and moments are read and written
