"""The search for inputs that break something goes on: the suite's random tests with new seeds, as long as told.

    python tests/benchmarks/fuzz.py --minutes 10 tests/cache/format/test_fuzz.py

Without files: all tests that hypothesis draws for. The suite itself draws the same examples each time
(tests/conftest.py); a failure here prints the example, which then belongs into a test of its own. Prints a line a round
and a tally; exit status 1 when something failed.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def random_tests() -> list[str]:
    """Find the files of tests that hypothesis draws for."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(file) for file in files if "from hypothesis import" in file.read_text(encoding="utf-8")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=None, help="of the first round; default: a new one")
    options = parser.parse_args()
    files, chance = options.files or random_tests(), random.Random(options.seed)
    environment = {**os.environ, "HYPOTHESIS_PROFILE": "search", "PYTHONPATH": str(ROOT)}
    end, rounds, failed = time.monotonic() + 60 * options.minutes, 0, 0
    while time.monotonic() < end:
        seed = chance.randrange(2**32) if rounds or options.seed is None else options.seed
        line = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--hypothesis-seed={seed}", *files]
        done = subprocess.run(line, env=environment, cwd=ROOT, capture_output=True, text=True)
        rounds, failed = rounds + 1, failed + (done.returncode != 0)
        print(f"seed {seed}: {done.stdout.strip().splitlines()[-1]}", flush=True)
        if done.returncode:
            print(done.stdout, flush=True)
    print(f"{rounds} rounds of {len(files)} files, {failed} with a failure")
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
