"""Whatever ends a training, and whenever: continued, it makes the student that an undisturbed training makes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def test_kills_at_random_instants_change_no_bit_of_the_student() -> None:
    """The real command, killed 30 times; tests/benchmarks/train_kill_storm.py throws as many kills as one likes.

    The student has dropout, the steps are accumulated, and kills fall anywhere from the first step to the saving.
    """
    storm = [sys.executable, str(BENCHMARKS / "train_kill_storm.py"), "--kills", "30"]
    done = subprocess.run(storm, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    hits = {words: int(count) for count, words in re.findall(r"^ *(\d+)  (.*)$", done.stdout, flags=re.MULTILINE)}
    assert any(words.startswith("kills, ") and count == 30 for words, count in hits.items())
    by_signal = {name: sum(n for words, n in hits.items() if words.startswith(name)) for name in ("SIGKILL", "SIG")}
    assert by_signal["SIG"] == 30 and 10 <= by_signal["SIGKILL"] < 30
    assert hits["SIGKILL  between checkpoints"] > 0  # or the kills were not where the training is
