"""The cost of a phase is noted however it ends, in whole lines whoever else writes, and each phase has its own."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.system import ledger
from distill.system.interrupt import Interrupted


def fixed(**fields: Any) -> ledger.Meter:
    return lambda: lambda: fields


def test_a_line_says_what_when_how_long_and_how_it_ended(tmp_path: Path) -> None:
    run = tmp_path / "new" / "run"
    with ledger.phase(run, "evaluate", [fixed(joules=3.5), fixed(energy_source="rapl")]):
        assert not run.exists()
    (line,) = ledger.read(run)
    assert list(line) == ["phase", "began", "seconds", "ended", "joules", "energy_source"]
    assert (line["phase"], line["ended"], line["joules"], line["energy_source"]) == ("evaluate", "done", 3.5, "rapl")
    assert 0 <= line["seconds"] < 60
    began = datetime.fromisoformat(line["began"])
    assert began.utcoffset() == timedelta(0) and abs(datetime.now(timezone.utc) - began) < timedelta(minutes=5)


@pytest.mark.parametrize(
    ("error", "ended"),
    [
        (Interrupted("SIGTERM"), "interrupted"),
        (KeyboardInterrupt(), "interrupted"),
        (ValueError("x"), "failed"),
        (SystemExit(3), "failed"),
        (MemoryError(), "failed"),
    ],
)
def test_an_exception_is_noted_and_goes_on(tmp_path: Path, error: BaseException, ended: str) -> None:
    with pytest.raises(type(error)) as raised, ledger.phase(tmp_path, "train-student", []):
        raise error
    assert raised.value is error
    assert [line["ended"] for line in ledger.read(tmp_path)] == [ended]


def test_nested_phases_and_exceptions_are_each_noted_as_they_ended(tmp_path: Path) -> None:
    with pytest.raises(Interrupted), ledger.phase(tmp_path, "outermost", []):
        try:
            with ledger.phase(tmp_path, "outer", []):
                with pytest.raises(KeyError), ledger.phase(tmp_path, "inner", []):
                    raise KeyError
                with ledger.phase(tmp_path, "second", []):
                    pass
                raise ValueError
        except ValueError as error:
            raise Interrupted from error
    assert [(line["phase"], line["ended"]) for line in ledger.read(tmp_path)] == [
        ("inner", "failed"),
        ("second", "done"),
        ("outer", "failed"),
        ("outermost", "interrupted"),
    ]


def test_a_meter_that_fails_hides_nothing(tmp_path: Path) -> None:
    def broken() -> Callable[[], dict[str, Any]]:
        def end() -> dict[str, Any]:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        return end

    with pytest.raises(ValueError, match="the work"), ledger.phase(tmp_path, "a", [broken, fixed(joules=1.0)]):
        raise ValueError("the work")
    assert ledger.read(tmp_path)[0]["joules"] == 1.0


def test_only_the_first_process_notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill.system.ledger.is_first_process", lambda: False)
    with ledger.phase(tmp_path, "a"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_noted_does_not_end_the_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / ledger.FILE).mkdir()
    with ledger.phase(tmp_path, "evaluate", []):
        pass
    said = capsys.readouterr().out
    assert "costs.jsonl: what evaluate cost could not be noted" in said and len(said.splitlines()) == 1


def test_no_file_is_no_lines(tmp_path: Path) -> None:
    assert ledger.read(tmp_path) == ledger.read(tmp_path / "nowhere") == []


def test_killed_at_any_byte_of_an_append(tmp_path: Path) -> None:
    """The lines before it stay, and the next one is whole."""
    path = tmp_path / ledger.FILE
    first, last, following = {"phase": "a", "seconds": 1.5}, {"phase": "é{}", "seconds": 2.5}, {"phase": "c"}
    ledger.append(tmp_path, first)
    size = path.stat().st_size
    ledger.append(tmp_path, last)
    whole = path.read_bytes()
    assert whole.count(b"\n") == 2
    for length in range(size, len(whole) + 1):
        path.write_bytes(whole[:length])
        # Without its end of line it is there already.
        there = [first, last] if length >= len(whole) - 1 else [first]
        assert ledger.read(tmp_path) == there
        ledger.append(tmp_path, following)
        assert ledger.read(tmp_path) == [*there, following]
        ledger.append(tmp_path, first)
        assert ledger.read(tmp_path) == [*there, following, first]


@pytest.mark.parametrize("rubbish", [b"", b"\n\n", b"\xff\x00", b"[" * 100_000, b"[1]", b"null", b'{"phase"'])
def test_what_is_no_line_is_passed_over(tmp_path: Path, rubbish: bytes) -> None:
    (tmp_path / ledger.FILE).write_bytes(rubbish)
    ledger.append(tmp_path, {"phase": "a"})
    assert ledger.read(tmp_path) == [{"phase": "a"}]


APPENDS = """
import sys
from pathlib import Path
from distill.system import ledger
for number in range(50):
    ledger.append(Path(sys.argv[1]), {"phase": sys.argv[2] * 5000, "number": number})
