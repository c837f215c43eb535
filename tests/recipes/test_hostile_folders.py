"""A part of the hostile folders of tests/benchmarks/hostile_folders.py, opened with real commands."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks/hostile_folders.py"


def test_folders_that_lead_elsewhere_reach_nothing() -> None:
    done = subprocess.run([sys.executable, SCRIPT, "--only", "elsewhere"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "0 ran code, 0 touched files outside, 0 problems" in done.stdout
