"""Progress: lines now and then without a terminal, a bar in one, and rates of this start alone."""

from __future__ import annotations

import io
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.system import progress
from distill.system.progress import LINE_SECONDS, Progress, visible

TURNING = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock.monotonic)
    return clock


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_without_a_terminal_there_is_a_line_now_and_then(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("train", total=1000, unit="steps") as bar:
        for _ in range(100):
            clock.now += LINE_SECONDS / 10
            bar.advance(2, loss="1.5")
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 10
        assert lines[0] == "train: 20 of 1,000 steps (2 %), 1.33 steps/s, 12 min 15 s left  loss 1.5"
    assert len(capsys.readouterr().out.splitlines()) == 1  # how it ended


def test_work_that_is_quick_leaves_one_line_and_none_leaves_none(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress("cache", total=4, unit="tokens") as bar:
        clock.now += 0.5
        bar.advance(4)
    assert capsys.readouterr().out == "cache: 4 of 4 tokens (100 %), 8.00 tokens/s, 0.0 s left\n"
    with Progress("cache", total=4, unit="tokens", done=4):
        pass
    assert capsys.readouterr().out == ""


def test_the_rate_counts_this_start_alone(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither what an earlier start did nor the time before the work began: the remaining time would be wrong."""
    bar = Progress("cache", total=10_000, unit="tokens", done=6_000)
    clock.now += 100  # loading
    bar.start(done=6_000)
    clock.now += 20
    bar.advance(2_000)
    assert bar.rate() == pytest.approx(100)
    assert "8,000 of 10,000 tokens (80 %), 100 tokens/s, 20 s left" in capsys.readouterr().out


def test_before_the_first_unit_the_remaining_time_is_unknown(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    """An accumulation of many passes lasts longer than the time between two lines."""
    with Progress("train", total=10, unit="steps") as bar:
        clock.now += LINE_SECONDS
        bar.advance(0)
        assert capsys.readouterr().out == "train: 0 of 10 steps (0 %), 0.00 steps/s, ? left\n"


def test_in_a_terminal_there_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    with Progress("train", total=8, unit="steps") as bar:
        bar.total = 16
        bar.start(done=2)
        bar.advance(6, loss="0.25", lr="1e-3")
        assert bar._bar is not None
        bar._bar.refresh()
    shown = terminal.getvalue()
    assert "\x1b[" in shown and "━" in shown  # drawn, not printed line by line
    assert "8/16" in shown and "steps/s" in shown and "loss 0.25  lr 1e-3" in shown
    assert "8 of 16" not in shown


def test_say_is_seen_at_once_in_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    class Pipe(io.StringIO):
        flushed = 0

        def flush(self) -> None:
            self.flushed += 1

    pipe = Pipe()
    monkeypatch.setattr(sys, "stdout", pipe)
    progress.say("hello")
    assert pipe.getvalue() == "hello\n" and pipe.flushed


@given(st.text())
def test_what_is_shown_steers_no_terminal_and_loses_nothing(text: str) -> None:
    shown = visible(text)
    assert not any(unicodedata.category(letter) == "Cc" and letter not in "\n\t" for letter in shown)
    assert not any(unicodedata.bidirectional(letter) in TURNING for letter in shown)
    if text.isprintable():
        assert shown == text


def test_a_message_with_a_strangers_name_steers_no_terminal(distill: Any, tmp_path: Path) -> None:
    outcome = distill("chat", f"{tmp_path}/\x1b[2J\x07")
    assert outcome.status == 2 and "\\x1b[2J\\x07: holds no" in outcome.err and "\x1b" not in outcome.err


def test_in_a_notebook_one_line_changes_in_its_place(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    import IPython.display

    shown: list[list[str]] = []  # the lines that each output of the cell has had

    class Handle:
        def __init__(self) -> None:
            self.lines = shown[-1]

        def update(self, data: dict[str, str], raw: bool) -> None:
            self.lines.append(data["text/plain"])

    def display(data: dict[str, str], raw: bool, display_id: bool) -> Handle:
        shown.append([data["text/plain"]])
        return Handle()

    monkeypatch.setattr(IPython.display, "display", display)
    monkeypatch.setattr(IPython, "get_ipython", lambda: type("Shell", (), {"kernel": object()})())
    with Progress("train", total=100, unit="steps") as bar:
        for _ in range(100):
            clock.now += 0.1
            bar.advance(1)
    (lines,) = shown
    assert 9 <= len(lines) <= 11, "about one a second"
    assert lines[-1].startswith("train: 100 of 100 steps (100 %)")
