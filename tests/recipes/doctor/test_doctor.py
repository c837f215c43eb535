"""`distill doctor` on fake machines in all states of repair, and on the real one."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import pytest

from distill.forecast.machine import disk
from distill.forecast.machine.calibration import DEFAULTS, Efficiency
from distill.forecast.published import published_models
from distill.recipes.doctor import capacity, probes
from distill.recipes.doctor import command as doctor
from distill.recipes.doctor.probes import Probes

CARD = {
    "name": "NVIDIA GeForce RTX 3060",
    "is_cuda": True,
    "bf16": True,
    "count": 1,
    "memory_bytes": 12_600_000_000,
    "free_bytes": 12_300_000_000,
    "capability": "8.6",
    "is_in_build": True,
}
CPU = {"name": "a processor", "is_cuda": False, "bf16": True}
DISK = {"free_bytes": 100e9, "write_bytes_per_s": 500e6, "read_bytes_per_s": 900e6}
DRIVER = {"version": "580.95.05", "cards": ["NVIDIA GeForce RTX 3060"]}
SOFTWARE = {"system": "Linux", "python": "3.11", "torch": "2.13.0", "cuda_build": "12.8"}
ROW = {"way": "teacher", "model": "some/model", "parameters": 10**9, "needed_bytes": 11_200_000_000}
MEASURED = replace(DEFAULTS["cuda"], is_measured=True)


def broken(*args: Any) -> NoReturn:
    print("noise of a library")
    raise RuntimeError("CUDA error: no kernel image\nand a long tail")


def machine(**probes: Any) -> Probes:
    """A healthy one with an RTX 3060, but for `probes`: what a probe sees, or what it does."""
    healthy: dict[str, Any] = {
        "software": SOFTWARE,
        "host": {"processor": "p", "cores": 8, "threads": 4, "memory_bytes": 32e9, "free_bytes": 20e9},
        "device": CARD,
        "driver": DRIVER,
        "four_bit": {"weight_error": 0.09, "product_error": 1e-6},
        "eight_bit_optimizer": None,
        "disk": DISK,
        "packages": dict.fromkeys(("torch", "bitsandbytes", "gguf"), "1.0"),
        "capacity": [ROW],
        "calibrate": MEASURED,
    }
    assert probes.keys() <= healthy.keys()
    seen = healthy | probes
    return Probes(**{name: value if callable(value) else lambda *_, v=value: v for name, value in seen.items()})


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def test_a_healthy_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(probes=machine()) == 0
    out, err = capsys.readouterr()
    assert err == "" and "nothing is wrong" in out and "wrong:" not in out
    for fact in (
        "RTX 3060",
        "12.6 GB",
        "8.6",
        "580.95.05",
        "CUDA 12.8",
        "8-bit AdamW   tried: works",
        "500 MB/s",
        "some/model, 11.2 GB",
    ):
        assert fact in out, fact


@pytest.mark.parametrize(
    ("seen", "words"),
    [
        ({"device": CPU, "software": {**SOFTWARE, "cuda_build": None}}, ["RTX 3060 is here", "pip install torch"]),
        ({"device": CPU}, ["torch sees no device", "CUDA_VISIBLE_DEVICES"]),
        ({"device": CPU, "driver": {**DRIVER, "version": "470.12"}}, ["470.12 is too old", "525"]),
        ({"device": {**CARD, "is_in_build": False, "capability": "12.0"}}, ["12.0", "pip install --upgrade torch"]),
        ({"four_bit": broken}, ["4 bits on cuda", "no kernel image", "pip install --upgrade bitsandbytes"]),
        ({"four_bit": {"weight_error": 0.9, "product_error": 0.0}}, ["compute wrongly", "quantization none"]),
        ({"four_bit": {"weight_error": 0.09, "product_error": 0.5}}, ["compute wrongly"]),
        ({"eight_bit_optimizer": broken}, ["8-bit optimiser", "adamw_8bit"]),
        ({"disk": {"free_bytes": 1e9}}, ["only 1 GB", "run_dir"]),
        ({"disk": broken}, ["folder cannot be written"]),
        ({"packages": {"torch": "2", "peft": None, "wandb": None}}, ["missing: peft", "pip install peft"]),
        ({"device": broken}, ["does not answer"]),
        ({"capacity": broken}, ["simulation fails"]),
    ],
)
def test_what_is_wrong_is_one_line_with_its_remedy(
    seen: dict[str, Any], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor.main(probes=machine(**seen)) == 1
    out, err = capsys.readouterr()
    lines = [line for line in out.splitlines() if line.startswith("wrong: ")]
    assert len(lines) == 1 and " -> " in lines[0], out
    assert not [word for word in words if word not in lines[0]], lines[0]
    assert "noise" not in out + err and "tail" not in out and "nothing is wrong" not in out


@pytest.mark.parametrize(
    ("seen", "words"),
    [
        ({"device": {**CARD, "bf16": False, "name": "Tesla T4"}}, ["Tesla T4 has no bfloat16", "16-mixed"]),
        ({"device": {**CARD, "free_bytes": 6e9}}, ["6.6 GB of the card are taken", "--card 5GiB"]),
        ({"device": CPU, "driver": None}, ["no NVIDIA card"]),
        ({"disk": {**DISK, "read_bytes_per_s": 9e6}}, ["9 MB/s"]),
    ],
)
def test_what_is_good_to_know_is_no_illness(
    seen: dict[str, Any], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor.main(probes=machine(**seen)) == 0
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if line.startswith("note: ")]
    assert len(lines) == 1 and not [word for word in words if word not in lines[0]], out


def test_when_everything_fails_everything_is_said_and_nothing_raises(capsys: pytest.CaptureFixture[str]) -> None:
    everything = dict.fromkeys(machine().__dataclass_fields__, broken)
    assert doctor.main(calibrate=True, probes=machine(**everything)) == 1
    out = capsys.readouterr().out
    assert "Traceback" not in out
    # On no device there is no optimiser to try and nothing to simulate.
    assert out.count("wrong: ") == len(everything) - 2


@pytest.mark.parametrize("name", machine().__dataclass_fields__)
def test_one_failing_probe_leaves_the_others_alone(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(calibrate=True, as_json=True, probes=machine(**{name: broken})) == 1
    seen = json.loads(capsys.readouterr().out)
    assert [finding["kind"] for finding in seen["findings"]].count("wrong") == 1
    facts = ("software", "host", "device", "driver", "four_bit", "disk", "packages")
    expected = {fact for fact in facts if fact != name}
    assert {fact for fact in facts if seen[fact] is not None} == expected


def test_json_is_all_that_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(as_json=True, probes=machine()) == 0
    seen = json.loads(capsys.readouterr().out)
    assert seen["healthy"] and seen["findings"] == [] and seen["device"]["name"] == CARD["name"]
    assert seen["can"]["largest"] == [ROW] and seen["can"]["budget_bytes"] == CARD["memory_bytes"]
    assert seen["calibration"] is None


def test_calibrating_is_done_on_the_device_and_told(capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[str] = []

    def calibrate(kind: str) -> Efficiency:
        asked.append(kind)
        return MEASURED

    assert doctor.main(calibrate=True, probes=machine(calibrate=calibrate)) == 0
    assert asked == ["cuda"] and "calibrated" in capsys.readouterr().out
    assert doctor.main(probes=machine(calibrate=calibrate)) == 0
    assert asked == ["cuda"] and "default figures" in capsys.readouterr().out


def test_this_machine(capsys: pytest.CaptureFixture[str], one_thread: None) -> None:
    """Real probes, but for the simulation of most ways, and of models for more than 3.5 GB."""
    some = ("teacher in NF4", "student, plain AdamW")
    real = replace(probes.REAL, capacity=lambda kind, budget: capacity.table(kind, 3.5e9, some))
    status = doctor.main(as_json=True, probes=real)
    seen = json.loads(capsys.readouterr().out)
    assert status == (0 if seen["healthy"] else 1)
    assert seen["four_bit"]["weight_error"] < 0.12 and seen["host"]["memory_bytes"] > 1e9
    teacher, student = seen["can"]["largest"]
    assert 0.5 * teacher["parameters"] < teacher["needed_bytes"] <= 3.5e9
    assert 0 < 16 * student["parameters"] < student["needed_bytes"] <= 3.5e9
    assert student["parameters"] < teacher["parameters"] and student["model"] != teacher["model"]
    assert list(Path.cwd().iterdir()) == []


def test_the_file_that_times_the_disk_is_gone_even_after_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "MOST_BYTES", 8 << 20)
    seen = probes.disk(tmp_path)
    assert seen["write_bytes_per_s"] > 0 and list(tmp_path.iterdir()) == []

    def full(descriptor: int) -> NoReturn:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        probes.disk(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("free", [0, 1000, 30 << 20])
def test_a_disk_with_no_room_is_not_written_to(free: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": free}))
    assert probes.disk(tmp_path) == {"free_bytes": free}


@pytest.mark.parametrize(
    ("capability", "built_for", "expected"),
    [
        ((8, 6), ["sm_75", "sm_80"], True),
        ((8, 6), ["sm_86"], True),
        ((8, 0), ["sm_86"], False),
        ((12, 0), ["sm_80", "sm_90"], False),
        ((12, 0), ["sm_90", "compute_90"], True),
        ((6, 0), ["sm_75", "sm_90a", "compute_90"], False),
        ((9, 0), [], True),
    ],
)
def test_a_build_runs_on_the_capabilities_it_has_code_for(
    capability: tuple[int, int], built_for: list[str], expected: bool
) -> None:
    assert probes._is_in_build(*capability, built_for) is expected


@pytest.mark.parametrize("script", ["exit 9", "echo", "echo NVIDIA-SMI has failed; exit 9"])
def test_a_broken_nvidia_smi_is_told(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(RuntimeError, match="nvidia-smi"):
        probes.driver()
    program.write_text("#!/bin/sh\necho 'NVIDIA GeForce RTX 3060, 580.95.05, 12288'\n")
    assert probes.driver() == {"version": "580.95.05", "cards": ["NVIDIA GeForce RTX 3060"]}


def test_the_largest_model_that_fits_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a rule of thumb, a way that takes two bytes a parameter; where not even the smallest fits, none."""

    def needed(self: Any, experiment: Any, phase: str) -> int:
        return round(2 * published_models()[experiment.teacher.model].parameters)

    monkeypatch.setattr(capacity.Forecaster, "needed_bytes", needed)
    parameters = sorted({model.parameters for model in published_models().values()})
    for smaller, larger in pairwise(parameters):
        (row,) = capacity.table("cpu", 2 * larger - 1, ["teacher in bfloat16"])
        assert row["parameters"] == smaller == published_models()[row["model"]].parameters
    assert capacity.table("cpu", 2 * parameters[0] - 1, ["teacher in bfloat16"])[0]["model"] is None
