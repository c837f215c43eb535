"""Findings about a machine that `distill doctor` looked at: faults with their remedies, and notes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from distill.recipes.doctor.probes import REQUIRED
from distill.system.units import size

LITTLE_DISK, SLOW_DISK = 5e9, 50e6
WORST_WEIGHT, WORST_PRODUCT = 0.15, 0.02
"""Largest relative errors of 4-bit layers that work: NF4 itself makes 0.09; a product's is rounding alone."""
# The oldest drivers of Linux that run a CUDA version: NVIDIA, CUDA toolkit release notes, table 3.
OLDEST_DRIVER = {"11": 450, "12": 525, "13": 580}


@dataclass(frozen=True)
class Finding:
    """A fact about the machine, in one line."""

    kind: Literal["wrong", "note"]
    """Kind of the finding. Only "wrong" makes the exit status 1."""
    what: str
    remedy: str


def judge(facts: dict[str, Any]) -> list[Finding]:
    """Return the faults of the machine, and notes. Facts that no probe could see are left alone."""
    return [*_of_card(facts), *_of_libraries(facts), *_of_disk(facts)]


def _of_card(facts: dict[str, Any]) -> Iterator[Finding]:
    device, driver, software = facts["device"] or {}, facts["driver"], facts["software"] or {}
    build = software.get("cuda_build")
    if device and not device["is_cuda"]:
        if driver is None:
            yield Finding(
                "note", "no NVIDIA card: everything runs on the processor", "right for the demo, slow for more"
            )
        elif build is None:
            yield Finding(
                "wrong",
                f"{driver['cards'][0]} is here, but this torch ({software.get('torch')}) is built for processors alone",
                "pip uninstall -y torch && pip install torch (on Windows with the command of pytorch.org/get-started)",
            )
        elif not _is_too_old(driver, build):
            yield Finding(
                "wrong",
                f"{driver['cards'][0]} is here and torch has CUDA {build}, yet torch sees no device",
                "look at CUDA_VISIBLE_DEVICES; in a container start it with --gpus all; else restart the machine",
            )
    if driver and build and _is_too_old(driver, build):
        yield Finding(
            "wrong",
            f"driver {driver['version']} is too old for torch's CUDA {build}",
            f"install NVIDIA's driver {OLDEST_DRIVER[build.split('.')[0]]} or newer, or a torch for an older CUDA",
        )
    if not device.get("is_cuda"):
        return
    if not device["is_in_build"]:
        yield Finding(
            "wrong",
            f"torch {software.get('torch')} has no code for compute capability {device['capability']}",
            "pip install --upgrade torch for a card newer than it; an older torch for a card that it has dropped",
        )
    if not device["bf16"]:
        yield Finding(
            "note",
            f"{device['name']} has no bfloat16",
            "nothing to do: with auto the teacher computes in float16, and the training is 16-mixed",
        )
    held = device["memory_bytes"] - device["free_bytes"]
    if held > max(0.1 * device["memory_bytes"], 1e9):
        yield Finding(
            "note",
            f"{size(held)} of the card are taken by other programs",
            f"end them (nvidia-smi lists them), or plan with --card {int(device['free_bytes'] / 2**30)}GiB",
        )


def _is_too_old(driver: dict[str, Any], build: str) -> bool:
    major = str(driver["version"]).split(".")[0]
    return major.isdigit() and int(major) < OLDEST_DRIVER.get(build.split(".")[0], 0)


def _of_libraries(facts: dict[str, Any]) -> Iterator[Finding]:
    errors, packages = facts["four_bit"], facts["packages"] or {}
    # The comparison is written so that not-a-number counts as too large.
    if errors and not (errors["weight_error"] < WORST_WEIGHT and errors["product_error"] < WORST_PRODUCT):
        yield Finding(
            "wrong",
            f"4-bit layers compute wrongly: weights off by {errors['weight_error']:.2g}, products by "
            f"{errors['product_error']:.2g}",
            "pip install --upgrade bitsandbytes; until then: --teacher.quantization none",
        )
    missing = [name for name in REQUIRED if name in packages and packages[name] is None]
    if missing:
        yield Finding("wrong", f"missing: {', '.join(missing)}", f"pip install {' '.join(missing)}")


def _of_disk(facts: dict[str, Any]) -> Iterator[Finding]:
    disk = facts["disk"]
    if not disk:
        return
    if disk["free_bytes"] < LITTLE_DISK:
        yield Finding(
            "wrong",
            f"only {size(disk['free_bytes'])} are free here",
            "make room, or put run_dir and cache.dir on another disk; caches take gigabytes",
        )
    slowest = min(disk.get("write_bytes_per_s", SLOW_DISK), disk.get("read_bytes_per_s", SLOW_DISK))
    if slowest < SLOW_DISK:
        yield Finding("note", f"this disk moves {size(slowest)}/s", "put run_dir and cache.dir on a faster one")