"""


def test_processes_that_write_at_once_keep_whole_lines(tmp_path: Path) -> None:
    run = [subprocess.Popen([sys.executable, "-c", APPENDS, tmp_path, name]) for name in "abcd"]
    assert [process.wait() for process in run] == [0] * 4
    lines = ledger.read(tmp_path)
    assert len(lines) == (tmp_path / ledger.FILE).read_bytes().count(b"\n") == 200
    for name in "abcd":
        assert [line["number"] for line in lines if line["phase"] == name * 5000] == list(range(50))


def test_the_middle_of_a_line_that_another_writes_is_not_taken_for_its_end(tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    with open(tmp_path / ledger.FILE, "wb", buffering=0) as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        other.write(b'{"phase": ')
        waits = threading.Thread(target=ledger.append, args=(tmp_path, {"phase": "b"}))
        waits.start()
        waits.join(timeout=0.3)
        assert waits.is_alive()
        other.write(b'"a"}\n')
    waits.join()
    assert (tmp_path / ledger.FILE).read_bytes() == b'{"phase": "a"}\n{"phase": "b"}\n'


def allocate(megabytes: int) -> None:
    """Pages that this process does not have yet; malloc could give some that earlier tests freed."""
    with mmap.mmap(-1, megabytes << 20) as fresh:
        for page in range(0, megabytes << 20, mmap.PAGESIZE):
            fresh[page] = 1


def peaks(run: Path) -> dict[str, int]:
    return {line["phase"]: line["peak_memory_bytes"] >> 20 for line in ledger.read(run)}


linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux sets a process's peak back")


@linux
def test_a_phase_does_not_inherit_the_peak_of_an_earlier_one(tmp_path: Path) -> None:
    for name, megabytes in (("large", 300), ("small", 1)):
        with ledger.phase(tmp_path, name):
            allocate(megabytes)
    assert peaks(tmp_path)["large"] - peaks(tmp_path)["small"] > 200


@linux
def test_a_phase_keeps_its_peak_when_one_inside_sets_the_systems_back(tmp_path: Path) -> None:
    with ledger.phase(tmp_path, "outer"):
        allocate(300)
        with ledger.phase(tmp_path, "inner"):
            allocate(1)
    with ledger.phase(tmp_path, "other outer"):
        with ledger.phase(tmp_path, "other inner"):
            allocate(300)
        allocate(1)
    found = peaks(tmp_path)
    assert found["outer"] - found["inner"] > 200
    assert abs(found["other outer"] - found["other inner"]) < 100 and found["other outer"] - found["inner"] > 200


class Cuda:
    """Two cards, of which the second is nearly empty."""

    def __init__(self, initialised: bool = True) -> None:
        self.peaks, self.held, self.initialised = [900, 40], [100, 10], initialised

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return self.initialised

    def device_count(self) -> int:
        return 2

    def reset_peak_memory_stats(self, card: int) -> None:
        self.peaks[card] = self.held[card]

    def max_memory_allocated(self, card: int) -> int:
        return self.peaks[card]


def test_the_peak_of_the_fullest_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda()
    monkeypatch.setattr(torch, "cuda", cuda)
    with ledger.phase(tmp_path, "outer", [ledger.measure_memory]):
        cuda.peaks[0] = 500
        with ledger.phase(tmp_path, "inner", [ledger.measure_memory]):
            cuda.peaks[1] = 300
    cuda.initialised = False
    with ledger.phase(tmp_path, "on the processor", [ledger.measure_memory]):
        pass
    assert [line.get("peak_device_bytes") for line in ledger.read(tmp_path)] == [300, 500, None]


def test_reading_and_appending_load_no_torch(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from distill.system import ledger; "
        "ledger.append(Path(sys.argv[1]), {'phase': 'a'}); ledger.read(Path(sys.argv[1])); "
        "[begin()() for begin in ledger.METERS]; print({'torch', 'lightning'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
    assert json.loads((tmp_path / ledger.FILE).read_text()) == {"phase": "a"} and os.listdir(tmp_path) == [ledger.FILE]
