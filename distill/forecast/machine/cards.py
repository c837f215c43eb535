"""Cards that people have: memory, bandwidth and peak rates as NVIDIA states them; and the card of this machine."""

from __future__ import annotations

import csv
import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from distill.errors import UserError
from distill.system.machine import processor_name
from distill.system.memory import memory_of_host

GIB = 2**30


@dataclass(frozen=True)
class Card:
    """Peak rates of a device. `distill.forecast.machine.calibration` has the rates that programs reach."""

    name: str
    memory_bytes: int
    """All of it. The driver and the CUDA context take their part; see what plans with it."""
    bandwidth_bytes_per_s: float
    half_flops: float
    """Dense matrix products of bfloat16 or, on cards without it, float16, summed up in float32; without sparsity."""
    fp32_flops: float
    """Plain float32, without TF32."""
    has_bf16: bool
    """True if the hardware computes in bfloat16; elsewhere float16 has to do (`16-mixed`)."""
    source: str
    is_cuda: bool = True


def _read_cards() -> Iterator[Card]:
    """Read cards.csv. Its `TFLOP/s in products` are of bf16 or fp16 summed up in fp32.

    GeForce cards from Turing on do that at half the rate that is often quoted, which is that of sums in fp16; fp32 is
    cores × 2 × boost clock, as NVIDIA's own figures are made.
    """
    with open(Path(__file__).with_name("cards.csv"), encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            yield Card(
                name=row["name"],
                memory_bytes=int(float(row["GiB"]) * GIB),
                bandwidth_bytes_per_s=float(row["GB/s"]) * 1e9,
                half_flops=float(row["TFLOP/s in products"]) * 1e12,
                fp32_flops=float(row["TFLOP/s in fp32"]) * 1e12,
                has_bf16=row["bfloat16"] == "yes",
                source=row["source"],
            )


CARDS = tuple(_read_cards())

_TYPICAL = ("GTX 1660", "RTX 4060", "RTX 3080", "RTX 2080 Ti", "RTX 3060", "RTX 4060 Ti 16GB", "RTX 3090", "RTX 5090")
_TYPICAL_LARGE = ("A100 40GB", "RTX A6000", "A100 80GB")
"""Cards whose speed a mere size is given, from the smallest to the largest: of each size one that many have."""


def find_card(name: str) -> Card:
    """Return a card of the table (`rtx-3060`, `RTX 3060`, `rtx 3080 12gb`), or a size (`12GiB`, `8gb`).

    Sizes are as on the box, where a 12 GB card has 12 GiB; of several sizes of a card the first, smallest one is meant
    when none is given. The typical speed is that of the largest of a few widespread cards that has no more memory; its
    name says which. Raises UserError for anything else, with the nearest names.
    """
    base, size = _split(name)
    if not base and size is not None:
        return _of_size(-size if name.strip().startswith("-") else size, name)
    # Written in one, as `rtx306012gb`, a name does not tell where its size begins.
    compact = [card for card in CARDS if _compact(card.name) == _compact(name)]
    found = compact or _matching(base, size)
    if found:
        return found[0]
    bases = {_split(card.name)[0]: card for card in reversed(CARDS)}
    close = difflib.get_close_matches(base, bases, n=3, cutoff=0.5)
    near = [card.name for card in _matching(base, None)] or [bases[key].name for key in close]
    nearest = f"; the nearest are {', '.join(near)}" if near else ""
    raise UserError(
        f"--card '{name}' is unknown{nearest}. Give a size, such as 12GiB, or one of: "
        + ", ".join(card.name.lower().replace(" ", "-") for card in CARDS)
    )


def _of_size(gib: float, asked: str) -> Card:
    if not 1 <= gib <= 1024:
        raise UserError(f"--card '{asked}': no card has that much memory; for example: 8GiB, 12GiB, 24GiB")
    typical = [find_card(name) for name in (*_TYPICAL, *_TYPICAL_LARGE)]
    smaller = [card for card in typical if card.memory_bytes <= gib * GIB]
    like = smaller[-1] if smaller else typical[0]
    name = f"{gib:g} GiB card, as fast as {like.name}"
    return replace(like, name=name, memory_bytes=int(gib * GIB))


def _split(name: str) -> tuple[str, float | None]:
    """Split `NVIDIA GeForce RTX 3080 12GB` → (`rtx3080`, 12); `16 GiB` → (``, 16); `rtx-3060` → (`rtx3060`, None)."""
    words = re.sub(r"\b(nvidia|geforce|tesla|gpu|hbm\d\w*|sxm\d?)\b", "", name.lower())
    size = re.search(r"(\d+(?:\.\d+)?)\s*(?:gi?b|g)\b", words)
    base = words if size is None else words[: size.start()] + words[size.end() :]
    return _compact(base), None if size is None else float(size[1])


def _compact(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _matching(base: str, size: float | None) -> list[Card]:
    """Return cards of that name and about that size: some of it may be its error correction's."""
    return [
        card
        for card in CARDS
        if _split(card.name)[0] == base and (size is None or abs(card.memory_bytes / GIB - size) < 0.1 * size)
    ]


def this_machine(device: str | None = None) -> Card:
    """Return the CUDA device of this machine with its real memory, else (or for "cpu") the processor and its memory.

    A card that the table does not know has the rates that its multiprocessors and clocks give.
    """
    if device != "cpu" and torch.cuda.is_available():
        properties: Any = torch.cuda.get_device_properties(torch.cuda.current_device())
        return of_properties(properties, has_bf16=torch.cuda.is_bf16_supported(including_emulation=False))
    return _processor()


def of_properties(properties: Any, has_bf16: bool) -> Card:
    """Return the card of torch's device properties: the table's of that name and nearest memory, with its real one."""
    name, memory = str(properties.name), int(properties.total_memory)
    base = _split(name)[0]
    # The name of a part of a card (MIG), or of a laptop's, is no card's name.
    alike = _matching(base, None) or _matching(base.replace("pcie", ""), None)
    if not alike:
        return _estimated(properties, has_bf16)
    nearest = min(alike, key=lambda card: abs(card.memory_bytes - memory))
    return replace(nearest, name=name, memory_bytes=memory, has_bf16=has_bf16)


# Multiply-adds a clock and multiprocessor: of bf16 or fp16 summed up in fp32, and of fp32, by compute capability, from
# the whitepapers of the architectures. Of 7.5, 8.6, 8.9 and 12.0 it is GeForce's half rate.
_A_CLOCK: dict[tuple[int, int], tuple[int, int]] = {
    (6, 0): (128, 64),
    (6, 1): (128, 128),
    (7, 0): (512, 64),
    (7, 5): (256, 64),
    (8, 0): (1024, 64),
    (8, 6): (256, 128),
    (8, 9): (256, 128),
    (9, 0): (2048, 128),
    (10, 0): (4096, 128),
    (12, 0): (256, 128),
}


def _estimated(properties: Any, has_bf16: bool) -> Card:
    """Estimate rates from clocks. If torch does not tell a clock, 1.5 GHz and 300 GB/s stand in, which is modest."""
    capability = (int(properties.major), int(properties.minor))
    known = [entry for entry in sorted(_A_CLOCK) if entry <= capability]
    half, single = _A_CLOCK[known[-1]] if known else (128, 128)
    if capability == (7, 5) and "gtx" in str(properties.name).lower():  # no tensor cores
        half = 128
    clock = getattr(properties, "clock_rate", 1_500_000) * 1e3
    memory_clock, width = getattr(properties, "memory_clock_rate", 0) * 1e3, getattr(properties, "memory_bus_width", 0)
    each = 2 * int(properties.multi_processor_count) * clock
    return Card(
        str(properties.name),
        int(properties.total_memory),
        2 * memory_clock * width / 8 or 300e9,
        each * half,
        each * single,
        has_bf16,
        f"estimated from {properties.multi_processor_count} multiprocessors of compute capability "
        f"{capability[0]}.{capability[1]} and their clocks",
    )


_LANES = {"AVX512": 16, "AVX2": 8}
_CPU_CLOCK, _CPU_BANDWIDTH = 2.5e9, 20e9


def _processor() -> Card:
    """Return modest rates for the threads that torch uses; a calibration puts the real ones in their place."""
    threads = torch.get_num_threads()
    lanes = _LANES.get(torch.backends.cpu.get_cpu_capability(), 4)
    rate = threads * _CPU_CLOCK * lanes * 4  # two units, each a multiplication and an addition a clock
    return Card(
        processor_name(),
        memory_of_host(),
        _CPU_BANDWIDTH,
        rate,
        rate,
        True,
        f"assumed: {threads} threads at {_CPU_CLOCK / 1e9} GHz with {lanes} numbers a register, one memory channel",
        is_cuda=False,
    )
