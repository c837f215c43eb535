"""Groups of AdamW, its low-memory forms against torch's own, and what is refused."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill.errors import UserError
from distill.training.optimizers import chunked_adamw, moments
from distill.training.optimizers.adamw import check_optimizer, choose_rounding, make_optimizer

pytestmark = pytest.mark.usefixtures("one_thread")

# 8-bit blocks have 256 values, 4-bit blocks 128: 80 * 103 = 8240 fills neither's last block, 64 * 96 fills both.
SHAPES = [(80, 103), (64, 96), (50, 7), (9,)]
COMBINATIONS = [
    (name, rounding)
    for name in ("adamw", "adamw_8bit", "adamw_4bit")
    for rounding in ("nearest", "stochastic", "kahan")
]


class Weights(nn.Module):
    """Parameters of a type, all of them matrices or vectors of normal values."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        made = [torch.randn(shape, generator=generator) * 0.1 for shape in SHAPES]
        self.all = nn.ParameterList([nn.Parameter(values.to(dtype)) for values in made])


def make(module: nn.Module, name: str = "adamw", rounding: Any = "nearest", **settings: Any) -> torch.optim.Optimizer:
    given: dict[str, Any] = {"learning_rate": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.95), **settings}
    return make_optimizer(module, name=name, rounding=rounding, **given)


def train(weights: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Steps along gradients that are a function of the step: a common direction, and noise."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        torch.manual_seed(step)
        for parameter in weights.parameters():
            gradient = torch.randn(parameter.shape, generator=generator) + 1
            parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()


def state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Its state by way of a file, as a checkpoint has it."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_only_matrices_decay() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Embedding(5, 2), nn.Linear(4, 4))
    module[3].requires_grad_(False)
    optimizer = make(module, learning_rate=0.3, weight_decay=0.7, betas=(0.8, 0.9))
    groups = {group["weight_decay"]: group for group in optimizer.param_groups}
    assert {p.data_ptr() for p in groups[0.7]["params"]} == {module[0].weight.data_ptr(), module[2].weight.data_ptr()}
    vectors = (module[0].bias, module[1].weight, module[1].bias)
    assert {p.data_ptr() for p in groups[0.0]["params"]} == {p.data_ptr() for p in vectors}
    assert all(group["lr"] == 0.3 and group["betas"] == (0.8, 0.9) for group in groups.values())


def test_a_marked_matrix_does_not_decay() -> None:
    """As Mamba marks its states' matrix."""
    module = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 4, bias=False))
    module[1].weight._no_weight_decay = True
    groups = {group["weight_decay"]: group["params"] for group in make(module, weight_decay=0.7).param_groups}
    assert groups[0.7][0] is module[0].weight and groups[0.0][0] is module[1].weight


def test_a_module_of_matrices_alone() -> None:
    assert len(make(nn.Linear(2, 2, bias=False)).param_groups) == 1


def test_a_shared_parameter_is_optimised_once() -> None:
    module = nn.Sequential(nn.Embedding(5, 5), nn.Linear(5, 5, bias=False))
    module[1].weight = module[0].weight
    (group,) = make(module).param_groups
    assert len(group["params"]) == 1 and isinstance(group["params"][0], torch.Tensor)


@pytest.mark.parametrize("chunk", [256, 2**20])
def test_in_float32_it_is_torchs_adamw(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_adamw, "CHUNK", chunk)
    theirs, ours = Weights(), Weights()
    train(theirs, make(theirs, is_scaled=True), range(5))  # the fused kernel rounds otherwise
    train(ours, chunked_adamw.ChunkedAdamW([{"params": [*ours.parameters()]}], 1e-2, (0.9, 0.95), 0.1), range(5))
    for number, (expected, found) in enumerate(zip(theirs.parameters(), ours.parameters(), strict=True)):
        if SHAPES[number] == (9,):  # a vector does not decay there
            continue
        assert torch.equal(expected, found)


