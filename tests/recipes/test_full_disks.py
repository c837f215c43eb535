"""A disk that is full while the results are written: one line, nothing lost, and the same command goes on."""

from __future__ import annotations

import errno
import gc
import itertools
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distill import cli
from distill.system import files


@pytest.fixture
def program(outcome_of: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`program("evaluate", file)`: a command in this process, whose errors are reported as those of a program."""
    monkeypatch.setattr(gc, "freeze", lambda: None)  # or all objects of the tests would stay for good

    def command(*arguments: object) -> Any:
        monkeypatch.setattr(sys, "argv", ["distill", *map(str, arguments)])
        return outcome_of(cli.main)

    return command


@pytest.mark.usefixtures("one_thread")
def test_evaluation_and_report_survive_a_full_disk(
    finished: Any, distill: Any, program: Any, contents: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Full at the first write, at the second, and so on; each start finds some room, and goes on with it."""
    run, real = tmp_path / "run", files._write_all
    made = ("evaluation.json", "measured.jsonl", "report.html", "report.md", "costs.jsonl")
    shutil.copytree(finished.run, run, ignore=shutil.ignore_patterns("cache", *made))
    command, refused = ["evaluate", *finished.elsewhere(run)], 0
    for room in itertools.count():
        writes = itertools.count()

        def full(descriptor: int, content: bytes, room: int = room, writes: Any = writes) -> None:
            if next(writes) >= room:
                real(descriptor, content[: len(content) // 2])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(descriptor, content)

        with monkeypatch.context() as patch:
            patch.setattr(files, "_write_all", full)
            outcome = program(*command)
        if outcome.status == 0:
            break
        outcome.refused("disk full", "then run the same command again")
        refused += 1
    assert refused > 3 and not list(run.glob("*.tmp"))
    untouched = contents(run)
    distill(*command).done()
    assert contents(run) == untouched
    results = [json.loads((folder / "evaluation.json").read_text()) for folder in (finished.run, run)]
    assert results[0]["fidelity"] == results[1]["fidelity"] and (run / "report.md").exists()
