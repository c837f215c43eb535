"""`distill doctor`: facts about this machine, its abilities, its faults and their remedies."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from distill.errors import first_line
from distill.forecast.machine import calibration
from distill.forecast.simulation.kernels import DeviceKind
from distill.recipes.doctor import probes as machine
from distill.recipes.doctor.capacity import METHOD
from distill.recipes.doctor.findings import Finding, judge
from distill.recipes.doctor.probes import Probes
from distill.system.progress import say
from distill.system.quiet import quiet
from distill.system.units import size

T = TypeVar("T")


def main(calibrate: bool = False, as_json: bool = False, probes: Probes = machine.REAL) -> int:
    """Look at this machine and print the facts. Exit status 0 means healthy, 1 that something is wrong.

    `calibrate` measures its speed first, in under a minute, and keeps it for forecasts. Nothing raises: a probe that
    fails becomes a finding.
    """
    tell: Callable[[str], None] = (lambda line: None) if as_json else say
    with quiet():
        facts, found = _look(probes)
        for line in _machine_lines(facts):
            tell(line)
        facts["calibration"] = _calibration(facts, found, probes, calibrate, tell)
        facts["can"] = _capacity(facts, found, probes, tell)
    findings = [*found, *judge(facts)]
    for line in [*_capacity_lines(facts), *_finding_lines(findings)]:
        tell(line)
    healthy = not any(finding.kind == "wrong" for finding in findings)
    if as_json:
        say(json.dumps({**facts, "findings": [asdict(finding) for finding in findings], "healthy": healthy}, indent=2))
    return 0 if healthy else 1


def _tried(what: str, look: Callable[[], T], findings: list[Finding], remedy: str) -> T | None:
    """Return a probe's result, or add a finding if it fails. Prints of libraries meanwhile are swallowed."""
    try:
        with quiet(prints=True):
            return look()
    except (Exception, SystemExit) as error:
        findings.append(Finding("wrong", f"{what}: {first_line(error)[:200]}", remedy))
        return None


def _look(probes: Probes) -> tuple[dict[str, Any], list[Finding]]:
    found: list[Finding] = []
    facts: dict[str, Any] = {
        "software": _tried("software", probes.software, found, "reinstall torch: pip install --force-reinstall torch"),
        "host": _tried("host", probes.host, found, "nothing depends on it but the figures for this processor"),
        "device": _tried(
            "the CUDA device does not answer",
            probes.device,
            found,
            "look whether nvidia-smi shows it; another program may hold it, or it may need a restart",
        ),
        "driver": _tried("nvidia-smi", probes.driver, found, "reinstall the NVIDIA driver, or restart the machine"),
        "disk": _tried(
            "this folder cannot be written to",
            lambda: probes.disk(Path.cwd()),
            found,
            "go to a folder of yours on a disk with room, and run there",
        ),
        "packages": _tried("packages", probes.packages, found, "reinstall them: pip install -e . in this project"),
    }
    kind = _kind(facts)
    facts["four_bit"] = _tried(
        f"bitsandbytes fails in 4 bits on {kind}",
        lambda: probes.four_bit(kind),
        found,
        "pip install --upgrade bitsandbytes; until it works: --teacher.quantization none",
    )
    if kind == "cuda":
        before = len(found)
        _tried(
            "bitsandbytes' 8-bit optimiser fails",
            probes.eight_bit_optimizer,
            found,
            "pip install --upgrade bitsandbytes; adamw_8bit does without, paged_adamw_8bit does not",
        )
        facts["eight_bit_optimizer"] = len(found) == before
    return facts, found


def _kind(facts: dict[str, Any]) -> DeviceKind:
    return "cuda" if (facts["device"] or {}).get("is_cuda") else "cpu"