@pytest.mark.parametrize(("name", "rounding"), COMBINATIONS)
def test_chunks_change_nothing(name: str, rounding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even by a bit, but for what is drawn: one draw of 1000 is not ten of 100."""
    results = []
    for chunk in (256, 2**20):
        monkeypatch.setattr(chunked_adamw, "CHUNK", chunk)
        weights = Weights(torch.bfloat16)
        train(weights, make(weights, name, rounding), range(3))
        results.append(weights)
    for first, second in zip(*(weights.parameters() for weights in results), strict=True):
        assert torch.allclose(first, second, rtol=2**-6, atol=1e-3) if rounding == "stochastic" else first.equal(second)


@pytest.mark.parametrize(("name", "tolerance"), [("adamw_8bit", 0.01), ("adamw_4bit", 0.2)])
def test_few_bits_are_near_float32(name: str, tolerance: float) -> None:
    """Relative error of how far 20 steps have moved the weights; no more than coarse moments explain, and not none."""
    exact, coarse = Weights(), Weights()
    train(exact, make(exact), range(20))
    train(coarse, make(coarse, name), range(20))
    for begun, expected, found in zip(Weights().all, exact.all, coarse.all, strict=True):
        error = (found - expected).norm() / (expected - begun).norm()
        assert error < tolerance
        assert error > 0 if begun.numel() >= moments.SMALL and begun.numel() % 128 == 0 else True


@pytest.mark.parametrize(
    ("name", "bytes_each"), [("adamw", 8), ("adamw_8bit", 2 + 8 / 256), ("adamw_4bit", 1 + 8 / 128)]
)
def test_moments_take_what_their_name_says(name: str, bytes_each: float) -> None:
    layer = nn.Linear(128, 128, bias=False)
    optimizer = make(layer, name)
    train(layer, optimizer, range(1))
    assert size(optimizer.state_dict()["state"]) / 128**2 == bytes_each


def size(value: Any) -> int:
    if isinstance(value, dict):
        return sum(size(item) for item in value.values())
    return value.nbytes if isinstance(value, Tensor) and value.numel() > 1 else 0


def moved(rounding: str, steps: int = 400, name: str = "adamw") -> Tensor:
    """Return the distance that weights of 1 have come in steps of 1/4096 each; bfloat16's next are 1/256 away."""
    layer = nn.Linear(4096, 1, bias=False).to(torch.bfloat16)
    nn.init.ones_(layer.weight)
    optimizer = make(layer, name, rounding, learning_rate=1 / 4096, weight_decay=0.0)
    for _ in range(steps):
        layer.weight.grad = torch.ones_like(layer.weight)
        optimizer.step()
    return 1 - layer.weight.detach().float()


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "adamw_4bit"])
def test_small_steps_are_lost_in_plain_bfloat16_only(name: str) -> None:
    """400 steps of 1/4096 go 0.0977."""
    torch.manual_seed(0)
    assert moved("nearest", name=name).max() == 0
    assert torch.allclose(moved("kahan", name=name), torch.tensor(400 / 4096), atol=1 / 256)
    by_chance = moved("stochastic", name=name)
    assert by_chance.std() > 0
    assert abs(by_chance.mean() - 400 / 4096) < 6 * by_chance.std() / 4096**0.5 + 1e-3  # and eps, and coarse moments


@pytest.mark.parametrize(
    ("precision", "name", "expected"),
    [
        ("bf16-true", "adamw", "stochastic"),
        ("bf16-true", "adamw_4bit", "stochastic"),
        ("bf16-true", "paged_adamw_8bit", "nearest"),
        ("bf16-mixed", "adamw", "nearest"),
        ("32-true", "adamw_8bit", "nearest"),
    ],
)
def test_the_default_rounding_follows_the_precision(precision: str, name: str, expected: str) -> None:
    assert choose_rounding("auto", name, precision) == expected
    assert choose_rounding("nearest", name, precision) == "nearest"
    check_optimizer(name, rounding=expected, precision=precision, device_type="cuda")


@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
def test_weight_decay_is_not_lost_either(rounding: str) -> None:
    """It shrinks a weight by 1e-4 a step: a fortieth of the last digit."""
    torch.manual_seed(0)
    layer = nn.Linear(512, 8, bias=False).to(torch.bfloat16)
    nn.init.ones_(layer.weight)
    optimizer = make(layer, "adamw", rounding, learning_rate=1e-3, weight_decay=0.1)
    for _ in range(500):
        layer.weight.grad = torch.zeros_like(layer.weight)
        optimizer.step()
    half_a_digit = 1 / 512
    assert abs(layer.weight.detach().float().mean() - (1 - 1e-4) ** 500) < 1.1 * half_a_digit


def test_a_second_moment_follows_when_rounded_at_random() -> None:
    """With beta2 0.999 an average changes by a thousandth a step; bfloat16's nearest keeps changes from 1/512 on."""
    layer = nn.Linear(4096, 1, bias=False).to(torch.bfloat16)
    optimizer = make(layer, "adamw", "stochastic", betas=(0.9, 0.999))
    torch.manual_seed(0)
    for _ in range(1500):
        layer.weight.grad = torch.ones_like(layer.weight)
        optimizer.step()
    average = optimizer.state[layer.weight]["exp_avg_sq"].float().mean()
    assert average == pytest.approx(1 - 0.999**1500, rel=0.01)


