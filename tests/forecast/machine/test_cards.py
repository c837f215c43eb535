"""Cards by name and by size, and the card of a machine from what torch says of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from distill.errors import UserError
from distill.forecast.machine.cards import CARDS, GIB, Card, find_card, of_properties, this_machine


@pytest.mark.parametrize(
    "name", ["rtx-3060", "RTX 3060", "rtx3060", "Rtx_3060", "NVIDIA GeForce RTX 3060", "rtx 3060 12GB"]
)
def test_a_card_has_many_spellings(name: str) -> None:
    assert find_card(name).name == "RTX 3060"


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_every_card_is_found_by_its_own_name_and_as_it_is_printed(card: Card) -> None:
    for name in (card.name, card.name.lower().replace(" ", "-"), card.name.replace(" ", "")):
        assert find_card(name) is card


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_the_figures_agree_with_one_another(card: Card) -> None:
    """GeForce cards: products in half precision, summed up in float32, at a fixed multiple of float32's rate."""
    ratio = card.half_flops / card.fp32_flops
    if card.name.startswith(("RTX 30", "RTX 40", "RTX 50")):
        assert ratio == pytest.approx(2, rel=0.02) and card.has_bf16
    elif card.name.startswith("RTX 20"):
        assert ratio == pytest.approx(4, rel=0.02) and not card.has_bf16
    elif card.name.startswith("GTX 16"):
        assert ratio == pytest.approx(2, rel=0.02) and not card.has_bf16
    assert card.source and card.is_cuda
    assert 100e9 < card.bandwidth_bytes_per_s < 5e12 and 4 * GIB <= card.memory_bytes <= 96 * GIB


def test_names_are_unique_and_there_are_enough() -> None:
    assert len({card.name for card in CARDS}) == len(CARDS) >= 20


@pytest.mark.parametrize("text", ["12GiB", "12GB", "12gb", "12 GiB", "12G"])
def test_a_size_is_as_on_the_box_and_names_its_speed(text: str) -> None:
    card = find_card(text)
    assert card.memory_bytes == 12 * GIB
    assert card.name == "12 GiB card, as fast as RTX 3060" and card.half_flops == find_card("rtx-3060").half_flops


def test_any_size_has_a_card_no_larger_than_itself() -> None:
    for gib in (4, 6, 8, 11.5, 16, 20, 24, 48, 96, 141):
        card = find_card(f"{gib}GiB")
        like = find_card(card.name.partition("as fast as ")[2])
        assert card.memory_bytes == int(gib * GIB) and (like.memory_bytes <= card.memory_bytes or gib < 6)


def test_of_several_sizes_of_a_card_the_one_that_is_said_is_meant() -> None:
    assert find_card("a100-80gb").memory_bytes == 80 * GIB and find_card("a100").memory_bytes == 40 * GIB
    assert find_card("t4 16gb").name == "T4"  # one GB of which is its error correction's


@pytest.mark.parametrize(
    ("name", "near"),
    [("rtx-3061", "RTX 3060"), ("rxt 4090", "RTX 4090"), ("3060", "RTX 3060"), ("rtx 3080 20gb", "RTX 3080 12GB")],
)
def test_a_misspelt_card_is_refused_with_the_nearest(name: str, near: str) -> None:
    with pytest.raises(UserError) as refused:
        find_card(name)
    assert near in str(refused.value).partition("Give a size")[0]
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["-5GiB", "", "banana", "0GB", "9999GB", "12TiB", "🂡"])
def test_what_is_no_card_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="--card"):
        find_card(name)


def properties(name: str, gib: float, capability: tuple[int, int] = (8, 6), **more: Any) -> Any:
    major, minor = capability
    return SimpleNamespace(
        name=name, total_memory=int(gib * GIB), major=major, minor=minor, multi_processor_count=28, **more
    )


@pytest.mark.parametrize(
    ("name", "gib", "expected"),
    [
        ("NVIDIA GeForce RTX 3060", 11.76, "RTX 3060"),
        ("NVIDIA GeForce RTX 3080", 9.8, "RTX 3080"),
        ("NVIDIA GeForce RTX 3080", 11.8, "RTX 3080 12GB"),
        ("NVIDIA GeForce RTX 4060 Ti", 15.7, "RTX 4060 Ti 16GB"),
        ("NVIDIA A100-SXM4-80GB", 79.2, "A100 80GB"),
        ("NVIDIA A100-PCIE-40GB", 39.4, "A100 40GB"),
        ("NVIDIA H100 80GB HBM3", 79.1, "H100"),
        ("NVIDIA H100 PCIe", 79.1, "H100 PCIe"),
        ("Tesla V100-SXM2-32GB", 31.7, "V100 32GB"),
        ("Tesla P100-PCIE-16GB", 15.9, "P100"),
        ("Tesla T4", 14.6, "T4"),
    ],
)
def test_what_torch_calls_a_card_is_found_and_has_its_real_memory(name: str, gib: float, expected: str) -> None:
    card, listed = of_properties(properties(name, gib), has_bf16=True), find_card(expected)
    assert (card.half_flops, card.bandwidth_bytes_per_s) == (listed.half_flops, listed.bandwidth_bytes_per_s)
    assert card.name == name and card.memory_bytes == int(gib * GIB)


@pytest.mark.parametrize("name", ["NVIDIA GeForce RTX 3060 Laptop GPU", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "Quadro X"])
def test_an_unknown_card_is_estimated_from_its_clocks(name: str) -> None:
    clocks = {"clock_rate": 1_777_000, "memory_clock_rate": 7_501_000, "memory_bus_width": 192}
    card, same = of_properties(properties(name, 6, **clocks), True), find_card("rtx-3060")
    assert card.half_flops == pytest.approx(
        same.half_flops, rel=0.02
    )  # its multiprocessors and clocks are an RTX 3060's
    assert card.fp32_flops == pytest.approx(same.fp32_flops, rel=0.02)
    assert card.bandwidth_bytes_per_s == pytest.approx(same.bandwidth_bytes_per_s, rel=0.02)
    assert "estimated" in card.source
    assert of_properties(properties(name, 6), True).bandwidth_bytes_per_s > 0  # without clocks


def test_this_machine_has_memory_and_a_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    card = this_machine("cpu")
    assert not card.is_cuda and card.memory_bytes > GIB and card.fp32_flops > 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties("Tesla T4", 14.6, (7, 5)))
    assert this_machine().name == "Tesla T4" and not this_machine().has_bf16
    assert not this_machine("cpu").is_cuda
