"""Time of `distill --help`: python tests/benchmarks/help_time.py prints the median of ten starts in seconds."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

STARTS = 10


def seconds_of_help() -> float:
    """One start of the program in a process of its own, from nothing to its last line."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-m", "distill", "--help"], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin


if __name__ == "__main__":
    times = [seconds_of_help() for _ in range(STARTS)]
    print(f"distill --help: median {statistics.median(times):.3f} s of {STARTS} starts (slowest {max(times):.3f} s)")
