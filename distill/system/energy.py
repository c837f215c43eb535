"""Energy in joules as the machine itself counts it: NVIDIA cards by NVML, processors by Linux's RAPL."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

POWERCAP = Path("/sys/class/powercap")
EVERY = 30.0
"""Seconds between two readings of the processors' counters, which wrap around after 65 kJ or more: enough for 2 kW."""


def measure_energy(cards: Callable[[], dict[str, float] | None] | None = None, powercap: Path = POWERCAP) -> Any:
    """Start a measurement. The returned function ends it and gives `joules` and `energy_source`, or nothing.

    With CUDA in use, the energy is that of all its visible cards, including other programs' use, and not that of the
    processors. Without CUDA, it is that of all processor packages, including other programs' use. It gives nothing if
    no counter is readable; the processors' counters are usually readable for root alone.
    """
    cards = cards or read_cards
    before, processors = cards(), Processors(powercap)

    def end() -> dict[str, Any]:
        of_processors, after = processors.stop(), cards()
        used = visible_cards()
        if used is None:
            return {} if of_processors is None else {"joules": round(of_processors, 3), "energy_source": "rapl"}
        pairs = [((before or {}).get(card), (after or {}).get(card)) for card in used]
        # A counter starts from zero when the driver is loaded, and never otherwise.
        spent = [late - early for early, late in pairs if early is not None and late is not None and late >= early]
        if not spent or len(spent) < len(used):
            return {}
        return {"joules": round(sum(spent), 3), "energy_source": "nvml"}

    return end


def visible_cards() -> list[str] | None:
    """Return the UUIDs of the cards that torch sees, or None if this process does not use CUDA."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return None
    uuids = [str(torch.cuda.get_device_properties(card).uuid) for card in range(torch.cuda.device_count())]
    return [uuid.removeprefix("GPU-") for uuid in uuids]


def read_cards() -> dict[str, float] | None:
    """Return the joules of every card since its driver was loaded, by UUID; None without NVML or without a counter.

    This needs the package nvidia-ml-py, and a card of 2017 (Volta) or later.
    """
    try:
        nvml = import_module("pynvml")
        nvml.nvmlInit()
    except Exception:  # not installed, or no driver
        return None
    try:
        joules = {}
        for number in range(nvml.nvmlDeviceGetCount()):
            card = nvml.nvmlDeviceGetHandleByIndex(number)
            uuid = nvml.nvmlDeviceGetUUID(card)
            joules[uuid.removeprefix("GPU-")] = nvml.nvmlDeviceGetTotalEnergyConsumption(card) / 1000
        return joules
    except nvml.NVMLError:
        return None
    finally:
        nvml.nvmlShutdown()


class Processors:
    """Energy of all processor packages from now on (Intel and AMD).

    Source: https://www.kernel.org/doc/html/latest/power/powercap/powercap.html
    """

    def __init__(self, powercap: Path = POWERCAP, every: float = EVERY) -> None:
        self._microjoules = 0
        self._stopped = threading.Event()
        try:
            # Other zones are inside a package, or (on some machines) the whole platform, which includes the packages.
            packages = [zone for zone in powercap.glob("intel-rapl:*") if _text(zone / "name").startswith("package")]
            self._range = {zone / "energy_uj": int(_text(zone / "max_energy_range_uj")) for zone in packages}
            self._last = {counter: int(_text(counter)) for counter in self._range}
        except (OSError, ValueError):
            self._range = {}
        self._thread = threading.Thread(target=self._watch, args=(every,), daemon=True)
        if self._range:
            self._thread.start()

    def stop(self) -> float | None:
        """Return the joules since the object was made, or None if nothing can be read."""
        self._stopped.set()
        if not self._range:
            return None
        self._thread.join()
        self._look()
        return self._microjoules / 1e6 if self._range else None

    def _watch(self, every: float) -> None:
        while not self._stopped.wait(every):
            self._look()

    def _look(self) -> None:
        try:
            now = {counter: int(_text(counter)) for counter in self._range}
        except (OSError, ValueError):
            self._range = {}
            return
        self._microjoules += sum((now[counter] - self._last[counter]) % self._range[counter] for counter in now)
        self._last = now


def _text(path: Path) -> str:
    return path.read_text(encoding="ascii").strip()
