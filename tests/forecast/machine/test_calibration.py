"""A calibration is measured, kept, read back on the machine that it was made on alone, and used by forecasts."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from distill.forecast.machine import calibration
from distill.forecast.machine.calibration import DEFAULTS, Efficiency, speed
from distill.forecast.machine.cards import find_card, this_machine
from distill.forecast.simulation.work import Work

MEASURED = Efficiency({"float32": 0.4, "bfloat16": 0.3, "float16": 0.2}, 0.7, 5e-6, is_measured=True)


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_what_is_saved_comes_back_and_the_other_device_keeps_its_own(cache_folder: Path) -> None:
    assert calibration.load("cpu") is None and calibration.find("cpu") is DEFAULTS["cpu"]
    path = calibration.save("cpu", MEASURED)
    assert path == cache_folder / "distill" / "calibration.json"
    assert calibration.load("cpu") == MEASURED == calibration.find("cpu")
    assert calibration.find("cuda") is DEFAULTS["cuda"]
    other = Efficiency(MEASURED.matmul, 0.1, 1e-6, is_measured=True)
    calibration.save("cuda", other)
    assert (calibration.load("cpu"), calibration.load("cuda")) == (MEASURED, other)
    assert sorted(file.name for file in path.parent.iterdir()) == ["calibration.json"]


@pytest.mark.parametrize("fact", ["processor", "threads", "torch"])
def test_another_machines_calibration_does_not_count(fact: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calibration.save("cpu", MEASURED)
    here = calibration.identity("cpu")
    monkeypatch.setattr(calibration, "identity", lambda device: {**here, fact: "another"})
    assert calibration.load("cpu") is None and calibration.find("cpu") is DEFAULTS["cpu"]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"version": 3, "cpu": 3}',
        '{"version": 99}',
        "[" * 100_000,
        '{"version": 3, "cpu": {"identity": IDENTITY}}',
        '{"version": 3, "cpu": {"identity": IDENTITY, "efficiency": {"matmul": []}}}',
        '{"version": 3, "cpu": {"identity": IDENTITY, "efficiency": {"matmul": {"float32": 1, "bfloat16": 1, '
        '"float16": NUMBER}, "bandwidth": 1, "launch": 1, "reading": 1}}}',
    ],
)
@pytest.mark.parametrize("number", ["0", "-1", "NaN", "Infinity", '"x"', "null"])
def test_what_is_damaged_is_as_if_it_were_not_there(content: str, number: str) -> None:
    calibration.save("cpu", MEASURED)
    content = content.replace("IDENTITY", json.dumps(calibration.identity("cpu"))).replace("NUMBER", number)
    calibration.file().write_text(content, encoding="utf-8")
    assert calibration.load("cpu") is None
    calibration.save("cpu", MEASURED)  # and is mended
    assert calibration.load("cpu") == MEASURED


def test_a_relative_cache_folder_is_ignored_as_the_specification_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert calibration.file() == Path.home() / ".cache" / "distill" / "calibration.json"


def test_speeds_are_shares_of_the_cards_rates() -> None:
    card = find_card("rtx-3060")
    found = speed(card, MEASURED)
    assert found.flops[torch.float32] == 0.4 * card.fp32_flops
    assert found.flops[torch.bfloat16] == 0.3 * card.half_flops
    assert (found.bytes, found.launch) == (0.7 * card.bandwidth_bytes_per_s, 5e-6)
    step = Counter({Work(torch.bfloat16, 10**12, 10**6): 3, Work(None, 0, 10**9): 2, Work(None, 0, 4): 100})
    computing, moving = 3 * 1e12 / (0.3 * card.half_flops), 2 * 1e9 / (0.7 * card.bandwidth_bytes_per_s)
    assert found.seconds(step) == pytest.approx(computing + moving + 100 * 5e-6)


def test_a_processor_starts_each_kernel_when_the_one_before_has_ended() -> None:
    card = this_machine("cpu")
    found = speed(card, MEASURED)
    step = Counter({Work(None, 0, 10**9): 2, Work(None, 0, 0): 100})
    seconds = found.seconds(step)
    assert seconds == pytest.approx(2e9 / (0.7 * card.bandwidth_bytes_per_s) + 102 * 5e-6)
    assert found.seconds(Counter({Work(None, 0, 10**9, fresh=10**9): 2})) > 2 * (seconds - 100 * 5e-6)


def test_a_card_without_bfloat16_computes_in_float16_what_is_simulated_in_bfloat16() -> None:
    found = speed(find_card("t4"), MEASURED)
    assert found.flops[torch.bfloat16] == found.flops[torch.float16] == 0.2 * find_card("t4").half_flops


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8])
def test_there_is_a_speed_for_every_type_that_products_come_in(dtype: torch.dtype) -> None:
    for card in (find_card("12GiB"), this_machine("cpu")):
        assert speed(card).seconds(Counter({Work(dtype, 10**9, 10): 1})) > 0


def test_a_faster_card_is_forecast_to_be_faster() -> None:
    work = Counter({Work(torch.bfloat16, 10**12, 10**8): 1, Work(None, 0, 10**9): 1})
    seconds = [speed(find_card(name), MEASURED).seconds(work) for name in ("rtx-3060", "rtx-3090", "rtx-4090")]
    assert seconds == sorted(seconds, reverse=True)
