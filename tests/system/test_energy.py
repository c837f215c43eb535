"""Energy by the machine's own counters: those that start again, those one may not read, and which cards count."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from distill.system import energy
from distill.system.energy import Processors, measure_energy, read_cards

RANGE = 262_143_328_850


def zone(powercap: Path, folder: str, name: str, microjoules: int) -> Path:
    path = powercap / folder
    path.mkdir(parents=True)
    (path / "name").write_text(name + "\n")
    (path / "max_energy_range_uj").write_text(f"{RANGE}\n")
    (path / "energy_uj").write_text(f"{microjoules}\n")
    return path / "energy_uj"


@pytest.fixture
def powercap(tmp_path: Path) -> Path:
    """Two packages, a part of one, and the platform that has both in it."""
    for folder, name in (("intel-rapl:0", "package-0"), ("intel-rapl:1", "package-1"), ("intel-rapl:2", "psys")):
        zone(tmp_path, folder, name, 1000)
    zone(tmp_path, "intel-rapl:0:0", "core", 1000)
    return tmp_path


def test_the_packages_are_added_up_and_nothing_twice(powercap: Path) -> None:
    end = measure_energy(lambda: None, powercap)
    for number in (0, 1, 2):
        (powercap / f"intel-rapl:{number}/energy_uj").write_text(str(1000 + (number + 1) * 2_000_000))
    (powercap / "intel-rapl:0:0/energy_uj").write_text("90000000")
    assert end() == {"joules": 6.0, "energy_source": "rapl"}


def test_a_counter_that_starts_again(tmp_path: Path) -> None:
    counter = zone(tmp_path, "intel-rapl:0", "package-0", RANGE - 4_000_000)
    processors = Processors(tmp_path)
    counter.write_text("1000000")
    assert processors.stop() == pytest.approx(5.0)


def test_a_counter_that_starts_again_many_times(tmp_path: Path) -> None:
    """As it does in a phase of hours: it is looked at often enough to see each time."""
    counter = zone(tmp_path, "intel-rapl:0", "package-0", 0)
    processors = Processors(tmp_path, every=1e-3)
    for step in range(1, 10):
        value = step * RANGE // 2 % RANGE
        temporary = tmp_path / "new"
        temporary.write_text(str(value))
        temporary.replace(counter)
        deadline = time.monotonic() + 60
        while processors._last[counter] != value and time.monotonic() < deadline:
            time.sleep(1e-3)
    assert processors.stop() == pytest.approx(4.5 * RANGE / 1e6)
    assert not processors._thread.is_alive()


@pytest.mark.parametrize("content", ["", "no number", None])
def test_what_cannot_be_read_is_not_measured(powercap: Path, content: str | None) -> None:
    counter = powercap / "intel-rapl:1/energy_uj"
    later = measure_energy(lambda: None, powercap)
    counter.unlink() if content is None else counter.write_text(content)
    assert measure_energy(lambda: None, powercap)() == later() == {}


def test_a_machine_without_counters(tmp_path: Path) -> None:
    assert measure_energy(lambda: None, tmp_path)() == measure_energy(lambda: None, tmp_path / "nowhere")() == {}


def cuda(*uuids: str) -> Any:
    return SimpleNamespace(
        is_available=lambda: True,
        is_initialized=lambda: True,
        device_count=lambda: len(uuids),
        get_device_properties=lambda card: SimpleNamespace(uuid=uuids[card]),
    )


def changing(*values: Any) -> Callable[[], Any]:
    left = list(values)
    return lambda: left.pop(0)


@pytest.mark.parametrize(
    ("before", "after", "joules"),
    [
        ({"a": 10.0, "b": 7.0, "c": 1.0}, {"a": 30.5, "b": 8.0, "c": 99.0}, 21.5),  # another's card does not count
        ({"a": 10.0, "b": 7.0}, {"a": 30.5, "b": 6.0}, None),  # the driver was loaded anew
        ({"a": 10.0}, {"a": 30.5}, None),
        (None, {"a": 30.5, "b": 8.0}, None),
        (None, None, None),
    ],
)
def test_visible_cards_alone_count_where_cuda_is_used(
    powercap: Path, monkeypatch: pytest.MonkeyPatch, before: Any, after: Any, joules: float | None
) -> None:
    monkeypatch.setattr(torch, "cuda", cuda("a", "GPU-b"))
    found = measure_energy(changing(before, after), powercap)()
    assert found == ({} if joules is None else {"joules": joules, "energy_source": "nvml"})


def test_cards_that_are_not_used_do_not_count(powercap: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (torch, None):
        monkeypatch.setitem(sys.modules, "torch", module)
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
        found = measure_energy(changing({"a": 1.0}, {"a": 5.0}), powercap)()
        assert found == {"joules": 0.0, "energy_source": "rapl"}


def nvml(millijoules: list[int], fails: str = "") -> ModuleType:
    """nvidia-ml-py as far as it is used; the function called `fails` does."""

    class NVMLError(Exception):
        pass

    functions = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: len(millijoules),
        "nvmlDeviceGetHandleByIndex": lambda number: number,
        "nvmlDeviceGetUUID": lambda card: f"GPU-{card}",
        "nvmlDeviceGetTotalEnergyConsumption": lambda card: millijoules[card],
    }

    def fail(*arguments: Any) -> None:
        raise NVMLError("Not Supported")

    module = ModuleType("pynvml")
    vars(module).update(functions, NVMLError=NVMLError, **({fails: fail} if fails else {}))
    return module


def test_the_counters_of_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml([1500, 2000]))
    assert read_cards() == {"0": 1.5, "1": 2.0}
    for fails in ("nvmlInit", "nvmlDeviceGetTotalEnergyConsumption"):
        monkeypatch.setitem(sys.modules, "pynvml", nvml([1500, 2000], fails))
        assert read_cards() is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert read_cards() is None


def test_a_phase_takes_the_machines_own_counters(powercap: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "read_cards", changing({"a": 1.0}, {"a": 4.0}))
    monkeypatch.setattr(torch, "cuda", cuda("a"))
    assert measure_energy()() == {"joules": 3.0, "energy_source": "nvml"}