@pytest.mark.parametrize(("name", "rounding"), COMBINATIONS)
def test_a_checkpoint_continues_bitwise(name: str, rounding: str) -> None:
    undisturbed = Weights(torch.bfloat16)
    train(undisturbed, make(undisturbed, name, rounding), range(6))
    first, second = Weights(torch.bfloat16), Weights(torch.bfloat16)
    begun, continued = make(first, name, rounding), make(second, name, rounding)
    train(first, begun, range(3))
    second.load_state_dict(first.state_dict())
    continued.load_state_dict(state(begun))
    train(first, begun, range(3, 4))  # a loaded state is a copy
    train(second, continued, range(3, 6))
    for expected, found in zip(undisturbed.parameters(), second.parameters(), strict=True):
        assert torch.equal(expected, found)


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "adamw_4bit"])
def test_a_schedule_sets_the_learning_rate(name: str) -> None:
    weights = Weights()
    optimizer = make(weights, name)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    before = [parameter.clone() for parameter in weights.parameters()]
    train(weights, optimizer, range(2))
    assert all(torch.equal(*pair) for pair in zip(before, weights.parameters(), strict=True))


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("adamw_8bits", {}, ("train.optimizer", "did you mean 'adamw_8bit'")),
        ("adamw", {"rounding": "kahan", "precision": "bf16-mixed"}, ("train.rounding", "kahan", "bf16-true")),
        ("adamw", {"rounding": "stochastic", "precision": "32-true"}, ("train.rounding", "stochastic", "bf16-true")),
        ("paged_adamw_8bit", {"device_type": "cpu"}, ("paged_adamw_8bit", "CUDA", "adamw_8bit")),
        ("paged_adamw_8bit", {"device_type": "cuda", "rounding": "kahan"}, ("train.rounding", "paged_adamw_8bit")),
        ("adamw_8bit", {"strategy": "fsdp"}, ("train.optimizer", "fsdp")),
    ],
)
def test_what_does_not_exist_is_refused(name: str, settings: dict[str, str], words: tuple[str, ...]) -> None:
    given = {"rounding": "nearest", "precision": "bf16-true", "device_type": "cpu", **settings}
    with pytest.raises(UserError) as refused:
        check_optimizer(name, **given)
    assert all(word in str(refused.value) for word in words)


def test_making_one_checks_too() -> None:
    with pytest.raises(UserError, match="bf16-true"):
        make(nn.Linear(2, 2), "adamw", "kahan")
    with pytest.raises(UserError, match="CUDA"):
        make(nn.Linear(2, 2), "paged_adamw_8bit")
    with pytest.raises(UserError, match="no parameter"):
        make(nn.Tanh())


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    moments._torchao_state.cache_clear()
    monkeypatch.setitem(sys.modules, "torchao.optim.subclass_4bit", None)
    with pytest.raises(UserError, match=r"pip install 'distill-small-card\[low-bit\]'"):
        check_optimizer("adamw_4bit", rounding="nearest", precision="32-true", device_type="cpu")


def test_paged_moments_are_paged_again_after_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU nothing is paged, but the way that a state takes is the same."""
    from distill.training.optimizers.paged import PagedAdamW8bit

    buffers: list[Tensor] = []

    def get_state_buffer(self: Any, parameter: Tensor, dtype: torch.dtype) -> Tensor:
        buffers.append(torch.zeros_like(parameter, dtype=dtype))
        return buffers[-1]

    monkeypatch.setattr(PagedAdamW8bit, "get_state_buffer", get_state_buffer)
    undisturbed, second = Weights(), Weights()
    optimizer, continued = (PagedAdamW8bit([*weights.parameters()], lr=1e-2) for weights in (undisturbed, second))
    train(undisturbed, optimizer, range(3))
    buffers[0].marker = True  # type: ignore[attr-defined]  # bitsandbytes marks paged tensors by an attribute
    saved = state(optimizer)
    second.load_state_dict(undisturbed.state_dict())
    buffers.clear()
    continued.load_state_dict(saved)
    moments_now = [moment[key] for moment in continued.state.values() for key in ("state1", "state2")]
    assert [id(moment) for moment in moments_now] == [id(buffer) for buffer in buffers]
    assert not any(hasattr(moment, "marker") for moment in moments_now)
    for one, weights in ((optimizer, undisturbed), (continued, second)):
        train(weights, one, range(3, 5))
    assert all(torch.equal(*pair) for pair in zip(undisturbed.parameters(), second.parameters(), strict=True))
