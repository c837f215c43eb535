"""The frame of the measurements: pairs become ratios with spread, aims are judged, commands are measured apart."""

from __future__ import annotations

import sys
from pathlib import Path

import bench
import paired
import pytest
from paired import Cost, Pairs, Row, Setup


def pairs() -> Pairs:
    """Our runs take half, a quarter and all of the peer's time, and half of its processor time."""
    ours, peer = [1.0, 1.0, 4.0], [2.0, 4.0, 4.0]
    return Pairs([Cost(wall, 1.0) for wall in ours], [Cost(wall, 2.0) for wall in peer])


def test_a_time_is_the_median_of_the_pairs_ratios() -> None:
    row = pairs().time_row("head_loss", "fp32", "time of plain", "≤ 0.65")
    assert (row.ratio, row.low, row.high, row.processor) == (0.5, 0.25, 1.0, 0.5)
    assert row.met and (row.ours, row.peer) == ("1 s", "4 s")


def test_a_speed_is_the_other_way_around() -> None:
    row = pairs().speed_row("train_step", "fp32", "tokens/s of plain", "≥ 2.5")
    assert (row.ratio, row.low, row.high, row.processor) == (2.0, 1.0, 4.0, 2.0)
    assert row.met is False


def test_pairs_are_interleaved_and_alternate() -> None:
    order: list[str] = []
    found = paired.paired(lambda: order.append("ours"), lambda: order.append("peer"), Setup(repeats=2))
    assert order == ["ours", "peer", "ours", "peer", "peer", "ours"]
    assert len(found.ours) == len(found.peer) == 2


def test_a_command_is_measured_in_a_process_of_its_own() -> None:
    found = paired.cost_apart([sys.executable, "-S", "-c", "x = b'x' * 50_000_000"])
    assert 50e6 < found.peak_bytes < 100e6, "not the memory of this process, which has torch"
    assert found.processor > 0 and found.wall > 0


def test_a_command_that_fails_is_shown() -> None:
    with pytest.raises(SystemExit, match=r"(?s)exit status 3.*why"):
        paired.cost_apart([sys.executable, "-S", "-c", "import sys; print('why'); sys.exit(3)"])


def test_the_allocators_peak_is_that_of_the_run() -> None:
    torch = pytest.importorskip("torch")

    def prepared() -> object:
        torch.zeros(1_000_000)  # gone before the run begins
        kept = torch.zeros(1_000)
        return lambda: kept + torch.zeros(100_000)[:1_000]

    assert 404_000 <= paired.allocator_peak(prepared) <= 420_000


def test_the_table_says_machine_aim_and_whether_it_is_met() -> None:
    rows = [pairs().time_row("head_loss", "fp32", "time", "≤ 0.1"), Row("a", "b", "c", "1", "2", 0.5, 0.5, 0.5)]
    text = bench.markdown(bench.machine("cpu"), rows)
    assert "torch" in text and "cores" in text
    assert "| 1 s | 4 s | 0.50 | 0.25 – 1.00 | 0.50 | ≤ 0.1 | no |" in text
    assert text.endswith("| 1 | 2 | 0.50 |  |  |  |  |\n")


def test_every_benchmark_with_rows_has_its_name_in_the_table() -> None:
    folder = Path(bench.__file__).parent
    found = {file.stem for file in folder.glob("*.py") if "\ndef rows(" in file.read_text(encoding="utf-8")}
    assert found == {*bench.BENCHES, *bench.PEERS}