def _calibration(
    facts: dict[str, Any], found: list[Finding], probes: Probes, wanted: bool, tell: Callable[[str], None]
) -> dict[str, Any] | None:
    """Return the machine's measured efficiency, from now or before. None means that forecasts use the defaults."""
    kind = _kind(facts)
    if wanted:
        tell("calibrating   (less than a minute, best with nothing else running)")
        remedy = "forecasts go on with the defaults; look at the findings beside it"
        efficiency = _tried("calibration failed", lambda: probes.calibrate(kind), found, remedy)
    else:
        efficiency = _tried(
            "calibration", lambda: calibration.load(kind), found, "delete distill/calibration.json in your cache folder"
        )
    if efficiency is None:
        tell("time          forecast by default figures; `distill doctor --calibrate` measures yours")
        return None
    shares = ", ".join(f"{name} {share:.0%}" for name, share in efficiency.matmul.items())
    tell(f"time          calibrated: of the peak rates {shares}, of the bandwidth {efficiency.bandwidth:.0%}")
    return asdict(efficiency)


def _capacity(
    facts: dict[str, Any], found: list[Finding], probes: Probes, tell: Callable[[str], None]
) -> dict[str, Any] | None:
    device, host = facts["device"], facts["host"]
    if device is None or not (device["is_cuda"] or host):
        return None
    budget = device["memory_bytes"] if device["is_cuda"] else host["free_bytes"]
    tell("\nsimulating what fits …")
    remedy = "nothing but this table depends on it; forecasts of experiments may fail too"
    rows = _tried("the simulation fails", lambda: probes.capacity(_kind(facts), budget), found, remedy)
    return None if rows is None else {"budget_bytes": budget, "method": METHOD, "largest": rows}


def _machine_lines(facts: dict[str, Any]) -> Iterator[str]:
    software, host, device, driver = (facts[key] or {} for key in ("software", "host", "device", "driver"))
    if software:
        build = f"CUDA {software['cuda_build']}" if software["cuda_build"] else "built without CUDA"
        yield f"system        {software['system']}, Python {software['python']}"
        yield f"torch         {software['torch']}, {build}"
    if host:
        yield f"processor     {host['processor']}, {host['cores']} cores, {host['threads']} threads"
        yield f"memory        {size(host['memory_bytes'])}, {size(host['free_bytes'])} free"
    if device.get("is_cuda"):
        more = f", one of {device['count']}" if device["count"] > 1 else ""
        yield f"card          {device['name']}{more}, compute capability {device['capability']}"
        yield f"card's memory {size(device['memory_bytes'])}, {size(device['free_bytes'])} free"
        yield f"bfloat16      {'yes' if device['bf16'] else 'no'}"
    elif device:
        yield "card          none that torch can use"
    if driver:
        yield f"driver        {driver['version']} ({', '.join(driver['cards'])})"
    if facts["four_bit"]:
        errors = facts["four_bit"]
        yield f"4 bits        tried: weights off by {errors['weight_error']:.1%}, product {errors['product_error']:.0e}"
    if facts.get("eight_bit_optimizer"):
        yield "8-bit AdamW   tried: works"
    if facts["disk"]:
        speeds = [f"{name} {size(facts['disk'][key])}/s" for name, key in _SPEEDS if key in facts["disk"]]
        yield f"disk          {', '.join([size(facts['disk']['free_bytes']) + ' free here', *speeds])}"
    if facts["packages"]:
        packages = facts["packages"]
        there = [f"{name} {version}" for name, version in packages.items() if version and name in machine.OPTIONAL]
        absent = [f"{name} ({machine.OPTIONAL[name]})" for name in machine.OPTIONAL if not packages.get(name)]
        yield f"optional      {', '.join(there) or 'none'}"
        yield f"not there     {', '.join(absent) or 'nothing'}"


_SPEEDS = (("writes", "write_bytes_per_s"), ("reads", "read_bytes_per_s"))


def _capacity_lines(facts: dict[str, Any]) -> Iterator[str]:
    can = facts["can"]
    if can is None:
        return
    yield f"largest models in {size(can['budget_bytes'])} ({can['method']}; `distill plan` tells it of any):"
    for row in can["largest"]:
        fits = f"{row['model']}, {size(row['needed_bytes'])}" if row["model"] else "none"
        yield f"  {row['way']:<36} {fits}"


def _finding_lines(findings: list[Finding]) -> Iterator[str]:
    yield ""
    for finding in sorted(findings, key=lambda finding: finding.kind == "note"):
        yield f"{finding.kind}: {finding.what} -> {finding.remedy}"
    if not any(finding.kind == "wrong" for finding in findings):
        yield "nothing is wrong"
