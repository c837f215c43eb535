"""Before a phase begins it is forecast: what cannot fit is refused, what ran is compared with its forecast."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from distill.errors import UserError
from distill.forecast import preflight
from distill.forecast.forecast import CONTEXT_BYTES, DRIVER_BYTES, Forecaster
from distill.forecast.machine.cards import GIB, this_machine
from distill.forecast.phases import step

pytestmark = pytest.mark.usefixtures("one_thread")


def test_what_cannot_fit_is_refused_before_it_begins(world: Any, distill: Any, tmp_path: Path) -> None:
    """A limit below what the libraries alone take on a CPU: nothing helps, and nothing is made."""
    file = world.write(tmp_path / "experiment.yaml", preflight=True)
    refused = distill("cache-teacher", file, "--memory_limit", "100MB")
    refused.refused("cache-teacher: needs", "100 MB", "smaller models", "distill plan")
    assert not list((tmp_path / "run").rglob("*.safetensors"))
    distill("cache-teacher", file, "--memory_limit", "12 potatoes").refused("memory_limit", "12GiB")
    distill("cache-teacher", file, "--memory_limit", "100MB", "--preflight", "false").done()


@pytest.fixture
def large_steps(world: Any, tmp_path: Path) -> str:
    """Return an experiment whose training takes hundreds of megabytes in one pass, and few in several."""
    return world.write(
        tmp_path / "experiment.yaml",
        preflight=True,
        corpus={"sequence_length": 192},
        cache={"max_samples": 16, "held_out_samples": 0},
        student={"class_path": "compact", "options": {"hidden_size": 128, "layers": 4, "heads": 4}},
        train={"batch_size": 64, "max_steps": 1, "activation_checkpointing": False},
        evaluate={"batch_size": 1, "max_samples": 1},
    )


def test_the_advice_of_a_refusal_is_followed_and_it_runs(
    large_steps: str, distill: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`run` refuses before the teacher is loaded what its student would need."""
    # The process holds more and more; a fixed amount makes the limit mean the same each time.
    monkeypatch.setattr("distill.forecast.preflight.held_memory", lambda: 1_000_000_000)
    limit = "1250MB"
    refused = distill("run", large_steps, "--memory_limit", limit)
    refused.refused("train-student: needs", "1.25 GB", "--train.batch_size")
    assert not list((tmp_path / "run").rglob("*.safetensors"))
    found = re.search(r"give (--.*?) \(`distill plan`", refused.err)
    assert found is not None
    outcome = distill("run", large_steps, "--memory_limit", limit, *shlex.split(found[1])).done()
    assert "forecast: train-student: peak host memory" in outcome.out


def test_forecast_and_measured_are_kept_and_shown(world: Any, distill: Any, tmp_path: Path) -> None:
    file = world.write(tmp_path / "experiment.yaml", preflight=True)
    outcome = distill("run", file, "--train.max_steps", 3).done()
    rows = {row["what"]: row for row in json.loads((tmp_path / "run/forecast.json").read_text())["rows"]}
    assert set(rows) == {
        *(f"{phase}: peak host memory" for phase in ("cache-teacher", "train-student", "evaluate")),
        *("cache-teacher: time", "train-student: time", "cache-teacher: size on disk"),
    }
    assert all(row["forecast"] > 0 and row["measured"] > 0 for row in rows.values())
    assert "forecast: train-student: time" in outcome.out
    page = (tmp_path / "run/report.html").read_text()
    assert "Forecast and measured" in page and "train-student: time" in page
    again = distill("run", file, "--train.max_steps", 3).done()
    assert "forecast: " not in again.out


def test_what_cannot_be_simulated_trains_all_the_same(
    world: Any, distill: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("a kernel of its own\nand more")

    file = world.write(tmp_path / "experiment.yaml", preflight=True)
    distill("cache-teacher", file).done()
    monkeypatch.setattr(step, "run_tracked", fail)
    outcome = distill("train-student", file, "--train.max_steps", 2).done()
    assert "train-student: no forecast (RuntimeError: a kernel of its own); going on without one" in outcome.out
    assert (tmp_path / "run/student").is_dir()
    planned = distill("plan", file)
    assert (planned.status, planned.err) == (
        2,
        "distill: train-student: no forecast (RuntimeError: a kernel of its own)\n",
    )


def test_a_limit_is_that_of_a_card_of_this_size() -> None:
    card = this_machine("cpu")
    assert Forecaster(card, 2**30).limit_bytes == 2**30
    assert Forecaster(card, 2**60).limit_bytes == card.memory_bytes


def test_the_allocator_is_held_to_what_a_small_card_would_leave_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Context and driver take of a small card what they take of a large one."""
    held: list[float] = []
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: SimpleNamespace(total_memory=24 * GIB))
    monkeypatch.setattr("torch.cuda.set_per_process_memory_fraction", lambda share, device: held.append(share))
    preflight._hold_to(12 * GIB, torch.device("cuda"))
    assert 24 * GIB * held[0] == pytest.approx(12 * GIB - CONTEXT_BYTES - DRIVER_BYTES)
    with pytest.raises(UserError, match=r"memory_limit: 51.5 GB is more than this card's 25.8 GB"):
        preflight._hold_to(48 * GIB, torch.device("cuda"))


@pytest.mark.parametrize(("free", "is_said"), [(6.0e9, True), (6.2e9, False)])
def test_a_card_that_others_use_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], free: float, is_said: bool
) -> None:
    """Memory that this process holds is not counted as others', and its context is there already."""
    forecast: Any = SimpleNamespace(
        phases={
            "cache-teacher": SimpleNamespace(needed_bytes=5_000_000_000, context_bytes=900_000_000),
            "train-student": SimpleNamespace(needed_bytes=8_000_000_000, context_bytes=900_000_000),
        },
        spare_bytes=lambda phase: {"cache-teacher": 7, "train-student": 4}[phase],
    )
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (int(free), 12_000_000_000))
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda device: 1_000_000_000)
    preflight._say_what_others_hold(forecast, torch.device("cuda"))
    said = capsys.readouterr().out
    assert ("train-student: may run out of memory: it takes 7.1 GB, and other programs leave 7 GB" in said) == is_said
    assert bool(said) == is_said
    preflight._say_what_others_hold(SimpleNamespace(phases={}), torch.device("cuda"))  # type: ignore[arg-type]
